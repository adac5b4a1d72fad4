// From raw texts to texts with pairs, in rounds: each text of a chain is shown to the synthesizer behind those before it and the pairs that it
// found for them, so that later texts are answered in the same manner (M-shot synthesis, arXiv:2406.14491).

import { ConfigError } from '../../tensor/errors.ts';
import type { Tokenizer } from '../../tokenizer/tokenizer.ts';
import type { GatherStage, Pipeline, RecordStage } from '../pipeline.ts';
import { type Provider, type Sampling, unable } from '../provider.ts';
import {
  bracketsOf,
  contextText,
  exampleText,
  type InstructionExample,
  type MalformedPair,
  type PairDefect,
  parsePairs,
} from './format.ts';
import type { RawText } from './passages.ts';

/** A text and what the synthesizer made of it. */
export interface SynthesizedText extends InstructionExample {
  readonly id: string;
  /** Pieces of the output that are no pairs. */
  readonly malformed: readonly MalformedPair[];
  /** `length`: the output was cut off; `too-long`: the text does not fit into the context, and nothing was asked. */
  readonly finish: 'stop' | 'length' | 'too-long';
  /** Texts of the chain, with their pairs, that the prompt held. */
  readonly shown: number;
  readonly promptTokens: number;
  readonly completionTokens: number;
}

/** Texts that were synthesized one after the other, and those whose turn has not come. */
export interface InstructionChain {
  readonly id: string;
  readonly texts: readonly SynthesizedText[];
  readonly waiting: readonly RawText[];
}

export interface SynthesizerOptions {
  readonly provider: Provider;
  /** The synthesizer's tokenizer: prompts are measured with it, and its begin and end tokens bracket examples. */
  readonly tokenizer: Tokenizer;
  /** Texts of a chain, and rounds. Default 3. */
  readonly rounds?: number;
  /** Most tokens of a prompt and its answer. Default 4096. */
  readonly context?: number;
  /** Most tokens of an answer. Default 400. */
  readonly maxTokens?: number;
  /** How answers are drawn. Default: greedy. */
  readonly sampling?: Pick<Sampling, 'temperature' | 'topP' | 'topK' | 'minP' | 'repetitionPenalty'>;
}

/**
 * Adds the rounds of a synthesizer to a pipeline: a stage that makes chains, then one stage a round.
 * @throws ConfigError for numbers out of range; ProviderError `ERR_UNABLE` for a provider without raw completion
 */
export function synthesizeInstructions(texts: Pipeline<RawText>, options: SynthesizerOptions): Pipeline<InstructionChain> {
  const { rounds = 3, provider } = options;
  check('rounds', rounds, 1, 1000);
  if (!provider.can.complete) throw unable(provider.name, 'continue a raw prompt (complete)', 'use a backend of raw completion');
  let pipeline = texts.through(chainStage(rounds));
  for (let round = 1; round <= rounds; round++) pipeline = pipeline.through(roundStage(round, options));
  return pipeline;
}

/**
 * Deals N texts out to ⌈N / rounds⌉ chains: the first text of each chain comes first, then the second of each, and so on, so that texts of one
 * document, which stand side by side, do not meet in a chain.
 */
export function chainStage(rounds: number): GatherStage<RawText, InstructionChain> {
  return {
    kind: 'gather',
    name: 'chains',
    settings: { rounds },
    async run(records, output) {
      let count = 0;
      for await (const _ of records()) count++;
      const chains = Math.ceil(count / rounds);
      // One reader for each round, at its own place: no more than a chain is held.
      const readers = Array.from({ length: rounds }, () => records()[Symbol.asyncIterator]());
      try {
        for (const [round, reader] of readers.entries()) for (let i = 0; i < round * chains; i++) await reader.next();
        for (let i = 0; i < chains; i++) {
          const waiting: RawText[] = [];
          for (const reader of readers) {
            const { done, value } = await reader.next();
            if (done !== true) waiting.push(value);
          }
          await output.keep({ id: String(i), texts: [], waiting });
        }
      } finally {
        for (const reader of readers) await reader.return?.();
      }
    },
  };
}

