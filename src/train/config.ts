// A run: read from a file, checked, with every default filled in.

import { readFile, stat } from 'node:fs/promises';
import { dirname, extname, isAbsolute, resolve } from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';
import type { z } from 'zod';
import { checkText } from '../tensor/argument.ts';
import { ConfigError, LimbeckError } from '../tensor/errors.ts';
import { describeFields, explain } from './issues.ts';
import { type RunSchemas, runSchemas, zodLoaded } from './schema.ts';

/** A pretraining run with every default filled in. */
export type PretrainConfig = z.output<RunSchemas['pretrain']>;
/** A distillation run with every default filled in. */
export type DistillConfig = z.output<RunSchemas['distill']>;
/** An instruction finetuning run with every default filled in. */
export type FinetuneConfig = z.output<RunSchemas['finetune']>;
/** A run on text with every default filled in. */
export type TextRunConfig = PretrainConfig | DistillConfig;
/** A run with every default filled in. */
export type RunConfig = TextRunConfig | FinetuneConfig;
/** A run as one writes it: fields with a default may be left out. */
export type RunInput = z.input<RunSchemas['run']>;
/** A divergence and its parameter. */
export type Divergence = z.output<RunSchemas['divergence']>;
/** A learning-rate schedule with every default filled in. */
export type Schedule = z.output<RunSchemas['schedule']>;

/** Gives a run file its types: `export default defineRun({ kind: 'pretrain', ... })`. */
export function defineRun<const T extends RunInput>(run: T): T {
  return run;
}

/** Checks a run and fills in the defaults; relative paths are resolved against `base` (the current folder). @throws ConfigError */
export function parseRun(input: unknown, options: { base?: string; source?: string } = {}): RunConfig {
  const source = options.source ?? 'run';
  const schema = runSchemas().run;
  const result = schema.safeParse(input, { reportInput: true });
  if (!result.success) {
    const { message, argument, expected, actual } = explain(result.error.issues, input, schema);
    throw new ConfigError(`${source}: ${message}`, {
      code: 'ERR_CONFIG',
      op: source,
      argument,
      ...(expected === undefined ? {} : { expected }),
      ...(actual === undefined ? {} : { actual }),
    });
  }
  return resolvePaths(result.data, options.base ?? process.cwd());
}

/** {@link parseRun} for a run that must be of one kind. @throws ConfigError */
export function parseRunOf<K extends RunConfig['kind']>(kind: K, input: unknown): Extract<RunConfig, { kind: K }> {
  const run = parseRun(input);
  if (run.kind !== kind) {
    throw new ConfigError(`${run.name}: kind is '${run.kind}', expected '${kind}'; run it with ${run.kind}()`, {
      code: 'ERR_CONFIG',
      op: kind,
      argument: 'kind',
      expected: kind,
      actual: run.kind,
    });
  }
  return run as Extract<RunConfig, { kind: K }>;
}

/** Optimizer steps of a run whose length is told in steps or tokens. */
export function plannedSteps(run: RunConfig): number {
  return run.steps ?? Math.ceil(run.tokens! / tokensPerStep(run));
}

/** Tokens that one optimizer step sees. */
export function tokensPerStep(run: RunConfig): number {
  return run.batch.sequences * run.batch.length * run.batch.accumulate;
}

/** JSON Schema of a run file: name it in `"$schema"` and editors complete and check the fields. */
export function runJsonSchema(): Record<string, unknown> {
  return zodLoaded().toJSONSchema(runSchemas().run, { io: 'input' }) as Record<string, unknown>;
}

/** Every field of a run file, with its meaning and default. */
export function runFields(kind: RunConfig['kind']): readonly { readonly field: string; readonly about: string }[] {
  return describeFields(runSchemas().run, { kind });
}

/**
 * Reads a run file (.json, .js, .mjs, .ts, .mts), applies `overrides` (`{ 'optimizer.learningRate': 1e-3 }`) and checks it.
 * A module exports the run, or a function that returns it, as `default` or as `run`. @throws ConfigError
 */
export async function loadRun(path: string, overrides: Readonly<Record<string, unknown>> = {}): Promise<RunConfig> {
  checkText('loadRun', 'path', path, 'the path of a run file');
  return parseRun(overridden(await readRunFile(path), overrides), { base: dirname(resolve(path)), source: path });
}

/** What a run file holds, unchecked. @throws ConfigError `ERR_CONFIG_FILE` */
export async function readRunFile(path: string): Promise<unknown> {
  const file = resolve(path);
  const kinds = 'give a .json, .ts, .mts, .js or .mjs file';
  try {
    if (!runFile.test(file) && (await stat(file))) throw fileError(path, `is no run file; ${kinds}`);
    return extname(file) === '.json' ? parseJson(await readFile(file, 'utf8'), path) : await importRun(file, path);
  } catch (error) {
    if (LimbeckError.is(error)) throw error;
    const missing = (error as NodeJS.ErrnoException).code === 'ENOENT';
    const why = error instanceof Error ? error.message : String(error);
    throw fileError(path, missing ? `there is no such run file; ${kinds}` : `cannot be read: ${why}`, error);
  }
}

