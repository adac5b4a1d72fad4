// Gemma 2 (arXiv:2408.00118): a config, its parameters, one function.
//   B batch, T tokens, C width, H query heads, G key/value heads, D head size, F hidden width, V vocabulary
import { matrix, type Tensors, vector, weight } from '../nn/parameters.ts';
import { embedding } from '../ops/embedding.ts';
import { gatedLinear, linear } from '../ops/linear.ts';
import { rmsNorm, rmsNormAdd } from '../ops/norm.ts';
import { reshape } from '../ops/reshape.ts';
import { rope, ropeTable } from '../ops/rotary.ts';
import { ConfigError } from '../tensor/errors.ts';
import { scope } from '../tensor/scope.ts';
import { recompute } from '../tensor/tape.ts';
import type { Tensor } from '../tensor/tensor.ts';
import { attend, type CacheRows } from './cache.ts';

export interface Gemma2Config {
  /** Rows of the embedding table, which is the output head too. */
  readonly vocabSize: number;
  readonly width: number;
  /** Even layers attend within `window`, odd ones to everything before. */
  readonly layers: number;
  readonly heads: number;
  /** Each serves `heads / kvHeads` query heads. */
  readonly kvHeads: number;
  readonly headSize: number;
  /** Width of each of the two branches of the feed-forward block. */
  readonly hidden: number;
  /** Keys that a local layer sees, the token itself included. */
  readonly window: number;
  /** Soft cap of attention scores; null for none. */
  readonly attentionCap: number | null;
  /** Soft cap of logits; null for none. */
  readonly finalCap: number | null;
  /** Scores are divided by its square root. It is not always the head size: 144 for 27B. */
  readonly queryScalar: number;
  readonly ropeBase: number;
  readonly normEps: number;
  /** Standard deviation of the initial weights. */
  readonly initStd: number;
  /** Most tokens of a sequence; informative, for exported files. */
  readonly context: number;
}

const common = {
  attentionCap: 50,
  finalCap: 30,
  ropeBase: 10_000,
  normEps: 1e-6,
  initStd: 0.02,
  context: 8192,
} as const;

/** The published sizes, with the 256,128 rows that the report counts (public weights keep 256,000), and small ones for the CPU. */
export const gemma2Presets = {
  'gemma2-2b': {
    ...common,
    vocabSize: 256_128,
    width: 2304,
    layers: 26,
    heads: 8,
    kvHeads: 4,
    headSize: 256,
    hidden: 9216,
    window: 4096,
    queryScalar: 256,
  },
  'gemma2-9b': {
    ...common,
    vocabSize: 256_128,
    width: 3584,
    layers: 42,
    heads: 16,
    kvHeads: 8,
    headSize: 256,
    hidden: 14_336,
    window: 4096,
    queryScalar: 256,
  },
  'gemma2-27b': {
    ...common,
    vocabSize: 256_128,
    width: 4608,
    layers: 46,
    heads: 32,
    kvHeads: 16,
    headSize: 128,
    hidden: 36_864,
    window: 4096,
    queryScalar: 144,
  },
  /** 0.3 M parameters without the embedding: for tests and first tries. */
  'gemma2-nano': {
    ...common,
    vocabSize: 4096,
    width: 96,
    layers: 2,
    heads: 3,
    kvHeads: 1,
    headSize: 32,
    hidden: 384,
    window: 64,
    queryScalar: 32,
    context: 512,
  },
  /** 1 M parameters without the embedding. */
  'gemma2-micro': {
    ...common,
    vocabSize: 4096,
    width: 128,
    layers: 4,
    heads: 4,
    kvHeads: 2,
    headSize: 32,
    hidden: 512,
    window: 64,
    queryScalar: 32,
    context: 512,
  },
  /** 5.9 M parameters without the embedding. */
  'gemma2-mini': {
    ...common,
    vocabSize: 8192,
    width: 256,
    layers: 6,
    heads: 4,
    kvHeads: 2,
    headSize: 64,
    hidden: 1024,
    window: 128,
    queryScalar: 64,
    context: 2048,
  },
  /** 31.5 M parameters without the embedding. */
  'gemma2-small': {
    ...common,
    vocabSize: 8192,
    width: 512,
    layers: 8,
    heads: 8,
    kvHeads: 4,
    headSize: 64,
    hidden: 2048,
    window: 128,
    queryScalar: 64,
    context: 2048,
  },
} as const satisfies Record<string, Gemma2Config>;

export type Gemma2Preset = keyof typeof gemma2Presets;

/** @throws ConfigError naming the field. */
export function checkGemma2(c: Gemma2Config): void {
  const refuse = (field: string, expected: string, actual: unknown): never => {
    throw new ConfigError(`gemma2: ${field} is ${String(actual)}, expected ${expected}`, {
      code: 'ERR_CONFIG',
      op: 'gemma2',
      argument: field,
      expected,
      actual: String(actual),
    });
  };
  for (const field of ['vocabSize', 'width', 'layers', 'heads', 'kvHeads', 'headSize', 'hidden', 'window', 'context'] as const) {
    if (!Number.isInteger(c[field]) || c[field] < 1) refuse(field, 'a whole number of 1 or more', c[field]);
  }
  if (c.heads % c.kvHeads !== 0) refuse('kvHeads', `a divisor of heads (${c.heads})`, c.kvHeads);
  if (c.headSize % 2 !== 0) refuse('headSize', 'an even number (rotary embedding turns pairs)', c.headSize);
  for (const field of ['attentionCap', 'finalCap'] as const) {
    const cap = c[field];
    if (cap !== null && !(cap > 0 && Number.isFinite(cap))) refuse(field, 'a positive number or null', cap);
  }
  for (const field of ['queryScalar', 'ropeBase', 'normEps'] as const) {
    if (!(c[field] > 0 && Number.isFinite(c[field]))) refuse(field, 'a positive number', c[field]);
  }
}

