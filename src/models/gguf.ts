// Models as llama.cpp's GGUF files: names, metadata and layouts of its converter, to and from ours.
//   C width, D head size, V vocabulary

import { type GgmlTypeName, ggmlTypes } from '../io/ggml.ts';
import { type Gguf, type GgufInput, type GgufMetadata, type GgufValue, openGguf, writeGguf } from '../io/gguf.ts';
import type { Parameters, SpecTree } from '../nn/parameters.ts';
import { cast } from '../ops/elementwise.ts';
import { ConfigError, FormatError } from '../tensor/errors.ts';
import { keep, scope } from '../tensor/scope.ts';
import { noGrad } from '../tensor/tape.ts';
import { readAs, viewOf } from '../tensor/tensor.ts';
import { ggufVocabulary, tokenizerOfGguf } from '../tokenizer/gguf.ts';
import type { Tokenizer } from '../tokenizer/tokenizer.ts';
import type { DecoderConfig } from './decoder.ts';
import { decoderOf, fromMetadata, metadataOf, queryFactor, ropeFactors, splitPairs } from './ggufconfig.ts';
import type { LanguageModel } from './model.ts';

/** How the weights of a file are kept, as llama.cpp calls its mixtures; vectors are always float32. */
export const ggufTypes = ['f16', 'bf16', 'f32', 'q8_0', 'q6_k', 'q4_k_m'] as const;
export type GgufType = (typeof ggufTypes)[number];

export interface ExportGgufOptions {
  /** Default f16. */
  readonly type?: GgufType;
  /** Jinja source of the chat template. Default: what tokenizer_config.json says. */
  readonly chatTemplate?: string | undefined;
  /** A name for people. */
  readonly name?: string | undefined;
  readonly signal?: AbortSignal | undefined;
  /** Bytes of tensors written, and of all. */
  readonly onProgress?: ((progress: { readonly done: number; readonly total: number }) => void) | undefined;
}

/** One tensor of a file, and the parameter that it is. */
interface Part {
  /** Our name. */
  readonly name: string;
  readonly gguf: string;
  readonly shape: readonly number[];
  /** Which of llama.cpp's rules of mixed types holds for it. */
  readonly role: 'vector' | 'matrix' | 'value' | 'down' | 'head';
  readonly layer: number;
  /** Heads whose rows llama.cpp has in another order; 0 for none. */
  readonly heads: number;
  /** The file has (values + add) * factor. */
  readonly add: number;
  readonly factor: number;
}

/** Every tensor of a model in the order of llama.cpp's converter. */
function partsOf(c: DecoderConfig): Part[] {
  const { width: C, headSize: D, hidden: F, vocabSize: V } = c;
  const parts: Part[] = [];
  const push = (name: string, gguf: string, shape: readonly number[], more: Partial<Part> = {}): void => {
    const role = shape.length === 1 ? 'vector' : 'matrix';
    parts.push({ name, gguf, shape, role, layer: 0, heads: 0, add: 0, factor: 1, ...more });
  };
  const norm = (name: string, gguf: string, size = C, factor = 1): void =>
    push(`${name}.weight`, `${gguf}.weight`, [size], { add: c.normOffset, factor });
  const pairs = splitPairs(c);
  const q = queryFactor(c);
  // Where queries are normed, a factor before the norm would do nothing.
  const [before, after] = c.queryKeyNorm ? [1, q] : [q, 1];

  push('model.embed_tokens.weight', 'token_embd.weight', [V, C], { role: c.tied ? 'head' : 'matrix' });
  for (let layer = 0; layer < c.layers; layer++) {
    const [at, blk] = [`model.layers.${layer}`, `blk.${layer}`];
    const linear = (name: string, gguf: string, rows: number, cols: number, bias: boolean, more: Partial<Part> = {}): void => {
      push(`${at}.${name}.weight`, `${blk}.${gguf}.weight`, [rows, cols], { layer, ...more });
      if (bias) push(`${at}.${name}.bias`, `${blk}.${gguf}.bias`, [rows], { ...more, layer, role: 'vector' });
    };
    const { qkv, output } = c.bias;
    norm(`${at}.input_layernorm`, `${blk}.attn_norm`);
    linear('self_attn.q_proj', 'attn_q', c.heads * D, C, qkv, { heads: pairs ? c.heads : 0, factor: before });
    linear('self_attn.k_proj', 'attn_k', c.kvHeads * D, C, qkv, { heads: pairs ? c.kvHeads : 0 });
    linear('self_attn.v_proj', 'attn_v', c.kvHeads * D, C, qkv, { role: 'value' });
    linear('self_attn.o_proj', 'attn_output', C, c.heads * D, output);
    if (c.queryKeyNorm) {
      norm(`${at}.self_attn.q_norm`, `${blk}.attn_q_norm`, D, after);
      norm(`${at}.self_attn.k_norm`, `${blk}.attn_k_norm`, D);
    }
    if (c.postNorms) norm(`${at}.post_attention_layernorm`, `${blk}.post_attention_norm`);
    norm(`${at}.${c.postNorms ? 'pre_feedforward_layernorm' : 'post_attention_layernorm'}`, `${blk}.ffn_norm`);
    linear('mlp.gate_proj', 'ffn_gate', F, C, false);
    linear('mlp.up_proj', 'ffn_up', F, C, false);
    linear('mlp.down_proj', 'ffn_down', C, F, false, { role: 'down' });
    if (c.postNorms) norm(`${at}.post_feedforward_layernorm`, `${blk}.post_ffw_norm`);
  }
  norm('model.norm', 'output_norm');
  if (!c.tied) push('lm_head.weight', 'output.weight', [V, C], { role: 'head' });
  return parts;
}

