// A language model as the loops see it, whatever its architecture, and its folder on disk in the layout of Transformers.
import { mkdir, readFile, stat } from 'node:fs/promises';
import { join, resolve } from 'node:path';
import { writeAll, writeAtomic } from '../io/atomic.ts';
import { mergeAdapter } from '../nn/lora.ts';
import type { ParameterOptions, Parameters, SpecTree } from '../nn/parameters.ts';
import { checkObject, checkText } from '../tensor/argument.ts';
import { ConfigError, FormatError } from '../tensor/errors.ts';
import type { Tensor } from '../tensor/tensor.ts';
import { loadTokenizer, type Tokenizer } from '../tokenizer/tokenizer.ts';
import { loadAdapter } from './adapter.ts';
import { adapterConfigFile } from './adapter-config.ts';
import type { ForwardOptions, ModelInput } from './config.ts';
import type { DecoderConfig } from './decoder.ts';
import { generationOfGguf } from './defaults.ts';
import { type GgufModel, isGguf, openGgufModel } from './gguf.ts';
import { type Preset, presets } from './presets.ts';
import { buildModel, checkConfig, configFrom, type ModelConfig } from './registry.ts';
import { transformersText } from './transformers.ts';
import { readParameters, type SavedType, writeParameters } from './weights.ts';

export type { ModelConfig } from './registry.ts';

/** A decoder-only language model. */
export interface LanguageModel {
  readonly config: ModelConfig;
  readonly parameters: Parameters<SpecTree>;
  /** Hidden states [B T C] after the last norm. */
  hidden(input: ModelInput, options?: ForwardOptions): Tensor;
  /** The output head [V C]: the embedding, or a matrix of its own. */
  readonly head: Tensor;
  dispose(): void;
}

/** Fields that change a preset; which there are depends on its architecture. */
export type ModelChanges = { readonly [F in keyof ModelConfig]?: ModelConfig[F] | undefined } & Partial<
  Omit<DecoderConfig, 'architecture'>
>;

/**
 * A configuration from a preset's name, or from a preset with changed fields.
 * @throws ConfigError naming the preset or the field.
 */
export function modelConfig(preset: string, changes: ModelChanges = {}): ModelConfig {
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
  const config = { ...presets[preset as Preset], ...changes } as ModelConfig;
  checkConfig(config);
  return config;
}

/** Makes a model with random weights on the current device. */
export function createModel(config: ModelConfig, options: ParameterOptions = {}): LanguageModel {
  checkObject('createModel', 'config', config, 'a config, such as modelConfig() gives');
  const built = buildModel(config, options);
  return { config, ...built, dispose: () => built.parameters.dispose() };
}

/** Names in a model folder. */
const configFile = 'config.json';
/** Texts that are kept as they are. */
const keptFiles = ['generation_config.json', 'chat_template.jinja'] as const;

export interface SaveOptions {
  /** What the weights are rounded to. Default `f32`. */
  readonly dtype?: SavedType | undefined;
  /** Most bytes of one file of weights; there are several where they are more. Default 5e9. */
  readonly shardBytes?: number | undefined;
  /** Texts to write beside them, by the name of the file: those of a {@link LoadedModel}. */
  readonly files?: Readonly<Record<string, string>> | undefined;
}

/**
 * Writes config.json, the weights and the tokenizer into a folder, each beside and renamed. Transformers loads it. Weights are read piece by
 * piece: nothing may train them meanwhile.
 * @throws ConfigError for a model of weights of few bits.
 */
export async function saveModel(
  folder: string,
  model: Pick<LanguageModel, 'config' | 'parameters'>,
  tokenizer?: Tokenizer,
  { dtype = 'f32', shardBytes = 5e9, files = {} }: SaveOptions = {},
): Promise<void> {
  checkText('saveModel', 'folder', folder, 'the path of a folder');
  checkObject('saveModel', 'model', model, 'a model', 'config', 'parameters');
  const { config, parameters } = model;
  await mkdir(folder, { recursive: true });
  const text = (name: string, content: string) => writeAtomic(join(folder, name), (file) => writeAll(file, Buffer.from(content)));
  await text(configFile, transformersText(config, tokenizer, { torch_dtype: dtype === 'f32' ? 'float32' : 'bfloat16' }));
  await writeParameters(folder, config, parameters, dtype, shardBytes);
  await tokenizer?.save(folder);
  for (const [name, content] of Object.entries(files)) await text(name, content);
}

/** How to keep loaded weights; `trainable` is false by default. */
export type LoadOptions = Omit<ParameterOptions, 'seed'>;

/** A model and what lay beside it. */
export interface LoadedModel {
  readonly model: LanguageModel;
  readonly tokenizer: Tokenizer;
  /** Texts of `generation_config.json` and `chat_template.jinja`, where the folder has them; of a GGUF file, the first as it would be. */
  readonly files: Readonly<Record<string, string>>;
}

/**
 * Loads a folder that {@link saveModel} or Transformers wrote: config.json, model.safetensors or its shards, tokenizer.json. Or a GGUF
 * file, by a path that ends in `.gguf`; its weights are unpacked. A folder that holds an adapter alone is loaded as the base that it
 * names with the adapter merged; beside weights of few bits, with the adapter in use.
 * @throws FormatError for a file that is damaged, of an architecture or with an option that is not known, or does not fit the config.
 */
