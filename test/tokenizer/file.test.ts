import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { afterAll, beforeAll, expect, test, vi } from 'vitest';
import { LimbeckError } from '../../src/tensor/errors.ts';
import { loadTokenizer, type Tokenizer, tokenizerFromJson } from '../../src/tokenizer/tokenizer.ts';
import { trainTokenizer } from '../../src/tokenizer/train.ts';
import { awkward, pair, sentencePiece, variant } from './corpus.ts';

const folder = mkdtempSync(join(tmpdir(), 'limbeck-test-'));
afterAll(() => rmSync(folder, { recursive: true }));
let json: string;
beforeAll(async () => {
  const tokenizer = await trainTokenizer(['the cat sat on the mat, the cat sat'], { vocabSize: 300 });
  await tokenizer.save(join(folder, 'small.json'));
  json = readFileSync(join(folder, 'small.json'), 'utf8');
});

test('a pipeline that the native encoder does not cover goes through @huggingface/tokenizers', async () => {
  const lower = variant(sentencePiece(json), (file) => {
    file.normalizer = { type: 'Sequence', normalizers: [{ type: 'Lowercase' }, file.normalizer] };
  });
  const { ours: tokenizer, reference } = pair(lower);
  expect([tokenizer.engine, tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.unk]).toEqual(['generic', 2, 1, 0, 3]);
  for (const text of ['the cat sat\n\non the mat.', 'é😀 中文 the', ...awkward]) {
    const ids = tokenizer.encode(text);
    expect([...ids]).toEqual(reference.encode(text, { add_special_tokens: false }).ids);
    expect([...(await tokenizer.encodeBatch([text], { bos: true }))[0]!]).toEqual([2, ...ids]);
    const decoder = tokenizer.decoder();
    expect(Array.from(ids, (id) => decoder.push(id)).join('') + decoder.end()).toBe(tokenizer.decode(ids));
  }
  expect(tokenizer.decode(tokenizer.encode('The CAT é😀 sat'))).toBe('the cat é😀 sat');
  expect([...tokenizer.encode('a<eos>')].at(-1)).toBe(1);
  expect([...tokenizer.encode('a<eos>', { special: false })]).not.toContain(1);
  expect(tokenizer.decode([])).toBe('');
  expect(() => tokenizer.decode([9999])).toThrow(expect.objectContaining({ code: 'ERR_TOKEN_RANGE' }));
});

test('what the native encoder does not cover exactly is left to the other', () => {
  const engine = (change: (file: Record<string, unknown> & { model: Record<string, unknown> }) => void) =>
    tokenizerFromJson(variant(json, change)).engine;
  expect(engine(() => {})).toBe('native');
  expect(engine((f) => Object.assign(f, { normalizer: { type: 'Lowercase' } }))).toBe('generic');
  expect(engine((f) => Object.assign(f, { pre_tokenizer: { type: 'ByteLevel', add_prefix_space: true, use_regex: true } }))).toBe(
    'generic',
  );
  expect(engine((f) => Object.assign(f, { decoder: { type: 'BPEDecoder', suffix: '' } }))).toBe('generic');
  expect(engine((f) => Object.assign(f.model, { end_of_word_suffix: '</w>' }))).toBe('generic');
  expect(engine((f) => Object.assign((f.added_tokens as object[])[0]!, { lstrip: true }))).toBe('generic');
  const unigram = {
    type: 'Unigram',
    unk_id: 0,
    vocab: [
      ['<unk>', 0],
      ['a', -1],
      ['b', -2],
      ['ab', -1.5],
    ],
  };
  expect(
    engine((f) =>
      Object.assign(f, { model: unigram, added_tokens: [], pre_tokenizer: null, post_processor: null, decoder: null }),
    ),
  ).toBe('generic');
});

test('malformed files are refused, and the entry named', () => {
  const refused = (change: (file: Record<string, unknown> & { model: Record<string, unknown> }) => void, argument: string) =>
    expect(() => tokenizerFromJson(variant(json, change), undefined, 'x/tokenizer.json')).toThrow(
      expect.objectContaining({
        name: 'FormatError',
        code: 'ERR_TOKENIZER',
        argument,
        message: expect.stringContaining('x/tokenizer.json'),
      }),
    );
  refused((f) => Object.assign(f, { model: 3 }), 'model');
  refused((f) => Object.assign(f.model, { vocab: null }), 'model.vocab');
  refused((f) => Object.assign(f.model, { vocab: {} }), 'model.vocab');
  refused((f) => Object.assign(f.model.vocab as object, { a: -1 }), 'model.vocab["a"]');
  refused((f) => Object.assign(f.model.vocab as object, { qq: 7 }), 'model.vocab["qq"]');
  refused((f) => Object.assign(f.model.vocab as object, { qq: 1e9 }), 'model.vocab["qq"]');
  refused((f) => Object.assign(f.model, { merges: 'a b' }), 'model.merges');
  refused((f) => Object.assign(f.model.merges as object, { 1: 'abc' }), 'model.merges[1]');
  refused((f) => Object.assign(f.model.merges as object, { 2: ['q', 'zz'] }), 'model.merges[2]');
  refused((f) => Object.assign(f, { added_tokens: {} }), 'added_tokens');
  refused((f) => Object.assign(f.added_tokens as object, { 2: { id: 2 } }), 'added_tokens[2].content');
  refused((f) => Object.assign(f.added_tokens as object, { 2: { id: 'two', content: '<bos>' } }), 'added_tokens[2].id');
  expect(() => tokenizerFromJson('{"model": ')).toThrow(expect.objectContaining({ code: 'ERR_TOKENIZER' }));
  expect(() => tokenizerFromJson('[]')).toThrow(expect.objectContaining({ code: 'ERR_TOKENIZER' }));
  expect(() => tokenizerFromJson(json, '{"bos_token"')).toThrow(expect.objectContaining({ code: 'ERR_TOKENIZER' }));
});

