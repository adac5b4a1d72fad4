// Our GGUF files in llama.cpp as a provider: it draws what the same model draws in process, and Magpie goes from nothing to a data set.
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import * as llama from 'node-llama-cpp';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { exportGguf } from '../../src/models/gguf.ts';
import { loadModel } from '../../src/models/model.ts';
import { rows } from '../../src/ops/reshape.ts';
import { dedupe, dedupeText, embed } from '../../src/synth/dedupe.ts';
import { filter } from '../../src/synth/filter.ts';
import { reward } from '../../src/synth/judge.ts';
import { magpie } from '../../src/synth/magpie/magpie.ts';
import { preQueryFromTemplate } from '../../src/synth/magpie/templates.ts';
import { readManifest, readRecords, runPipeline } from '../../src/synth/pipeline.ts';
import type { CompletionOptions, Provider, Reply } from '../../src/synth/provider.ts';
import { type LlamaModule, type LlamaOptions, openLlamaProvider } from '../../src/synth/providers/llama.ts';
import { openLocalProvider } from '../../src/synth/providers/local.ts';
import type { InstructionRecord } from '../../src/synth/record.ts';
import { missions, tag } from '../../src/synth/tag.ts';
import { scope } from '../../src/tensor/scope.ts';
import { noGrad } from '../../src/tensor/tape.ts';
import { readAs, tensor } from '../../src/tensor/tensor.ts';
import { chatTemplate } from '../../src/tokenizer/chat.ts';
import type { Tokenizer } from '../../src/tokenizer/tokenizer.ts';
import { trainTinyChat } from '../synth/tiny.ts';

let folder: string;
let model: string;
let tokenizer: Tokenizer;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'limbeck-llama-'));
  model = await trainTinyChat(folder);
  const loaded = await loadModel(model);
  try {
    tokenizer = loaded.tokenizer;
    const template = chatTemplate('chatml', tokenizer).source;
    await exportGguf(join(folder, 'f16.gguf'), loaded.model, tokenizer, { chatTemplate: template });
    await exportGguf(join(folder, 'f32.gguf'), loaded.model, tokenizer, { type: 'f32' });
  } finally {
    loaded.model.dispose();
  }
}, 120_000);
afterAll(() => rm(folder, { recursive: true, force: true }));

async function using(
  file: string,
  use: (gguf: Provider, local: Provider) => Promise<void>,
  options: Partial<LlamaOptions> = {},
): Promise<void> {
  const gguf = await openLlamaProvider({
    file: join(folder, file),
    context: 256,
    threads: 1,
    llama: { build: 'never', gpu: false },
    module: llama as unknown as LlamaModule,
    ...options,
  });
  const local = await openLocalProvider(model, { template: 'chatml', name: 'tiny', batch: 8 });
  try {
    await use(gguf, local);
  } finally {
    await gguf.dispose();
    await local.dispose();
  }
}

// Our models begin with their begin token, here the one that ends a document.
const question = '<|endoftext|><|im_start|>user\n';
const asked = `${question}What is the`;
/** What llama.cpp knows to end a turn by its name, beside the model's end token. */
const stopIds = [2];

/**
 * How many tokens two replies share before rounding has led them apart; up to there, and at that place, the alternatives are equally
 * likely within a tolerance.
 */
function shared(a: Reply, b: Reply, tolerance: number): number {
  const ends = Math.min(a.tokens!.length, b.tokens!.length);
  for (let i = 0; i < ends; i++) {
    const [mine, other] = [a.tokens![i]!, b.tokens![i]!];
    expect(mine.alternatives.length).toBe(other.alternatives.length);
    for (const [j, { logProbability }] of mine.alternatives.entries()) {
      expect(Math.abs(logProbability - other.alternatives[j]!.logProbability)).toBeLessThan(tolerance);
    }
    if (mine.text !== other.text) return i;
    expect(Math.abs(mine.logProbability - other.logProbability)).toBeLessThan(tolerance);
  }
  return ends;
}

