import { expect, test } from 'vitest';
import { silu } from '../../src/ops/activation.ts';
import { add, scale } from '../../src/ops/elementwise.ts';
import { sum } from '../../src/ops/reduce.ts';
import { reshape, rows } from '../../src/ops/reshape.ts';
import { ShapeError } from '../../src/tensor/errors.ts';
import { scope } from '../../src/tensor/scope.ts';
import { valueAndGrad } from '../../src/tensor/tape.ts';
import { parameter, type Tensor, tensor, zeros } from '../../src/tensor/tensor.ts';

/** Gradients of some parameters, which are freed. */
async function gradients(parameters: readonly Tensor[], f: () => Tensor): Promise<number[][]> {
  valueAndGrad(f).dispose();
  const all: number[][] = [];
  for (const p of parameters) {
    all.push([...(await p.grad!.read())]);
    p.dispose();
  }
  return all;
}

test('the same elements under another shape, one dim by the rest', async () => {
  const y = scope(() => reshape(tensor([1, 2, 3, 4, 5, 6], [2, 3]), [3, -1]));
  expect(y.shape).toEqual([3, 2]);
  expect([...(await y.read())]).toEqual([1, 2, 3, 4, 5, 6]);
  y.dispose();
});

test('shapes of another size are refused', () => {
  using x = zeros([2, 3]);
  for (const shape of [[5], [4, -1], [-1, -1], [0, -1], [2, 3, 0], [1.5, 4]]) {
    expect(() => reshape(x, shape), String(shape)).toThrow(ShapeError);
  }
});

test('rows show the memory of their tensor, within it', async () => {
  using x = tensor([1, 2, 3, 4, 5, 6], [3, 2]);
  using some = rows(x, 1, 3);
  expect([...(await some.read())]).toEqual([3, 4, 5, 6]);
  for (const [from, to] of [
    [-1, 1],
    [2, 1],
    [0, 4],
    [0.5, 1.5],
    [Number.NaN, 1],
  ] as const)
    expect(() => rows(x, from, to), `${from} to ${to}`).toThrow(ShapeError);
});

// The gradient of a reshape is a view of the gradient that it was given. Neither may be added to while the other is still needed.
const parametersOf = (): [Tensor, Tensor] => [parameter(tensor([1, 1, 1, 1])), parameter(tensor([1, 1, 1, 1], [2, 2]))];
const slope = 1 / (1 + Math.exp(-2)) + (2 * Math.exp(-2)) / (1 + Math.exp(-2)) ** 2; // of silu at 2

test('a gradient that a reshape passes on is not added to while another user of it waits', async () => {
  const [p, q] = parametersOf();
  const [dp, dq] = await gradients([p, q], () => {
    const x = scale(p, 2);
    const other = scale(q, 3);
    const gate = silu(x);
    return add(sum(scale(add(other, reshape(x, [2, 2])), 1)), sum(gate));
  });
  expect(dq).toEqual([3, 3, 3, 3]);
  for (const d of dp!) expect(d).toBeCloseTo(2 + 2 * slope, 5);
});

test('nor is what a reshape passed on when that user adds to its own', async () => {
  const [p, q] = parametersOf();
  const [dp, dq] = await gradients([p, q], () => {
    const x = scale(p, 3);
    const other = scale(q, 2);
    const gate = silu(other);
    return add(sum(scale(add(other, reshape(x, [2, 2])), 1)), sum(gate));
  });
  expect(dp).toEqual([3, 3, 3, 3]);
  for (const d of dq!) expect(d).toBeCloseTo(2 + 2 * slope, 5);
});
