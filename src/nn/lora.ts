// Adapters of low rank beside the frozen matrices of a model: LoRA (arXiv 2106.09685), rsLoRA (2312.03732), DoRA (2402.09353), LoRA+
// (2402.12354), OLoRA (2406.01775).   N rows of a weight, K columns, R rank

import { add, cast, copy_, scale, sub } from '../ops/elementwise.ts';
import { adaptedNorms, linear } from '../ops/linear.ts';
import { type LowRank, rowSquares, scaleColumns } from '../ops/lora.ts';
import { dequantize, isAdapted, isQuantized, type QuantizedWeight } from '../ops/quant.ts';
import { slice, transpose } from '../ops/view.ts';
import { checkObject } from '../tensor/argument.ts';
import { withDevice } from '../tensor/engine.ts';
import { ConfigError } from '../tensor/errors.ts';
import { checkSeed, randomBlock, uniform } from '../tensor/random.ts';
import { keep, scope } from '../tensor/scope.ts';
import { noGrad } from '../tensor/tape.ts';
import { empty, readAs, type Tensor, tensor, viewOf } from '../tensor/tensor.ts';
import {
  createParameters,
  type LinearPlace,
  matrix,
  type ParameterSpec,
  type Parameters,
  type SpecTree,
  vector,
} from './parameters.ts';
import { orthonormalColumns } from './qr.ts';

/** What an adapter is; the names in parentheses are those of PEFT's configuration. */
export interface AdapterOptions {
  /** `dora` trains the lengths of a weight's rows apart from their directions. Default `lora`. (use_dora) */
  readonly kind?: 'lora' | 'dora';
  /** Default 8. (r) */
  readonly rank?: number;
  /** The change is alpha / rank times B A. Default 16. (lora_alpha) */
  readonly alpha?: number;
  /** The change is alpha / √rank times B A instead, so that it does not fade as the rank grows. Default false. (use_rslora) */
  readonly rankStabilized?: boolean;
  /**
   * Which matrices: `all-linear`, or patterns. A pattern is the end of a name (`q_proj`, `self_attn.q_proj`), or, where it holds a `*`,
   * the whole name with `*` for any part of it (`*.mlp.*`). Names are those of checkpoints, without `.weight`. Default `all-linear`.
   * (target_modules)
   */
  readonly targets?: string | readonly string[];
  /** Learning rate of B beside that of A (LoRA+; 16 there). Default 1. */
  readonly ratio?: number;
  /**
   * Initial values. `zero`: A uniform in ±1/√K, B zero. `olora`: B and A are the first columns and rows of the QR decomposition of the
   * weight; their product is taken away beside the weight, so that the function begins unchanged and the weight never changes. Default
   * `zero`. (init_lora_weights)
   */
  readonly init?: 'zero' | 'olora';
  /** Share of the numbers that A reads that are dropped in training, see {@link withDropout}. Default 0. (lora_dropout) */
  readonly dropout?: number;
  /** Of the initial values and of dropout. Default 0. */
  readonly seed?: number;
}

/** A model as far as adapters need it. */
export interface Adaptable {
  readonly parameters: Pick<Parameters<SpecTree>, 'linears' | 'groups'>;
}

/** A trained correction of some matrices of a frozen model. */
export interface Adapter {
  readonly options: Required<AdapterOptions>;
  /** What is trained, for an optimizer: `<module>.lora_A.weight` [R K], `.lora_B.weight` [N R], `.lora_magnitude_vector` [N]. */
  readonly parameters: Parameters<SpecTree>;
  /** By the name of the matrix, without `.weight`. */
  readonly weights: ReadonlyMap<string, LowRank>;
  /** Whether its change is added to the model's own weights now, see {@link mergeAdapter}. */
  readonly merged: boolean;
  /** Frees its tensors; a model that uses it goes back to its own weights. */
  dispose(): void;
}

/** @internal The parts that change. */
export interface LiveAdapter extends Adapter {
  weights: Map<string, Mutable<LowRank>>;
  merged: boolean;
  /** Lengths of rows before they were scaled, by matrix: what undoes a merge of DoRA. */
  readonly lengths: Map<string, Tensor>;
}
type Mutable<T> = { -readonly [K in keyof T]: T[K] };

const refuse = (argument: string, actual: unknown, expected: string): never => {
  throw new ConfigError(`adapter: ${argument} is ${String(actual)}, expected ${expected}`, {
    code: 'ERR_CONFIG',
    op: 'adapter',
    argument,
    expected,
    actual: String(actual),
  });
};