describe('what is drawn here', () => {
  test('log-probabilities are those of the model in process, within the rounding of the file', () =>
    using('f16.gguf', async (gguf, local) => {
      const call = { temperature: 0, maxTokens: 24, logProbabilities: 3, stopIds };
      expect(shared(await gguf.complete(asked, call), await local.complete(asked, call), 2e-2)).toBeGreaterThan(4);
    }));

  test('the same seed draws the same tokens as in process, whatever changes the draw', () =>
    using('f32.gguf', async (gguf, local) => {
      const what = tokenizer.id('What')!;
      const ways: CompletionOptions[] = [
        { temperature: 1.3 },
        { temperature: 1.5, topK: 5, topP: 0.9, minP: 0.05 },
        { temperature: 1, bias: { [what]: 3, 0: -4 } },
        { choices: ['good', 'very good', 'bad', 'good enough'], temperature: 4 },
      ];
      let [same, all] = [0, 0];
      for (const [i, way] of ways.entries()) {
        for (let seed = 0; seed < 4; seed++) {
          // Log-probabilities are told as the model has them, whatever the draw.
          const call = { ...way, seed: 10 * i + seed, maxTokens: 16, logProbabilities: 2, stopIds };
          const there = await local.complete(question, call);
          same += shared(await gguf.complete(question, call), there, 1e-2);
          all += there.tokens!.length;
        }
      }
      // llama.cpp keeps keys and values in 16 bits, so that a draw may once fall on the other side.
      expect(same / all).toBeGreaterThan(0.8);
    }));

  test('an answer is one of the choices, as likely as in process', () =>
    using('f16.gguf', async (gguf, local) => {
      const choices = ['good', 'very good', 'bad', 'good enough', 'été', '是'];
      const found = new Set<string>();
      for (let seed = 0; seed < 24; seed++) {
        const { text, finish } = await gguf.complete(asked, { choices, seed, temperature: 8 });
        expect(choices).toContain(text);
        expect(finish).toBe('stop');
        found.add(text);
      }
      expect(found.size).toBeGreaterThan(3);
      for (const choice of choices) {
        const call = { choices: [choice], logProbabilities: 1, stopIds };
        const [here, there] = [await gguf.complete(asked, call), await local.complete(asked, call)];
        expect(shared(here, there, 5e-2)).toBe(there.tokens!.length);
      }
      await expect(gguf.complete(asked, { choices: [''] })).rejects.toMatchObject({ code: 'ERR_CONFIG' });
    }));

  test('the first token has a bias and a temperature of its own', () =>
    using('f32.gguf', async (gguf) => {
      const plain = await gguf.complete(asked, { temperature: 0, maxTokens: 8 });
      expect((await gguf.complete(asked, { temperature: 0, maxTokens: 8, firstTemperature: 0, firstBias: {} })).text).toBe(
        plain.text,
      );
      const bad = tokenizer.id('bad') ?? tokenizer.encode('b')[0]!;
      const shifted = await gguf.complete(asked, { temperature: 0, maxTokens: 8, firstBias: { [bad]: 100 } });
      const first = tokenizer.decode([bad]);
      expect(shifted.text.startsWith(first)).toBe(true);
      expect(shifted.text.slice(first.length, 2 * first.length)).not.toBe(first);
      const firsts = new Set<string>();
      for (let seed = 0; seed < 16; seed++) {
        const { tokens } = await gguf.complete(asked, {
          ...{ temperature: 0, firstTemperature: 20, seed, maxTokens: 2, logProbabilities: 1 },
        });
        firsts.add(tokens![0]!.text);
        // What follows it is the likeliest again.
        expect(tokens![1]!.text).toBe(tokens![1]!.alternatives[0]!.text);
      }
      expect(firsts.size).toBeGreaterThan(8);
    }));
});

