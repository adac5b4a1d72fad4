// Parameters as plain trees. All values lie in one flat tensor. Gradients lie flat by group, so that an update takes few calls, and a
// group takes memory only from its backward pass to the update: activations that are freed on the way make room for it.
import { copy_, fill_ } from '../ops/elementwise.ts';
import { momentBlock } from '../ops/optimizer.ts';
import { type QuantizedFormat, quantize_, type Weight } from '../ops/quant.ts';
import { randomNormal_ } from '../ops/random.ts';
import { currentDevice, withDevice } from '../tensor/engine.ts';
import { ConfigError } from '../tensor/errors.ts';
import { widenBf16 } from '../tensor/half.ts';
import { keep, scope } from '../tensor/scope.ts';
import { empty, type GradientSink, type Tensor, tensor, viewOf, withSink, writeAt } from '../tensor/tensor.ts';
import { createQuantized, type QuantizedParameter } from './quantized.ts';

/** One parameter, before it exists. */
export interface ParameterSpec {
  readonly parameter: true;
  /** Name in checkpoints. */
  readonly name: string;
  readonly shape: readonly number[];
  /** Standard deviation of the initial values; 0 starts at `start`. */
  readonly std: number;
  readonly start: number;
  /** Whether weight decay holds for it. */
  readonly decay: boolean;
  /** Its learning rate is that of the run times this. Default 1. The same for all of a group. */
  readonly rate?: number;
}

/** A matrix that only `linear` reads, so that a frozen model may keep it in few bits. */
export interface WeightSpec extends ParameterSpec {
  readonly linear: true;
}

/** A tree of parameters: objects and arrays with {@link ParameterSpec} leaves; undefined where a model has none of a kind. */
export type SpecTree = ParameterSpec | undefined | readonly SpecTree[] | { readonly [key: string]: SpecTree };

/** The tree of tensors that belongs to a tree of specs. */
export type Tensors<S> = S extends WeightSpec
  ? Weight
  : S extends ParameterSpec
    ? Tensor
    : S extends readonly (infer E)[]
      ? readonly Tensors<E>[]
      : S extends undefined
        ? undefined
        : { readonly [K in keyof S]: Tensors<S[K]> };

/** A matrix: normal initial values, decayed. */
export function matrix(name: string, shape: readonly number[], std: number): ParameterSpec {
  return { parameter: true, name, shape, std, start: 0, decay: true };
}

/** A {@link matrix} that only `linear` reads. */
export function weight(name: string, shape: readonly [number, number], std: number): WeightSpec {
  return { parameter: true, name, shape, std, start: 0, decay: true, linear: true };
}

/** A gain or a bias: constant initial value, not decayed. */
export function vector(name: string, size: number, start: number): ParameterSpec {
  return { parameter: true, name, shape: [size], std: 0, start, decay: false };
}

/** One parameter with its tensor. */
export interface NamedParameter {
  readonly name: string;
  readonly tensor: Tensor;
  readonly decay: boolean;
  /** Where its values begin in the flat tensors. */
  readonly offset: number;
}

/** Parameters that follow one another, such as a layer's, with one tensor of gradients. */
export interface ParameterGroup {
  /** Where its values begin in the flat tensor. */
  readonly offset: number;
  /** Elements, padding included. */
  readonly size: number;
  /** Its learning rate is that of the run times this. */
  readonly rate: number;
  /** Their gradients [size] in the same order, zero where nothing wrote; they stay until zeroGrad(). */
  gradient(): Tensor;
}

/** A matrix that only `linear` reads, and its place in the tree: another weight of the same shape may be put there. */
export interface LinearPlace {
  readonly name: string;
  readonly shape: readonly [number, number];
  weight: Weight;
}

/** Parameters that exist. */
export interface Parameters<S extends SpecTree> {
  readonly tree: Tensors<S>;
  /** Those that lie in `values`. */
  readonly list: readonly NamedParameter[];
  /** Those that are kept in few bits. */
  readonly weights: readonly QuantizedParameter[];
  /** Where the matrices are that only `linear` reads. */
  readonly linears: readonly LinearPlace[];
  /** All values; each parameter starts at a multiple of 64 elements, with zeros between. f32, or bf16 where that is all there is. */
  readonly values: Tensor;
  /** Rounded copies of f32 `values`, in the same places, where the ops read bf16; else undefined: they read `values`. */
  readonly copies: Tensor | undefined;
  /** They cover all values in order: an entry of the tree is a group, and so is each element of a list. Empty for frozen parameters. */
  readonly groups: readonly ParameterGroup[];
  /** For each block of 64 values, 1 where weight decay holds. */
  readonly decay: Uint8Array;
  /** Number of parameters, padding left out. */
  readonly count: number;
  /**
   * Writes elements of a parameter from `from` on, rounded where it is kept in fewer bits; each from its first to its last. When all
   * are written {@link refresh} must follow.
   * @param data values, or in a Uint16Array the bits of bf16
   */
  write(name: string, from: number, data: Float32Array | Uint16Array): void;
  /** Makes the copies follow `values`. */
  refresh(): void;
  dispose(): void;
}

