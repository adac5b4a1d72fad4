import { ConfigError } from '../tensor/errors.ts';
import { op } from '../tensor/op.ts';
import type { Tensor } from '../tensor/tensor.ts';

const adamwOp = op({
  forward: 'adamw(p[n]&, g[n], m[n]&, v[n]&, norm2[]:f64, decay[k]:u8, lr, beta1, beta2, eps, weight_decay, step, clip) -> ',
});

/** What AdamW updates: four flat buffers of equal length, all parameters end to end. */
export interface AdamWState {
  /** Parameters [N]. */
  readonly p: Tensor;
  /** Their gradient [N]. */
  readonly g: Tensor;
  /** First moment [N], zeros at the start. */
  readonly m: Tensor;
  /** Second moment [N], zeros at the start. */
  readonly v: Tensor;
  /** One number for each 64 parameters [⌈N / 64⌉], u8: not 0 where weight decay holds. */
  readonly decay: Tensor;
}

export interface AdamWOptions {
  readonly lr: number;
  /** Memory of the first moment. Default 0.9. */
  readonly beta1?: number;
  /** Memory of the second moment. Default 0.95. */
  readonly beta2?: number;
  /** Added to the root of the second moment. Default 1e-8. */
  readonly eps?: number;
  /** Decoupled: each step takes lr · weightDecay of a decayed parameter away. Default 0.1. */
  readonly weightDecay?: number;
  /** Greatest norm of the whole gradient; a longer one is scaled down. Default: no limit. */
  readonly clip?: number;
  /** Number of this update, from 1: corrects the bias of the moments. */
  readonly step: number;
}

/**
 * One AdamW update of all parameters, in place and in one pass over memory. When the norm of the gradient is not finite, nothing
 * is updated. Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (arXiv 1711.05101).
 * @param squaredNorm [], f64: `squaredNorm(state.g)`
 * @throws ShapeError when lengths differ.
 * @throws ConfigError when an option is out of range.
 */
export function adamw_(state: AdamWState, squaredNorm: Tensor, options: AdamWOptions): void {
  const { lr, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weightDecay = 0.1, clip = Number.POSITIVE_INFINITY, step } = options;
  check('lr', lr, lr >= 0 && lr < Number.POSITIVE_INFINITY, 'a number of 0 or more');
  check('beta1', beta1, beta1 >= 0 && beta1 < 1, 'from 0 to below 1');
  check('beta2', beta2, beta2 >= 0 && beta2 < 1, 'from 0 to below 1');
  check('eps', eps, eps >= 0, '0 or more');
  check('weightDecay', weightDecay, weightDecay >= 0, '0 or more');
  check('clip', clip, clip > 0, 'above 0');
  check('step', step, Number.isInteger(step) && step >= 1, 'a whole number from 1');
  adamwOp(state.p, state.g, state.m, state.v, squaredNorm, state.decay, lr, beta1, beta2, eps, weightDecay, step, clip);
}

function check(name: string, value: number, good: boolean, expected: string): void {
  if (good) return;
  throw new ConfigError(`adamw: ${name} is ${value}, expected ${expected}`, {
    code: 'ERR_CONFIG',
    op: 'adamw',
    argument: name,
    expected,
    actual: String(value),
  });
}