const runFile = /\.(json|[cm]?[jt]s)$/;

function fileError(path: string, what: string, cause?: unknown): ConfigError {
  return new ConfigError(`${path}: ${what}`, { code: 'ERR_CONFIG_FILE', op: 'loadRun', argument: path, cause });
}

/** A copy of `input` with one field, named by its path (`a.b.c`), set to `value`. */
function override(input: unknown, field: string, value: unknown): unknown {
  const [head, ...rest] = field.split('.');
  if (head === undefined || head === '') {
    throw new ConfigError(`--set ${field}: a field is named by its path, as in optimizer.learningRate=1e-3`, {
      code: 'ERR_CONFIG',
      op: 'override',
      argument: field,
    });
  }
  // `model` may be the name of a preset: changing one of its fields makes the longer form of the same thing.
  const object: Record<string, unknown> =
    typeof input === 'string' ? { preset: input } : { ...(input as Record<string, unknown> | undefined) };
  return { ...object, [head]: rest.length === 0 ? value : override(object[head], rest.join('.'), value) };
}

/** A copy of `input` with fields, named by their paths, set to other values. */
export function overridden(input: unknown, fields: Readonly<Record<string, unknown>>): unknown {
  return Object.entries(fields).reduce((changed, [field, value]) => override(changed, field, value), input);
}

function parseJson(text: string, path: string): unknown {
  try {
    return JSON.parse(text);
  } catch (error) {
    const why = (error as Error).message;
    const at = /position (\d+)/.exec(why);
    const before = at ? text.slice(0, Number(at[1])).split('\n') : undefined;
    const where = before ? `${path}:${before.length}:${before.at(-1)!.length + 1}` : path;
    throw new ConfigError(`${where}: not valid JSON: ${why}`, {
      code: 'ERR_CONFIG_FILE',
      op: 'loadRun',
      argument: path,
      cause: error,
    });
  }
}

async function importRun(file: string, path: string): Promise<unknown> {
  await readFile(file); // a missing run file is told apart from a missing import inside it
  const module = /\.[cm]?js$/.test(file)
    ? ((await import(pathToFileURL(file).href)) as Record<string, unknown>)
    : await importTypeScript(file);
  const value = module.default ?? module.run;
  if (value === undefined) {
    throw new ConfigError(`${path}: exports no run; write \`export default defineRun({ ... })\``, {
      code: 'ERR_CONFIG_FILE',
      op: 'loadRun',
      argument: path,
      expected: 'an export named default or run',
      actual: Object.keys(module).join(', ') || 'no exports',
    });
  }
  return typeof value === 'function' ? await value() : value;
}

async function importTypeScript(file: string): Promise<Record<string, unknown>> {
  const { createJiti } = await import('jiti');
  // `import { defineRun } from 'limbeck'` means this very package, wherever the run file lies.
  const index = fileURLToPath(new URL(`../index${extname(import.meta.url)}`, import.meta.url));
  const jiti = createJiti(import.meta.url, { alias: { limbeck: index }, moduleCache: false, interopDefault: false });
  return jiti.import<Record<string, unknown>>(file);
}

function resolvePaths(run: RunConfig, base: string): RunConfig {
  const one = (path: string) => (isAbsolute(path) ? path : resolve(base, path));
  const many = (value: string | string[] | undefined) => (typeof value === 'string' ? one(value) : value?.map(one));
  const sources = <T extends object>(value: T): T => {
    const paths = Object.entries(value).filter(([key]) => key === 'text' || key === 'jsonl' || key === 'tokens');
    return { ...value, ...Object.fromEntries(paths.map(([key, path]) => [key, many(path)])) };
  };
  const places = {
    output: one(run.output),
    resume: run.resume === 'auto' || run.resume === false ? run.resume : one(run.resume),
  };
  if (run.kind === 'finetune') {
    const { train, validation } = run.data;
    const held = typeof validation === 'string' || Array.isArray(validation) ? many(validation)! : validation;
    return {
      ...run,
      ...places,
      model: one(run.model),
      template: run.template.endsWith('.jinja') ? one(run.template) : run.template,
      data: { ...run.data, train: many(train)!, validation: held },
    };
  }
  const { validation, mixture } = run.data;
  const common = {
    ...places,
    data: {
      ...sources(run.data),
      ...(mixture === undefined ? {} : { mixture: mixture.map((part) => ({ ...part, source: sources(part.source) })) }),
      validation: typeof validation === 'object' ? sources(validation) : validation,
    },
  };
  if (run.kind === 'pretrain') {
    return {
      ...run,
      ...common,
      ...(typeof run.tokenizer === 'string' ? { tokenizer: one(run.tokenizer) } : {}),
      ...(run.from === undefined ? {} : { from: one(run.from) }),
    };
  }
  return {
    ...run,
    ...common,
    ...(run.tokenizer === undefined ? {} : { tokenizer: one(run.tokenizer) }),
    teacher: {
      ...run.teacher,
      ...(run.teacher.checkpoint === undefined ? {} : { checkpoint: one(run.teacher.checkpoint) }),
      ...(run.teacher.cache === undefined ? {} : { cache: one(run.teacher.cache) }),
    },
  };
}
