// One row per op: its values, and its gradients by central differences, against a reference in float64; also that NaN goes where the
// reference says, that gradients accumulate, that a gradient does not depend on which others are wanted, and that nothing leaks.
import { expect, test } from 'vitest';
import { add } from '../../src/ops/elementwise.ts';
import { dot } from '../../src/ops/reduce.ts';
import { memory } from '../../src/tensor/engine.ts';
import { scope } from '../../src/tensor/scope.ts';
import { valueAndGrad } from '../../src/tensor/tape.ts';
import { parameter, type Tensor, tensor } from '../../src/tensor/tensor.ts';

/** What references compute with. */
export interface Array64 {
  readonly shape: readonly number[];
  readonly data: Float64Array;
}

/** One input of one case: floats are drawn from a normal distribution, i32 from 0 to `below`, unless `data` is given. */
export interface Input {
  readonly shape: readonly number[];
  readonly dtype?: 'f32' | 'bf16' | 'i32';
  readonly below?: number;
  readonly data?: readonly number[];
}

export interface Row {
  readonly name: string;
  readonly run: (...inputs: Tensor[]) => Tensor | readonly Tensor[];
  readonly reference: (...inputs: Array64[]) => Array64 | readonly Array64[];
  readonly cases: readonly (readonly Input[])[];
  /** Whether the op has gradients. Default true. */
  readonly gradient?: boolean;
  /** Largest error, relative to 1 + the largest magnitude beside it. Default 1e-6 for values. */
  readonly tolerance?: number;
  /** The same for gradients. Default 4e-6. */
  readonly gradientTolerance?: number;
}

/** A small fast generator: the same cases in every run. */
export function randomNumbers(seed: number): () => number {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

const f32 = new Float32Array(1);
const bits = new Uint32Array(f32.buffer);

/** The bits of x in bf16, rounded to nearest, ties to even. */
export function bf16Bits(x: number): number {
  f32[0] = x;
  if (Number.isNaN(x)) return (bits[0]! >>> 16) | 0x40;
  return (bits[0]! + 0x7fff + ((bits[0]! >>> 16) & 1)) >>> 16;
}

export function fromBf16(h: number): number {
  bits[0] = h << 16;
  return f32[0]!;
}

export const sizeOf = (shape: readonly number[]): number => shape.reduce((n, d) => n * d, 1);
export const array = (shape: readonly number[], data: ArrayLike<number>): Array64 => ({ shape, data: Float64Array.from(data) });
export const scalar = (x: number): Array64 => array([], [x]);

/** f over the elements of arrays of one shape. */
export function elementwise(f: (...x: number[]) => number): (...inputs: Array64[]) => Array64 {
  return (a, b, c) => ({ shape: a!.shape, data: a!.data.map((x, i) => f(x, b?.data[i] ?? 0, c?.data[i] ?? 0)) });
}

/** f over the rows (last dim) of x. */
export function rowwise(x: Array64, f: (row: Float64Array, index: number) => ArrayLike<number>): Array64 {
  const c = x.shape.at(-1)!;
  const data = new Float64Array(x.data.length);
  for (let i = 0; i * c < data.length; i++) data.set(f(x.data.subarray(i * c, i * c + c), i), i * c);
  return { shape: x.shape, data };
}

export function total(x: ArrayLike<number>): number {
  let s = 0;
  for (let i = 0; i < x.length; i++) s += x[i]!;
  return s;
}

export function product(x: ArrayLike<number>, y: ArrayLike<number>): number {
  let s = 0;
  for (let i = 0; i < x.length; i++) s += x[i]! * y[i]!;
  return s;
}

function draw(input: Input, random: () => number): Array64 {
  const normal = (): number => Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());
  const data = Float64Array.from(input.data ?? { length: sizeOf(input.shape) }, (given: unknown) => {
    if (input.dtype === 'i32') return typeof given === 'number' ? given : Math.floor(random() * (input.below ?? 1));
    const x = typeof given === 'number' ? given : normal();
    return input.dtype === 'bf16' ? fromBf16(bf16Bits(x)) : Math.fround(x);
  });
  return { shape: input.shape, data };
}

function toTensor(input: Input, a: Array64): Tensor {
  if (input.dtype === 'i32') return tensor(Int32Array.from(a.data), a.shape);
  if (input.dtype === 'bf16') return tensor(Uint16Array.from(a.data, bf16Bits), a.shape);
  return tensor(Float32Array.from(a.data), a.shape);
}

const list = <T>(x: T | readonly T[]): readonly T[] => (Array.isArray(x) ? x : [x as T]);

function expectClose(actual: ArrayLike<number>, expected: ArrayLike<number>, tolerance: number, what: string): void {
  expect(actual.length, what).toBe(expected.length);
  let largest = 0;
  for (let i = 0; i < expected.length; i++) if (Number.isFinite(expected[i])) largest = Math.max(largest, Math.abs(expected[i]!));
  for (let i = 0; i < expected.length; i++) {
    const [a, e] = [actual[i]!, expected[i]!];
    if (Object.is(a, e) || a === e || Math.abs(a - e) <= tolerance * (1 + Math.min(largest, 4 * Math.abs(e) + 1))) continue;
    expect.fail(`${what}: element ${i} is ${a}, expected ${e}`);
  }
}

/** A weight for each output, so that all of them matter to one loss. */
function weightsOf(outputs: readonly Array64[], random: () => number): Array64[] {
  return outputs.map((y) => draw({ shape: y.shape }, random));
}

