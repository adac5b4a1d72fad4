import { withDevice } from '../tensor/engine.ts';
import { ConfigError } from '../tensor/errors.ts';
import { op } from '../tensor/op.ts';
import { scope } from '../tensor/scope.ts';
import { type Tensor, tensor } from '../tensor/tensor.ts';

const scalars = 'beta1, beta2, eps, weight_decay, clip, seed';
const adamwOp = op({
  forward: `adamw(p[n]:float&, g[n]:f32, m[n]:f32&, v[n]:f32&, norm2[]:f64, decay[k]:u8, rates[2]:f64, copy[n]:bf16?&, ${scalars}) -> `,
});
const adamw8Op = op({
  forward:
    'adamw_8bit(p[n]:float&, g[n]:f32, m[n]:u8&, m_scale[j]:f32&, v[n]:u8&, v_scale[j]:f32&, norm2[]:f64, decay[k]:u8, rates[2]:f64, ' +
    `copy[n]:bf16?&, ${scalars}) -> `,
});

/** Values that share one scale in a moment of 8 bits; twin of kMomentBlock in native/core/moments.h. */
export const momentBlock = 256;

/** A moment in 8 bits: codes [N], u8, and the largest magnitude of each block of 256 [⌈N / 256⌉], f32. Zeros at the start. */
export interface Moment8 {
  readonly codes: Tensor;
  readonly scales: Tensor;
}

/** What AdamW updates: flat buffers of equal length, all parameters end to end. */
export interface AdamWState {
  /** Parameters [N], f32; or bf16, which is rounded up or down by chance, so that small updates count on average. */
  readonly p: Tensor;
  /** Their gradient [N], f32. */
  readonly g: Tensor;
  /** First moment [N], zeros at the start; f32 or 8 bits, like the second. */
  readonly m: Tensor | Moment8;
  /** Second moment [N], zeros at the start. */
  readonly v: Tensor | Moment8;
  /** One number for each 64 parameters [⌈N / 64⌉], u8: not 0 where weight decay holds. */
  readonly decay: Tensor;
  /** Where to put the new parameters rounded to bf16 [N], beside f32 ones. */
  readonly copy?: Tensor | undefined;
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
  /** [2], f64: lr and step, read when the update runs; for graphs, which hold numbers fast. Default: those above. */
  readonly rates?: Tensor | undefined;
  /** Of the rounding by chance. Default 0. */
  readonly seed?: number;
}

/**
 * One AdamW update of all parameters, in place and in one pass over memory. When the norm of the gradient is not finite, nothing
 * is updated. Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (arXiv 1711.05101); moments of 8 bits in blocks after
 * Dettmers et al. (arXiv 2110.02861), with a code of our own.
 * @param squaredNorm [], f64: `squaredNorm(state.g)`
 * @throws ShapeError when lengths differ.
 * @throws ConfigError when an option is out of range.
 */
export function adamw_(state: AdamWState, squaredNorm: Tensor, options: AdamWOptions): void {
  const {
    lr,
    beta1 = 0.9,
    beta2 = 0.95,
    eps = 1e-8,
    weightDecay = 0.1,
    clip = Number.POSITIVE_INFINITY,
    step,
    seed = 0,
  } = options;
  check('lr', lr, lr >= 0 && lr < Number.POSITIVE_INFINITY, 'a number of 0 or more');
  check('beta1', beta1, beta1 >= 0 && beta1 < 1, 'from 0 to below 1');
  check('beta2', beta2, beta2 >= 0 && beta2 < 1, 'from 0 to below 1');
  check('eps', eps, eps >= 0, '0 or more');
  check('weightDecay', weightDecay, weightDecay >= 0, '0 or more');
  check('clip', clip, clip > 0, 'above 0');
  check('step', step, Number.isInteger(step) && step >= 1, 'a whole number from 1');
  check('seed', seed, Number.isSafeInteger(seed) && seed >= 0, 'a whole number of 0 or more');
  const { p, g, m, v, decay, copy } = state;
  scope(() => {
    const rates = options.rates ?? withDevice(p.device, () => tensor(Float64Array.of(lr, step)));
    const rest = [beta1, beta2, eps, weightDecay, clip, seed] as const;
    if ('codes' in m && 'codes' in v) {
      adamw8Op(p, g, m.codes, m.scales, v.codes, v.scales, squaredNorm, decay, rates, copy, ...rest);
    } else if (!('codes' in m) && !('codes' in v)) {
      adamwOp(p, g, m, v, squaredNorm, decay, rates, copy, ...rest);
    } else {
      check('v', Number.NaN, false, 'as many bits as the first moment');
    }
  });
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