/** The module that a matrix belongs to: its name without `.weight`. */
export const moduleOf = (name: string): string => name.replace(/\.weight$/, '');

/**
 * The matrices that a choice of targets means, in the model's order.
 * @throws ConfigError for a pattern that means none.
 */
export function targetsOf(linears: readonly LinearPlace[], targets: string | readonly string[]): LinearPlace[] {
  if (targets === 'all-linear') return [...linears];
  const chosen = new Set<LinearPlace>();
  for (const pattern of typeof targets === 'string' ? [targets] : targets) {
    const found = pattern === 'all-linear' ? linears : linears.filter(({ name }) => fits(moduleOf(name), pattern));
    if (found.length === 0) {
      const known = [...new Set(linears.map(({ name }) => moduleOf(name).split('.').at(-1)))].join(', ');
      refuse('targets', `'${pattern}', which is no matrix of this model`, `'all-linear' or patterns such as ${known}`);
    }
    for (const place of found) chosen.add(place);
  }
  if (chosen.size === 0) refuse('targets', 'empty', "'all-linear' or at least one pattern");
  return linears.filter((place) => chosen.has(place));
}

function fits(module: string, pattern: string): boolean {
  if (!pattern.includes('*')) return module === pattern || module.endsWith(`.${pattern}`);
  const parts = pattern.split('*').map((part) => part.replace(/[.+?^${}()|[\]\\]/g, '\\$&'));
  return new RegExp(`^${parts.join('.*')}$`).test(module);
}

/** Fills in defaults. @throws ConfigError naming the field. */
export function adapterOptions(given: AdapterOptions): Required<AdapterOptions> {
  const options = {
    kind: 'lora',
    rank: 8,
    alpha: 16,
    rankStabilized: false,
    targets: 'all-linear',
    ratio: 1,
    init: 'zero',
    dropout: 0,
    seed: 0,
    ...Object.fromEntries(Object.entries(given).filter(([, value]) => value !== undefined)),
  } as Required<AdapterOptions>;
  const { kind, rank, alpha, ratio, init, dropout } = options;
  if (kind !== 'lora' && kind !== 'dora') refuse('kind', `'${String(kind)}'`, "'lora' or 'dora'");
  if (!(Number.isInteger(rank) && rank >= 1)) refuse('rank', rank, 'a whole number of 1 or more');
  if (!(alpha > 0 && Number.isFinite(alpha))) refuse('alpha', alpha, 'a number above 0');
  if (!(ratio > 0 && Number.isFinite(ratio))) refuse('ratio', ratio, 'a number above 0');
  if (!(dropout >= 0 && dropout < 1)) refuse('dropout', dropout, 'from 0 to below 1');
  if (init !== 'zero' && init !== 'olora') refuse('init', `'${String(init)}'`, "'zero' or 'olora'");
  if (init === 'olora' && kind === 'dora') refuse('init', "'olora' with kind 'dora'", "'zero' with 'dora'");
  checkSeed(options.seed);
  return options;
}

/**
 * Makes an adapter beside a frozen model (f32, bf16, fp8, q8 or q4), and puts it to use there. At first it changes nothing.
 * @throws ConfigError for options that are out of range, targets that the model lacks, and models that are trainable.
 */
export async function createAdapter(model: Adaptable, options: AdapterOptions = {}): Promise<Adapter> {
  checkObject('createAdapter', 'model', model, 'a model, as createModel and loadModel give it', 'parameters');
  const full = adapterOptions(options);
  if (model.parameters.groups.length > 0) refuse('model', 'trainable', 'a frozen model; load or create it with trainable: false');
  const places = targetsOf(model.parameters.linears, full.targets);
  const adapter = makeAdapter(model, full, places.map(moduleNameOf));
  try {
    await fill(adapter, places);
  } catch (error) {
    adapter.dispose();
    throw error;
  }
  setAdapter(model, adapter);
  return adapter;
}

/** @internal An adapter whose values nobody looks at, in use in a model, for rehearsals. @throws ConfigError like {@link createAdapter} */
export function blankAdapter(model: Adaptable, options: AdapterOptions): Adapter {
  const full = adapterOptions(options);
  const adapter = makeAdapter(model, full, targetsOf(model.parameters.linears, full.targets).map(moduleNameOf));
  if (full.init === 'olora') for (const lowRank of adapter.weights.values()) rememberStart(lowRank);
  setAdapter(model, adapter);
  return adapter;
}

const moduleNameOf = ({ name }: LinearPlace): string => moduleOf(name);

