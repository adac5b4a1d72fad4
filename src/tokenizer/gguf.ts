// Vocabularies as GGUF metadata, to and from a tokenizer.json: byte-level BPE, and SentencePiece-style BPE over characters.

import type { GgufMetadata, GgufValue } from '../io/gguf-header.ts';
import { ConfigError, FormatError } from '../tensor/errors.ts';
import { withoutGenerationTags } from './chat.ts';
import { templateTokens } from './file.ts';
import { type PreTokenizerName, preTokenizerJson, preTokenizerOf } from './pretokenizers.ts';
import { type Tokenizer, tokenizerFromJson } from './tokenizer.ts';

// llama.cpp's types of tokens.
const normal = 1;
const unknown = 2;
const control = 3;
const userDefined = 4;
const unused = 5;
const byte = 6;

/** Ways to cut text that both know, ours first; `llama-bpe` also takes whole words before merges. */
const cuts: readonly (readonly [ours: PreTokenizerName, theirs: readonly string[], wholeWords: boolean])[] = [
  ['gpt2', ['gpt-2', 'phi-2', 'mpt', 'olmo', 'jais'], false],
  ['digits', ['smollm', 'starcoder', 'refact', 'command-r', 'codeshell'], false],
  ['llama3', ['smaug-bpe', 'dbrx'], false],
  ['llama3', ['llama-bpe', 'llama3', 'llama-v3'], true],
  ['qwen2', ['qwen2', 'deepseek-r1-qwen', 'stablelm2'], false],
];

export interface GgufVocabulary {
  readonly metadata: readonly (readonly [string, GgufValue])[];
  /** What the user should know about it. */
  readonly notes: readonly string[];
}

/**
 * The metadata of a tokenizer for a model of `vocabSize` rows; rows without a token get one that is never used.
 * @param template Jinja source. Default: the `chat_template` of tokenizer_config.json
 * @throws ConfigError for a tokenizer that llama.cpp has not, or that has more tokens than the model has rows.
 */
