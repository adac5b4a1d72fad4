// A language model as the loops see it, whatever its architecture, and its folder on disk in the layout of Transformers.
import { mkdir, readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { writeAtomic } from '../io/atomic.ts';
import { openSafetensors, writeSafetensors } from '../io/safetensors.ts';
import { createParameters, type ParameterOptions, type Parameters } from '../nn/parameters.ts';
import { cast } from '../ops/elementwise.ts';
import { ConfigError, FormatError } from '../tensor/errors.ts';
import { keep } from '../tensor/scope.ts';
import { readAs, type Tensor } from '../tensor/tensor.ts';
import { loadTokenizer, type Tokenizer } from '../tokenizer/tokenizer.ts';
import type { ForwardOptions, ModelInput } from './config.ts';
import { checkDecoder, type DecoderConfig, decoderHidden, decoderSpec } from './decoder.ts';
import { type Preset, presets } from './presets.ts';
import { fromTransformers, transformersText } from './transformers.ts';

/** The configuration of a model, of whichever architecture. */
export type ModelConfig = DecoderConfig;

/** A decoder-only language model. */
export interface LanguageModel {
  readonly config: ModelConfig;
  readonly parameters: Parameters<ReturnType<typeof decoderSpec>>;
  /** Hidden states [B T C] after the last norm. */
  hidden(input: ModelInput, options?: ForwardOptions): Tensor;
  /** The output head [V C]: the embedding, or a matrix of its own. */
  readonly head: Tensor;
  dispose(): void;
}

/**
 * A configuration from a preset's name, or from a preset with changed fields.
 * @throws ConfigError naming the preset or the field.
 */
export function modelConfig(preset: string, changes: Partial<ModelConfig> = {}): ModelConfig {
  if (!Object.hasOwn(presets, preset)) {
    const known = Object.keys(presets).join(', ');
    throw new ConfigError(`model: there is no preset '${preset}'; known are ${known}`, {
      code: 'ERR_CONFIG',
      op: 'model',
      argument: 'preset',
      expected: known,
      actual: preset,
    });
  }
  const config: ModelConfig = { ...presets[preset as Preset], ...changes };
  checkDecoder(config);
  return config;
}

/** Makes a model with random weights on the current device. */
export function createModel(config: ModelConfig, options: ParameterOptions = {}): LanguageModel {
  checkDecoder(config);
  const parameters = createParameters(decoderSpec(config), options);
  return {
    config,
    parameters,
    hidden: (input, forward) => decoderHidden(parameters.tree, config, input, forward),
    head: parameters.tree.head ?? parameters.tree.embed,
    dispose: () => parameters.dispose(),
  };
}

/** Files of a model folder. */
const files = { config: 'config.json', weights: 'model.safetensors' } as const;

/**
 * Writes config.json, model.safetensors and the tokenizer into a folder, each beside and renamed. Transformers loads it.
 * @throws ConfigError for a model of fp8 weights.
 */
export async function saveModel(folder: string, model: LanguageModel, tokenizer?: Tokenizer): Promise<void> {
  await mkdir(folder, { recursive: true });
  const config = transformersText(model.config, tokenizer);
  await writeAtomic(join(folder, files.config), async (file) => {
    await file.write(config);
  });
  await writeSafetensors(join(folder, files.weights), await readParameters(model), { format: 'pt' });
  await tokenizer?.save(folder);
}

async function readParameters(model: LanguageModel) {
  const { list, values, weights } = model.parameters;
  if (weights.length > 0) {
    throw new ConfigError('saveModel: the weights of this model are rounded to fp8; keep the folder that it was loaded from', {
      code: 'ERR_CONFIG',
      op: 'saveModel',
      argument: 'model',
    });
  }
  // One read of the flat tensor is one consistent moment of training.
  const wide = values.dtype === 'f32' ? undefined : keep(cast(values, 'f32'));
  const flat = await readAs(wide ?? values, 'f32').finally(() => wide?.dispose());
  return list.map(({ name, tensor, offset }) => {
    const data = flat.subarray(offset, offset + tensor.size);
    return { name, dtype: 'F32' as const, shape: [...tensor.shape], data };
  });
}

/** How to keep loaded weights; `trainable` is false by default. */
export type LoadOptions = Omit<ParameterOptions, 'seed'>;

/** A model and what lay beside it. */
export interface LoadedModel {
  readonly model: LanguageModel;
  readonly tokenizer: Tokenizer;
}

/**
 * Loads a folder that {@link saveModel} or Transformers wrote: config.json, model.safetensors, tokenizer.json.
 * @throws FormatError for a file that is damaged, of another architecture, or does not fit the config.
 */
export async function loadModel(folder: string, options: LoadOptions = {}): Promise<LoadedModel> {
  const model = await loadWeights(folder, options);
  try {
    return { model, tokenizer: await loadTokenizer(folder) };
  } catch (error) {
    model.dispose();
    throw error;
  }
}

/** The configuration of a model folder. @throws FormatError */
export async function loadConfig(folder: string): Promise<ModelConfig> {
  const path = join(folder, files.config);
  return fromTransformers(await readJson(path), path);
}

/** The model of a folder, without its tokenizer. */
export async function loadWeights(folder: string, options: LoadOptions = {}): Promise<LanguageModel> {
  const config = await loadConfig(folder);
  const model = createModel(config, { trainable: false, ...options });
  try {
    await fill(model, join(folder, files.weights));
    return model;
  } catch (error) {
    model.dispose();
    throw error;
  }
}

async function fill({ parameters }: LanguageModel, path: string): Promise<void> {
  const stored = await openSafetensors(path);
  try {
    const all = [...parameters.list.map(({ name, tensor }) => ({ name, shape: tensor.shape })), ...parameters.weights];
    for (const { name, shape } of all) {
      const entry = stored.tensors.get(name);
      const expected = `[${shape.join(' ')}]`;
      if (entry === undefined) {
        throw new FormatError(`${path}: there is no tensor '${name}', which config.json asks for`, {
          code: 'ERR_CHECKPOINT',
          op: 'loadModel',
          argument: name,
          expected,
        });
      }
      if (entry.shape.join(' ') !== shape.join(' ')) {
        throw new FormatError(`${path}: '${name}' has shape [${entry.shape.join(' ')}], config.json asks for ${expected}`, {
          code: 'ERR_CHECKPOINT',
          op: 'loadModel',
          argument: name,
          expected,
          actual: `[${entry.shape.join(' ')}]`,
        });
      }
      await stored.each(name, (run, from) => parameters.write(name, from, widen(run, entry.dtype, `${path}: '${name}'`)));
    }
    parameters.refresh();
  } finally {
    await stored.close();
  }
}

function widen(data: ArrayBufferView, dtype: string, what: string): Float32Array {
  if (data instanceof Float32Array) return data;
  if (data instanceof Float64Array) return Float32Array.from(data);
  if (dtype === 'BF16' && data instanceof Uint16Array) {
    const bits = new Uint32Array(data.length);
    for (let i = 0; i < data.length; i++) bits[i] = data[i]! << 16;
    return new Float32Array(bits.buffer);
  }
  throw new FormatError(`${what} is ${dtype}; weights are F32, F16, BF16 or F64`, {
    code: 'ERR_CHECKPOINT',
    op: 'loadModel',
    actual: dtype,
  });
}

async function readJson(path: string): Promise<unknown> {
  let text: string;
  try {
    text = await readFile(path, 'utf8');
  } catch (error) {
    throw new FormatError(`${path}: cannot be read; a model folder holds config.json, model.safetensors and tokenizer.json`, {
      code: 'ERR_CHECKPOINT',
      op: 'loadModel',
      argument: path,
      cause: error,
    });
  }
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new FormatError(`${path}: not valid JSON: ${(error as Error).message}`, {
      code: 'ERR_CHECKPOINT',
      op: 'loadModel',
      argument: path,
      cause: error,
    });
  }
}
