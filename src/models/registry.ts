// Every architecture by its name: what models of it are made of, how they compute, and how their files are laid out.
import { createParameters, type ParameterOptions, type Parameters, type SpecTree, type Tensors } from '../nn/parameters.ts';
import { ConfigError, type ErrorData, FormatError } from '../tensor/errors.ts';
import type { Tensor } from '../tensor/tensor.ts';
import { type ForwardOptions, layerKind, type ModelInput, refusal } from './config.ts';
import { checkDecoder, type DecoderConfig, decoderArchitectures, decoderHidden, decoderSpec } from './decoder.ts';
import { families, readDecoder, writeDecoder } from './families.ts';
import { type Fields, fieldsOf } from './fields.ts';
import { checkGpt2, type Gpt2Config, gpt2Hidden, gpt2Spec, readGpt2, writeGpt2 } from './gpt2.ts';

/** The configuration of a model, of whichever architecture. */
export type ModelConfig = DecoderConfig | Gpt2Config;

/** A model whose parameters exist. */
export interface Built {
  readonly parameters: Parameters<SpecTree>;
  hidden(input: ModelInput, options?: ForwardOptions): Tensor;
  /** [V C] */
  readonly head: Tensor;
}

/** Where a parameter lies in files, where it is not a tensor of its own name and shape. */
export interface Place {
  readonly tensor: string;
  /** Of the whole tensor in the file. */
  readonly shape: readonly number[];
  /** Its first row in that tensor; of a transposed one, its first column. */
  readonly from: number;
  /** Whether the file has input features first. */
  readonly transposed: boolean;
}

/** A model of a config, before its parameters exist. */
interface Blueprint {
  readonly spec: SpecTree;
  build(options: ParameterOptions): Built;
}

interface Architecture<C extends ModelConfig> {
  /** Its class in Transformers. */
  readonly model: string;
  /** What all names begin with but that of an untied head; files of the model without a head leave it out. */
  readonly prefix: string;
  /** Name of the embedding table. */
  readonly embedding: string;
  check(config: C): void;
  blueprint(config: C): Blueprint;
  read(fields: Fields): C;
  write(config: C): Record<string, unknown>;
  /** Of each parameter that is laid out otherwise. */
  readonly place?: ((config: C, name: string) => Place | undefined) | undefined;
  /** Tensors of older files that hold no parameters. */
  readonly ignored: RegExp;
}

const ignored = /\.rotary_emb\.inv_freq$/;

function blueprint<S extends SpecTree>(
  spec: S,
  hidden: (p: Tensors<S>, input: ModelInput, options?: ForwardOptions) => Tensor,
  head: (p: Tensors<S>) => Tensor,
): Blueprint {
  return {
    spec,
    build(options) {
      const parameters = createParameters(spec, options);
      return {
        parameters: parameters as unknown as Parameters<SpecTree>,
        hidden: (input, forward) => hidden(parameters.tree, input, forward),
        head: head(parameters.tree),
      };
    },
  };
}

const decoder = (name: DecoderConfig['architecture']): Architecture<DecoderConfig> => ({
  model: families[name].model,
  prefix: 'model.',
  embedding: 'model.embed_tokens.weight',
  check: checkDecoder,
  blueprint: (c) =>
    blueprint(
      decoderSpec(c),
      (p, input, options) => decoderHidden(p, c, input, options),
      (p) => p.head ?? p.embed,
    ),
  read: (fields) => readDecoder(name, fields),
  write: writeDecoder,
  ...(name === 'phi3' ? { place: placeInPhi3 } : {}),
  ignored,
});

const gpt2: Architecture<Gpt2Config> = {
  model: 'GPT2LMHeadModel',
  prefix: 'transformer.',
  embedding: 'transformer.wte.weight',
  check: checkGpt2,
  blueprint: (c) =>
    blueprint(
      gpt2Spec(c),
      (p, input, options) => gpt2Hidden(p, c, input, options),
      (p) => p.head ?? p.embed,
    ),
  read: readGpt2,
  write: writeGpt2,
  place: placeInGpt2,
  ignored: /\.attn\.(masked_)?bias$/,
};

/** Phi-3 has queries, keys and values in one matrix, and both branches of the feed-forward block in another. */
function placeInPhi3({ heads, kvHeads, headSize, hidden, width }: DecoderConfig, name: string): Place | undefined {
  const [q, g] = [heads * headSize, kvHeads * headSize];
  const parts: Readonly<Record<string, readonly [into: string, from: number, rows: number]>> = {
    'self_attn.q_proj': ['self_attn.qkv_proj', 0, q + 2 * g],
    'self_attn.k_proj': ['self_attn.qkv_proj', q, q + 2 * g],
    'self_attn.v_proj': ['self_attn.qkv_proj', q + g, q + 2 * g],
    'mlp.gate_proj': ['mlp.gate_up_proj', 0, 2 * hidden],
    'mlp.up_proj': ['mlp.gate_up_proj', hidden, 2 * hidden],
  };
  const [, layer, module = ''] = /^(model\.layers\.\d+\.)(.+)\.weight$/.exec(name) ?? [];
  const part = parts[module];
  if (part === undefined) return undefined;
  return { tensor: `${layer}${part[0]}.weight`, shape: [part[2], width], from: part[1], transposed: false };
}

