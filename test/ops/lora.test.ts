import { beforeAll, expect, test } from 'vitest';
import { swiglu } from '../../src/ops/activation.ts';
import { cast } from '../../src/ops/elementwise.ts';
import { gatedLinear, linear } from '../../src/ops/linear.ts';
import { dropout, type LowRank, lowRankNorms, rowSquares, scaleColumns } from '../../src/ops/lora.ts';
import { dequantize, isQuantized, type QuantizedWeight, quantizeQ4, quantizeQ8 } from '../../src/ops/quant.ts';
import { randomBlock, uniform } from '../../src/tensor/random.ts';
import { scope } from '../../src/tensor/scope.ts';
import { noGrad } from '../../src/tensor/tape.ts';
import { type Tensor, tensor } from '../../src/tensor/tensor.ts';
import { testDevice } from '../device.ts';
import { type Array64, array, checkOp, type Input, linearReference, randomNumbers } from './check.ts';

checkOp({
  name: 'row_squares',
  run: (w) => rowSquares(w!),
  reference: (w) => {
    const [n, k] = w!.shape as [number, number];
    const squares = Float64Array.from({ length: n }, (_, i) => w!.data.subarray(i * k, i * k + k).reduce((s, x) => s + x * x, 0));
    return array([n], squares);
  },
  cases: [
    [0, 3],
    [2, 0],
    [1, 1],
    [5, 65],
    [3, 1025],
  ].flatMap((shape): Input[][] => [[{ shape }], [{ shape, dtype: 'bf16' }]]),
  gradient: false,
  tolerance: 1e-6,
});

// Rows of W + s B A by its definition.
checkOp({
  name: 'low_rank_norms',
  run: (w, a, b) => noGrad(() => lowRankNorms(rowSquares(w!), linear(a!, w!), b!, linear(a!, a!), 0.75)),
  reference: (w, a, b) => {
    const [n, k] = w!.shape as [number, number];
    const r = a!.shape[0]!;
    const norms = new Float64Array(n);
    for (let i = 0; i < n; i++) {
      for (let j = 0; j < k; j++) {
        let x = w!.data[i * k + j]!;
        for (let l = 0; l < r; l++) x += 0.75 * b!.data[i * r + l]! * a!.data[l * k + j]!;
        norms[i]! += x * x;
      }
      norms[i] = Math.sqrt(norms[i]!);
    }
    return array([n], norms);
  },
  cases: [
    { n: 1, k: 1, r: 1 },
    { n: 7, k: 5, r: 3 },
    { n: 33, k: 65, r: 4 },
    { n: 5, k: 16, r: 17 },
  ].map(({ n, k, r }): Input[] => [{ shape: [n, k] }, { shape: [r, k] }, { shape: [n, r] }]),
  gradient: false,
  tolerance: 4e-6,
  bf16Tolerance: 2e-2,
});

checkOp({
  name: 'scale_columns',
  run: (x, m, norm, bias) =>
    scaleColumns(
      x!,
      m!,
      noGrad(() => norm!),
      bias,
    ),
  reference: (x, m, norm, bias) => {
    const n = m!.shape[0]!;
    return array(
      x!.shape,
      x!.data.map((v, i) => (v * m!.data[i % n]!) / norm!.data[i % n]! + (bias?.data[i % n] ?? 0)),
    );
  },
  cases: [[0, 3], [1, 1], [7], [2, 3, 5], [70, 33], [3, 260]].map((shape): Input[] => {
    const n = shape.at(-1)!;
    const norm = Array.from({ length: n }, (_, i) => 1 + ((i * 7) % 5) / 4);
    return [{ shape }, { shape: [n], weight: true }, { shape: [n], data: norm, dtype: 'f32' }, { shape: [n] }];
  }),
  gradient: false,
  tolerance: 2e-6,
});

checkOp({
  name: 'scale_columns, its gradients',
  run: (x, m) => {
    const n = m!.shape[0]!;
    return scaleColumns(x!, m!, tensor(Float32Array.from({ length: n }, (_, i) => 1 + ((i * 7) % 5) / 4)));
  },
  reference: (x, m) => {
    const n = m!.shape[0]!;
    return array(
      x!.shape,
      x!.data.map((v, i) => (v * m!.data[i % n]!) / (1 + (((i % n) * 7) % 5) / 4)),
    );
  },
  cases: [[0, 3], [1, 1], [7], [2, 3, 5], [150, 33], [3, 260]].map((shape): Input[] => [
    { shape },
    { shape: [shape.at(-1)!], weight: true },
  ]),
  tolerance: 2e-6,
});

const [seed, stream, rate] = [5, 9, 0.3];
/** Which elements stay, from the numbers of src/tensor/random.ts. */
const stays = (i: number): boolean => uniform(randomBlock(seed, stream, Math.floor(i / 4))[i % 4]!) >= Math.fround(rate);

checkOp({
  name: 'dropout',
  run: (x) => dropout(x!, rate, seed, stream),
  // A dropped NaN is dropped.
  reference: (x) =>
    array(
      x!.shape,
      x!.data.map((v, i) => (stays(i) ? v / (1 - rate) : 0)),
    ),
  cases: [[0], [1], [7], [3, 17], [16_385]].map((shape): Input[] => [{ shape }]),
  tolerance: 1e-6,
});

