// Keys and values of the tokens that were read, so that generation computes each token once.
//   N sequences, R places of a ring, B rows of a pass, T tokens, H query heads, G key/value heads, D head size
import { type AttentionOptions, attention, attentionStep } from '../ops/attention.ts';
import { copy_ } from '../ops/elementwise.ts';
import { reshape, rows } from '../ops/reshape.ts';
import { ShapeError } from '../tensor/errors.ts';
import { keep, scope } from '../tensor/scope.ts';
import { noGrad } from '../tensor/tape.ts';
import { empty, type Tensor, tensor } from '../tensor/tensor.ts';
import { type BaseConfig, layerWindow } from './config.ts';

interface KeyValue {
  readonly key: Tensor;
  readonly value: Tensor;
}

/** Room for some sequences of up to `capacity` tokens each, for any model. */
export interface KeyValueCache {
  readonly sequences: number;
  readonly capacity: number;
  /** Tokens that are in each sequence. The model reads them, whoever calls it advances them; 0 begins a new text. */
  readonly lengths: Int32Array;
  /** Most tokens that each sequence will come to have, for models that turn long texts otherwise. At first the capacity. */
  readonly limits: Int32Array;
  /**
   * @internal For each layer [N R G D], made by its first pass. The key of position p lies at p mod R: R is the window of a local layer, the
   * capacity of a global one.
   */
  readonly layers: (KeyValue | undefined)[];
  dispose(): void;
}

/** Where the tokens of one pass go: row i of the batch continues sequence `sequences[i]`. */
export interface CacheRows {
  readonly cache: KeyValueCache;
  readonly sequences: readonly number[];
  /** The same [B], i32. */
  readonly index: Tensor;
}

/** @throws ShapeError when a size is no whole number from 1. */
export function createCache(sequences: number, capacity: number): KeyValueCache {
  for (const [name, size] of Object.entries({ sequences, capacity })) {
    if (!(Number.isInteger(size) && size >= 1)) refuse(`${name} is ${size}, expected a whole number from 1`);
  }
  const layers: (KeyValue | undefined)[] = [];
  return {
    sequences,
    capacity,
    lengths: new Int32Array(sequences),
    limits: new Int32Array(sequences).fill(capacity),
    layers,
    dispose() {
      for (const layer of layers.splice(0)) {
        layer?.key.dispose();
        layer?.value.dispose();
      }
    },
  };
}

/**
 * How many tokens of a sequence can stay when it is to go on after `length` of them: all of these, or none where a local layer has lost keys
 * that the next token would see. To set `cache.lengths` is left to the caller.
 */
export function reusable(cache: KeyValueCache, sequence: number, length: number): number {
  const now = cache.lengths[sequence]!;
  // A ring that went round holds its last R keys, of which the next token sees all but one.
  const whole = cache.layers.every((layer) => now <= (layer?.key.shape[1] ?? now));
  return length <= now && (whole || length >= now - 1) ? length : 0;
}

/** A cache of at least as many sequences and as much capacity, with what is in another; that is left to the caller. */
export function resized(
  from: KeyValueCache,
  config: Pick<BaseConfig, 'layerPattern' | 'window'>,
  sequences: number,
  capacity: number,
): KeyValueCache {
  const to = createCache(sequences, capacity);
  to.lengths.set(from.lengths);
  to.limits.set(from.limits);
  for (const [i, layer] of from.layers.entries()) {
    if (layer === undefined) continue;
    const [, before = 0, ...head] = layer.key.shape;
    const places = Math.min(layerWindow(config, i) ?? capacity, capacity);
    const copied = (old: Tensor): Tensor => {
      const fresh = keep(empty([sequences, places, ...head], old.dtype));
      for (const [n, length] of from.lengths.entries()) {
        // A ring has its size already, and keeps its turn.
        const count = Math.min(length, before);
        const part = (t: Tensor, size: number): Tensor => rows(reshape(t, [-1, ...head]), n * size, n * size + count);
        if (count > 0) copy_(part(fresh, places), part(old, before));
      }
      return fresh;
    };
    to.layers[i] = scope(() => noGrad(() => ({ key: copied(layer.key), value: copied(layer.value) })));
  }
  return to;
}

/**
 * Names the sequences of a pass; its tensor belongs to the scope around.
 * @param tokens new tokens of each, to be checked for room
 * @throws ShapeError for a sequence that is not there or named twice, or has no room left.
 */
export function cacheRows(cache: KeyValueCache, sequences: readonly number[], tokens: number): CacheRows {
  for (const [i, n] of sequences.entries()) {
    if (!(Number.isInteger(n) && n >= 0 && n < cache.sequences)) refuse(`there is no sequence ${n} among ${cache.sequences}`);
    if (sequences.indexOf(n) !== i) refuse(`sequence ${n} is named twice in one pass`);
    const length = cache.lengths[n]! + tokens;
    if (length > cache.capacity) refuse(`sequence ${n} would have ${length} tokens, there is room for ${cache.capacity}`);
  }
  return { cache, sequences, index: tensor(Int32Array.from(sequences)) };
}

