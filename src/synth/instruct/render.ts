// Pairs into pretraining text: a run of texts with pairs becomes one few-shot document, in a mode and in templates that are drawn for it. A text
// without pairs stays as it is.

import { checkSeed, randomBlock, uniform } from '../../tensor/random.ts';
import type { GatherStage, Outcome, RecordStage } from '../pipeline.ts';
import type { InstructionExample, InstructionPair } from './format.ts';
import { type InstructionChain, runsOf } from './synthesize.ts';
import { type PairTemplate, pairTemplates, type TemplateBank } from './templates.ts';

/**
 * How the pairs of a document are written: behind the text one by one, as a dialog, all questions before all answers, the last one after the
 * others as examples, or the last one as the next turn of a dialog.
 */
export type RenderMode = 'classic' | 'dialog' | 'numbered' | 'shown' | 'next-turn';

export interface PairRenderOptions {
  /** Default: {@link pairTemplates}. */
  readonly bank?: TemplateBank;
  /** How often each mode comes, relative to the others. Default: {@link modeWeights}. */
  readonly weights?: Partial<Readonly<Record<RenderMode, number>>>;
  /** Chance, 0 to 1, that the pairs come before the text; in the modes classic and dialog. Default 0.05. */
  readonly inversion?: number;
}

/** The published weights. A document in which some text has one pair only takes the other three modes as classic. */
export const modeWeights: Readonly<Record<RenderMode, number>> = {
  classic: 80,
  dialog: 5,
  numbered: 5,
  shown: 5,
  'next-turn': 5,
};

/** A document for pretraining. */
export interface RenderedDocument {
  readonly text: string;
  /** `raw`: a text without pairs, as it was. */
  readonly mode: RenderMode | 'raw';
  readonly inverted: boolean;
  readonly texts: number;
  readonly pairs: number;
}

/** Draws that follow from one seed. */
export interface RandomStream {
  /** A number in [0, 1). */
  next(): number;
  pick<T>(list: readonly T[]): T;
  shuffled<T>(list: readonly T[]): T[];
}

/** The stream of a seed. */
export function randomStream(seed: number): RandomStream {
  checkSeed(seed);
  const block = new Uint32Array(4);
  let drawn = 0;
  const next = (): number => uniform(randomBlock(seed, renderStream, drawn++, block)[0]!);
  return {
    next,
    pick: (list) => list[Math.floor(next() * list.length)]!,
    shuffled(list) {
      const all = [...list];
      for (let i = all.length - 1; i > 0; i--) {
        const j = Math.floor(next() * (i + 1));
        [all[i], all[j]] = [all[j]!, all[i]!];
      }
      return all;
    },
  };
}
// A stream number of the seed that nothing else uses.
const renderStream = 0x5f4d;

/** Renders examples that belong together as one document. */
export function renderExamples(
  examples: readonly InstructionExample[],
  random: RandomStream,
  { bank = pairTemplates, weights = modeWeights, inversion = 0.05 }: PairRenderOptions = {},
): RenderedDocument {
  const pairs = examples.reduce((sum, example) => sum + example.pairs.length, 0);
  const count = { texts: examples.length, pairs };
  if (pairs === 0) return { text: examples.map((e) => e.context).join('\n\n'), mode: 'raw', inverted: false, ...count };
  const mode = drawMode(
    weights,
    examples.every((example) => example.pairs.length >= 2),
    random,
  );
  const inverted = random.next() < inversion && (mode === 'classic' || mode === 'dialog');
  // One choice for the whole document, so that its examples are alike.
  const style = styleOf(mode, bank, random);
  const frame = random.next() < bank.framed ? random.pick(bank.frames) : '{context}';
  const lead = random.next() < bank.led ? random.pick(inverted ? bank.trailers : bank.leads) : '';
  const join = random.pick(bank.joins);
  const written = examples.map(({ context, pairs }) => {
    if (pairs.length === 0) return context;
    const asked = style(pairs);
    if (context === '') return asked;
    const text = fill(frame, { context });
    return inverted ? paragraphs(asked, lead, text) : paragraphs(text, lead, asked);
  });
  return { text: written.join(join), mode, inverted, ...count };
}

function drawMode(weights: NonNullable<PairRenderOptions['weights']>, several: boolean, random: RandomStream): RenderMode {
  const modes = Object.entries(weights) as [RenderMode, number][];
  let left = random.next() * modes.reduce((sum, [, weight]) => sum + weight, 0);
  let drawn: RenderMode = 'classic';
  for (const [mode, weight] of modes) {
    if (left >= 0 && left < weight) drawn = mode;
    left -= weight;
  }
  return several || drawn === 'dialog' ? drawn : 'classic';
}

/** Writes the pairs of one text. */
type Style = (pairs: readonly InstructionPair[]) => string;

