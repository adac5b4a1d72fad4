// Rearrangements that move bytes; reshape() does not. The kernels know a few forms with all dims before and after taken together.
import { ShapeError } from '../tensor/errors.ts';
import { op } from '../tensor/op.ts';
import type { Tensor } from '../tensor/tensor.ts';
import { reshape } from './reshape.ts';

const swap = op({
  forward: 'transpose(x[o m k n i]) -> y[o n k m i]',
  backward: 'transpose_backward(dy[o n k m i]) -> dx[o m k n i]+',
});
const join = op({
  forward: 'concat(a[o m i], b[o n i], s) -> y[o s i]',
  backward: 'concat_backward(dy[o s i], a[o m i], b[o n i]) -> da[o m i]+, db[o n i]+',
});
const cut = op({
  forward: 'slice(x[o n i], start, m) -> y[o m i]',
  backward: 'slice_backward(dy[o m i], x[o n i], start) -> dx[o n i]+',
});
const pickOp = op({
  forward: 'pick(x[* c], ids[*]:i32) -> y[*]',
  backward: 'pick_backward(dy[*], x[* c], ids[*]:i32) -> dx[* c]+',
});

const product = (dims: readonly number[]): number => dims.reduce((n, d) => n * d, 1);

/** The dim's number, counted from the end when negative. */
function dimOf(x: Tensor, dim: number, name: string): number {
  const n = x.shape.length;
  if (Number.isInteger(dim) && dim >= -n && dim < n) return dim < 0 ? dim + n : dim;
  throw new ShapeError(`${name}: dim ${dim} of a tensor of ${n} dims [${x.shape.join(' ')}]; give ${-n} to ${n - 1}`, {
    code: 'ERR_SHAPE',
    op: name,
    argument: 'dim',
    expected: `${-n} to ${n - 1}`,
    actual: String(dim),
  });
}

/** [outer, dim, inner]. */
function around(x: Tensor, dim: number): Tensor {
  return reshape(x, [product(x.shape.slice(0, dim)), x.shape[dim]!, product(x.shape.slice(dim + 1))]);
}

/**
 * Swaps two dims.
 * @param x [*]
 * @param a counted from the end when negative. Default -2.
 * @param b counted from the end when negative. Default -1.
 * @returns [*] with dims a and b exchanged, in memory of its own
 * @throws ShapeError when there is no such dim.
 */
export function transpose(x: Tensor, a = -2, b = -1): Tensor {
  const [i, j] = [dimOf(x, a, 'transpose'), dimOf(x, b, 'transpose')].sort((p, q) => p - q) as [number, number];
  const shape = [...x.shape];
  [shape[i], shape[j]] = [shape[j]!, shape[i]!];
  const middle = i === j ? 1 : x.shape[j]!;
  const parts = [
    product(x.shape.slice(0, i)),
    x.shape[i]!,
    product(x.shape.slice(i + 1, j)),
    middle,
    product(x.shape.slice(j + 1)),
  ];
  return reshape(swap(reshape(x, parts))[0]!, shape);
}

/**
 * Puts b after a along one dim.
 * @param a [*]
 * @param b [*], equal to a in all other dims
 * @param dim counted from the end when negative. Default -1.
 * @returns [*]
 * @throws ShapeError when the other dims differ, or there is no such dim.
 */
export function concat(a: Tensor, b: Tensor, dim = -1): Tensor {
  const at = dimOf(a, dim, 'concat');
  if (a.shape.length !== b.shape.length || a.shape.some((d, i) => i !== at && d !== b.shape[i])) {
    throw new ShapeError(
      `concat: b has shape [${b.shape.join(' ')}], which differs from a [${a.shape.join(' ')}] beside dim ${at}`,
      {
        code: 'ERR_SHAPE',
        op: 'concat',
        argument: 'b',
        expected: `[${a.shape.map((d, i) => (i === at ? 'any' : d)).join(' ')}]`,
        actual: `[${b.shape.join(' ')}]`,
      },
    );
  }
  const total = a.shape[at]! + b.shape[at]!;
  return reshape(
    join(around(a, at), around(b, at), total)[0]!,
    a.shape.map((d, i) => (i === at ? total : d)),
  );
}

/**
 * Elements `from` to `to` of one dim, copied; `rows` shows those of the first dim without a copy.
 * @param x [*]
 * @param to the first element left out
 * @param dim counted from the end when negative. Default -1.
 * @returns [*] with to - from elements in that dim
 * @throws ShapeError when the range lies outside.
 */
export function slice(x: Tensor, from: number, to: number, dim = -1): Tensor {
  const at = dimOf(x, dim, 'slice');
  const size = x.shape[at]!;
  if (!(Number.isInteger(from) && Number.isInteger(to) && from >= 0 && from <= to && to <= size)) {
    throw new ShapeError(`slice: ${from} to ${to} does not lie in dim ${at} of [${x.shape.join(' ')}]`, {
      code: 'ERR_SHAPE',
      op: 'slice',
      expected: `0 <= from <= to <= ${size}`,
      actual: `${from}, ${to}`,
    });
  }
  return reshape(
    cut(around(x, at), from, to - from)[0]!,
    x.shape.map((d, i) => (i === at ? to - from : d)),
  );
}

/**
 * One element of each row: of log-probabilities [T V] and targets [T], those of the targets.
 * @param x [* C]
 * @param ids [*], i32
 * @returns [*]
 * @throws DataError `ERR_TOKEN_RANGE`, at the next read, when an id is not in 0 .. C-1.
 */
export function pick(x: Tensor, ids: Tensor): Tensor {
  return pickOp(x, ids)[0]!;
}
