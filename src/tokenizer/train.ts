// Training of a byte-level BPE, native and beside the event loop.

import { ConfigError, DataError } from '../tensor/errors.ts';
import { textAddon } from '../tensor/text.ts';
import { alphabet, charOfByte } from './alphabet.ts';
import { type PreTokenizerName, preTokenizerJson, preTokenizerNames, rulesOf } from './pretokenizers.ts';
import { type Tokenizer, tokenizerFromJson } from './tokenizer.ts';

/** Where training is: text being counted, then merges being made. */
export interface TokenizerProgress {
  readonly phase: 'count' | 'merge';
  /** Text counted so far, in bytes. */
  readonly bytes: number;
  /** Entries of the vocabulary so far. */
  readonly vocabSize: number;
}

export interface TokenizerTraining {
  /** Entries, the 256 bytes and the special tokens included. A text with too few repeated pairs gives fewer. */
  readonly vocabSize: number;
  /** Tokens that come first, from id 0. Default: `<pad>`, `<eos>`, `<bos>`, `<unk>`, in Gemma's order. */
  readonly specialTokens?: readonly string[];
  /** How text is cut into words. Default `digits`: as GPT-2, but every digit stands alone. */
  readonly preTokenizer?: PreTokenizerName;
  /** Pairs that are rarer are never merged. Default 2. */
  readonly minFrequency?: number;
  /** Longest token, in bytes. Default 64. */
  readonly maxTokenBytes?: number;
  /** Text to look at, in bytes; the rest is not read. Default: all. */
  readonly maxBytes?: number;
  readonly onProgress?: (progress: TokenizerProgress) => void;
  /** Stops training within some milliseconds; the promise rejects with the signal's reason. */
  readonly signal?: AbortSignal;
}

/** Text to train on: documents, or anything that gives them (a data source). */
export type TrainingText =
  | Iterable<string | Uint8Array>
  | AsyncIterable<string | Uint8Array>
  | { documents(): AsyncIterable<{ readonly text: string | Uint8Array }> };

// Text that one native call counts, and merges that one makes: some milliseconds each, so that progress and abort are prompt.
const countBytes = 1 << 20;
const mergeStep = 256;

/**
 * Trains a byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) on one or more texts. The result depends on the text alone.
 * @throws ConfigError for options that make no sense; DataError `ERR_EMPTY` when there is no text
 */
export async function trainTokenizer(
  sources: TrainingText | readonly TrainingText[],
  options: TokenizerTraining,
): Promise<Tokenizer> {
  const specials = options.specialTokens ?? ['<pad>', '<eos>', '<bos>', '<unk>'];
  const name = options.preTokenizer ?? 'digits';
  check(options, specials, name);
  const { onProgress, signal } = options;
  const trainer = new (textAddon().BpeTrainer)(
    options.vocabSize - specials.length - 256,
    options.minFrequency ?? 2,
    options.maxTokenBytes ?? 64,
    rulesOf(name),
  );

  let total = 0;
  let pending: Buffer[] = [];
  let waiting = 0;
  const flush = async () => {
    for (const text of pending) {
      for (const [from, to] of pieces(text)) {
        signal?.throwIfAborted();
        await trainer.count(text.subarray(from, to));
      }
    }
    pending = [];
    waiting = 0;
    onProgress?.({ phase: 'count', bytes: total, vocabSize: specials.length + 256 });
  };
  for await (const document of documentsOf(sources)) {
    let text =
      typeof document === 'string' ? Buffer.from(document) : Buffer.from(document.buffer, document.byteOffset, document.length);
    const left = (options.maxBytes ?? Number.POSITIVE_INFINITY) - total;
    if (text.length > left) text = text.subarray(0, pieceEnd(text, 0, left));
    total += text.length;
    waiting += text.length;
    pending.push(text);
    if (waiting >= countBytes) await flush();
    if (total >= (options.maxBytes ?? Number.POSITIVE_INFINITY) || text.length === left) break;
  }
  await flush();
  if (total === 0)
    throw new DataError('trainTokenizer: there is no text to train on', {
      code: 'ERR_EMPTY',
      op: 'trainTokenizer',
      argument: 'sources',
    });

  let done = false;
  while (!done) {
    signal?.throwIfAborted();
    done = await trainer.merge(mergeStep);
    onProgress?.({ phase: 'merge', bytes: total, vocabSize: specials.length + 256 + trainer.merges().length / 2 });
  }
  return tokenizerFromJson(tokenizerJson(specials, trainer.merges(), name));
}

