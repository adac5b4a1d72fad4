// Rows of a corpus in a chosen order. A document is cut into segments of a row's length; a whole segment is a row of its own, the
// shorter ends of documents share rows. So few tokens lose their context, and the place in the order is a handful of numbers.

import { permutation } from '../tensor/random.ts';
import type { Span } from './pack.ts';
import type { TokenStore } from './tokens.ts';

/** Documents of a store, by number, as segments. */
export interface Segments {
  readonly count: number;
  readonly tokens: number;
  /** Place of segment `j` in the store and its length. */
  at(j: number): { from: number; count: number; more: boolean };
}

/** Cuts documents into segments of at most `length` tokens. */
export function segmentsOf(store: TokenStore, documents: Uint32Array, length: number): Segments {
  const first = new Float64Array(documents.length + 1);
  let tokens = 0;
  for (const [i, d] of documents.entries()) {
    const size = store.ends[d]! - (d === 0 ? 0 : store.ends[d - 1]!);
    first[i + 1] = first[i]! + Math.ceil(size / length);
    tokens += size;
  }
  const starts = first.subarray(0, documents.length);
  return {
    count: first[documents.length]!,
    tokens,
    at(j) {
      const i = lastUpTo(starts, j);
      const d = documents[i]!;
      const from = (d === 0 ? 0 : store.ends[d - 1]!) + (j - first[i]!) * length;
      const to = Math.min(from + length, store.ends[d]!);
      return { from, count: to - from, more: to < store.ends[d]! };
    },
  };
}

/** Index of the last of ascending numbers that is at most `value`; 0 where none is. */
export function lastUpTo(ascending: ArrayLike<number>, value: number): number {
  let low = 0;
  let high = ascending.length;
  while (high - low > 1) {
    const middle = (low + high) >>> 1;
    if (ascending[middle]! <= value) low = middle;
    else high = middle;
  }
  return low;
}

/** A piece of the store: place, tokens, and 1 when its document goes on behind it. */
export type Piece = readonly [from: number, count: number, more: 0 | 1];

/** Where a walk over the rows is; plain data. */
export interface RowsState {
  epoch: number;
  /** Segments of the epoch that were taken. */
  position: number;
  /** Ends of documents that wait for the row they share to fill. */
  waiting: Piece[];
}

// Rows of tokens that wait where segments stay whole: enough that a row is nearly filled by some of them.
const POOL = 4;

/** Walks the segments in an order, row by row, and can go on from a state. */
export class Rows {
  readonly #segments: Segments;
  readonly #length: number;
  readonly #order: (epoch: number) => (index: number) => number;
  #permutation: (index: number) => number;
  readonly #whole: boolean;
  #state: RowsState = { epoch: 0, position: 0, waiting: [] };
  #waitingTokens = 0;

  /**
   * @param order of the segments in each epoch.
   * @param whole Segments are never cut to fill a row: more of them wait, and what remains of a row is padding.
   */
  constructor(segments: Segments, length: number, order: (epoch: number) => (index: number) => number, whole = false) {
    this.#segments = segments;
    this.#length = length;
    this.#order = order;
    this.#permutation = order(0);
    this.#whole = whole;
  }

  get state(): RowsState {
    return { ...this.#state, waiting: [...this.#state.waiting] };
  }
  set state(state: RowsState) {
    this.#state = { epoch: state.epoch, position: state.position, waiting: [...state.waiting] };
    this.#waitingTokens = state.waiting.reduce((sum, [, count]) => sum + count, 0);
    this.#permutation = this.#order(state.epoch);
  }

  /** The next row. At the end of the segments: goes on with the next epoch, or with `once` gives what waits, then undefined. */
  next(once = false): Piece[] | undefined {
    const enough = this.#whole ? POOL * this.#length : this.#length;
    for (;;) {
      if (this.#waitingTokens >= enough) return this.#share();
      if (this.#state.position === this.#segments.count) {
        if (once) return this.#waitingTokens > 0 ? this.#share() : undefined;
        this.#state.position = 0;
        this.#permutation = this.#order(++this.#state.epoch);
      }
      const { from, count, more } = this.#segments.at(this.#permutation(this.#state.position++));
      const piece: Piece = [from, count, more ? 1 : 0];
      if (count === this.#length) return [piece];
      this.#state.waiting.push(piece);
      this.#waitingTokens += count;
    }
  }

  /** A row of the pieces that wait; what does not fit goes on waiting. */
  #share(): Piece[] {
    const row: Piece[] = [];
    let room = this.#length;
    const { waiting } = this.#state;
    if (this.#whole) {
      this.#state.waiting = waiting.filter((piece) => {
        if (piece[1] > room) return true;
        row.push(piece);
        room -= piece[1];
        return false;
      });
    }
    while (!this.#whole && room > 0 && waiting.length > 0) {
      const [from, count, more] = waiting.shift()!;
      const taken = Math.min(count, room);
      row.push([from, taken, taken < count ? 1 : more]);
      if (taken < count) waiting.unshift([from + taken, count - taken, more]);
      room -= taken;
    }
    this.#waitingTokens -= this.#length - room;
    return row;
  }
}

/** Every epoch in an order of its own, the same for the same seed. @param part number of the source in a mixture */
export function shuffledOrder(count: number, seed: number, part = 0): (epoch: number) => (index: number) => number {
  return (epoch) => permutation(count, seed, orderStream * (part + 1) + epoch);
}
// Above the numbers of other streams, so that epochs never meet them.
const orderStream = 2 ** 32;

/** Always the order of the store. */
export function storeOrder(): (index: number) => number {
  return (index) => index;
}

/**
 * Reads the pieces of a row.
 * @param base tokens of the stores before
 */
export async function readRow(store: TokenStore, row: readonly Piece[], base = 0): Promise<Span[]> {
  return Promise.all(
    row.map(async ([from, count, more]) => {
      const ids = await store.read(from, count + more);
      return { ids: ids.subarray(0, count), next: more ? ids[count]! : -1, from: base + from };
    }),
  );
}