/** GPT-2 has matrices with input features first, and queries, keys and values in one of them. */
function placeInGpt2({ width, hidden }: Gpt2Config, name: string): Place | undefined {
  const sizes: Readonly<Record<string, readonly [into: string, from: number, rows: number, cols: number]>> = {
    'attn.q_proj': ['attn.c_attn', 0, 3 * width, width],
    'attn.k_proj': ['attn.c_attn', width, 3 * width, width],
    'attn.v_proj': ['attn.c_attn', 2 * width, 3 * width, width],
    'attn.c_proj': ['attn.c_proj', 0, width, width],
    'mlp.c_fc': ['mlp.c_fc', 0, hidden, width],
    'mlp.c_proj': ['mlp.c_proj', 0, width, hidden],
  };
  const [, layer, module = '', kind] = /^(transformer\.h\.\d+\.)(.+)\.(weight|bias)$/.exec(name) ?? [];
  const size = sizes[module];
  if (size === undefined) return undefined;
  const [into, from, rows, cols] = size;
  const tensor = `${layer}${into}.${kind}`;
  return kind === 'weight'
    ? { tensor, shape: [cols, rows], from, transposed: true }
    : { tensor, shape: [rows], from, transposed: false };
}

const architectures: Readonly<Record<string, unknown>> = {
  ...Object.fromEntries(decoderArchitectures.map((name) => [name, decoder(name)])),
  gpt2,
};

/** Names of the architectures: Transformers' `model_type`. */
export const architectureNames: readonly string[] = Object.keys(architectures);

/** @throws ConfigError for an architecture that is not known. */
function architectureOf(name: string): Architecture<ModelConfig> {
  if (Object.hasOwn(architectures, name)) return architectures[name] as Architecture<ModelConfig>;
  return refusal('model')('architecture', `one of ${architectureNames.join(', ')}`, name);
}

/** @throws ConfigError naming a field that is out of range, or that files of the architecture cannot express. */
export function checkConfig(config: ModelConfig): void {
  const { check, read, write } = architectureOf(config.architecture);
  check(config);
  // Found here and not when the trained model is to be saved.
  const again = comparable(read(fieldsOf(write(config), config.architecture)));
  const own = comparable(config);
  for (const field of new Set([...Object.keys(own), ...Object.keys(again)])) {
    if (JSON.stringify(own[field]) === JSON.stringify(again[field])) continue;
    refusal(config.architecture)(field, `${JSON.stringify(again[field])}, as in all models of this architecture`, own[field]);
  }
}

/** The fields of a config, lists that repeat over the layers in full, fields of objects in one order. */
function comparable(config: ModelConfig): Record<string, unknown> {
  const each = <T>(of: (i: number) => T): T[] => Array.from({ length: config.layers }, (_, i) => of(i));
  const sorted = (value: unknown): unknown =>
    typeof value === 'object' && value !== null ? Object.entries(value).sort(([a], [b]) => (a < b ? -1 : 1)) : value;
  return {
    ...Object.fromEntries(Object.entries(config).map(([field, value]) => [field, sorted(value)])),
    layerPattern: each((i) => layerKind(config, i)),
    ...('rotary' in config
      ? { rotary: each((i) => config.rotary[i % config.rotary.length]), rotaryShare: config.rotaryShare ?? 1 }
      : {}),
  };
}

/** The parameters of a config's model, before they exist. @throws ConfigError */
export function modelSpec(config: ModelConfig): SpecTree {
  return architectureOf(config.architecture).blueprint(config).spec;
}

/** Makes the parameters of a config's model on the current device. @throws ConfigError */
export function buildModel(config: ModelConfig, options: ParameterOptions): Built {
  checkConfig(config);
  return architectureOf(config.architecture).blueprint(config).build(options);
}

/** How files of a config's model are laid out. */
export interface FileLayout {
  readonly prefix: string;
  readonly embedding: string;
  readonly ignored: RegExp;
  place(name: string): Place | undefined;
}

export function fileLayout(config: ModelConfig): FileLayout {
  const { prefix, embedding, ignored, place } = architectureOf(config.architecture);
  return { prefix, embedding, ignored, place: (name) => place?.(config, name) };
}

/** The fields of a config.json, without those of the tokenizer. */
export function configFields(config: ModelConfig): Record<string, unknown> {
  return architectureOf(config.architecture).write(config);
}

/**
 * Reads a config.json.
 * @param where the file, for errors
 * @throws FormatError for another architecture, a missing field, or an option that limbeck does not have.
 */
export function configFrom(json: unknown, where: string): ModelConfig {
  const f = fieldsOf(json, where);
  const type = f.values.model_type;
  const named = f.values.architectures;
  const known = architectureNames.join(', ');
  if (typeof type !== 'string' || !Object.hasOwn(architectures, type)) {
    throw new FormatError(
      `${where}: model_type is ${JSON.stringify(type)} (architectures: ${JSON.stringify(named)}), which limbeck does not have; it knows ${known}`,
      { code: 'ERR_ARCHITECTURE', op: 'loadModel', argument: 'model_type', expected: known, actual: String(type) },
    );
  }
  const { model, check, read } = architectureOf(type);
  // The model without a head has the same weights, and its head is tied.
  const bare = model.replace(/ForCausalLM|LMHeadModel/, 'Model');
  if (Array.isArray(named) && named.length > 0 && !named.includes(model) && !named.includes(bare)) {
    f.refuse('architectures', `["${model}"]: limbeck has no other heads`);
  }
  for (const field of ['quantization_config', 'compression_config'] as const) {
    if (f.values[field] !== undefined && f.values[field] !== null)
      f.refuse(field, 'no such field: load weights that are not quantized');
  }
  const config = read(f);
  try {
    check(config);
  } catch (error) {
    if (!(error instanceof ConfigError)) throw error;
    const { code, argument, expected, actual } = error;
    throw new FormatError(`${where}: ${error.message}`, { code, op: 'loadModel', argument, expected, actual } as ErrorData);
  }
  return config;
}
