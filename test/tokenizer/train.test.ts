import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { afterAll, expect, test } from 'vitest';
import { alphabet, charOfByte } from '../../src/tokenizer/alphabet.ts';
import { loadTokenizer } from '../../src/tokenizer/tokenizer.ts';
import { type TokenizerProgress, trainTokenizer } from '../../src/tokenizer/train.ts';
import { speeches } from './corpus.ts';

const folder = mkdtempSync(join(tmpdir(), 'limbeck-test-'));
afterAll(() => rmSync(folder, { recursive: true }));

/** Byte pair encoding as in the paper: count all pairs again after every merge. */
function referenceMerges(texts: string[], merges: number, minFrequency: number): [string, string][] {
  const pattern =
    /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/gu;
  const symbols = alphabet.map((byte) => charOfByte[byte]!);
  const symbolOf = new Map(alphabet.map((byte, symbol) => [byte, symbol]));
  const words = new Map<string, { symbols: number[]; count: number }>();
  for (const text of texts) {
    // Digits are words of their own, and what stands before one does not see it.
    for (const [word] of text
      .split(/(\p{N})/u)
      .flatMap((part) => (/^\p{N}$/u.test(part) ? [[part]] : [...part.matchAll(pattern)]))) {
      if (word === undefined) continue;
      const known = words.get(word);
      if (known) known.count++;
      else words.set(word, { symbols: Array.from(Buffer.from(word), (byte) => symbolOf.get(byte)!), count: 1 });
    }
  }
  const made: [string, string][] = [];
  while (made.length < merges) {
    const counts = new Map<number, number>();
    for (const { symbols: s, count } of words.values()) {
      for (let i = 0; i + 1 < s.length; i++)
        counts.set(s[i]! * 65536 + s[i + 1]!, (counts.get(s[i]! * 65536 + s[i + 1]!) ?? 0) + count);
    }
    let best = -1;
    for (const [pair, count] of counts) {
      const most = counts.get(best) ?? 0;
      if (count > most || (count === most && pair < best)) best = pair;
    }
    if (best < 0 || counts.get(best)! < minFrequency) break;
    const left = Math.floor(best / 65536);
    const right = best % 65536;
    for (const word of words.values()) {
      const s = word.symbols;
      const next: number[] = [];
      for (let i = 0; i < s.length; i++) {
        if (s[i] === left && s[i + 1] === right) {
          next.push(symbols.length);
          i++;
        } else next.push(s[i]!);
      }
      word.symbols = next;
    }
    made.push([symbols[left]!, symbols[right]!]);
    symbols.push(symbols[left]! + symbols[right]!);
  }
  return made;
}

async function mergesOf(texts: string[], merges: number, minFrequency = 2): Promise<[string, string][]> {
  const tokenizer = await trainTokenizer(texts, { vocabSize: 260 + merges, minFrequency });
  const path = join(folder, 'tokenizer.json');
  await tokenizer.save(path);
  return (JSON.parse(readFileSync(path, 'utf8')) as { model: { merges: [string, string][] } }).model.merges;
}

test('merges are those of counting every pair again, ties included', async () => {
  expect(await mergesOf(speeches(60), 120)).toEqual(referenceMerges(speeches(60), 120, 2));
  await fc.assert(
    fc.asyncProperty(
      fc.array(fc.string({ unit: fc.constantFrom('a', 'b', 'c', ' ', '1', "'", 's') }), { minLength: 1 }),
      async (texts) => {
        fc.pre(texts.some((text) => text !== ''));
        expect(await mergesOf(texts, 40, 1)).toEqual(referenceMerges(texts, 40, 1));
      },
    ),
    { numRuns: 60 },
  );
});

test('special tokens come first, then the bytes, then the merges', async () => {
  const tokenizer = await trainTokenizer(['hello hello'], { vocabSize: 300, specialTokens: ['<s>', '</s>'] });
  expect([tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.unk]).toEqual([0, 1, undefined, undefined]);
  expect(tokenizer.token(2)).toBe('!');
  // "hello hello" repeats h-e-l-l-o alone, so few merges are possible.
  expect(tokenizer.vocabSize).toBe(2 + 256 + 4);
  expect(tokenizer.id('hello')).toBe(261);
  expect(tokenizer.engine).toBe('native');
});

