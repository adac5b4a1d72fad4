// tokenizer.json: checked, and sorted into what the native encoder covers exactly and what it does not.

import { createHash } from 'node:crypto';
import { join } from 'node:path';
import { writeAll, writeAtomic } from '../io/atomic.ts';
import { FormatError } from '../tensor/errors.ts';
import { charOfByte } from './alphabet.ts';
import { rulesFor } from './pretokenizers.ts';

/** A token that is found in the text before BPE. */
export interface AddedToken {
  readonly id: number;
  readonly content: string;
  readonly special: boolean;
}

/** A normal form of Unicode. */
export type NormalForm = 'NFC' | 'NFD' | 'NFKC' | 'NFKD';

/** What the native encoder needs beside the vocabulary. */
export interface NativePlan {
  /** The token of each byte; over characters, that of each byte of a character without a token. */
  readonly byteIds: Int32Array;
  /** left, right, result of each merge. */
  readonly merges: Int32Array;
  readonly rules: number;
  readonly normalizer: NormalForm | undefined;
  readonly ignoreMerges: boolean;
  /** SentencePiece-style BPE over characters, as Gemma and Llama 2 have it; undefined: over bytes. */
  readonly characters: CharacterPlan | undefined;
}

export interface CharacterPlan {
  readonly codes: Int32Array;
  readonly ids: Int32Array;
  /** Last code point of the left side and first of the right side of each merge. */
  readonly joins: Int32Array;
  /** A space before every text. */
  readonly prepend: boolean;
  /** Spaces that decoding takes from the beginning of a text. */
  readonly strip: number;
}

/** A checked tokenizer.json. */
export interface TokenizerFile {
  readonly where: string;
  readonly json: Json;
  readonly config: Json;
  /** The texts to save again, unchanged. */
  readonly text: string;
  readonly configText: string | undefined;
  /** Token of each id; undefined where there is none. */
  readonly tokens: readonly (string | undefined)[];
  readonly ids: ReadonlyMap<string, number>;
  readonly added: readonly AddedToken[];
  readonly bos: number | undefined;
  /** Whether `bos` goes before a text that is to be continued. */
  readonly begins: boolean;
  readonly eos: number | undefined;
  readonly pad: number | undefined;
  readonly unk: number | undefined;
  readonly fingerprint: string;
  readonly digest: string;
  /** Undefined when the native encoder does not cover the pipeline. */
  readonly native: NativePlan | undefined;
}

export interface Json {
  readonly [key: string]: unknown;
}

// More ids than any tokenizer has; a larger one would only make tables explode.
const largestId = 1 << 24;

