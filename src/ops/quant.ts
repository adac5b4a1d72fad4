// Weights of one byte each, for models that are read and not trained.
import { op } from '../tensor/op.ts';
import type { Tensor } from '../tensor/tensor.ts';

const quantizeOp = op({ forward: 'quantize_fp8(w[n k]:float) -> q[n k]:u8, scale[n]:f32' });
const linearOp = op({ forward: 'linear_fp8(x[* k], q[n k]:u8, scale[n]:f32, bias[n]?) -> y[* n]' });

/** A weight [N K] in fp8 (e4m3: largest 448, three bits of fraction). */
export interface Fp8Weight {
  /** [N K], u8. */
  readonly codes: Tensor;
  /** [N], f32: row i is scale[i] times the numbers that its codes stand for. */
  readonly scale: Tensor;
}

/** A matrix that `linear` multiplies with. */
export type Weight = Tensor | Fp8Weight;

/** Whether a weight is one of fp8. */
export const isFp8 = (w: Weight): w is Fp8Weight => 'codes' in w;

/**
 * Rounds a weight to fp8, each row scaled so that its largest magnitude becomes 448. An element is off by at most 1/16 of itself, or
 * by 1/2^18 of the largest of its row where that is more.
 * @param w [N K], f32 or bf16
 */
export function quantizeFp8(w: Tensor): Fp8Weight {
  const [codes, scale] = quantizeOp(w);
  return { codes: codes!, scale: scale! };
}

/** {@link quantizeFp8} into a weight that exists. */
export function quantizeFp8_(into: Fp8Weight, w: Tensor): void {
  quantizeOp(w, { outputs: [into.codes, into.scale] });
}

/**
 * x wᵀ + bias with a weight of fp8. Each token of x is rounded to fp8 too, scaled by its own largest magnitude; sums are float32. It has no
 * gradient: for frozen models (FP8 formats: arXiv 2209.05433).
 * @param x [* K]
 * @param w [N K]
 * @param bias [N]; undefined for none
 * @returns [* N]
 * @throws ShapeError when a shape does not fit.
 */
export function linearFp8(x: Tensor, w: Fp8Weight, bias?: Tensor): Tensor {
  return linearOp(x, w.codes, w.scale, bias)[0]!;
}
