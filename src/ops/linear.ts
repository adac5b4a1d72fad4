// Matrix products with a weight [N K]: rows are output features, as in checkpoints.
import { checkObject } from '../tensor/argument.ts';
import { op } from '../tensor/op.ts';
import { scope } from '../tensor/scope.ts';
import { noGrad } from '../tensor/tape.ts';
import type { Tensor } from '../tensor/tensor.ts';
import { geglu, swiglu } from './activation.ts';
import { add, scale, sub } from './elementwise.ts';
import { dropout, lowRankNorms, scaleColumns } from './lora.ts';
import { type AdaptedWeight, dequantize, isAdapted, isQuantized, linearQuantized, type Weight } from './quant.ts';

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
 * @param w [N K], f32, bf16, of few bits (frozen), or frozen with a trained correction of low rank; on a GPU f32 beside an x of bf16 is rounded to bf16
 * @param bias [N]; undefined for none
 * @returns [* N]
 * @throws ShapeError when a shape does not fit.
 */
export function linear(x: Tensor, w: Weight, bias?: Tensor): Tensor {
  checkObject('linear', 'w', w, 'a tensor or a weight of few bits');
  if (isAdapted(w)) return linearAdapted(x, w, bias);
  if (isQuantized(w)) return linearQuantized(x, w, bias);
  return linearOp(x, w, bias)[0]!;
}

/**
 * The second half of a gated MLP: (activation(gate) · up) wᵀ, where the activation is made while the product reads it, and again in the
 * backward pass, so that it never takes memory of its own.
 * @param gate [* F]
 * @param up [* F]
 * @param w [N F], as of {@link linear}
 * @returns [* N]
 * @throws ShapeError when a shape does not fit.
 */
export function gatedLinear(gate: Tensor, up: Tensor, w: Weight, { activation }: GatedLinearOptions): Tensor {
  if (isAdapted(w) || isQuantized(w)) return scope(() => linear((activation === 'gelu' ? geglu : swiglu)(gate, up), w));
  return gatedOp(gate, up, w, activations[activation])[0]!;
}

/** x Wᵀ + s (x Aᵀ) Bᵀ + bias; with a direction of its own, columns are scaled to their trained lengths before the bias. */
function linearAdapted(x: Tensor, w: AdaptedWeight, bias: Tensor | undefined): Tensor {
  const { base, lowRank } = w;
  const { a, b, start, direction } = lowRank;
  return scope(() => {
    const kept =
      lowRank.dropout === undefined ? x : dropout(x, lowRank.dropout.rate, lowRank.dropout.seed, lowRank.dropout.stream);
    let change = linear(scale(linear(kept, a), lowRank.scale), b);
    if (start !== undefined) change = sub(change, linear(scale(linear(kept, start.a), lowRank.scale), start.b));
    const y = add(linear(x, base, direction === undefined ? bias : undefined), change);
    return direction === undefined ? y : scaleColumns(y, direction.magnitude, adaptedNorms(w), bias);
  });
}

/** Lengths of the rows of W + s B A [N], f32; they count as constants (DoRA, section 4.3). */
export function adaptedNorms({ base, lowRank: { a, b, scale: s, direction } }: AdaptedWeight): Tensor {
  return noGrad(() =>
    scope(() => {
      // The product with a weight of fp8 would round A too.
      const w = isQuantized(base) && base.format === 'fp8' ? dequantize(base) : base;
      return lowRankNorms(direction!.squares, linear(a, w), b, linear(a, a), s);
    }),
  );
}