/** @throws FormatError `ERR_TOKENIZER` saying which entry is wrong */
export function parseTokenizer(text: string, configText: string | undefined, where: string): TokenizerFile {
  const json = parseObject(text, where);
  const config = configText === undefined ? {} : parseObject(configText, join(where, '../tokenizer_config.json'));
  const model = json.model;
  if (!isObject(model)) throw refuse(where, 'model', 'an object', model);

  const ids = new Map<string, number>();
  const tokens: (string | undefined)[] = [];
  // `entry` is a function, because a vocabulary has a quarter of a million of them and an error has one.
  const add = (token: string, id: unknown, entry: () => string): number => {
    if (!Number.isInteger(id) || (id as number) < 0 || (id as number) > largestId) {
      throw refuse(where, entry(), `an integer id from 0 to ${largestId}`, id);
    }
    const other = tokens[id as number];
    if (other !== undefined && other !== token) throw refuse(where, entry(), `an id of its own; ${show(other)} has it too`, id);
    ids.set(token, id as number);
    tokens[id as number] = token;
    return id as number;
  };
  const vocab = model.vocab;
  if (Array.isArray(vocab)) {
    // Unigram: pairs of token and score, in the order of their ids.
    for (const [id, pair] of vocab.entries()) {
      if (!Array.isArray(pair) || typeof pair[0] !== 'string')
        throw refuse(where, `model.vocab[${id}]`, 'a token and its score', pair);
      add(pair[0], id, () => `model.vocab[${id}]`);
    }
  } else if (isObject(vocab)) {
    for (const token of Object.keys(vocab)) add(token, vocab[token], () => `model.vocab[${show(token)}]`);
  } else {
    throw refuse(where, 'model.vocab', 'an object of token: id', vocab);
  }
  const modelTokens = ids.size;

  const list = json.added_tokens ?? [];
  if (!Array.isArray(list)) throw refuse(where, 'added_tokens', 'a list', list);
  const added: AddedToken[] = [];
  let plainAdded = true;
  for (const [i, entry] of list.entries()) {
    if (!isObject(entry)) throw refuse(where, `added_tokens[${i}]`, 'an object', entry);
    const content = entry.content;
    if (typeof content !== 'string' || content === '') throw refuse(where, `added_tokens[${i}].content`, 'a text', content);
    const special = entry.special === true;
    const id = add(content, entry.id, () => `added_tokens[${i}].id`);
    added.push({ id, content, special });
    const normalized = entry.normalized ?? !special;
    if (entry.lstrip || entry.rstrip || entry.single_word || /\p{Surrogate}/u.test(content)) plainAdded = false;
    if (normalized && (json.normalizer ?? null) !== null) plainAdded = false;
  }
  if (modelTokens === 0) throw refuse(where, 'model.vocab', 'at least one token', vocab);

  return {
    where,
    json,
    config,
    text,
    configText,
    tokens,
    ids,
    added,
    ...namedTokens(json, config, ids, added),
    fingerprint: fingerprintOf(tokens),
    digest: createHash('sha256')
      .update(text)
      .update(configText ?? '')
      .digest('hex')
      .slice(0, 32),
    native: plainAdded ? nativePlan(json, model, ids, where) : undefined,
  };
}

function nativePlan(json: Json, model: Json, ids: ReadonlyMap<string, number>, where: string): NativePlan | undefined {
  if (model.type !== 'BPE') return undefined;
  const list = model.merges;
  if (!Array.isArray(list)) throw refuse(where, 'model.merges', 'a list', list);
  if (model.dropout || model.continuing_subword_prefix || model.end_of_word_suffix) return undefined;
  const ignoreMerges = model.ignore_merges === true;
  const rules = rulesFor(json.pre_tokenizer);
  const spaces = model.byte_fallback === true && !ignoreMerges ? sentencePiece(json) : undefined;
  const normal = json.normalizer ?? null;
  const bytes = rules !== undefined && isObject(json.decoder) && json.decoder.type === 'ByteLevel';
  if (bytes && normal !== null && !(isObject(normal) && /^NFK?[CD]$/.test(String(normal.type)))) return undefined;
  if (!bytes && spaces === undefined) return undefined;

  const byteIds = new Int32Array(256);
  for (const [byte, char] of charOfByte.entries()) {
    const id = ids.get(bytes ? char : byteToken(byte));
    if (id === undefined) return undefined;
    byteIds[byte] = id;
  }
  const merges = new Int32Array(list.length * 3);
  const joins = new Int32Array(spaces === undefined ? 0 : list.length * 2);
  for (let i = 0; i < list.length; i++) {
    const merge: unknown = list[i];
    const pair: unknown = typeof merge === 'string' ? merge.split(' ') : merge;
    if (!Array.isArray(pair) || pair.length !== 2)
      throw refuse(where, `model.merges[${i}]`, 'two tokens with a space between', merge);
    const [left, right] = pair as [string, string];
    const result = left + right;
    const found = [ids.get(left), ids.get(right), ids.get(result)];
    const missing = found.indexOf(undefined);
    if (missing >= 0) {
      const name = show([left, right, result][missing]);
      throw refuse(where, `model.merges[${i}]`, `tokens of the vocabulary; ${name} is not one`, merge);
    }
    merges.set(found as number[], i * 3);
    if (joins.length > 0) {
      joins[i * 2] = lastCodePoint(left);
      joins[i * 2 + 1] = right.codePointAt(0) ?? 0;
    }
  }
  const plan = { byteIds, merges, ignoreMerges, characters: undefined };
  if (bytes) return { ...plan, rules, normalizer: normal === null ? undefined : ((normal as Json).type as NormalForm) };

  // Bytes of fallback take no part in merges; a file where they do is not for us.
  const fallback = new Set(byteIds);
  for (let i = 0; i < merges.length; i++) if (i % 3 !== 2 && fallback.has(merges[i]!)) return undefined;
  const single = [...ids].filter(([token]) => token.length === 1 || (token.length === 2 && token.codePointAt(0)! > 0xffff));
  const codes = Int32Array.from(single, ([token]) => token.codePointAt(0)!);
  const characters = { codes, ids: Int32Array.from(single, ([, id]) => id), joins, ...spaces! };
  return { ...plan, rules: 0, normalizer: undefined, characters };
}