export function ggufVocabulary(tokenizer: Tokenizer | undefined, vocabSize: number, template?: string): GgufVocabulary {
  if (tokenizer === undefined) {
    return { metadata: [['tokenizer.ggml.model', { type: 'string', value: 'none' }]], notes: ['the file has no tokenizer'] };
  }
  if (tokenizer.vocabSize > vocabSize) {
    throw refuse(`has ${tokenizer.vocabSize} tokens, the model's embedding ${vocabSize} rows: it belongs to another model`);
  }
  const { file } = tokenizer;
  if (file.native === undefined) {
    throw refuse(
      'is of a kind that GGUF has no name for (only BPE over bytes or over characters has); export without it, or change it',
    );
  }
  const { characters, ignoreMerges } = file.native;
  const added = new Map(file.added.map((token) => [token.id, token]));
  const tokens: string[] = [];
  const types = new Int32Array(vocabSize);
  for (let id = 0; id < vocabSize; id++) {
    const token = file.tokens[id];
    const own = added.get(id);
    let text = token ?? `[PAD${id}]`;
    if (token === undefined) types[id] = unused;
    else if (own?.special) types[id] = id === file.unk && characters !== undefined ? unknown : control;
    else if (own !== undefined) {
      types[id] = userDefined;
      // llama.cpp looks for these in the text as it is written.
      if (characters !== undefined) text = text.replaceAll('\u2581', ' ');
    } else if (characters !== undefined && id === file.unk) types[id] = unknown;
    else types[id] = characters !== undefined && /^<0x[0-9A-F]{2}>$/.test(text) ? byte : normal;
    tokens.push(text);
  }
  const notes: string[] = [];
  const metadata: [string, GgufValue][] = [];
  const put = (key: string, value: GgufValue): void => {
    metadata.push([`tokenizer.${key}`, value]);
  };
  const merges = mergesOf(file.json);
  if (characters === undefined) {
    const rules = preTokenizerOf(file.json.pre_tokenizer);
    const cut =
      cuts.find(([ours, , wholeWords]) => ours === rules && wholeWords === ignoreMerges) ?? cuts.find(([ours]) => ours === rules);
    if (cut === undefined)
      throw refuse('cuts text into words in a way that GGUF has no name for; export without it, or change it');
    if (cut[2] !== ignoreMerges)
      notes.push('llama.cpp merges inside words that are tokens as a whole, where this tokenizer does not');
    if (file.native.normalizer !== undefined)
      notes.push(`llama.cpp does not bring text into the form ${file.native.normalizer} first`);
    put('ggml.model', { type: 'string', value: 'gpt2' });
    put('ggml.pre', { type: 'string', value: cut[1][0]! });
    put('ggml.tokens', { type: 'array', of: 'string', value: tokens });
    put('ggml.token_type', { type: 'array', of: 'i32', value: types });
    put('ggml.merges', { type: 'array', of: 'string', value: merges.map(([left, right]) => `${left} ${right}`) });
  } else {
    const open = openPairs(file.ids, merges);
    if (open > 0) notes.push(`llama.cpp also merges ${open} pairs that make a token and are not in the tokenizer's list`);
    put('ggml.model', { type: 'string', value: 'llama' });
    put('ggml.pre', { type: 'string', value: 'default' });
    put('ggml.tokens', { type: 'array', of: 'string', value: tokens });
    put('ggml.scores', { type: 'array', of: 'f32', value: scoresOf(file.ids, merges, vocabSize) });
    put('ggml.token_type', { type: 'array', of: 'i32', value: types });
    put('ggml.add_space_prefix', { type: 'bool', value: characters.prepend });
  }
  for (const [name, id] of [
    ['bos', file.bos],
    ['eos', file.eos],
    ['unknown', file.unk],
    ['padding', file.pad],
  ] as const) {
    if (id !== undefined) put(`ggml.${name}_token_id`, { type: 'u32', value: id });
  }
  const { last } = templateTokens(file.json.post_processor);
  put('ggml.add_bos_token', { type: 'bool', value: file.begins });
  put('ggml.add_eos_token', { type: 'bool', value: last !== undefined });
  const source = template ?? (typeof file.config.chat_template === 'string' ? file.config.chat_template : undefined);
  if (source !== undefined) put('chat_template', { type: 'string', value: withoutGenerationTags(source) });
  return { metadata, notes };
}

function mergesOf(json: { readonly [key: string]: unknown }): [string, string][] {
  const { merges } = json.model as { merges: readonly (string | [string, string])[] };
  return merges.map((merge) => (typeof merge === 'string' ? (merge.split(' ') as [string, string]) : merge));
}

/** llama.cpp merges the pair whose result has the highest score: the rank of the first merge that makes it, from above. */
function scoresOf(
  ids: ReadonlyMap<string, number>,
  merges: readonly [string, string][],
  vocabSize: number,
): Float32Array<ArrayBuffer> {
  const scores = new Float32Array(vocabSize).fill(-merges.length);
  let rank = 0;
  const seen = new Set<number>();
  for (const [left, right] of merges) {
    const id = ids.get(left + right)!;
    if (seen.has(id)) continue;
    seen.add(id);
    scores[id] = -rank++;
  }
  return scores;
}

/** Pairs of tokens that together are a token, without a merge. */
function openPairs(ids: ReadonlyMap<string, number>, merges: readonly [string, string][]): number {
  const listed = new Set(merges.map(([left, right]) => `${left} ${right}`));
  const made = new Set(merges.map(([left, right]) => left + right));
  let open = 0;
  for (const token of made) {
    for (let at = 1; at < token.length; at++) {
      const [left, right] = [token.slice(0, at), token.slice(at)];
      if (ids.has(left) && ids.has(right) && !listed.has(`${left} ${right}`)) open++;
    }
  }
  return open;
}

function refuse(problem: string): ConfigError {
  return new ConfigError(`exportGguf: the tokenizer ${problem}`, { code: 'ERR_CONFIG', op: 'exportGguf', argument: 'tokenizer' });
}