function check(options: TokenizerTraining, specials: readonly string[], name: string): void {
  const bad = (argument: string, expected: string, actual: unknown) => {
    const data = { code: 'ERR_CONFIG', op: 'trainTokenizer', argument, expected, actual: String(actual) };
    return new ConfigError(`trainTokenizer: ${argument} is ${String(actual)}; it should be ${expected}`, data);
  };
  const least = 256 + specials.length;
  const { vocabSize, minFrequency = 2, maxTokenBytes = 64, maxBytes = 1 } = options;
  if (!Number.isInteger(vocabSize) || vocabSize < least || vocabSize > 1 << 24) {
    throw bad('vocabSize', `an integer from ${least} (the bytes and the special tokens) to ${1 << 24}`, vocabSize);
  }
  if (!Number.isInteger(minFrequency) || minFrequency < 1) throw bad('minFrequency', 'a positive integer', minFrequency);
  if (!Number.isInteger(maxTokenBytes) || maxTokenBytes < 1) throw bad('maxTokenBytes', 'a positive integer', maxTokenBytes);
  if (!(maxBytes > 0)) throw bad('maxBytes', 'positive', maxBytes);
  if (!(preTokenizerNames as string[]).includes(name)) throw bad('preTokenizer', preTokenizerNames.join(', '), name);
  for (const [i, token] of specials.entries()) {
    // One character could be the text of a byte.
    if (typeof token !== 'string' || token.length < 2 || /\p{Surrogate}/u.test(token) || specials.indexOf(token) !== i) {
      throw bad(`specialTokens[${i}]`, 'a text of two characters or more, given once', JSON.stringify(token));
    }
  }
}

async function* documentsOf(sources: TrainingText | readonly TrainingText[]): AsyncGenerator<string | Uint8Array> {
  if (typeof sources === 'string' || sources instanceof Uint8Array) {
    yield sources;
    return;
  }
  if ('documents' in sources) {
    for await (const { text } of sources.documents()) yield text;
    return;
  }
  for await (const item of sources as Iterable<string | Uint8Array | TrainingText>) {
    if (typeof item === 'string' || item instanceof Uint8Array) yield item;
    else yield* documentsOf(item);
  }
}

/** Cuts a long text where words end in every pre-tokenizer, or nearly so: the counts of a cut word are off by one. */
function* pieces(text: Uint8Array): Generator<[from: number, to: number]> {
  for (let from = 0; from < text.length; ) {
    const to = pieceEnd(text, from, countBytes);
    yield [from, to];
    from = to;
  }
}

/**
 * Where a piece that begins at `from` and has about `length` bytes ends: after a letter or digit and before a line break or a space,
 * where a word ends in every pre-tokenizer we know; in text without such places, between two characters.
 */
export function pieceEnd(text: Uint8Array, from: number, length: number): number {
  const limit = from + length;
  if (limit >= text.length) return text.length;
  for (const byte of [0x0a, 0x20]) {
    for (let at = text.lastIndexOf(byte, limit); at > from + length / 2; at = text.lastIndexOf(byte, at - 1)) {
      if (isAlphanumeric(text[at - 1]!)) return at;
    }
  }
  let to = limit;
  while (to > limit - 3 && (text[to]! & 0xc0) === 0x80) to--;
  return to > from && (text[to]! & 0xc0) !== 0x80 ? to : limit;
}

const isAlphanumeric = (byte: number) => (byte >= 0x30 && byte <= 0x39) || ((byte | 0x20) >= 0x61 && (byte | 0x20) <= 0x7a);

/** The tokenizer.json of a merge list: special tokens, the bytes in alphabet order, then the merges. */
function tokenizerJson(specials: readonly string[], merges: Int32Array, name: PreTokenizerName): string {
  const symbols = alphabet.map((byte) => charOfByte[byte]!);
  const list: [string, string][] = [];
  for (let i = 0; i < merges.length; i += 2) {
    const left = symbols[merges[i]!]!;
    const right = symbols[merges[i + 1]!]!;
    list.push([left, right]);
    symbols.push(left + right);
  }
  // A special token that is also a merged word keeps its own id, and the word gets none: it is found in the text before BPE.
  const vocab = new Map<string, number>();
  for (const token of [...specials, ...symbols]) if (!vocab.has(token)) vocab.set(token, vocab.size);
  const bos = specials.find((token) => token === '<bos>' || token === '<s>');
  const json = {
    version: '1.0',
    truncation: null,
    padding: null,
    added_tokens: specials.map((content, id) => ({
      id,
      content,
      single_word: false,
      lstrip: false,
      rstrip: false,
      normalized: false,
      special: true,
    })),
    normalizer: null,
    pre_tokenizer: preTokenizerJson(name),
    post_processor:
      bos === undefined
        ? { type: 'ByteLevel', add_prefix_space: false, trim_offsets: false, use_regex: false }
        : {
            type: 'TemplateProcessing',
            single: [{ SpecialToken: { id: bos, type_id: 0 } }, { Sequence: { id: 'A', type_id: 0 } }],
            pair: [
              { SpecialToken: { id: bos, type_id: 0 } },
              { Sequence: { id: 'A', type_id: 0 } },
              { SpecialToken: { id: bos, type_id: 1 } },
              { Sequence: { id: 'B', type_id: 1 } },
            ],
            special_tokens: { [bos]: { id: bos, ids: [specials.indexOf(bos)], tokens: [bos] } },
          },
    decoder: { type: 'ByteLevel', add_prefix_space: true, trim_offsets: true, use_regex: true },
    model: {
      type: 'BPE',
      dropout: null,
      unk_token: null,
      continuing_subword_prefix: null,
      end_of_word_suffix: null,
      fuse_unk: false,
      byte_fallback: false,
      ignore_merges: false,
      vocab: Object.fromEntries(vocab),
      merges: list,
    },
  };
  return `${JSON.stringify(json)}\n`;
}
