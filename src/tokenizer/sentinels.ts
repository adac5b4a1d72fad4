// The begin and end tokens around encoded text.

import { ConfigError } from '../tensor/errors.ts';
import type { EncodeOptions, Tokenizer } from './tokenizer.ts';

/** Puts the tokens that `options` ask for around ids. @throws ConfigError `ERR_NO_TOKEN` where the vocabulary has no such token */
export function sentinels(
  vocabulary: { readonly bos: number | undefined; readonly eos: number | undefined },
  options: EncodeOptions,
): (ids: Int32Array) => Int32Array {
  const before = options.bos ? named(vocabulary.bos, 'bos') : undefined;
  const after = options.eos ? named(vocabulary.eos, 'eos') : undefined;
  if (before === undefined && after === undefined) return (ids) => ids;
  return (ids) => {
    const from = before === undefined ? 0 : 1;
    const all = new Int32Array(ids.length + from + (after === undefined ? 0 : 1));
    if (before !== undefined) all[0] = before;
    all.set(ids, from);
    if (after !== undefined) all[all.length - 1] = after;
    return all;
  };
}

/**
 * A text that a model is to continue: one begin token before it, where its tokenizer begins texts and this one does not bring it; alone where
 * there is no text.
 */
export function encodePrompt(tokenizer: Tokenizer, text: string, ids = tokenizer.encode(text)): Int32Array {
  const { begins, bos } = tokenizer;
  if (bos === undefined || ids[0] === bos || (ids.length > 0 && !begins)) return ids;
  const all = new Int32Array(ids.length + 1);
  all[0] = bos;
  all.set(ids, 1);
  return all;
}

function named(id: number | undefined, name: 'bos' | 'eos'): number {
  if (id !== undefined) return id;
  throw new ConfigError(
    `encode: ${name} was asked for, but the tokenizer has no such token; leave ${name} out, or name it in tokenizer_config.json`,
    {
      code: 'ERR_NO_TOKEN',
      op: 'encode',
      argument: name,
    },
  );
}
