// A synthesis run as one writes it: where the model is, what it writes, what becomes of it. Stages come in one order, and those that are
// not asked for are left out.

import { dirname, join, resolve } from 'node:path';
import type { z } from 'zod';
import { ConfigError } from '../tensor/errors.ts';
import { overridden, readRunFile } from '../train/config.ts';
import { explain } from '../train/issues.ts';
import { zodLoaded } from '../train/schema.ts';
import { dedupe, dedupeText, embed } from './dedupe.ts';
import { exportRecords } from './export.ts';
import { type FilterOptions, filter, filterRecipes } from './filter.ts';
import { reward } from './judge.ts';
import { magpie } from './magpie/magpie.ts';
import { type Pipeline, type PipelineEvent, readManifest, readRecords, runPipeline } from './pipeline.ts';
import type { Provider } from './provider.ts';
import { openProvider } from './providers/open.ts';
import { categories, difficulties, type InstructionRecord, qualities } from './record.ts';
import { reportOutput } from './report.ts';
import { type Mission, missions, tag } from './tag.ts';

function makeSchema() {
  const z = zodLoaded();
  const count = () => z.int().min(1);
  const numbers = () => z.union([z.number(), z.array(z.number()).min(1)]);
  const provider = z.union([
    z.string().min(1),
    z.strictObject({
      provider: z.string().min(1).describe('Address of a server, ollama:NAME, a .gguf file, or the folder of a model.'),
      model: z.string().min(1).optional().describe("The model's name on a server."),
      dialect: z
        .enum(['openai', 'vllm', 'llama.cpp', 'limbeck'])
        .optional()
        .describe("What a server knows beyond OpenAI's fields."),
      concurrency: count().optional().describe('Calls at work at once.'),
      context: count().optional().describe('Most tokens of a prompt and its answer, of a .gguf file.'),
      threads: count().optional().describe('Threads of a model in this process.'),
      template: z.string().min(1).optional().describe('Chat template of a local model: a style, or Jinja source.'),
    }),
  ]);
  const sampling = {
    maxTokens: count().optional().describe('Most new tokens.'),
    topK: count().optional().describe('Draw from the k likeliest tokens only.'),
    minP: z.number().min(0).max(1).optional().describe('Draw from tokens at least this share as likely as the likeliest.'),
    repetitionPenalty: z.number().gt(0).optional().describe('Divides the logits of tokens that are there already.'),
    stop: z.array(z.string().min(1)).optional().describe('Texts that end the output.'),
    stopIds: z.array(z.int().min(0)).optional().describe('Tokens that end the output.'),
    bias: z.record(z.string(), z.number()).optional().describe('Added to the logits of token ids.'),
  };
  return z.strictObject({
    $schema: z.string().optional(),
    output: z.string().min(1).describe('Folder of the stages, the manifest and the report.'),
    seed: z.int().min(0).default(0).describe('Seed of all records. Default 0.'),
    count: count().describe('How many instructions are drawn.'),
    provider: provider.describe('Writes instructions.'),
    responder: provider.optional().describe('Answers them. Default: the provider.'),
    judge: provider.optional().describe('Tags and scores. Default: the responder.'),
    embedder: provider.optional().describe('Embeds instructions for dedupe. Default: the provider.'),
    base: provider.optional().describe("Base model whose answers are scored too, for the reward's difference."),
    template: z
      .string()
      .min(1)
      .optional()
      .describe("Family of the pre-query, or a model's name. Default: by the provider's model."),
    instruction: z
      .strictObject({
        ...sampling,
        temperature: numbers().optional().describe('One or several, drawn for each record. Default 1.'),
        topP: numbers().optional().describe('One or several, drawn for each record. Default 1.'),
        firstBias: z.record(z.string(), z.number()).optional().describe('Added to the logits of token ids, first token only.'),
        firstTemperature: z.number().min(0).optional().describe('Temperature of the first token.'),
      })
      .prefault({}),
    response: z
      .strictObject({ ...sampling, temperature: z.number().min(0).optional(), topP: z.number().gt(0).max(1).optional() })
      .prefault({}),
    system: z
      .union([
        z.string().min(1),
        z.array(z.string().min(1)).min(1),
        z.record(
          z.string(),
          z.union([z.string().min(1), z.strictObject({ prompt: z.string().min(1), weight: z.number().min(0) })]),
        ),
      ])
      .optional()
      .describe('System prompt that steers what is asked: one, a list, or named ones with weights.'),
    keepSystem: z.boolean().default(false).describe('Keep the system prompt for the answer too. Default false.'),
    turns: count().default(1).describe('Questions and answers of a conversation. Default 1.'),
    singleLine: z.boolean().default(false).describe('Instructions of one line only. Default false.'),
    dedupeText: z
      .union([z.boolean(), z.strictObject({ threshold: z.number().gt(0).max(1).optional(), words: count().optional() })])
      .default(true)
      .describe('Drop instructions that share most word sequences with an earlier one. Default true.'),
    dedupe: z
      .union([z.boolean(), z.strictObject({ threshold: z.number().gt(0).optional(), keep: z.enum(['first', 'all']).optional() })])
      .default(false)
      .describe('Nearest neighbours by embedding. Default false.'),
    tags: z
      .array(z.enum(Object.keys(missions) as [Mission, ...Mission[]]))
      .default([])
      .describe('What the judge is asked about each record. Default none.'),
    reward: z.boolean().default(false).describe('Let the judge score the answers. Default false.'),
    filter: z
      .union([
        z.enum(Object.keys(filterRecipes) as [keyof typeof filterRecipes, ...(keyof typeof filterRecipes)[]]),
        z.strictObject({
          quality: z.enum(qualities).optional(),
          difficulty: z.enum(difficulties).optional(),
          categories: z.array(z.enum(categories)).optional(),
          languages: z.array(z.string()).optional(),
          safe: z.boolean().optional(),
          distance: z.number().min(0).optional(),
          reward: z.number().optional(),
          rewardDifference: z.number().optional(),
          noColon: z.boolean().optional(),
          response: z.strictObject({ least: z.int().min(0).optional(), most: z.int().min(0).optional() }).optional(),
          longest: count().optional(),
          easyShare: z.number().min(0).max(1).optional(),
        }),
      ])
      .optional()
      .describe('Which records stay: the name of a recipe, or conditions.'),
    export: z
      .array(
        z.strictObject({
          path: z.string().min(1).describe('.jsonl or .parquet, inside the output folder unless absolute.'),
          format: z.enum(['sharegpt', 'alpaca', 'messages']).default('messages'),
        }),
      )
      .default([{ path: 'dataset.jsonl', format: 'messages' }])
      .describe('Files of the data set. Default dataset.jsonl of messages.'),
  });
}