function styleOf(mode: RenderMode, bank: TemplateBank, random: RandomStream): Style {
  const steps = random.pick(bank.steps);
  const options = random.pick(bank.options);
  const parts = (pair: InstructionPair): InstructionPair => reasoned(chosen(pair, options, random), steps);
  const one = ({ question, gap, answer }: Omit<PairTemplate, 'between'>, pair: InstructionPair): string =>
    fill(question, { ...pair }) + gap + fill(answer, { ...pair });
  switch (mode) {
    case 'classic': {
      const template = random.pick(bank.pairs);
      return (pairs) => pairs.map((pair) => one(template, parts(pair))).join(template.between);
    }
    case 'dialog': {
      const template = { ...random.pick(bank.dialogs), gap: '' };
      return (pairs) =>
        template.lead + pairs.map((pair) => one({ ...template, gap: template.between }, parts(pair))).join(template.between);
    }
    case 'numbered': {
      const template = random.pick(bank.numbered);
      return (pairs) => {
        const all = pairs.map((pair, i) => ({ ...parts(pair), number: String(i + 1) }));
        return paragraphs(
          lines(template.questions, ...all.map((pair) => fill(template.question, pair))),
          lines(template.answers, ...all.map((pair) => fill(template.answer, pair))),
        );
      };
    }
    case 'shown': {
      const template = random.pick(bank.shown);
      return (pairs) => {
        const all = pairs.map((pair) => one(template, parts(pair)));
        return paragraphs(template.lead, ...all.slice(0, -1), lines(template.test, all.at(-1)!));
      };
    }
    case 'next-turn': {
      const template = random.pick(bank.nextTurns);
      return (pairs) => {
        const all = pairs.map((pair) => one({ ...template, gap: template.between }, parts(pair)));
        return paragraphs(template.lead + all.slice(0, -1).join(template.between), lines(template.next, all.at(-1)!));
      };
    }
    default:
      return mode satisfies never;
  }
}

const askForSteps = /\nLet's think step by step\.$/;

/** A pair whose question lists options, in another list; where labels tell options apart, the answer is a label. */
function chosen(
  { question, answer }: InstructionPair,
  template: TemplateBank['options'][number],
  random: RandomStream,
): InstructionPair {
  const tail = askForSteps.exec(question)?.[0] ?? '';
  const found = /^(.*?)\nOptions:\n((?:- [^\n]+(?:\n|$))+)$/s.exec(question.slice(0, question.length - tail.length));
  if (found === null) return { question, answer };
  const options = random.shuffled(
    found[2]!
      .trimEnd()
      .split('\n')
      .map((line) => line.slice(2).trim()),
  );
  const labels = options.map((_, i) => labelOf(template.labels, i));
  const written = options.map((option, i) => fill(template.option, { option, label: labels[i]! })).join(template.between);
  const at = options.indexOf(conclusionOf(answer) ?? answer);
  // Marks that are all alike name nothing, and neither does a label when an option is there twice.
  const named = at >= 0 && new Set(labels).size === labels.length && options.lastIndexOf(options[at]!) === at;
  return {
    question: lines(found[1]!, template.lead, written) + tail,
    answer: named ? answer.slice(0, answer.length - options[at]!.length) + labels[at]! : answer,
  };
}

function labelOf(labels: TemplateBank['options'][number]['labels'], i: number): string {
  switch (labels) {
    case 'A':
      return String.fromCharCode(65 + (i % 26)) + (i < 26 ? '' : String(Math.floor(i / 26)));
    case 'a':
      return labelOf('A', i).toLowerCase();
    case '1':
      return String(i + 1);
    default:
      return labels;
  }
}

const conclusion = '\nTherefore, the answer is ';

/** What an answer with reasoning concludes, when it does so once. */
function conclusionOf(answer: string): string | undefined {
  const parts = answer.split(conclusion);
  return parts.length === 2 ? parts[1]!.trim() : undefined;
}

/** A pair whose answer is reasoned, in another form of reasoning. */
function reasoned({ question, answer }: InstructionPair, template: TemplateBank['steps'][number]): InstructionPair {
  const last = conclusionOf(answer);
  if (last === undefined || !askForSteps.test(question)) return { question, answer };
  const parts = { question: question.replace(askForSteps, ''), steps: answer.split(conclusion)[0]!.trim(), answer: last };
  return { question: fill(template.question, parts), answer: fill(template.answer, parts) };
}

/** Puts values in place of `{names}`; what they hold is text, whatever it looks like. */
function fill(template: string, values: Readonly<Record<string, string>>): string {
  return template.replace(/\{(\w+)\}/g, (whole, name: string) => values[name] ?? whole);
}

function lines(...parts: readonly string[]): string {
  return parts.filter((part) => part !== '').join('\n');
}

function paragraphs(...parts: readonly string[]): string {
  return parts.filter((part) => part !== '').join('\n\n');
}

/** Renders the documents of a chain with one stream of draws. */
export function renderChain(
  chain: Pick<InstructionChain, 'texts'>,
  seed: number,
  options: PairRenderOptions = {},
): RenderedDocument[] {
  const random = randomStream(seed);
  return runsOf(chain).map((run) => renderExamples(run, random, options));
}

/** A stage that renders chains; each chain gives a list of documents. */
export function renderStage(
  options: PairRenderOptions = {},
): RecordStage<InstructionChain, { readonly documents: readonly RenderedDocument[] }> {
  return {
    kind: 'record',
    name: 'render',
    settings: {
      bank: options.bank ?? pairTemplates,
      weights: options.weights ?? modeWeights,
      inversion: options.inversion ?? 0.05,
    },
    run: (chain, { seed }): Outcome<{ documents: RenderedDocument[] }> => ({
      value: { documents: renderChain(chain, seed(), options) },
    }),
  };
}

/** A stage that puts documents one a line: what `pretrain` reads with `data: { jsonl }`. */
export function documentStage(): GatherStage<{ readonly documents: readonly RenderedDocument[] }, RenderedDocument> {
  return {
    kind: 'gather',
    name: 'documents',
    settings: {},
    async run(records, output) {
      for await (const { documents } of records()) for (const document of documents) await output.keep(document);
    },
  };
}