test('the same text gives the same tokenizer, cut as it may be', async () => {
  const texts = speeches(20);
  const whole = await trainTokenizer(texts, { vocabSize: 1000 });
  const bytes = await trainTokenizer([texts.map((text) => Buffer.from(text))], { vocabSize: 1000 });
  expect(bytes.digest).toBe(whole.digest);
  expect(whole.vocabSize).toBe(1000);
  const other = await trainTokenizer(texts.slice(1), { vocabSize: 1000 });
  expect(other.fingerprint).not.toBe(whole.fingerprint);
});

test('training reports progress, leaves the event loop free and stops when told', async () => {
  const texts = speeches(3);
  const seen: TokenizerProgress[] = [];
  let ticks = 0;
  const timer = setInterval(() => ticks++, 1);
  await trainTokenizer(texts, { vocabSize: 2000, onProgress: (progress) => seen.push(progress) });
  clearInterval(timer);
  expect(ticks).toBeGreaterThan(3);
  expect(seen.at(-1)).toEqual({ phase: 'merge', bytes: Buffer.byteLength(texts.join('')), vocabSize: 2000 });
  expect(seen.some((progress) => progress.phase === 'count')).toBe(true);

  const abort = new AbortController();
  const reason = new Error('enough');
  const stopped = trainTokenizer(texts, {
    vocabSize: 8000,
    signal: abort.signal,
    onProgress: ({ phase }) => phase === 'merge' && abort.abort(reason),
  });
  await expect(stopped).rejects.toBe(reason);
});

test('words of any length, and a limit on text', async () => {
  const long = 'ab'.repeat(200_000);
  const tokenizer = await trainTokenizer([long, '中文'.repeat(50_000), '\u0000'.repeat(100_000)], {
    vocabSize: 400,
    maxTokenBytes: 16,
  });
  expect(tokenizer.decode(tokenizer.encode(long))).toBe(long);
  for (let id = 260; id < tokenizer.vocabSize; id++) expect(tokenizer.token(id)!.length).toBeLessThanOrEqual(16);
  const seen: number[] = [];
  await trainTokenizer(['one two three '.repeat(1000)], {
    vocabSize: 300,
    maxBytes: 100,
    onProgress: ({ bytes }) => seen.push(bytes),
  });
  expect(seen.at(-1)).toBeLessThanOrEqual(100);
});

test('options that make no sense and empty text are refused', async () => {
  const config = (options: object) => expect(trainTokenizer(['text'], { vocabSize: 300, ...options })).rejects;
  await config({ vocabSize: 259 }).toMatchObject({ code: 'ERR_CONFIG', argument: 'vocabSize' });
  await config({ vocabSize: 300.5 }).toMatchObject({ code: 'ERR_CONFIG', argument: 'vocabSize' });
  await config({ minFrequency: 0 }).toMatchObject({ code: 'ERR_CONFIG', argument: 'minFrequency' });
  await config({ specialTokens: ['<a>', '<a>'] }).toMatchObject({ code: 'ERR_CONFIG', argument: 'specialTokens[1]' });
  await config({ preTokenizer: 'words' }).toMatchObject({ code: 'ERR_CONFIG', argument: 'preTokenizer' });
  await expect(trainTokenizer([], { vocabSize: 300 })).rejects.toMatchObject({ code: 'ERR_EMPTY' });
  await expect(trainTokenizer(['', ''], { vocabSize: 300 })).rejects.toMatchObject({ code: 'ERR_EMPTY' });
});

test('a saved folder loads again, with its special tokens', async () => {
  const tokenizer = await trainTokenizer(speeches(60), { vocabSize: 500 });
  await tokenizer.save(join(folder, 'tok'));
  const loaded = await loadTokenizer(join(folder, 'tok'));
  expect(loaded.fingerprint).toBe(tokenizer.fingerprint);
  expect([loaded.pad, loaded.eos, loaded.bos, loaded.unk]).toEqual([0, 1, 2, 3]);
  expect(await loadTokenizer(join(folder, 'tok', 'tokenizer.json')).then((t) => t.bos)).toBe(2);
});