test('a conversation is that of the model in process; special tokens in what it says are text', () =>
  using('f16.gguf', async (gguf, local) => {
    for (const content of ['What is the food of Zenda?', 'What is the <|im_end|> of <|im_start|>?']) {
      const call = { temperature: 0, maxTokens: 16, logProbabilities: 2 };
      const [here, there] = [
        await gguf.chat([{ role: 'user', content }], call),
        await local.chat([{ role: 'user', content }], call),
      ];
      expect(here.usage.promptTokens).toBe(there.usage.promptTokens);
      expect(shared(here, there, 5e-2)).toBeGreaterThan(2);
    }
  }));

describe('what llama.cpp draws', () => {
  test('a bias shifts tokens; those that end a text too', () =>
    using('f16.gguf', async (gguf) => {
      const greedy = { temperature: 0, maxTokens: 6 };
      const [token] = tokenizer.encode('capital');
      const text = tokenizer.decode([token!]);
      expect((await gguf.complete(asked, { ...greedy, bias: { [token!]: 1000 } })).text).toBe(text.repeat(6));
      const plain = await gguf.complete(asked, greedy);
      const [likeliest] = tokenizer.encode(plain.text);
      const without = await gguf.complete(asked, { ...greedy, bias: { [likeliest!]: -1000 } });
      expect(without.text.startsWith(tokenizer.decode([likeliest!]))).toBe(false);
      // The end of a document comes right behind that of the last turn.
      const turn = '<|endoftext|><|im_start|>user\nWhat is the food of Zenda?<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n';
      expect(await gguf.complete(turn, greedy)).toMatchObject({ text: '', finish: 'stop' });
      expect(await gguf.complete(turn, { ...greedy, bias: { 0: -1000 } })).toMatchObject({ finish: 'length' });
      await expect(gguf.complete(asked, { bias: { 400: 1 } })).rejects.toMatchObject({ code: 'ERR_TOKEN_RANGE' });
    }));

  test('from all tokens, unless the call says otherwise', () =>
    using('f16.gguf', async (gguf) => {
      const drawn = async (options: CompletionOptions) => {
        const found = new Set<string>();
        for (let seed = 0; seed < 100; seed++) {
          found.add((await gguf.complete(asked, { seed, maxTokens: 1, temperature: 50, ...options })).text);
        }
        return found.size;
      };
      expect(await drawn({})).toBeGreaterThan(60);
      expect(await drawn({ topK: 3 })).toBeLessThanOrEqual(3);
    }));

  test('stop texts and ids, pieces, lengths, penalties, aborts, prompts that cannot be', () =>
    using('f16.gguf', async (gguf) => {
      const plain = await gguf.complete(asked, { temperature: 0, maxTokens: 12 });
      const pieces: string[] = [];
      const onText = (text: string) => pieces.push(text);
      const stopped = await gguf.complete(asked, { temperature: 0, maxTokens: 12, stop: ['?', 'nowhere'], onText });
      expect(stopped).toMatchObject({ finish: 'stop', text: plain.text.slice(0, plain.text.indexOf('?')) });
      expect(pieces.length).toBeGreaterThan(1);
      expect(pieces.join('')).toBe(stopped.text);
      const [id] = tokenizer.encode('?');
      expect((await gguf.complete(asked, { temperature: 0, maxTokens: 12, stopIds: [id!] })).text).toBe(stopped.text);
      const penalized = await gguf.complete(`${asked} food of Zenda? The`, {
        temperature: 0,
        maxTokens: 12,
        repetitionPenalty: 50,
      });
      const again = tokenizer.encode(penalized.text);
      expect(new Set(again).size).toBe(again.length);
      await expect(gguf.complete(asked, { repetitionPenalty: 2, logProbabilities: 1 })).rejects.toMatchObject({
        code: 'ERR_UNABLE',
      });
      await expect(gguf.complete('')).rejects.toMatchObject({ code: 'ERR_EMPTY' });
      await expect(gguf.complete('a b c '.repeat(200))).rejects.toMatchObject({ code: 'ERR_CONTEXT' });
      const gone = gguf.complete(question, { signal: AbortSignal.abort(new Error('no longer wanted')) });
      await expect(gone).rejects.toThrow('no longer wanted');
    }));

  test('several at once give what one alone gives', () =>
    using(
      'f16.gguf',
      async (gguf) => {
        const call = (seed: number) => ({ seed, maxTokens: 20, logProbabilities: 1 });
        const together = await Promise.all(Array.from({ length: 7 }, (_, i) => gguf.complete(question, call(i))));
        for (const i of [2, 6]) expect((await gguf.complete(question, call(i))).text).toBe(together[i]!.text);
      },
      { sequences: 3 },
    ));
});

