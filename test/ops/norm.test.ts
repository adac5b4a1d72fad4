import { expect, test } from 'vitest';
import { add, scale } from '../../src/ops/elementwise.ts';
import { layerNorm, rmsNorm, rmsNormAdd } from '../../src/ops/norm.ts';
import { dot } from '../../src/ops/reduce.ts';
import { ShapeError } from '../../src/tensor/errors.ts';
import { scope } from '../../src/tensor/scope.ts';
import { valueAndGrad } from '../../src/tensor/tape.ts';
import { parameter, type Tensor, tensor } from '../../src/tensor/tensor.ts';
import { type Array64, checkOp, elementwise, type Input, rowwise, total } from './check.ts';

// No rows, rows of one, primes, one past a vector, two parts of the sum over rows; rows that a warp, a block, or no block can hold.
const shapes = [
  [0, 5],
  [1, 1],
  [3, 7],
  [2, 3, 17],
  [5, 64],
  [33, 65],
  [260, 67],
  [70, 264],
  [9, 1032],
  [3, 2051],
  [2, 16_392],
];
const cases = (rest: (shape: number[]) => Input[]): Input[][] => shapes.flatMap((shape) => [[{ shape }, ...rest(shape)]]);
const weight = (shape: readonly number[], dtype?: 'f32' | 'bf16'): Input => ({
  shape: [shape.at(-1)!],
  weight: true,
  ...(dtype && { dtype }),
});

const rms = (x: Array64, w: Array64, eps: number, offset: number): Array64 =>
  rowwise(x, (row) => {
    const r = 1 / Math.sqrt(total(row.map((v) => v * v)) / row.length + eps);
    return row.map((v, i) => v * r * (offset + w.data[i]!));
  });
const plus = elementwise((a, b) => a + b);

checkOp({
  name: 'rms_norm, Gemma',
  run: (x, w) => rmsNorm(x!, w!, { offset: 1 }),
  reference: (x, w) => rms(x!, w!, 1e-6, 1),
  cases: cases((s) => [weight(s)]),
});

checkOp({
  name: 'rms_norm, Llama, bf16 weights',
  run: (x, w) => rmsNorm(x!, w!, { eps: 0.1 }),
  reference: (x, w) => rms(x!, w!, 0.1, 0),
  cases: cases((s) => [weight(s, 'bf16')]),
});

checkOp({
  name: 'rms_norm, Gemma, f32 weights',
  run: (x, w) => rmsNorm(x!, w!, { offset: 1 }),
  reference: (x, w) => rms(x!, w!, 1e-6, 1),
  cases: cases((s) => [weight(s, 'f32')]).slice(2),
});

checkOp({
  name: 'rms_norm_add',
  run: (x, w, residual) => rmsNormAdd(x!, w!, residual!, { offset: 1 }),
  reference: (x, w, residual) => plus(rms(x!, w!, 1e-6, 1), residual!),
  cases: cases((s) => [weight(s), { shape: s }]),
});

const layer = (x: Array64, w: Array64, bias?: Array64): Array64 =>
  rowwise(x, (row) => {
    const mean = total(row) / row.length;
    const r = 1 / Math.sqrt(total(row.map((v) => (v - mean) ** 2)) / row.length + 1e-5);
    return row.map((v, i) => (v - mean) * r * w.data[i]! + (bias?.data[i] ?? 0));
  });

checkOp({
  name: 'layer_norm',
  run: (x, w, bias) => layerNorm(x!, w!, bias),
  reference: (x, w, bias) => layer(x!, w!, bias),
  cases: [
    ...cases((s) => [weight(s), weight(s)]),
    ...cases((s) => [weight(s)]).slice(2, 5),
    ...cases((s) => [weight(s, 'bf16'), weight(s, 'bf16')]).slice(2, 5),
  ],
  // Where a row has one element its variance is 0: the gradient is the difference of equals, times 1 / sqrt(eps) = 316.
  gradientTolerance: 2e-5,
});

test('Gemma RMSNorm gives the golden vectors', async () => {
  const x = parameter(tensor([1, -2, 3, 0.5], [1, 4]));
  const w = parameter(tensor([0.1, -0.2, 0, 0.3]));
  const y = rmsNorm(x, w, { offset: 1 });
  valueAndGrad(() => dot(rmsNorm(x, w, { offset: 1 }), tensor([0.3, -0.1, 0.2, 0.4], [1, 4]))).dispose();
  const close = (actual: ArrayLike<number>, expected: number[]): void => {
    expected.forEach((e, i) => {
      expect(actual[i]).toBeCloseTo(e, 6);
    });
  };
  close(await y.read(), [0.58279416, -0.84770059, 1.58943861, 0.34437836]);
  close(await x.grad!.read(), [0.12464546, 0.05800054, -0.04461578, 0.2504063]);
  close(await w.grad!.read(), [0.15894386, 0.10596257, 0.31788772, 0.10596257]);
  for (const t of [x, w, y]) t.dispose();
});

test('a gradient that arrives from two users is their sum', async () => {
  const x = parameter(tensor([1, -2, 3, 0.5], [1, 4]));
  const w = parameter(tensor([1, 1, 1, 1]));
  const dy = tensor([0.3, -0.1, 0.2, 0.4], [1, 4]);
  valueAndGrad(() => dot(rmsNorm(x, w), dy)).dispose();
  const once = await x.grad!.read();
  valueAndGrad(() => dot(add(rmsNorm(x, w), rmsNorm(x, w)), dy)).dispose();
  const thrice = await x.grad!.read();
  thrice.forEach((g, i) => {
    expect(g).toBeCloseTo(3 * once[i]!, 6);
  });
  for (const t of [x, w, dy]) t.dispose();
});

test('a weight of another width is refused, with both shapes', () => {
  scope(() => {
    const x = tensor([1, 2, 3, 4, 5, 6], [2, 3]);
    const w = tensor([1, 2]);
    expect(() => rmsNorm(x, w)).toThrow(ShapeError);
    expect(() => rmsNorm(x, w)).toThrow(/w has shape \[2\], expected \[3\]/);
    expect(() => layerNorm(x, tensor([1, 2, 3]), w)).toThrow(ShapeError);
  });
});

test('what a cheap output is made of again is kept, also where no gradient flows to it', async () => {
  const x = parameter(tensor([1, 2, 3, 4], [2, 2]));
  const w = tensor([0, 0]);
  const one = tensor([1, 1, 1, 1], [2, 2]);
  const loss = valueAndGrad(() => {
    const y = scope(() => rmsNormAdd(x, w, scale(one, 2), { offset: 1, cheap: true }));
    const more = scope(() => tensor(new Float32Array(4).fill(9), [2, 2])); // takes the memory that is free
    more.dispose();
    return dot(y, y);
  });
  const gradient = (await x.grad!.read()) as Float32Array;
  const slope = async (i: number, h: number): Promise<number> => {
    const moved = tensor(
      [1, 2, 3, 4].map((v, j) => (i === j ? v + h : v)),
      [2, 2],
    );
    const value: Tensor = scope(() => {
      const y = rmsNormAdd(moved, w, scale(one, 2), { offset: 1 });
      return dot(y, y);
    });
    const read = await value.item();
    for (const t of [moved, value]) t.dispose();
    return read;
  };
  for (const [i, g] of gradient.entries()) expect(g).toBeCloseTo(((await slope(i, 1e-2)) - (await slope(i, -1e-2))) / 2e-2, 2);
  for (const t of [x, w, one, loss]) t.dispose();
});
