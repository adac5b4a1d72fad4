// One row per op: its values, and its gradients by central differences, against a reference in float64; also that NaN goes where the
// reference says, that gradients accumulate, that a gradient does not depend on which others are wanted, and that nothing leaks.
import { expect, test } from 'vitest';
import { add } from '../../src/ops/elementwise.ts';
import { dot } from '../../src/ops/reduce.ts';
import type { DType } from '../../src/tensor/dtype.ts';
import { memory } from '../../src/tensor/engine.ts';
import { scope } from '../../src/tensor/scope.ts';
import { valueAndGrad } from '../../src/tensor/tape.ts';
import { parameter, type Tensor, tensor } from '../../src/tensor/tensor.ts';
import { testDevice } from '../device.ts';

/** What references compute with. */
export interface Array64 {
  readonly shape: readonly number[];
  readonly data: Float64Array;
}

/** What a tensor without a dtype is: f32 on the CPU, on other devices each of the two. */
export type Compute = 'f32' | 'bf16';

/** What this device computes in. */
export const computes: readonly Compute[] = testDevice === 'cpu' ? ['f32'] : ['f32', 'bf16'];

/** One input of one case: floats are drawn from a normal distribution, i32 from 0 to `below`, unless `data` is given. */
export interface Input {
  readonly shape: readonly number[];
  /** Default: the compute dtype. */
  readonly dtype?: 'f32' | 'bf16' | 'i32';
  readonly below?: number;
  readonly data?: readonly number[];
  /** Its gradient is made in f32, whatever is computed in. */
  readonly weight?: boolean;
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
  /** What a device other than the CPU computes it in. Default both. */
  readonly compute?: readonly Compute[];
  /** The tolerances where bf16 is computed in. Default: as above; outputs may be off by their own rounding, gradients by twice that. */
  readonly bf16Tolerance?: number;
  readonly bf16GradientTolerance?: number;
}

/** What rounding an output may change, relative to the number; the tolerances have room for that of f32. */
const rounding = { f32: 0, bf16: 2 ** -8 };

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

/** x wᵀ + bias, with w [N K]. */
export function linearReference(x: Array64, w: Array64, bias?: Array64): Array64 {
  const [n = 0, k = 0] = w.shape;
  const lead = x.shape.slice(0, -1);
  const rows = lead.reduce((a, b) => a * b, 1);
  const y = array([...lead, n], new Float64Array(rows * n));
  for (let i = 0; i < rows; i++) {
    for (let j = 0; j < n; j++) {
      let s = bias?.data[j] ?? 0;
      for (let l = 0; l < k; l++) s += x.data[i * k + l]! * w.data[j * k + l]!;
      y.data[i * n + j] = s;
    }
  }
  return y;
}

const dtypeOf = (input: Input, compute: Compute): 'f32' | 'bf16' | 'i32' => input.dtype ?? compute;

function draw(input: Input, random: () => number, compute: Compute = 'f32'): Array64 {
  const normal = (): number => Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());
  const data = Float64Array.from(input.data ?? { length: sizeOf(input.shape) }, (given: unknown) => {
    const dtype = dtypeOf(input, compute);
    if (dtype === 'i32') return typeof given === 'number' ? given : Math.floor(random() * (input.below ?? 1));
    const x = typeof given === 'number' ? given : normal();
    return dtype === 'bf16' ? fromBf16(bf16Bits(x)) : Math.fround(x);
  });
  return { shape: input.shape, data };
}

function toTensor(dtype: string, a: Array64): Tensor {
  if (dtype === 'i32') return tensor(Int32Array.from(a.data), a.shape);
  if (dtype === 'bf16') return tensor(Uint16Array.from(a.data, bf16Bits), a.shape);
  return tensor(Float32Array.from(a.data), a.shape);
}

/** A tensor's numbers; those of bf16 as floats. */
async function numbers(t: Tensor): Promise<ArrayLike<number>> {
  const read = await t.read();
  return t.dtype === 'bf16' ? Float32Array.from(read as Uint16Array, fromBf16) : (read as ArrayLike<number>);
}

const list = <T>(x: T | readonly T[]): readonly T[] => (Array.isArray(x) ? x : [x as T]);

function expectClose(
  actual: ArrayLike<number>,
  expected: ArrayLike<number>,
  tolerance: number,
  what: string,
  relative = 0,
): void {
  expect(actual.length, what).toBe(expected.length);
  let largest = 0;
  for (let i = 0; i < expected.length; i++) if (Number.isFinite(expected[i])) largest = Math.max(largest, Math.abs(expected[i]!));
  for (let i = 0; i < expected.length; i++) {
    const [a, e] = [actual[i]!, expected[i]!];
    if (Object.is(a, e) || a === e) continue;
    if (Math.abs(a - e) <= tolerance * (1 + Math.min(largest, 4 * Math.abs(e) + 1)) + relative * Math.abs(e)) continue;
    expect.fail(`${what}: element ${i} is ${a}, expected ${e}`);
  }
}

/** A weight for each output, so that all of them matter to one loss. */
function weightsOf(outputs: readonly Array64[], dtypes: readonly DType[], random: () => number): Array64[] {
  return outputs.map((y, i) => draw({ shape: y.shape }, random, dtypes[i] === 'bf16' ? 'bf16' : 'f32'));
}

