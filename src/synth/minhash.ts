// Texts that share most of their word sequences, found without comparing all pairs: MinHash signatures (Broder 1997) in bands that are
// looked up (locality-sensitive hashing), and the candidates compared by their signatures.

import { randomBlock } from '../tensor/random.ts';

export interface MinHashOptions {
  /** Share of common word sequences (Jaccard) from which two texts are repeats. Default 0.8. */
  readonly threshold?: number;
  /** Words in a sequence; a text of fewer words is one sequence. Default 5. */
  readonly words?: number;
  /** Hashes of a signature. More find the share more exactly: its error is about 1/√hashes. Default 128. */
  readonly hashes?: number;
  /** Default 0. */
  readonly seed?: number;
}

/** Finds repeats as texts come. */
export interface MinHashIndex {
  /** The number of an earlier text that this one repeats, and the estimated share; undefined when it is new, and then it is kept. */
  add(text: string): { readonly of: number; readonly similarity: number } | undefined;
  /** Texts that were added. */
  readonly size: number;
}

/** An index without texts. Memory is 4 bytes times `hashes` for each text that is kept, and its bands. */
export function minHashIndex(options: MinHashOptions = {}): MinHashIndex {
  const { threshold = 0.8, words = 5, hashes = 128, seed = 0 } = options;
  const rows = bandRows(threshold, hashes);
  const bands = Math.floor(hashes / rows);
  const factors = new Uint32Array(hashes);
  const offsets = new Uint32Array(hashes);
  for (let h = 0; h < hashes; h++) {
    const block = randomBlock(seed, 0x6d68, h);
    factors[h] = block[0]! | 1;
    offsets[h] = block[1]!;
  }
  const tables = Array.from({ length: bands }, () => new Map<number, number[]>());
  const kept: { number: number; signature: Uint32Array }[] = [];
  let size = 0;
  return {
    get size() {
      return size;
    },
    add(text) {
      const number = size++;
      const signature = signatureOf(text, words, factors, offsets);
      const keys = tables.map((_, b) => mix(signature.subarray(b * rows, (b + 1) * rows)));
      let best: { of: number; similarity: number } | undefined;
      const seen = new Set<number>();
      for (const [b, table] of tables.entries()) {
        for (const candidate of table.get(keys[b]!) ?? []) {
          if (seen.has(candidate)) continue;
          seen.add(candidate);
          const other = kept[candidate]!;
          let same = 0;
          for (let h = 0; h < hashes; h++) if (signature[h] === other.signature[h]) same++;
          const similarity = same / hashes;
          if (similarity >= threshold && similarity > (best?.similarity ?? 0)) best = { of: other.number, similarity };
        }
      }
      if (best !== undefined) return best;
      for (const [b, table] of tables.entries()) {
        const bucket = table.get(keys[b]!);
        if (bucket) bucket.push(kept.length);
        else table.set(keys[b]!, [kept.length]);
      }
      kept.push({ number, signature });
      return undefined;
    },
  };
}

/** Rows of a band so that texts at the threshold are found in most cases: 1 − (1 − t^rows)^bands of at least 0.95. */
function bandRows(threshold: number, hashes: number): number {
  let rows = 1;
  for (let r = 1; r <= 32; r++) if (1 - (1 - threshold ** r) ** Math.floor(hashes / r) >= 0.95) rows = r;
  return rows;
}

function signatureOf(text: string, words: number, factors: Uint32Array, offsets: Uint32Array): Uint32Array {
  const signature = new Uint32Array(factors.length).fill(0xffffffff);
  const parts =
    text
      .normalize('NFKC')
      .toLowerCase()
      .match(/[\p{L}\p{M}\p{N}]+/gu) ?? [];
  // Scripts without spaces: characters are what words are elsewhere.
  const units = parts.length < words && text.length > 4 * words * Math.max(1, parts.length) ? [...parts.join(' ')] : parts;
  const count = Math.max(1, units.length - words + 1);
  for (let i = 0; i < count; i++) {
    let hash = 0x811c9dc5;
    for (const unit of units.slice(i, i + words)) {
      for (let c = 0; c < unit.length; c++) hash = Math.imul(hash ^ unit.charCodeAt(c), 0x01000193);
      hash = Math.imul(hash ^ 0x1f, 0x01000193);
    }
    for (let h = 0; h < factors.length; h++) {
      let value = Math.imul(hash ^ offsets[h]!, factors[h]!);
      value = Math.imul(value ^ (value >>> 15), 0x2c1b3c6d);
      value = (value ^ (value >>> 13)) >>> 0;
      if (value < signature[h]!) signature[h] = value;
    }
  }
  return signature;
}

function mix(values: Uint32Array): number {
  let hash = 0x9747b28c;
  for (const value of values) {
    hash = Math.imul(hash ^ value, 0x85ebca6b);
    hash ^= hash >>> 13;
  }
  return hash >>> 0;
}
