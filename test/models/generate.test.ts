import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import {
  complete,
  completions,
  generate,
  generateText,
  streamText,
  type TextOptions,
  textRequest,
} from '../../src/models/completion.ts';
import type { DecoderConfig } from '../../src/models/decoder.ts';
import { loadGenerationConfig } from '../../src/models/defaults.ts';
import { type BatchOptions, generateTokens, type TokenRequest } from '../../src/models/generate.ts';
import { createModel, type LanguageModel, saveModel } from '../../src/models/model.ts';
import { presets } from '../../src/models/presets.ts';
import { scoreTokens } from '../../src/models/score.ts';
import { softcap } from '../../src/ops/elementwise.ts';
import { linear } from '../../src/ops/linear.ts';
import { logSoftmax } from '../../src/ops/reduce.ts';
import { scope } from '../../src/tensor/scope.ts';
import { noGrad } from '../../src/tensor/tape.ts';
import { readAs, tensor } from '../../src/tensor/tensor.ts';
import { type Tokenizer, tokenizerFromJson } from '../../src/tokenizer/tokenizer.ts';
import { trainTokenizer } from '../../src/tokenizer/train.ts';

let model: LanguageModel;
let tokenizer: Tokenizer;
beforeAll(async () => {
  tokenizer = await trainTokenizer(['one two three two one, three and two — naïve'], { vocabSize: 280 });
  const config: DecoderConfig = {
    ...presets['gemma2-nano'],
    // A vocabulary with rows that the tokenizer does not know.
    ...{ vocabSize: tokenizer.vocabSize + 24, width: 24, layers: 3, heads: 4, kvHeads: 2, headSize: 6, hidden: 20 },
    // A head of its own: a tied one mostly repeats the last token.
    ...{ window: 5, initStd: 0.4, context: 64, finalCap: 20, tied: false },
  };
  model = createModel(config, { seed: 5, trainable: false });
});
afterAll(() => model.dispose());

/** Log-probabilities of the next token after whole texts: no cache, no batch. */
async function logProbs(ids: readonly number[], size: number): Promise<Float32Array> {
  const t = ids.length;
  const z = scope(() =>
    noGrad(() => {
      const positions = Int32Array.from(ids, (_, i) => i);
      const h = model.hidden({ ids: tensor(Int32Array.from(ids), [1, t]), positions: tensor(positions, [1, t]) });
      return softcap(linear(h, model.head), model.config.finalCap!);
    }),
  );
  const last = (await readAs(z, 'f32')).subarray((t - 1) * model.config.vocabSize).subarray(0, size);
  z.dispose();
  const y = scope(() => logSoftmax(tensor(last, [1, size])));
  return readAs(y, 'f32').finally(() => y.dispose());
}

async function greedy(prompt: readonly number[], tokens: number, size = model.config.vocabSize) {
  const ids = [...prompt];
  const scores: number[] = [];
  while (ids.length < prompt.length + tokens) {
    const all = await logProbs(ids, size);
    const best = all.indexOf(all.reduce((a, b) => Math.max(a, b)));
    scores.push(all[best]!);
    ids.push(best);
  }
  return { ids: ids.slice(prompt.length), scores };
}

async function tokensOf(requests: TokenRequest[], options: BatchOptions = {}) {
  const all = requests.map(() => ({ ids: [] as number[], scores: [] as number[], reason: '' }));
  for await (const event of generateTokens(model, requests, options)) {
    const one = all[event.index]!;
    expect(one.reason).toBe('');
    if (event.type === 'end') one.reason = event.reason;
    else {
      one.ids.push(event.id);
      one.scores.push(event.logProb);
    }
  }
  return all;
}

const prompts = [3, 11, 1, 7, 20].map((n, row) => Array.from({ length: n }, (_, i) => (i * i * 5 + row * 17 + 1) % 280));