test('dropout drops its share, other elements in each stream', async () => {
  const n = testDevice === 'cpu' ? 100_000 : 4000;
  const x = tensor(new Float32Array(n).fill(1));
  const made: Tensor[] = [dropout(x, 0.25, 1, 1), dropout(x, 0.25, 1, 2)];
  const [a, b] = await Promise.all(made.map((y) => y.read() as Promise<Float32Array>));
  for (const t of [x, ...made]) t.dispose();
  const dropped = (y: Float32Array): number => y.filter((v) => v === 0).length / n;
  const sigmas = 5 * Math.sqrt((0.25 * 0.75) / n);
  expect(Math.abs(dropped(a!) - 0.25)).toBeLessThan(sigmas);
  const both = a!.filter((v, i) => v === 0 && b![i] === 0).length / n;
  expect(Math.abs(both - 1 / 16)).toBeLessThan(sigmas);
});

// ---- A weight with a correction of low rank: x, A, B and magnitude against their definition, on every kind of base

/** A base and the numbers that it stands for. */
const bases = {
  f32: (w: Tensor) => w,
  bf16: (w: Tensor) => cast(w, 'bf16'),
  q8: quantizeQ8,
  q4: quantizeQ4,
} as const;

const [n, k] = [19, 37];
const drawn = (size: number, seed: number): number[] => {
  const random = randomNumbers(seed);
  return Array.from({ length: size }, () => Math.fround(random() + random() + random() - 1.5));
};
const baseNumbers = drawn(n * k, 3);
const makeBase = (format: keyof typeof bases): Tensor | QuantizedWeight =>
  noGrad(() => bases[format](tensor(Float32Array.from(baseNumbers), [n, k])));

/** What each base stands for, read once. */
const exact: Partial<Record<keyof typeof bases, Float64Array>> = {};
beforeAll(async () => {
  for (const format of Object.keys(bases) as (keyof typeof bases)[]) {
    const wide: Tensor = scope(() => {
      const base = makeBase(format);
      return isQuantized(base) ? dequantize(base) : cast(base, 'f32');
    });
    exact[format] = Float64Array.from((await wide.read()) as Float32Array);
    wide.dispose();
  }
});

/** W + s B A. */
function sum(w: Float64Array, a: Array64, b: Array64, s: number): Array64 {
  const r = a.shape[0]!;
  return array(
    [n, k],
    w.map((v, at) => {
      const [i, j] = [Math.floor(at / k), at % k];
      for (let l = 0; l < r; l++) v += s * b.data[i * r + l]! * a.data[l * k + j]!;
      return v;
    }),
  );
}

const bfloat = { bf16Tolerance: 4e-2, bf16GradientTolerance: 4e-2 };

for (const format of Object.keys(bases) as (keyof typeof bases)[]) {
  checkOp({
    name: `linear, adapted ${format}`,
    run: (x, a, b, bias) => scope(() => linear(x!, { base: makeBase(format), lowRank: { a: a!, b: b!, scale: 0.75 } }, bias)),
    reference: (x, a, b, bias) => linearReference(x!, sum(exact[format]!, a!, b!, 0.75), bias),
    cases: [1, 4].flatMap((r) =>
      [[], [1], [2, 5], [33]].map((lead): Input[] => [
        { shape: [...lead, k] },
        { shape: [r, k], weight: true },
        { shape: [n, r], weight: true },
      ]),
    ),
    tolerance: 4e-6,
    ...bfloat,
  });
}

for (const format of ['f32', 'q4'] as const) {
  const r = 3;
  const [a0, b0] = [drawn(r * k, 5), drawn(n * r, 6)];
  checkOp({
    name: `linear, adapted ${format} with a direction`,
    run: (x, a, b, magnitude, bias) =>
      scope(() => {
        const base = makeBase(format);
        const squares = rowSquares(isQuantized(base) ? noGrad(() => dequantize(base)) : base);
        const lowRank: LowRank = { a: a!, b: b!, scale: 0.5, direction: { magnitude: magnitude!, squares } };
        return linear(x!, { base, lowRank }, bias);
      }),
    // Lengths count as constants: those of A and B as they are given, whatever direction the slope is taken along.
    reference: (x, a, b, magnitude, bias) => {
      const given = sum(exact[format]!, array([r, k], Float64Array.from(a0)), array([n, r], Float64Array.from(b0)), 0.5);
      const w = sum(exact[format]!, a!, b!, 0.5);
      const scaled = w.data.map((v, at) => {
        const i = Math.floor(at / k);
        const row = given.data.subarray(i * k, i * k + k);
        return (v * magnitude!.data[i]!) / Math.sqrt(row.reduce((s, y) => s + y * y, 0));
      });
      return linearReference(x!, array([n, k], scaled), bias);
    },
    cases: [[1], [2, 5]].map((lead): Input[] => [
      { shape: [...lead, k] },
      { shape: [r, k], data: a0, weight: true },
      { shape: [n, r], data: b0, weight: true },
      { shape: [n], weight: true },
    ]),
    compute: ['f32'],
    tolerance: 4e-6,
  });
}

test('gated_linear takes an adapted weight', async () => {
  const [gate, up] = [drawn(3 * k, 11), drawn(3 * k, 12)].map((data) => tensor(Float32Array.from(data), [3, k]));
  const [a, b] = [tensor(Float32Array.from(drawn(2 * k, 13)), [2, k]), tensor(Float32Array.from(drawn(n * 2, 14)), [n, 2])];
  const [one, other]: Tensor[] = scope(() => {
    const w = { base: makeBase('q8'), lowRank: { a, b, scale: 2 } };
    return [gatedLinear(gate!, up!, w, { activation: 'silu' }), linear(swiglu(gate!, up!), w)];
  });
  expect(await one!.read()).toEqual(await other!.read());
  for (const t of [gate!, up!, a, b, one!, other!]) t.dispose();
});
