import { expect, test } from 'vitest';
import { cast } from '../../src/ops/elementwise.ts';
import { allFinite, argmax, dot, logSoftmax, mean, softmax, squaredNorm, sum, topK } from '../../src/ops/reduce.ts';
import { ShapeError } from '../../src/tensor/errors.ts';
import { scope } from '../../src/tensor/scope.ts';
import { valueAndGrad } from '../../src/tensor/tape.ts';
import { parameter, type Tensor, tensor } from '../../src/tensor/tensor.ts';
import { anyShapes, array, checkOp, computes, product, rowwise, same, scalar, total } from './check.ts';

const shapes = [...anyShapes, [3 * 16_384 + 5]];
const notEmpty = shapes.filter((s) => !s.includes(0));
const withRows = [
  [0, 5],
  [1, 1],
  [3, 7],
  [2, 3, 17],
  [3, 64],
  [5, 131],
  [40, 1031],
  [3, 1160],
  [2, 32_776],
];

checkOp({ name: 'sum', run: (x) => sum(x!), reference: (x) => scalar(total(x!.data)), cases: same(1, shapes) });
checkOp({
  name: 'mean',
  run: (x) => mean(x!),
  reference: (x) => scalar(total(x!.data) / x!.data.length),
  cases: same(1, notEmpty),
});
checkOp({
  name: 'dot',
  run: (a, b) => dot(a!, b!),
  reference: (a, b) => scalar(product(a!.data, b!.data)),
  cases: same(2, shapes),
});
checkOp({
  name: 'dot with itself',
  run: (x) => dot(x!, x!),
  reference: (x) => scalar(product(x!.data, x!.data)),
  cases: same(1, shapes),
});
checkOp({
  name: 'squared_norm',
  run: (x) => squaredNorm(x!),
  reference: (x) => scalar(product(x!.data, x!.data)),
  cases: same(1, shapes),
  gradient: false,
  tolerance: 1e-13,
});

checkOp({
  name: 'squared_norm, going on with a sum',
  run: (x) => squaredNorm(x!, squaredNorm(x!)),
  reference: (x) => scalar(2 * product(x!.data, x!.data)),
  cases: same(1, shapes),
  gradient: false,
  tolerance: 1e-13,
});

const largest = (row: ArrayLike<number>): number =>
  Array.prototype.reduce.call(row, (a, b) => Math.max(a as number, b as number), Number.NEGATIVE_INFINITY) as number;
const softmax64 = (row: Float64Array): Float64Array => {
  const top = largest(row);
  const e = row.map((x) => Math.exp(x - top));
  const z = total(e);
  return e.map((x) => x / z);
};
/** Places of a row, the largest first: NaN, then by value, equals in order. */
const ranked = (row: Float64Array): number[] =>
  Array.from(row.keys()).sort((a, b) => {
    const [x, y] = [row[a]!, row[b]!];
    return Number(Number.isNaN(y)) - Number(Number.isNaN(x)) || (Number.isNaN(x) || x === y ? a - b : y > x ? 1 : -1);
  });
const where = (row: Float64Array): number => (row.some(Number.isNaN) ? row.findIndex(Number.isNaN) : row.indexOf(largest(row)));

checkOp({ name: 'softmax', run: (x) => softmax(x!), reference: (x) => rowwise(x!, softmax64), cases: same(1, withRows) });
checkOp({
  name: 'log_softmax',
  run: (x) => logSoftmax(x!),
  reference: (x) => rowwise(x!, (row) => softmax64(row).map(Math.log)),
  cases: same(1, withRows),
});
checkOp({
  name: 'argmax',
  run: (x) => argmax(x!),
  reference: (x) => {
    const c = x!.shape.at(-1)!;
    const lead = x!.shape.slice(0, -1);
    return array(
      lead,
      Array.from({ length: x!.data.length / c }, (_, i) => where(x!.data.subarray(i * c, i * c + c))),
    );
  },
  cases: same(1, withRows),
  gradient: false,
});

for (const k of [1, 4, 5]) {
  checkOp({
    name: `top_k, k = ${k}`,
    run: (x) => {
      const { values, ids } = topK(x!, k);
      return [values, ids];
    },
    reference: (x) => {
      const c = x!.shape.at(-1)!;
      const shape = [...x!.shape.slice(0, -1), k];
      const ids = Array.from({ length: x!.data.length / c }, (_, i) => ranked(x!.data.subarray(i * c, i * c + c)).slice(0, k));
      return [
        array(
          shape,
          ids.flatMap((row, i) => row.map((j) => x!.data[i * c + j]!)),
        ),
        array(shape, ids.flat()),
      ];
    },
    cases: same(
      1,
      withRows.filter((shape) => shape.at(-1)! >= k),
    ),
    gradient: false,
  });
}

async function readAll(f: () => Tensor[]): Promise<number[][]> {
  const made = scope(f);
  const read = await Promise.all(made.map((t) => t.read()));
  for (const t of made) t.dispose();
  return read.map((a) => Array.from(a));
}