export async function loadModel(folder: string, options: LoadOptions = {}): Promise<LoadedModel> {
  checkText('loadModel', 'folder', folder, 'the path of a model folder or a .gguf file');
  if (isGguf(folder)) {
    return withGguf(folder, async (file) => {
      const tokenizer = file.tokenizer();
      checkVocabulary(folder, tokenizer, file.config);
      const generation = `${JSON.stringify(generationOfGguf(file.metadata), null, 2)}\n`;
      return { model: await loadGguf(file, options), tokenizer, files: { 'generation_config.json': generation } };
    });
  }
  const base = await adapterBase(folder);
  const owner = base !== undefined && !isGguf(base) && !(await has(folder, 'tokenizer.json')) ? base : folder;
  const [config, tokenizer] = await Promise.all([loadConfig(folder), loadTokenizer(owner)]);
  checkVocabulary(folder, tokenizer, config);
  const files: Record<string, string> = {};
  for (const name of keptFiles) {
    const read = (from: string) => readFile(join(from, name), 'utf8').catch(() => undefined);
    const text = (await read(folder)) ?? (base === undefined ? undefined : await read(base));
    if (text !== undefined) files[name] = text;
  }
  return { model: await loadInto(folder, config, options), tokenizer, files };
}

function checkVocabulary(where: string, { vocabSize }: Tokenizer, config: ModelConfig): void {
  if (vocabSize <= config.vocabSize) return;
  throw new FormatError(
    `${where}: the tokenizer has ${vocabSize} ids, the embedding only ${config.vocabSize} rows; they are not of the same model`,
    {
      code: 'ERR_CHECKPOINT',
      op: 'loadModel',
      argument: 'tokenizer.json',
      expected: `at most ${config.vocabSize}`,
      actual: String(vocabSize),
    },
  );
}

/** The configuration of a model folder or GGUF file. @throws FormatError */
export async function loadConfig(folder: string): Promise<ModelConfig> {
  checkText('loadConfig', 'folder', folder, 'the path of a model folder or a .gguf file');
  if (isGguf(folder)) return withGguf(folder, async ({ config }) => config);
  const base = await adapterBase(folder);
  if (base !== undefined) return loadConfig(base);
  const path = join(folder, configFile);
  return configFrom(await readJson(path), path);
}

/** The model of a folder or GGUF file, without its tokenizer. */
export async function loadWeights(folder: string, options: LoadOptions = {}): Promise<LanguageModel> {
  checkText('loadWeights', 'folder', folder, 'the path of a model folder or a .gguf file');
  if (isGguf(folder)) return withGguf(folder, (file) => loadGguf(file, options));
  return loadInto(folder, await loadConfig(folder), options);
}

async function withGguf<T>(path: string, use: (file: GgufModel) => Promise<T>): Promise<T> {
  const file = await openGgufModel(path);
  try {
    return await use(file);
  } finally {
    await file[Symbol.asyncDispose]();
  }
}

const loadGguf = (file: GgufModel, options: LoadOptions): Promise<LanguageModel> =>
  filled(file.config, options, (parameters) => file.fill(parameters));

async function loadInto(folder: string, config: ModelConfig, options: LoadOptions): Promise<LanguageModel> {
  const base = await adapterBase(folder);
  if (base === undefined) return filled(config, options, (parameters) => readParameters(folder, config, parameters));
  if (options.weights !== undefined && (await adapterBase(base)) !== undefined) {
    throw new ConfigError(
      `${base}: the base is an adapter itself, and weights of few bits (${options.weights}) cannot take it; write the two as one model first: limbeck export ${base} --to safetensors`,
      { code: 'ERR_CONFIG', op: 'loadModel', argument: 'weights', actual: options.weights },
    );
  }
  const model = await loadWeights(base, options);
  try {
    const adapter = await loadAdapter(folder, model);
    if (options.weights !== undefined) {
      const dispose = (): void => {
        adapter.dispose();
        model.dispose();
      };
      return { ...model, dispose };
    }
    mergeAdapter(model, adapter);
    adapter.dispose();
    return model;
  } catch (error) {
    model.dispose();
    throw error;
  }
}

/** A model whose parameters `fill` writes. */
async function filled(
  config: ModelConfig,
  options: LoadOptions,
  fill: (parameters: LanguageModel['parameters']) => Promise<void>,
): Promise<LanguageModel> {
  const model = createModel(config, { trainable: false, ...options });
  try {
    await fill(model.parameters);
    return model;
  } catch (error) {
    model.dispose();
    throw error;
  }
}

const has = (folder: string, name: string): Promise<boolean> =>
  stat(join(folder, name)).then(
    (found) => found.isFile(),
    () => false,
  );

/**
 * The base of a folder that holds an adapter and no model: a model, or an adapter that was trained before. Undefined for other folders.
 * @param outer adapters that were trained on this one
 * @throws FormatError when it names none
 */
export async function adapterBase(folder: string, outer: readonly string[] = []): Promise<string | undefined> {
  if ((await has(folder, configFile)) || !(await has(folder, adapterConfigFile))) return undefined;
  const path = join(folder, adapterConfigFile);
  const { base_model_name_or_path: named } = (await readJson(path)) as Record<string, unknown>;
  if (typeof named === 'string') {
    const base = resolve(folder, named);
    if (isGguf(base) || (await has(base, configFile))) return base;
    const chain = [...outer, resolve(folder)];
    if (!chain.includes(base) && (await adapterBase(base, chain)) !== undefined) return base;
  }
  throw new FormatError(
    `${path}: base_model_name_or_path is ${JSON.stringify(named)}, expected the folder of the model that the adapter belongs to; or load that model, then loadAdapter(folder, model)`,
    { code: 'ERR_CHECKPOINT', op: 'loadModel', argument: 'base_model_name_or_path', actual: JSON.stringify(named) },
  );
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
