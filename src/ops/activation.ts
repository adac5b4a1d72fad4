// Activations, and the gated ones of transformer MLPs. All work element by element on any shape.
import { op } from '../tensor/op.ts';
import type { Tensor } from '../tensor/tensor.ts';

const geluOp = op({ forward: 'gelu(x[*]) -> y[*]', backward: 'gelu_backward(dy[*], x[*]) -> dx[*]+' });
const siluOp = op({ forward: 'silu(x[*]) -> y[*]', backward: 'silu_backward(dy[*], x[*]) -> dx[*]+' });
const gegluOp = op({
  forward: 'geglu(gate[*], up[*]) -> y[*]',
  backward: 'geglu_backward(dy[*], gate[*], up[*]) -> dgate[*]+, dup[*]+',
});
const swigluOp = op({
  forward: 'swiglu(gate[*], up[*]) -> y[*]',
  backward: 'swiglu_backward(dy[*], gate[*], up[*]) -> dgate[*]+, dup[*]+',
});

/**
 * The tanh form of GELU: x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³))).
 * Hendrycks and Gimpel, "Gaussian Error Linear Units" (arXiv 1606.08415).
 * @param x [*]
 * @returns [*]
 */
export function gelu(x: Tensor): Tensor {
  return geluOp(x)[0]!;
}

/**
 * x · sigmoid(x), also called swish.
 * @param x [*]
 * @returns [*]
 */
export function silu(x: Tensor): Tensor {
  return siluOp(x)[0]!;
}

/**
 * gelu(gate) · up, Gemma's gate. Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202).
 * @param gate [*]
 * @param up [*]
 * @returns [*]
 * @throws ShapeError when the shapes differ.
 */
export function geglu(gate: Tensor, up: Tensor): Tensor {
  return gegluOp(gate, up)[0]!;
}

/**
 * silu(gate) · up, Llama's gate. Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202).
 * @param gate [*]
 * @param up [*]
 * @returns [*]
 * @throws ShapeError when the shapes differ.
 */
export function swiglu(gate: Tensor, up: Tensor): Tensor {
  return swigluOp(gate, up)[0]!;
}
