// Fused attention. B batch, T queries, S keys, H query heads, G key/value heads, D head size.
import { checkObject } from '../tensor/argument.ts';
import { ConfigError, ShapeError } from '../tensor/errors.ts';
import { op } from '../tensor/op.ts';
import { isRecording } from '../tensor/tape.ts';
import type { Tensor } from '../tensor/tensor.ts';

const attentionOp = op({
  forward: 'attention(q[b t h d], k[b s g d], v[b s g d], starts[b t]:i32?, scale, cap, window) -> y[b t h d], lse[b h t]:f32',
  backward:
    'attention_backward(dy[b t h d], q[b t h d], k[b t g d], v[b t g d], starts[b t]:i32?, y[b t h d], lse[b h t]:f32, scale, cap, window) -> dq[b t h d]+, dk[b t g d]+, dv[b t g d]+',
});

const stepOp = op({
  forward:
    'attention_step(q[b 1 h d], k[b 1 g d], v[b 1 g d], keys[n r g d]&, values[n r g d]&, rows[b]:i32, positions[b 1]:i32, scale, cap) -> ' +
    'y[b 1 h d]',
});

export interface AttentionOptions {
  /** Factor of the scores q·k. Default D^-1/2. */
  readonly scale?: number;
  /** Soft cap: scores become cap · tanh(score / cap), before the mask (Gemma 2: 50). Default null: none. */
  readonly cap?: number | null;
  /** Keys that a query sees, itself included. Default null: all before it. */
  readonly window?: number | null;
  /**
   * Packed documents: for each token the position, in its row, of the first token of its document [B T], i32; only when S = T.
   * Default: a row is one document.
   */
  readonly starts?: Tensor | undefined;
}

/**
 * Causal attention in one pass: grouped queries without copies of keys and values, sliding window, soft cap, packed documents.
 * Keys outside the window or the document are never touched, forward or backward; of the scores only the log-sum-exp is kept.
 * What is not finite reaches exactly the queries that see it.
 * FlashAttention (arXiv 2205.14135), grouped queries (arXiv 2305.13245), soft cap (Gemma 2, arXiv 2408.00118).
 * @param q [B T H D]: the last T of S positions; for gradients all of them (T = S)
 * @param k [B S G D]; query head i uses head ⌊i G / H⌋
 * @param v [B S G D]
 * @returns [B T H D]
 * @throws ShapeError when heads do not divide or lengths do not fit; ConfigError for an option out of range; DataError, when the
 * result is read, for a start after its token, below 0, or before the start of the token before it.
 */
export function attention(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions = {}): Tensor {
  for (const [name, t] of Object.entries({ q, k, v })) checkObject('attention', name, t, 'a tensor', 'shape');
  const { window = null, starts } = options;
  const [, t = 0, h = 0, d = 1] = q.shape;
  const [, s = 0, g = 0] = k.shape;
  const [scale, cap] = scoresOf(d, options);
  if (window !== null)
    option(
      'window',
      window,
      Number.isInteger(window) && window >= 1,
      'a whole number from 1 (keys that are seen, the token itself included), or null for no window',
    );
  if (q.shape.length === 4 && k.shape.length === 4) {
    if (g === 0 ? h !== 0 : h % g !== 0) {
      misfit('k', `${h} query heads cannot share ${g} key/value heads`, `a divisor of ${h} heads`, `${g} heads`);
    }
    if (s < t)
      misfit(
        'k',
        `${t} queries but only ${s} keys; the queries are the last of the keys' positions`,
        `at least ${t} keys`,
        `${s} keys`,
      );
    if (starts !== undefined && s !== t)
      misfit(
        'starts',
        `documents are marked but ${s} keys are not the ${t} queries' own`,
        'as many keys as queries',
        `${s} keys`,
      );
  }
  return attentionOp(q, k, v, starts, scale, cap, window ?? 0, { outputs: [true, isRecording()] })[0]!;
}

/** A cache of keys or values and where to put the next: see {@link attentionStep}. */
export interface AttentionStepOptions extends Pick<AttentionOptions, 'scale' | 'cap'> {
  /** The sequence that each row continues [B], i32; none may be named twice. */
  readonly rows: Tensor;
  /** Tokens that each sequence had before [B 1], i32. */
  readonly positions: Tensor;
}

/**
 * Attention of one more token of some sequences, with their keys and values in a ring of R places: the new ones go to place
 * position mod R, then the query sees what was written so far, at most R tokens. Nothing but tensors tells lengths apart, so that a
 * recorded step can be replayed. Without gradients.
 * @param q [B 1 H D]
 * @param now key and value [B 1 G D]
 * @param cache key and value [N R G D], changed in place
 * @returns [B 1 H D]
 * @throws ShapeError when a shape does not fit; DataError, when the result is read, for a row or position out of range, and on the CPU for a row
 *   that is named twice.
 */
export function attentionStep(
  q: Tensor,
  now: { readonly key: Tensor; readonly value: Tensor },
  cache: { readonly key: Tensor; readonly value: Tensor },
  options: AttentionStepOptions,
): Tensor {
  const scores = scoresOf(q.shape[3] ?? 1, options);
  return stepOp(q, now.key, now.value, cache.key, cache.value, options.rows, options.positions, ...scores)[0]!;
}

/** Factor and soft cap of scores, as the kernels take them. */
function scoresOf(d: number, options: Pick<AttentionOptions, 'scale' | 'cap'>): readonly [scale: number, cap: number] {
  const { scale = d ** -0.5, cap = null } = options;
  option('scale', scale, Number.isFinite(scale), 'a finite number');
  if (cap !== null) option('cap', cap, cap > 0 && Number.isFinite(cap), 'a positive number, or null for no cap');
  return [scale, cap ?? 0];
}

function option(name: string, value: number, good: boolean, expected: string): void {
  if (good) return;
  throw new ConfigError(`attention: ${name} is ${value}, expected ${expected}`, {
    code: 'ERR_CONFIG',
    op: 'attention',
    argument: name,
    expected,
    actual: String(value),
  });
}

function misfit(argument: string, why: string, expected: string, actual: string): never {
  throw new ShapeError(`attention: ${why}`, { code: 'ERR_SHAPE', op: 'attention', argument, expected, actual });
}
