// Which documents are held out for validation. The draw is a hash of the document's number, so that it never depends on order of
// reading, on threads or on what else is in the corpus.

import { DataError } from '../tensor/errors.ts';
import { randomBlock } from '../tensor/random.ts';

// Stream numbers of the seed; each use of randomness has its own.
const splitStream = 0x5b11;

/** A share of the documents (0 to 1), or a number of them. */
export type Held = number | { readonly documents: number };

/**
 * Numbers of the documents that are held out, rising. A share takes each document by its own hash (at least one is taken), a count
 * takes those of smallest hash.
 * @param what they are, for errors
 * @throws DataError `ERR_SPLIT` when nothing would be left to train on
 */
export function holdOut(held: Held, documents: number, seed: number, what = 'documents'): Uint32Array {
  const block = new Uint32Array(4);
  const hash = (document: number) => randomBlock(seed, splitStream, document, block)[0]!;
  const wanted = typeof held === 'number' ? held * documents : held.documents;
  if (!(wanted > 0) || wanted >= documents || documents < 2 || (typeof held !== 'number' && !Number.isInteger(wanted))) {
    throw refuse(wanted, documents, held, what);
  }
  const order = Uint32Array.from({ length: documents }, (_, i) => i);
  if (typeof held === 'number') {
    const chosen = order.filter((i) => hash(i) < held * 2 ** 32);
    if (chosen.length > 0 && chosen.length < documents) return chosen;
    if (chosen.length === documents) throw refuse(documents, documents, held, what);
  }
  const count = typeof held === 'number' ? 1 : wanted;
  const hashes = Float64Array.from(order, hash);
  return order
    .sort((a, b) => hashes[a]! - hashes[b]! || a - b)
    .slice(0, count)
    .sort();
}

function refuse(wanted: number, documents: number, held: Held, what: string): DataError {
  const asked =
    typeof held === 'number' ? `a share of ${held} of ${documents} ${what}` : `${held.documents} of ${documents} ${what}`;
  const advice =
    documents === 1 && what === 'documents'
      ? 'the data is a single document: give the source a separator, or a validation source of its own'
      : 'give more data, hold out fewer, or give a validation source of its own';
  return new DataError(
    `data: validation asks for ${asked}, which ${wanted > 0 ? 'leaves nothing to train on' : 'is nothing'}; ${advice}`,
    {
      code: 'ERR_SPLIT',
      op: 'data',
      argument: 'validation',
      expected: `more than 0 and fewer than ${documents} ${what}`,
      actual: String(wanted),
    },
  );
}
