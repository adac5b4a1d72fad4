// The tensors of llama.cpp's GGUF files: their names and layouts, the parameters in them, and what mixtures keep them in.
//   C width, D head size, F hidden width, V vocabulary, P positions

import type { GgmlTypeName } from '../io/ggml.ts';
import type { DecoderConfig } from './decoder.ts';
import { queryFactor, splitPairs } from './ggufconfig.ts';
import type { Gpt2Config } from './gpt2.ts';
import type { ModelConfig } from './registry.ts';

/** How the weights of a file are kept, as llama.cpp calls its mixtures; vectors are always float32. */
export const ggufTypes = ['f16', 'bf16', 'f32', 'q8_0', 'q6_k', 'q5_k_m', 'q4_k_m'] as const;
export type GgufType = (typeof ggufTypes)[number];

/** The number of each mixture in `general.file_type`. */
export const fileTypes: Readonly<Record<GgufType, number>> = {
  f32: 0,
  f16: 1,
  q8_0: 7,
  q4_k_m: 15,
  q5_k_m: 17,
  q6_k: 18,
  bf16: 32,
};

/** One parameter in a tensor of a file: some of its rows. */
export interface Piece {
  /** Our name. */
  readonly name: string;
  readonly rows: number;
  /** Heads whose rows llama.cpp has in another order; 0 for none. */
  readonly heads: number;
  /** The file has (values + add) * factor. */
  readonly add: number;
  readonly factor: number;
}

/** Which of llama.cpp's rules of mixed types holds for a tensor; `exact` is float32 like vectors. */
type Role = 'exact' | 'matrix' | 'value' | 'qkv' | 'down' | 'head';

/** One tensor of a file. */
export interface Part {
  readonly gguf: string;
  readonly shape: readonly number[];
  readonly role: Role;
  readonly layer: number;
  /** What its rows are, in order. */
  readonly pieces: readonly Piece[];
}

type PieceOf = Pick<Piece, 'name' | 'rows'> & Partial<Piece>;
const piece = (given: PieceOf): Piece => ({ heads: 0, add: 0, factor: 1, ...given });

/** Every tensor of a model in the order of llama.cpp's converter. */
export function partsOf(c: ModelConfig): Part[] {
  return c.architecture === 'gpt2' ? gpt2Parts(c) : decoderParts(c);
}

function decoderParts(c: DecoderConfig): Part[] {
  const { width: C, headSize: D, hidden: F, vocabSize: V } = c;
  const parts: Part[] = [];
  const norm = (name: string, gguf: string, size = C, factor = 1): void => {
    const own = piece({ name: `${name}.weight`, rows: size, add: c.normOffset, factor });
    parts.push({ gguf: `${gguf}.weight`, shape: [size], role: 'exact', layer: 0, pieces: [own] });
  };
  const pairs = splitPairs(c);
  const q = queryFactor(c);
  // Where queries are normed, a factor before the norm would do nothing.
  const [before, after] = c.queryKeyNorm ? [1, q] : [q, 1];

  const table = (name: string, gguf: string, role: Role): void => {
    parts.push({ gguf, shape: [V, C], role, layer: 0, pieces: [piece({ name, rows: V })] });
  };
  table('model.embed_tokens.weight', 'token_embd.weight', c.tied ? 'head' : 'matrix');
  for (let layer = 0; layer < c.layers; layer++) {
    const [at, blk] = [`model.layers.${layer}`, `blk.${layer}`];
    /** One or several of our matrices, one above the other. */
    const linear = (gguf: string, of: readonly PieceOf[], columns: number, bias = false, role: Role = 'matrix'): void => {
      const rows = of.reduce((n, each) => n + each.rows, 0);
      const pieces = (kind: 'weight' | 'bias'): Piece[] =>
        of.map((each) => piece({ ...each, name: `${at}.${each.name}.${kind}` }));
      parts.push({ gguf: `${blk}.${gguf}.weight`, shape: [rows, columns], role, layer, pieces: pieces('weight') });
      if (bias) parts.push({ gguf: `${blk}.${gguf}.bias`, shape: [rows], role: 'exact', layer, pieces: pieces('bias') });
    };
    const { qkv, output } = c.bias;
    const query = { name: 'self_attn.q_proj', rows: c.heads * D, heads: pairs ? c.heads : 0, factor: before };
    const key = { name: 'self_attn.k_proj', rows: c.kvHeads * D, heads: pairs ? c.kvHeads : 0 };
    const value = { name: 'self_attn.v_proj', rows: c.kvHeads * D };
    const [gate, up] = [
      { name: 'mlp.gate_proj', rows: F },
      { name: 'mlp.up_proj', rows: F },
    ] as const;
    const fused = c.architecture === 'phi3';

    norm(`${at}.input_layernorm`, `${blk}.attn_norm`);
    if (fused) linear('attn_qkv', [query, key, value], C, qkv, 'qkv');
    else {
      linear('attn_q', [query], C, qkv);
      linear('attn_k', [key], C, qkv);
      linear('attn_v', [value], C, qkv, 'value');
    }
    linear('attn_output', [{ name: 'self_attn.o_proj', rows: C }], c.heads * D, output);
    if (c.queryKeyNorm) {
      norm(`${at}.self_attn.q_norm`, `${blk}.attn_q_norm`, D, after);
      norm(`${at}.self_attn.k_norm`, `${blk}.attn_k_norm`, D);
    }
    if (c.postNorms) norm(`${at}.post_attention_layernorm`, `${blk}.post_attention_norm`);
    norm(`${at}.${c.postNorms ? 'pre_feedforward_layernorm' : 'post_attention_layernorm'}`, `${blk}.ffn_norm`);
    if (fused) linear('ffn_up', [gate, up], C);
    else {
      linear('ffn_gate', [gate], C);
      linear('ffn_up', [up], C);
    }
    linear('ffn_down', [{ name: 'mlp.down_proj', rows: C }], F, false, 'down');
    if (c.postNorms) norm(`${at}.post_feedforward_layernorm`, `${blk}.post_ffw_norm`);
  }
  norm('model.norm', 'output_norm');
  if (!c.tied) table('lm_head.weight', 'output.weight', 'head');
  return parts;
}