test('sums keep what float32 would lose', async () => {
  // 2^24 and then ones: a float32 sum stays at 2^24.
  const x = new Float32Array(50_001).fill(1);
  x[0] = 2 ** 24;
  expect(await readAll(() => [sum(tensor(x)), dot(tensor(x), tensor(new Float32Array(50_001).fill(1)))])).toEqual([
    [2 ** 24 + 50_000],
    [2 ** 24 + 50_000],
  ]);
  expect(await readAll(() => [squaredNorm(tensor(new Float32Array(100).fill(1e25)))])).toEqual([[100 * Math.fround(1e25) ** 2]]);
});

test('the mean of nothing is NaN', async () => {
  expect(await readAll(() => [mean(tensor([], [0]))])).toEqual([[Number.NaN]]);
});

test('allFinite finds one bad element anywhere', async () => {
  const n = 16_384 + 21;
  for (const dtype of computes) {
    for (const bad of [Number.NaN, Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY]) {
      for (const at of [0, 15, 16_383, 16_384, n - 1]) {
        const x = new Float32Array(n).fill(3e38);
        expect(await readAll(() => [allFinite(cast(tensor(x), dtype))])).toEqual([[1]]);
        x[at] = bad;
        expect(await readAll(() => [allFinite(cast(tensor(x), dtype))])).toEqual([[0]]);
      }
    }
  }
  expect(await readAll(() => [allFinite(tensor([], [0]))])).toEqual([[1]]);
});

test('argmax: first of equals, NaN first, rows of -Infinity, every place', async () => {
  const inf = Number.NEGATIVE_INFINITY;
  expect(await readAll(() => [argmax(tensor([1, 5, 5, 0, inf, inf, inf, inf, Number.NaN, 9, Number.NaN, 1], [3, 4]))])).toEqual([
    [1, 0, 0],
  ]);
  for (const c of [1, 16, 37]) {
    const eye = Array.from({ length: c * c }, (_, i) => (i % (c + 1) === 0 ? 2 : 1));
    const nan = eye.map((x) => (x === 2 ? Number.NaN : x));
    const each = Array.from({ length: c }, (_, i) => i);
    expect(
      await readAll(() => [
        argmax(tensor(eye, [c, c])),
        argmax(tensor(nan, [c, c])),
        argmax(tensor(new Float32Array(c * c), [c, c])),
      ]),
    ).toEqual([each, each, each.map(() => 0)]);
  }
});

test('argmax of rows of nothing is refused', async () => {
  const y = scope(() => argmax(tensor([], [2, 0])));
  await expect(y.read()).rejects.toThrow(ShapeError);
  y.dispose();
});

test('softmax of large numbers and of masked ones', async () => {
  const [p, log] = await readAll(() => {
    const x = tensor([1e4, 1e4, Number.NEGATIVE_INFINITY, -1e4]);
    return [softmax(x), logSoftmax(x)];
  });
  expect(p).toEqual([0.5, 0.5, 0, 0]);
  expect(log![0]).toBeCloseTo(-Math.LN2, 6);
  expect(log![2]).toBe(Number.NEGATIVE_INFINITY);
  expect(log![3]).toBeCloseTo(-2e4 - Math.LN2, 2);
});

test('argmax and allFinite may be called where a tape records', async () => {
  const x = parameter(tensor([1, 3, 2]));
  let found: Tensor[] = [];
  const loss = valueAndGrad(() => {
    found = [argmax(x), allFinite(x)];
    return sum(x);
  });
  expect(await x.grad!.read()).toEqual(Float32Array.of(1, 1, 1));
  for (const t of [x, loss, ...found]) t.dispose();
});

test('topK: equals in order, NaN first, -0 is 0, and every order of what comes', async () => {
  const inf = Number.NEGATIVE_INFINITY;
  const rows = [
    [1, 5, 5, 0],
    [inf, inf, inf, inf],
    [Number.NaN, 9, Number.NaN, 1],
    [-0, 0, -1, -2],
  ];
  const read = (k: number) =>
    readAll(() => {
      const { values, ids } = topK(tensor(rows.flat(), [4, 4]), k);
      return [values, ids];
    });
  expect((await read(3))[1]).toEqual([1, 2, 0, 0, 1, 2, 0, 2, 1, 0, 1, 2]);
  const sorted = Array.from({ length: 200 }, (_, i) => i);
  for (const row of [sorted, sorted.toReversed(), sorted.map((i) => (i * 67) % 200)]) {
    const [values, ids] = await readAll(() => Object.values(topK(tensor(row), 200)));
    expect(values).toEqual(sorted.toReversed());
    expect(ids!.map((i) => row[i])).toEqual(values);
  }
  // More numbers that are no numbers than a block keeps.
  for (const compute of computes) {
    const [, ids] = await readAll(() => Object.values(topK(cast(tensor(new Float32Array(9000).fill(Number.NaN)), compute), 3)));
    expect(ids).toEqual([0, 1, 2]);
  }
  for (const k of [0, 5, 1.5]) expect(() => scope(() => topK(tensor(rows.flat(), [4, 4]), k))).toThrow(ShapeError);
});
