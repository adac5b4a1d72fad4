// The decoder that Gemma, Llama, Mistral, Qwen, Phi-3 and SmolLM are settings of: a config, its parameters, one function.
//   B batch, T tokens, C width, H query heads, G key/value heads, D head size, F hidden width, V vocabulary
import { matrix, type Tensors, vector, weight } from '../nn/parameters.ts';
import { add } from '../ops/elementwise.ts';
import { embedding } from '../ops/embedding.ts';
import { gatedLinear, linear } from '../ops/linear.ts';
import { rmsNorm, rmsNormAdd } from '../ops/norm.ts';
import { reshape, rows } from '../ops/reshape.ts';
import { type RopeOptions, type RopeScaling, rope, ropeTable } from '../ops/rotary.ts';
import { concat, slice } from '../ops/view.ts';
import { scope } from '../tensor/scope.ts';
import { recompute } from '../tensor/tape.ts';
import type { Tensor } from '../tensor/tensor.ts';
import { attend } from './cache.ts';
import {
  type BaseConfig,
  checkDimensions,
  type ForwardOptions,
  type LayerKind,
  layerKind,
  layerWindow,
  type ModelInput,
  refusal,
} from './config.ts';

/** Names of Transformers' `model_type`. */
export const decoderArchitectures = [
  'gemma',
  'gemma2',
  'gemma3_text',
  'llama',
  'mistral',
  'qwen2',
  'qwen3',
  'phi3',
  'smollm3',
] as const;

export interface DecoderConfig extends BaseConfig {
  /** Which of the known architectures these settings are of; it decides the names in files. */
  readonly architecture: (typeof decoderArchitectures)[number];
  /** What joins the two branches of the feed-forward block. */
  readonly activation: 'gelu' | 'silu';
  /** Added to the weights of norms: 1 where they are stored as a difference from 1. */
  readonly normOffset: 0 | 1;
  /** Whether attention and feed-forward are normed once more before they are added to the residual stream. */
  readonly postNorms: boolean;
  /** Whether queries and keys are normed, head by head, before they are turned. */
  readonly queryKeyNorm: boolean;
  /** Whether embeddings are multiplied by √C. */
  readonly scaledEmbedding: boolean;
  /** Whether the embedding table is the output head too. */
  readonly tied: boolean;
  /** Which projections of attention have a bias. */
  readonly bias: { readonly qkv: boolean; readonly output: boolean };
  /** Soft cap of attention scores; null for none. */
  readonly attentionCap: number | null;
  /** Scores are divided by its square root. It is not always the head size: 144 for Gemma 2 27B. */
  readonly queryScalar: number;
  /** Base of the rotary frequencies. */
  readonly ropeBase: number;
  /** That of local layers, to which `ropeScaling` does not apply then; null where all layers turn alike. */
  readonly localRopeBase: number | null;
  readonly ropeScaling: RopeScaling | null;
  /** Whether a layer turns queries and keys, repeated over the layers: all do but for some of SmolLM3's. */
  readonly rotary: readonly boolean[];
  /** Share of each head's dims, the first ones, that are turned. Default 1: all. */
  readonly rotaryShare?: number | undefined;
}

/** How many dims of each head are turned. */
export function rotarySize({ headSize, rotaryShare = 1 }: Pick<DecoderConfig, 'headSize' | 'rotaryShare'>): number {
  return Math.floor(headSize * rotaryShare);
}

/** Whether a text that may come to `length` tokens is turned as long ones are. */
export function isLong({ ropeScaling }: Pick<DecoderConfig, 'ropeScaling'>, length: number): boolean {
  return ropeScaling?.kind === 'longrope' && length > ropeScaling.context;
}

