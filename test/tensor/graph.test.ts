import { expect, test } from 'vitest';
import { add, mul, scale } from '../../src/ops/elementwise.ts';
import { linear } from '../../src/ops/linear.ts';
import { dot, sum } from '../../src/ops/reduce.ts';
import { memory, sync } from '../../src/tensor/engine.ts';
import { ConfigError, DisposedError } from '../../src/tensor/errors.ts';
import { graph } from '../../src/tensor/graph.ts';
import { scope } from '../../src/tensor/scope.ts';
import { valueAndGrad } from '../../src/tensor/tape.ts';
import { parameter, tensor, write } from '../../src/tensor/tensor.ts';

test('a graph runs again on what its tensors hold now', async () => {
  const x = tensor([1, 2, 3]);
  const twice = graph(() => {
    const three = tensor([3, 3, 3]);
    return sum(mul(scale(x, 2), three));
  });
  twice.replay();
  expect(await twice.result.item()).toBe(36);
  write(x, [1, 1, 1]);
  twice.replay();
  expect(await twice.result.item()).toBe(18);
  twice.result.dispose();
  twice.dispose();
  expect(() => twice.replay()).toThrow(DisposedError);
  x.dispose();
});

test('a graph holds forward and backward; other work between replays does not disturb it', async () => {
  const x = tensor(
    Float32Array.from({ length: 12 }, (_, i) => i / 7),
    [4, 3],
  );
  const w = parameter(
    tensor(
      Float32Array.from({ length: 6 }, (_, i) => 1 - i / 3),
      [2, 3],
    ),
  );
  const step = () => valueAndGrad(() => dot(linear(x, w), linear(x, w)));
  const direct = step();
  const expected = [await direct.item(), ...(await w.grad!.read())];
  w.sink!.written = false;
  const recorded = graph(step);
  for (let k = 0; k < 3; k++) {
    const noise = Array.from({ length: 20 }, () => scope(() => add(x, x)));
    recorded.replay();
    expect([await recorded.result.item(), ...(await w.grad!.read())]).toEqual(expected);
    for (const t of noise) t.dispose();
  }
  for (const t of [x, w, direct, recorded.result]) t.dispose();
  recorded.dispose();
});

test('a tensor that a graph uses lives as long as the graph; its memory comes back after', async () => {
  const before = memory().live;
  const x = tensor(new Float32Array(1000).fill(2));
  const g = graph(() => sum(add(x, x)));
  x.dispose();
  const other = tensor(new Float32Array(1000).fill(9));
  g.replay();
  expect(await g.result.item()).toBe(4000);
  other.dispose();
  g.dispose();
  expect(memory().live).toBeGreaterThan(before); // the result lies in the graph's memory
  g.result.dispose();
  await sync();
  expect(memory().live).toBe(before);
});

test('reading while a graph is recorded is refused, and leaves the engine as it was', async () => {
  const x = tensor([1, 2]);
  let read: Promise<unknown> | undefined;
  const g = graph(() => {
    read = x.read();
    read.catch(() => {});
    return sum(x);
  });
  await expect(read).rejects.toThrow(ConfigError);
  await expect(read).rejects.toMatchObject({ code: 'ERR_GRAPH_READ' });
  g.replay();
  expect(await g.result.item()).toBe(3);
  expect(() =>
    graph(() => {
      throw new Error('mine');
    }),
  ).toThrow('mine');
  const after = sum(x);
  expect(await after.item()).toBe(3);
  after.dispose();
  g.result.dispose();
  g.dispose();
  x.dispose();
});
