import { totalmem } from 'node:os';
import { expect, test, vi } from 'vitest';
import { embedding } from '../../src/ops/embedding.ts';
import { type EngineOptions, init, memory, rehearse, shutdown, started, sync } from '../../src/tensor/engine.ts';
import { backendInfo } from '../../src/tensor/info.ts';
import { op } from '../../src/tensor/op.ts';
import { scope } from '../../src/tensor/scope.ts';
import { noGrad, recompute, valueAndGrad, zeroGrad } from '../../src/tensor/tape.ts';
import { empty, parameter, piecesOf, type Tensor, tensor, zeros } from '../../src/tensor/tensor.ts';

const add = op({ forward: 'add(a[*], b[*]) -> y[*]', backward: 'add_backward(dy[*]) -> da = dy, db = dy' });
const mul = op({ forward: 'mul(a[*], b[*]) -> y[*]', backward: 'mul_backward(dy[*], a[*], b[*]) -> da[*]+, db[*]+' });
const sum = op({ forward: 'sum(x[*]) -> y[]' });

test('elements go in and come out', async () => {
  using t = tensor([1, 2, 3, 4, 5, 6], [2, 3]);
  expect([...(await t.read())]).toEqual([1, 2, 3, 4, 5, 6]);
  expect(t.shape).toEqual([2, 3]);
});

test('large tensors pass in pieces, and those that no array can hold are refused by name', async () => {
  const size = 2 ** 24 + 5;
  const bytes = Buffer.alloc(
    size,
    Uint8Array.from({ length: 251 }, (_, i) => i),
  );
  using zero = zeros([size], 'u8');
  using ramp = tensor(bytes);
  let at = 3;
  for await (const piece of piecesOf(ramp, 3)) {
    expect(Buffer.compare(piece as Uint8Array, bytes.subarray(at, at + piece.length))).toBe(0);
    at += piece.length;
  }
  expect(at).toBe(size);
  expect(Buffer.compare((await zero.read()) as Uint8Array, Buffer.alloc(size))).toBe(0);
  expect(() => zeros([2, -1])).toThrow(expect.objectContaining({ code: 'ERR_SHAPE' }));
  await rehearse({ kind: 'cpu', flops: 1, fastFlops: 1, bandwidth: 1, memory: 1 }, async () => {
    using large = zeros([2 ** 33], 'u8');
    await expect(large.read()).rejects.toMatchObject({ code: 'ERR_SHAPE', expected: 'fewer than 2^32 elements' });
  });
});

test('a scope frees all but what it returns', () => {
  const before = memory().tensors;
  const kept = scope(() => {
    const a = tensor([1, 2]);
    return { b: [add(a, a)[0]!] };
  });
  expect(memory().tensors).toBe(before + 1);
  kept.b[0]!.dispose();
  expect(memory().tensors).toBe(before);
});

test('a freed tensor is refused by code, and a reused slot does not bring it back', () => {
  const a = tensor([1]);
  a.dispose();
  using b = tensor([2]);
  expect(() => add(a, b)).toThrow(expect.objectContaining({ code: 'ERR_TENSOR_DISPOSED', name: 'DisposedError' }));
});

test('shape and dtype errors name op, argument and sizes', () => {
  using a = tensor([1, 2, 3]);
  using b = tensor([1, 2]);
  using c = tensor(new Int32Array([1, 2, 3]));
  expect(() => add(a, b)).toThrow(
    expect.objectContaining({ name: 'ShapeError', op: 'add', argument: 'b', expected: '[3]', actual: '[2]' }),
  );
  expect(() => add(a, c)).toThrow(
    expect.objectContaining({ name: 'DTypeError', op: 'add', argument: 'b', expected: 'f32', actual: 'i32' }),
  );
  expect(() => add(a, undefined)).toThrow(expect.objectContaining({ code: 'ERR_MISSING_ARGUMENT' }));
});

test('signatures and shapes beyond what a call can carry are refused', () => {
  const dims = Array.from({ length: 40 }, (_, i) => `d${i}`).join(' ');
  expect(() => op({ forward: `copy(x[${dims}]) -> y[${dims}]` })(undefined)).toThrow(
    expect.objectContaining({ code: 'ERR_SIGNATURE' }),
  );
  using ids = tensor(new Int32Array(1), [1, 1, 1, 1, 1, 1]);
  using table = tensor([1, 2], [1, 2]);
  expect(() => embedding(ids, table)).toThrow(expect.objectContaining({ code: 'ERR_RANK', op: 'embedding', argument: 'y' }));
});

test('options of an engine that make no sense are refused before it starts', () => {
  shutdown();
  for (const [options, argument] of [
    [{ memoryLimit: -1 }, 'memoryLimit'],
    [{ memoryLimit: Number.NaN }, 'memoryLimit'],
    [{ threads: 1.5 }, 'threads'],
    [{ device: 'gpu' }, 'device'],
    [{ device: 'plan' }, 'device'],
  ] as const)
    expect(() => init(options as EngineOptions)).toThrow(expect.objectContaining({ name: 'ConfigError', argument }));
  expect(started()).toBe(false);
});