describe('tokens', () => {
  test('greedy texts of a batch are those of the full forward pass, with their log-probabilities', async () => {
    const requests = prompts.map((ids, i) => ({ ids, temperature: 0, tokens: 9 + 3 * i }));
    for (const options of [{ batch: 1 }, { batch: 3, chunk: 4 }, { batch: 9 }]) {
      for (const [i, got] of (await tokensOf(requests, options)).entries()) {
        const want = await greedy(prompts[i]!, 9 + 3 * i);
        expect(got.ids).toEqual(want.ids);
        expect(new Set(got.ids).size).toBeGreaterThan(3);
        for (const [at, score] of got.scores.entries()) expect(score).toBeCloseTo(want.scores[at]!, 4);
        expect(got.reason).toBe('length');
      }
    }
  });

  test('the same seed gives the same text, alone and beside others', async () => {
    const request = (ids: number[], seed: number): TokenRequest => ({ ids, seed, temperature: 1.5, topP: 0.9, tokens: 12 });
    const requests = prompts.map((ids, i) => request(ids, 40 + i));
    const together = await tokensOf(requests, { batch: 4 });
    for (const [i, one] of requests.entries()) {
      expect((await tokensOf([one]))[0]!.ids).toEqual(together[i]!.ids);
      expect((await tokensOf([request(prompts[i]!, 90 + i)]))[0]!.ids).not.toEqual(together[i]!.ids);
    }
  });

  test('sampling from all tokens follows their probabilities', async () => {
    // 600 first tokens of one prompt against the distribution: chi-squared over the likeliest and the rest.
    const n = 600;
    const drawn = await tokensOf(
      Array.from({ length: n }, (_, seed) => ({ ids: prompts[0]!, seed, temperature: 0.7, tokens: 1 })),
      { batch: 1 },
    );
    const scores = await logProbs(prompts[0]!, model.config.vocabSize);
    const weights = Float64Array.from(scores, (z) => Math.exp(z / 0.7));
    const all = weights.reduce((a, b) => a + b, 0);
    const likeliest = [...weights.keys()].sort((a, b) => weights[b]! - weights[a]!).slice(0, 9);
    let rest = n;
    let expectedRest = n;
    let chi = 0;
    for (const id of likeliest) {
      const expected = (n * weights[id]!) / all;
      const count = drawn.filter(({ ids }) => ids[0] === id).length;
      chi += (count - expected) ** 2 / expected;
      rest -= count;
      expectedRest -= expected;
    }
    chi += (rest - expectedRest) ** 2 / expectedRest;
    expect(chi).toBeLessThan(33); // 9 degrees of freedom: 1 in 10,000, and the seeds are fixed
  });

  test('constraints, biases and penalties hold in every step', async () => {
    const even = Uint8Array.from({ length: model.config.vocabSize }, (_, i) => (i % 2 === 0 ? 1 : 0));
    const seen: number[][] = [];
    const allow = (generated: readonly number[]): Uint8Array | undefined => {
      seen.push([...generated]);
      return generated.length < 4 ? even : undefined;
    };
    const [free] = await tokensOf([{ ids: prompts[1]!, temperature: 0, tokens: 12 }]);
    const [masked, biased, varied] = await tokensOf([
      { ids: prompts[1]!, temperature: 1, tokens: 6, allow },
      { ids: prompts[1]!, temperature: 0, tokens: 12, logitBias: { [free!.ids[0]!]: Number.NEGATIVE_INFINITY, 7: 100 } },
      { ids: prompts[1]!, temperature: 0, tokens: 12, repetitionPenalty: 1e6 },
    ]);
    expect(masked!.ids.slice(0, 4).every((id) => id % 2 === 0)).toBe(true);
    expect(seen).toEqual(masked!.ids.map((_, i) => masked!.ids.slice(0, i)));
    expect(biased!.ids).toEqual(new Array(12).fill(7));
    expect(new Set([...varied!.ids, ...prompts[1]!]).size).toBe(12 + new Set(prompts[1]).size);
    // Log-probabilities are the model's own.
    expect(biased!.scores[0]).toBeCloseTo((await logProbs(prompts[1]!, model.config.vocabSize))[7]!, 4);
  });

  test('top log-probabilities, ends and the limits of the vocabulary', async () => {
    const size = model.config.vocabSize - 24;
    const ids = prompts[1]!;
    const { ids: free } = await greedy(ids, 12, size);
    const end = free.find((id) => id !== free[0])!;
    const events = [];
    const request = { ids, temperature: 0, tokens: 12, topLogProbs: 3, stopIds: [end] };
    for await (const event of generateTokens(model, [request], { vocabSize: size })) events.push(event);
    expect(events.length).toBe(free.indexOf(end) + 1);
    expect(events.at(-1)).toEqual({ type: 'end', index: 0, reason: 'stop' });
    const want = await logProbs(ids, size);
    const order = [...want.keys()].sort((a, b) => want[b]! - want[a]!);
    const first = events[0]!;
    if (first.type !== 'token') throw new Error('no token came');
    expect(first.top!.map(({ id }) => id)).toEqual(order.slice(0, 3));
    for (const { id, logProb } of first.top!) expect(logProb).toBeCloseTo(want[id]!, 4);
    const [drawn] = await tokensOf([{ ids, temperature: 5, tokens: 40 }], { vocabSize: size });
    expect(drawn!.ids.every((id) => id < size)).toBe(true);
    const [until] = await tokensOf([{ ids, temperature: 0, tokens: 12, until: (id) => id === end }], { vocabSize: size });
    expect([until!.reason, until!.ids]).toEqual(['stop', free.slice(0, free.indexOf(end) + 1)]);
  });

  test('the end of the context ends a text', async () => {
    const [one] = await tokensOf([{ ids: prompts[0]!, temperature: 0, tokens: 1000 }]);
    expect(one!.ids.length).toBe(64 - 3);
    expect(one!.reason).toBe('length');
  });

  test('an abort ends all texts, and leaving the loop frees everything', async () => {
    const controller = new AbortController();
    const reasons: string[] = [];
    let tokens = 0;
    const requests = prompts.map((ids) => ({ ids, tokens: 30 }));
    for await (const event of generateTokens(model, requests, { batch: 2, signal: controller.signal })) {
      if (event.type === 'end') reasons.push(event.reason);
      else if (++tokens === 7) controller.abort();
    }
    expect(reasons).toEqual(new Array(5).fill('aborted'));
    for await (const event of generateTokens(model, requests)) if (event.type === 'token' && ++tokens > 20) break;
  });

  test('bad requests are refused before anything runs', async () => {
    const of = (request: Partial<TokenRequest>, options: BatchOptions = {}) =>
      tokensOf([{ ids: [1] }, { ids: [1, 2], ...request }], options);
    const context = { code: 'ERR_CONTEXT', argument: 'prompt' };
    await expect(of({ ids: [] })).rejects.toMatchObject({ code: 'ERR_EMPTY' });
    await expect(of({ ids: new Array(64).fill(1) })).rejects.toMatchObject(context);
    for (const id of [-1, 100_000, 1.5, Number.NaN])
      await expect(of({ ids: [id] })).rejects.toMatchObject({ code: 'ERR_TOKEN_RANGE' });
    await expect(of({ stopIds: [9999] })).rejects.toMatchObject({ argument: 'stopIds' });
    await expect(of({ tokens: 0 })).rejects.toMatchObject({ argument: 'tokens' });
    await expect(of({ topLogProbs: -1 })).rejects.toMatchObject({ argument: 'topLogProbs' });
    await expect(of({}, { batch: 0 })).rejects.toMatchObject({ argument: 'batch' });
    await expect(of({}, { chunk: 2.5 })).rejects.toMatchObject({ argument: 'chunk' });
    expect(await tokensOf([])).toEqual([]);
  });
});