/** @throws ConfigError naming the field. */
export function checkDecoder(c: DecoderConfig): void {
  const refuse = refusal(c.architecture);
  checkDimensions(c);
  if (c.headSize % 2 !== 0) refuse('headSize', 'an even number (rotary embedding turns pairs)', c.headSize);
  for (const field of ['attentionCap', 'localRopeBase'] as const) {
    const value = c[field];
    if (value !== null && !(value > 0 && Number.isFinite(value))) refuse(field, 'a positive number or null', value);
  }
  for (const field of ['queryScalar', 'ropeBase'] as const) {
    if (!(c[field] > 0 && Number.isFinite(c[field]))) refuse(field, 'a positive number', c[field]);
  }
  const { rotaryShare = 1, ropeScaling: scaling } = c;
  const turned = rotarySize(c);
  if (!(rotaryShare > 0 && rotaryShare <= 1 && turned >= 2 && turned % 2 === 0))
    refuse('rotaryShare', `above 0, at most 1, and an even number of the ${c.headSize} dims of a head`, rotaryShare);
  if (scaling?.kind === 'longrope') {
    for (const list of ['short', 'long'] as const) {
      const good = scaling[list].length === turned / 2 && scaling[list].every((factor) => factor > 0 && Number.isFinite(factor));
      if (!good) refuse(`ropeScaling.${list}`, `${turned / 2} positive numbers`, scaling[list]);
    }
  }
  if (c.rotary.length === 0) refuse('rotary', 'a list of true and false', c.rotary);
}

/** The parameters, under the names that Transformers gives them. */
export function decoderSpec(c: DecoderConfig) {
  const { width, heads, kvHeads, headSize, hidden, initStd: std } = c;
  const norm = (name: string, size = width) => vector(`${name}.weight`, size, 1 - c.normOffset);
  const linear = (name: string, rows: number, cols: number) => weight(`${name}.weight`, [rows, cols], std);
  const bias = (has: boolean, name: string, size: number) => (has ? vector(`${name}.bias`, size, 0) : undefined);
  const { qkv, output } = c.bias;
  return {
    embed: matrix('model.embed_tokens.weight', [c.vocabSize, width], std),
    layers: Array.from({ length: c.layers }, (_, i) => {
      const at = `model.layers.${i}`;
      const attention = `${at}.self_attn`;
      return {
        attention: {
          norm: norm(`${at}.input_layernorm`),
          query: linear(`${attention}.q_proj`, heads * headSize, width),
          key: linear(`${attention}.k_proj`, kvHeads * headSize, width),
          value: linear(`${attention}.v_proj`, kvHeads * headSize, width),
          output: linear(`${attention}.o_proj`, width, heads * headSize),
          queryBias: bias(qkv, `${attention}.q_proj`, heads * headSize),
          keyBias: bias(qkv, `${attention}.k_proj`, kvHeads * headSize),
          valueBias: bias(qkv, `${attention}.v_proj`, kvHeads * headSize),
          outputBias: bias(output, `${attention}.o_proj`, width),
          queryNorm: c.queryKeyNorm ? norm(`${attention}.q_norm`, headSize) : undefined,
          keyNorm: c.queryKeyNorm ? norm(`${attention}.k_norm`, headSize) : undefined,
          postNorm: c.postNorms ? norm(`${at}.post_attention_layernorm`) : undefined,
        },
        feedForward: {
          // Without norms after the branches, the name of the first of them is that of the norm before this branch.
          norm: norm(`${at}.${c.postNorms ? 'pre_feedforward_layernorm' : 'post_attention_layernorm'}`),
          gate: linear(`${at}.mlp.gate_proj`, hidden, width),
          up: linear(`${at}.mlp.up_proj`, hidden, width),
          down: linear(`${at}.mlp.down_proj`, width, hidden),
          postNorm: c.postNorms ? norm(`${at}.post_feedforward_layernorm`) : undefined,
        },
      };
    }),
    norm: norm('model.norm'),
    head: c.tied ? undefined : matrix('lm_head.weight', [c.vocabSize, width], std),
  };
}

export type DecoderParameters = Tensors<ReturnType<typeof decoderSpec>>;
type LayerParameters = DecoderParameters['layers'][number];

/**
 * The hidden states [B T C] after the last norm. Logits are `finalCap`-capped products with the head; the loss heads make them
 * piece by piece.
 */
export function decoderHidden(p: DecoderParameters, c: DecoderConfig, input: ModelInput, options: ForwardOptions = {}): Tensor {
  const tables = ropeTables(c, input);
  const scale = c.scaledEmbedding ? Math.sqrt(c.width) : 1;
  let x = embedding(input.ids, p.embed, { scale, cheap: isCheap(c, 0) });
  const next = (y: Tensor): void => {
    x.dispose();
    x = y;
  };
  if (options.embedded !== undefined) next(options.embedded(x));
  for (const [i, layer] of p.layers.entries()) {
    const table = tables(i); // outside the layer's scope: the next layer turns by it too
    const run = (h: Tensor): Tensor => decoderLayer(layer, c, i, h, table, input);
    next(options.recompute === true ? recompute(run, x) : scope(() => run(x)));
  }
  next(rmsNorm(x, p.norm, { eps: c.normEps, offset: c.normOffset }));
  return x;
}

