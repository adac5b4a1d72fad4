import { expect, test } from 'vitest';
import { linearFp8, quantizeFp8 } from '../../src/ops/quant.ts';
import { LimbeckError, ShapeError } from '../../src/tensor/errors.ts';
import { scope } from '../../src/tensor/scope.ts';
import { valueAndGrad } from '../../src/tensor/tape.ts';
import { parameter, type Tensor, tensor, zeros } from '../../src/tensor/tensor.ts';
import { type Array64, array, checkOp, type Input, linearReference, randomNumbers } from './check.ts';

/** The value of an e4m3 code, from the definition of the format. */
function numberOf(code: number): number {
  const [exponent, fraction] = [(code >> 3) & 15, code & 7];
  if ((code & 127) === 127) return Number.NaN;
  const magnitude = exponent === 0 ? fraction * 2 ** -9 : (1 + fraction / 8) * 2 ** (exponent - 7);
  return code & 128 ? -magnitude : magnitude;
}

/** To the nearest code by search, ties to the even one; saturating. */
function codeOf(x: number): number {
  const sign = x < 0 || Object.is(x, -0) ? 128 : 0;
  if (Number.isNaN(x)) return sign | 127;
  let best = 0;
  for (let code = 1; code < 127; code++) {
    const [nearer, old] = [Math.abs(numberOf(code) - Math.abs(x)), Math.abs(numberOf(best) - Math.abs(x))];
    if (nearer < old || (nearer === old && code % 2 === 0)) best = code;
  }
  return sign | best;
}

const scaleOf = (row: Float64Array): number => {
  const largest = row.reduce((a, x) => (Number.isNaN(x) ? a : Math.max(a, Math.abs(x))), 0);
  return Math.max(Math.fround(largest / 448), 2 ** -100);
};

/** Codes and scale of each row, with the kernel's float32 arithmetic. */
function quantized(w: Array64): { codes: Float64Array; scale: Float64Array; values: Float64Array } {
  const k = w.shape.at(-1)!;
  const rows = k === 0 ? w.shape.slice(0, -1).reduce((a, b) => a * b, 1) : w.data.length / k;
  const scale = Float64Array.from({ length: rows }, (_, i) => scaleOf(w.data.subarray(i * k, i * k + k)));
  const codes = w.data.map((x, i) => codeOf(Math.fround(x * Math.fround(1 / scale[Math.floor(i / k)]!))));
  return { codes, scale, values: codes.map((code, i) => numberOf(code) * scale[Math.floor(i / k)]!) };
}

const sizes = [
  { lead: [0], k: 3, n: 2 },
  { lead: [1], k: 1, n: 1 },
  { lead: [], k: 7, n: 5 },
  { lead: [1], k: 65, n: 33 },
  { lead: [2, 7], k: 17, n: 13 },
  { lead: [33], k: 64, n: 48 },
  { lead: [5], k: 16, n: 129 },
];

checkOp({
  name: 'quantize_fp8',
  run: (w) => {
    const { codes, scale } = quantizeFp8(w!);
    return [codes, scale];
  },
  reference: (w) => {
    const { codes, scale } = quantized(w!);
    return [array(w!.shape, codes), array([w!.shape[0]!], scale)];
  },
  cases: [
    [0, 4],
    [3, 0],
    [1, 1],
    [3, 7],
    [5, 65],
    [2, 1025],
  ].flatMap((shape): Input[][] => [[{ shape }], [{ shape, dtype: 'bf16' }]]),
  gradient: false,
  tolerance: 1e-7,
});

checkOp({
  name: 'linear_fp8',
  run: (x, w, bias) => scope(() => linearFp8(x!, quantizeFp8(w!), bias)),
  reference: (x, w, bias) => {
    const rounded = (a: Array64): Array64 => array(a.shape, quantized(a).values);
    return linearReference(rounded(x!), rounded(w!), bias);
  },
  cases: sizes.map(({ lead, k, n }, i): Input[] => [
    { shape: [...lead, k] },
    { shape: [n, k], dtype: i % 2 === 0 ? 'f32' : 'bf16' },
    // Sizes that fp8 instructions take, 64 and 48, come without: they add no bias to float32.
    ...(i % 2 === 0 ? [{ shape: [n] }] : []),
  ]),
  gradient: false,
  tolerance: 4e-6,
});

/** Rows whose scale is 1: the codes are those of the numbers themselves. */
async function codesOf(numbers: readonly number[]): Promise<number[]> {
  const w = tensor(Float32Array.from([...numbers, 448]), [1, numbers.length + 1]);
  const { codes, scale } = scope(() => quantizeFp8(w));
  const read = [...(await codes.read())] as number[];
  expect((await scale.read())[0]).toBe(1);
  for (const t of [w, codes, scale]) t.dispose();
  return read.slice(0, -1);
}

test('every code is the code of its value', async () => {
  const codes = Array.from({ length: 256 }, (_, i) => i).filter((code) => (code & 127) !== 127);
  expect(await codesOf(codes.map(numberOf))).toEqual(codes);
});

test('between two values the nearest is taken, at the middle the even code', async () => {
  const below = Array.from({ length: 126 }, (_, i) => i);
  const middle = below.map((code) => (numberOf(code) + numberOf(code + 1)) / 2);
  const near = (x: number, by: number): number => Math.fround(x * (1 + by));
  expect(await codesOf(middle)).toEqual(below.map((code) => code + (code % 2)));
  expect(await codesOf(middle.map((x) => near(x, -2e-7)))).toEqual(below);
  expect(await codesOf(middle.map((x) => near(x, 2e-7)))).toEqual(below.map((code) => code + 1));
  expect(await codesOf([-0, 1e-30, -1e-30])).toEqual([128, 0, 128]);
});

test('an element is off by 1/16 of itself, or by 2^-18 of the largest of its row', async () => {
  const random = randomNumbers(7);
  const row = Float32Array.from({ length: 5000 }, () => (random() - 0.5) * 2 ** (-24 * random()));
  const largest = row.reduce((a, x) => Math.max(a, Math.abs(x)), 0);
  const w = tensor(row, [1, row.length]);
  const q = scope(() => quantizeFp8(w));
  const [codes, [scale]] = [(await q.codes.read()) as Uint8Array, await q.scale.read()];
  for (const t of [w, q.codes, q.scale]) t.dispose();
  row.forEach((x, i) => {
    const error = Math.abs(numberOf(codes[i]!) * (scale as number) - x);
    expect(error).toBeLessThanOrEqual(1.0001 * Math.max(Math.abs(x) / 16, largest / 448 / 1024));
  });
});

test('rows of zeros and of tiny numbers', async () => {
  const w = tensor(Float32Array.from([0, 0, 1e-40, -1e-40, 1, -2]), [3, 2]);
  const x = tensor([1, 1]);
  const y: Tensor = scope(() => linearFp8(x, quantizeFp8(w)));
  const [zero, tiny, last] = [...(await y.read())] as number[];
  expect([zero, tiny]).toEqual([0, 0]);
  expect(last).toBeCloseTo(-1, 6);
  for (const t of [w, x, y]) t.dispose();
});

test('what does not fit is refused', () => {
  scope(() => {
    const w = quantizeFp8(zeros([4, 3]));
    expect(() => linearFp8(zeros([2, 2]), w)).toThrow(ShapeError);
    expect(() => linearFp8(zeros([2, 3]), { ...w, scale: zeros([3]) })).toThrow(/scale has shape \[3\], expected \[4\]/);
    const x = parameter(zeros([2, 3]));
    expect(() => valueAndGrad(() => linearFp8(x, w))).toThrow(LimbeckError);
  });
});
