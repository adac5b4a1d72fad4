import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { type DatasetOptions, openDataset } from '../../src/data/dataset.ts';
import { checkMixture, MixedRows, type MixtureSource } from '../../src/data/mixture.ts';
import type { Batch } from '../../src/data/pack.ts';
import { Rows, segmentsOf, shuffledOrder } from '../../src/data/rows.ts';
import { texts } from '../../src/data/source.ts';
import type { Tokenizer } from '../../src/tokenizer/tokenizer.ts';
import { trainTokenizer } from '../../src/tokenizer/train.ts';
import type { TrainEvent } from '../../src/train/events.ts';
import { pretrain } from '../../src/train/pretrain.ts';

const folder = mkdtempSync(join(tmpdir(), 'limbeck-test-'));
afterAll(() => rmSync(folder, { recursive: true }));

/** Documents whose every word names their source. */
const documents = (word: string, count: number) =>
  Array.from({ length: count }, (_, i) => `${word} `.repeat(5 + ((i * 13) % 40)));
const corpora = { alpha: documents('alpha', 40), beta: documents('beta', 9), gamma: documents('gamma', 3) };
let tokenizer: Tokenizer;
let base: Omit<DatasetOptions, 'train'>;
beforeAll(async () => {
  tokenizer = await trainTokenizer(Object.values(corpora).flat(), { vocabSize: 290 });
  base = { tokenizer, length: 32, batch: 4, seed: 5 };
});

const mixed = (...parts: Partial<MixtureSource>[]) => ({
  mixture: Object.entries(corpora).map(([name, own], i) => ({ name, source: texts(own), ...parts[i] })),
});

/** The source of each row, told by its words. */
function rowsOf(batch: Batch): string[] {
  return Array.from({ length: batch.rows }, (_, r) => {
    const text = tokenizer.decode(batch.ids.subarray(r * batch.length, (r + 1) * batch.length), { skipSpecial: true });
    const found = Object.keys(corpora).filter((name) => text.includes(name));
    expect(found).toHaveLength(1);
    return found[0]!;
  });
}

test('shares of tokens hold to a row at every moment', async () => {
  const dataset = await openDataset({ ...base, train: mixed({ weight: 5 }, { weight: 3 }, { weight: 2 }) });
  expect(dataset.report.sources!.map(({ share }) => share)).toEqual([0.5, 0.3, 0.2]);
  const counts: Record<string, number> = { alpha: 0, beta: 0, gamma: 0 };
  let rows = 0;
  for (let i = 0; i < 40; i++) {
    const batch = await dataset.train.next();
    expect(batch.tokens).toBe(4 * 32);
    for (const name of rowsOf(batch)) {
      counts[name]!++;
      rows++;
      for (const { name: source, share } of dataset.report.sources!)
        expect(Math.abs(counts[source]! - rows * share)).toBeLessThanOrEqual(1);
    }
  }
  expect(counts).toEqual({ alpha: 80, beta: 48, gamma: 32 });
  // What is told is what was given.
  for (const { name, tokens, epochs } of dataset.train.sources!) {
    expect(tokens).toBe(counts[name]! * 32);
    expect(epochs).toBeCloseTo(tokens / dataset.report.sources!.find((s) => s.name === name)!.tokens, 12);
  }
  expect(dataset.train.sources!.find(({ name }) => name === 'gamma')!.epochs).toBeGreaterThan(3);
});

test('without weights a source counts by its size, times repeat', async () => {
  const dataset = await openDataset({ ...base, train: mixed({}, { repeat: 4 }, { repeat: 0.5 }) });
  const { sources } = dataset.report;
  const tokens = Object.fromEntries(sources!.map((s) => [s.name, s.tokens]));
  const all = tokens.alpha! + 4 * tokens.beta! + 0.5 * tokens.gamma!;
  for (const [name, repeat] of [
    ['alpha', 1],
    ['beta', 4],
    ['gamma', 0.5],
  ] as const)
    expect(sources!.find((s) => s.name === name)!.share).toBeCloseTo((repeat * tokens[name]!) / all, 12);
  while (dataset.train.epoch < 1) await dataset.train.next();
  const [alpha, beta, gamma] = dataset.train.sources!;
  const row = (name: string) => (3 * 32) / tokens[name]!;
  expect(Math.abs(alpha!.epochs - 1)).toBeLessThan(row('alpha'));
  expect(Math.abs(beta!.epochs - 4)).toBeLessThan(row('beta'));
  expect(Math.abs(gamma!.epochs - 0.5)).toBeLessThan(row('gamma'));
});

