import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { dedupe, dedupeText, embed } from '../../src/synth/dedupe.ts';
import { type FilterOptions, filter, filterRecipe, filterRecipes, refusal } from '../../src/synth/filter.ts';
import { minHashIndex } from '../../src/synth/minhash.ts';
import { neighbours } from '../../src/synth/neighbours.ts';
import { type Pipeline, pipeline, readManifest, readRecords, recordsOf, runPipeline } from '../../src/synth/pipeline.ts';
import { difficulties, type InstructionRecord, qualities } from '../../src/synth/record.ts';
import { philox } from '../../src/tensor/random.ts';
import { scripted } from './scripted.ts';

let folder: string;
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'limbeck-dedupe-'));
});
afterEach(() => rm(folder, { recursive: true, force: true }));

async function run(chain: Pipeline<InstructionRecord>): Promise<InstructionRecord[]> {
  for await (const _ of runPipeline(chain, { output: folder })) void 0;
  const out: InstructionRecord[] = [];
  for await (const record of readRecords<InstructionRecord>(join(folder, (await readManifest(folder)).at(-1)!.file)))
    out.push(record);
  return out;
}

const record = (
  id: string,
  instruction: string,
  changes: Partial<InstructionRecord> = {},
  response = 'x',
): InstructionRecord => ({
  id,
  messages: [
    { role: 'user', content: instruction },
    { role: 'assistant', content: response },
  ],
  ...changes,
});

function vectorsOf(n: number, d: number, seed: number): Float32Array[] {
  const block = new Uint32Array(4);
  return Array.from({ length: n }, (_, i) => {
    const vector = new Float32Array(d);
    for (let k = 0; k < d; k++) {
      block.set([k, i, 0, 0]);
      vector[k] = philox(block, seed, 1)[0]! / 2 ** 31 - 1;
    }
    return vector;
  });
}

describe('nearest neighbours', () => {
  test.each([
    [1, 3],
    [2, 1],
    [37, 5],
    [130, 16],
  ])('%i vectors of %i numbers: as by comparing all pairs', async (n, d) => {
    const vectors = vectorsOf(n, d, 3);
    // Some repeats, exact and near, in chains.
    for (let i = 10; i < n; i += 11) vectors[i] = vectors[i - 7]!.map((x) => 3 * x + (i % 2) * 1e-3);
    const found = await neighbours(vectors, { threshold: 0.05, block: 8 });
    const units = vectors.map((v) => {
      const length = Math.hypot(...v);
      return [...v].map((x) => x / length);
    });
    const distance = (a: number, b: number) => units[a]!.reduce((sum, x, k) => sum + (x - units[b]![k]!) ** 2, 0);
    const component = Array.from({ length: n }, (_, i) => i);
    for (let pass = 0; pass < n; pass++) {
      for (let i = 0; i < n; i++)
        for (let j = 0; j < n; j++)
          if (distance(i, j) < 0.05) component[i] = component[j] = Math.min(component[i]!, component[j]!);
      if (pass > 6) break;
    }
    for (let i = 0; i < n; i++) {
      const others = Array.from({ length: n }, (_, j) => j).filter((j) => j !== i);
      const nearest = Math.min(4, ...others.map((j) => distance(i, j)));
      expect(found.distance[i]).toBeCloseTo(nearest, 4);
      if (n > 1) expect(distance(i, found.nearest[i]!)).toBeCloseTo(nearest, 4);
      expect(found.repeats[i]).toBe(others.filter((j) => distance(i, j) < 0.05).length);
    }
    expect([...found.cluster]).toEqual(component);
  });

  test('none, zeros, and what is no vector', async () => {
    expect((await neighbours([])).distance).toHaveLength(0);
    expect([...(await neighbours([new Float32Array(2), Float32Array.of(1, 0)])).distance]).toEqual([2, 2]);
    await expect(neighbours([new Float32Array(2), new Float32Array(3)])).rejects.toMatchObject({ argument: 'vectors[1]' });
    await expect(neighbours([Float32Array.of(Number.NaN)])).rejects.toMatchObject({ code: 'ERR_VECTOR' });
  });

  test('as stages: embedded in batches, the first of each cluster stays', async () => {
    const sizes: number[] = [];
    const provider = scripted({
      embed: (texts) => {
        sizes.push(texts.length);
        return texts.map((text) =>
          Float32Array.of(text.startsWith('a') ? 1 : 0, text.startsWith('b') ? 1 : 0, text.length === 1 ? 1 : 0),
        );
      },
    });
    const records = ['aa aa', 'bb bb', 'aa aa', 'c', 'bb bb', 'aa aa'].map((text, i) => record(`r${i}`, text));
    const chain = pipeline(recordsOf(records)).through(embed({ provider, batch: 4 }));
    const kept = await run(chain.through(dedupe()));
    expect(kept.map(({ id }) => id)).toEqual(['r0', 'r1', 'r3']);
    expect(kept[0]).not.toHaveProperty('embedding');
    expect(kept[0]!.nearest).toEqual({ distance: 0, id: 'r2', repeats: 2, cluster: 'r0' });
    expect(Math.max(...sizes)).toBe(4);
    expect((await readManifest(folder)).at(-1)!.dropped).toEqual({ repeat: 3 });
    const all = await run(chain.through(dedupe({ keep: 'all' })));
    expect(all.map(({ nearest }) => nearest!.cluster)).toEqual(['r0', 'r1', 'r0', 'r3', 'r1', 'r0']);
    expect(() => embed({ provider: scripted({ can: { embed: false } }) })).toThrow('embed');
  });
});

