import { mkdtempSync, readdirSync, rmSync, utimesSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { type DatasetOptions, openDataset } from '../../src/data/dataset.ts';
import { jsonl } from '../../src/data/jsonl.ts';
import type { Batch } from '../../src/data/pack.ts';
import { textFiles, texts } from '../../src/data/source.ts';
import { holdOut } from '../../src/data/split.ts';
import { tokenFile, writeTokenFile } from '../../src/data/tokens.ts';
import type { Tokenizer } from '../../src/tokenizer/tokenizer.ts';
import { trainTokenizer } from '../../src/tokenizer/train.ts';

const folder = mkdtempSync(join(tmpdir(), 'limbeck-test-'));
afterAll(() => rmSync(folder, { recursive: true }));
const documents = Array.from(
  { length: 60 },
  (_, i) => `Document ${i} says ${'word and more '.repeat((i * 7) % 23)}the end of ${i}.`,
);
let tokenizer: Tokenizer;
let base: Omit<DatasetOptions, 'validation'>;
beforeAll(async () => {
  tokenizer = await trainTokenizer(documents, { vocabSize: 320 });
  base = { train: texts(documents), tokenizer, length: 32, batch: 4, seed: 11 };
});

const same = (a: Batch, b: Batch) => expect(a).toEqual(b);

/** Texts of the documents in batches of whole documents. */
async function collect(batches: AsyncIterable<Batch>): Promise<string[]> {
  const found: string[] = [];
  for await (const batch of batches) {
    for (let i = 0; i < batch.ids.length; i++) {
      if (batch.ids[i] === tokenizer.bos) found.push('');
      else if (batch.ids[i] !== tokenizer.pad && batch.ids[i] !== tokenizer.eos)
        found[found.length - 1] += tokenizer.token(batch.ids[i]!)!;
    }
  }
  return found.map((text) => text.replaceAll('Ġ', ' '));
}

test('an epoch holds every training token once; validation holds the rest', async () => {
  const dataset = await openDataset({ ...base, length: 4096, batch: 1, validation: { documents: 9 } });
  const held = await collect(dataset.validation());
  expect(held).toHaveLength(9);
  const { report } = dataset;
  expect(report).toMatchObject({ documents: 60, trainDocuments: 51, validationDocuments: 9, malformedCount: 0, malformed: [] });
  expect(report.bytes).toBe(Buffer.byteLength(documents.join('')));
  expect(report.trainTokens + report.validationTokens).toBe(report.tokens);
  let tokens = 0;
  const seen = new Set<string>();
  while (tokens < report.trainTokens) {
    const batch = await dataset.train.next();
    tokens += batch.tokens;
    for (const text of await collect(
      (async function* () {
        yield batch;
      })(),
    ))
      seen.add(text);
  }
  for (const text of documents) expect(seen.has(text) !== held.includes(text), text).toBe(true);
  await dataset.close();
});

test('the same seed gives the same batches, another one others; epochs differ', async () => {
  const first = await openDataset(base);
  const second = await openDataset(base);
  const other = await openDataset({ ...base, seed: 12 });
  const run = [];
  for (let i = 0; i < 60; i++) {
    const batch = await first.train.next();
    same(batch, await second.train.next());
    run.push(batch.ids.join());
  }
  expect(first.train.epoch).toBeGreaterThan(1);
  expect((await other.train.next()).ids.join()).not.toBe(run[0]);
  expect(new Set(run).size).toBe(run.length);
});

test('a loader goes on from its state, bit for bit, wherever it stopped', async () => {
  for (const isolate of [true, false]) {
    const dataset = await openDataset({ ...base, isolate, validation: 0.2 });
    const states = [];
    const batches = [];
    for (let i = 0; i < 50; i++) {
      states.push(JSON.stringify(dataset.train.state()));
      batches.push(await dataset.train.next());
    }
    for (const from of [0, 1, 7, 23, 49]) {
      const again = await openDataset({ ...base, isolate, validation: 0.2 });
      again.train.restore(JSON.parse(states[from]!));
      expect(JSON.stringify(again.train.state())).toBe(states[from]);
      for (let i = from; i < batches.length; i++) same(await again.train.next(), batches[i]!);
    }
    expect(states.at(-1)!.length).toBeLessThan(2000);
  }
});

test('calls that do not wait for each other come in order', async () => {
  const one = await openDataset(base);
  const two = await openDataset(base);
  const together = await Promise.all(Array.from({ length: 10 }, () => one.train.next()));
  for (const batch of together) same(batch, await two.train.next());
});

test('a state of other data or options is refused by the field', async () => {
  const state = (await openDataset(base)).train.state();
  const refuse = async (options: Partial<DatasetOptions>, argument: string) => {
    const { train } = await openDataset({ ...base, ...options });
    expect(() => train.restore(state)).toThrow(expect.objectContaining({ code: 'ERR_RESUME', argument }));
  };
  await refuse({ seed: 1 }, 'seed');
  await refuse({ length: 33 }, 'length');
  await refuse({ train: texts(documents.slice(1)) }, 'data');
  await refuse({ validation: 0.1 }, 'data');
});

test('validation comes in the same order every time, and stops where asked', async () => {
  const dataset = await openDataset({ ...base, validation: 0.3 });
  const take = async (options?: { batches: number }) => {
    const all: Batch[] = [];
    for await (const batch of dataset.validation(options)) all.push(batch);
    return all;
  };
  const once = await take();
  expect(await take()).toEqual(once);
  expect(once.reduce((sum, batch) => sum + batch.tokens, 0)).toBe(dataset.report.validationTokens);
  expect(await take({ batches: 1 })).toEqual(once.slice(0, 1));
  expect((await openDataset(base)).report.validationTokens).toBe(0);
});

test('ids in a file are those in memory', async () => {
  const path = join(folder, 'docs.jsonl');
  writeFileSync(path, documents.map((text) => JSON.stringify({ text })).join('\n'));
  const cacheTokens = join(folder, 'cache');
  const memory = await openDataset({ ...base, train: jsonl(path), validation: 0.1 });
  const spilled = await openDataset({ ...base, train: jsonl(path), validation: 0.1, memoryLimit: 100 });
  const cached = await openDataset({ ...base, train: jsonl(path), validation: 0.1, cacheTokens });
  expect(readdirSync(cacheTokens)).toHaveLength(1);
  const again = await openDataset({ ...base, train: jsonl(path), validation: 0.1, cacheTokens });
  expect(readdirSync(cacheTokens)).toHaveLength(1);
  for (const other of [spilled, cached, again]) expect(other.report).toEqual(memory.report);
  for (let i = 0; i < 30; i++) {
    const batch = await memory.train.next();
    for (const other of [spilled, cached, again]) same(await other.train.next(), batch);
  }
  for (const dataset of [memory, spilled, cached, again]) await dataset.close();
  // A file that changed, or other settings, make new ids; a damaged cache is made again.
  utimesSync(path, new Date(), new Date(Date.now() + 5000));
  await (await openDataset({ ...base, train: jsonl(path), cacheTokens })).close();
  await (await openDataset({ ...base, train: jsonl(path), eos: false, cacheTokens })).close();
  expect(readdirSync(cacheTokens)).toHaveLength(3);
  for (const name of readdirSync(cacheTokens)) writeFileSync(join(cacheTokens, name), 'x');
  const mended = await openDataset({ ...base, train: jsonl(path), cacheTokens });
  expect(mended.report.documents).toBe(60);
  await mended.close();
});

test('a document in parts has one begin, one end, and the ids of the whole', async () => {
  const path = join(folder, 'long.txt');
  const long = `${documents.join('\n')}\n`.repeat(1500); // more than two chunks
  writeFileSync(path, long);
  const dataset = await openDataset({ ...base, train: textFiles(path), length: 8192, batch: 1 });
  expect(dataset.report).toMatchObject({
    documents: 1,
    bytes: Buffer.byteLength(long),
    tokens: tokenizer.encode(long).length + 2,
  });
  await dataset.close();
});

test('token files are used as they are, and only with their own vocabulary', async () => {
  const path = join(folder, 'made.safetensors');
  const ids = documents.map((text) => tokenizer.encode(text, { bos: true, eos: true }));
  await writeTokenFile(path, ids, tokenizer);
  const fromText = await openDataset(base);
  const fromTokens = await openDataset({ ...base, train: tokenFile(path) });
  for (let i = 0; i < 20; i++) same(await fromTokens.train.next(), await fromText.train.next());
  await writeTokenFile(path, ids, { vocabSize: tokenizer.vocabSize, fingerprint: 'another' });
  await expect(openDataset({ ...base, train: tokenFile(path) })).rejects.toMatchObject({ code: 'ERR_VOCABULARY' });
  await writeTokenFile(path, [Int32Array.of(1, 2, 900)], { vocabSize: 1000 });
  await expect(openDataset({ ...base, train: tokenFile(path) })).rejects.toMatchObject({
    code: 'ERR_TOKEN_RANGE',
    actual: '900',
  });
});

test('malformed lines are reported', async () => {
  const path = join(folder, 'some.jsonl');
  writeFileSync(path, `{"text":"fine enough to train on"}\nbroken\n{"text":"also fine"}\n{"txt":"x"}\n`);
  const { report } = await openDataset({ ...base, train: jsonl(path) });
  expect(report).toMatchObject({ documents: 2, malformedCount: 2 });
  expect(report.malformed.map(({ file, line }) => [file, line])).toEqual([
    [path, 2],
    [path, 4],
  ]);
  await expect(openDataset({ ...base, train: jsonl(path, { strict: true }) })).rejects.toMatchObject({ code: 'ERR_MALFORMED' });
});

test('special tokens in the text are text, unless asked for', async () => {
  const count = async (special: boolean) => {
    const dataset = await openDataset({ ...base, validation: texts(['a <eos> b', 'c']), special });
    let ends = 0;
    for await (const batch of dataset.validation()) ends += batch.ids.filter((id) => id === tokenizer.eos).length;
    return ends;
  };
  expect(await count(false)).toBe(2);
  expect(await count(true)).toBe(3);
});

test('the draw of held-out documents is stable and exact', () => {
  const few = holdOut(0.1, 1000, 5);
  expect(few.length).toBeGreaterThan(60);
  expect(few.length).toBeLessThan(140);
  // More documents do not move those that were drawn.
  expect([...holdOut(0.1, 2000, 5)].filter((i) => i < 1000)).toEqual([...few]);
  expect(holdOut({ documents: 17 }, 1000, 5)).toHaveLength(17);
  expect(holdOut(0.0001, 10, 5)).toHaveLength(1);
  expect([...holdOut(0.1, 1000, 6)]).not.toEqual([...few]);
});

test('a split that leaves nothing, and empty data, are refused with both numbers', async () => {
  const refuse = (options: Partial<DatasetOptions>, expected: object) =>
    expect(openDataset({ ...base, ...options })).rejects.toMatchObject(expected);
  await refuse(
    { validation: { documents: 60 } },
    { code: 'ERR_SPLIT', actual: '60', message: expect.stringContaining('60 of 60 documents') },
  );
  await refuse(
    { validation: { documents: 1000 } },
    { code: 'ERR_SPLIT', message: expect.stringContaining('1000 of 60 documents') },
  );
  await refuse({ validation: 1.5 }, { code: 'ERR_SPLIT' });
  await refuse({ validation: 0 }, { code: 'ERR_SPLIT' });
  await refuse(
    { train: texts(['only one']), validation: 0.1 },
    { code: 'ERR_SPLIT', message: expect.stringContaining('single document') },
  );
  await refuse({ train: texts([]) }, { code: 'ERR_EMPTY', argument: 'train' });
  await refuse({ train: texts(['', '']) }, { code: 'ERR_EMPTY' });
  await refuse({ validation: texts([]) }, { code: 'ERR_EMPTY', argument: 'validation' });
  const empty = join(folder, 'empty.txt');
  writeFileSync(empty, '');
  await refuse({ train: textFiles(empty) }, { code: 'ERR_EMPTY', message: expect.stringContaining(`0 malformed, in ${empty}`) });
  await refuse({ length: 0 }, { code: 'ERR_CONFIG', argument: 'length' });
  await refuse({ seed: -1 }, { code: 'ERR_SEED' });
});

test('opening stops when told', async () => {
  const abort = new AbortController();
  abort.abort(new Error('enough'));
  await expect(openDataset({ ...base, signal: abort.signal })).rejects.toThrow('enough');
});
