// limbeck synth STAGE: data from models, and what becomes of data

import { join } from 'node:path';
import type { ComparedRecord, Winner } from '../synth/judge.ts';
import type { Pipeline, PipelineEvent } from '../synth/pipeline.ts';
import type { Provider } from '../synth/provider.ts';
import type { ProviderSpec } from '../synth/providers/open.ts';
import type { InstructionRecord } from '../synth/record.ts';
import type { Tokenizer } from '../tokenizer/tokenizer.ts';
import { count } from '../train/format.ts';
import {
  allValues,
  type Command,
  command,
  commonArguments,
  Exit,
  exitCode,
  numberOption,
  parseOverrides,
  UsageError,
} from './command.ts';
import { interruptible } from './interrupt.ts';

/** Options that name a model. */
export const modelArguments = {
  provider: {
    type: 'string',
    description: 'Address of a server (http://.../v1), ollama:NAME, a .gguf file, or the folder of a model.',
    valueHint: 'model',
  },
  'model-name': { type: 'string', description: "The model's name on a server.", valueHint: 'name' },
  dialect: { type: 'string', description: 'What the server knows beyond OpenAI: vllm, llama.cpp, limbeck.', valueHint: 'name' },
  concurrency: { type: 'string', description: 'Calls at work at once.', valueHint: 'n' },
  threads: { type: 'string', description: 'Threads of a model in this process.', valueHint: 'n' },
  template: { type: 'string', description: 'Chat template of a local model: a style, or Jinja source.', valueHint: 'style' },
} as const;

type ModelArguments = { readonly [K in 'model-name' | 'dialect' | 'concurrency' | 'threads' | 'template']?: string | undefined };

/** What the options of {@link modelArguments} say. */
export function modelSpec(provider: string, args: ModelArguments): ProviderSpec {
  const concurrency = numberOption('concurrency', args.concurrency, 1, true);
  const threads = numberOption('threads', args.threads, 1, true);
  const dialects = ['openai', 'vllm', 'llama.cpp', 'limbeck'] as const;
  const dialect = dialects.find((name) => name === args.dialect);
  if (args.dialect !== undefined && dialect === undefined) {
    throw new UsageError(`--dialect is "${args.dialect}"; there are ${dialects.join(', ')}`);
  }
  return {
    provider,
    ...(args['model-name'] === undefined ? {} : { model: args['model-name'] }),
    ...(args.template === undefined ? {} : { template: args.template }),
    ...(dialect === undefined ? {} : { dialect }),
    ...(concurrency === undefined ? {} : { concurrency }),
    ...(threads === undefined ? {} : { threads }),
  };
}

const dataArguments = {
  data: { type: 'positional', required: true, description: 'Records: a .jsonl file of a stage.', valueHint: 'file' },
  output: { type: 'string', alias: 'o', description: 'Folder for the result, the manifest and the report.', valueHint: 'folder' },
  seed: { type: 'string', description: 'Seed of all records. Default 0.', valueHint: 'n' },
} as const;

/** Runs a pipeline with its progress on the terminal, or as JSON lines. */
async function follow(events: (signal: AbortSignal) => AsyncIterable<PipelineEvent>, json: boolean | undefined): Promise<void> {
  const terminal = process.stderr.isTTY && !json;
  const clear = () => void (terminal && process.stderr.write('\r\u001b[K'));
  let stopped = false;
  await interruptible(
    async (signal) => {
      try {
        for await (const event of events(signal)) {
          if (json) process.stdout.write(`${JSON.stringify(event)}\n`);
          else if (event.type === 'progress' && terminal) {
            clear();
            process.stderr.write(
              `${event.stage}  ${count(event.done)}${event.total === undefined ? '' : ` of ${count(event.total)}`}`,
            );
          } else if (event.type === 'finished') {
            clear();
            const dropped = Object.entries(event.dropped).map(([reason, n]) => `${reason} ${count(n)}`);
            const refused = dropped.length ? `, refused: ${dropped.join(', ')}` : '';
            process.stdout.write(`${event.stage.padEnd(12)} ${count(event.input)} in, ${count(event.records)} out${refused}\n`);
          } else if (event.type === 'usage') {
            const { provider, requests, retries, promptTokens, completionTokens } = event;
            process.stdout.write(
              `${'calls'.padEnd(12)} ${count(requests)} of ${provider}, ${count(retries)} tried again; tokens ${count(promptTokens)} in, ${count(completionTokens)} out\n`,
            );
          }
        }
      } catch (error) {
        if (!signal.aborted) throw error;
      }
      stopped = signal.aborted;
    },
    (signal) => process.stderr.write(`${signal}: stopping; what is finished stays, and the same command goes on from there\n`),
  );
  clear();
  if (stopped) throw new Exit(exitCode.interrupted);
}