test('with weights, repeat is the most passes; the others share the rest, and in the end nothing is left', async () => {
  const dataset = await openDataset({
    ...base,
    batch: 1,
    train: mixed({ weight: 1, repeat: 2 }, { weight: 2, repeat: 3 }, { weight: 1, repeat: 1 }),
  });
  const limit = Object.fromEntries(dataset.report.sources!.map((s, i) => [s.name, Math.floor(([2, 3, 1][i]! * s.tokens) / 32)]));
  const counts: Record<string, number> = { alpha: 0, beta: 0, gamma: 0 };
  const whole = Object.values(limit).reduce((a, b) => a + b);
  for (let i = 0; i < whole; i++) counts[rowsOf(await dataset.train.next())[0]!]!++;
  expect(counts).toEqual(limit);
  await expect(dataset.train.next()).rejects.toMatchObject({ code: 'ERR_EXHAUSTED' });
});

test('a mixture goes on from its state, bit for bit, wherever it stopped', async () => {
  const train = mixed({ weight: 5 }, { weight: 3, repeat: 6 }, { weight: 2 });
  const whole = await openDataset({ ...base, train });
  const states: string[] = [];
  const batches: Batch[] = [];
  for (let i = 0; i < 60; i++) {
    states.push(JSON.stringify(whole.train.state()));
    batches.push(await whole.train.next());
  }
  for (const at of [0, 1, 7, 30, 58]) {
    const again = await openDataset({ ...base, train });
    again.train.restore(JSON.parse(states[at]!));
    for (let i = at; i < Math.min(60, at + 12); i++) expect(await again.train.next()).toEqual(batches[i]);
    expect(JSON.stringify(again.train.state())).toBe(states[Math.min(60, at + 12)] ?? JSON.stringify(again.train.state()));
  }
  const other = await openDataset({ ...base, train: mixed({ weight: 5 }, { weight: 4, repeat: 6 }, { weight: 2 }) });
  expect(() => other.train.restore(JSON.parse(states[3]!))).toThrow(/has data/);
});

test('held-out documents come from every source and are never trained on', async () => {
  const unique = { a: Array.from({ length: 30 }, (_, i) => `a${i}z`), b: Array.from({ length: 10 }, (_, i) => `b${i}z`) };
  const dataset = await openDataset({
    ...base,
    batch: 1,
    length: 8,
    train: { mixture: Object.entries(unique).map(([name, own]) => ({ name, source: texts(own) })) },
    validation: { documents: 3 },
  });
  expect(dataset.report).toMatchObject({ trainDocuments: 34, validationDocuments: 6, documents: 40 });
  const words = (batch: Batch) =>
    tokenizer
      .decode(batch.ids)
      .split('<bos>')
      .map((text) => text.split('<eos>')[0]!.replaceAll('<pad>', ''))
      .filter((text) => text !== '');
  const held: string[] = [];
  for await (const batch of dataset.validation()) held.push(...words(batch));
  expect(held.filter((word) => word.startsWith('a') && unique.a.includes(word)).length).toBeGreaterThanOrEqual(2);
  expect(held.some((word) => unique.b.includes(word))).toBe(true);
  const seen = new Set<string>();
  for (let i = 0; i < 60; i++) for (const word of words(await dataset.train.next())) seen.add(word);
  const whole = [...unique.a, ...unique.b].filter((word) => held.includes(word));
  for (const word of whole) expect(seen.has(word), word).toBe(false);
});

test('whatever the shares, no source is ever more than a row off', () => {
  const ends = Float64Array.of(64, 200, 333);
  const store = { tokens: 333, ends, read: async () => new Int32Array(0), close: async () => {} };
  const segments = segmentsOf(store, Uint32Array.of(0, 1, 2), 16);
  fc.assert(
    fc.property(fc.array(fc.double({ min: 0.01, max: 100, noNaN: true }), { minLength: 1, maxLength: 4 }), (weights) => {
      const parts = weights.map((weight, i) => ({
        name: String(i),
        weight,
        tokens: segments.tokens,
        rows: new Rows(segments, 16, shuffledOrder(segments.count, 1, i)),
      }));
      const walk = new MixedRows(parts, 16);
      const all = weights.reduce((a, b) => a + b);
      const counts = weights.map(() => 0);
      for (let n = 1; n <= 100; n++) {
        counts[walk.next().part]!++;
        for (const [i, weight] of weights.entries()) expect(Math.abs(counts[i]! - (n * weight) / all)).toBeLessThan(1.5);
      }
    }),
    { numRuns: 50 },
  );
});

