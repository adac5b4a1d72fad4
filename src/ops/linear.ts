// Matrix products with a weight [N K]: rows are output features, as in checkpoints.
import { op } from '../tensor/op.ts';
import { scope } from '../tensor/scope.ts';
import type { Tensor } from '../tensor/tensor.ts';
import { geglu, swiglu } from './activation.ts';
import { isFp8, linearFp8, type Weight } from './quant.ts';

const linearOp = op({
  forward: 'linear(x[* k], w[n k]:float, bias[n]?) -> y[* n]',
  backward: 'linear_backward(dy[* n], x[* k], w[n k]:float) -> dx[* k]+, dw[n k]:f32+, dbias[n]:f32+',
});
const gatedOp = op({
  inPlace: { dgate: 'gate', dup: 'up' },
  forward: 'gated_linear(gate[* f], up[* f], w[n f]:float, kind) -> y[* n]',
  backward: 'gated_linear_backward(dy[* n], gate[* f], up[* f], w[n f]:float, kind) -> dgate[* f], dup[* f], dw[n f]:f32+',
});

/** Numbers that the kernels know. */
const activations = { gelu: 0, silu: 1 } as const;

export interface GatedLinearOptions {
  /** `gelu` is the tanh form, Gemma's; `silu` is Llama's. */
  readonly activation: keyof typeof activations;
}

/**
 * x wᵀ + bias.
 * @param x [* K]
 * @param w [N K], f32, bf16, or fp8 without gradients; on a GPU f32 beside an x of bf16 is rounded to bf16
 * @param bias [N]; undefined for none
 * @returns [* N]
 * @throws ShapeError when a shape does not fit.
 */
export function linear(x: Tensor, w: Weight, bias?: Tensor): Tensor {
  if (isFp8(w)) return linearFp8(x, w, bias);
  return linearOp(x, w, bias)[0]!;
}

/**
 * The second half of a gated MLP: (activation(gate) · up) wᵀ, where the activation is made while the product reads it, and again in the
 * backward pass, so that it never takes memory of its own.
 * @param gate [* F]
 * @param up [* F]
 * @param w [N F], f32, bf16, or fp8 without gradients
 * @returns [* N]
 * @throws ShapeError when a shape does not fit.
 */
export function gatedLinear(gate: Tensor, up: Tensor, w: Weight, { activation }: GatedLinearOptions): Tensor {
  if (isFp8(w)) return scope(() => linearFp8((activation === 'gelu' ? geglu : swiglu)(gate, up), w));
  return gatedOp(gate, up, w, activations[activation])[0]!;
}