let made: ReturnType<typeof makeSchema> | undefined;
const schema = () => (made ??= makeSchema());

/** A Magpie run with every default filled in. */
export type MagpieRun = z.output<ReturnType<typeof makeSchema>>;
/** A Magpie run as one writes it. */
export type MagpieRunInput = z.input<ReturnType<typeof makeSchema>>;

/** Checks a run and fills in the defaults. @throws ConfigError */
export function parseMagpieRun(input: unknown, source = 'run'): MagpieRun {
  const result = schema().safeParse(input, { reportInput: true });
  if (result.success) return result.data;
  const { message, ...data } = explain(result.error.issues, input, schema());
  throw new ConfigError(`${source}: ${message}`, { code: 'ERR_CONFIG', op: source, ...data });
}

/** Reads a run file as `loadRun` does; `output` is relative to it. @throws ConfigError */
export async function loadSynthRun(path: string, overrides: Readonly<Record<string, unknown>> = {}): Promise<MagpieRun> {
  const run = parseMagpieRun(overridden(await readRunFile(path), overrides), path);
  return { ...run, output: resolve(dirname(path), run.output) };
}

/** Conditions of a filter, checked. @throws ConfigError */
export function parseFilter(input: unknown): FilterOptions {
  const { filter: checked } = parseMagpieRun({ output: 'x', count: 1, provider: 'x', filter: input }, 'filter');
  return given(checked as object) as FilterOptions;
}