/** The angles of each layer's tokens; undefined for a layer that turns nothing. */
function ropeTables(c: DecoderConfig, { positions, cache }: ModelInput): (layer: number) => Tensor | undefined {
  const headSize = rotarySize(c);
  const made = new Map<LayerKind, Tensor>();
  // Keys in a cache have been turned once and for all, so what the text may become decides.
  const limits = cache?.sequences.map((n) => cache.cache.limits[n]!) ?? [positions.shape[1]!];
  const scaledTable = (options: RopeOptions): Tensor => {
    const turned = (at: Tensor, length: number): Tensor => ropeTable(at, { ...options, length });
    if (limits.every((length) => isLong(c, length) === isLong(c, limits[0]!))) return turned(positions, limits[0]!);
    return limits.map((length, i) => turned(rows(positions, i, i + 1), length)).reduce((a, b) => concat(a, b, 0));
  };
  const make = (kind: LayerKind): Tensor =>
    kind === 'local' && c.localRopeBase !== null
      ? ropeTable(positions, { headSize, base: c.localRopeBase })
      : scaledTable({ headSize, base: c.ropeBase, scaling: c.ropeScaling });
  return (layer) => {
    if (!c.rotary[layer % c.rotary.length]) return undefined;
    const kind = c.localRopeBase === null ? 'global' : layerKind(c, layer);
    const table = made.get(kind) ?? make(kind);
    made.set(kind, table);
    return table;
  };
}

/**
 * Whether the residual stream before layer `i` is made again in the backward pass: a pass over memory for each sum since the last that was
 * kept. Every sixth is, counted from the last layer's: memory is fullest at the end, and the sums of six layers are less than what
 * the backward pass of one layer frees. Without norms after the branches sums are kept: what they are made of would take as much.
 */
function isCheap(c: DecoderConfig, i: number): boolean {
  return (i === 0 && !c.postNorms) || (c.layers - 1 - i) % 6 !== 0;
}

/** One layer: attention and feed-forward, each normed before (and after, where the model does), added to the residual stream. */
function decoderLayer(
  p: LayerParameters,
  c: DecoderConfig,
  index: number,
  x: Tensor,
  table: Tensor | undefined,
  input: ModelInput,
): Tensor {
  const norm = { eps: c.normEps, offset: c.normOffset };
  const [b = 1, t = 1] = x.shape;
  const heads = (y: Tensor, count: number): Tensor => reshape(y, [b, t, count, c.headSize]);
  const turned = (y: Tensor, gain: Tensor | undefined): Tensor => {
    const z = gain === undefined ? y : rmsNorm(y, gain, norm);
    if (table === undefined) return z;
    const size = table.shape[2]!;
    return size === c.headSize ? rope(z, table) : concat(rope(slice(z, 0, size), table), slice(z, size, c.headSize));
  };
  const added = (y: Tensor, gain: Tensor | undefined, to: Tensor, cheap: boolean): Tensor =>
    gain === undefined ? add(to, y) : rmsNormAdd(y, gain, to, { ...norm, cheap });

  const { attention: a, feedForward: f } = p;
  const h = rmsNorm(x, a.norm, norm);
  const q = turned(heads(linear(h, a.query, a.queryBias), c.heads), a.queryNorm);
  const now = {
    key: turned(heads(linear(h, a.key, a.keyBias), c.kvHeads), a.keyNorm),
    value: heads(linear(h, a.value, a.valueBias), c.kvHeads),
  };
  const mixed = attend(input, index, q, now, {
    scale: c.queryScalar ** -0.5,
    cap: c.attentionCap,
    window: layerWindow(c, index),
  });
  const y = added(linear(reshape(mixed, [b, t, -1]), a.output, a.outputBias), a.postNorm, x, true);

  const g = rmsNorm(y, f.norm, norm);
  const { activation } = c;
  return added(gatedLinear(linear(g, f.gate), linear(g, f.up), f.down, { activation }), f.postNorm, y, isCheap(c, index + 1));
}
