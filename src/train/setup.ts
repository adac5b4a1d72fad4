// From a run to its parts: engine, tokenizer, model configuration, data.
import { createHash } from 'node:crypto';
import { basename, join } from 'node:path';
import type { DatasetOptions } from '../data/dataset.ts';
import { jsonl } from '../data/jsonl.ts';
import type { MixtureSource } from '../data/mixture.ts';
import { type Source, textFiles } from '../data/source.ts';
import { tokenFile } from '../data/tokens.ts';
import { type ModelConfig, modelConfig } from '../models/model.ts';
import { native, started, startFor } from '../tensor/engine.ts';
import { ConfigError } from '../tensor/errors.ts';
import { loadTokenizer, type Tokenizer } from '../tokenizer/tokenizer.ts';
import { trainTokenizer } from '../tokenizer/train.ts';
import type { RunConfig, TextRunConfig } from './config.ts';

/** Starts the engine as the run wants it, unless it runs already. */
export function startEngine(run: RunConfig): void {
  const before = started();
  startFor(run.name, run);
  if (before && run.threads !== undefined && native().info().threads !== run.threads) {
    throw new ConfigError(
      `${run.name}: threads is ${run.threads}, but the engine of this process runs with ${native().info().threads}; leave it out or start anew`,
      {
        code: 'ERR_CONFIG',
        op: 'init',
        argument: 'threads',
      },
    );
  }
}

/** Data by where it lies. Exactly one of the three is given. */
interface DataPlace {
  readonly text?: string | readonly string[] | undefined;
  readonly jsonl?: string | readonly string[] | undefined;
  readonly tokens?: string | readonly string[] | undefined;
  readonly separator?: string | undefined;
  readonly field?: string | undefined;
  readonly strict?: boolean | undefined;
}

export function sourceOf({ text, jsonl: lines, tokens, separator, field = 'text', strict = false }: DataPlace): Source {
  if (text !== undefined) return textFiles(text, separator === undefined ? {} : { separator });
  return lines !== undefined ? jsonl(lines, { field, strict }) : tokenFile(tokens!);
}

/** The sources of a run's mixture; undefined where it has a single one. */
function mixtureOf({ mixture, separator, field, strict }: TextRunConfig['data']): MixtureSource[] | undefined {
  return mixture?.map(({ name, source, weight, repeat }) => ({
    name: name ?? basename([source.text ?? source.jsonl ?? source.tokens!].flat()[0]!),
    source: sourceOf({ strict, ...source, separator: source.separator ?? separator, field: source.field ?? field }),
    ...(weight === undefined ? {} : { weight }),
    ...(repeat === undefined ? {} : { repeat }),
  }));
}

/** What {@link openDataset} needs for a run. */
export function datasetOptions(run: TextRunConfig, tokenizer: Tokenizer, signal?: AbortSignal): DatasetOptions {
  const { validation } = run.data;
  const mixture = mixtureOf(run.data);
  return {
    train: mixture === undefined ? sourceOf(run.data) : { mixture },
    validation:
      typeof validation === 'object' && !('documents' in validation)
        ? sourceOf({ ...run.data, text: undefined, jsonl: undefined, tokens: undefined, ...validation })
        : validation,
    tokenizer,
    length: run.batch.length,
    batch: run.batch.sequences,
    seed: run.seed,
    isolate: run.data.isolate,
    // A cached teacher saw whole segments.
    ...(run.kind === 'distill' && run.teacher.cache !== undefined ? { whole: true } : {}),
    ...(signal === undefined ? {} : { signal }),
  };
}

/** How much of the validation data is scored. */
export function validationLimit(run: RunConfig): { batches?: number } {
  return run.evaluate.batches === undefined ? {} : { batches: run.evaluate.batches };
}

/** The run's tokenizer: loaded, or trained on its text and saved in the output folder. */
export async function runTokenizer(run: TextRunConfig, signal?: AbortSignal): Promise<Tokenizer> {
  if (run.tokenizer === undefined)
    throw new ConfigError(`${run.name}: tokenizer is missing`, { code: 'ERR_CONFIG', argument: 'tokenizer' });
  if (typeof run.tokenizer === 'string') return loadTokenizer(run.tokenizer);
  const { vocabSize, specialTokens } = run.tokenizer.train;
  const sources = mixtureOf(run.data)?.map(({ source }) => source as Source) ?? [sourceOf(run.data)];
  const text = sources.filter((source) => source.kind === 'text');
  if (text.length < sources.length) {
    throw new ConfigError(`${run.name}: a tokenizer cannot be trained on token ids; give the path of the one that made them`, {
      code: 'ERR_CONFIG',
      argument: 'tokenizer',
    });
  }
  const tokenizer = await trainTokenizer(text, {
    vocabSize,
    ...(specialTokens === undefined ? {} : { specialTokens }),
    ...(signal === undefined ? {} : { signal }),
  });
  await tokenizer.save(join(run.output, 'tokenizer'));
  return tokenizer;
}

/** The configuration of the model to make; its vocabulary is the tokenizer's unless the run says otherwise. */
export function runModelConfig(run: TextRunConfig, tokenizer: Pick<Tokenizer, 'vocabSize'>): ModelConfig {
  const { preset = 'gemma2-mini', ...changes } = typeof run.model === 'string' ? { preset: run.model } : (run.model ?? {});
  const given = Object.fromEntries(Object.entries(changes).filter(([, value]) => value !== undefined));
  const config = modelConfig(preset, { vocabSize: tokenizer.vocabSize, ...given });
  if (config.vocabSize < tokenizer.vocabSize) {
    throw new ConfigError(
      `${run.name}: model.vocabSize is ${config.vocabSize}, but the tokenizer has ${tokenizer.vocabSize} ids; give at least as many rows`,
      {
        code: 'ERR_CONFIG',
        argument: 'model.vocabSize',
        expected: `at least ${tokenizer.vocabSize}`,
        actual: String(config.vocabSize),
      },
    );
  }
  return config;
}

/** A short name for a value. */
export function digest(value: unknown): string {
  return createHash('sha256').update(JSON.stringify(value)).digest('hex').slice(0, 16);
}

/** What a resumed run must share with its first part, as digests by field. */
export function pinnedFacts(run: TextRunConfig, tokenizer: Tokenizer): Record<string, string> {
  return {
    kind: run.kind,
    seed: String(run.seed),
    // What the run asks for, not what the checkpoint holds: a changed run file must not go unnoticed.
    model:
      run.kind === 'pretrain' && run.from !== undefined
        ? digest(run.from)
        : digest(Object.entries(runModelConfig(run, tokenizer)).sort()),
    tokenizer: tokenizer.fingerprint,
    batch: digest(run.batch),
    ...(run.kind === 'distill' ? { distill: digest(run.distill) } : {}),
  };
}
