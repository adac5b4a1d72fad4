// The tape against another one in float64: programs of random calls, in which values are used once, often, twice in one call or not at
// all, shown in other shapes, made again or overwritten on the way back.   N rows and columns of every matrix
import fc from 'fast-check';
import { expect, test } from 'vitest';
import { geglu, silu } from '../../src/ops/activation.ts';
import { add, mul, scale, sub } from '../../src/ops/elementwise.ts';
import { gatedLinear, linear } from '../../src/ops/linear.ts';
import { rmsNorm, rmsNormAdd } from '../../src/ops/norm.ts';
import { dot, softmax } from '../../src/ops/reduce.ts';
import { reshape } from '../../src/ops/reshape.ts';
import { concat, slice, transpose } from '../../src/ops/view.ts';
import { memory } from '../../src/tensor/engine.ts';
import { scope } from '../../src/tensor/scope.ts';
import { recompute, valueAndGrad, zeroGrad } from '../../src/tensor/tape.ts';
import { parameter, readAs, type Tensor, tensor } from '../../src/tensor/tensor.ts';

const N = 3;
const SIZE = N * N;

/** A value of the reference: its numbers, its gradient, and how that goes on to what it was made of. */
interface Node {
  readonly x: Float64Array;
  readonly d: Float64Array;
  readonly back: () => void;
}

const node = (x: Float64Array, back: (d: Float64Array) => void = () => {}): Node => {
  const d = new Float64Array(x.length);
  return { x, d, back: () => back(d) };
};
/** Element by element, with the slopes by each argument. */
const each = (args: readonly Node[], f: (...x: number[]) => number, ...slopes: ((...x: number[]) => number)[]): Node => {
  const at = (i: number): number[] => args.map(({ x }) => x[i]!);
  return node(
    args[0]!.x.map((_, i) => f(...at(i))),
    (d) => {
      for (const [a, slope] of slopes.entries()) for (let i = 0; i < SIZE; i++) args[a]!.d[i]! += d[i]! * slope(...at(i));
    },
  );
};
/** Elements by where they come from: [argument, place]. */
const moved = (args: readonly Node[], from: (i: number) => readonly [number, number]): Node =>
  node(
    Float64Array.from({ length: SIZE }, (_, i) => args[from(i)[0]]!.x[from(i)[1]]!),
    (d) => {
      for (let i = 0; i < SIZE; i++) args[from(i)[0]]!.d[from(i)[1]]! += d[i]!;
    },
  );
const sigmoid = (x: number): number => 1 / (1 + Math.exp(-x));
const gelu = (x: number): number => x * sigmoid(2 * Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3));
const geluSlope = (x: number): number => {
  const s = sigmoid(2 * Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3));
  return s + x * s * (1 - s) * 2 * Math.sqrt(2 / Math.PI) * (1 + 3 * 0.044715 * x * x);
};
const product = (a: Node, w: Node): Node =>
  node(
    Float64Array.from({ length: SIZE }, (_, i) => {
      let sum = 0;
      for (let k = 0; k < N; k++) sum += a.x[Math.floor(i / N) * N + k]! * w.x[(i % N) * N + k]!;
      return sum;
    }),
    (d) => {
      for (let i = 0; i < SIZE; i++) {
        for (let k = 0; k < N; k++) {
          a.d[Math.floor(i / N) * N + k]! += d[i]! * w.x[(i % N) * N + k]!;
          w.d[(i % N) * N + k]! += d[i]! * a.x[Math.floor(i / N) * N + k]!;
        }
      }
    },
  );
const normed = (a: Node, w: Node, residual?: Node): Node => {
  const rstd = [0, 1, 2].map((r) => 1 / Math.sqrt(a.x.slice(r * N, r * N + N).reduce((s, x) => s + x * x, 0) / N + 1e-2));
  return node(
    a.x.map((x, i) => x * rstd[Math.floor(i / N)]! * w.x[i % N]! + (residual?.x[i] ?? 0)),
    (d) => {
      for (let r = 0; r < N; r++) {
        let mean = 0;
        for (let c = 0; c < N; c++) mean += (d[r * N + c]! * w.x[c]! * a.x[r * N + c]! * rstd[r]!) / N;
        for (let c = 0; c < N; c++) {
          const i = r * N + c;
          a.d[i]! += rstd[r]! * (d[i]! * w.x[c]! - a.x[i]! * rstd[r]! * mean);
          w.d[c]! += d[i]! * a.x[i]! * rstd[r]!;
          if (residual !== undefined) residual.d[i]! += d[i]!;
        }
      }
    },
  );
};
const shares = (a: Node): Node => {
  const y = a.x.map(
    (x, i) => Math.exp(x) / a.x.slice(Math.floor(i / N) * N, Math.floor(i / N) * N + N).reduce((s, v) => s + Math.exp(v), 0),
  );
  return node(y, (d) => {
    for (let i = 0; i < SIZE; i++) {
      const from = Math.floor(i / N) * N;
      let all = 0;
      for (let k = from; k < from + N; k++) all += d[k]! * y[k]!;
      a.d[i]! += y[i]! * (d[i]! - all);
    }
  });
};

