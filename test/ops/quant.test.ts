import { expect, test } from 'vitest';
import { dequantize, linearQuantized, quantizeFp8, quantizeQ4, quantizeQ8 } from '../../src/ops/quant.ts';
import { dot } from '../../src/ops/reduce.ts';
import { ShapeError } from '../../src/tensor/errors.ts';
import { scope } from '../../src/tensor/scope.ts';
import { valueAndGrad } from '../../src/tensor/tape.ts';
import { parameter, type Tensor, tensor, zeros } from '../../src/tensor/tensor.ts';
import { testDevice } from '../device.ts';
import { type Array64, array, bf16Bits, checkOp, fromBf16, type Input, linearReference, randomNumbers } from './check.ts';

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
  run: (x, w, bias) => scope(() => linearQuantized(x!, quantizeFp8(w!), bias)),
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
  // Tensor cores align the products of fp8 to the largest of them and keep some 14 bits.
  tolerance: testDevice === 'cuda' ? 1e-3 : 4e-6,
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
  const y: Tensor = scope(() => linearQuantized(x, quantizeFp8(w)));
  const [zero, tiny, last] = [...(await y.read())] as number[];
  expect([zero, tiny]).toEqual([0, 0]);
  expect(last).toBeCloseTo(-1, 6);
  for (const t of [w, x, y]) t.dispose();
});

test('what does not fit is refused', () => {
  scope(() => {
    const w = quantizeFp8(zeros([4, 3]));
    expect(() => linearQuantized(zeros([2, 2]), w)).toThrow(ShapeError);
    expect(() => linearQuantized(zeros([2, 3]), { ...w, scale: zeros([3]) })).toThrow(/scale has shape \[3\], expected \[4\]/);
    for (const quantize of [quantizeQ8, quantizeQ4]) {
      const blocks = quantize(zeros([4, 3]));
      expect(() => linearQuantized(zeros([2, 2]), blocks)).toThrow(/x has shape \[2 2\], expected \[\* 3\]/);
      expect(() => linearQuantized(zeros([2, 3]), { ...blocks, scale: zeros([4, 2], 'bf16') })).toThrow(ShapeError);
      expect(() => linearQuantized(zeros([2, 3]), { ...blocks, codes: zeros([4, 16], 'u8') })).toThrow(ShapeError);
      expect(() => quantize(zeros([4]))).toThrow(/expected \[n k\]/);
    }
  });
});

// ---- Blocks of 8 and 4 bits

/** The quantiles that QLoRA's 4 bits stand for, as its paper's appendix gives them. */
const nf4 = [
  -1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022833334,
  -0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
  0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1,
].map(Math.fround);

const toBf16 = (x: number): number => fromBf16(bf16Bits(x));

/** The codes of rows filled up to whole blocks, the scales, and the numbers that they stand for. */
function inBlocks(w: Array64, bits: 8 | 4): { codes: Float64Array; scales: Float64Array; values: Float64Array; shape: number[] } {
  const [n, k] = w.shape as [number, number];
  const block = bits === 8 ? 32 : 64;
  const blocks = Math.ceil(k / block);
  const [codes, scales, values] = [new Float64Array(n * blocks * block), new Float64Array(n * blocks), new Float64Array(n * k)];
  codes.fill(bits === 8 ? 0 : 7);
  for (let at = 0; at < n * blocks; at++) {
    const [row, first] = [Math.floor(at / blocks), (at % blocks) * block];
    const part = w.data.subarray(row * k + first, row * k + Math.min(k, first + block));
    const most = part.reduce((a, x) => Math.max(a, Math.abs(x)), 0); // NaN where one is
    const scale = Number.isFinite(most)
      ? toBf16(Math.max(bits === 8 ? Math.fround(most * Math.fround(1 / 127)) : most, 2 ** -100))
      : Number.NaN;
    scales[at] = scale;
    part.forEach((x, i) => {
      const share = Math.fround(x * Math.fround(1 / scale));
      const even = Math.round(share) - (Math.abs(share % 1) === 0.5 && Math.round(share) % 2 !== 0 ? 1 : 0);
      const code = bits === 8 ? Math.min(Math.max(even, -127), 127) : nearest(share);
      codes[at * block + i] = bits === 8 ? (code + 256) % 256 : code;
      values[row * k + first + i] = Math.fround((bits === 8 ? code : nf4[code]!) * scale);
    });
  }
  if (bits === 8) return { codes, scales, values, shape: [n, blocks * block] };
  const pairs = Float64Array.from({ length: codes.length / 2 }, (_, i) => codes[2 * i]! + 16 * codes[2 * i + 1]!);
  return { codes: pairs, scales, values, shape: [n, (blocks * block) / 2] };
}

function nearest(x: number): number {
  return nf4.slice(1).filter((value, i) => x > Math.fround(Math.fround(value + nf4[i]!) / 2)).length;
}

const formats = [
  { name: 'q8', bits: 8, quantize: quantizeQ8 },
  { name: 'q4', bits: 4, quantize: quantizeQ4 },
] as const;

