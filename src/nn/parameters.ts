// Parameters as plain trees. All values lie in one flat tensor, all gradients in another, so that the optimizer makes one pass.
import { fill_ } from '../ops/elementwise.ts';
import { randomNormal_ } from '../ops/random.ts';
import { keep } from '../tensor/scope.ts';
import { empty, parameter, type Tensor, viewOf } from '../tensor/tensor.ts';

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

/** Parameters that exist. */
export interface Parameters<S extends SpecTree> {
  readonly tree: Tensors<S>;
  readonly list: readonly NamedParameter[];
  /** All values, f32; each parameter starts at a multiple of 64 elements, with zeros between. */
  readonly values: Tensor;
  /** All gradients in the same order; undefined for frozen parameters. */
  readonly gradients: Tensor | undefined;
  /** For each block of 64 values, 1 where weight decay holds. */
  readonly decay: Uint8Array;
  /** Number of parameters, padding left out. */
  readonly count: number;
  dispose(): void;
}

const block = 64;
const padded = (n: number): number => Math.ceil(n / block) * block;

function isSpec(s: SpecTree): s is ParameterSpec {
  return 'parameter' in s && s.parameter === true;
}

/** Every spec of a tree, in the order of its keys. */
export function specsOf(tree: SpecTree): ParameterSpec[] {
  return isSpec(tree) ? [tree] : Object.values(tree).flatMap(specsOf);
}

/** Number of parameters of a tree, without making it. */
export function countParameters(tree: SpecTree): number {
  return specsOf(tree).reduce((n, s) => n + s.shape.reduce((a, b) => a * b, 1), 0);
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
  const size = specs.reduce((n, s) => n + padded(s.shape.reduce((a, b) => a * b, 1)), 0);
  const zeros = (): Tensor => {
    const t = keep(empty([size]));
    fill_(t, 0);
    return t;
  };
  const values = zeros();
  const gradients = trainable ? zeros() : undefined;
  const decay = new Uint8Array(size / block);
  const tensors = new Map<ParameterSpec, Tensor>();
  const list: NamedParameter[] = [];
  let offset = 0;
  for (const [index, spec] of specs.entries()) {
    const count = spec.shape.reduce((a, b) => a * b, 1);
    const t = keep(viewOf(values, spec.shape, offset));
    if (seed !== undefined) initialise(t, spec, seed, index);
    if (gradients !== undefined) parameter(t, keep(viewOf(gradients, spec.shape, offset)));
    if (spec.decay) decay.fill(1, offset / block, (offset + padded(count)) / block);
    tensors.set(spec, t);
    list.push({ name: spec.name, tensor: t, decay: spec.decay, offset });
    offset += padded(count);
  }
  return {
    tree: mapTree(tree, tensors),
    list,
    values,
    gradients,
    decay,
    count: countParameters(tree),
    dispose() {
      for (const { tensor } of list) {
        const gradient = tensor.sink?.tensor;
        tensor.dispose();
        gradient?.dispose();
      }
      values.dispose();
      gradients?.dispose();
    },
  };
}

function initialise(t: Tensor, spec: ParameterSpec, seed: number, stream: number): void {
  if (spec.std > 0) randomNormal_(t, seed, stream, spec.std);
  else if (spec.start !== 0) fill_(t, spec.start);
}