/** A stage over the records of a file, with a report. */
async function overData(
  args: { data: string; output?: string | undefined; seed?: string | undefined; json?: boolean | undefined },
  chain: (from: Pipeline<InstructionRecord>) => Pipeline<InstructionRecord>,
  provider?: Provider,
): Promise<void> {
  const { jsonlRecords, pipeline, runPipeline } = await import('../synth/pipeline.ts');
  const { reportOutput } = await import('../synth/report.ts');
  if (args.output === undefined) throw new UsageError('where to? Give --output, a folder');
  const source = pipeline(await jsonlRecords<InstructionRecord>(args.data));
  const seed = numberOption('seed', args.seed, 0, true);
  const options = { output: args.output, ...(seed === undefined ? {} : { seed }) };
  await follow((signal) => metered(runPipeline(chain(source), { ...options, signal }), provider), args.json);
  await reportOutput(args.output);
  if (!args.json) process.stdout.write(`report       ${join(args.output, 'report.html')}\n`);
}

/** What a run tells, and what its provider was used for. */
async function* metered(
  events: AsyncIterable<PipelineEvent>,
  provider: Provider | undefined,
): AsyncGenerator<PipelineEvent, void> {
  yield* events;
  if (provider !== undefined) yield { type: 'usage', provider: provider.name, ...provider.meter };
}

/** With the provider that the options name. */
async function withProvider(
  args: ModelArguments & { provider?: string | undefined },
  run: (provider: Awaited<ReturnType<typeof open>>) => Promise<void>,
  more: Partial<ProviderSpec> = {},
) {
  if (args.provider === undefined) throw new UsageError('which model? Give --provider');
  const provider = await open({ ...modelSpec(args.provider, args), ...more });
  try {
    await run(provider);
  } finally {
    await provider.dispose();
  }
}

async function open(spec: ProviderSpec) {
  const { openProvider } = await import('../synth/providers/open.ts');
  return openProvider(spec);
}

/** The tokenizer of a file, a folder, or a GGUF file. */
async function tokenizerAt(path: string): Promise<Tokenizer> {
  const { isGguf, openGgufModel } = await import('../models/gguf.ts');
  const { loadTokenizer } = await import('../tokenizer/tokenizer.ts');
  if (!isGguf(path)) return loadTokenizer(path);
  await using file = await openGgufModel(path);
  return file.tokenizer();
}

const list = (text: string) => text.split(',').map((part) => part.trim());