/** The tokenizer of a GGUF file. @throws FormatError for a kind that ours have not */
export function tokenizerOfGguf(metadata: GgufMetadata, path: string): Tokenizer {
  const bad = (key: string, expected: string, actual: unknown): FormatError => {
    const data = { code: 'ERR_TOKENIZER', op: 'loadModel', argument: `tokenizer.${key}`, expected, actual: String(actual) };
    return new FormatError(`${path}: tokenizer.${key} is ${String(actual)}; it should be ${expected}`, data);
  };
  const get = (key: string): GgufValue | undefined => metadata.get(`tokenizer.${key}`);
  const strings = (key: string): readonly string[] => {
    const entry = get(key);
    if (entry?.type === 'array' && entry.of === 'string') return entry.value;
    throw bad(key, 'a list of texts', entry?.type);
  };
  const numbers = (key: string, count: number): ArrayLike<number> | undefined => {
    const entry = get(key);
    if (entry === undefined) return undefined;
    if (
      entry.type === 'array' &&
      (entry.of === 'i32' || entry.of === 'f32' || entry.of === 'u32') &&
      entry.value.length === count
    ) {
      return entry.value as ArrayLike<number>;
    }
    throw bad(key, `a list of ${count} numbers`, entry.type);
  };
  const model = get('ggml.model')?.value;
  const isBytes = model === 'gpt2';
  if (!isBytes && model !== 'llama') throw bad('ggml.model', 'gpt2 or llama; loadWeights reads the model alone', model);
  const tokens = strings('ggml.tokens');
  const types = numbers('ggml.token_type', tokens.length);
  const typeOf = (id: number): number => types?.[id] ?? normal;
  // As tokenizer.json has them; see ggufVocabulary.
  const textOf = (id: number): string =>
    !isBytes && typeOf(id) === userDefined ? tokens[id]!.replaceAll(' ', '\u2581') : tokens[id]!;

  const vocab = new Map<string, number>();
  const added: object[] = [];
  for (const id of tokens.keys()) {
    const type = typeOf(id);
    if (type === unused || textOf(id) === '') continue;
    vocab.set(textOf(id), id);
    if (type !== control && type !== userDefined && !(type === unknown && !isBytes)) continue;
    const flags = { single_word: false, lstrip: false, rstrip: false, normalized: false, special: type !== userDefined };
    added.push({ id, content: textOf(id), ...flags });
  }
  const named = (key: string): string | undefined => {
    const value = get(`ggml.${key}_token_id`)?.value;
    return typeof value === 'number' ? tokens[value] : undefined;
  };
  const [bos, eos, unk, pad] = [named('bos'), named('eos'), named('unknown'), named('padding')];
  // Without the key, as llama.cpp decides.
  const addBos = get('ggml.add_bos_token')?.value ?? (!isBytes || /^llama(3|-v3|-bpe)$/.test(String(get('ggml.pre')?.value)));
  const json = {
    version: '1.0',
    truncation: null,
    padding: null,
    added_tokens: added,
    post_processor: addBos === true && bos !== undefined ? beginWith(bos, vocab.get(bos)!) : null,
    ...(isBytes ? overBytes() : overCharacters()),
  };
  const template = chatTemplates(metadata);
  const config = {
    tokenizer_class: 'PreTrainedTokenizerFast',
    clean_up_tokenization_spaces: false,
    ...(bos !== undefined && { bos_token: bos }),
    ...(addBos === false && { add_bos_token: false }),
    ...(eos !== undefined && { eos_token: eos }),
    ...(unk !== undefined && { unk_token: unk }),
    ...(pad !== undefined && { pad_token: pad }),
    ...(template !== undefined && { chat_template: template }),
  };
  return tokenizerFromJson(`${JSON.stringify(json)}\n`, `${JSON.stringify(config, null, 2)}\n`, path);

  function overBytes(): object {
    const pre = get('ggml.pre')?.value;
    const cut = cuts.find(([, theirs]) => theirs.includes(String(pre)));
    if (cut === undefined) throw bad('ggml.pre', cuts.flatMap(([, theirs]) => theirs).join(', '), pre);
    return {
      normalizer: null,
      pre_tokenizer: preTokenizerJson(cut[0]),
      decoder: { type: 'ByteLevel', add_prefix_space: true, trim_offsets: true, use_regex: true },
      model: { ...bpe(strings('ggml.merges').map(pairOf)), byte_fallback: false, ignore_merges: cut[2] },
    };
  }

  function overCharacters(): object {
    const scores = numbers('ggml.scores', tokens.length);
    if (scores === undefined) throw bad('ggml.scores', 'a list of numbers', undefined);
    const prefix = get('ggml.add_space_prefix')?.value ?? true;
    const spaces = { type: 'Replace', pattern: { String: ' ' }, content: '\u2581' };
    const decoders = [
      { type: 'Replace', pattern: { String: '\u2581' }, content: ' ' },
      { type: 'ByteFallback' },
      { type: 'Fuse' },
      ...(prefix ? [{ type: 'Strip', content: ' ', start: 1, stop: 0 }] : []),
    ];
    return {
      normalizer: prefix ? { type: 'Sequence', normalizers: [{ type: 'Prepend', prepend: '\u2581' }, spaces] } : spaces,
      pre_tokenizer: null,
      decoder: { type: 'Sequence', decoders },
      model: { ...bpe(mergesByScore(scores)), unk_token: unk ?? null, fuse_unk: true, byte_fallback: true, ignore_merges: false },
    };
  }

  function bpe(merges: readonly (readonly [string, string])[]): object {
    const model = { type: 'BPE', dropout: null, unk_token: null, continuing_subword_prefix: null, end_of_word_suffix: null };
    return { ...model, fuse_unk: false, vocab: Object.fromEntries(vocab), merges };
  }

  function pairOf(merge: string, i: number): [string, string] {
    const at = merge.indexOf(' ', 1);
    if (at < 0) throw bad(`ggml.merges[${i}]`, 'two tokens with a space between', merge);
    return [merge.slice(0, at), merge.slice(at + 1)];
  }

  /** Every pair of tokens that makes a token, the highest score first. */
  function mergesByScore(scores: ArrayLike<number>): [string, string][] {
    const candidates = [...vocab].filter(([, id]) => typeOf(id) === normal || typeOf(id) === userDefined);
    const parts = new Map(candidates);
    candidates.sort(([, a], [, b]) => scores[b]! - scores[a]! || a - b);
    const merges: [string, string][] = [];
    for (const [token] of candidates) {
      const pairs: [string, string][] = [];
      for (let at = 1; at < token.length; at++) {
        const pair: [string, string] = [token.slice(0, at), token.slice(at)];
        if (parts.has(pair[0]) && parts.has(pair[1])) pairs.push(pair);
      }
      pairs.sort(([a, b], [c, d]) => parts.get(a)! - parts.get(c)! || parts.get(b)! - parts.get(d)!);
      merges.push(...pairs);
    }
    return merges;
  }
}

/** The chat template, or, where there are several, the list that a tokenizer_config.json has. */
function chatTemplates(metadata: GgufMetadata): string | object[] | undefined {
  const list: { name: string; template: string }[] = [];
  for (const [key, { value }] of metadata) {
    const name = /^tokenizer\.chat_template(?:\.(.+))?$/.exec(key);
    if (name !== null && typeof value === 'string') list.push({ name: name[1] ?? 'default', template: value });
  }
  return list.length === 1 && list[0]!.name === 'default' ? list[0]!.template : list.length === 0 ? undefined : list;
}

function beginWith(token: string, id: number): object {
  const [special, text] = [{ SpecialToken: { id: token, type_id: 0 } }, { Sequence: { id: 'A', type_id: 0 } }];
  const second = [{ SpecialToken: { id: token, type_id: 1 } }, { Sequence: { id: 'B', type_id: 1 } }];
  const special_tokens = { [token]: { id: token, ids: [id], tokens: [token] } };
  return { type: 'TemplateProcessing', single: [special, text], pair: [special, text, ...second], special_tokens };
}
