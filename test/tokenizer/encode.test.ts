import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import type { PreTokenizerName } from '../../src/tokenizer/pretokenizers.ts';
import { type Tokenizer, tokenizerFromJson } from '../../src/tokenizer/tokenizer.ts';
import { trainTokenizer } from '../../src/tokenizer/train.ts';
import { awkward, pair, sentencePiece, speeches, variant } from './corpus.ts';

const folder = mkdtempSync(join(tmpdir(), 'limbeck-test-'));
afterAll(() => rmSync(folder, { recursive: true }));

async function trained(preTokenizer: PreTokenizerName, vocabSize = 1500): Promise<string> {
  const path = join(folder, `${preTokenizer}.json`);
  const text = [...speeches(15), ...awkward, ...awkward];
  await (await trainTokenizer(text, { vocabSize, preTokenizer })).save(path);
  return readFileSync(path, 'utf8');
}

let json: string;
let tokenizer: Tokenizer;
beforeAll(async () => {
  json = await trained('digits');
  tokenizer = tokenizerFromJson(json);
});

/** Strings of every kind: words, any code points, lone surrogates, runs of white space. */
const anyText = fc.oneof(
  fc.string({ unit: 'binary' }),
  fc.string({ unit: 'grapheme' }),
  fc.array(fc.integer({ min: 0, max: 0xffff }), { maxLength: 30 }).map((units) => String.fromCharCode(...units)),
  fc
    .array(
      fc.constantFrom(
        ...awkward.map((text) => text.slice(0, 40)),
        ' ',
        '  ',
        '\n',
        '\r\n',
        '\t',
        "'",
        "'s",
        '1',
        '12',
        'a',
        'é',
        '中',
        '😀',
        '.',
        '<bos>',
      ),
      { maxLength: 12 },
    )
    .map((parts) => parts.join('')),
);

/** What the reference reader's own expression takes otherwise than Rust's: two characters that are white space to one of them. */
const withoutDisputed = (text: string) => text.replace(/[\u0085\ufeff]/g, '');

function expectSame(
  ours: Tokenizer,
  reference: { encode(text: string, options: object): { ids: number[] } },
  text: string,
): void {
  expect([...ours.encode(text)]).toEqual(reference.encode(text, { add_special_tokens: false }).ids);
}

describe('ids are those of @huggingface/tokenizers', () => {
  test('on prose, long texts included', () => {
    const { ours, reference } = pair(json);
    expect(ours.engine).toBe('native');
    for (const text of speeches(40)) expectSame(ours, reference, text);
  });

  for (const name of ['digits', 'gpt2', 'llama3', 'qwen2'] as const) {
    test(`with the pre-tokenizer ${name}`, async () => {
      const { ours, reference } = pair(await trained(name));
      expect(ours.engine).toBe('native');
      for (const text of awkward) expectSame(ours, reference, text);
      expectSame(ours, reference, speeches(100).join('').slice(0, 50_000));
      fc.assert(
        fc.property(anyText, (text) => expectSame(ours, reference, text)),
        { numRuns: 250 },
      );
    });
  }

  test("with GPT-2's built-in expression, and with digits cut out before it", async () => {
    const plain = { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: true };
    const gpt2 = await trained('gpt2');
    for (const pre_tokenizer of [
      plain,
      { type: 'Sequence', pretokenizers: [{ type: 'Digits', individual_digits: true }, plain] },
    ]) {
      const { ours, reference } = pair(variant(gpt2, (file) => Object.assign(file, { pre_tokenizer })));
      expect(ours.engine).toBe('native');
      const digits = 'pretokenizers' in pre_tokenizer;
      // The reference takes only ASCII digits for digits here.
      const comparable = (text: string) =>
        digits ? withoutDisputed(text).replace(/(?![0-9])\p{N}/gu, '') : withoutDisputed(text);
      for (const text of awkward) expectSame(ours, reference, comparable(text));
      fc.assert(
        fc.property(anyText, (text) => expectSame(ours, reference, comparable(text))),
        { numRuns: 200 },
      );
    }
  });

  test('with whole words before merges, and with Unicode normal forms', () => {
    for (const change of [{ ignore_merges: true }, {}]) {
      for (const normalizer of [null, { type: 'NFC' }, { type: 'NFKD' }]) {
        const text = variant(json, (file) => {
          Object.assign(file, { normalizer });
          Object.assign(file.model, change, { vocab: { ...(file.model.vocab as object), zyxw: 1500 } });
        });
        const { ours, reference } = pair(text);
        expect(ours.engine).toBe('native');
        for (const sample of [...awkward, 'zyxw zyxw', '<bos>\u0338e\u0301 \u212b<eos>']) expectSame(ours, reference, sample);
        fc.assert(
          fc.property(anyText, (sample) => expectSame(ours, reference, sample)),
          { numRuns: 60 },
        );
      }
    }
  });

  test('with added tokens that begin alike', () => {
    const text = variant(json, (file) => {
      const contents = ['<a', '<a>', '<a><b>', 'é', '中文', '  '];
      const added = contents.map((content, i) => ({ id: 1500 + i, content, special: i < 3, normalized: false }));
      file.added_tokens = [...(file.added_tokens as object[]), ...added];
    });
    const { ours, reference } = pair(text);
    expect(ours.engine).toBe('native');
    const unit = fc.constantFrom('<a', '<a>', '<a><b>', '<', 'a', '>', '<b>', 'é', '中文', '中', '文', ' ', '  ', 'x');
    fc.assert(
      fc.property(fc.array(unit), (parts) => expectSame(ours, reference, parts.join(''))),
      { numRuns: 200 },
    );
  });
});