for (const { name, bits, quantize } of formats) {
  checkOp({
    name: `quantize_${name}`,
    run: (w) => {
      const q = quantize(w!);
      return [dequantize(q), q.scale];
    },
    reference: (w) => {
      const { values, scales } = inBlocks(w!, bits);
      return [array(w!.shape, values), array([w!.shape[0]!, scales.length / Math.max(1, w!.shape[0]!)], scales)];
    },
    cases: [
      [3, 0],
      [1, 1],
      [3, 7],
      [5, 65],
      [2, 32],
      [2, 1025],
      [7, 128],
    ].flatMap((shape): Input[][] => [[{ shape }], [{ shape, dtype: 'bf16' }]]),
    gradient: false,
    tolerance: 1e-7,
  });

  // Sizes that end inside a block, a vector, a tile and a part of a product; one row and few take other ways than many.
  checkOp({
    name: `linear_${name}`,
    run: (x, bias) => scope(() => linearQuantized(x!, quantize(weightOf(bias!.shape[0]!, x!.shape.at(-1)!)), bias)),
    reference: (x, bias) => {
      const w = drawnWeight(bias!.shape[0]!, x!.shape.at(-1)!);
      return linearReference(x!, array(w.shape, inBlocks(w, bits).values), bias);
    },
    cases: [...sizes, { lead: [1], k: 1041, n: 70 }, { lead: [4], k: 200, n: 31 }, { lead: [17], k: 1041, n: 70 }].map(
      ({ lead, k, n }): Input[] => [{ shape: [...lead, k] }, { shape: [n] }],
    ),
    gradient: false,
    tolerance: 1e-5, // sums of up to 1041 products
    bf16Tolerance: 6e-2,
  });

  checkOp({
    name: `linear_${name} without a bias`,
    run: (x) => scope(() => linearQuantized(x!, quantize(weightOf(33, x!.shape.at(-1)!)))),
    reference: (x) => {
      const w = drawnWeight(33, x!.shape.at(-1)!);
      return linearReference(x!, array(w.shape, inBlocks(w, bits).values));
    },
    cases: [[], [1], [2, 3], [33]].flatMap((lead) => [1, 40, 65, 200].map((k): Input[] => [{ shape: [...lead, k] }])),
    tolerance: 4e-6,
    bf16Tolerance: 2e-2,
    bf16GradientTolerance: 2e-2,
  });

  test(`codes of ${name}, and what they take`, async () => {
    const w = tensor(Float32Array.from(drawnWeight(64, 256).data), [64, 256]);
    const q = scope(() => quantize(w));
    const [codes, expected] = [await q.codes.read(), inBlocks(drawnWeight(64, 256), bits)];
    expect([...q.codes.shape]).toEqual(expected.shape);
    expect([...codes]).toEqual([...expected.codes]);
    expect((q.codes.size + 2 * q.scale.size) / w.size).toBe(bits === 8 ? 1.0625 : 0.53125);
    for (const t of [w, q.codes, q.scale]) t.dispose();
  });
}

function drawnWeight(n: number, k: number): Array64 {
  const random = randomNumbers(n * 1000 + k);
  return array(
    [n, k],
    Float64Array.from({ length: n * k }, () => Math.fround(random() + random() + random() - 1.5)),
  );
}
const weightOf = (n: number, k: number): Tensor => tensor(Float32Array.from(drawnWeight(n, k).data), [n, k]);

test('the gradient of a product with fp8 takes the rounding of tokens for none', async () => {
  const w = drawnWeight(37, 29);
  const x = parameter(zeros([5, 29]));
  const dy = drawnWeight(5, 37);
  scope(() => {
    const q = quantizeFp8(tensor(Float32Array.from(w.data), [37, 29]));
    valueAndGrad(() => dot(linearQuantized(x, q), tensor(Float32Array.from(dy.data), [5, 37])));
  });
  const gradient = (await x.grad!.read()) as Float32Array;
  const { values } = quantized(w);
  for (let i = 0; i < 5; i++)
    for (let j = 0; j < 29; j++) {
      let sum = 0;
      for (let l = 0; l < 37; l++) sum += dy.data[i * 37 + l]! * values[l * 29 + j]!;
      expect(gradient[i * 29 + j]).toBeCloseTo(sum, 4);
    }
  x.dispose();
});

test('fp8 widened again', async () => {
  const w = drawnWeight(7, 65);
  const wide: Tensor = scope(() => dequantize(quantizeFp8(tensor(Float32Array.from(w.data), w.shape))));
  expect([...(await wide.read())]).toEqual([...Float32Array.from(quantized(w).values)]);
  wide.dispose();
});

test('4 bits are as good as their paper says: an error of 9 % of a normal weight, and 0.6 % with 8', async () => {
  const random = randomNumbers(5);
  const normal = (): number => Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());
  const data = Float32Array.from({ length: 64 * 512 }, normal);
  for (const { bits, quantize } of formats) {
    const wide: Tensor = scope(() => dequantize(quantize(tensor(data, [64, 512]))));
    const read = (await wide.read()) as Float32Array;
    wide.dispose();
    const error = Math.sqrt(read.reduce((s, v, i) => s + (v - data[i]!) ** 2, 0) / data.length);
    expect(error).toBeLessThan(bits === 8 ? 0.007 : 0.1);
    expect(error).toBeGreaterThan(bits === 8 ? 0.004 : 0.07);
  }
});
