import { expect, test } from 'vitest';
import { topOf } from '../../src/models/sampling.ts';
import { topLogits } from '../../src/ops/sample.ts';
import { scope } from '../../src/tensor/scope.ts';
import { readAs, tensor } from '../../src/tensor/tensor.ts';
import { testDevice } from '../device.ts';
import { randomNumbers } from './check.ts';

const onCpu = testDevice === 'cpu';

async function topsOf(x: Float32Array[], temperature: number[], k: number, n: number) {
  const { values, ids, sums } = scope(() =>
    topLogits(tensor(Float32Array.from(x.flatMap((row) => [...row])), [x.length, x[0]!.length]), tensor(temperature), k, n),
  );
  const read = { values: await readAs(values, 'f32'), ids: await readAs(ids, 'i32'), sums: await readAs(sums, 'f32') };
  for (const t of [values, ids, sums]) t.dispose();
  return read;
}

test.runIf(onCpu)('the largest logits and their sums, for sizes around vectors and blocks', async () => {
  const random = randomNumbers(1);
  for (const size of [1, 2, 15, 16, 17, 127, 128, 129, 257, 5003]) {
    for (const k of [1, 3, 64]) {
      for (const n of new Set([size, Math.ceil(size * 0.7)])) {
        // Few values, so that there are ties.
        const x = [0, 1, 2].map(() => Float32Array.from({ length: size }, () => Math.round((random() - 0.5) * 40) / 4));
        const temperature = [1, 0.5, 2];
        const got = await topsOf(x, temperature, k, n);
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

test.runIf(onCpu)('a row with a NaN is told by its sums', async () => {
  for (const at of [0, 40, 299]) {
    const row = new Float32Array(300);
    row[at] = Number.NaN;
    expect((await topsOf([row], [1], 2, 300)).sums[0]).toBeNaN();
  }
});

test.runIf(onCpu)('refuses a k or n out of range', () => {
  scope(() => {
    const [x, t] = [tensor(new Float32Array(6), [2, 3]), tensor([1, 1])];
    expect(() => topLogits(x, t, 0)).toThrow(/k is 0/);
    expect(() => topLogits(x, t, 1, 4)).toThrow(/n is 4, expected a whole number from 1 to 3/);
  });
});