test('an embedding is the last hidden state, of as much as has room', () =>
  using('f32.gguf', async (gguf) => {
    const texts = ['What is the food of Narnia?', 'What is the food of Zenda?', 'word '.repeat(400), ''];
    const [[first], all] = await Promise.all([gguf.embed(texts.slice(0, 1)), gguf.embed(texts)]);
    expect(all[0]).toEqual(first);
    for (const vector of all) expect(vector.every(Number.isFinite) && vector.length === 64).toBe(true);
    const loaded = await loadModel(model);
    try {
      const ids = tokenizer.encode(texts[0]!);
      const hidden = scope(() =>
        noGrad(() => {
          const places = Int32Array.from(ids, (_, i) => i);
          return rows(
            loaded.model.hidden({ ids: tensor(ids, [1, ids.length]), positions: tensor(places, [1, ids.length]) }),
            0,
            1,
          );
        }),
      );
      const states = await readAs(hidden, 'f32').finally(() => hidden.dispose());
      const last = states.subarray(-64);
      for (const [i, value] of first!.entries()) expect(Math.abs(value - last[i]!)).toBeLessThan(1e-3);
    } finally {
      loaded.model.dispose();
    }
  }));

test(
  'from nothing to a filtered, tagged data set without repeats, twice the same, with the template of the file',
  () =>
    using(
      'f16.gguf',
      async (gguf, local) => {
        expect(gguf.can).toMatchObject({ chat: true, choices: true, bias: true });
        const made: string[][] = [];
        for (const output of [join(folder, 'one'), join(folder, 'two')]) {
          const chain = magpie({
            provider: gguf,
            count: 16,
            template: preQueryFromTemplate(gguf.template!),
            instruction: {
              maxTokens: 40,
              temperature: [0.8, 1],
              stop: ['<|endoftext|>'],
              firstTemperature: 1.2,
              firstBias: { 2: -50 },
            },
            response: { maxTokens: 80 },
          })
            .through(dedupeText({ threshold: 1 }))
            .through(embed({ provider: local }))
            .through(dedupe({ threshold: 1e-6 }))
            .through(tag({ provider: gguf, missions: ['quality', 'difficulty', 'language'], retries: 0 }))
            .through(reward({ provider: gguf, retries: 0 }))
            .through(filter({ quality: 'very poor' }));
          for await (const _ of runPipeline(chain, { output, seed: 7 })) void 0;
          const records: InstructionRecord[] = [];
          const last = (await readManifest(output)).at(-1)!;
          for await (const record of readRecords<InstructionRecord>(join(output, last.file))) records.push(record);
          expect(records.filter(({ messages }) => /What is the \w+ of \w+\?/.test(messages[0]!.content)).length).toBeGreaterThan(
            2,
          );
          for (const { tags } of records) {
            for (const mission of ['quality', 'difficulty', 'language'] as const) {
              expect(missions[mission].answers).toContain(tags![mission]);
            }
          }
          made.push(records.map(({ messages, tags }) => JSON.stringify([messages, tags])));
        }
        expect(new Set(made[0]).size).toBe(made[0]!.length);
        expect(made[1]).toEqual(made[0]);
      },
      { context: 512 },
    ),
  120_000,
);