test('a missing file is named', async () => {
  await expect(loadTokenizer(join(folder, 'none'))).rejects.toMatchObject({ name: 'FileError', code: 'ERR_READ' });
  await expect(loadTokenizer(folder)).rejects.toMatchObject({ code: 'ERR_READ', argument: join(folder, 'tokenizer.json') });
});

test('the configuration beside the file names the special tokens; saving keeps both texts', async () => {
  const config = JSON.stringify({ bos_token: { content: '<eos>' }, eos_token: '<bos>', pad_token: null, extra: 1 });
  const tokenizer = tokenizerFromJson(json, config);
  expect([tokenizer.bos, tokenizer.eos, tokenizer.pad]).toEqual([1, 2, 0]);
  await tokenizer.save(join(folder, 'kept'));
  expect(readFileSync(join(folder, 'kept/tokenizer.json'), 'utf8')).toBe(json);
  expect(readFileSync(join(folder, 'kept/tokenizer_config.json'), 'utf8')).toBe(config);
  expect(readdirSync(join(folder, 'kept'))).toHaveLength(2);
  expect((await loadTokenizer(join(folder, 'kept'))).eos).toBe(2);
  writeFileSync(join(folder, 'plain'), '');
  await expect(tokenizer.save(join(folder, 'plain/below'))).rejects.toMatchObject({ name: 'FileError', code: 'ERR_WRITE' });
});

test('a begin token goes before texts where Transformers puts it: add_bos_token says so, or else the post-processor does', () => {
  const first = { SpecialToken: { id: '<bos>', type_id: 0 } };
  const template = { type: 'TemplateProcessing', single: [first, { Sequence: { id: 'A', type_id: 0 } }] };
  const bytes = { type: 'ByteLevel', add_prefix_space: true, trim_offsets: false };
  const begins = (processor: object | null, config: object = {}) =>
    tokenizerFromJson(
      variant(json, (f) => Object.assign(f, { post_processor: processor })),
      JSON.stringify({ bos_token: '<bos>', ...config }),
    ).begins;
  expect(begins(template)).toBe(true);
  expect(begins({ type: 'Sequence', processors: [bytes, template] })).toBe(true);
  expect(begins(template, { add_bos_token: false })).toBe(false);
  // As GPT-2's file is, and Qwen's.
  expect(begins(bytes)).toBe(false);
  expect(begins(null)).toBe(false);
  expect(begins(bytes, { add_bos_token: true })).toBe(true);
  expect(begins(template, { bos_token: '<eos>' })).toBe(false);
});

test('the fingerprint is that of the vocabulary, the digest that of the file', () => {
  const base = tokenizerFromJson(json);
  const reordered = tokenizerFromJson(variant(json, (f) => (f.model.merges as object[]).reverse()));
  expect(reordered.fingerprint).toBe(base.fingerprint);
  expect(reordered.digest).not.toBe(base.digest);
  const renamed = tokenizerFromJson(
    variant(json, (f) => Object.assign((f.added_tokens as object[])[1]!, { content: '<end>', id: 300 })),
  );
  expect(renamed.fingerprint).not.toBe(base.fingerprint);
});

/** Works on text, or says with a typed error why not. */
function survives(text: string): void {
  let tokenizer: Tokenizer;
  try {
    tokenizer = tokenizerFromJson(text);
  } catch (error) {
    expect(LimbeckError.is(error), String(error)).toBe(true);
    return;
  }
  try {
    const ids = tokenizer.encode('the cat <bos> sat 12 é😀\n');
    tokenizer.decode(ids);
    tokenizer.decode(tokenizer.encode('the mat', { special: false }));
  } catch (error) {
    expect(LimbeckError.is(error), String(error)).toBe(true);
  }
}

test.each(['bytes', 'characters'])('damaged files over %s never do worse than a typed error', (kind) => {
  const text = kind === 'bytes' ? json : sentencePiece(json);
  vi.spyOn(console, 'warn').mockReturnValue(undefined);
  const original = JSON.parse(text) as object;
  const places: (string | number)[][] = [];
  const walk = (value: unknown, path: (string | number)[]) => {
    if (path.length > 0) places.push(path);
    if (typeof value !== 'object' || value === null) return;
    for (const key of Object.keys(value).slice(0, 12)) walk(value[key as keyof typeof value], [...path, key]);
  };
  walk(original, []);
  const junk = fc.oneof(
    fc.jsonValue({ maxDepth: 2 }),
    fc.constantFrom<unknown>(null, -1, 1e300, '', ' ', 'a b', [], {}, '\ud800', 'BPE', 'ByteLevel', undefined),
  );
  fc.assert(
    fc.property(fc.array(fc.tuple(fc.constantFrom(...places), junk), { minLength: 1, maxLength: 3 }), (changes) => {
      const copy = JSON.parse(text) as Record<string, unknown>;
      for (const [path, value] of changes) {
        let at: Record<string, unknown> | undefined = copy;
        for (const key of path.slice(0, -1)) at = (typeof at === 'object' && at !== null ? at[key] : undefined) as typeof at;
        if (typeof at === 'object' && at !== null) at[path.at(-1)!] = value;
      }
      survives(JSON.stringify(copy));
    }),
    { numRuns: 200 },
  );
  fc.assert(
    fc.property(fc.nat(text.length - 1), fc.nat(20), fc.string({ maxLength: 4 }), (at, cut, put) => {
      survives(text.slice(0, at) + put + text.slice(at + cut));
    }),
    { numRuns: 200 },
  );
});
