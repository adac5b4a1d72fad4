import { expect, test } from 'vitest';
import { geglu, gelu, silu, swiglu } from '../../src/ops/activation.ts';
import { sum } from '../../src/ops/reduce.ts';
import { ShapeError } from '../../src/tensor/errors.ts';
import { scope } from '../../src/tensor/scope.ts';
import { valueAndGrad } from '../../src/tensor/tape.ts';
import { parameter, tensor } from '../../src/tensor/tensor.ts';
import { checkOp, elementwise, same } from './check.ts';

const gelu64 = (x: number): number => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)));
const silu64 = (x: number): number => x / (1 + Math.exp(-x));

checkOp({ name: 'gelu', run: (x) => gelu(x!), reference: elementwise(gelu64), cases: same(1) });
checkOp({ name: 'silu', run: (x) => silu(x!), reference: elementwise(silu64), cases: same(1) });
checkOp({ name: 'geglu', run: (gate, up) => geglu(gate!, up!), reference: elementwise((g, u) => gelu64(g) * u), cases: same(2) });
checkOp({
  name: 'swiglu',
  run: (gate, up) => swiglu(gate!, up!),
  reference: elementwise((g, u) => silu64(g) * u),
  cases: same(2),
});

test('gelu and its slope give the golden vectors', async () => {
  const x = parameter(tensor([-2, -0.5, 0, 1, 3]));
  const y = gelu(x);
  valueAndGrad(() => sum(gelu(x))).dispose();
  const value = await y.read();
  const slope = await x.grad!.read();
  [-0.04540231, -0.15428599, 0, 0.84119199, 2.99636261].forEach((e, i) => {
    expect(value[i]).toBeCloseTo(e, 6);
  });
  [-0.08609926, 0.1326301, 0.5, 1.08296408, 1.01158417].forEach((e, i) => {
    expect(slope[i]).toBeCloseTo(e, 6);
  });
  x.dispose();
  y.dispose();
});

test('far from zero they saturate without overflow, value and slope', async () => {
  const far = [-1e30, -1e4, -90, -30, 30, 90, 1e4, 1e30];
  for (const f of [gelu, silu]) {
    const x = parameter(tensor(far));
    const y = f(x);
    valueAndGrad(() => sum(f(x))).dispose();
    const value = await y.read();
    const slope = await x.grad!.read();
    far.forEach((v, i) => {
      expect(Math.abs(value[i]! - Math.max(v, 0))).toBeLessThan(1e-6 * (1 + Math.max(v, 0)) + 1e-7 * (v < -1e20 ? 1e30 : 0));
      expect(slope[i]).toBeCloseTo(v > 0 ? 1 : 0, 6);
    });
    x.dispose();
    y.dispose();
  }
});

test('gate and up must have one shape', () => {
  scope(() => {
    expect(() => geglu(tensor([1, 2]), tensor([1, 2, 3]))).toThrow(ShapeError);
    expect(() => swiglu(tensor([1, 2]), tensor([1, 2], [2, 1]))).toThrow(/up has shape \[2 1\], expected \[2\]/);
  });
});