describe('BPE over characters, as Gemma and Llama 2 have it', () => {
  for (const llama of [false, true]) {
    test(llama ? 'with a space before every text' : 'with spaces as they are', () => {
      const { ours, reference } = pair(sentencePiece(json, llama));
      expect(ours.engine).toBe('native');
      expect([ours.bos, ours.eos, ours.pad, ours.unk]).toEqual([2, 1, 0, 3]);
      const check = (text: string) => {
        expectSame(ours, reference, text);
        const ids = ours.encode(text);
        const whole = text.replace(/\p{Surrogate}/gu, '\ufffd').replaceAll('\u2581', ' ');
        // Added tokens cut a text; a space comes before each part, and only the first is taken off again.
        if (!llama || !/<(bos|eos|pad|unk)>/.test(text)) expect(ours.decode(ids)).toBe(whole);
        const decoder = ours.decoder();
        expect(Array.from(ids, (id) => decoder.push(id)).join('') + decoder.end()).toBe(ours.decode(ids));
      };
      for (const text of [...awkward, speeches(100).join('').slice(0, 20_000)]) check(text);
      fc.assert(fc.property(anyText, check), { numRuns: 200 });
    });
  }

  test('decoding agrees with the reference for any ids', () => {
    for (const llama of [false, true]) {
      const { ours, reference } = pair(sentencePiece(json, llama));
      fc.assert(
        fc.property(fc.array(fc.nat(ours.vocabSize - 1), { minLength: 1 }), (ids) => {
          expect(ours.decode(ids)).toBe(reference.decode(ids));
          expect(ours.decode(ids, { skipSpecial: true })).toBe(reference.decode(ids, { skip_special_tokens: true }));
        }),
        { numRuns: 200 },
      );
    }
  });
});

test('decoding gives the text back', () => {
  const check = (text: string) => {
    expect(tokenizer.decode(tokenizer.encode(text))).toBe(text.replace(/\p{Surrogate}/gu, '\ufffd'));
  };
  for (const text of [...awkward, ...speeches(50)]) check(text);
  fc.assert(fc.property(anyText, check), { numRuns: 500 });
  expect(tokenizer.decode([])).toBe('');
});

test('decoding agrees with the reference for any ids', () => {
  const { ours, reference } = pair(json);
  fc.assert(
    fc.property(fc.array(fc.nat(ours.vocabSize - 1), { minLength: 1 }), (ids) => {
      expect(ours.decode(ids)).toBe(reference.decode(ids));
      expect(ours.decode(ids, { skipSpecial: true })).toBe(reference.decode(ids, { skip_special_tokens: true }));
    }),
    { numRuns: 200 },
  );
});