const magpie = command({
  meta: { name: 'magpie', description: 'Let an aligned model write instructions from nothing, and answers to them.' },
  args: {
    run: { type: 'positional', required: false, description: 'Run file: .json, .ts, .mts, .js or .mjs.', valueHint: 'file' },
    set: { type: 'string', description: 'Change a field of the run, as often as wanted.', valueHint: 'field=value' },
    'dry-run': { type: 'boolean', description: 'Check the run and print it with all defaults.' },
    schema: { type: 'boolean', description: 'Print the JSON Schema of run files.' },
    ...commonArguments,
  },
  examples: `
limbeck synth magpie magpie.json
# the smallest one
{ "output": "runs/magpie", "count": 1000, "provider": "ollama:llama3" }
# through to a filtered data set
{ "output": "runs/magpie", "count": 1000, "provider": { "provider": "http://127.0.0.1:8000/v1", "model": "Qwen2-7B-Instruct", "dialect": "vllm" },
  "tags": ["quality", "difficulty"], "reward": true, "filter": { "quality": "good" },
  "export": [{ "path": "data.parquet", "format": "sharegpt" }] }
`.trim(),
  async run({ args, rawArgs, cmd }) {
    const { loadSynthRun, magpieJsonSchema, runMagpie } = await import('../synth/run.ts');
    if (args.schema) {
      process.stdout.write(`${JSON.stringify(magpieJsonSchema(), null, 2)}\n`);
      return;
    }
    if (args.run === undefined) throw new UsageError('which run? Give the path of a run file');
    const run = await loadSynthRun(args.run, parseOverrides(allValues(rawArgs, cmd.args as never, 'set')));
    if (args['dry-run']) {
      process.stdout.write(`${JSON.stringify(run, null, 2)}\n`);
      return;
    }
    await follow((signal) => runMagpie(run, { signal }), args.json);
    if (!args.json) process.stdout.write(`report       ${join(run.output, 'report.html')}\n`);
  },
});

const instruct = command({
  meta: { name: 'instruct', description: 'Give raw texts questions and answers, as documents for instruction pretraining.' },
  args: {
    texts: {
      type: 'positional',
      required: true,
      description: 'Raw texts: .jsonl, or plain text; a file, a folder or a glob.',
      valueHint: 'path',
    },
    output: dataArguments.output,
    seed: dataArguments.seed,
    ...modelArguments,
    tokenizer: {
      type: 'string',
      description: "The synthesizer's tokenizer.json or its folder, to measure prompts. Default: the local model's.",
      valueHint: 'path',
    },
    field: { type: 'string', description: 'Field of a JSON line that holds the text. Default text.', valueHint: 'name' },
    passage: { type: 'string', description: 'Cut texts into passages of so many tokens. Default: not cut.', valueHint: 'tokens' },
    rounds: { type: 'string', description: 'Texts of a chain; each sees those before it. Default 3.', valueHint: 'n' },
    context: {
      type: 'string',
      description: 'Most tokens of prompt and answer. Default 4096, or what the local model reads.',
      valueHint: 'tokens',
    },
    'max-tokens': { type: 'string', description: 'Most tokens of an answer. Default 400.', valueHint: 'n' },
    temperature: { type: 'string', description: '0 takes the likeliest token. Default 0.', valueHint: 'x' },
    ...commonArguments,
  },
  examples: `
limbeck synth instruct 'corpus/*.txt' --provider runs/synthesizer --passage 300 --output data/augmented
limbeck synth instruct corpus.jsonl --provider http://127.0.0.1:8000/v1 --model-name instruction-synthesizer --tokenizer models/synthesizer --output data/augmented
`.trim(),
  async run({ args }) {
    const { output } = args;
    if (output === undefined) throw new UsageError('where to? Give --output, a folder');
    if (args.provider === undefined) throw new UsageError('which synthesizer? Give --provider');
    const number = (name: 'passage' | 'rounds' | 'context' | 'max-tokens') => numberOption(name, args[name], 1, true);
    const passage = number('passage');
    const rounds = number('rounds') ?? 3;
    const temperature = numberOption('temperature', args.temperature, 0) ?? 0;
    const seed = numberOption('seed', args.seed, 0, true) ?? 0;
    const remote = /^(https?:|ollama:)/.test(args.provider);
    if (remote && args.tokenizer === undefined) throw new UsageError('--tokenizer is missing: prompts are measured with it');
    const { resolveCheckpoint } = await import('../models/folder.ts');
    const { loadConfig } = await import('../models/model.ts');
    const { jsonl } = await import('../data/jsonl.ts');
    const { textFiles } = await import('../data/source.ts');
    const { passageStage, textRecords } = await import('../synth/instruct/passages.ts');
    const { documentStage, renderStage } = await import('../synth/instruct/render.ts');
    const { reportInstructions } = await import('../synth/instruct/report.ts');
    const { synthesizeInstructions } = await import('../synth/instruct/synthesize.ts');
    const { pipeline, readManifest, runPipeline } = await import('../synth/pipeline.ts');
    const local = remote ? undefined : await resolveCheckpoint(args.provider);
    const tokenizer = await tokenizerAt(args.tokenizer ?? local!);
    const most = local === undefined ? 4096 : Math.min(4096, (await loadConfig(local)).context);
    const isLines = /\.(jsonl|ndjson)$/.test(args.texts);
    const texts = pipeline(
      await textRecords(
        isLines ? jsonl(args.texts, args.field === undefined ? {} : { field: args.field }) : textFiles(args.texts),
      ),
    );
    const context = number('context') ?? most;
    const run = async (provider: Provider): Promise<void> => {
      const stages = synthesizeInstructions(
        passage === undefined ? texts : texts.through(passageStage({ tokenizer, tokens: passage })),
        {
          provider,
          tokenizer,
          rounds,
          context,
          maxTokens: number('max-tokens') ?? 400,
          sampling: { temperature },
        },
      )
        .through(renderStage())
        .through(documentStage());
      await follow((signal) => metered(runPipeline(stages, { output, seed, signal }), provider), args.json);
    };
    await withProvider(args, run, { context });
    const { report } = await reportInstructions(output);
    const documents = join(output, (await readManifest(output)).at(-1)!.file);
    if (args.json) {
      process.stdout.write(`${JSON.stringify({ type: 'report', documents, ...report })}\n`);
      return;
    }
    const defects = Object.entries(report.malformed).map(([kind, n]) => `${kind} ${count(n)}`);
    process.stdout.write(
      `pairs        ${count(report.pairs)} for ${count(report.withPairs)} of ${count(report.texts)} texts, ${count(report.tooLong)} too long\n` +
        `no pairs     ${defects.length > 0 ? defects.join(', ') : 'none'}; ${count(report.cutOff)} answers cut off\n` +
        `documents    ${documents}\n` +
        `report       ${join(output, 'report.html')}\n`,
    );
  },
});