/** What a layer attends to besides its own tokens: fields of a model's input. */
export interface Context {
  /** [B T], i32 */
  readonly positions: Tensor;
  readonly starts?: Tensor | undefined;
  readonly cache?: CacheRows | undefined;
}

/**
 * Attention of one layer, over the pass's own tokens and those of the cache, to which they are added. `cache.lengths` is left to the caller.
 * @param q [B T H D]
 * @param now key and value of the same tokens [B T G D]
 * @returns [B T H D]
 */
export function attend(
  context: Context,
  layer: number,
  q: Tensor,
  now: KeyValue,
  options: Omit<AttentionOptions, 'starts'>,
): Tensor {
  const { cache: to, starts, positions } = context;
  if (to === undefined) return attention(q, now.key, now.value, { ...options, starts });
  if (starts !== undefined) refuse('packed documents (starts) cannot be read into a cache');
  const [b = 0, t = 0] = q.shape;
  if (b !== to.sequences.length) refuse(`${b} rows were given for ${to.sequences.length} sequences`);
  const all = layerOf(to.cache, layer, now.key, options.window ?? null);
  if (t === 1) return attentionStep(q, now, all, { ...options, rows: to.index, positions });
  if (b === 1) return attendOne(to, 0, all, q, now, options);
  const mixed = empty(q.shape, q.dtype);
  for (let i = 0; i < b; i++) {
    const row = { key: rows(now.key, i, i + 1), value: rows(now.value, i, i + 1) };
    copy_(rows(mixed, i, i + 1), attendOne(to, i, all, rows(q, i, i + 1), row, options));
  }
  return mixed;
}

function layerOf(cache: KeyValueCache, layer: number, like: Tensor, window: number | null): KeyValue {
  const [, , heads = 0, size = 0] = like.shape;
  const places = Math.min(window ?? cache.capacity, cache.capacity);
  const make = (): Tensor => keep(empty([cache.sequences, places, heads, size], like.dtype));
  cache.layers[layer] ??= { key: make(), value: make() };
  return cache.layers[layer];
}

/** Any number of tokens of one sequence, by the attention of whole sequences. */
function attendOne(
  { cache, sequences }: CacheRows,
  row: number,
  all: KeyValue,
  q: Tensor,
  now: KeyValue,
  options: AttentionOptions,
): Tensor {
  const [, t = 0, ...head] = now.key.shape;
  const places = all.key.shape[1]!;
  const sequence = sequences[row]!;
  const before = cache.lengths[sequence]!;
  // Of a ring only the places that the first new token still sees are read: one less than all.
  const old = before + t <= places ? before : Math.min(before, places - 1);
  const source = (ring: Tensor, fresh: Tensor): Tensor => {
    if (old === 0) return fresh;
    if (before + t <= places) {
      copyRuns(ring, sequence, before, fresh, 0, t, 'in');
      return reshape(rows(reshape(ring, [-1, ...head]), sequence * places, sequence * places + before + t), [1, -1, ...head]);
    }
    const line = empty([1, old + t, ...head], fresh.dtype);
    copyRuns(ring, sequence, before - old, line, 0, old, 'out');
    copy_(rows(reshape(line, [-1, ...head]), old, old + t), reshape(fresh, [t, ...head]));
    return line;
  };
  const y = attention(q, source(all.key, now.key), source(all.value, now.value), options);
  if (old === 0 || before + t > places) {
    const kept = Math.min(t, places);
    copyRuns(all.key, sequence, before + t - kept, now.key, t - kept, kept, 'in');
    copyRuns(all.value, sequence, before + t - kept, now.value, t - kept, kept, 'in');
  }
  return y;
}

/** Copies `count` tokens between a sequence's ring, from `position` on, and a line [1 T G D], from `at` on. */
function copyRuns(
  ring: Tensor,
  sequence: number,
  position: number,
  line: Tensor,
  at: number,
  count: number,
  way: 'in' | 'out',
): void {
  const [, places = 1, ...head] = ring.shape;
  const [flat, straight] = [reshape(ring, [-1, ...head]), reshape(line, [-1, ...head])];
  for (let done = 0; done < count; ) {
    const place = (position + done) % places;
    const run = Math.min(count - done, places - place);
    const inRing = rows(flat, sequence * places + place, sequence * places + place + run);
    const inLine = rows(straight, at + done, at + done + run);
    if (way === 'in') copy_(inRing, inLine);
    else copy_(inLine, inRing);
    done += run;
  }
}

function refuse(problem: string): never {
  throw new ShapeError(`cache: ${problem}`, { code: 'ERR_SHAPE', op: 'cache' });
}
