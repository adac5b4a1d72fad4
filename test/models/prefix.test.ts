// Keys and values that are kept between calls: the same greedy texts as without, and only what is new is read.
import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { complete } from '../../src/models/completion.ts';
import type { DecoderConfig } from '../../src/models/decoder.ts';
import { type BatchOptions, generateTokens } from '../../src/models/generate.ts';
import { createModel, type LanguageModel, modelConfig } from '../../src/models/model.ts';
import { createPrefixCache, type PrefixCache } from '../../src/models/prefix.ts';
import { presets } from '../../src/models/presets.ts';
import { trainTokenizer } from '../../src/tokenizer/train.ts';

const config: DecoderConfig = {
  ...presets['gemma2-nano'],
  ...{ vocabSize: 61, width: 24, layers: 3, heads: 4, kvHeads: 2, headSize: 6, hidden: 20, context: 96 },
  ...{ window: 5, initStd: 0.4, finalCap: 20, tied: false },
};
const models: Record<string, LanguageModel> = {};
beforeAll(() => {
  models.local = createModel(config, { seed: 5, trainable: false });
  models.global = createModel({ ...config, window: null, layerPattern: ['global'] }, { seed: 5, trainable: false });
  const { normOffset, activation, scaledEmbedding, postNorms, attentionCap } = presets['phi3-mini'];
  models.phi3 = createModel(
    {
      ...(models.global.config as DecoderConfig),
      ...{
        normOffset,
        activation,
        scaledEmbedding,
        postNorms,
        attentionCap,
        architecture: 'phi3',
        finalCap: null,
        queryScalar: 8,
      },
      // As of 20 tokens a text is turned otherwise.
      ...{
        headSize: 8,
        rotaryShare: 0.5,
        ropeScaling: { kind: 'longrope', context: 20, magnitude: 1.2, short: [1, 2], long: [3, 40] },
      },
    },
    { seed: 5, trainable: false },
  );
  const gpt2 = { vocabSize: 61, width: 24, layers: 2, heads: 4, kvHeads: 4, headSize: 6, hidden: 20, context: 96, initStd: 0.4 };
  models.gpt2 = createModel(modelConfig('gpt2-nano', gpt2), { seed: 5, trainable: false });
});
afterAll(() => {
  for (const model of Object.values(models)) model.dispose();
});

/** Greedy continuations. */
async function texts(model: LanguageModel, prompts: readonly (readonly number[])[], tokens: number, options: BatchOptions = {}) {
  const all = prompts.map((): number[] => []);
  const requests = prompts.map((ids) => ({ ids, tokens, temperature: 0 }));
  for await (const event of generateTokens(model, requests, options))
    if (event.type === 'token') all[event.index]!.push(event.id);
  return all;
}

async function withCache(use: (cache: PrefixCache) => Promise<void>, options?: { texts: number }): Promise<void> {
  const cache = createPrefixCache(options);
  await use(cache).finally(() => cache.dispose());
}

const line = (n: number, step: number): number[] => Array.from({ length: n }, (_, i) => (i * i * 7 + i * step + 3) % 61);

describe.each(['local', 'global', 'phi3', 'gpt2'])('%s', (name) => {
  test('turns of conversations, cut and continued anywhere, alone and together', async () => {
    const turn = fc.record({
      from: fc.nat(3), // which earlier text it goes on from
      cut: fc.oneof(fc.constant(0), fc.integer({ min: 0, max: 12 })), // tokens of its end that are dropped
      more: fc.array(fc.nat(60), { minLength: 1, maxLength: 9 }),
      tokens: fc.integer({ min: 1, max: 5 }),
      beside: fc.boolean(), // another prompt in the same call
    });
    await fc.assert(
      fc.asyncProperty(fc.array(turn, { minLength: 2, maxLength: 5 }), fc.integer({ min: 1, max: 3 }), (turns, places) =>
        withCache(
          async (cache) => {
            const before: number[][] = [line(4, 1)];
            for (const { from, cut, more, tokens, beside } of turns) {
              const start = before[from % before.length]!;
              const prompt = [...start.slice(0, Math.max(0, start.length - cut)), ...more].slice(0, 80);
              const prompts = beside ? [prompt, [...more, ...start].slice(0, 40)] : [prompt];
              const got = await texts(models[name]!, prompts, tokens, { cache, chunk: 7 });
              expect(got).toEqual(await texts(models[name]!, prompts, tokens));
              for (const [i, ids] of prompts.entries()) before.push([...ids, ...got[i]!]);
            }
          },
          { texts: places },
        ),
      ),
      { numRuns: 25, seed: 11 },
    );
  });
});