function lossOf(y: readonly Tensor[], weights: readonly Array64[]): Tensor {
  return y.map((t, i) => dot(t, toTensor(t.dtype, weights[i]!))).reduce((a, b) => add(a, b));
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
  dtypes: readonly string[],
  arrays: readonly Array64[],
  weights: readonly Array64[],
  wanted: readonly number[],
  times: number,
): Promise<ArrayLike<number>[]> {
  const tensors = dtypes.map((dtype, i) => toTensor(dtype, arrays[i]!));
  for (const i of wanted) parameter(tensors[i]!);
  for (let k = 0; k < times; k++) valueAndGrad(() => lossOf(list(row.run(...tensors)), weights)).dispose();
  const read = await Promise.all(wanted.map((i) => numbers(tensors[i]!.grad!)));
  for (const t of tensors) t.dispose();
  return read;
}

async function checkCase(row: Row, inputs: readonly Input[], seed: number, compute: Compute): Promise<void> {
  const dtypes = inputs.map((x) => dtypeOf(x, compute));
  const what = `${row.name} ${inputs.map((x, i) => `${dtypes[i]}[${x.shape.join(' ')}]`).join(' ')}`;
  const before = memory().tensors;
  const random = randomNumbers(seed);
  const arrays = inputs.map((input) => draw(input, random, compute));
  const floats = inputs.flatMap((_, i) => (dtypes[i] === 'i32' ? [] : [i]));
  const tolerance = (compute === 'bf16' ? row.bf16Tolerance : undefined) ?? row.tolerance ?? 1e-6;

  let outputDtypes: DType[] = [];
  const values = async (given: readonly Array64[]): Promise<ArrayLike<number>[]> => {
    const tensors = dtypes.map((dtype, i) => toTensor(dtype, given[i]!));
    const outputs = scope(() => list(row.run(...tensors)));
    outputDtypes = outputs.map((y) => y.dtype);
    const read = await Promise.all(outputs.map(numbers));
    for (const t of [...tensors, ...outputs]) t.dispose();
    return read;
  };

  const expected = list(row.reference(...arrays));
  const actual = await values(arrays);
  expected.forEach((y, i) => {
    expectClose(actual[i]!, y.data, tolerance, `${what}: output ${i}`, outputDtypes[i] === 'bf16' ? rounding.bf16 : 0);
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
    const weights = weightsOf(expected, outputDtypes, random);
    const once = await gradients(row, dtypes, arrays, weights, floats, 1);
    const twice = await gradients(row, dtypes, arrays, weights, floats, 2);
    for (const [k, i] of floats.entries()) {
      const data = once[k]!;
      const rounded = dtypes[i] === 'bf16' && !inputs[i]!.weight ? rounding.bf16 : 0;
      const asked = compute === 'bf16' ? row.bf16GradientTolerance : undefined;
      const tolerance = asked ?? Math.max(row.gradientTolerance ?? 4e-6, 2 * rounded);
      for (const [d, direction] of directions(arrays[i]!.data.length, random).entries()) {
        const expected = slope(row, arrays, i, direction, weights);
        const actual = product(data, direction);
        const magnitude = 1 + total(direction.map((x, j) => Math.abs(x * data[j]!)));
        if (!(Math.abs(actual - expected) <= tolerance * magnitude))
          expect.fail(`${what}: slope ${d} of input ${i} is ${actual}, expected ${expected}`);
      }
      expectClose(
        twice[k]!,
        Float64Array.from(data, (g) => 2 * g),
        tolerance,
        `${what}: gradient of input ${i}, accumulated`,
      );
      if (floats.length > 1) {
        const alone = (await gradients(row, dtypes, arrays, weights, [i], 1))[0]!;
        const at = Array.from(data).findIndex((g, j) => !Object.is(g, alone[j]));
        if (at >= 0) expect.fail(`${what}: gradient of input ${i} alone differs at ${at}`);
      }
    }
  }
  expect(memory().tensors, `${what}: tensors alive`).toBe(before);
}

/** Declares the test of one op, in each dtype that the device computes in. */
export function checkOp(row: Row): void {
  const all = computes.filter((c) => testDevice === 'cpu' || (row.compute ?? computes).includes(c));
  // Where every input has a dtype of its own, there is nothing to choose.
  const chosen = row.cases.some((inputs) => inputs.some((x) => !x.dtype)) ? all : all.slice(0, 1);
  for (const compute of chosen)
    test(compute === 'f32' ? row.name : `${row.name}, computed in bf16`, async () => {
      for (const [i, inputs] of row.cases.entries()) await checkCase(row, inputs, i + 1, compute);
    });
}

/** Elements only matter one by one: none, one, a prime, one past a vector, one past a chunk of 16384. */
export const anyShapes: readonly (readonly number[])[] = [[], [0], [1], [7], [3, 17], [2, 0, 3], [2, 3, 5, 7], [16_385]];

/** Cases of inputs of one shape. */
export const same = (count: number, shapes = anyShapes): Input[][] =>
  shapes.map((shape) => Array.from({ length: count }, () => ({ shape })));
