import { expect, test } from 'vitest';
import { add, mul, scale } from '../../src/ops/elementwise.ts';
import { gatedLinear, linear } from '../../src/ops/linear.ts';
import { sum } from '../../src/ops/reduce.ts';
import { reshape } from '../../src/ops/reshape.ts';
import { ShapeError } from '../../src/tensor/errors.ts';
import { keep, scope } from '../../src/tensor/scope.ts';
import { valueAndGrad } from '../../src/tensor/tape.ts';
import { parameter, readAs, type Tensor, tensor, zeros } from '../../src/tensor/tensor.ts';
import { checkOp, elementwise, type Input, linearReference } from './check.ts';

// Nothing, one, primes, one token, one past a tile of the product in each direction.
const sizes = [
  { lead: [0], k: 3, n: 2 },
  { lead: [1], k: 1, n: 1 },
  { lead: [], k: 7, n: 5 },
  { lead: [1], k: 65, n: 33 },
  { lead: [2, 7], k: 17, n: 13 },
  { lead: [33], k: 65, n: 49 },
  { lead: [65], k: 16, n: 97 },
];
// On a GPU f32 weights beside bf16 tokens are rounded; the weights of a row without a dtype are what it computes in.
const cases = (dtype: 'bf16' | undefined, rest: (n: number) => Input[] = () => []): Input[][] =>
  sizes.map(({ lead, k, n }) => [{ shape: [...lead, k] }, { shape: [n, k], weight: true, ...(dtype && { dtype }) }, ...rest(n)]);

checkOp({
  name: 'linear',
  run: (x, w) => linear(x!, w!),
  reference: (x, w) => linearReference(x!, w!),
  cases: cases(undefined),
  tolerance: 4e-6,
});
checkOp({
  name: 'linear, bias',
  run: (x, w, bias) => linear(x!, w!, bias),
  reference: linearReference,
  cases: cases(undefined, (n) => [{ shape: [n], weight: true }]),
  tolerance: 4e-6,
});
checkOp({
  name: 'linear, bf16 weights',
  run: (x, w) => linear(x!, w!),
  reference: (x, w) => linearReference(x!, w!),
  cases: cases('bf16'),
  tolerance: 4e-6,
});

const gelu = (x: number): number => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)));
const silu = (x: number): number => x / (1 + Math.exp(-x));
for (const [activation, f] of [
  ['gelu', gelu],
  ['silu', silu],
] as const) {
  checkOp({
    name: `gated_linear, ${activation}`,
    run: (gate, up, w) => gatedLinear(gate!, up!, w!, { activation }),
    reference: (gate, up, w) => linearReference(elementwise((g, u) => f(g) * u)(gate!, up!), w!),
    cases: sizes.map(({ lead, k, n }, i) => [
      { shape: [...lead, k] },
      { shape: [...lead, k] },
      { shape: [n, k], weight: true, ...(i % 2 === 0 ? {} : { dtype: 'bf16' as const }) },
    ]),
    tolerance: 4e-6,
    // The activation is rounded before the product, and its gradient after it.
    bf16Tolerance: 1e-2,
    bf16GradientTolerance: 1e-2,
  });
}

test('the gradients of a gate take its place only where nobody else needs it', async () => {
  const fill = (n: number, f: number) => Float32Array.from({ length: n }, (_, i) => Math.sin(f * (i + 1)));
  const [rows, width, out] = [530, 33, 5];
  const gradients = async (use: 'once' | 'held' | 'twice' | 'viewed'): Promise<Float32Array[]> => {
    const inputs = [
      parameter(tensor(fill(rows * width, 0.7), [rows, width])),
      parameter(tensor(fill(rows * width, 1.3), [rows, width])),
      parameter(tensor(fill(out * width, 0.4), [out, width])),
    ] as const;
    const held: Tensor[] = [];
    valueAndGrad(() => {
      const [y, other] = scope(() => {
        const [gate, up] = [scale(inputs[0], 2), scale(inputs[1], 3)];
        if (use === 'held') held.push(...keep([gate, up]));
        const shown = use === 'viewed' ? reshape(gate, [-1]) : gate;
        const total = gatedLinear(gate, up, inputs[2], { activation: 'gelu' });
        return [sum(mul(total, total)), use === 'twice' || use === 'viewed' ? sum(mul(shown, shown)) : undefined];
      });
      return other === undefined ? y! : add(y!, scale(other, 0));
    }).dispose();
    if (use === 'held') expect(await held[0]!.read()).toEqual(fill(rows * width, 0.7).map((v) => 2 * v));
    const found = await Promise.all(inputs.map((t) => readAs(t.grad!, 'f32')));
    for (const t of [...inputs, ...held]) t.dispose();
    return found;
  };
  const once = await gradients('once');
  for (const use of ['held', 'twice', 'viewed'] as const) expect(await gradients(use), use).toEqual(once);
});

test('a weight of another width is refused', () => {
  scope(() => {
    expect(() => linear(zeros([2, 3]), zeros([4, 2]))).toThrow(ShapeError);
    expect(() => linear(zeros([2, 3]), zeros([4, 3]), zeros([3]))).toThrow(/bias has shape \[3\], expected \[4\]/);
    expect(() => gatedLinear(zeros([2, 3]), zeros([2, 2]), zeros([4, 3]), { activation: 'gelu' })).toThrow(ShapeError);
  });
});
