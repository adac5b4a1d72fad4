// Parameters as plain trees. All values lie in one flat tensor. Gradients lie flat by group, so that an update takes few calls, and a
// group takes memory only from its backward pass to the update: activations that are freed on the way make room for it.
import { fill_ } from '../ops/elementwise.ts';
import { randomNormal_ } from '../ops/random.ts';
import { withDevice } from '../tensor/engine.ts';
import { keep } from '../tensor/scope.ts';
import { empty, type GradientSink, type Tensor, viewOf, withSink } from '../tensor/tensor.ts';

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
  /** All values, f32; each parameter starts at a multiple of 64 elements, with zeros between. */
  readonly values: Tensor;
  /** They cover all values in order: an entry of the tree is a group, and so is each element of a list. Empty for frozen parameters. */
  readonly groups: readonly ParameterGroup[];
  /** For each block of 64 values, 1 where weight decay holds. */
  readonly decay: Uint8Array;
  /** Number of parameters, padding left out. */
  readonly count: number;
  dispose(): void;
}

/** Each parameter starts at a multiple of this many elements. */
export const block = 64;
const padded = (n: number): number => Math.ceil(n / block) * block;
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

/**
 * Makes the parameters of a tree.
 * @param options.trainable with gradients. Default true.
 * @param options.seed initial values; undefined leaves all values zero, for loading into.
 */
export function createParameters<S extends SpecTree>(
  tree: S,
  options: { trainable?: boolean; seed?: number } = {},
): Parameters<S> {
  const { trainable = true, seed } = options;
  const specs = specsOf(tree);
  const size = specs.reduce((n, s) => n + padded(sizeOf(s)), 0);
  const values = keep(empty([size]));
  fill_(values, 0);
  const decay = new Uint8Array(size / block);
  const tensors = new Map<ParameterSpec, Tensor>();
  const list: NamedParameter[] = [];
  let offset = 0;
  for (const [index, spec] of specs.entries()) {
    const count = sizeOf(spec);
    const t = keep(viewOf(values, spec.shape, offset));
    if (seed !== undefined) initialise(t, spec, seed, index);
    if (spec.decay) decay.fill(1, offset / block, (offset + padded(count)) / block);
    tensors.set(spec, t);
    list.push({ name: spec.name, tensor: t, decay: spec.decay, offset });
    offset += padded(count);
  }
  const groups: ParameterGroup[] = [];
  let done = 0;
  for (const part of trainable ? partsOf(tree) : []) {
    const members = list.slice(done, done + specsOf(part).length);
    if (members.length > 0) groups.push(groupOf(members));
    done += members.length;
  }
  return {
    tree: mapTree(tree, tensors),
    list,
    values,
    groups,
    decay,
    count: countParameters(tree),
    dispose() {
      for (const { tensor } of list) tensor.dispose();
      values.dispose();
    },
  };
}

function groupOf(list: readonly NamedParameter[]): ParameterGroup {
  const offset = list[0]?.offset ?? 0;
  const size = list.reduce((n, { tensor }) => n + padded(tensor.size), 0);
  const gaps = list.some(({ tensor }) => tensor.size % block !== 0);
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

function initialise(t: Tensor, spec: ParameterSpec, seed: number, stream: number): void {
  if (spec.std > 0) randomNormal_(t, seed, stream, spec.std);
  else if (spec.start !== 0) fill_(t, spec.start);
}
