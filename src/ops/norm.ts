// Normalisation over the last dim. C is its width; `*` stands for all dims before it.
import { op } from '../tensor/op.ts';
import { isRecording } from '../tensor/tape.ts';
import type { Tensor } from '../tensor/tensor.ts';

const rms = op({
  cheap: true,
  forward: 'rms_norm(x[* c], w[c]:float, eps, offset) -> y[* c], rstd[*]:f32',
  backward: 'rms_norm_backward(dy[* c], x[* c], w[c]:float, rstd[*]:f32, offset) -> dx[* c]+, dw[c]:f32+',
});
const rmsAdd = op({
  forward: 'rms_norm_add(x[* c], w[c]:float, residual[* c], eps, offset) -> y[* c], rstd[*]:f32',
  backward: 'rms_norm_add_backward(dy[* c], x[* c], w[c]:float, rstd[*]:f32, offset) -> dx[* c]+, dw[c]:f32+, dresidual = dy',
});
const layer = op({
  cheap: true,
  forward: 'layer_norm(x[* c], w[c]:float, bias[c]:float?, eps) -> y[* c], mean[*]:f32, rstd[*]:f32',
  backward: 'layer_norm_backward(dy[* c], x[* c], w[c]:float, mean[*]:f32, rstd[*]:f32) -> dx[* c]+, dw[c]:f32+, dbias[c]:f32+',
});

export interface RmsNormOptions {
  /** Added to the mean square. Default 1e-6. */
  readonly eps?: number;
  /** Added to the weight: 1 for Gemma, whose weights are stored as a difference from 1. Default 0, as in Llama. */
  readonly offset?: number;
}

/**
 * Divides each row by its root mean square: x / sqrt(mean(x²) + eps) · (offset + w).
 * Zhang and Sennrich, "Root Mean Square Layer Normalization" (arXiv 1910.07467).
 * @param x [* C]
 * @param w [C], f32 or bf16
 * @returns [* C]
 * @throws ShapeError when w is not as wide as a row.
 */
export function rmsNorm(x: Tensor, w: Tensor, { eps = 1e-6, offset = 0 }: RmsNormOptions = {}): Tensor {
  return rms(x, w, eps, offset, { outputs: [true, isRecording()] })[0]!;
}

export interface RmsNormAddOptions extends RmsNormOptions {
  /** Make the sum again in the backward pass instead of keeping it. Default false: in a chain of sums each would need the one before. */
  readonly cheap?: boolean;
}

/**
 * A norm at the end of a branch: residual + rmsNorm(x, w), in one pass.
 * @param x [* C]
 * @param w [C], f32 or bf16
 * @param residual [* C]
 * @returns [* C]
 * @throws ShapeError when a shape does not fit.
 */
export function rmsNormAdd(x: Tensor, w: Tensor, residual: Tensor, options: RmsNormAddOptions = {}): Tensor {
  const { eps = 1e-6, offset = 0, cheap = false } = options;
  return rmsAdd(x, w, residual, eps, offset, { outputs: [true, isRecording()], cheap })[0]!;
}

export interface LayerNormOptions {
  /** Added to the variance. Default 1e-5. */
  readonly eps?: number;
}

/**
 * Shifts each row to mean 0 and scales it to variance 1: (x - mean) / sqrt(variance + eps) · w + bias.
 * Ba, Kiros and Hinton, "Layer Normalization" (arXiv 1607.06450).
 * @param x [* C]
 * @param w [C], f32 or bf16
 * @param bias [C], f32 or bf16; undefined for none
 * @returns [* C]
 * @throws ShapeError when w or bias is not as wide as a row.
 */
export function layerNorm(x: Tensor, w: Tensor, bias?: Tensor, { eps = 1e-5 }: LayerNormOptions = {}): Tensor {
  const saved = isRecording();
  return layer(x, w, bias, eps, { outputs: [true, saved, saved] })[0]!;
}