function lastCodePoint(text: string): number {
  const pair = text.length > 1 ? text.codePointAt(text.length - 2)! : 0;
  return pair > 0xffff ? pair : (text.codePointAt(text.length - 1) ?? 0);
}

/** The token that stands for a byte where a character has none. */
const byteToken = (byte: number) => `<0x${byte.toString(16).toUpperCase().padStart(2, '0')}>`;

/** How a SentencePiece-style pipeline treats spaces, if it is one that the native encoder covers. */
function sentencePiece(json: Json): { prepend: boolean; strip: number } | undefined {
  const isReplace = (entry: unknown, from: string, to: string) =>
    isObject(entry) &&
    entry.type === 'Replace' &&
    isObject(entry.pattern) &&
    entry.pattern.String === from &&
    entry.content === to;
  const { normalizer, pre_tokenizer: split, decoder } = json;
  const steps = isObject(normalizer) && normalizer.type === 'Sequence' ? normalizer.normalizers : [normalizer];
  if (!Array.isArray(steps) || !isReplace(steps.at(-1), ' ', '\u2581')) return undefined;
  const prepend = steps.length === 2 && isObject(steps[0]) && steps[0].type === 'Prepend' && steps[0].prepend === '\u2581';
  if (steps.length !== (prepend ? 2 : 1)) return undefined;
  // Gemma splits at spaces, of which none are left.
  const idle =
    isObject(split) &&
    split.type === 'Split' &&
    isObject(split.pattern) &&
    split.pattern.String === ' ' &&
    split.invert === false;
  if ((split ?? null) !== null && !(idle && split.behavior === 'MergedWithPrevious')) return undefined;

  const chain = isObject(decoder) && decoder.type === 'Sequence' ? decoder.decoders : undefined;
  if (!Array.isArray(chain) || !isReplace(chain[0], '\u2581', ' ')) return undefined;
  const types = chain.map((entry) => (isObject(entry) ? entry.type : undefined)).join();
  if (types === 'Replace,ByteFallback,Fuse') return { prepend, strip: 0 };
  const last = chain[3] as Json;
  if (types !== 'Replace,ByteFallback,Fuse,Strip' || last.content !== ' ' || last.stop !== 0 || !Number.isInteger(last.start))
    return undefined;
  return { prepend, strip: last.start as number };
}

const usualNames = {
  bos: ['<bos>', '<s>', '<|begin_of_text|>', '<|startoftext|>', '[BOS]', '<|endoftext|>'],
  eos: ['<eos>', '</s>', '<|end_of_text|>', '<|endoftext|>', '[EOS]'],
  pad: ['<pad>', '[PAD]', '<|pad|>', '<|finetune_right_pad_id|>'],
  unk: ['<unk>', '[UNK]'],
};

/** The tokens with a part to play: as the configuration names them, else as the template places them, else by their usual names. */
function namedTokens(json: Json, config: Json, ids: ReadonlyMap<string, number>, added: readonly AddedToken[]) {
  const fromConfig = (name: string) => {
    const entry = config[name];
    const token = isObject(entry) ? entry.content : entry;
    return typeof token === 'string' ? ids.get(token) : undefined;
  };
  const template = templateTokens(json.post_processor);
  const byName = (kind: keyof typeof usualNames) => {
    const found = usualNames[kind].find((name) => added.some((token) => token.content === name));
    return found === undefined ? undefined : ids.get(found);
  };
  const model = json.model as Json;
  const unk = typeof model.unk_token === 'string' ? ids.get(model.unk_token) : undefined;
  const bos = fromConfig('bos_token') ?? (template.first === undefined ? undefined : ids.get(template.first)) ?? byName('bos');
  return {
    bos,
    begins: bos !== undefined && begun(config.add_bos_token, template.first, bos, ids),
    eos: fromConfig('eos_token') ?? (template.last === undefined ? undefined : ids.get(template.last)) ?? byName('eos'),
    pad: fromConfig('pad_token') ?? byName('pad'),
    unk: fromConfig('unk_token') ?? unk ?? byName('unk'),
  };
}

