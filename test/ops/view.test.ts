import { expect, test } from 'vitest';
import { concat, pick, slice, transpose } from '../../src/ops/view.ts';
import { DataError, ShapeError } from '../../src/tensor/errors.ts';
import { scope } from '../../src/tensor/scope.ts';
import { tensor, zeros } from '../../src/tensor/tensor.ts';
import { type Array64, array, checkOp, sizeOf } from './check.ts';

/** An array of a shape whose element at `index` is f(index). */
function generate(shape: readonly number[], f: (index: number[]) => number): Array64 {
  const index = shape.map(() => 0);
  const data = Array.from({ length: sizeOf(shape) }, () => {
    const x = f(index);
    for (let i = shape.length - 1; i >= 0 && ++index[i]! === shape[i]; i--) index[i] = 0;
    return x;
  });
  return array(shape, data);
}
const at = (x: Array64, index: readonly number[]): number => x.data[index.reduce((n, i, k) => n * x.shape[k]! + i, 0)]!;
const swapped = <T>(list: readonly T[], i: number, j: number): T[] => list.with(i, list[j]!).with(j, list[i]!);

for (const [a, b] of [
  [-2, -1],
  [0, 1],
  [0, 2],
  [-3, -2],
] as const) {
  const shapes = [
    [2, 3, 4],
    [1, 37, 35],
    [3, 17, 16],
    [33, 2, 65],
    [2, 0, 3],
    [5, 40, 3],
  ];
  checkOp({
    name: `transpose ${a} ${b}`,
    run: (x) => transpose(x!, a, b),
    reference: (x) =>
      generate(swapped(x!.shape, a < 0 ? a + 3 : a, b < 0 ? b + 3 : b), (i) =>
        at(x!, swapped(i, a < 0 ? a + 3 : a, b < 0 ? b + 3 : b)),
      ),
    cases: shapes.map((shape) => [{ shape }]),
  });
}

checkOp({
  name: 'transpose of a matrix, default dims, and of a dim with itself',
  run: (x) => transpose(transpose(x!), 1, 1),
  reference: (x) => generate(swapped(x!.shape, 0, 1), (i) => at(x!, swapped(i, 0, 1))),
  cases: [[{ shape: [1, 1] }], [{ shape: [7, 0] }], [{ shape: [19, 50] }], [{ shape: [64, 64] }]],
});

for (const dim of [0, 1, 2]) {
  const shape = [3, 4, 17];
  const ends = (n: number): number[] => shape.with(dim, n);
  checkOp({
    name: `concat ${dim}`,
    run: (a, b) => concat(a!, b!, dim),
    reference: (a, b) => {
      const first = a!.shape[dim]!;
      return generate(a!.shape.with(dim, first + b!.shape[dim]!), (i) =>
        i[dim]! < first ? at(a!, i) : at(b!, i.with(dim, i[dim]! - first)),
      );
    },
    cases: [
      [{ shape: ends(1) }, { shape: ends(5) }],
      [{ shape: ends(3) }, { shape: ends(0) }],
      [{ shape: ends(0) }, { shape: ends(2) }],
    ],
  });
  for (const [from, to] of [
    [0, 3],
    [1, 2],
    [2, 3],
    [1, 1],
  ] as const) {
    checkOp({
      name: `slice ${from} to ${to} of dim ${dim - 3}`,
      run: (x) => slice(x!, from, to, dim - 3),
      reference: (x) => generate(x!.shape.with(dim, to - from), (i) => at(x!, i.with(dim, i[dim]! + from))),
      cases: [[{ shape }], [{ shape: [3, 3, 3] }]],
    });
  }
}

checkOp({
  name: 'pick',
  run: (x, ids) => pick(x!, ids!),
  reference: (x, ids) => generate(ids!.shape, (i) => at(x!, [...i, at(ids!, i)])),
  cases: [[], [0], [7], [2, 130]].map((lead) => [{ shape: [...lead, 5] }, { shape: lead, dtype: 'i32', below: 5 }]),
});

test('what does not fit is refused', async () => {
  scope(() => {
    const x = zeros([2, 3]);
    expect(() => transpose(x, 0, 2)).toThrow(/dim 2 of a tensor of 2 dims/);
    expect(() => transpose(tensor([1]))).toThrow(ShapeError);
    expect(() => concat(x, zeros([3, 3]))).toThrow(/b has shape \[3 3\]/);
    expect(() => concat(x, zeros([3]), 0)).toThrow(ShapeError);
    expect(() => slice(x, 2, 4)).toThrow(/2 to 4 does not lie in dim 1/);
    expect(() => slice(x, 2, 1)).toThrow(ShapeError);
    expect(() => slice(x, 0.5, 1)).toThrow(ShapeError);
  });
  const y = scope(() => pick(zeros([2, 3]), tensor(Int32Array.of(0, 3))));
  const error = await y.read().catch((e: unknown) => e);
  expect(error).toBeInstanceOf(DataError);
  expect((error as Error).message).toMatch(/index 3 at position 1 is outside a row of 3/);
  y.dispose();
});
