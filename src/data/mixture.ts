// Several sources in fixed proportions of tokens. A row comes from one source, and the next one is always of the source that lags most behind
// its share, so that the proportions hold to a row at every moment, and where a run stands is a handful of numbers.

import { ConfigError, DataError } from '../tensor/errors.ts';
import type { Piece, Rows, RowsState } from './rows.ts';
import type { Source } from './source.ts';

export interface MixtureSource {
  readonly name: string;
  readonly source: Source | readonly Source[];
  /** Its share of the training tokens, relative to the others'. All sources have a weight, or none: then each counts by its size. */
  readonly weight?: number;
  /**
   * Passes over the source. Without weights: how often it comes while a source of `repeat: 1` comes once; default 1. With weights: the most
   * passes; then the others share what is left. Default: no limit.
   */
  readonly repeat?: number;
}

export interface Mixture {
  readonly mixture: readonly MixtureSource[];
}

/** A source as it was read. */
export interface SourceReport {
  readonly name: string;
  /** Documents and tokens for training. */
  readonly documents: number;
  readonly tokens: number;
  /** Of the training tokens, 0 to 1. */
  readonly share: number;
}

/** What a source has given so far. */
export interface SourceGiven {
  readonly name: string;
  readonly tokens: number;
  /** Tokens given, in passes over the source. */
  readonly epochs: number;
}

/** What is wrong with weights and repeats is told before anything is read. @throws ConfigError */
export function checkMixture({ mixture }: Mixture): void {
  const refuse = (argument: string, why: string, actual: string) =>
    new ConfigError(`openDataset: ${argument} ${why}`, { code: 'ERR_CONFIG', op: 'openDataset', argument, actual });
  if (mixture.length === 0) throw refuse('mixture', 'has no sources', '[]');
  const weighted = mixture.filter(({ weight }) => weight !== undefined).length;
  for (const [i, { name, weight, repeat }] of mixture.entries()) {
    for (const [field, value] of Object.entries({ weight, repeat })) {
      if (value === undefined || (value > 0 && Number.isFinite(value))) continue;
      throw refuse(`mixture[${i}].${field}`, `is ${value}; it should be a number above 0`, String(value));
    }
    if (mixture.findIndex((other) => other.name === name) < i) {
      throw refuse(`mixture[${i}].name`, `is "${name}", which another source has too`, name);
    }
    if (weighted > 0 && weight === undefined) {
      throw refuse(`mixture[${i}].weight`, 'is missing; give all sources a weight, or none', 'nothing');
    }
  }
}

/** A source of a mixture with its rows. */
export interface MixturePart extends Pick<MixtureSource, 'name' | 'weight' | 'repeat'> {
  /** Training tokens. */
  readonly tokens: number;
  readonly rows: Rows;
}

/** Where the walk over one source is; plain data. */
export interface PartState extends RowsState {
  /** Rows given out. */
  readonly rows: number;
}

/** The share of each source of the training tokens, 0 to 1. */
export function sharesOf(parts: readonly Pick<MixturePart, 'weight' | 'repeat' | 'tokens'>[]): number[] {
  const sizes = parts.map(({ weight, repeat = 1, tokens }) => weight ?? tokens * repeat);
  const all = sizes.reduce((sum, size) => sum + size, 0);
  return sizes.map((size) => (all === 0 ? 0 : size / all));
}

/** Walks the rows of several sources in proportion. */
export class MixedRows {
  readonly #parts: readonly MixturePart[];
  readonly #shares: readonly number[];
  readonly #limits: readonly number[];
  readonly #length: number;
  #given: number[];

  /** @param length tokens of a row. */
  constructor(parts: readonly MixturePart[], length: number) {
    this.#parts = parts;
    this.#length = length;
    this.#shares = sharesOf(parts);
    this.#limits = parts.map(({ weight, repeat, tokens }) =>
      weight === undefined || repeat === undefined
        ? Number.POSITIVE_INFINITY
        : Math.max(1, Math.floor((repeat * tokens) / length)),
    );
    this.#given = parts.map(() => 0);
  }

  /** The next row and the number of its source. @throws DataError `ERR_EXHAUSTED` when all sources have made their passes */
  next(): { part: number; row: Piece[] } {
    let part = -1;
    let least = Number.POSITIVE_INFINITY;
    for (let i = 0; i < this.#parts.length; i++) {
      // Webster's divisors: the count that would be fair if this source came next, rounded.
      const turn = (this.#given[i]! + 0.5) / this.#shares[i]!;
      if (turn < least && this.#given[i]! < this.#limits[i]!) [part, least] = [i, turn];
    }
    if (part < 0) {
      const rows = this.#given.reduce((sum, n) => sum + n, 0);
      throw new DataError(
        `next: after ${rows * this.#length} tokens, all sources of the mixture have been read as often as their \`repeat\` allows; raise it or train for fewer steps`,
        { code: 'ERR_EXHAUSTED', op: 'next', argument: 'repeat' },
      );
    }
    this.#given[part]!++;
    return { part, row: this.#parts[part]!.rows.next()! };
  }

  /** What each source has given. */
  get given(): SourceGiven[] {
    return this.#parts.map(({ name, tokens }, i) => {
      const out = this.#given[i]! * this.#length;
      return { name, tokens: out, epochs: out / tokens };
    });
  }

  get state(): PartState[] {
    return this.#parts.map(({ rows }, i) => ({ ...rows.state, rows: this.#given[i]! }));
  }
  set state(state: readonly PartState[]) {
    for (const [i, part] of this.#parts.entries()) part.rows.state = state[i]!;
    this.#given = state.map(({ rows }) => rows);
  }
}
