// Sequences of several tiles, on both generations of tensor cores, against the CPU: pipelines come round, masks have middles.
import { afterAll, expect, test } from 'vitest';
import { attention } from '../../src/ops/attention.ts';
import { cast } from '../../src/ops/elementwise.ts';
import { dot } from '../../src/ops/reduce.ts';
import { type Device, init, shutdown, withDevice } from '../../src/tensor/engine.ts';
import { scope } from '../../src/tensor/scope.ts';
import { valueAndGrad } from '../../src/tensor/tape.ts';
import { parameter, type Tensor, tensor } from '../../src/tensor/tensor.ts';
import { testDevice } from '../device.ts';
import { bf16Bits, fromBf16, randomNumbers } from '../ops/check.ts';

afterAll(shutdown);

const [B, T, H, G] = [1, 300, 2, 1];
// A scale of 3: scores of every size up to the cap, so that each way of making weights of them is taken.
const cases = [
  [64, null, 50, 3],
  [128, 170, 50, 128 ** -0.5],
  [128, null, null, 128 ** -0.5],
  [256, 150, 50, 256 ** -0.5],
] as const;
const architectures = testDevice === 'emulated' ? ['80', '90'] : [''];

async function run(device: Device, d: number, window: number | null, cap: number | null, scale: number) {
  const random = randomNumbers(d);
  const draw = (heads: number) =>
    Float32Array.from({ length: B * T * heads * d }, () => fromBf16(bf16Bits(2 * random() - 1 + (2 * random() - 1))));
  const arrays = [draw(H), draw(G), draw(G), draw(H)];
  const made = (data: Float32Array, heads: number): Tensor =>
    scope(() => {
      const wide = tensor(data, [B, T, heads, d]);
      return device === 'cpu' ? wide : cast(wide, 'bf16');
    });
  return withDevice(device, () => {
    const [q, k, v, dy] = arrays.map((data, i) => made(data, i === 0 || i === 3 ? H : G)) as [Tensor, Tensor, Tensor, Tensor];
    const starts = tensor(
      Int32Array.from({ length: B * T }, (_, i) => (i < 90 ? 0 : 90)),
      [B, T],
    );
    for (const t of [q, k, v]) parameter(t);
    valueAndGrad(() => dot(attention(q, k, v, { window, cap, scale, starts }), dy)).dispose();
    const again = scope(() => cast(attention(q, k, v, { window, cap, scale, starts }), 'f32'));
    const read = Promise.all([again.read(), ...[q, k, v].map((t) => t.grad!.read())]);
    return read.then((all) => {
      for (const t of [q, k, v, dy, starts, again]) t.dispose();
      return all as Float32Array[];
    });
  });
}

const norm = (x: Float32Array): number => Math.sqrt(x.reduce((s, v) => s + v * v, 0));

for (const architecture of architectures) {
  test.each(cases)(
    `compute capability ${architecture || 'here'}: heads of %i, window %s, cap %s`,
    async (d, window, cap, scale) => {
      shutdown();
      if (architecture !== '') process.env.LIMBECK_EMULATE_ARCHITECTURE = architecture;
      init({ device: 'cuda' });
      delete process.env.LIMBECK_EMULATE_ARCHITECTURE;
      const expected = await run('cpu', d, window, cap, scale);
      const actual = await run('cuda', d, window, cap, scale);
      for (const [i, name] of ['y', 'dq', 'dk', 'dv'].entries()) {
        const off = norm(actual[i]!.map((x, j) => x - expected[i]![j]!)) / norm(expected[i]!);
        expect(off, name).toBeLessThan(0.012);
      }
      const same = await run('cuda', d, window, cap, scale);
      expect(same).toEqual(actual);
    },
  );
}