test('mixtures that make no sense are refused with the field at fault', () => {
  const one = (parts: Partial<MixtureSource>[]) => () =>
    checkMixture({ mixture: parts.map((part, i) => ({ name: String(i), source: texts(['x']), ...part })) });
  expect(one([])).toThrow(/no sources/);
  expect(one([{ weight: 1 }, {}])).toThrow(/mixture\[1\].weight is missing/);
  expect(one([{ weight: -1 }])).toThrow(/mixture\[0\].weight is -1/);
  expect(one([{ repeat: Number.NaN }])).toThrow(/mixture\[0\].repeat is NaN/);
  expect(one([{ name: 'a' }, { name: 'a' }])).toThrow(/mixture\[1\].name is "a"/);
});

test('a run on a mixture tells what each source gave, and resumes exactly', async () => {
  for (const [name, own] of Object.entries(corpora)) {
    writeFileSync(join(folder, `${name}.jsonl`), own.map((text) => JSON.stringify({ body: text })).join('\n'));
  }
  const run = (output: string, steps: number) => ({
    kind: 'pretrain' as const,
    output: join(folder, output),
    data: {
      mixture: [
        { source: { jsonl: join(folder, 'alpha.jsonl') }, weight: 3 },
        { name: 'small', source: { jsonl: join(folder, 'beta.jsonl') }, weight: 1 },
      ],
      field: 'body',
      validation: { documents: 1 },
    },
    tokenizer: { train: { vocabSize: 280 } },
    model: { preset: 'gemma2-nano', width: 16, layers: 1, heads: 1, kvHeads: 1, headSize: 16, hidden: 16 },
    batch: { sequences: 4, length: 16 },
    schedule: { kind: 'constant' as const },
    steps,
    checkpoint: { every: 4 },
  });
  const collect = async (events: AsyncIterable<TrainEvent>) => {
    const all: TrainEvent[] = [];
    for await (const event of events) all.push(event);
    return all;
  };
  const losses = (events: TrainEvent[]) => events.flatMap((e) => (e.type === 'step' ? [e.loss] : []));
  const whole = await collect(pretrain(run('whole', 8)));
  const parts = [...(await collect(pretrain(run('parts', 4)))), ...(await collect(pretrain(run('parts', 8))))];
  expect(losses(parts)).toEqual(losses(whole));
  const done = whole.at(-1);
  expect(done).toMatchObject({
    type: 'done',
    sources: [
      { name: 'alpha.jsonl', tokens: 24 * 16 },
      { name: 'small', tokens: 8 * 16 },
    ],
  });
  expect(whole.find((e) => e.type === 'evaluate')).toHaveProperty('sources');
  expect(parts.at(-1)).toMatchObject({ sources: (done as { sources: unknown }).sources });
});

test('continual pretraining begins with the weights and the tokenizer of a model', async () => {
  const data = { jsonl: join(folder, 'gamma.jsonl'), field: 'body', validation: { jsonl: join(folder, 'alpha.jsonl') } };
  const small = { batch: { sequences: 4, length: 16 }, schedule: { kind: 'constant' as const } };
  const first = { kind: 'pretrain' as const, output: join(folder, 'first'), data, ...small, steps: 6 };
  const losses = async (run: Parameters<typeof pretrain>[0]) => {
    const all: number[] = [];
    for await (const event of pretrain(run)) if (event.type === 'evaluate') all.push(event.loss);
    return all;
  };
  const model = { preset: 'gemma2-nano', width: 16, layers: 1, heads: 1, kvHeads: 1, headSize: 16, hidden: 16 };
  const [trained] = await losses({ ...first, tokenizer: { train: { vocabSize: 280 } }, model });
  const [before] = await losses({ ...first, output: join(folder, 'second'), from: first.output, evaluate: { first: true } });
  expect(before).toBe(trained);
});