/** Each call, of two matrices and a gain [N], and its twin in the reference. `also` gets what the twin needs in between. */
type Call = readonly [
  run: (a: Tensor, b: Tensor, w: Tensor) => Tensor,
  twin: (a: Node, b: Node, w: Node, also: (n: Node) => Node) => Node,
];
const half = { eps: 1e-2 };
const added: Call[1] = (a, b) =>
  each(
    [a, b],
    (x, y) => x + y,
    () => 1,
    () => 1,
  );
const calls: Readonly<Record<string, Call>> = {
  add: [(a, b) => add(a, b), added],
  sub: [
    (a, b) => sub(a, b),
    (a, b) =>
      each(
        [a, b],
        (x, y) => x - y,
        () => 1,
        () => -1,
      ),
  ],
  mul: [
    (a, b) => mul(a, b),
    (a, b) =>
      each(
        [a, b],
        (x, y) => x * y,
        (_, y) => y,
        (x) => x,
      ),
  ],
  scale: [
    (a) => scale(a, 0.5),
    (a) =>
      each(
        [a],
        (x) => 0.5 * x,
        () => 0.5,
      ),
  ],
  silu: [
    (a) => silu(a),
    (a) =>
      each(
        [a],
        (x) => x * sigmoid(x),
        (x) => sigmoid(x) * (1 + x * (1 - sigmoid(x))),
      ),
  ],
  geglu: [
    (a, b) => geglu(a, b),
    (a, b) =>
      each(
        [a, b],
        (x, y) => gelu(x) * y,
        (x, y) => geluSlope(x) * y,
        (x) => gelu(x),
      ),
  ],
  turned: [(a) => transpose(a), (a) => moved([a], (i) => [0, (i % N) * N + Math.floor(i / N)])],
  flat: [(a) => reshape(reshape(a, [SIZE]), [N, N]), (a) => moved([a], (i) => [0, i])],
  flatSum: [(a, b) => reshape(add(reshape(a, [-1]), reshape(b, [-1])), [N, N]), added],
  joined: [(a, b) => concat(slice(a, 0, 1), slice(b, 1, N)), (a, b) => moved([a, b], (i) => [i % N === 0 ? 0 : 1, i])],
  softmax: [(a) => softmax(a), (a) => shares(a)],
  linear: [(a, b) => linear(a, b), (a, b) => product(a, b)],
  norm: [(a, _, w) => rmsNorm(a, w, half), (a, _, w) => normed(a, w)],
  normAdd: [(a, b, w) => rmsNormAdd(a, w, b, half), (a, b, w) => normed(a, w, b)],
  normAddCheap: [(a, b, w) => rmsNormAdd(a, w, b, { ...half, cheap: true }), (a, b, w) => normed(a, w, b)],
  // The gate is made for the call, so that its gradient takes its place.
  gated: [
    (a, b) => gatedLinear(linear(a, b), scale(b, 0.5), a, { activation: 'gelu' }),
    (a, b, _, also) => {
      const [gate, up] = [
        also(product(a, b)),
        also(
          each(
            [b],
            (x) => 0.5 * x,
            () => 0.5,
          ),
        ),
      ];
      return product(
        also(
          each(
            [gate, up],
            (x, y) => gelu(x) * y,
            (x, y) => geluSlope(x) * y,
            (x) => gelu(x),
          ),
        ),
        a,
      );
    },
  ],
  again: [
    (a, b) => recompute((x, y) => mul(silu(x), y), a, b),
    (a, b) =>
      each(
        [a, b],
        (x, y) => x * sigmoid(x) * y,
        (x, y) => sigmoid(x) * (1 + x * (1 - sigmoid(x))) * y,
        (x) => x * sigmoid(x),
      ),
  ],
  againInside: [
    (a, b, w) =>
      recompute(
        (x, y) =>
          add(
            recompute((z) => silu(rmsNorm(z, w, half)), x),
            rmsNormAdd(y, w, x, { ...half, cheap: true }),
          ),
        a,
        b,
      ),
    (a, b, w, also) => {
      const inner = also(normed(a, w));
      const left = also(
        each(
          [inner],
          (x) => x * sigmoid(x),
          (x) => sigmoid(x) * (1 + x * (1 - sigmoid(x))),
        ),
      );
      return each(
        [left, also(normed(b, w, a))],
        (x, y) => x + y,
        () => 1,
        () => 1,
      );
    },
  ],
};
const names = Object.keys(calls);