/** Rank and scale of one matrix, where they are not those of the options. */
export type OwnRank = Pick<LowRank, 'scale'> & { readonly rank: number };

/** @internal An adapter whose trained values are all zero. @param own of matrices, by their names */
export function makeAdapter(
  model: Adaptable,
  options: Required<AdapterOptions>,
  modules: readonly string[],
  trainable = true,
  own?: ReadonlyMap<string, OwnRank>,
): LiveAdapter {
  const { rank, alpha, kind, ratio } = options;
  const rankOf = (module: string): number => own?.get(module)?.rank ?? rank;
  const scaleOf = (module: string): number =>
    own?.get(module)?.scale ?? (options.rankStabilized ? alpha / Math.sqrt(rank) : alpha / rank);
  const places = new Map(model.parameters.linears.map((place) => [moduleOf(place.name), place]));
  const chosen = modules.map((module) => ({ module, place: places.get(module)! }));
  const specs = (of: (module: string, n: number, k: number) => ParameterSpec): Record<string, ParameterSpec> =>
    Object.fromEntries(chosen.map(({ module, place: { shape } }) => [module, of(module, ...shape)]));
  const tree = {
    a: specs((module, _, k) => matrix(`${module}.lora_A.weight`, [rankOf(module), k], 0)),
    b: specs((module, n) => ({ ...matrix(`${module}.lora_B.weight`, [n, rankOf(module)], 0), rate: ratio })),
    magnitude: kind === 'dora' ? specs((module, n) => vector(`${module}.lora_magnitude_vector`, n, 0)) : {},
  };
  const device = deviceOf(chosen[0]!.place);
  const parameters = withDevice(device, () => createParameters(tree, { trainable }));
  const weights = new Map<string, Mutable<LowRank>>();
  const adapter: LiveAdapter = {
    options,
    parameters,
    weights,
    merged: false,
    lengths: new Map(),
    dispose() {
      for (const place of model.parameters.linears)
        if (isAdapted(place.weight) && weights.get(moduleOf(place.name)) === place.weight.lowRank) place.weight = baseOf(place);
      for (const { start, direction } of weights.values()) for (const t of [start?.a, start?.b, direction?.squares]) t?.dispose();
      for (const t of adapter.lengths.values()) t.dispose();
      adapter.lengths.clear();
      parameters.dispose();
    },
  };
  try {
    for (const { module, place } of chosen) {
      const magnitude = parameters.tree.magnitude[module];
      weights.set(module, {
        a: parameters.tree.a[module]!,
        b: parameters.tree.b[module]!,
        scale: scaleOf(module),
        direction:
          magnitude === undefined ? undefined : { magnitude, squares: scope(() => keep(rowSquares(wide(baseOf(place))))) },
      });
    }
  } catch (error) {
    adapter.dispose();
    throw error;
  }
  return adapter;
}

const baseOf = ({ weight }: LinearPlace): Tensor | QuantizedWeight => (isAdapted(weight) ? weight.base : weight);
const deviceOf = (place: LinearPlace) => {
  const base = baseOf(place);
  return (isQuantized(base) ? base.codes : base).device;
};

/** @internal The lengths of the rows of a weight, without an adapter. */
export async function rowLengths(place: LinearPlace): Promise<Float32Array> {
  const squares: Tensor = scope(() => keep(rowSquares(wide(baseOf(place)))));
  const values = await readAs(squares, 'f32').finally(() => squares.dispose());
  return values.map(Math.sqrt);
}

/** A weight as a tensor of f32, which the caller's scope frees. */
function wide(w: Tensor | QuantizedWeight): Tensor {
  return isQuantized(w) ? dequantize(w) : cast(w, 'f32');
}

/** Initial values. */
async function fill(adapter: LiveAdapter, places: readonly LinearPlace[]): Promise<void> {
  const { options, parameters, weights } = adapter;
  for (const [index, place] of places.entries()) {
    const module = moduleOf(place.name);
    const [n, k] = place.shape;
    if (options.init === 'olora') {
      if (options.rank > Math.min(n, k))
        refuse('rank', options.rank, `at most ${Math.min(n, k)}, the rank of '${module}', with init 'olora'`);
      const { a, b } = await orthonormal(baseOf(place), options.rank);
      parameters.write(`${module}.lora_A.weight`, 0, a);
      parameters.write(`${module}.lora_B.weight`, 0, b);
    } else {
      parameters.write(`${module}.lora_A.weight`, 0, uniformValues(options.rank * k, 1 / Math.sqrt(k), options.seed, index));
    }
  }
  parameters.refresh();
  if (options.init === 'olora') for (const lowRank of weights.values()) rememberStart(lowRank);
  if (options.kind === 'lora') return;
  for (const place of places) {
    const module = moduleOf(place.name);
    const { offset } = parameters.list.find(({ name }) => name === `${module}.lora_magnitude_vector`)!;
    scope(() => {
      // B is zero: the lengths of the weight's own rows.
      const norms = adaptedNorms({ base: baseOf(place), lowRank: weights.get(module)! });
      copy_(viewOf(parameters.values, [place.shape[0]], offset), norms);
    });
  }
  parameters.refresh();
}