export interface ParameterOptions {
  /** With gradients. Default true. */
  readonly trainable?: boolean;
  /** Of the initial values; undefined leaves all values zero (those of few bits undefined), for loading into. */
  readonly seed?: number | undefined;
  /** What the ops read. Default f32 on the CPU, bf16 on a GPU. */
  readonly dtype?: 'f32' | 'bf16' | undefined;
  /** Whether bf16 parameters that are trained are copies of f32 values, which the optimizer changes. Default true. */
  readonly master?: boolean | undefined;
  /** What frozen models keep the matrices in that only `linear` reads: 8 (`fp8`), 8.5 (`q8`) or 4.25 bits (`q4`). Default: like the others. */
  readonly weights?: QuantizedFormat | undefined;
}

/** Each parameter starts at a multiple of this many elements, and each group at a multiple of a block of 8-bit moments. */
export const block = 64;
const roundUp = (n: number, to: number): number => Math.ceil(n / to) * to;
const padded = (n: number): number => roundUp(n, block);
const sizeOf = ({ shape }: { readonly shape: readonly number[] }): number => shape.reduce((a, b) => a * b, 1);

function isSpec(s: SpecTree): s is ParameterSpec {
  return s !== undefined && 'parameter' in s && s.parameter === true;
}

/** Every spec of a tree, in the order of its keys. */
export function specsOf(tree: SpecTree): ParameterSpec[] {
  return isSpec(tree) ? [tree] : Object.values(tree ?? {}).flatMap(specsOf);
}

/** Number of parameters of a tree, without making it. */
export function countParameters(tree: SpecTree): number {
  return specsOf(tree).reduce((n, s) => n + sizeOf(s), 0);
}

/** The parts of a tree whose gradients lie together. */
function partsOf(tree: SpecTree): readonly SpecTree[] {
  return isSpec(tree) ? [tree] : Object.values(tree ?? {}).flatMap((part: SpecTree) => (Array.isArray(part) ? part : [part]));
}

function mapTree<S extends SpecTree>(tree: S, tensors: ReadonlyMap<ParameterSpec, Weight>): Tensors<S> {
  const map = (s: SpecTree): unknown => {
    if (isSpec(s)) return tensors.get(s);
    if (s === undefined) return undefined;
    return Array.isArray(s) ? s.map(map) : Object.fromEntries(Object.entries(s).map(([k, v]) => [k, map(v)]));
  };
  return map(tree) as Tensors<S>;
}

/** The places in `tensors`, which is the tree of `tree`, of matrices that only `linear` reads. */
function placesOf(tree: SpecTree, tensors: unknown): LinearPlace[] {
  if (isSpec(tree)) return [];
  const holder = tensors as Record<string, Weight>;
  return Object.entries(tree ?? {}).flatMap(([key, spec]: [string, SpecTree]): LinearPlace[] => {
    if (!isSpec(spec)) return placesOf(spec, holder[key]);
    if (!('linear' in spec)) return [];
    return [
      {
        name: spec.name,
        shape: spec.shape as readonly [number, number],
        get weight() {
          return holder[key]!;
        },
        set weight(weight) {
          holder[key] = weight;
        },
      },
    ];
  });
}

/**
 * Makes the parameters of a tree, on the current device.
 * @throws ConfigError where parameters of few bits are to be trained.
 */
export function createParameters<S extends SpecTree>(tree: S, options: ParameterOptions = {}): Parameters<S> {
  // All of them or none: where one finds no room, the scope frees the others.
  return keep(scope(() => makeParameters(tree, options)));
}