const fileTypes: Record<GgufType, number> = { f32: 0, f16: 1, q8_0: 7, q4_k_m: 15, q6_k: 18, bf16: 32 };

/** The type of a tensor: the mixture's own, unless its rows are no whole blocks of it, as llama.cpp's quantizer decides. */
function typeOf(part: Part, type: GgufType, layers: number): GgmlTypeName {
  if (part.role === 'vector') return 'F32';
  if (type === 'f32' || type === 'f16' || type === 'bf16') return type.toUpperCase() as GgmlTypeName;
  const columns = part.shape.at(-1)!;
  if (type !== 'q8_0' && columns % 256 === 0) {
    // Q4_K_M gives more bits where they matter most: the head, and values and down projections of the first, the last and every third layer.
    const eighth = Math.floor(layers / 8);
    const { layer, role } = part;
    const many = layer < eighth || layer >= Math.floor((7 * layers) / 8) || (layer - eighth) % 3 === 2;
    return type === 'q6_k' || role === 'head' || (many && (role === 'value' || role === 'down')) ? 'Q6_K' : 'Q4_K';
  }
  return columns % 32 === 0 ? 'Q8_0' : 'F16';
}

// Values of a matrix that are read at once.
const RUN = 1 << 20;

/**
 * Writes a model as a GGUF file for llama.cpp, Ollama and their like, its tokenizer included. It replaces `path` only when complete.
 * @returns what the user should know: tensors that are kept in another type, settings that llama.cpp does not follow
 * @throws ConfigError for a model or tokenizer that a GGUF file cannot tell of, DataError for weights that the type cannot hold.
 */
export async function exportGguf(
  path: string,
  model: LanguageModel,
  tokenizer?: Tokenizer,
  options: ExportGgufOptions = {},
): Promise<readonly string[]> {
  const { type = 'f16', signal, onProgress } = options;
  const { parameters } = model;
  if (!ggufTypes.includes(type)) {
    throw new ConfigError(`exportGguf: type is ${String(type)}, expected one of ${ggufTypes.join(', ')}`, {
      code: 'ERR_CONFIG',
      op: 'exportGguf',
      argument: 'type',
      expected: ggufTypes.join(', '),
      actual: String(type),
    });
  }
  if (parameters.weights.length > 0) {
    throw new ConfigError('exportGguf: the weights of this model are rounded; export the folder that it was loaded from', {
      code: 'ERR_CONFIG',
      op: 'exportGguf',
      argument: 'model',
    });
  }
  const config = decoderOf(model.config);
  const about = metadataOf(config);
  const vocabulary = ggufVocabulary(tokenizer, config.vocabSize, options.chatTemplate);
  const metadata: (readonly [string, GgufValue])[] = [
    ['general.architecture', { type: 'string', value: about.architecture }],
    ['general.type', { type: 'string', value: 'model' }],
    ...(options.name === undefined ? [] : [['general.name', { type: 'string', value: options.name }] as const]),
    ['general.file_type', { type: 'u32', value: fileTypes[type] }],
    ['general.quantization_version', { type: 'u32', value: 2 }],
    ...about.metadata,
    ...vocabulary.metadata,
  ];
  const parts = partsOf(config);
  const tensors: GgufInput[] = parts.map((part) => ({
    name: part.gguf,
    type: typeOf(part, type, config.layers),
    shape: part.shape,
    data: () => runsOf(parameters, part),
  }));
  const factors = ropeFactors(config);
  if (factors !== undefined)
    tensors.push({ name: 'rope_freqs.weight', type: 'F32', shape: [factors.length], data: () => [factors] });
  await writeGguf(path, metadata, tensors, { signal, onProgress });
  return [...about.notes, ...vocabulary.notes, ...fallbacks(type, tensors)];
}

function fallbacks(type: GgufType, tensors: readonly GgufInput[]): string[] {
  const block = type === 'q8_0' ? 32 : type.endsWith('k') || type.endsWith('k_m') ? 256 : 1;
  const odd = tensors.filter(({ type: own, shape }) => own !== 'F32' && shape.at(-1)! % block !== 0);
  if (odd.length === 0) return [];
  const kept = [...new Set(odd.map((tensor) => tensor.type))].join(' and ');
  return [`${odd.length} of ${tensors.length} tensors are kept as ${kept}: their rows are no multiples of ${block}`];
}