describe('texts', () => {
  const text = async (prompt: string, options: TextOptions) => {
    const all = { text: '', ids: [] as number[], finish: '' };
    for await (const piece of streamText(model, tokenizer, prompt, options)) {
      all.text += piece.text;
      all.ids.push(...piece.tokens.map(({ id }) => id));
      all.finish ||= piece.finish ?? '';
    }
    return all;
  };

  test('pieces are the text of the tokens', async () => {
    const { text: whole, ids, finish } = await text('one two', { seed: 2, tokens: 30, temperature: 1 });
    expect(whole).toBe(tokenizer.decode(ids, { skipSpecial: true }));
    expect(['stop', 'length']).toContain(finish);
    let joined = '';
    for await (const piece of generateText(model, tokenizer, 'one two', { seed: 2, tokens: 30, temperature: 1 })) {
      expect(piece).not.toBe('');
      joined += piece;
    }
    expect(joined).toBe(whole);
  });

  test('a stop text ends the text before it, wherever it lies in the tokens', async () => {
    const options = { seed: 4, tokens: 40, temperature: 1 };
    const { text: whole, ids } = await text('three', options);
    for (const [from, to] of [
      [5, 6],
      [7, 12],
      [11, 19],
    ] as const) {
      const stop = whole.slice(from, to);
      const got = await text('three', { ...options, stop: ['never in it ~~', stop] });
      expect(got.text).toBe(whole.slice(0, whole.indexOf(stop)));
      expect(got.finish).toBe('stop');
      expect(ids.slice(0, got.ids.length)).toEqual(got.ids);
    }
    // What only begins like a stop text is not lost.
    expect((await text('three', { ...options, stop: `${whole.slice(-3)}!!` })).text).toBe(whole);
  });

  test('completions of many prompts are those of each alone', async () => {
    const asked = ['one', 'two three', 'naïve', 'and', 'one two three two one'];
    const options = { tokens: 10, temperature: 1, seed: 7 };
    const all = await complete(model, tokenizer, asked, {
      ...options,
      batch: 2,
      each: (i) => (i === 2 ? { temperature: 0 } : {}),
    });
    for (const [i, completion] of all.entries()) {
      const alone = await text(asked[i]!, { ...options, seed: 7 + i, ...(i === 2 ? { temperature: 0 } : {}) });
      expect(completion.text).toBe(alone.text);
      expect(completion.tokens.map(({ id }) => id)).toEqual(alone.ids);
      expect(completion.index).toBe(i);
    }
    const aborted = new AbortController();
    aborted.abort();
    for await (const { finish } of completions(model, tokenizer, asked, { signal: aborted.signal }))
      expect(finish).toBe('aborted');
    const pieces = generateText(model, tokenizer, 'one', { signal: aborted.signal });
    await expect(pieces.next()).rejects.toBe(aborted.signal.reason);
  });

  test('one begin token, where the tokenizer begins texts', async () => {
    const prompt = (tokenizer: Tokenizer, text: string) => [...(textRequest(tokenizer, text, {}).request.ids as Int32Array)];
    const ids = [...tokenizer.encode('one')];
    expect(prompt(tokenizer, 'one')).toEqual([tokenizer.bos, ...ids]);
    expect(prompt(tokenizer, '<bos>one')).toEqual([tokenizer.bos, ...ids]);
    const { text, configText } = tokenizer.file;
    const config = { ...JSON.parse(configText ?? '{}'), add_bos_token: false };
    const without = tokenizerFromJson(text, JSON.stringify(config));
    expect([tokenizer.begins, without.begins, without.bos]).toEqual([true, false, tokenizer.bos]);
    expect(prompt(without, 'one')).toEqual(ids);
    expect(prompt(without, '')).toEqual([tokenizer.bos]);
  });

  test('an empty stop text and an empty prompt of ids are refused', async () => {
    await expect(text('one', { stop: ['x', ''] })).rejects.toMatchObject({ argument: 'stop[1]' });
    await expect(complete(model, tokenizer, [[]])).rejects.toMatchObject({ code: 'ERR_EMPTY' });
  });
});

