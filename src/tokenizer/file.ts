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

/** What the native encoder needs beside the vocabulary. */
export interface ByteLevelPlan {
  readonly byteIds: Int32Array;
  /** left, right, result of each merge. */
  readonly merges: Int32Array;
  readonly rules: number;
  readonly normalizer: 'NFC' | 'NFD' | 'NFKC' | 'NFKD' | undefined;
  readonly ignoreMerges: boolean;
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
  readonly eos: number | undefined;
  readonly pad: number | undefined;
  readonly unk: number | undefined;
  readonly fingerprint: string;
  readonly digest: string;
  /** Undefined when the native encoder does not cover the pipeline. */
  readonly byteLevel: ByteLevelPlan | undefined;
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
  const add = (token: string, id: unknown, entry: string): number => {
    if (!Number.isInteger(id) || (id as number) < 0 || (id as number) > largestId)
      throw refuse(where, entry, `an integer id from 0 to ${largestId}`, id);
    const other = tokens[id as number];
    if (other !== undefined && other !== token) throw refuse(where, entry, `an id of its own; ${show(other)} has it too`, id);
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
      add(pair[0], id, `model.vocab[${id}]`);
    }
  } else if (isObject(vocab)) {
    for (const [token, id] of Object.entries(vocab)) add(token, id, `model.vocab[${show(token)}]`);
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
    const id = add(content, entry.id, `added_tokens[${i}].id`);
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
    byteLevel: plainAdded ? byteLevelPlan(json, model, ids, where) : undefined,
  };
}

function byteLevelPlan(json: Json, model: Json, ids: ReadonlyMap<string, number>, where: string): ByteLevelPlan | undefined {
  if (model.type !== 'BPE') return undefined;
  const list = model.merges;
  if (!Array.isArray(list)) throw refuse(where, 'model.merges', 'a list', list);
  const rules = rulesFor(json.pre_tokenizer);
  const decoder = json.decoder;
  if (rules === undefined || !isObject(decoder) || decoder.type !== 'ByteLevel') return undefined;
  if (model.dropout || model.continuing_subword_prefix || model.end_of_word_suffix) return undefined;
  const normal = json.normalizer ?? null;
  if (normal !== null && !(isObject(normal) && /^NFK?[CD]$/.test(String(normal.type)))) return undefined;
  const byteIds = new Int32Array(256);
  for (const [byte, char] of charOfByte.entries()) {
    const id = ids.get(char);
    if (id === undefined) return undefined;
    byteIds[byte] = id;
  }

  const merges = new Int32Array(list.length * 3);
  for (const [i, merge] of list.entries()) {
    const pair = typeof merge === 'string' ? merge.split(' ') : merge;
    if (!Array.isArray(pair) || pair.length !== 2)
      throw refuse(where, `model.merges[${i}]`, 'two tokens with a space between', merge);
    for (const [j, token] of [pair[0], pair[1], `${pair[0]}${pair[1]}`].entries()) {
      const id = ids.get(token as string);
      if (id === undefined)
        throw refuse(where, `model.merges[${i}]`, `tokens of the vocabulary; ${show(token)} is not one`, merge);
      merges[i * 3 + j] = id;
    }
  }
  const normalizer = normal === null ? undefined : ((normal as Json).type as 'NFC');
  return { byteIds, merges, rules, normalizer, ignoreMerges: model.ignore_merges === true };
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
  return {
    bos: fromConfig('bos_token') ?? (template.first === undefined ? undefined : ids.get(template.first)) ?? byName('bos'),
    eos: fromConfig('eos_token') ?? (template.last === undefined ? undefined : ids.get(template.last)) ?? byName('eos'),
    pad: fromConfig('pad_token') ?? byName('pad'),
    unk: fromConfig('unk_token') ?? unk ?? byName('unk'),
  };
}

function templateTokens(entry: unknown): { first?: string; last?: string } {
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
  const hash = createHash('sha256');
  // Lengths keep the boundaries, so that no two vocabularies give the same bytes.
  for (const token of tokens) hash.update(token === undefined ? '-\n' : `${token.length} ${token}\n`);
  return hash.digest('hex').slice(0, 32);
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