describe('what is read again', () => {
  const model = (name: string): LanguageModel => models[name]!;

  test('of a global model nothing but what differs, also when it outgrows its room', () =>
    withCache(async (cache) => {
      const first = line(10, 2);
      const [answer] = await texts(model('global'), [first], 4, { cache });
      expect(cache.reused).toBe(0);
      // The last token that was drawn was never read.
      const second = [...first, ...answer!, 9, 8, 7];
      const [again] = await texts(model('global'), [second], 30, { cache });
      expect(cache.reused).toBe(13);
      expect(again).toEqual((await texts(model('global'), [second], 30))[0]);
      await texts(model('global'), [first.slice(0, 6)], 1, { cache });
      expect(cache.reused).toBe(13 + 5);
    }));

  test('of a ring that went round all, unless the text goes on from its end', () =>
    withCache(async (cache) => {
      const first = line(12, 2);
      const [answer] = await texts(model('local'), [first], 4, { cache });
      const second = [...first, ...answer!, 9, 8];
      await texts(model('local'), [second], 3, { cache });
      expect(cache.reused).toBe(15);
      await texts(model('local'), [second.slice(0, 14)], 3, { cache });
      expect(cache.reused).toBe(15);
    }));

  test('each prompt takes the place of the text that it shares most with, and else of the oldest', () =>
    withCache(
      async (cache) => {
        const [a, b] = [line(9, 2), line(9, 5)];
        await texts(model('global'), [a], 1, { cache });
        await texts(model('global'), [b], 1, { cache });
        await texts(model('global'), [[...a, 1]], 1, { cache });
        await texts(model('global'), [[...b, 1]], 1, { cache });
        expect(cache.reused).toBe(18);
        await texts(model('global'), [[60, 59, 58]], 1, { cache });
        await texts(model('global'), [[...b, 1, 2]], 1, { cache });
        expect(cache.reused).toBe(18 + 10);
      },
      { texts: 2 },
    ));

  test('texts that were left or aborted are remembered as far as they came', () =>
    withCache(async (cache) => {
      const prompt = line(9, 2);
      const left: number[] = [];
      for await (const event of generateTokens(model('global'), [{ ids: prompt, temperature: 0 }], { cache })) {
        if (event.type === 'token' && left.push(event.id) === 3) break;
      }
      const next = [...prompt, ...left, 5];
      const stop = new AbortController();
      const options = { cache, signal: stop.signal };
      for await (const event of generateTokens(model('global'), [{ ids: next, temperature: 0 }], options)) {
        if (event.type === 'token') stop.abort();
      }
      expect(cache.reused).toBe(11);
      // Left at the first token, while another text was there before.
      for await (const _ of generateTokens(model('global'), [{ ids: [50, ...line(9, 5)] }], { cache })) break;
      expect(await texts(model('global'), [next], 5, { cache })).toEqual(await texts(model('global'), [next], 5));
      expect(cache.reused).toBe(11);
    }));

  test('texts of a tokenizer, by complete', async () => {
    const tokenizer = await trainTokenizer(['one two three two one'], { vocabSize: 270 });
    const small = createModel(
      { ...config, vocabSize: 270, window: null, layerPattern: ['global'] },
      { seed: 2, trainable: false },
    );
    await withCache(async (cache) => {
      const options = { temperature: 0, tokens: 4 };
      const prompts = ['one two', 'one two three'];
      const want = await complete(small, tokenizer, prompts, options);
      expect(await complete(small, tokenizer, prompts, { ...options, batch: 1, cache })).toEqual(want);
      expect(cache.reused).toBeGreaterThan(0);
    });
    small.dispose();
  });

  test('a cache that cannot be used is refused, one whose model has changed forgets', () =>
    withCache(async (cache) => {
      const prompt = line(6, 2);
      for await (const _ of generateTokens(model('global'), [{ ids: prompt }], { cache })) {
        await expect(texts(model('global'), [prompt], 1, { cache })).rejects.toThrow(/another call uses it/);
        expect(() => cache.clear()).toThrow(/under way/);
        break;
      }
      await expect(texts(model('local'), [prompt], 1, { cache })).rejects.toMatchObject({ code: 'ERR_CONFIG' });
      cache.clear();
      await texts(model('global'), [prompt], 1, { cache });
      expect(cache.reused).toBe(0);
      expect(() => createPrefixCache({ texts: 0 })).toThrow(/texts is 0/);
    }));
});