/** What Transformers does: as `add_bos_token` says, else where the post-processor puts the token first. */
function begun(asked: unknown, first: string | undefined, bos: number, ids: ReadonlyMap<string, number>): boolean {
  return typeof asked === 'boolean' ? asked : first !== undefined && ids.get(first) === bos;
}

/** The tokens that a post-processor puts around a text. */
export function templateTokens(entry: unknown): { first?: string; last?: string } {
  if (!isObject(entry)) return {};
  if (entry.type === 'Sequence' && Array.isArray(entry.processors)) {
    return Object.assign({}, ...entry.processors.map(templateTokens));
  }
  if (entry.type !== 'TemplateProcessing' || !Array.isArray(entry.single)) return {};
  const name = (piece: unknown) => {
    const token = isObject(piece) ? piece.SpecialToken : undefined;
    return isObject(token) && typeof token.id === 'string' ? token.id : undefined;
  };
  const first = name(entry.single[0]);
  const last = name(entry.single.at(-1));
  return { ...(first === undefined ? {} : { first }), ...(last === undefined ? {} : { last }) };
}

function fingerprintOf(tokens: readonly (string | undefined)[]): string {
  // Lengths keep the boundaries, so that no two vocabularies give the same text.
  const all = Array.from(tokens, (token) => (token === undefined ? '-' : `${token.length} ${token}`));
  return createHash('sha256').update(all.join('\n')).digest('hex').slice(0, 32);
}

/** Writes tokenizer.json, and beside it the configuration when `path` is a folder. */
export async function saveTokenizer(file: TokenizerFile, path: string): Promise<void> {
  if (path.endsWith('.json')) {
    await write(path, file.text);
    return;
  }
  await write(join(path, 'tokenizer.json'), file.text);
  await write(join(path, 'tokenizer_config.json'), file.configText ?? defaultConfig(file));
}

const write = (path: string, text: string) => writeAtomic(path, (file) => writeAll(file, Buffer.from(text)));

function defaultConfig(file: TokenizerFile): string {
  const named = { bos_token: file.bos, eos_token: file.eos, pad_token: file.pad, unk_token: file.unk };
  const tokens = Object.fromEntries(
    Object.entries(named).flatMap(([name, id]) => (id === undefined ? [] : [[name, file.tokens[id]]])),
  );
  return `${JSON.stringify({ tokenizer_class: 'PreTrainedTokenizerFast', clean_up_tokenization_spaces: false, ...tokens }, null, 2)}\n`;
}

function parseObject(text: string, where: string): Json {
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch (error) {
    throw new FormatError(`loadTokenizer: ${where} is not JSON: ${(error as Error).message}`, {
      code: 'ERR_TOKENIZER',
      op: 'loadTokenizer',
      argument: where,
      cause: error,
    });
  }
  if (!isObject(json)) throw refuse(where, 'the file', 'an object', json);
  return json;
}

export function isObject(value: unknown): value is Json {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

function show(value: unknown): string {
  let text: string | undefined;
  try {
    text = JSON.stringify(value);
  } catch {}
  text ??= String(value);
  return text.length > 80 ? `${text.slice(0, 80)}...` : text;
}

function refuse(where: string, entry: string, expected: string, actual: unknown): FormatError {
  return new FormatError(`loadTokenizer: ${where}: ${entry} is ${show(actual)}; it should be ${expected}`, {
    code: 'ERR_TOKENIZER',
    op: 'loadTokenizer',
    argument: entry,
    expected,
    actual: show(actual),
  });
}