/** @internal Copies A and B as they are now: what is taken away from then on. */
export function rememberStart(lowRank: Mutable<LowRank>): void {
  const copyOf = (t: Tensor): Tensor =>
    withDevice(t.device, () => {
      const made = empty(t.shape, t.dtype);
      copy_(made, t);
      return made;
    });
  lowRank.start = keep(scope(() => ({ a: copyOf(lowRank.a), b: copyOf(lowRank.b) })));
}

function uniformValues(size: number, limit: number, seed: number, stream: number): Float32Array {
  const values = new Float32Array(size);
  const block = new Uint32Array(4);
  for (let i = 0; i < size; i++) {
    if (i % 4 === 0) randomBlock(seed, stream, i / 4, block);
    values[i] = (2 * uniform(block[i % 4]!) - 1) * limit;
  }
  return values;
}

/** Q[:, :R] [N R] and R[:R] [R K] of W = Q R. The first columns of Q are those of the first columns of W, and R is Qᵀ W. */
async function orthonormal(w: Tensor | QuantizedWeight, rank: number): Promise<{ a: Float32Array; b: Float32Array }> {
  const columns: Tensor = scope(() => noGrad(() => slice(wide(w), 0, rank, 1)));
  const [n = 0] = columns.shape;
  const b = orthonormalColumns(await readAs(columns, 'f32'), n, rank);
  const device = columns.device;
  columns.dispose();
  const rows: Tensor = withDevice(device, () =>
    scope(() => noGrad(() => cast(linear(transpose(tensor(b, [n, rank])), transpose(wide(w))), 'f32'))),
  );
  const a = await readAs(rows, 'f32').finally(() => rows.dispose());
  return { a, b };
}

/**
 * Puts an adapter to use in a model, in place of the one that is; null for none: the model as it was.
 * @throws ConfigError when a matrix that it adapts is missing in the model or has another shape, or when it is merged.
 */
export function setAdapter(model: Adaptable, adapter: Adapter | null): void {
  const { linears, groups } = model.parameters;
  if (adapter !== null) {
    if (adapter.merged) refuse('adapter', 'merged into its model', 'one that is not; unmergeAdapter() takes it out again');
    if (groups.length > 0) refuse('model', 'trainable', 'a frozen model; load or create it with trainable: false');
    const shapes = new Map(linears.map(({ name, shape }) => [moduleOf(name), shape]));
    for (const [module, { a, b }] of adapter.weights) checkShape(module, shapes.get(module), b.shape[0]!, a.shape[1]!);
  }
  for (const place of linears) {
    const lowRank = adapter?.weights.get(moduleOf(place.name));
    const base = baseOf(place);
    place.weight = lowRank === undefined ? base : { base, lowRank };
  }
}

/** @internal @throws ConfigError unless a model's matrix is [n k]. */
export function checkShape(module: string, shape: readonly [number, number] | undefined, n: number, k: number): void {
  if (shape?.[0] === n && shape[1] === k) return;
  const found = shape === undefined ? 'missing in this model' : `[${shape.join(' ')}] in this model`;
  refuse(`'${module}'`, found, `[${n} ${k}]: the adapter was made for another base`);
}

/** The adapter's part of a model while `f` runs; then what was in use before. `f` must not be async. */
export function withAdapter<T>(model: Adaptable, adapter: Adapter | null, f: () => T): T {
  const before = model.parameters.linears.map((place) => place.weight);
  setAdapter(model, adapter);
  try {
    return f();
  } finally {
    for (const [i, place] of model.parameters.linears.entries()) place.weight = before[i]!;
  }
}

/**
 * Drops numbers while `f` runs, as the adapter's options say: which ones depends on its seed and on `pass`, so that a pass can be
 * repeated to the bit. Nothing is dropped outside of it.
 * @param pass number of the micro-batch
 */