function gpt2Parts({ width: C, hidden: F, vocabSize: V, context: P, layers, tied }: Gpt2Config): Part[] {
  const parts: Part[] = [];
  const push = (gguf: string, names: readonly string[], shape: readonly number[], role: Role, layer = 0): void => {
    const rows = shape[0]! / names.length;
    parts.push({ gguf, shape, role, layer, pieces: names.map((name) => piece({ name, rows })) });
  };
  push('token_embd.weight', ['transformer.wte.weight'], [V, C], tied ? 'head' : 'matrix');
  push('position_embd.weight', ['transformer.wpe.weight'], [P, C], 'exact');
  for (let layer = 0; layer < layers; layer++) {
    const [at, blk] = [`transformer.h.${layer}`, `blk.${layer}`];
    const both = (gguf: string, names: readonly string[], shape: readonly number[], role: Role): void => {
      const named = (kind: string): string[] => names.map((name) => `${at}.${name}.${kind}`);
      push(`${blk}.${gguf}.weight`, named('weight'), shape, role, layer);
      push(`${blk}.${gguf}.bias`, named('bias'), [shape[0]!], 'exact', layer);
    };
    both('attn_norm', ['ln_1'], [C], 'exact');
    both('attn_qkv', ['attn.q_proj', 'attn.k_proj', 'attn.v_proj'], [3 * C, C], 'qkv');
    both('attn_output', ['attn.c_proj'], [C, C], 'matrix');
    both('ffn_norm', ['ln_2'], [C], 'exact');
    both('ffn_up', ['mlp.c_fc'], [F, C], 'matrix');
    both('ffn_down', ['mlp.c_proj'], [C, F], 'down');
  }
  push('output_norm.weight', ['transformer.ln_f.weight'], [C], 'exact');
  push('output_norm.bias', ['transformer.ln_f.bias'], [C], 'exact');
  if (!tied) push('output.weight', ['lm_head.weight'], [V, C], 'head');
  return parts;
}

/** The type of a tensor: the mixture's own, unless its rows are no whole blocks of it, as llama.cpp's quantizer decides. */
export function typeOf({ role, layer, shape }: Part, type: GgufType, layers: number): GgmlTypeName {
  if (role === 'exact') return 'F32';
  if (type === 'f32' || type === 'f16' || type === 'bf16') return type.toUpperCase() as GgmlTypeName;
  const columns = shape.at(-1)!;
  if (type === 'q8_0' || columns % 256 !== 0) return columns % 32 === 0 ? 'Q8_0' : 'F16';
  if (type === 'q6_k' || role === 'head') return 'Q6_K';
  // Mixtures give more bits where they matter most: values and down projections of the first, the last and every third layer.
  const eighth = Math.floor(layers / 8);
  const many = layer < eighth || layer >= Math.floor((7 * layers) / 8) || (layer - eighth) % 3 === 2;
  if (many && (role === 'value' || role === 'down')) return 'Q6_K';
  if (type === 'q5_k_m') return role === 'qkv' ? 'Q6_K' : 'Q5_K';
  return role === 'qkv' ? 'Q5_K' : 'Q4_K';
}
