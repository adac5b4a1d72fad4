// What choosing the next token needs of its logits, without moving a whole vocabulary.
import { ConfigError } from '../tensor/errors.ts';
import { op } from '../tensor/op.ts';
import { noGrad } from '../tensor/tape.ts';
import type { Tensor } from '../tensor/tensor.ts';

const top = op({
  forward: 'top_logits(x[b v], temperature[b]:f32, k, n) -> values[b k]:f32, ids[b k]:i32, sums[b 2]:f32',
});

export interface TopLogits {
  /** [B K], the largest first; of equals the smaller id first. −∞ in places that are left over where K exceeds the row. */
  readonly values: Tensor;
  /** [B K], i32; −1 in places that are left over. */
  readonly ids: Tensor;
  /** [B 2]: with m the largest logit, Σ e^(x − m) and Σ e^((x − m) / temperature) over the whole row; NaN where the row holds one. */
  readonly sums: Tensor;
}

/**
 * The k largest logits of each row and what makes probabilities of them, in one pass. No gradient flows.
 * @param x [B V]
 * @param temperature [B], above 0
 * @param k 1 or more
 * @param n only the first n columns count: rows of a head beyond the tokenizer's ids are never chosen. Default V.
 * @throws ConfigError for a k or n out of range.
 */
export function topLogits(x: Tensor, temperature: Tensor, k: number, n = x.shape[1] ?? 0): TopLogits {
  const limits = { k: [k, Number.MAX_SAFE_INTEGER], n: [n, x.shape[1] ?? 0] } as const;
  for (const [argument, [value, most]] of Object.entries(limits)) {
    if (Number.isInteger(value) && value >= 1 && value <= most) continue;
    const expected = argument === 'k' ? 'a whole number from 1' : `a whole number from 1 to ${most}`;
    const data = { code: 'ERR_CONFIG', op: 'topLogits', argument, expected, actual: String(value) };
    throw new ConfigError(`topLogits: ${argument} is ${value}, expected ${expected}`, data);
  }
  const [values, ids, sums] = noGrad(() => top(x, temperature, k, n));
  return { values: values!, ids: ids!, sums: sums! };
}