type Loaded = Pick<Parameters<SpecTree>, 'list' | 'values'>;

/** The values of a parameter as the file has them, a run of rows at a time. */
async function* runsOf({ list, values }: Loaded, part: Part): AsyncGenerator<Float32Array> {
  const found = list.find(({ name }) => name === part.name)!;
  const columns = part.shape.at(-1)!;
  const size = part.shape.reduce((a, b) => a * b, 1);
  const run = part.heads > 0 ? size : Math.max(1, Math.floor(RUN / columns)) * columns;
  for (let at = 0; at < size; at += run) {
    // f32 originals, where the model computes with bf16 copies of them.
    const piece = keep(
      scope(() =>
        noGrad(() => {
          const view = viewOf(values, [Math.min(run, size - at)], found.offset + at);
          return values.dtype === 'f32' ? view : cast(view, 'f32');
        }),
      ),
    );
    const data = await readAs(piece, 'f32').finally(() => piece.dispose());
    if (part.add !== 0 || part.factor !== 1) for (let i = 0; i < data.length; i++) data[i] = (data[i]! + part.add) * part.factor;
    yield part.heads > 0 ? reordered(data, part.heads, columnsOf(part), true) : data;
  }
}

const columnsOf = ({ shape }: Part): number => (shape.length === 1 ? 1 : shape.at(-1)!);

/** Llama's rows in llama.cpp's order, where the two that rotary embedding turns together are neighbours; or back. */
function reordered(data: Float32Array, heads: number, columns: number, toFile: boolean): Float32Array {
  const half = data.length / columns / heads / 2;
  const to = new Float32Array(data.length);
  for (let head = 0; head < heads; head++) {
    for (let i = 0; i < half; i++) {
      for (let side = 0; side < 2; side++) {
        const ours = (head * 2 + side) * half + i;
        const theirs = (head * half + i) * 2 + side;
        const [from, into] = toFile ? [ours, theirs] : [theirs, ours];
        to.set(data.subarray(from * columns, (from + 1) * columns), into * columns);
      }
    }
  }
  return to;
}

/** A model in a GGUF file. */
export interface GgufModel extends AsyncDisposable {
  readonly config: DecoderConfig;
  readonly metadata: GgufMetadata;
  /** Reads all weights into parameters that were made for `config`. */
  fill(parameters: Pick<Parameters<SpecTree>, 'write' | 'refresh'>): Promise<void>;
  /** @throws FormatError for a vocabulary that our tokenizers have not. */
  tokenizer(): Tokenizer;
}

/** True for the path of a GGUF file. */
export const isGguf = (path: string): boolean => path.endsWith('.gguf');

/**
 * Opens a GGUF file as a model.
 * @throws FormatError for a file that is damaged, of another architecture, or whose tensors do not fit its metadata.
 */
export async function openGgufModel(path: string): Promise<GgufModel> {
  const file = await openGguf(path);
  try {
    const config = fromMetadata(file, path, await factorsOf(file));
    const parts = partsOf(config);
    checkTensors(path, file, parts);
    return {
      config,
      metadata: file.metadata,
      async fill(parameters) {
        for (const part of parts) {
          const { name, gguf, heads, add } = part;
          if (heads > 0) parameters.write(name, 0, reordered(await file.read(gguf), heads, columnsOf(part), false));
          else {
            await file.each(gguf, (run, from) => {
              // A copy, since the next run may be there before the engine has taken this one.
              const own = run.slice();
              if (add !== 0) for (let i = 0; i < own.length; i++) own[i] = own[i]! - add;
              parameters.write(name, from, own);
            });
          }
        }
        parameters.refresh();
      },
      tokenizer: () => tokenizerOfGguf(file.metadata, path),
      [Symbol.asyncDispose]: () => file.close(),
    };
  } catch (error) {
    await file.close();
    throw error;
  }
}

async function factorsOf(file: Gguf): Promise<Float32Array | undefined> {
  return file.tensors.has('rope_freqs.weight') ? file.read('rope_freqs.weight') : undefined;
}

function checkTensors(path: string, file: Gguf, parts: readonly Part[]): void {
  const refuse = (name: string, problem: string): never => {
    throw new FormatError(`${path}: tensor '${name}' ${problem}`, { code: 'ERR_CHECKPOINT', op: 'loadModel', argument: name });
  };
  const known = new Set(['rope_freqs.weight']);
  for (const { gguf, shape } of parts) {
    known.add(gguf);
    const entry = file.tensors.get(gguf);
    if (entry === undefined) refuse(gguf, 'is missing, which the metadata asks for');
    else if (entry.shape.join() !== shape.join()) {
      refuse(gguf, `has shape [${entry.shape.join(' ')}], the metadata asks for [${shape.join(' ')}]`);
    } else if (!('decode' in ggmlTypes[entry.type])) refuse(gguf, `is ${entry.type}, which cannot be read`);
  }
  for (const name of file.tensors.keys()) if (!known.has(name)) refuse(name, 'has no place in a model of this architecture');
}
