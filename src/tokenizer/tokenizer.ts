// What a tokenizer is, whatever runs it, and how one is read from a file.

import { readFile, stat } from 'node:fs/promises';
import { basename, dirname, join } from 'node:path';
import { checkText } from '../tensor/argument.ts';
import { FileError, FormatError } from '../tensor/errors.ts';
import { parseTokenizer, type TokenizerFile } from './file.ts';
import { genericTokenizer } from './generic.ts';
import { nativeTokenizer } from './native.ts';

export interface EncodeOptions {
  /** Put the begin token first. Default false. */
  readonly bos?: boolean;
  /** Put the end token last. Default false. */
  readonly eos?: boolean;
  /** Whether the text of a special token stands for the token; false treats it as plain text. Default true. */
  readonly special?: boolean;
}

/** Text to ids and back. Immutable; needs no disposal. */
export interface Tokenizer {
  /** Rows an embedding table needs: the largest id + 1. */
  readonly vocabSize: number;
  /** Hash of the vocabulary: two tokenizers with the same fingerprint give ids the same meaning. */
  readonly fingerprint: string;
  /** Hash of the whole file: two tokenizers with the same digest give the same ids to the same text. */
  readonly digest: string;
  /** Ids of the tokens that begin, end and pad a text, where the vocabulary has them. */
  readonly bos: number | undefined;
  readonly eos: number | undefined;
  readonly pad: number | undefined;
  readonly unk: number | undefined;
  /**
   * Whether the begin token goes before a text that a model is to continue, as in Transformers: `add_bos_token` says so, or, where it says
   * nothing, the file's post-processor puts it there. That of GPT-2 does not.
   */
  readonly begins: boolean;
  /** `native`: our own encoder; `generic`: `@huggingface/tokenizers`, for pipelines that the native one does not cover. */
  readonly engine: 'native' | 'generic';
  /** The tokenizer.json that it was made from. */
  readonly file: TokenizerFile;
  /** Encodes at once. Bytes must be UTF-8. @throws ConfigError where `bos` or `eos` is asked for and missing */
  encode(text: string | Uint8Array, options?: EncodeOptions): Int32Array;
  /** Encodes many or long texts beside the event loop. */
  encodeBatch(texts: readonly (string | Uint8Array)[], options?: EncodeOptions): Promise<Int32Array[]>;
  /** The text of ids; bytes that are no UTF-8 become U+FFFD. @throws DataError `ERR_TOKEN_RANGE` */
  decode(ids: ArrayLike<number>, options?: { skipSpecial?: boolean }): string;
  /** Decodes ids as they come; never gives out half a character. */
  decoder(options?: { skipSpecial?: boolean }): TokenDecoder;
  /** Id of a token as the file spells it, or of a special token. */
  id(token: string): number | undefined;
  /** The token of an id as the file spells it. */
  token(id: number): string | undefined;
  /** Writes tokenizer.json (to a path ending in `.json`), or a folder of it and tokenizer_config.json. @throws FileError */
  save(path: string): Promise<void>;
}

/** Decodes a stream of ids. */
export interface TokenDecoder {
  /** Text that is certain after this id; often empty, when a character is not complete yet. */
  push(id: number): string;
  /** The rest; incomplete bytes become U+FFFD. */
  end(): string;
}

/**
 * Loads a Hugging Face `tokenizer.json`, or a folder that holds one; a `tokenizer_config.json` beside it names the special tokens.
 * @throws FormatError naming the entry that is wrong; FileError `ERR_READ`
 */
export async function loadTokenizer(path: string): Promise<Tokenizer> {
  checkText('loadTokenizer', 'path', path, 'the path of a tokenizer.json or its folder');
  const file = await withReadErrors(path, async () => ((await stat(path)).isDirectory() ? join(path, 'tokenizer.json') : path));
  const text = await withReadErrors(file, () => readFile(file, 'utf8'));
  const folder = dirname(file);
  const config = basename(file) === 'tokenizer.json' ? await optional(join(folder, 'tokenizer_config.json')) : undefined;
  return tokenizerFromJson(text, config, file);
}

/** A tokenizer from the text of a tokenizer.json and, where there is one, of its tokenizer_config.json. @throws FormatError */
export function tokenizerFromJson(text: string, config?: string, where = 'tokenizer.json'): Tokenizer {
  const file = parseTokenizer(text, config, where);
  return file.native === undefined ? genericTokenizer(file) : nativeTokenizer(file, file.native);
}

async function optional(path: string): Promise<string | undefined> {
  try {
    return await readFile(path, 'utf8');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw readError(path, error);
  }
}

async function withReadErrors<T>(path: string, read: () => Promise<T>): Promise<T> {
  try {
    return await read();
  } catch (error) {
    throw error instanceof FormatError ? error : readError(path, error);
  }
}

function readError(path: string, error: unknown): FileError {
  const { code, message } = error as NodeJS.ErrnoException;
  const hint = code === 'ENOENT' ? 'there is no such file; give a tokenizer.json or its folder' : message;
  return new FileError(`loadTokenizer: cannot read ${path}: ${hint}`, {
    code: 'ERR_READ',
    op: 'loadTokenizer',
    argument: path,
    cause: error,
  });
}
