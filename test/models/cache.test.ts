import fc from 'fast-check';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { cacheRows, createCache } from '../../src/models/cache.ts';
import type { DecoderConfig } from '../../src/models/decoder.ts';
import { createModel, type LanguageModel } from '../../src/models/model.ts';
import { presets } from '../../src/models/presets.ts';
import { softcap } from '../../src/ops/elementwise.ts';
import { linear } from '../../src/ops/linear.ts';
import { ShapeError } from '../../src/tensor/errors.ts';
import { scope } from '../../src/tensor/scope.ts';
import { noGrad } from '../../src/tensor/tape.ts';
import { readAs, tensor } from '../../src/tensor/tensor.ts';

const config: DecoderConfig = {
  ...presets['gemma2-nano'],
  ...{ vocabSize: 61, width: 24, layers: 3, heads: 4, kvHeads: 2, headSize: 6, hidden: 20, window: 5, initStd: 0.3 },
};
let model: LanguageModel;
beforeAll(() => {
  model = createModel(config, { seed: 5, trainable: false });
});
afterAll(() => model.dispose());

/** Logits of rows of equally many tokens that continue sequences of a cache, or are whole texts. */
async function logits(ids: number[][], at: { cache: ReturnType<typeof createCache>; sequences: number[] } | undefined) {
  const t = ids[0]!.length;
  const shape = [ids.length, t];
  const z = scope(() =>
    noGrad(() => {
      const before = (row: number): number => (at === undefined ? 0 : at.cache.lengths[at.sequences[row]!]!);
      const input = {
        ids: tensor(Int32Array.from(ids.flat()), shape),
        positions: tensor(
          ids.flatMap((row, i) => row.map((_, j) => before(i) + j)),
          shape,
          'i32',
        ),
        ...(at === undefined ? {} : { cache: cacheRows(at.cache, at.sequences, t) }),
      };
      return softcap(linear(model.hidden(input), model.head), config.finalCap!);
    }),
  );
  for (const n of at?.sequences ?? []) at!.cache.lengths[n]! += t;
  const all = await readAs(z, 'f32');
  z.dispose();
  return ids.map((_, i) => all.subarray(i * t * 61, (i + 1) * t * 61));
}

const texts = [13, 7, 19].map((n, row) => Array.from({ length: n }, (_, i) => (i * i * 7 + row * 11 + i) % 61));

function expectClose(got: Float32Array, want: Float32Array): void {
  expect(got.length).toBe(want.length);
  let most = 0;
  for (let i = 0; i < got.length; i++) most = Math.max(most, Math.abs(got[i]! - want[i]!));
  expect(most).toBeLessThan(2e-5);
}

test('texts read in any pieces, alone and together, give the logits of the whole text', async () => {
  const wholes = await Promise.all(texts.map(async (ids) => (await logits([ids], undefined))[0]!));
  const pieces = fc.array(fc.integer({ min: 1, max: 9 }), { minLength: 1, maxLength: 8 });
  await fc.assert(
    fc.asyncProperty(fc.tuple(pieces, pieces, pieces), fc.shuffledSubarray([0, 1, 2], { minLength: 3 }), async (cuts, places) => {
      const cache = createCache(3, 19);
      const done = [0, 0, 0];
      const check = (row: number, n: number, got: Float32Array): void => {
        expectClose(got, wholes[row]!.subarray(done[row]! * 61, (done[row]! + n) * 61));
        done[row]! += n;
      };
      const read = async (row: number, n: number): Promise<void> => {
        const ids = texts[row]!.slice(done[row]!, done[row]! + n);
        if (ids.length > 0) check(row, ids.length, (await logits([ids], { cache, sequences: [places[row]!] }))[0]!);
      };
      for (let i = 0; i < 8; i++) {
        for (const row of [0, 1, 2]) if (cuts[row]![i] !== undefined) await read(row, cuts[row]![i]!);
        // One token of all that have more, in one pass.
        const open = [2, 0, 1].filter((row) => done[row]! < texts[row]!.length);
        if (open.length === 0) break;
        const next = await logits(
          open.map((row) => [texts[row]![done[row]!]!]),
          { cache, sequences: open.map((row) => places[row]!) },
        );
        for (const [i, row] of open.entries()) check(row, 1, next[i]!);
      }
      for (const row of [0, 1, 2]) await read(row, 99);
      cache.dispose();
    }),
    { numRuns: 25, seed: 7 },
  );
});

test('several tokens of several sequences at once', async () => {
  const cache = createCache(2, 19);
  for (const [from, to] of [
    [0, 3],
    [3, 7],
  ] as const) {
    const got = await logits([texts[0]!.slice(from, to), texts[2]!.slice(from, to)], { cache, sequences: [1, 0] });
    for (const [i, row] of [0, 2].entries()) {
      const want = (await logits([texts[row]!.slice(0, to)], undefined))[0]!;
      expectClose(got[i]!, want.subarray(from * 61));
    }
  }
  cache.dispose();
});

test('a sequence begins again, with nothing of the text before', async () => {
  const cache = createCache(1, 19);
  await logits([texts[2]!], { cache, sequences: [0] });
  cache.lengths[0] = 0;
  const got = await logits([texts[1]!], { cache, sequences: [0] });
  expectClose(got[0]!, (await logits([texts[1]!], undefined))[0]!);
  cache.dispose();
});

test('refuses what does not fit', () => {
  const cache = createCache(2, 4);
  const at = (sequences: number[], tokens: number) => () => scope(() => void cacheRows(cache, sequences, tokens));
  expect(at([2], 1)).toThrow(/there is no sequence 2 among 2/);
  expect(at([1, 1], 1)).toThrow(/sequence 1 is named twice/);
  expect(at([0], 5)).toThrow(/sequence 0 would have 5 tokens, there is room for 4/);
  expect(() => createCache(0, 4)).toThrow(ShapeError);
  expect(() => createCache(1, 2.5)).toThrow(/capacity is 2.5/);
});
