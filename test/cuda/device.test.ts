// What a device that is not the CPU must get right around its kernels: two devices at once, faults that it finds itself, memory.
import { afterAll, expect, test } from 'vitest';
import { add, cast, mul } from '../../src/ops/elementwise.ts';
import { embedding } from '../../src/ops/embedding.ts';
import { linearCrossEntropy } from '../../src/ops/loss.ts';
import { dot, sum } from '../../src/ops/reduce.ts';
import { currentDevice, memory, shutdown, withDevice } from '../../src/tensor/engine.ts';
import { DataError, DeviceError, DTypeError, OutOfMemoryError } from '../../src/tensor/errors.ts';
import { scope } from '../../src/tensor/scope.ts';
import { valueAndGrad } from '../../src/tensor/tape.ts';
import { empty, parameter, tensor, toDevice } from '../../src/tensor/tensor.ts';

afterAll(shutdown);

test('tensors are made on the device that init named; an op runs where its tensors are', async () => {
  expect(currentDevice()).toBe('cuda');
  using here = tensor([1, 2, 3]);
  using there = withDevice('cpu', () => tensor([1, 2, 3]));
  expect([here.device, there.device]).toEqual(['cuda', 'cpu']);
  using twice = add(there, there);
  expect(twice.device).toBe('cpu');
  expect([...(await twice.read())]).toEqual([2, 4, 6]);
  using moved = await toDevice(twice, 'cuda');
  expect(moved.device).toBe('cuda');
  expect([...(await moved.read())]).toEqual([2, 4, 6]);
});

test('tensors of two devices in one op are refused, and nothing is lost', async () => {
  using here = tensor([1, 2, 3]);
  using there = withDevice('cpu', () => tensor([1, 2, 3]));
  expect(() => add(here, there)).toThrow(DeviceError);
  expect(() => add(here, there)).toThrow(/two devices, cuda and cpu; move one with toDevice/);
  expect([...(await here.read())]).toEqual([1, 2, 3]);
});

test('one op computes in one dtype', () => {
  scope(() => {
    const [narrow, wide] = [cast(tensor([1, 2]), 'bf16'), tensor([1, 2])];
    expect(() => add(narrow, wide)).toThrow(DTypeError);
    expect(() => add(narrow, wide)).toThrow(/b is f32, expected bf16; convert it with cast\(\)/);
  });
});

test('a token outside the table is the next read’s error, with its place, and the engine goes on', async () => {
  using table = tensor(new Float32Array(8), [4, 2]);
  using ids = tensor(Int32Array.of(1, 3, 9, 0, 7));
  using y = embedding(ids, table);
  const failed = y.read();
  await expect(failed).rejects.toThrow(DataError);
  await expect(failed).rejects.toThrow(/token id 9 at position 2 is outside the table of 4 rows/);
  using x = tensor([1, 2]);
  using total = sum(x);
  expect(await total.item()).toBe(3);
});

test('a target outside the vocabulary too', async () => {
  const { total } = scope(() => {
    const x = cast(tensor(new Float32Array(16), [2, 8]), 'bf16');
    const w = cast(tensor(new Float32Array(32), [4, 8]), 'bf16');
    return { total: linearCrossEntropy(x, w, tensor(Int32Array.of(1, 77))).total };
  });
  await expect(total.read()).rejects.toThrow(/targets has token 77 at position 1/);
  total.dispose();
});

test('gradients of bf16 parameters are f32, also where an op makes them in bf16', async () => {
  const drawn = (shape: number[], f: (i: number) => number) =>
    scope(() =>
      cast(
        tensor(
          Float32Array.from({ length: shape[0]! * shape[1]! }, (_, i) => f(i)),
          shape,
        ),
        'bf16',
      ),
    );
  const [x, w] = [drawn([2, 8], Math.sin), drawn([4, 8], Math.cos)];
  for (const t of [x, w]) parameter(t);
  const both = [];
  for (let i = 0; i < 2; i++) {
    const targets = tensor(Int32Array.of(1, 2));
    valueAndGrad(() => linearCrossEntropy(x, w, targets).total).dispose();
    targets.dispose();
    expect([x.grad!.dtype, w.grad!.dtype]).toEqual(['f32', 'f32']);
    both.push((await x.grad!.read()) as Float32Array);
  }
  const [once, twice] = both as [Float32Array, Float32Array];
  for (const [i, g] of once.entries()) expect(twice[i]).toBeCloseTo(2 * g, 6);
  valueAndGrad(() => dot(mul(x, x), x)).dispose();
  for (const t of [x, w]) t.dispose();
});

test('memory that is not there is an error at the call; what there was stays', async () => {
  using x = tensor([1, 2, 3]);
  const { limit, live } = memory();
  expect(() => empty([limit])).toThrow(OutOfMemoryError);
  expect(() => empty([limit])).toThrow(/no room for .* on the cuda; .* are in use\. Use a smaller batch/);
  expect(memory().live).toBe(live);
  expect([...(await x.read())]).toEqual([1, 2, 3]);
});
