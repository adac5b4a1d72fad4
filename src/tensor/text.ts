// The twin of native/binding/text.cpp: what the addon's two tokenizer classes take and give.

import { loadNative } from './native.ts';

/** BPE encoder; immutable, so that several batches may run at once. */
export interface BpeEncoder {
  encode(text: string | Uint8Array, added: boolean): Int32Array;
  /** `ends[i]` is where text i ends in `bytes`, and in the answer where its ids end. */
  encodeBatch(bytes: Uint8Array, ends: Float64Array, added: boolean): Promise<[ids: Int32Array, ends: Float64Array]>;
}

/** Counts words, then merges pairs; every call is waited for before the next. */
export interface BpeTrainer {
  count(text: string | Uint8Array): Promise<void>;
  /** Makes at most `limit` more merges; true when no more are wanted or possible. */
  merge(limit: number): Promise<boolean>;
  /** Left and right symbol of each merge; symbols 0 to 255 are the bytes in alphabet order, 256 + i is merge i. */
  merges(): Int32Array;
  words(): number;
}

interface TextAddon {
  BpeEncoder: new (
    byteIds: Int32Array,
    merges: Int32Array,
    rules: number,
    addedBytes: Uint8Array,
    addedEnds: Int32Array,
    addedIds: Int32Array,
    wholeBytes: Uint8Array,
    wholeEnds: Int32Array,
    wholeIds: Int32Array,
    // Of a vocabulary over characters: code points and their ids, the pairs of code points that merges join, a space before each text.
    ...characters: [] | [codes: Int32Array, ids: Int32Array, joins: Int32Array, prepend: boolean]
  ) => BpeEncoder;
  BpeTrainer: new (merges: number, minCount: number, maxBytes: number, rules: number) => BpeTrainer;
}

export function textAddon(): TextAddon {
  return loadNative() as unknown as TextAddon;
}
