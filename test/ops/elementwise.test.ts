import { expect, test } from 'vitest';
import { add, add_, cast, copy, copy_, fill_, mul, scale, softcap, sub } from '../../src/ops/elementwise.ts';
import { sum } from '../../src/ops/reduce.ts';
import { ConfigError, DTypeError, LimbeckError, ShapeError } from '../../src/tensor/errors.ts';
import { scope } from '../../src/tensor/scope.ts';
import { valueAndGrad } from '../../src/tensor/tape.ts';
import { parameter, tensor } from '../../src/tensor/tensor.ts';
import { bf16Bits, checkOp, elementwise, fromBf16, same } from './check.ts';

checkOp({ name: 'add', run: (a, b) => add(a!, b!), reference: elementwise((a, b) => a + b), cases: same(2) });
checkOp({ name: 'sub', run: (a, b) => sub(a!, b!), reference: elementwise((a, b) => a - b), cases: same(2) });
checkOp({ name: 'mul', run: (a, b) => mul(a!, b!), reference: elementwise((a, b) => a * b), cases: same(2) });
checkOp({ name: 'mul of a tensor with itself', run: (x) => mul(x!, x!), reference: elementwise((x) => x * x), cases: same(1) });
checkOp({ name: 'sub of a tensor from itself', run: (x) => sub(x!, x!), reference: elementwise((x) => x - x), cases: same(1) });
checkOp({ name: 'scale', run: (x) => scale(x!, -2.5), reference: elementwise((x) => -2.5 * x), cases: same(1) });
checkOp({ name: 'copy', run: (x) => copy(x!), reference: elementwise((x) => x), cases: same(1) });
checkOp({
  name: 'softcap',
  run: (x) => softcap(x!, 1.5),
  reference: elementwise((x) => 1.5 * Math.tanh(x / 1.5)),
  cases: same(1),
});
checkOp({
  name: 'cast of bf16 to f32',
  run: (x) => cast(x!, 'f32'),
  reference: elementwise((x) => x),
  cases: [[{ shape: [], dtype: 'bf16' }], [{ shape: [0], dtype: 'bf16' }], [{ shape: [3, 17], dtype: 'bf16' }]],
});

test.each([
  [50, [10, 50, 100], [9.86876601, 38.0797078, 48.201379]],
  [30, [10, 30, 60], [9.64538213, 22.84782468, 28.9208274]],
])('softcap at %i gives the golden vectors', async (cap, x, expected) => {
  const y = scope(() => softcap(tensor(x), cap));
  (await y.read()).forEach((v, i) => {
    expect(Math.abs(v / expected[i]! - 1)).toBeLessThan(5e-7);
  });
  y.dispose();
});

test('softcap never exceeds its cap, and keeps small values', async () => {
  const y = scope(() => softcap(tensor([-1e30, -1e3, 1e-20, 1e3, Number.POSITIVE_INFINITY]), 30));
  const v = await y.read();
  for (const [i, end] of [-30, -30, undefined, 30, 30].entries()) {
    if (end === undefined) continue;
    expect(v[i]! / end).toBeLessThanOrEqual(1);
    expect(v[i]! / end).toBeGreaterThan(1 - 5e-7);
  }
  expect(v[2]! / 1e-20).toBeCloseTo(1, 5);
  y.dispose();
});

test.each([0, -1, Number.NaN, Number.POSITIVE_INFINITY])('softcap refuses a cap of %d', (cap) => {
  scope(() => expect(() => softcap(tensor([1]), cap)).toThrow(ConfigError));
});

test('cast to bf16 rounds to nearest, ties to even', async () => {
  const view = new Float32Array(1);
  const ofBits = (b: number): number => {
    new Uint32Array(view.buffer)[0] = b;
    return view[0]!;
  };
  // Ties above even and odd, one ulp beside them, carries into the exponent and to infinity, denormals, zeros.
  const edges = [
    0x3f808000, 0x3f818000, 0x3f807fff, 0x3f808001, 0x3fffffff, 0x7f7fffff, 0x00000001, 0x00008000, 0x00018000, 0x80000000,
    0xbf818000,
  ];
  const x = [...edges.map(ofBits), 0, Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY, Number.NaN, Math.PI, -1 / 3];
  const [h, back] = scope(() => {
    const y = cast(tensor(x), 'bf16');
    return [y, cast(y, 'f32')] as const;
  });
  const rounded = await h.read();
  expect(Array.from(rounded, fromBf16)).toEqual(x.map((v) => fromBf16(bf16Bits(v))));
  expect(Array.from(await back.read())).toEqual(Array.from(rounded, fromBf16));
  expect(rounded[5]).toBe(0x7f80);
  h.dispose();
  back.dispose();
});

test('cast converts between f32 and bf16 only', () => {
  scope(() => {
    expect(() => cast(tensor([1]), 'i32')).toThrow(DTypeError);
    expect(() => cast(tensor(Int32Array.of(1)), 'f32')).toThrow(DTypeError);
  });
});

test('in place: fill_, copy_, add_', async () => {
  const n = 16_385 + 3;
  const x = tensor(Float32Array.from({ length: n }, (_, i) => i));
  const y = tensor(new Float32Array(n));
  fill_(y, 2);
  add_(y, x);
  add_(y, x);
  expect(await y.read()).toEqual(Float32Array.from({ length: n }, (_, i) => 2 + 2 * i));
  copy_(y, x);
  expect(await y.read()).toEqual(await x.read());
  expect(() => scope(() => add_(y, tensor([1])))).toThrow(ShapeError);
  x.dispose();
  y.dispose();
});

test('what overwrites has no gradient, and says so', () => {
  const x = parameter(tensor([1, 2]));
  const y = tensor([1, 2]);
  try {
    valueAndGrad(() => {
      add_(y, x);
      return sum(y);
    });
    expect.unreachable();
  } catch (error) {
    expect(LimbeckError.is(error) && error.code).toBe('ERR_NO_GRADIENT');
  }
  x.dispose();
  y.dispose();
});

test('copy_ and fill_ between f32 and bf16', async () => {
  const x = [1, -2.7, Math.PI, 1e-30, 65_504, 0.1, -0, 7, 1 / 3];
  const [wide, narrow] = [tensor(x), tensor(new Uint16Array(x.length))];
  copy_(narrow, wide);
  expect([...(await narrow.read())]).toEqual(Array.from(Float32Array.from(x), bf16Bits));
  fill_(wide, 0);
  copy_(wide, narrow);
  expect([...(await wide.read())]).toEqual(x.map((v) => fromBf16(bf16Bits(v))));
  fill_(narrow, -2.7);
  expect(new Set(await narrow.read())).toEqual(new Set([bf16Bits(-2.7)]));
  for (const t of [wide, narrow]) t.dispose();
});
