// Every tokenizer.json that the native encoder does not cover: normalizers, SentencePiece-style BPE, Unigram, WordPiece.

import { createRequire } from 'node:module';
import { setImmediate as nextTurn } from 'node:timers/promises';
import type { Tokenizer as Pipeline } from '@huggingface/tokenizers';
import { DataError, FormatError } from '../tensor/errors.ts';
import { checkIds } from './alphabet.ts';
import { saveTokenizer, type TokenizerFile } from './file.ts';
import { sentinels } from './sentinels.ts';
import type { TokenDecoder, Tokenizer } from './tokenizer.ts';
import { windowDecoder } from './window.ts';

export function genericTokenizer(file: TokenizerFile): Tokenizer {
  const pipeline = build(file, file.json);
  let plain: Pipeline | undefined;
  const vocabSize = file.tokens.length;

  const encode = (text: string | Uint8Array, special: boolean): Int32Array => {
    const string = typeof text === 'string' ? text : new TextDecoder('utf-8', { ignoreBOM: true }).decode(text);
    if (!special) plain ??= build(file, { ...file.json, added_tokens: file.added.length === 0 ? [] : ordinary(file) });
    const run = special ? pipeline : plain!;
    const { ids, tokens } = guarded(file, () => run.encode(string, { add_special_tokens: false }));
    for (const [i, id] of (ids as (number | undefined)[]).entries()) {
      if (id === undefined) {
        throw new DataError(
          `encode: ${JSON.stringify(tokens[i])} is not in the vocabulary of ${file.where}, which has no unknown token`,
          {
            code: 'ERR_UNKNOWN_TOKEN',
            op: 'encode',
            argument: String(tokens[i]),
          },
        );
      }
    }
    return Int32Array.from(ids);
  };

  const decode = (ids: ArrayLike<number>, skipSpecial: boolean): string => {
    if (ids.length === 0) return '';
    const options = { skip_special_tokens: skipSpecial, clean_up_tokenization_spaces: false };
    return guarded(file, () => pipeline.decode(Array.from(ids), options));
  };

  return {
    vocabSize,
    fingerprint: file.fingerprint,
    digest: file.digest,
    bos: file.bos,
    eos: file.eos,
    pad: file.pad,
    unk: file.unk,
    begins: file.begins,
    engine: 'generic',
    file,
    encode: (text, options = {}) => sentinels(file, options)(encode(text, options.special ?? true)),
    async encodeBatch(texts, options = {}) {
      const wrap = sentinels(file, options);
      const results: Int32Array[] = [];
      for (const text of texts) {
        results.push(wrap(encode(text, options.special ?? true)));
        await nextTurn();
      }
      return results;
    },
    decode(ids, options = {}) {
      checkIds(ids, vocabSize, 'decode');
      return decode(ids, options.skipSpecial ?? false);
    },
    decoder(options = {}): TokenDecoder {
      const decoder = windowDecoder((ids) => decode(ids, options.skipSpecial ?? false));
      return {
        push(id) {
          checkIds([id], vocabSize, 'decoder.push');
          return decoder.push(id);
        },
        end: decoder.end,
      };
    },
    id: (token) => file.ids.get(token),
    token: (id) => file.tokens[id],
    save: (path) => saveTokenizer(file, path),
  };
}

function ordinary(file: TokenizerFile): unknown[] {
  const special = new Set(file.added.filter((token) => token.special).map((token) => token.id));
  return (file.json.added_tokens as { id: number }[]).filter((token) => !special.has(token.id));
}

function build(file: TokenizerFile, json: object): Pipeline {
  return guarded(file, () => {
    // The reader insists on these entries, though null is their usual value.
    const complete = { normalizer: null, pre_tokenizer: null, post_processor: null, decoder: null, added_tokens: [], ...json };
    // Loaded at first use: most files never need it.
    const { Tokenizer } = createRequire(import.meta.url)('@huggingface/tokenizers') as typeof import('@huggingface/tokenizers');
    return new Tokenizer(complete, { ...file.config, clean_up_tokenization_spaces: false });
  });
}

/** The reader finds some mistakes of a file only when it meets a text. */
function guarded<T>(file: TokenizerFile, run: () => T): T {
  try {
    return run();
  } catch (error) {
    throw new FormatError(`loadTokenizer: ${file.where} cannot be used: ${(error as Error).message}`, {
      code: 'ERR_TOKENIZER',
      op: 'loadTokenizer',
      argument: file.where,
      cause: error,
    });
  }
}