/** The parameters, under the names that Transformers gives them. */
export function gemma2Spec(c: Gemma2Config) {
  const { width, heads, kvHeads, headSize, hidden, initStd: std } = c;
  const norm = (name: string) => vector(`${name}.weight`, width, 0);
  const linear = (name: string, rows: number, cols: number) => weight(`${name}.weight`, [rows, cols], std);
  return {
    embed: matrix('model.embed_tokens.weight', [c.vocabSize, width], std),
    layers: Array.from({ length: c.layers }, (_, i) => {
      const at = `model.layers.${i}`;
      return {
        attention: {
          norm: norm(`${at}.input_layernorm`),
          query: linear(`${at}.self_attn.q_proj`, heads * headSize, width),
          key: linear(`${at}.self_attn.k_proj`, kvHeads * headSize, width),
          value: linear(`${at}.self_attn.v_proj`, kvHeads * headSize, width),
          output: linear(`${at}.self_attn.o_proj`, width, heads * headSize),
          postNorm: norm(`${at}.post_attention_layernorm`),
        },
        feedForward: {
          norm: norm(`${at}.pre_feedforward_layernorm`),
          gate: linear(`${at}.mlp.gate_proj`, hidden, width),
          up: linear(`${at}.mlp.up_proj`, hidden, width),
          down: linear(`${at}.mlp.down_proj`, width, hidden),
          postNorm: norm(`${at}.post_feedforward_layernorm`),
        },
      };
    }),
    norm: norm('model.norm'),
  };
}

export type Gemma2Parameters = Tensors<ReturnType<typeof gemma2Spec>>;
type LayerParameters = Gemma2Parameters['layers'][number];

/** What the model reads. */
export interface ModelInput {
  /** Token ids [B T], i32. */
  readonly ids: Tensor;
  /** Place of each token in its document [B T], i32. */
  readonly positions: Tensor;
  /** Index in the row of the first token of each token's document [B T], i32; absent: each row is one document. */
  readonly starts?: Tensor | undefined;
  /** Keys and values of the tokens before, for generation: {@link cacheRows}. */
  readonly cache?: CacheRows | undefined;
}

export interface ForwardOptions {
  /** Keep only each layer's input and compute the layer again in the backward pass. Default false. */
  readonly recompute?: boolean;
}

/**
 * The hidden states [B T C] after the last norm. Logits are `finalCap`-capped products with `embed`; the loss heads make them
 * piece by piece.
 */
export function gemma2Hidden(p: Gemma2Parameters, c: Gemma2Config, input: ModelInput, options: ForwardOptions = {}): Tensor {
  const table = ropeTable(input.positions, { headSize: c.headSize, base: c.ropeBase });
  let x = embedding(input.ids, p.embed, { scale: Math.sqrt(c.width), cheap: isCheap(c, 0) });
  const next = (y: Tensor): void => {
    x.dispose();
    x = y;
  };
  for (const [i, layer] of p.layers.entries()) {
    const run = (h: Tensor): Tensor => gemma2Layer(layer, c, i, h, table, input);
    next(options.recompute === true ? recompute(run, x) : scope(() => run(x)));
  }
  next(rmsNorm(x, p.norm, { eps: c.normEps, offset: 1 }));
  return x;
}

/**
 * Whether the residual stream before layer `i` is made again in the backward pass: a pass over memory for each sum since the last that was
 * kept. Every sixth is, counted from the last layer's: memory is fullest at the end, and the sums of six layers are less than what
 * the backward pass of one layer frees.
 */
function isCheap(c: Gemma2Config, i: number): boolean {
  return (c.layers - 1 - i) % 6 !== 0;
}

/** One layer: attention and feed-forward, each normed before and after, added to the residual stream. */
function gemma2Layer(p: LayerParameters, c: Gemma2Config, index: number, x: Tensor, table: Tensor, input: ModelInput): Tensor {
  const norm = { eps: c.normEps, offset: 1 };
  const [b = 1, t = 1] = x.shape;
  const heads = (y: Tensor, count: number): Tensor => reshape(y, [b, t, count, c.headSize]);

  const { attention: a, feedForward: f } = p;
  const h = rmsNorm(x, a.norm, norm);
  const q = rope(heads(linear(h, a.query), c.heads), table);
  const now = { key: rope(heads(linear(h, a.key), c.kvHeads), table), value: heads(linear(h, a.value), c.kvHeads) };
  const mixed = attend(input, index, q, now, {
    scale: c.queryScalar ** -0.5,
    cap: c.attentionCap,
    window: index % 2 === 0 ? c.window : null,
  });
  const y = rmsNormAdd(linear(reshape(mixed, [b, t, -1]), a.output), a.postNorm, x, { ...norm, cheap: true });

  const g = rmsNorm(y, f.norm, norm);
  return rmsNormAdd(gatedLinear(linear(g, f.gate), linear(g, f.up), f.down, { activation: 'gelu' }), f.postNorm, y, {
    ...norm,
    cheap: isCheap(c, index + 1),
  });
}
