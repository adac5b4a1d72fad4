import fc from 'fast-check';
import { expect, test } from 'vitest';
import { type Batch, type Ids, ignoreIndex, layOut, packDocuments } from '../../src/data/pack.ts';
import { Rows, readRow, segmentsOf, shuffledOrder, storeOrder } from '../../src/data/rows.ts';
import { MemoryTokens } from '../../src/data/tokens.ts';

async function pack(documents: Ids[], options: Parameters<typeof packDocuments>[1]): Promise<Batch[]> {
  const batches: Batch[] = [];
  for await (const batch of packDocuments(documents, options)) batches.push(batch);
  return batches;
}

/** Documents whose ids are all different, so that each token can be followed. */
const numbered = (sizes: number[]): Int32Array[] => {
  let next = 1;
  return sizes.map((size) => Int32Array.from({ length: size }, () => next++));
};

test('a small example, written out', async () => {
  const [batch, ...more] = await pack([Int32Array.of(1, 2, 3), Int32Array.of(4, 5), Int32Array.of(6, 7, 8, 9)], {
    length: 4,
    batch: 3,
    pad: 99,
  });
  expect(more).toEqual([]);
  expect([...batch!.ids]).toEqual([1, 2, 3, 4, 5, 6, 7, 8, 9, 99, 99, 99]);
  expect([...batch!.targets]).toEqual([2, 3, -100, 5, -100, 7, 8, 9, -100, -100, -100, -100]);
  expect([...batch!.weights]).toEqual([1, 1, 0, 1, 0, 1, 1, 1, 0, 0, 0, 0]);
  expect([...batch!.positions]).toEqual([0, 1, 2, 0, 0, 0, 1, 2, 0, 0, 0, 0]);
  expect([...batch!.starts]).toEqual([0, 0, 0, 3, 0, 1, 1, 1, 0, 1, 2, 3]);
  expect([batch!.rows, batch!.length, batch!.tokens, batch!.predicted]).toEqual([3, 4, 9, 6]);

  const [joined] = await pack([Int32Array.of(1, 2, 3), Int32Array.of(4, 5)], {
    length: 4,
    batch: 2,
    isolate: false,
    bos: 50,
    eos: 60,
  });
  expect([...joined!.ids]).toEqual([50, 1, 2, 3, 60, 50, 4, 5]);
  expect([...joined!.targets]).toEqual([1, 2, 3, 60, 50, 4, 5, 60]);
  expect([...joined!.positions]).toEqual([0, 1, 2, 3, 0, 1, 2, 3]);
  expect([...joined!.starts]).toEqual([0, 0, 0, 0, 0, 0, 0, 0]);
});

/** Everything that must hold of any batches of numbered documents. */
function checkBatches(batches: Batch[], documents: Int32Array[], isolate: boolean, epochs = 1): void {
  const document = new Map<number, number>();
  for (const [d, ids] of documents.entries()) for (const id of ids) document.set(id, d);
  const last = new Set(documents.map((ids) => ids.at(-1)!));
  const seen = new Map<number, number>();
  for (const batch of batches) {
    let tokens = 0;
    let predicted = 0;
    for (let i = 0; i < batch.ids.length; i++) {
      const column = i % batch.length;
      const [id, target, start] = [batch.ids[i]!, batch.targets[i]!, batch.starts[i]!];
      expect(batch.weights[i]).toBe(target === ignoreIndex ? 0 : 1);
      predicted += batch.weights[i]!;
      expect(start).toBeLessThanOrEqual(column);
      expect(batch.positions[i]).toBe(id === 0 ? 0 : column - start);
      if (id === 0) {
        expect([target, start]).toEqual([ignoreIndex, column]);
        continue;
      }
      tokens++;
      seen.set(id, (seen.get(id) ?? 0) + 1);
      if (target !== ignoreIndex && document.get(id) === document.get(target)) expect(target).toBe(id + 1);
      if (isolate) {
        // Ids of a document rise by one, so everything visible is the document's own, in order, without gaps.
        expect(batch.ids[i - column + start]).toBe(id - (column - start));
        expect(document.get(batch.ids[i - column + start]!)).toBe(document.get(id));
        expect(target).toBe(last.has(id) ? ignoreIndex : id + 1);
      } else {
        expect(start).toBe(0);
      }
    }
    expect([batch.tokens, batch.predicted]).toEqual([tokens, predicted]);
  }
  if (epochs === 1) {
    expect(seen.size).toBe(document.size);
    expect([...seen.values()].every((n) => n === 1)).toBe(true);
  }
}

const sizes = fc.array(fc.integer({ min: 1, max: 40 }), { minLength: 1, maxLength: 30 });
const layout = fc.record({
  length: fc.integer({ min: 1, max: 17 }),
  batch: fc.integer({ min: 1, max: 5 }),
  isolate: fc.boolean(),
});

test('packing in order keeps every token once, with its own context', async () => {
  await fc.assert(
    fc.asyncProperty(sizes, layout, async (lengths, options) => {
      const documents = numbered(lengths);
      const batches = await pack(documents, options);
      checkBatches(batches, documents, options.isolate);
      const ids = batches.flatMap((batch) => [...batch.ids]).filter((id) => id !== 0);
      expect(ids).toEqual(documents.flatMap((document) => [...document]));
    }),
    { numRuns: 60 },
  );
});

async function walk(
  documents: Int32Array[],
  options: { length: number; batch: number; isolate: boolean },
  seed?: number,
): Promise<Batch[]> {
  const memory = new MemoryTokens(70_000);
  for (const ids of documents) {
    memory.append(ids);
    memory.endDocument();
  }
  const store = memory.done();
  const segments = segmentsOf(store, Uint32Array.from(documents.keys()), options.length);
  const rows = new Rows(segments, options.length, seed === undefined ? () => storeOrder() : shuffledOrder(segments.count, seed));
  const batches: Batch[] = [];
  for (let row = rows.next(true); row !== undefined; row = rows.next(true)) {
    batches.push(layOut([await readRow(store, row)], { ...options, batch: 1 }));
  }
  return batches;
}

test('rows of shuffled segments keep every token once, with its own context', async () => {
  await fc.assert(
    fc.asyncProperty(sizes, layout, fc.option(fc.nat(1000), { nil: undefined }), async (lengths, options, seed) => {
      const documents = numbered(lengths);
      const batches = await walk(documents, options, seed);
      checkBatches(batches, documents, options.isolate);
      // Only the very last row may have padding.
      for (const batch of batches.slice(0, -1)) expect(batch.tokens).toBe(options.length);
    }),
    { numRuns: 60 },
  );
});

test('whole segments are rows of their own: no token of them loses context', async () => {
  const documents = numbered([35, 3, 22, 10, 1, 47]);
  for (const batch of await walk(documents, { length: 10, batch: 1, isolate: true }, 5)) {
    const whole = documents.some(
      (ids) => (batch.ids[0]! - ids[0]!) % 10 === 0 && batch.ids[0]! >= ids[0]! && batch.ids[0]! + 9 <= ids.at(-1)!,
    );
    if (whole) expect([...batch.starts]).toEqual(new Array(10).fill(0));
  }
});

test('sizes that make no sense are refused', async () => {
  for (const bad of [{ length: 0 }, { batch: 0 }, { length: 1.5 }, { batch: Number.NaN }]) {
    await expect(pack([], { length: 4, batch: 2, ...bad })).rejects.toMatchObject({
      code: 'ERR_CONFIG',
      argument: Object.keys(bad)[0],
    });
  }
  expect(await pack([], { length: 4, batch: 2 })).toEqual([]);
});
