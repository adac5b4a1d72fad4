// Sums to one number (float64 inside, in an order that does not depend on threads), and reductions over the last dim, C wide.
import { ShapeError } from '../tensor/errors.ts';
import { op } from '../tensor/op.ts';
import { noGrad } from '../tensor/tape.ts';
import type { Tensor } from '../tensor/tensor.ts';

const sumOp = op({ forward: 'sum(x[*]) -> y[]:f32', backward: 'sum_backward(dy[]:f32, x[*]) -> dx[*]+' });
const meanOp = op({ forward: 'mean(x[*]) -> y[]:f32', backward: 'mean_backward(dy[]:f32, x[*]) -> dx[*]+' });
const dotOp = op({ forward: 'dot(a[*], b[*]) -> y[]:f32', backward: 'dot_backward(dy[]:f32, a[*], b[*]) -> da[*]+, db[*]+' });
const squares = op({ forward: 'squared_norm(x[*], before[]:f64?) -> y[]:f64' });
const finite = op({ forward: 'is_finite(x[*]) -> y[]:i32' });
const largest = op({ forward: 'argmax(x[* c]) -> y[*]:i32' });
const topOp = op({ forward: 'top_k(x[* c], k) -> values[* k], ids[* k]:i32' });
const soft = op({ forward: 'softmax(x[* c]) -> y[* c]', backward: 'softmax_backward(dy[* c], y[* c]) -> dx[* c]+' });
const logSoft = op({ forward: 'log_softmax(x[* c]) -> y[* c]', backward: 'log_softmax_backward(dy[* c], y[* c]) -> dx[* c]+' });

/**
 * The sum of all elements.
 * @param x [*]
 * @returns []
 */
export function sum(x: Tensor): Tensor {
  return sumOp(x)[0]!;
}

/**
 * The mean of all elements; NaN when there are none.
 * @param x [*]
 * @returns []
 */
export function mean(x: Tensor): Tensor {
  return meanOp(x)[0]!;
}

/**
 * The sum of a · b over all elements: a weighted sum, or of a tensor with itself its squared norm with a gradient.
 * @param a [*]
 * @param b [*]
 * @returns []
 * @throws ShapeError when the shapes differ.
 */
export function dot(a: Tensor, b: Tensor): Tensor {
  return dotOp(a, b)[0]!;
}

/**
 * The sum of squares in float64, for clipping; {@link dot} of x with itself is the one that has a gradient.
 * @param x [*]
 * @param before [], f64: a sum to go on with. Default: none.
 * @returns [], f64
 */
export function squaredNorm(x: Tensor, before?: Tensor): Tensor {
  return squares(x, before)[0]!;
}

/**
 * 1 when no element is infinite or NaN, else 0.
 * @param x [*]
 * @returns [], i32
 */
export function allFinite(x: Tensor): Tensor {
  return noGrad(() => finite(x)[0]!);
}

/**
 * Where each row is largest: the first of equals; a NaN counts as largest. No gradient flows.
 * @param x [* C], C > 0
 * @returns [*], i32
 */
export function argmax(x: Tensor): Tensor {
  return noGrad(() => largest(x)[0]!);
}

/**
 * The k largest elements of each row, the largest first; of equals the first, and a NaN counts as largest. No gradient flows.
 * @param x [* C]
 * @param k from 1 to C
 * @returns values and ids [* k]; ids are i32
 * @throws ShapeError when k is out of range.
 */
export function topK(x: Tensor, k: number): { readonly values: Tensor; readonly ids: Tensor } {
  const c = x.shape.at(-1) ?? 0;
  if (!(Number.isInteger(k) && k >= 1 && k <= c)) {
    throw new ShapeError(`topK: k is ${k} of rows of ${c} elements`, {
      code: 'ERR_SHAPE',
      op: 'topK',
      argument: 'k',
      expected: `1 to ${c}`,
      actual: String(k),
    });
  }
  const [values, ids] = noGrad(() => topOp(x, k));
  return { values: values!, ids: ids! };
}

/**
 * exp(x) / sum(exp(x)) of each row.
 * @param x [* C]
 * @returns [* C]
 */
export function softmax(x: Tensor): Tensor {
  return soft(x)[0]!;
}

/**
 * x - log(sum(exp(x))) of each row.
 * @param x [* C]
 * @returns [* C]
 */
export function logSoftmax(x: Tensor): Tensor {
  return logSoft(x)[0]!;
}