const tag = command({
  meta: { name: 'tag', description: 'Ask a model about each record: quality, difficulty, category, safety, language.' },
  args: {
    ...dataArguments,
    ...modelArguments,
    missions: { type: 'string', description: 'What to ask. Default quality,difficulty,category.', valueHint: 'a,b' },
    ...commonArguments,
  },
  examples:
    'limbeck synth tag runs/magpie/02-respond.jsonl --provider runs/chat --missions quality,language --output runs/tagged',
  async run({ args }) {
    const module = await import('../synth/tag.ts');
    const asked = args.missions === undefined ? undefined : list(args.missions);
    const unknown = asked?.find((mission) => !Object.hasOwn(module.missions, mission));
    if (unknown !== undefined) {
      throw new UsageError(`--missions has "${unknown}"; there are ${Object.keys(module.missions).join(', ')}`);
    }
    await withProvider(args, (provider) =>
      overData(
        args,
        (chain) => chain.through(module.tag({ provider, ...(asked === undefined ? {} : { missions: asked as never }) })),
        provider,
      ),
    );
  },
});

const dedupe = command({
  meta: { name: 'dedupe', description: 'Drop repeats: by shared word sequences, or by embedding.' },
  args: {
    ...dataArguments,
    ...modelArguments,
    threshold: {
      type: 'string',
      description: 'Without a provider the common share of word sequences, default 0.8; with one the distance, default 0.05.',
      valueHint: 'x',
    },
    keep: {
      type: 'string',
      description: 'first, or all to only mark repeats (by embedding). Default first.',
      valueHint: 'which',
    },
    ...commonArguments,
  },
  examples: `
limbeck synth dedupe runs/magpie/02-respond.jsonl --output runs/unique
limbeck synth dedupe runs/magpie/02-respond.jsonl --provider ollama:nomic-embed-text --output runs/unique
`.trim(),
  async run({ args }) {
    const module = await import('../synth/dedupe.ts');
    const threshold = numberOption('threshold', args.threshold, 0);
    const limit = threshold === undefined ? {} : { threshold };
    if (args.keep !== undefined && args.keep !== 'first' && args.keep !== 'all') throw new UsageError('--keep is first or all');
    const keep = args.keep === undefined ? {} : { keep: args.keep as 'first' | 'all' };
    if (args.provider === undefined) return overData(args, (chain) => chain.through(module.dedupeText(limit)));
    await withProvider(args, (provider) =>
      overData(
        args,
        (chain) => chain.through(module.embed({ provider })).through(module.dedupe({ ...limit, ...keep })),
        provider,
      ),
    );
  },
});