describe('a folder', () => {
  let folder: string;
  let saved: LanguageModel;
  beforeAll(async () => {
    folder = await mkdtemp(join(tmpdir(), 'limbeck-generate-'));
    saved = createModel({ ...model.config, tied: true }, { seed: 6, trainable: false });
    await saveModel(folder, saved, tokenizer);
  });
  afterAll(async () => {
    saved.dispose();
    await rm(folder, { recursive: true });
  });
  const config = (fields: object): Promise<void> => writeFile(join(folder, 'generation_config.json'), JSON.stringify(fields));

  test('generation_config.json gives the defaults', async () => {
    expect(await loadGenerationConfig(join(folder, 'nowhere'))).toEqual({});
    await config({ do_sample: true, top_k: 64, top_p: 0.95, eos_token_id: [1, 106], repetition_penalty: 1.1, max_new_tokens: 7 });
    expect(await loadGenerationConfig(folder)).toEqual({
      ...{ temperature: 1, topK: 64, topP: 0.95, stopIds: [1, 106], repetitionPenalty: 1.1, tokens: 7 },
    });
    await config({ do_sample: false, temperature: 0.6, eos_token_id: 2, top_k: 0 });
    expect(await loadGenerationConfig(folder)).toEqual({ temperature: 0, stopIds: [2] });
    await config({ max_new_tokens: 3, do_sample: false });
    const got: string[] = [];
    for await (const piece of generate({ checkpoint: folder, prompt: 'one' })) got.push(piece);
    const [want] = await complete(saved, tokenizer, ['one'], { tokens: 3, temperature: 0 });
    expect(got.join('')).toBe(want!.text);
  });

  test.each([
    [{ top_p: 7 }, 'top_p'],
    [{ eos_token_id: ['a'] }, 'eos_token_id'],
    [{ temperature: '1' }, 'temperature'],
  ])('a wrong field is named: %o', async (fields, argument) => {
    await config(fields);
    await expect(loadGenerationConfig(folder)).rejects.toMatchObject({ code: 'ERR_CHECKPOINT', argument });
  });
});

test('scores of given tokens are those of the full forward pass', async () => {
  const requests = [...prompts.map((ids, i) => ({ ids, from: Math.min(ids.length, 1 + i) })), { ids: prompts[4]! }];
  for (const tokens of [1, 30, 4096]) {
    const scores = await scoreTokens(model, requests, { tokens });
    for (const [i, { ids, from = 1 }] of requests.map((r) => ({ from: 1, ...r })).entries()) {
      expect(scores[i]!.length).toBe(ids.length - from);
      for (let at = from; at < ids.length; at++) {
        const want = (await logProbs(ids.slice(0, at), model.config.vocabSize))[ids[at]!]!;
        expect(Math.abs(scores[i]![at - from]! - want)).toBeLessThan(1e-4);
      }
    }
  }
  await expect(scoreTokens(model, [{ ids: [1, -4] }])).rejects.toMatchObject({ code: 'ERR_TOKEN_RANGE' });
  await expect(scoreTokens(model, [{ ids: [1, 2], from: 0 }])).rejects.toMatchObject({ code: 'ERR_CONFIG' });
  await expect(scoreTokens(model, [{ ids: new Array(65).fill(1) }])).rejects.toMatchObject({ code: 'ERR_CONTEXT' });
  expect(await scoreTokens(model, [])).toEqual([]);
});
