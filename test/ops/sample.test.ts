import { expect, test } from 'vitest';
import { topOf } from '../../src/models/sampling.ts';
import { cast } from '../../src/ops/elementwise.ts';
import { topLogits } from '../../src/ops/sample.ts';
import { scope } from '../../src/tensor/scope.ts';
import { readAs, tensor } from '../../src/tensor/tensor.ts';
import { type Compute, computes, randomNumbers } from './check.ts';

async function topsOf(x: Float32Array[], temperature: number[], k: number, n: number, compute: Compute = 'f32') {
  const { values, ids, sums } = scope(() => {
    const wide = tensor(Float32Array.from(x.flatMap((row) => [...row])), [x.length, x[0]!.length]);
    return topLogits(compute === 'f32' ? wide : cast(wide, compute), tensor(temperature), k, n);
  });
  const read = { values: await readAs(values, 'f32'), ids: await readAs(ids, 'i32'), sums: await readAs(sums, 'f32') };
  for (const t of [values, ids, sums]) t.dispose();
  return read;
}

for (const compute of computes) {
  // Sizes around vectors, blocks and a GPU's chunks of 8192; a k that is more than a chunk, or than the second of them, has.
  test(`the largest logits and their sums, ${compute}`, async () => {
    const random = randomNumbers(1);
    const sizes: [size: number, ...k: number[]][] = [1, 2, 15, 16, 17, 127, 128, 129, 257, 5003].map((size) => [size, 1, 3, 64]);
    sizes.push([8193, 64], [17_000, 70]);
    for (const [size, ...counts] of sizes) {
      for (const k of counts) {
        for (const n of new Set([size, Math.ceil(size * 0.7)])) {
          // Few values, so that there are ties.
          const x = [0, 1, 2].map(() => Float32Array.from({ length: size }, () => Math.round((random() - 0.5) * 40) / 4));
          const temperature = [1, 0.5, 2];
          const got = await topsOf(x, temperature, k, n, compute);
          for (const [i, row] of x.entries()) {
            const want = topOf(row.subarray(0, n), k, temperature[i]!);
            const known = Math.min(k, n);
            expect([...got.ids.subarray(i * k, i * k + known)]).toEqual([...(want.ids as Int32Array)]);
            expect([...got.values.subarray(i * k, i * k + known)]).toEqual([...(want.values as Float64Array)]);
            expect(got.ids.subarray(i * k + known, (i + 1) * k).every((id) => id === -1)).toBe(true);
            expect(Math.abs(got.sums[2 * i]! / want.sum - 1)).toBeLessThan(1e-5);
            expect(Math.abs(got.sums[2 * i + 1]! / want.tempered - 1)).toBeLessThan(1e-5);
          }
        }
      }
    }
  });

  test(`the largest logits in any order, ${compute}`, async () => {
    const size = 9001;
    const up = Float32Array.from({ length: size }, (_, i) => Math.floor(i / 36));
    const spread = Float32Array.from({ length: size }, (_, i) => 1e4 * Math.sin(i));
    for (const row of [up, up.toReversed(), up.map((z) => -z), new Float32Array(size), spread.fill(-Infinity, 100, 8950)]) {
      const rounded = scope(() => cast(cast(tensor(row), compute), 'f32'));
      const exact = await readAs(rounded, 'f32');
      rounded.dispose();
      const got = await topsOf([row], [1], 70, size, compute);
      const want = topOf(exact, 70, 1);
      expect([...got.ids]).toEqual([...(want.ids as Int32Array)]);
      expect(Math.abs(got.sums[0]! / want.sum - 1)).toBeLessThan(1e-5);
    }
  });
}

test('more logits than a chunk of a GPU has, in order', async () => {
  const row = Float32Array.from({ length: 8250 }, (_, i) => Math.sin(i * i));
  const got = await topsOf([row], [1], 8230, 8240);
  expect([...got.ids]).toEqual([...(topOf(row.subarray(0, 8240), 8230, 1).ids as Int32Array)]);
});

test('a row with a NaN is told by its sums', async () => {
  for (const at of [0, 40, 299]) {
    const row = new Float32Array(300);
    row[at] = Number.NaN;
    expect((await topsOf([row], [1], 2, 300)).sums[0]).toBeNaN();
  }
});

test('refuses a k or n out of range', () => {
  scope(() => {
    const [x, t] = [tensor(new Float32Array(6), [2, 3]), tensor([1, 1])];
    expect(() => topLogits(x, t, 0)).toThrow(/k is 0/);
    expect(() => topLogits(x, t, 1, 4)).toThrow(/n is 4, expected a whole number from 1 to 3/);
  });
});