describe('MinHash', () => {
  const words = (from: number, count: number) => Array.from({ length: count }, (_, i) => `word${(from + i) * 7}`).join(' ');

  test('repeats are found with their share; texts that have little in common are not', () => {
    const index = minHashIndex({ threshold: 0.7 });
    expect(index.add(words(0, 200))).toBeUndefined();
    expect(index.add(words(1000, 200))).toBeUndefined();
    expect(index.add(`${words(0, 200)}!`)).toEqual({ of: 0, similarity: 1 });
    // 196 sequences each, 186 of them common: 186 / 206 = 0.90.
    expect(index.add(words(10, 200))).toEqual({ of: 0, similarity: expect.closeTo(0.9, 0) });
    // 96 common of 296: 0.32.
    expect(index.add(words(100, 200))).toBeUndefined();
    expect(index.size).toBe(5);
  });

  test('case, spaces and punctuation do not count; short texts and scripts without spaces do', () => {
    const index = minHashIndex();
    expect(index.add('Why is the sky blue?')).toBeUndefined();
    expect(index.add('why   is the SKY blue')).toMatchObject({ of: 0 });
    expect(index.add('Why')).toBeUndefined();
    expect(index.add('')).toBeUndefined();
    expect(index.add('!')).toMatchObject({ similarity: 1 });
    expect(index.add('天空为什么是蓝色的因为阳光被空气散射得更多所以我们看到的是蓝色')).toBeUndefined();
    expect(index.add('天空为什么是蓝色的因为阳光被空气散射得更多所以我们看到的是蓝色。')).toMatchObject({ similarity: 1 });
  });

  test('an equal text is always found', () => {
    fc.assert(
      fc.property(fc.array(fc.string({ unit: 'grapheme', minLength: 1 }), { minLength: 1, maxLength: 20 }), (texts) => {
        const index = minHashIndex({ hashes: 16 });
        for (const text of texts) index.add(text);
        for (const text of texts) expect(index.add(text)).toMatchObject({ similarity: 1 });
      }),
      { numRuns: 50 },
    );
  });

  test('as a stage', async () => {
    const records = ['Why is the sky so blue today?', 'What is a cat?', 'Why is the sky so blue today'].map((t, i) =>
      record(`r${i}`, t),
    );
    expect((await run(pipeline(recordsOf(records)).through(dedupeText()))).map(({ id }) => id)).toEqual(['r0', 'r1']);
  });
});

describe('filters', () => {
  const good = record('a', 'Why?', {
    tags: { quality: 'good', difficulty: 'medium', category: 'Math', safety: 'safe', language: 'en' },
    nearest: { distance: 0.3, id: 'b', repeats: 0, cluster: 'a' },
    reward: 60,
    baseReward: 40,
  });

  test.each<[FilterOptions, Partial<InstructionRecord>, string | undefined]>([
    [{}, {}, undefined],
    [{ quality: 'good' }, {}, undefined],
    [{ quality: 'excellent' }, {}, 'quality'],
    [{ quality: 'very poor' }, { tags: { quality: null } }, 'quality'],
    [{ difficulty: 'hard' }, {}, 'difficulty'],
    [{ categories: ['Math'] }, {}, undefined],
    [{ categories: ['Editing'] }, {}, 'category'],
    [{ languages: ['de'] }, {}, 'language'],
    [{ safe: true }, { tags: { safety: 'unsafe' } }, 'safety'],
    [{ distance: 0.3 }, {}, 'distance'],
    [{ distance: 0 }, {}, undefined],
    [{ distance: 0 }, { nearest: undefined as never }, 'distance'],
    [{ reward: 60 }, {}, 'reward'],
    [{ reward: 0 }, { reward: null }, 'reward'],
    [{ rewardDifference: 19 }, {}, undefined],
    [{ rewardDifference: 20 }, {}, 'reward-difference'],
    [{ noColon: true }, { messages: [{ role: 'user', content: 'Do: ' }] }, 'colon'],
    [{ response: { least: 2 } }, {}, 'response-length'],
    [{ response: { most: 0 } }, {}, 'response-length'],
  ])('%j %j', (options, changes, reason) => {
    expect(refusal({ ...good, ...changes }, options)).toBe(reason);
  });

  test('the longest, ties by order; shares of easy and hard', async () => {
    const lengths = [5, 9, 9, 2, 9, 7];
    const records = lengths.map((n, i) => record(`r${i}`, 'q', { tags: { difficulty: i < 3 ? 'easy' : 'hard' } }, 'y'.repeat(n)));
    const ids = async (options: FilterOptions) =>
      (await run(pipeline(recordsOf(records)).through(filter(options)))).map(({ id }) => id);
    expect(await ids({ longest: 2 })).toEqual(['r1', 'r2']);
    expect(await ids({ longest: 4 })).toEqual(['r1', 'r2', 'r4', 'r5']);
    expect(await ids({ longest: 99 })).toHaveLength(6);
    expect(await ids({ longest: 4, easyShare: 0.5 })).toEqual(['r1', 'r2', 'r4', 'r5']);
    expect(await ids({ longest: 2, easyShare: 0.5 })).toEqual(['r1', 'r4']);
    expect(await ids({ longest: 2, difficulty: 'hard' })).toEqual(['r4', 'r5']);
    expect((await readManifest(folder)).at(-1)!.dropped).toEqual({ difficulty: 3, longest: 1 });
  });

  test('recipes name scales that exist, and unknown ones are refused', () => {
    for (const recipe of Object.values(filterRecipes) as FilterOptions[]) {
      if (recipe.quality) expect(qualities).toContain(recipe.quality);
      if (recipe.difficulty) expect(difficulties).toContain(recipe.difficulty);
    }
    expect(filterRecipe('magpie-filter-5')).toEqual({ quality: 'good', difficulty: 'easy', distance: 0, reward: 0 });
    expect(() => filterRecipe('toString')).toThrow('magpie-pro-300k');
  });
});