function lossOf(y: readonly Tensor[], weights: readonly Array64[]): Tensor {
  return y.map((t, i) => dot(t, tensor(Float32Array.from(weights[i]!.data), t.shape))).reduce((a, b) => add(a, b));
}

/** The slope of the loss along one direction of input i, by a central difference of the reference. */
function slope(row: Row, inputs: readonly Array64[], i: number, direction: Float64Array, weights: readonly Array64[]): number {
  const lossAt = (h: number): number => {
    const moved = inputs.with(i, { shape: inputs[i]!.shape, data: inputs[i]!.data.map((x, j) => x + h * direction[j]!) });
    return total(list(row.reference(...moved)).map((y, k) => product(y.data, weights[k]!.data)));
  };
  const h = 1e-5;
  return (lossAt(h) - lossAt(-h)) / (2 * h);
}

/** Each element alone where they are few; else two random mixtures of all. */
function directions(size: number, random: () => number): Float64Array[] {
  if (size > 24) return [0, 1].map(() => draw({ shape: [size] }, random).data);
  return Array.from({ length: size }, (_, j) => new Float64Array(size).fill(1, j, j + 1));
}

async function gradients(
  row: Row,
  inputs: readonly Input[],
  arrays: readonly Array64[],
  weights: readonly Array64[],
  wanted: readonly number[],
  times: number,
) {
  const tensors = inputs.map((input, i) => toTensor(input, arrays[i]!));
  for (const i of wanted) parameter(tensors[i]!);
  for (let k = 0; k < times; k++) valueAndGrad(() => lossOf(list(row.run(...tensors)), weights)).dispose();
  const read = await Promise.all(wanted.map((i) => tensors[i]!.grad!.read()));
  for (const t of tensors) t.dispose();
  return read;
}

async function checkCase(row: Row, inputs: readonly Input[], seed: number): Promise<void> {
  const what = `${row.name} ${inputs.map((x) => `${x.dtype ?? 'f32'}[${x.shape.join(' ')}]`).join(' ')}`;
  const before = memory().tensors;
  const random = randomNumbers(seed);
  const arrays = inputs.map((input) => draw(input, random));
  const floats = inputs.flatMap((x, i) => (x.dtype === 'i32' ? [] : [i]));

  const values = async (given: readonly Array64[]): Promise<ArrayLike<number>[]> => {
    const tensors = inputs.map((input, i) => toTensor(input, given[i]!));
    const outputs = scope(() => list(row.run(...tensors)));
    const read = await Promise.all(outputs.map((y) => y.read()));
    for (const t of [...tensors, ...outputs]) t.dispose();
    return read;
  };

  const expected = list(row.reference(...arrays));
  const actual = await values(arrays);
  expected.forEach((y, i) => {
    expectClose(actual[i]!, y.data, row.tolerance ?? 1e-6, `${what}: output ${i}`);
  });

  for (const i of floats) {
    const a = arrays[i]!;
    if (a.data.length === 0) continue;
    const poisoned = arrays.with(i, { shape: a.shape, data: a.data.with(a.data.length >> 1, Number.NaN) });
    const got = await values(poisoned);
    list(row.reference(...poisoned)).forEach((y, k) => {
      y.data.forEach((e, j) => {
        if (Number.isNaN(e) !== Number.isNaN(got[k]![j]!))
          expect.fail(`${what}: with NaN in input ${i}, element ${j} is ${got[k]![j]}, expected ${e}`);
      });
    });
  }

  if (row.gradient !== false) {
    const weights = weightsOf(expected, random);
    const once = await gradients(row, inputs, arrays, weights, floats, 1);
    const twice = await gradients(row, inputs, arrays, weights, floats, 2);
    for (const [k, i] of floats.entries()) {
      const tolerance = row.gradientTolerance ?? 4e-6;
      for (const [d, direction] of directions(arrays[i]!.data.length, random).entries()) {
        const expected = slope(row, arrays, i, direction, weights);
        const actual = product(once[k]!, direction);
        const magnitude = 1 + total(direction.map((x, j) => Math.abs(x * once[k]![j]!)));
        if (!(Math.abs(actual - expected) <= tolerance * magnitude))
          expect.fail(`${what}: slope ${d} of input ${i} is ${actual}, expected ${expected}`);
      }
      expectClose(
        twice[k]!,
        Float64Array.from(once[k]!, (g) => 2 * g),
        tolerance,
        `${what}: gradient of input ${i}, accumulated`,
      );
      if (floats.length > 1) {
        const alone = await gradients(row, inputs, arrays, weights, [i], 1);
        const at = once[k]!.findIndex((g: number, j: number) => !Object.is(g, alone[0]![j]));
        if (at >= 0) expect.fail(`${what}: gradient of input ${i} alone differs at ${at}`);
      }
    }
  }
  expect(memory().tensors, `${what}: tensors alive`).toBe(before);
}

/** Declares the test of one op. */
export function checkOp(row: Row): void {
  test(row.name, async () => {
    for (const [i, inputs] of row.cases.entries()) await checkCase(row, inputs, i + 1);
  });
}

/** Elements only matter one by one: none, one, a prime, one past a vector, one past a chunk of 16384. */
export const anyShapes: readonly (readonly number[])[] = [[], [0], [1], [7], [3, 17], [2, 0, 3], [2, 3, 5, 7], [16_385]];

/** Cases of inputs of one shape. */
export const same = (count: number, shapes = anyShapes): Input[][] =>
  shapes.map((shape) => Array.from({ length: count }, () => ({ shape })));