const filter = command({
  meta: { name: 'filter', description: 'Keep the records that pass conditions.' },
  args: {
    ...dataArguments,
    recipe: { type: 'string', description: 'A published recipe, such as magpie-pro-300k.', valueHint: 'name' },
    set: {
      type: 'string',
      description: 'A condition, as often as wanted: quality=good, longest=1000, ...',
      valueHint: 'field=value',
    },
    ...commonArguments,
  },
  examples: `
limbeck synth filter runs/tagged/01-tag.jsonl --recipe magpie-filter-5 --output runs/filtered
limbeck synth filter runs/tagged/01-tag.jsonl --set quality=good --set longest=1000 --output runs/filtered
`.trim(),
  async run({ args, rawArgs, cmd }) {
    const { filter: stage, filterRecipe } = await import('../synth/filter.ts');
    const { parseFilter } = await import('../synth/run.ts');
    const changes = parseOverrides(allValues(rawArgs, cmd.args as never, 'set'));
    const base = args.recipe === undefined ? {} : filterRecipe(args.recipe);
    if (args.recipe === undefined && Object.keys(changes).length === 0) throw new UsageError('by what? Give --recipe or --set');
    const conditions = parseFilter({ ...base, ...changes });
    await overData(args, (chain) => chain.through(stage(conditions)));
  },
});