export function withDropout<T>(adapter: Adapter, pass: number, f: () => T): T {
  setDropout(adapter, pass);
  try {
    return f();
  } finally {
    setDropout(adapter, undefined);
  }
}

/** @internal Drops as {@link withDropout} does from now on; undefined: no more. */
export function setDropout(adapter: Adapter, pass: number | undefined): void {
  const { dropout: rate, seed } = adapter.options;
  const all = [...(adapter as LiveAdapter).weights.values()];
  for (const [i, lowRank] of all.entries())
    lowRank.dropout = rate === 0 || pass === undefined ? undefined : { rate, seed, stream: pass * all.length + i };
}

/**
 * Adds the adapter's change to the model's own weights, where it costs nothing any more, and takes it out of use. The model is then an
 * ordinary one: it can be saved and exported.
 * @throws ConfigError for weights of few bits, which cannot take the change: load the base in f32 or bf16.
 */
export function mergeAdapter(model: Adaptable, adapter: Adapter): void {
  if (adapter.merged) refuse('adapter', 'merged already', 'one that is not');
  const live = adapter as LiveAdapter;
  const bases = mergeable(model, live);
  setAdapter(model, adapter);
  setAdapter(model, null);
  for (const [module, base] of bases) {
    const lowRank = live.weights.get(module)!;
    scope(() =>
      noGrad(() => {
        const norms = lowRank.direction === undefined ? undefined : keep(adaptedNorms({ base, lowRank }));
        if (norms !== undefined) live.lengths.set(module, norms);
        copy_(base, changed(base, lowRank, norms));
      }),
    );
  }
  live.merged = true;
}

/** A weight with an adapter's change [N K], f32. @param norms lengths of the rows of their sum, where they get others */
function changed(base: Tensor | QuantizedWeight, lowRank: LowRank, norms: Tensor | undefined): Tensor {
  const sum = add(wide(base), changeOf(lowRank));
  return norms === undefined ? sum : scaleRows(sum, cast(lowRank.direction!.magnitude, 'f32'), norms);
}

/**
 * @internal The matrix that a place computes with [N K], f32: the model's own weight with the change of the adapter in use. Undefined where
 * none is. The caller frees it.
 */
export function mergedWeight({ weight }: LinearPlace): Tensor | undefined {
  if (!isAdapted(weight)) return undefined;
  const { base, lowRank } = weight;
  return scope(() => noGrad(() => keep(changed(base, lowRank, lowRank.direction && adaptedNorms({ base, lowRank })))));
}

/**
 * Takes a merged adapter out of the model's weights again, within the rounding of their dtype.
 * @throws ConfigError when it is not merged.
 */
export function unmergeAdapter(model: Adaptable, adapter: Adapter): void {
  if (!adapter.merged) refuse('adapter', 'not merged', 'one that mergeAdapter() took');
  const live = adapter as LiveAdapter;
  for (const [module, base] of mergeable(model, live)) {
    const lowRank = live.weights.get(module)!;
    scope(() =>
      noGrad(() => {
        const norms = live.lengths.get(module);
        const sum = norms === undefined ? wide(base) : scaleRows(wide(base), norms, cast(lowRank.direction!.magnitude, 'f32'));
        copy_(base, sub(sum, changeOf(lowRank)));
      }),
    );
    live.lengths.get(module)?.dispose();
  }
  live.lengths.clear();
  live.merged = false;
}

function mergeable(model: Adaptable, adapter: LiveAdapter): Map<string, Tensor> {
  const bases = new Map<string, Tensor>();
  for (const place of model.parameters.linears) {
    const base = baseOf(place);
    const module = moduleOf(place.name);
    if (!adapter.weights.has(module)) continue;
    if (isQuantized(base)) refuse('model', `of ${base.format} weights`, 'one of f32 or bf16, to which the change can be added');
    else bases.set(module, base);
  }
  return bases;
}

/** s (B A - B₀ A₀) [N K], f32. */
function changeOf({ a, b, scale: s, start }: LowRank): Tensor {
  const product = (x: Tensor, y: Tensor): Tensor => linear(cast(x, 'f32'), transpose(cast(y, 'f32')));
  const change = start === undefined ? product(b, a) : sub(product(b, a), product(start.b, start.a));
  return scale(change, s);
}

/** Row i times to[i] / from[i]. */
function scaleRows(w: Tensor, to: Tensor, from: Tensor): Tensor {
  return transpose(scaleColumns(transpose(w), to, from));
}
