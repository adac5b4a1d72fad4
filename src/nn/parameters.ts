// Parameters as plain trees. All values lie in one flat tensor. Gradients lie flat by group, so that an update takes few calls, and a
// group takes memory only from its backward pass to the update: activations that are freed on the way make room for it.
import { copy_, fill_ } from '../ops/elementwise.ts';
import { momentBlock } from '../ops/optimizer.ts';
import { randomNormal_ } from '../ops/random.ts';
import { currentDevice, withDevice } from '../tensor/engine.ts';
import { keep, scope } from '../tensor/scope.ts';
import { empty, type GradientSink, type Tensor, tensor, viewOf, withSink, writeAt } from '../tensor/tensor.ts';

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
}

/** A tree of parameters: objects and arrays with {@link ParameterSpec} leaves. */
export type SpecTree = ParameterSpec | readonly SpecTree[] | { readonly [key: string]: SpecTree };

/** The tree of tensors that belongs to a tree of specs. */
export type Tensors<S> = S extends ParameterSpec
  ? Tensor
  : S extends readonly (infer E)[]
    ? readonly Tensors<E>[]
    : { readonly [K in keyof S]: Tensors<S[K]> };

/** A matrix: normal initial values, decayed. */
export function matrix(name: string, shape: readonly number[], std: number): ParameterSpec {
  return { parameter: true, name, shape, std, start: 0, decay: true };
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
  /** Their gradients [size] in the same order, zero where nothing wrote; they stay until zeroGrad(). */
  gradient(): Tensor;
}

/** Parameters that exist. */
export interface Parameters<S extends SpecTree> {
  readonly tree: Tensors<S>;
  readonly list: readonly NamedParameter[];
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
  /** Writes values from element `offset` of the flat tensor on, rounded where they are kept in bf16. {@link refresh} must follow. */
  write(offset: number, data: Float32Array): void;
  /** Makes the copies follow `values`. */
  refresh(): void;
  dispose(): void;
}

export interface ParameterOptions {
  /** With gradients. Default true. */
  readonly trainable?: boolean;
  /** Of the initial values; undefined leaves all values zero, for loading into. */
  readonly seed?: number | undefined;
  /** What the ops read. Default f32 on the CPU, bf16 on a GPU. */
  readonly dtype?: 'f32' | 'bf16' | undefined;
  /** Whether bf16 parameters that are trained are copies of f32 values, which the optimizer changes. Default true. */
  readonly master?: boolean | undefined;
}

/** Each parameter starts at a multiple of this many elements, and each group at a multiple of a block of 8-bit moments. */
export const block = 64;
const roundUp = (n: number, to: number): number => Math.ceil(n / to) * to;
const padded = (n: number): number => roundUp(n, block);
const sizeOf = ({ shape }: { readonly shape: readonly number[] }): number => shape.reduce((a, b) => a * b, 1);

function isSpec(s: SpecTree): s is ParameterSpec {
  return 'parameter' in s && s.parameter === true;
}

/** Every spec of a tree, in the order of its keys. */
export function specsOf(tree: SpecTree): ParameterSpec[] {
  return isSpec(tree) ? [tree] : Object.values(tree).flatMap(specsOf);
}

/** Number of parameters of a tree, without making it. */
export function countParameters(tree: SpecTree): number {
  return specsOf(tree).reduce((n, s) => n + sizeOf(s), 0);
}

/** The parts of a tree whose gradients lie together. */
function partsOf(tree: SpecTree): readonly SpecTree[] {
  return isSpec(tree) ? [tree] : Object.values(tree).flatMap((part: SpecTree) => (Array.isArray(part) ? part : [part]));
}

function mapTree<S extends SpecTree>(tree: S, tensors: ReadonlyMap<ParameterSpec, Tensor>): Tensors<S> {
  const map = (s: SpecTree): unknown => {
    if (isSpec(s)) return tensors.get(s);
    return Array.isArray(s) ? s.map(map) : Object.fromEntries(Object.entries(s).map(([k, v]) => [k, map(v)]));
  };
  return map(tree) as Tensors<S>;
}

/** Makes the parameters of a tree, on the current device. */
export function createParameters<S extends SpecTree>(tree: S, options: ParameterOptions = {}): Parameters<S> {
  const { trainable = true, seed, dtype = currentDevice() === 'cpu' ? 'f32' : 'bf16', master = true } = options;
  const parts = partsOf(tree).map(specsOf);
  const lengths = parts.map((part) =>
    roundUp(
      part.reduce((n, s) => n + padded(sizeOf(s)), 0),
      momentBlock,
    ),
  );
  const size = lengths.reduce((a, b) => a + b, 0);
  const zeros = (type: 'f32' | 'bf16'): Tensor => {
    const t = keep(empty([size], type));
    fill_(t, 0);
    return t;
  };
  const mastered = trainable && master;
  const values = zeros(mastered ? 'f32' : dtype);
  const copies = mastered && dtype === 'bf16' ? zeros('bf16') : undefined;
  const decay = new Uint8Array(size / block);
  const tensors = new Map<ParameterSpec, Tensor>();
  const list: NamedParameter[] = [];
  const groups: ParameterGroup[] = [];
  let start = 0;
  for (const [part, specs] of parts.entries()) {
    const length = lengths[part]!;
    let offset = start;
    for (const spec of specs) {
      const count = sizeOf(spec);
      const t = keep(viewOf(copies ?? values, spec.shape, offset));
      if (seed !== undefined) initialise(values, offset, spec, seed, list.length);
      if (spec.decay) decay.fill(1, offset / block, (offset + padded(count)) / block);
      tensors.set(spec, t);
      list.push({ name: spec.name, tensor: t, decay: spec.decay, offset });
      offset += padded(count);
    }
    if (trainable && specs.length > 0) groups.push(groupOf(list.slice(-specs.length), start, length));
    start += length;
  }
  const refresh = (): void => {
    if (copies !== undefined) copy_(copies, values);
  };
  refresh();
  return {
    tree: mapTree(tree, tensors),
    list,
    values,
    copies,
    groups,
    decay,
    count: countParameters(tree),
    write(at, data) {
      if (values.dtype === 'f32') writeAt(values, at, data);
      else scope(() => copy_(viewOf(values, [data.length], at), tensor(data)));
    },
    refresh,
    dispose() {
      for (const { tensor } of list) tensor.dispose();
      values.dispose();
      copies?.dispose();
    },
  };
}

function groupOf(list: readonly NamedParameter[], offset: number, size: number): ParameterGroup {
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
    offset,
    size,
    gradient() {
      for (const sink of sinks) {
        const gradient = sink.tensor();
        if (!sink.written) fill_(gradient, 0);
      }
      return take();
    },
  };
}

/** The same values whatever they are kept in: bf16 ones are rounded from f32. */
function initialise(values: Tensor, offset: number, spec: ParameterSpec, seed: number, stream: number): void {
  scope(() => {
    const place = viewOf(values, spec.shape, offset);
    if (spec.std === 0) return spec.start === 0 ? undefined : fill_(place, spec.start);
    const drawn = values.dtype === 'f32' ? place : empty(spec.shape);
    randomNormal_(drawn, seed, stream, spec.std);
    if (drawn !== place) copy_(place, drawn);
  });
}
