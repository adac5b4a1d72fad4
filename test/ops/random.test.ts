import { expect, test } from 'vitest';
import { addNoise, randomNormal_ } from '../../src/ops/random.ts';
import { randomBlock, uniform } from '../../src/tensor/random.ts';
import { tensor } from '../../src/tensor/tensor.ts';
import { type Array64, bf16Bits, checkOp, computes, fromBf16 } from './check.ts';

/** The same by the same formula: pairs by Box and Muller, in float64. */
function normals(n: number, seed: number, stream: number, std: number): Float32Array {
  return Float32Array.from({ length: n }, (_, i) => {
    const block = randomBlock(seed, stream, Math.floor(i / 4));
    const pair = i & 2;
    const radius = Math.sqrt(-2 * Math.log((block[pair]! + 1) * 2 ** -32));
    const angle = 6.283185307179586 * block[pair + 1]! * 2 ** -32;
    return std * radius * (i % 2 === 0 ? Math.cos(angle) : Math.sin(angle));
  });
}

for (const dtype of computes) {
  test(`normal numbers are a function of seed, stream and index, in ${dtype}`, async () => {
    for (const n of [0, 1, 2, 3, 5, 4096, 4099]) {
      for (const [seed, stream] of [
        [1, 0],
        [2 ** 40 + 3, 2 ** 33 + 1],
      ] as const) {
        const y = dtype === 'f32' ? tensor(new Float32Array(n)) : tensor(new Uint16Array(n));
        randomNormal_(y, seed, stream, 0.5);
        const read = await y.read();
        const expected = normals(n, seed, stream, 0.5);
        // The last bit of log, cos and sin is the library's own, so one float beside the other is allowed.
        expected.forEach((e, i) => {
          const actual = dtype === 'f32' ? Number(read[i]) : fromBf16(Number(read[i]));
          const exact = dtype === 'f32' ? e : fromBf16(bf16Bits(e));
          if (Math.abs(actual - exact) > Math.abs(exact) * (dtype === 'f32' ? 2 ** -23 : 2 ** -7)) {
            expect.fail(`element ${i} of ${n} is ${actual}, expected ${exact}`);
          }
        });
        y.dispose();
      }
    }
  });
}

test('a part of the numbers does not depend on how many there are', async () => {
  const [few, many] = [tensor(new Float32Array(1001)), tensor(new Float32Array(20_000))];
  for (const y of [few, many]) randomNormal_(y, 7, 3, 1);
  const [a, b] = await Promise.all([few.read(), many.read()]);
  expect((b as Float32Array).slice(0, 1001)).toEqual(a);
  const all = b as Float32Array;
  const mean = all.reduce((s, x) => s + x, 0) / all.length;
  const square = all.reduce((s, x) => s + x * x, 0) / all.length;
  expect(Math.abs(mean)).toBeLessThan(0.03);
  expect(Math.abs(square - 1)).toBeLessThan(0.05);
  for (const t of [few, many]) t.dispose();
});

const sizeOfRow = (row: number) => Math.fround(0.1 * (row % 7));

/** Each element moved by up to its row's size. */
function moved(x: Array64): Array64 {
  const c = x.shape.at(-1)!;
  const block = new Uint32Array(4);
  const u = (i: number) => 2 * uniform(randomBlock(5, 2 ** 33 + 1, Math.floor(i / 4), block)[i % 4]!) - 1;
  return { shape: x.shape, data: x.data.map((v, i) => v + sizeOfRow(Math.floor(i / c)) * u(i)) };
}

checkOp({
  name: 'addNoise',
  run: (x) => {
    const lead = x!.shape.slice(0, -1);
    const rows = lead.reduce((n, d) => n * d, 1);
    return addNoise(
      x!,
      tensor(
        Float32Array.from({ length: rows }, (_, r) => sizeOfRow(r)),
        lead,
      ),
      5,
      2 ** 33 + 1,
    );
  },
  reference: (x) => moved(x!),
  cases: [
    [1, 1],
    [2, 3, 5],
    [0, 4],
    [3, 8],
    [7, 13],
    [700, 13],
  ].map((shape) => [{ shape }]),
});

test('seeds and streams that are none are refused by name', () => {
  using y = tensor(new Float32Array(4));
  using size = tensor(new Float32Array(1));
  using x = tensor(new Float32Array(4), [1, 4]);
  for (const wrong of [-1, 0.5, Number.NaN, 2 ** 53]) {
    for (const [argument, seed, stream] of [
      ['seed', wrong, 0],
      ['stream', 0, wrong],
    ] as const) {
      expect(() => randomNormal_(y, seed, stream, 1)).toThrow(expect.objectContaining({ code: 'ERR_SEED', argument }));
      expect(() => addNoise(x, size, seed, stream)).toThrow(expect.objectContaining({ code: 'ERR_SEED', argument }));
    }
  }
});
