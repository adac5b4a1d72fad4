// The text of ids as they come, for decoders of whole texts.

import type { TokenDecoder } from './tokenizer.ts';

// Ids that are decoded again with each new one: enough context for decoders that look back (leading spaces, byte fallback).
const context = 8;

/** Decodes a window of the ids with each new one, never all of them. */
export function windowDecoder(decode: (ids: readonly number[]) => string): TokenDecoder {
  const seen: number[] = [];
  let settled = 0; // ids whose text was given out
  let base = 0; // first id of the window
  const rest = (final: boolean): string => {
    const before = decode(seen.slice(base, settled));
    const all = decode(seen.slice(base));
    // A text that ends in U+FFFD may be a character that is not complete yet.
    if (!final && all.endsWith('\ufffd')) return '';
    base = Math.max(base, settled - context);
    settled = seen.length;
    return all.slice(before.length);
  };
  return {
    push(id) {
      seen.push(id);
      return rest(false);
    },
    end: () => (settled < seen.length ? rest(true) : ''),
  };
}