const judge = command({
  meta: { name: 'judge', description: 'Let a model score the answers of records, 0 to 100.' },
  args: {
    ...dataArguments,
    ...modelArguments,
    against: {
      type: 'string',
      description: 'Other answers to the same instructions, by the ids of the records: which are better?',
      valueHint: 'file',
    },
    ...commonArguments,
  },
  examples: `
limbeck synth judge runs/magpie/02-respond.jsonl --provider http://127.0.0.1:8000/v1 --model-name judge --output runs/judged
limbeck synth judge answers.jsonl --against runs/magpie/02-respond.jsonl --provider runs/chat --output runs/compared
`.trim(),
  async run({ args }) {
    const { compare, otherAnswers, reward } = await import('../synth/judge.ts');
    const { bootstrap, correlation, lengths, winRate } = await import('../synth/statistics.ts');
    const { readManifest, readRecords } = await import('../synth/pipeline.ts');
    const { responseOf } = await import('../synth/record.ts');
    if (args.against !== undefined) {
      const others = await otherAnswers(readRecords<InstructionRecord>(args.against));
      await withProvider(args, (provider) =>
        overData(args, (chain) => chain.through(compare({ provider, against: others })), provider),
      );
      const winners: Winner[] = [];
      const answers: [string[], string[]] = [[], []];
      const file = (await readManifest(args.output!)).at(-1)!.file;
      for await (const record of readRecords<ComparedRecord>(join(args.output!, file))) {
        winners.push(record.comparison.winner);
        answers[0].push(responseOf(record));
        answers[1].push(others.get(record.id)!.response);
      }
      const rate = winners.length > 0 ? winRate(winners) : undefined;
      const [mine, theirs] = answers.map((texts) => lengths(texts));
      if (args.json)
        process.stdout.write(`${JSON.stringify({ type: 'judge', compared: winners.length, rate, lengths: [mine, theirs] })}\n`);
      else if (rate !== undefined) {
        const share = (x: number) => `${(100 * x).toFixed(1)} %`;
        process.stdout.write(
          `wins         ${share(rate.mean)} (95 %: ${share(rate.low)} to ${share(rate.high)}) of ${count(winners.length)}: ${count(rate.wins)} won, ${count(rate.losses)} lost, ${count(rate.ties)} ties\n` +
            `length       ${mine!.characters.mean.toFixed(0)} characters, the others ${theirs!.characters.mean.toFixed(0)}\n`,
        );
      }
      return;
    }
    await withProvider(args, async (provider) => {
      await overData(args, (chain) => chain.through(reward({ provider })), provider);
      const scores: number[] = [];
      const sizes: number[] = [];
      const file = (await readManifest(args.output!)).at(-1)!.file;
      for await (const record of readRecords<InstructionRecord>(join(args.output!, file))) {
        if (typeof record.reward !== 'number') continue;
        scores.push(record.reward);
        sizes.push(responseOf(record).length);
      }
      const { meter } = provider;
      const interval = scores.length > 0 ? bootstrap(scores) : undefined;
      const result = {
        type: 'judge',
        scored: scores.length,
        score: interval,
        lengthCorrelation: correlation(scores, sizes),
        meter,
      };
      if (args.json) process.stdout.write(`${JSON.stringify(result)}\n`);
      else if (interval !== undefined) {
        process.stdout.write(
          `score        ${interval.mean.toFixed(2)} (95 %: ${interval.low.toFixed(2)} to ${interval.high.toFixed(2)}) of ${count(scores.length)} answers; ` +
            `correlation with their length ${result.lengthCorrelation.toFixed(2)}\n`,
        );
      }
    });
  },
});

const report = command({
  meta: { name: 'report', description: 'Write an HTML report of a data set.' },
  args: {
    data: {
      type: 'positional',
      required: true,
      description: 'Output folder of a run, or a .jsonl file of records.',
      valueHint: 'path',
    },
    out: {
      type: 'string',
      alias: 'o',
      description: 'File to write. Default: report.html in the folder, or here.',
      valueHint: 'file',
    },
    title: { type: 'string', description: 'Heading of the report.', valueHint: 'text' },
    ...commonArguments,
  },
  examples: 'limbeck synth report runs/magpie --title "A thousand instructions"',
  async run({ args }) {
    const { lastRound, reportInstructions } = await import('../synth/instruct/report.ts');
    const { reportOutput, writeDatasetReport } = await import('../synth/report.ts');
    const { readManifest, readRecords } = await import('../synth/pipeline.ts');
    const isFile = args.data.endsWith('.jsonl');
    const path = args.out ?? (isFile ? 'report.html' : join(args.data, 'report.html'));
    const ofPairs = !isFile && lastRound(await readManifest(args.data)) !== undefined;
    const survey = isFile
      ? await writeDatasetReport(
          path,
          readRecords<InstructionRecord>(args.data),
          args.title === undefined ? {} : { title: args.title },
        )
      : ofPairs
        ? (await reportInstructions(args.data, path, args.title)).survey
        : await reportOutput(args.data, path, args.title);
    process.stdout.write(args.json ? `${JSON.stringify({ type: 'report', path, records: survey.records })}\n` : `${path}\n`);
  },
});

const stages: Readonly<Record<string, Command>> = { magpie, instruct, tag, dedupe, filter, judge, report };

export const synth = command({
  meta: { name: 'synth', description: 'Data from models: Magpie, tags, repeats, filters, judges, reports.' },
  subCommands: stages,
  examples: `
limbeck synth magpie magpie.json
limbeck synth filter runs/magpie/05-tag.jsonl --set quality=good --output runs/filtered
limbeck synth report runs/magpie
`.trim(),
});