const program = fc.record({
  values: fc.array(fc.array(fc.integer({ min: -8, max: 8 }), { minLength: SIZE, maxLength: SIZE }), {
    minLength: 2,
    maxLength: 3,
  }),
  gain: fc.array(fc.integer({ min: -8, max: 8 }), { minLength: N, maxLength: N }),
  // Which arguments: counted back from the newest value, so that chains are long.
  steps: fc.array(fc.record({ name: fc.constantFrom(...names), a: fc.nat(4), b: fc.nat(4) }), { minLength: 1, maxLength: 12 }),
  // What the loss looks at, beside the last value.
  seen: fc.array(fc.nat(8), { maxLength: 3 }),
});

test('gradients of any program are those of float64, twice over, and nothing is left', async () => {
  const before = memory().tensors;
  const check = fc.asyncProperty(program, async ({ values, gain, steps, seen }) => {
    const given = [...values, gain].map((list) => Float64Array.from(list, (x) => x / 8));
    const pick = <T>(all: readonly T[], back: number): T => all[Math.max(0, all.length - 1 - back)]!;

    const tape: Node[] = given.map((x) => node(x));
    const weight = tape.at(-1)!;
    const matrices = tape.slice(0, -1);
    const also = (n: Node): Node => {
      tape.push(n);
      return n;
    };
    for (const { name, a, b } of steps) matrices.push(also(calls[name]![1](pick(matrices, a), pick(matrices, b), weight, also)));
    for (const back of [0, ...seen]) for (let i = 0; i < SIZE; i++) pick(matrices, back).d[i]! += (i + 1) / SIZE;
    for (const n of [...tape].reverse()) n.back();
    // Beyond, float32 has too few digits to tell a wrong gradient from a rounded one.
    fc.pre(tape.every(({ x, d }) => x.every((v) => Math.abs(v) < 30) && d.every((v) => Math.abs(v) < 1e3)));

    const parameters = given.map((x, i) => parameter(tensor([...x], i < given.length - 1 ? [N, N] : [N])));
    const ramp = tensor(
      Float32Array.from({ length: SIZE }, (_, i) => (i + 1) / SIZE),
      [N, N],
    );
    const loss = (): Tensor =>
      scope(() => {
        const made: Tensor[] = parameters.slice(0, -1);
        for (const { name, a, b } of steps) made.push(calls[name]![0](pick(made, a), pick(made, b), parameters.at(-1)!));
        return [0, ...seen].map((back) => dot(pick(made, back), ramp)).reduce((x, y) => add(x, y));
      });
    try {
      for (const times of [1, 2]) {
        valueAndGrad(loss).dispose();
        for (const [i, p] of parameters.entries()) {
          const { grad } = p;
          const got = grad === undefined ? new Float32Array(p.size) : await readAs(grad, 'f32');
          const wanted = tape[i]!.d;
          for (let k = 0; k < wanted.length; k++) {
            const off = Math.abs(got[k]! / times - wanted[k]!);
            expect(off, `parameter ${i}, element ${k}: ${got[k]! / times}, expected ${wanted[k]}`).toBeLessThan(
              2e-4 * (1 + Math.max(...wanted.map(Math.abs))),
            );
          }
        }
      }
    } finally {
      zeroGrad(parameters);
      for (const t of [...parameters, ramp]) t.dispose();
    }
    expect(memory().tensors).toBe(before);
  });
  await fc.assert(check, { numRuns: 500 });
});
