import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { afterAll, expect, test } from 'vitest';
import type { Ids } from '../../src/data/pack.ts';
import type { TokenSource } from '../../src/data/source.ts';
import { MemoryTokens, openTokenFile, tokenFile, writeTokenFile } from '../../src/data/tokens.ts';
import { LimbeckError } from '../../src/tensor/errors.ts';

const folder = mkdtempSync(join(tmpdir(), 'limbeck-test-'));
afterAll(() => rmSync(folder, { recursive: true }));

async function read(source: TokenSource): Promise<number[][]> {
  const documents: number[][] = [];
  let open = false;
  for await (const { ids, continues } of source.documents()) {
    if (!open) documents.push([]);
    for (const id of ids) documents.at(-1)!.push(id);
    open = continues ?? false;
  }
  expect(open).toBe(false);
  return documents;
}

/** Equality of long lists, without a comparison of each element by the test runner. */
function expectSame(a: ArrayLike<number>, b: ArrayLike<number>): void {
  expect(a.length).toBe(b.length);
  expect(Buffer.compare(new Uint8Array(Int32Array.from(a).buffer), new Uint8Array(Int32Array.from(b).buffer))).toBe(0);
}

test('what is written is read, narrow and wide, empty documents and large ones included', async () => {
  const documents = [[1, 2, 3], [], [65_535], Array.from({ length: 2_500_000 }, (_, i) => i % 60_000)];
  for (const vocabSize of [65_536, 65_537, 250_000]) {
    const path = join(folder, `t${vocabSize}.safetensors`);
    await writeTokenFile(
      path,
      documents.map((ids) => Int32Array.from(ids)),
      { vocabSize, fingerprint: 'abc', metadata: { note: 'é' } },
    );
    const found = await read(tokenFile(path));
    expect(found.map((ids) => ids.length)).toEqual(documents.map((ids) => ids.length));
    expectSame(found.flat(), documents.flat());
    const file = await openTokenFile(path);
    expect([file.vocabSize, file.fingerprint, file.tokens, file.metadata.note]).toEqual([vocabSize, 'abc', 2_500_004, 'é']);
    expect([...(await file.read(2, 4))]).toEqual([3, 65_535, 0, 1]);
    await file.close();
  }
});

test('raw ids without a header', async () => {
  const path = join(folder, 'raw.bin');
  writeFileSync(path, Uint16Array.of(5, 6, 0, 7, 0, 0, 8));
  expect(await read(tokenFile(path, { dtype: 'u16' }))).toEqual([[5, 6, 0, 7, 0, 0, 8]]);
  expect(await read(tokenFile(path, { dtype: 'u16', end: 0 }))).toEqual([[5, 6, 0], [7, 0], [0], [8]]);
  await expect(read(tokenFile(path, { dtype: 'u32' }))).rejects.toMatchObject({ code: 'ERR_TOKEN_FILE' });
  await expect(read(tokenFile(join(folder, 'raw.bin')))).rejects.toBeInstanceOf(LimbeckError);
});

test('an id outside the vocabulary stops writing, and nothing is left', async () => {
  const path = join(folder, 'bad.safetensors');
  const writing = writeTokenFile(path, [Int32Array.of(1, 2), Int32Array.of(3, 10)], { vocabSize: 10 });
  await expect(writing).rejects.toMatchObject({ code: 'ERR_TOKEN_RANGE', argument: `${path}:3`, actual: '10' });
  await expect(openTokenFile(path)).rejects.toMatchObject({ code: 'ERR_READ' });
  await expect(writeTokenFile(path, [], { vocabSize: 0 })).rejects.toMatchObject({ code: 'ERR_CONFIG' });
});

test('ids in memory are those that went in, across pieces', async () => {
  const memory = new MemoryTokens(100);
  const all: number[] = [];
  for (const size of [10, 0, 1_048_570, 3, 1_500_000]) {
    const ids = Uint16Array.from({ length: size }, (_, i) => (all.length + i) % 100);
    memory.append(ids);
    memory.endDocument();
    for (const id of ids) all.push(id);
  }
  const again: number[] = [];
  let ends = 0;
  for (const piece of memory.pieces()) {
    for (const id of piece.ids as Ids) again.push(id);
    if (piece.ends) ends++;
  }
  expectSame(again, all);
  expect(ends).toBe(5);
  const store = memory.done();
  for (const [from, count] of [
    [0, 5],
    [1_048_570, 20],
    [1_048_576, 1],
    [2_548_580, 3],
    [5, 2_100_000],
  ] as const) {
    expectSame(await store.read(from, count), all.slice(from, from + count));
  }
});

test('damaged files never do worse than a typed error', async () => {
  const path = join(folder, 'good.safetensors');
  await writeTokenFile(path, [Int32Array.of(1, 2, 3), Int32Array.of(4, 5)], { vocabSize: 10 });
  const good = readFileSync(path);
  const bad = join(folder, 'damaged.safetensors');
  const headerEnd = good.indexOf('}}') + 2;
  const damage = fc.record({
    at: fc.oneof(fc.nat(headerEnd), fc.integer({ min: good.length - 30, max: good.length - 1 })),
    cut: fc.nat(8),
    put: fc.uint8Array({ maxLength: 8 }),
  });
  let refused = 0;
  await fc.assert(
    fc.asyncProperty(damage, async ({ at, cut, put }) => {
      writeFileSync(bad, Buffer.concat([good.subarray(0, at), put, good.subarray(at + cut)]));
      try {
        const documents = await read(tokenFile(bad));
        expect(documents.flat().every((id) => id < 65_536)).toBe(true);
      } catch (error) {
        refused++;
        expect(LimbeckError.is(error), String(error)).toBe(true);
      }
    }),
    { numRuns: 200 },
  );
  expect(refused).toBeGreaterThan(60);
});
