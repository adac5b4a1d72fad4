// Packing: documents laid into rows of a fixed length. Legend: b rows, t tokens of a row.

import { ConfigError } from '../tensor/errors.ts';

/** Ids in any of the arrays that stores and tokenizers give. */
export type Ids = Int32Array | Uint16Array | Uint32Array;

/** What a training step takes. All arrays are [b t], row after row. */
export interface Batch {
  readonly rows: number;
  readonly length: number;
  readonly ids: Int32Array;
  /** The token to predict at each place; -100 where there is none. */
  readonly targets: Int32Array;
  /** What each target counts: 1, or less where a span says so; 0 where there is none. */
  readonly weights: Float32Array;
  /** Place within the document piece; what rotary embeddings take. */
  readonly positions: Int32Array;
  /** First place of the row that a token may attend to: where its document begins. */
  readonly starts: Int32Array;
  /** Number of each token in the stores of its dataset, -1 for padding; with `whole` only. */
  readonly places?: Float64Array;
  /** What a teacher found likely at each place, [b t k]; with a cached teacher only. */
  readonly likely?: Likely;
  /** Tokens of documents, padding not counted. */
  readonly tokens: number;
  /** Tokens to predict: the sum of the weights. */
  readonly predicted: number;
}

/** The k likeliest tokens at each of many places, the likeliest first; -1 where there are none. */
export interface Likely {
  readonly topK: number;
  readonly ids: Int32Array;
  /** Natural logarithms of their probabilities. */
  readonly logProbs: Float32Array;
}

/** A piece of one document within a row, and the token that follows it there (-1: the document ends). */
export interface Span {
  readonly ids: Ids;
  readonly next: number;
  /** What the token after each id counts as a target, one for each id; 0 makes it no target. Default: 1. */
  readonly weights?: Float32Array;
  /** Number of its first token in the stores of its dataset. */
  readonly from?: number;
}

export interface Layout {
  /** Tokens of a row. */
  readonly length: number;
  /** Rows of a batch. */
  readonly batch: number;
  /** Each piece sees only itself. Default true. False: a row is one text, documents follow each other. */
  readonly isolate?: boolean;
  /** Pieces are cut where a document is longer than a row and nowhere else; batches tell the places of their tokens. Default false. */
  readonly whole?: boolean;
  /** Id at places behind the last document. Default 0. */
  readonly pad?: number;
}

/** No target: what the losses skip. */
export const ignoreIndex = -100;

/** Lays rows of spans into a batch; missing rows and row ends are padding. */
export function layOut(rows: readonly (readonly Span[])[], layout: Layout): Batch {
  const { length, batch, isolate = true, pad = 0, whole = false } = layout;
  const size = batch * length;
  const ids = new Int32Array(size).fill(pad);
  const targets = new Int32Array(size).fill(ignoreIndex);
  const weights = new Float32Array(size);
  const positions = new Int32Array(size);
  const starts = new Int32Array(size);
  const places = whole ? new Float64Array(size).fill(-1) : undefined;
  let tokens = 0;
  let predicted = 0;
  for (let r = 0; r < batch; r++) {
    const spans = rows[r] ?? [];
    let column = 0;
    for (const [s, span] of spans.entries()) {
      const from = r * length + column;
      const count = span.ids.length;
      ids.set(span.ids, from);
      targets.set(span.ids.subarray(1), from);
      const follower = span.next < 0 && !isolate ? (spans[s + 1]?.ids[0] ?? -1) : span.next;
      if (follower >= 0) targets[from + count - 1] = follower;
      const known = follower >= 0 ? count : count - 1;
      weights.fill(1, from, from + known);
      if (span.weights !== undefined) {
        for (let i = 0; i < known; i++) {
          const weight = span.weights[i]!;
          weights[from + i] = weight;
          if (weight === 0) targets[from + i] = ignoreIndex;
          predicted += weight - 1;
        }
      }
      for (let i = 0; i < count; i++) positions[from + i] = isolate ? i : column + i;
      if (isolate) starts.fill(column, from, from + count);
      if (places !== undefined) for (let i = 0; i < count; i++) places[from + i] = span.from! + i;
      column += count;
      tokens += count;
      predicted += known;
    }
    // Padding sees itself alone: a softmax over nothing would not be finite.
    for (; column < length; column++) starts[r * length + column] = column;
  }
  return { rows: batch, length, ids, targets, weights, positions, starts, ...(places && { places }), tokens, predicted };
}

/** Checks length and batch. @throws ConfigError */
export function checkLayout(layout: Layout, op: string): void {
  for (const name of ['length', 'batch'] as const) {
    const value = layout[name];
    if (Number.isInteger(value) && value >= 1 && value <= 1 << 24) continue;
    throw new ConfigError(`${op}: ${name} is ${value}; it should be a positive integer`, {
      code: 'ERR_CONFIG',
      op,
      argument: name,
      expected: 'a positive integer',
      actual: String(value),
    });
  }
}

/**
 * Packs documents in their order: a document that does not fit goes on in the next row, as a piece of its own. Every token comes
 * out once; the last row is padded.
 * @param documents ids of one document each; `bos` and `eos` are put around them where given.
 */
export async function* packDocuments(
  documents: AsyncIterable<Ids> | Iterable<Ids>,
  options: Layout & { readonly bos?: number; readonly eos?: number },
): AsyncGenerator<Batch> {
  checkLayout(options, 'packDocuments');
  const { length, batch } = options;
  let rows: Span[][] = [];
  let row: Span[] = [];
  let filled = 0;
  for await (const document of documents) {
    const ids = bracket(document, options.bos, options.eos);
    for (let from = 0; from < ids.length; ) {
      const to = Math.min(ids.length, from + length - filled);
      row.push({ ids: ids.subarray(from, to), next: to < ids.length ? ids[to]! : -1 });
      filled += to - from;
      from = to;
      if (filled < length) continue;
      rows.push(row);
      row = [];
      filled = 0;
      if (rows.length === batch) {
        yield layOut(rows, options);
        rows = [];
      }
    }
  }
  if (row.length > 0) rows.push(row);
  if (rows.length > 0) yield layOut(rows, options);
}

function bracket(ids: Ids, bos: number | undefined, eos: number | undefined): Ids {
  if (bos === undefined && eos === undefined) return ids;
  const from = bos === undefined ? 0 : 1;
  const all = new Int32Array(ids.length + from + (eos === undefined ? 0 : 1));
  if (bos !== undefined) all[0] = bos;
  all.set(ids, from);
  if (eos !== undefined) all[all.length - 1] = eos;
  return all;
}
