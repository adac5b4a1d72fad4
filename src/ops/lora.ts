// What an adapter of low rank needs beside products.
import { op } from '../tensor/op.ts';
import { noGrad } from '../tensor/tape.ts';
import type { Tensor } from '../tensor/tensor.ts';

const squaresOp = op({ forward: 'row_squares(w[n k]:float) -> s[n]:f32' });
const normsOp = op({ forward: 'low_rank_norms(squares[n]:f32, p[r n], b[n r]:float, g[r r], scale) -> norm[n]:f32' });
const columnsOp = op({
  forward: 'scale_columns(x[* n], m[n]:float, norm[n]:f32, bias[n]?) -> y[* n]',
  backward: 'scale_columns_backward(dy[* n], x[* n], m[n]:float, norm[n]:f32) -> dx[* n]+, dm[n]:f32+',
});
const dropoutOp = op({
  forward: 'dropout(x[*], rate, seed, stream) -> y[*]',
  backward: 'dropout_backward(dy[*], rate, seed, stream) -> dx[*]+',
});

/** Two thin matrices whose product is added to a weight W [N K]: W + scale · B A. */
export interface LowRank {
  /** [R K] */
  readonly a: Tensor;
  /** [N R] */
  readonly b: Tensor;
  readonly scale: number;
  /** Frozen copies of A and B, whose product is taken away: an initial product that is not zero then changes nothing (OLoRA). */
  readonly start?: { readonly a: Tensor; readonly b: Tensor } | undefined;
  /** Lengths of the rows of the sum, trained apart from their directions (DoRA). */
  readonly direction?: { readonly magnitude: Tensor; readonly squares: Tensor } | undefined;
  /** Which numbers of the input of A are dropped in this pass; undefined outside of training. */
  readonly dropout?: { readonly rate: number; readonly seed: number; readonly stream: number } | undefined;
}

/**
 * The sum of squares of each row. No gradient flows.
 * @param w [N K], f32 or bf16
 * @returns [N], f32
 */
export function rowSquares(w: Tensor): Tensor {
  return noGrad(() => squaresOp(w)[0]!);
}

/**
 * The length of each row of W + scale · B A, without making that sum. No gradient flows.
 * @param squares {@link rowSquares} of W [N]
 * @param p A Wᵀ [R N]
 * @param b [N R]
 * @param g A Aᵀ [R R]
 * @returns [N], f32
 */
export function lowRankNorms(squares: Tensor, p: Tensor, b: Tensor, g: Tensor, scale: number): Tensor {
  return noGrad(() => normsOp(squares, p, b, g, scale)[0]!);
}

/**
 * x · m / norm + bias, each column with its own; gradients flow to x and m.
 * @param x [* N]
 * @param m [N], f32 or bf16
 * @param norm [N], f32
 * @param bias [N]; undefined for none
 * @returns [* N]
 * @throws ShapeError when a shape does not fit.
 */
export function scaleColumns(x: Tensor, m: Tensor, norm: Tensor, bias?: Tensor): Tensor {
  return columnsOp(x, m, norm, bias)[0]!;
}

/**
 * Makes each element zero with probability `rate` and divides the others by 1 - rate; which ones depends on seed, stream and place alone.
 * @param x [*]
 * @param rate from 0 to below 1
 * @returns [*]
 */
export function dropout(x: Tensor, rate: number, seed: number, stream: number): Tensor {
  return dropoutOp(x, rate, seed, stream)[0]!;
}
