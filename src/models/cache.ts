// Keys and values of the tokens that were read, so that generation computes each token once.
import { copy_ } from '../ops/elementwise.ts';
import { reshape, rows } from '../ops/reshape.ts';
import { ShapeError } from '../tensor/errors.ts';
import { keep } from '../tensor/scope.ts';
import { empty, type Tensor } from '../tensor/tensor.ts';

interface KeyValue {
  readonly key: Tensor;
  readonly value: Tensor;
}

/** Room for one sequence of up to `capacity` tokens. */
export interface KeyValueCache {
  readonly capacity: number;
  /** Tokens that are in it; the model reads it, the generator advances it. */
  length: number;
  /** For each layer [capacity G D]. */
  readonly layers: readonly KeyValue[];
  dispose(): void;
}

export function createCache(layers: number, capacity: number, kvHeads: number, headSize: number): KeyValueCache {
  const shape = [capacity, kvHeads, headSize];
  const pairs = Array.from({ length: layers }, () => keep({ key: empty(shape), value: empty(shape) }));
  return {
    capacity,
    length: 0,
    layers: pairs,
    dispose() {
      for (const { key, value } of pairs) {
        key.dispose();
        value.dispose();
      }
    },
  };
}

/** Appends new keys and values [1 T G D] of one layer; returns all so far [1 S G D]. `cache.length` is left to the caller. */
export function extend(cache: KeyValueCache, layer: number, now: KeyValue): KeyValue {
  const [b = 0, t = 0, ...rest] = now.key.shape;
  const end = cache.length + t;
  if (b !== 1 || end > cache.capacity) {
    throw new ShapeError(`cache: ${b} sequence(s) of ${end} tokens, the cache has room for 1 of ${cache.capacity}`, {
      code: 'ERR_SHAPE',
      op: 'cache',
    });
  }
  const all = cache.layers[layer]!;
  const append = (to: Tensor, from: Tensor): Tensor => {
    copy_(rows(to, cache.length, end), reshape(from, [t, ...rest]));
    return reshape(rows(to, 0, end), [1, end, ...rest]);
  };
  return { key: append(all.key, now.key), value: append(all.value, now.value) };
}