test('a stream of ids never gives half a character, and gives everything', () => {
  const check = (ids: ArrayLike<number>) => {
    const decoder = tokenizer.decoder();
    const parts = Array.from(ids, (id) => decoder.push(id));
    expect(parts.join('') + decoder.end()).toBe(tokenizer.decode(ids));
    return parts;
  };
  for (const text of awkward) {
    const parts = check(tokenizer.encode(text));
    if (!/\ud800|\udfff/.test(text)) expect(parts.join('')).not.toContain('\ufffd');
  }
  fc.assert(
    fc.property(fc.array(fc.nat(tokenizer.vocabSize - 1)), (ids) => void check(ids)),
    { numRuns: 200 },
  );
});

test('a batch gives what single calls give, for strings and bytes', async () => {
  const texts = [...awkward, ...speeches(25)];
  const options = { bos: true, eos: true };
  const single = texts.map((text) => [...tokenizer.encode(text, options)]);
  const batch = await tokenizer.encodeBatch(
    texts.map((text, i) => (i % 2 ? Buffer.from(text) : text)),
    options,
  );
  expect(batch.map((ids) => [...ids])).toEqual(single);
  expect(await tokenizer.encodeBatch([])).toEqual([]);
  const many = await Promise.all(Array.from({ length: 8 }, () => tokenizer.encodeBatch(texts, options)));
  for (const ids of many) expect(ids.map((x) => [...x])).toEqual(single);
});

test('bytes that are not UTF-8 keep their place', () => {
  const decoder = new TextDecoder('utf-8', { ignoreBOM: true });
  const piece = fc.oneof(
    fc.uint8Array({ maxLength: 6 }),
    fc.constantFrom('é', '中', '😀', ' the', '<bos>').map((text) => new TextEncoder().encode(text)),
  );
  for (const ours of [tokenizer, tokenizerFromJson(sentencePiece(json))]) {
    // '@' in three bytes and in four, half of a pair: none of them is UTF-8.
    for (const bytes of [
      [0xe0, 0x81, 0x80],
      [0xf0, 0x80, 0x81, 0x80],
      [0xed, 0xa0, 0x80],
    ])
      expect(ours.decode(ours.encode(Uint8Array.from(bytes)))).toBe(decoder.decode(Uint8Array.from(bytes)));
    fc.assert(
      fc.property(fc.array(piece, { maxLength: 40 }), (pieces) => {
        const bytes = Buffer.concat(pieces);
        expect(ours.decode(ours.encode(bytes))).toBe(decoder.decode(bytes));
      }),
      { numRuns: 200 },
    );
  }
});

test('begin and end tokens, and special tokens as text', () => {
  expect([...tokenizer.encode('a', { bos: true, eos: true })]).toEqual([tokenizer.bos, tokenizer.id('a'), tokenizer.eos]);
  expect([...tokenizer.encode('<eos>')]).toEqual([tokenizer.eos]);
  const plain = tokenizer.encode('<eos>', { special: false });
  expect([...plain]).not.toContain(tokenizer.eos);
  expect(tokenizer.decode(plain)).toBe('<eos>');
  const bare = tokenizerFromJson(variant(json, (file) => Object.assign(file, { added_tokens: [], post_processor: null })));
  expect(() => bare.encode('a', { bos: true })).toThrow(expect.objectContaining({ code: 'ERR_NO_TOKEN' }));
});

test('ids outside the vocabulary are named', () => {
  for (const id of [-1, tokenizer.vocabSize, 1.5, Number.NaN]) {
    expect(() => tokenizer.decode([5, id])).toThrow(expect.objectContaining({ code: 'ERR_TOKEN_RANGE', argument: 'ids[1]' }));
  }
});

test('a word of a megabyte takes a moment', () => {
  const start = performance.now();
  for (const text of ['a'.repeat(1 << 20), 'abcdefgh'.repeat(1 << 17), '中'.repeat(1 << 18)]) {
    expect(tokenizer.decode(tokenizer.encode(text))).toBe(text);
  }
  expect(performance.now() - start).toBeLessThan(20_000);
});