/** JSON Schema of a run file. */
export function magpieJsonSchema(): Record<string, unknown> {
  return zodLoaded().toJSONSchema(schema(), { io: 'input' }) as Record<string, unknown>;
}

/** Opened providers of a run, each place once. */
async function openAll(run: MagpieRun) {
  const opened = new Map<string, Provider>();
  const open = async (spec: MagpieRun['provider'] | undefined): Promise<Provider | undefined> => {
    if (spec === undefined) return undefined;
    const key = JSON.stringify(spec);
    const known = opened.get(key);
    if (known !== undefined) return known;
    const full = typeof spec === 'string' ? { provider: spec } : spec;
    const given = Object.fromEntries(Object.entries(full).filter(([, value]) => value !== undefined));
    const provider = await openProvider(given as unknown as Parameters<typeof openProvider>[0]);
    opened.set(key, provider);
    return provider;
  };
  const close = async () => {
    for (const provider of opened.values()) await provider.dispose();
  };
  try {
    const provider = (await open(run.provider))!;
    const responder = (await open(run.responder)) ?? provider;
    const judge = (await open(run.judge)) ?? responder;
    const embedder = (await open(run.embedder)) ?? provider;
    return { provider, responder, judge, embedder, base: await open(run.base), all: opened, close };
  } catch (error) {
    await close();
    throw error;
  }
}

// Optional fields of zod may be undefined, those of our options may not.
const given = <T extends object>(value: T) =>
  Object.fromEntries(Object.entries(value).filter(([, v]) => v !== undefined)) as { [K in keyof T]: Exclude<T[K], undefined> };

/** Runs Magpie and all stages that were asked for, writes the data set and its report. The same call goes on where it stopped. */
export async function* runMagpie(
  input: MagpieRunInput,
  options: { readonly signal?: AbortSignal } = {},
): AsyncGenerator<PipelineEvent, void> {
  const run = parseMagpieRun(input);
  const { provider, responder, judge, embedder, base, all, close } = await openAll(run);
  try {
    let chain: Pipeline<InstructionRecord> = magpie({
      provider,
      responder,
      count: run.count,
      instruction: given(run.instruction) as never,
      response: given(run.response) as never,
      keepSystem: run.keepSystem,
      turns: run.turns,
      singleLine: run.singleLine,
      ...(run.template === undefined ? {} : { template: run.template }),
      ...(run.system === undefined ? {} : { system: run.system }),
    });
    if (run.dedupeText) chain = chain.through(dedupeText(run.dedupeText === true ? {} : given(run.dedupeText)));
    if (run.dedupe) {
      chain = chain.through(embed({ provider: embedder })).through(dedupe(run.dedupe === true ? {} : given(run.dedupe)));
    }
    if (run.tags.length > 0) chain = chain.through(tag({ provider: judge, missions: run.tags }));
    if (run.reward) chain = chain.through(reward({ provider: judge, ...(base === undefined ? {} : { base }) }));
    if (run.filter !== undefined)
      chain = chain.through(filter(typeof run.filter === 'string' ? run.filter : (given(run.filter) as never)));
    yield* runPipeline(chain, { output: run.output, seed: run.seed, ...options });
    const last = (await readManifest(run.output)).at(-1)!;
    for (const { path, format } of run.export) {
      const to = path.startsWith('/') ? path : join(run.output, path);
      await exportRecords(to, readRecords<InstructionRecord>(join(run.output, last.file)), format);
    }
    await reportOutput(run.output);
    for (const { name, meter } of all.values()) yield { type: 'usage', provider: name, ...meter };
  } finally {
    await close();
  }
}
