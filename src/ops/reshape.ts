import { ShapeError } from '../tensor/errors.ts';
import { isRecording, record } from '../tensor/tape.ts';
import { addUse, releaseUse, type Tensor, unscopedView, viewOf } from '../tensor/tensor.ts';

/**
 * The same elements under another shape, without a copy. Gradients flow through it.
 * @param shape its product must equal the number of elements; one dim may be -1: the rest.
 * @throws ShapeError
 */
export function reshape(x: Tensor, shape: readonly number[]): Tensor {
  const known = shape.reduce((n, d) => (d === -1 ? n : n * d), 1);
  const full = shape.map((d) => (d === -1 ? x.size / known : d));
  if (full.reduce((n, d) => n * d, 1) !== x.size || !full.every(Number.isInteger)) {
    throw new ShapeError(`reshape: [${x.shape.join(' ')}] has ${x.size} elements and cannot become [${shape.join(' ')}]`, {
      code: 'ERR_SHAPE',
      op: 'reshape',
      argument: 'shape',
      expected: `${x.size} elements`,
      actual: `[${shape.join(' ')}]`,
    });
  }
  const y = viewOf(x, full);
  if (isRecording() && x.tracked) {
    record({
      op: 'reshape',
      outputs: [y],
      backward(gradients) {
        if (gradients.isUnit(y)) {
          gradients.alias(y, x);
          return;
        }
        const dy = gradients.get(y)!;
        // The gradient of y ends with this call. If it is nobody else's, the view is then alone with its memory and may be added to.
        const alone = dy.uses === 1 && !dy.shared;
        const dx = addUse(unscopedView(dy, x.shape));
        if (alone) dx.shared = false;
        gradients.put(x, dx);
        releaseUse(dx);
      },
      release() {},
    });
  }
  return y;
}

/**
 * Rows `from` to `to` of the first dim, without a copy: writing there changes `x`. For caches and data; it has no gradient.
 * @throws ShapeError when the range lies outside.
 */
export function rows(x: Tensor, from: number, to: number): Tensor {
  const [n = 0, ...rest] = x.shape;
  if (!(Number.isInteger(from) && Number.isInteger(to) && from >= 0 && from <= to && to <= n)) {
    throw new ShapeError(`rows: ${from} to ${to} does not lie in the ${n} rows of [${x.shape.join(' ')}]`, {
      code: 'ERR_SHAPE',
      op: 'rows',
      expected: `0 <= from <= to <= ${n}`,
      actual: `${from}, ${to}`,
    });
  }
  return viewOf(x, [to - from, ...rest], from * rest.reduce((a, b) => a * b, 1));
}