/** Asks for pairs about the next text of each chain. */
export function roundStage(round: number, options: SynthesizerOptions): RecordStage<InstructionChain, InstructionChain> {
  const { provider, tokenizer, context = 4096, maxTokens = 400, sampling = { temperature: 0 } } = options;
  check('maxTokens', maxTokens, 1, Number.MAX_SAFE_INTEGER);
  check('context', context, maxTokens + 2, Number.MAX_SAFE_INTEGER);
  const brackets = bracketsOf(tokenizer);
  const room = context - maxTokens;
  return {
    kind: 'record',
    name: `round-${round}`,
    settings: { provider: provider.name, model: provider.model, tokenizer: tokenizer.digest, context, maxTokens, sampling },
    concurrency: provider.concurrency,
    async run({ id, texts, waiting: [next, ...waiting] }, { seed, signal }) {
      if (next === undefined) return { value: { id, texts, waiting } };
      const asked = `${brackets.begin}${contextText(next.text)}`;
      // Where the chain has grown too long, or its last text has no pairs, a new one begins.
      const examples = lastRun(texts);
      const chained = examples.map((example) => exampleText(example, brackets)).join('') + asked;
      const [prompt, shown] = tokenizer.encode(chained).length <= room ? [chained, examples.length] : [asked, 0];
      const text = { id: next.id, context: next.text };
      if (shown === 0 && tokenizer.encode(asked).length > room) {
        const untried = {
          ...text,
          pairs: [],
          malformed: [],
          finish: 'too-long',
          shown,
          promptTokens: 0,
          completionTokens: 0,
        } as const;
        return { value: { id, texts: [...texts, untried], waiting } };
      }
      // The end token ends an answer; a model that goes on with the next context is stopped there.
      const reply = await provider.complete(prompt, { ...sampling, maxTokens, stop: ['<CON>'], seed: seed(), signal });
      const { pairs, malformed } = parsePairs(reply.text);
      const { finish, usage } = reply;
      return { value: { id, texts: [...texts, { ...text, pairs, malformed, finish, shown, ...usage }], waiting } };
    },
  };
}

/** The texts, each with pairs, that the last one was shown behind, and itself; none where it has no pairs. */
function lastRun(texts: readonly SynthesizedText[]): readonly SynthesizedText[] {
  const last = texts.at(-1);
  return last === undefined || last.pairs.length === 0 ? [] : texts.slice(texts.length - 1 - last.shown);
}

/**
 * The texts of a chain as few-shot examples: a run holds texts that were shown to the synthesizer together, each with pairs. A text without pairs
 * is a run of its own.
 */
export function runsOf({ texts }: Pick<InstructionChain, 'texts'>): SynthesizedText[][] {
  const runs: SynthesizedText[][] = [];
  for (const text of texts) {
    if (text.shown > 0 && text.pairs.length > 0) runs.at(-1)!.push(text);
    else runs.push([text]);
  }
  return runs;
}

/** What a synthesizer gave. */
export interface SynthesisReport {
  readonly texts: number;
  /** Texts with at least one pair. */
  readonly withPairs: number;
  /** Texts that did not fit into the context. */
  readonly tooLong: number;
  /** Answers that were cut off. */
  readonly cutOff: number;
  readonly pairs: number;
  /** Pieces that are no pairs, by kind. */
  readonly malformed: Readonly<Partial<Record<PairDefect, number>>>;
  /** Runs with pairs, by the texts that they hold. */
  readonly runs: Readonly<Record<number, number>>;
  readonly promptTokens: number;
  readonly completionTokens: number;
}

/** Counts what chains hold. */
export async function synthesisReport(
  chains: AsyncIterable<InstructionChain> | Iterable<InstructionChain>,
): Promise<SynthesisReport> {
  const sums = { texts: 0, withPairs: 0, tooLong: 0, cutOff: 0, pairs: 0, promptTokens: 0, completionTokens: 0 };
  const malformed: Partial<Record<PairDefect, number>> = {};
  const runs: Record<number, number> = {};
  for await (const chain of chains) {
    for (const text of chain.texts) {
      sums.texts++;
      if (text.pairs.length > 0) sums.withPairs++;
      if (text.finish === 'too-long') sums.tooLong++;
      if (text.finish === 'length') sums.cutOff++;
      sums.pairs += text.pairs.length;
      sums.promptTokens += text.promptTokens;
      sums.completionTokens += text.completionTokens;
      for (const { defect } of text.malformed) malformed[defect] = (malformed[defect] ?? 0) + 1;
    }
    for (const run of runsOf(chain)) if (run[0]!.pairs.length > 0) runs[run.length] = (runs[run.length] ?? 0) + 1;
  }
  return { ...sums, malformed, runs };
}

function check(name: string, value: number, least: number, most: number): void {
  if (Number.isInteger(value) && value >= least && value <= most) return;
  throw new ConfigError(`synth: ${name} is ${value}; it should be a whole number from ${least}`, {
    code: 'ERR_CONFIG',
    op: 'synth',
    argument: name,
    expected: `a whole number from ${least}`,
    actual: String(value),
  });
}