function makeParameters<S extends SpecTree>(tree: S, options: ParameterOptions): Parameters<S> {
  const { trainable = true, seed, dtype = currentDevice() === 'cpu' ? 'f32' : 'bf16', master = true } = options;
  const { weights: format } = options;
  const few = (s: ParameterSpec): s is WeightSpec => format !== undefined && 'linear' in s;
  if (trainable && format !== undefined) {
    throw new ConfigError(
      `parameters: weights are ${format}, which cannot be trained; leave weights out, or give trainable: false`,
      {
        code: 'ERR_CONFIG',
        op: 'parameters',
        argument: 'weights',
      },
    );
  }
  const parts = partsOf(tree).map(specsOf);
  const lengths = parts.map((part) =>
    roundUp(
      part.reduce((n, s) => n + (few(s) ? 0 : padded(sizeOf(s))), 0),
      momentBlock,
    ),
  );
  const size = lengths.reduce((a, b) => a + b, 0);
  const zeros = (type: 'f32' | 'bf16'): Tensor => {
    const t = empty([size], type);
    fill_(t, 0);
    return t;
  };
  const mastered = trainable && master;
  const values = zeros(mastered ? 'f32' : dtype);
  const copies = mastered && dtype === 'bf16' ? zeros('bf16') : undefined;
  const decay = new Uint8Array(size / block);
  const tensors = new Map<ParameterSpec, Weight>();
  const list: NamedParameter[] = [];
  const weights: QuantizedParameter[] = [];
  const groups: ParameterGroup[] = [];
  let start = 0;
  for (const [part, specs] of parts.entries()) {
    const length = lengths[part]!;
    let offset = start;
    for (const spec of specs) {
      const stream = tensors.size;
      if (few(spec)) {
        const made = createQuantized(spec.name, spec.shape as readonly [number, number], format!);
        if (seed !== undefined) scope(() => quantize_(made.weight, drawn(spec, seed, stream)));
        tensors.set(spec, made.weight);
        weights.push(made);
        continue;
      }
      const count = sizeOf(spec);
      const t = viewOf(copies ?? values, spec.shape, offset);
      if (seed !== undefined) initialise(values, offset, spec, seed, stream);
      if (spec.decay) decay.fill(1, offset / block, (offset + padded(count)) / block);
      tensors.set(spec, t);
      list.push({ name: spec.name, tensor: t, decay: spec.decay, offset });
      offset += padded(count);
    }
    if (trainable && specs.length > 0)
      groups.push(groupOf(list.slice(-specs.length), { offset: start, size: length, rate: specs[0]!.rate ?? 1 }));
    start += length;
  }
  const refresh = (): void => {
    if (copies !== undefined) copy_(copies, values);
  };
  refresh();
  const writers = new Map<string, (from: number, data: Float32Array | Uint16Array) => void>();
  for (const { name, offset } of list) writers.set(name, (from, data) => writeValues(values, offset + from, data));
  for (const { name, write } of weights) {
    writers.set(name, (from, data) => write(from, data instanceof Uint16Array ? widenBf16(data) : data));
  }
  const made = mapTree(tree, tensors);
  return {
    tree: made,
    list,
    weights,
    linears: placesOf(tree, made),
    values,
    copies,
    groups,
    decay,
    count: countParameters(tree),
    write(name, from, data) {
      writers.get(name)!(from, data);
    },
    refresh,
    dispose() {
      for (const { tensor } of list) tensor.dispose();
      for (const parameter of weights) parameter.dispose();
      values.dispose();
      copies?.dispose();
    },
  };
}

function writeValues(values: Tensor, at: number, data: Float32Array | Uint16Array): void {
  if ((values.dtype === 'f32') === data instanceof Float32Array) writeAt(values, at, data);
  else scope(() => copy_(viewOf(values, [data.length], at), tensor(data)));
}

function groupOf(list: readonly NamedParameter[], place: Omit<ParameterGroup, 'gradient'>): ParameterGroup {
  const { offset, size } = place;
  const gaps = size > list.reduce((n, { tensor }) => n + tensor.size, 0);
  let flat: Tensor | undefined;
  let users = 0;
  const take = (): Tensor => {
    if (flat === undefined) {
      flat = withDevice(list[0]!.tensor.device, () => keep(empty([size])));
      if (gaps) fill_(flat, 0);
    }
    return flat;
  };
  const sinks = list.map(({ tensor, offset: at }): GradientSink => {
    let view: Tensor | undefined;
    return {
      written: false,
      tensor() {
        if (view === undefined) {
          view = keep(viewOf(take(), tensor.shape, at - offset));
          users++;
        }
        return view;
      },
      drop() {
        this.written = false;
        if (view === undefined) return;
        view.dispose();
        view = undefined;
        if (--users > 0) return;
        flat?.dispose();
        flat = undefined;
      },
    };
  });
  for (const [i, { tensor }] of list.entries()) withSink(tensor, sinks[i]!);
  return {
    ...place,
    gradient() {
      for (const sink of sinks) {
        const gradient = sink.tensor();
        if (!sink.written) fill_(gradient, 0);
      }
      return take();
    },
  };
}

/** The same values whatever they are kept in: those of fewer bits are rounded from f32. */
function initialise(values: Tensor, offset: number, spec: ParameterSpec, seed: number, stream: number): void {
  scope(() => {
    const place = viewOf(values, spec.shape, offset);
    if (spec.std === 0) return spec.start === 0 ? undefined : fill_(place, spec.start);
    if (values.dtype === 'f32') drawn(spec, seed, stream, place);
    else copy_(place, drawn(spec, seed, stream));
  });
}

function drawn(spec: ParameterSpec, seed: number, stream: number, into: Tensor = empty(spec.shape)): Tensor {
  randomNormal_(into, seed, stream, spec.std);
  return into;
}