test('the default limit is the memory of the machine, or of the container where that is less', () => {
  for (const [allowed, limit] of [
    [2 ** 26, 2 ** 26],
    [2 ** 64, totalmem()],
    [0, totalmem()],
  ] as const) {
    const spy = vi.spyOn(process, 'constrainedMemory').mockReturnValue(allowed);
    try {
      shutdown();
      tensor([1], [1]).dispose();
      // Whole pages.
      expect(Math.abs(memory().limit - limit)).toBeLessThan(2 ** 22);
      expect(backendInfo().memory.total).toBe(limit);
    } finally {
      spy.mockRestore();
      shutdown();
    }
  }
});

test('no room is a typed error that leaves everything usable', async () => {
  using a = tensor([1]);
  expect(() => empty([1 << 20, 1 << 20])).toThrow(
    expect.objectContaining({ name: 'OutOfMemoryError', code: 'ERR_OUT_OF_MEMORY' }),
  );
  expect(await a.item()).toBe(1);
});

test('gradients add up over several uses, shared aliases and calls', async () => {
  using x = parameter(tensor([2, 3]));
  const f = (): Tensor => {
    const s = add(x, x)[0]!; // dx through two aliases of one gradient
    const p = mul(s, x)[0]!; // y = 2 x^2
    return total(add(p, s)[0]!); // sum(2 x^2 + 2 x): dx = 4 x + 2
  };
  valueAndGrad(f).dispose();
  expect([...(await x.grad!.read())]).toEqual([10, 14]);
  valueAndGrad(f).dispose();
  expect([...(await x.grad!.read())]).toEqual([20, 28]);
  zeroGrad([x]);
  expect(x.grad).toBeUndefined();
});

/** sum() with the gradient it has by hand: ones, from mul with a constant. */
function total(y: Tensor): Tensor {
  return dot(y, tensor(new Float32Array(y.size).fill(1), y.shape))[0]!;
}
const dot = op({ forward: 'dot(a[*], b[*]) -> y[]', backward: 'dot_backward(dy[], a[*], b[*]) -> da[*]+, db[*]+' });

test('recompute gives the same bits and frees what is inside', async () => {
  using w = parameter(tensor([0.3, -1.7, 2.2]));
  using x = parameter(tensor([1.1, 0.4, -0.9]));
  const block = (h: Tensor): Tensor => mul(mul(h, w)[0]!, add(h, w)[0]!)[0]!;
  const gradients: number[][] = [];
  for (const wrap of [block, (h: Tensor) => recompute(block, h)]) {
    zeroGrad([w, x]);
    valueAndGrad(() => total(wrap(wrap(x)))).dispose();
    gradients.push([...(await w.grad!.read()), ...(await x.grad!.read())]);
  }
  expect(gradients[1]).toEqual(gradients[0]);
  // Where no tape records, too: a frozen teacher's layers leave nothing behind.
  const before = memory().tensors;
  using y = noGrad(() => recompute(block, x));
  expect(memory().tensors).toBe(before + 1);
  expect(await y.read()).toHaveLength(3);
});

test('nothing is left after a backward pass, nor after one that fails', async () => {
  using x = parameter(tensor([1, 2]));
  using wrong = tensor([1, 2, 3]);
  const before = memory().tensors;
  valueAndGrad(() => total(mul(x, x)[0]!)).dispose();
  expect(memory().tensors).toBe(before + 1);
  zeroGrad([x]);
  expect(memory().tensors).toBe(before);
  expect(() => valueAndGrad(() => total(add(mul(x, x)[0]!, wrong)[0]!))).toThrow(expect.objectContaining({ name: 'ShapeError' }));
  expect(() => valueAndGrad(() => mul(x, x)[0]!)).toThrow(expect.objectContaining({ code: 'ERR_SHAPE', op: 'valueAndGrad' }));
  expect(() => valueAndGrad(() => sum(x)[0]!)).toThrow(expect.objectContaining({ code: 'ERR_NO_GRADIENT' }));
  expect(memory().tensors).toBe(before);
  using y = noGrad(() => sum(x)[0]!);
  expect(await y.item()).toBe(3);
});

test('an async scope is refused', () => {
  expect(() => scope(async () => {})).toThrow(expect.objectContaining({ code: 'ERR_ASYNC_SCOPE' }));
});

test('work after a fault is skipped until the fault was seen', async () => {
  const embedding = op({ forward: 'embedding(ids[*]:i32, table[v c]:float, scale) -> y[* c]' });
  using table = tensor([1, 2, 3, 4], [2, 2]);
  using good = tensor(new Int32Array([1]));
  using bad = tensor(new Int32Array([0, 7]));
  using y = embedding(bad, table, 1)[0]!;
  using z = add(y, y)[0]!;
  await expect(z.read()).rejects.toMatchObject({ name: 'DataError', code: 'ERR_TOKEN_RANGE' });
  using again = embedding(good, table, 1)[0]!;
  expect([...(await again.read())]).toEqual([3, 4]);
  await sync();
});
