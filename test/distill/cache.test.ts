// A cached teacher: what is kept, what a student learns from it, and what is refused.
import { cp, mkdtemp, readdir, rm, stat, unlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { openDataset, type TextDataset } from '../../src/data/dataset.ts';
import type { Batch } from '../../src/data/pack.ts';
import { cacheBytesPerToken, cacheShards, openTeacherCache, writeShard } from '../../src/distill/cache.ts';
import { distill, distillationLoss } from '../../src/distill/distill.ts';
import { cacheTeacher } from '../../src/distill/teach.ts';
import { createModel, type LanguageModel, loadModel, modelConfig, saveModel } from '../../src/models/model.ts';
import { softcap } from '../../src/ops/elementwise.ts';
import { linear } from '../../src/ops/linear.ts';
import { logSoftmax } from '../../src/ops/reduce.ts';
import { reshape } from '../../src/ops/reshape.ts';
import { plan } from '../../src/plan/plan.ts';
import { scope } from '../../src/tensor/scope.ts';
import { noGrad } from '../../src/tensor/tape.ts';
import { readAs } from '../../src/tensor/tensor.ts';
import { loadTokenizer, type Tokenizer } from '../../src/tokenizer/tokenizer.ts';
import { trainTokenizer } from '../../src/tokenizer/train.ts';
import { upload } from '../../src/train/batch.ts';
import { type DistillConfig, parseRunOf, type RunInput } from '../../src/train/config.ts';
import type { TrainEvent } from '../../src/train/events.ts';
import { datasetOptions } from '../../src/train/setup.ts';
import { limbeckHere } from '../cli/process.ts';
import { writeCorpus } from '../corpus.ts';

const small = {
  width: 24,
  heads: 2,
  kvHeads: 1,
  headSize: 12,
  hidden: 48,
  window: 12,
  queryScalar: 12,
} as const;
const vocabSize = 300;

let folder: string;
let tokenizer: Tokenizer;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'limbeck-teach-'));
  await writeCorpus(folder, 9, 40);
  await writeFile(join(folder, 'long.txt'), 'A free people shall keep the Union. '.repeat(60));
  await writeFile(join(folder, 'held-out.md'), 'The people keep the Union that is free. '.repeat(9));
  tokenizer = await trainTokenizer(['the people of this country shall keep a Union that is free'], { vocabSize });
  const teacher = createModel(modelConfig('gemma2-nano', { ...small, vocabSize, initStd: 0.4 }), {
    seed: 5,
    trainable: false,
  });
  await saveModel(join(folder, 'teacher'), teacher, tokenizer);
  teacher.dispose();
});
afterAll(() => rm(folder, { recursive: true, force: true }));

function run(changes: Record<string, unknown> = {}): RunInput {
  return {
    kind: 'distill',
    output: join(folder, 'student'),
    data: { text: join(folder, '*.txt'), validation: { text: join(folder, 'held-out.md') } },
    teacher: { checkpoint: join(folder, 'teacher'), cache: join(folder, 'cache') },
    model: { preset: 'gemma2-nano', ...small, vocabSize },
    batch: { sequences: 3, length: 32 },
    steps: 6,
    optimizer: { learningRate: 5e-3 },
    log: { tensorboard: false, report: false },
    ...changes,
  } as RunInput;
}
const parsed = (changes?: Record<string, unknown>): DistillConfig => parseRunOf('distill', run(changes));

async function collect(events: AsyncIterable<TrainEvent>): Promise<TrainEvent[]> {
  const all: TrainEvent[] = [];
  for await (const event of events) all.push(event);
  return all;
}

/** The loss of a student on a batch, and its sums of kl. */
async function lossOf(teacher: LanguageModel | undefined, student: LanguageModel, batch: Batch, config: DistillConfig) {
  const { total, kl, ce } = scope(() =>
    noGrad(() => distillationLoss(teacher, student, upload(batch, 1 / batch.predicted), config)),
  );
  const values = { total: await total.item(), kl: await kl!.item() };
  total.dispose();
  kl!.dispose();
  ce!.dispose();
  return values;
}

/** log p of the teacher at every place of a batch [N V], as it would be live. */
async function live(teacher: LanguageModel, batch: Batch): Promise<Float32Array> {
  const logProbs = scope(() =>
    noGrad(() => {
      const hidden = reshape(teacher.hidden(upload(batch, 1).input), [batch.ids.length, -1]);
      return logSoftmax(softcap(linear(hidden, teacher.head), teacher.config.finalCap!));
    }),
  );
  const values = await readAs(logProbs, 'f32').finally(() => logProbs.dispose());
  return values;
}

describe('with the rows that training sees', () => {
  let teacher: LanguageModel;
  let data: TextDataset;
  const topK = 20;
  beforeAll(async () => {
    const made = await cacheTeacher(run(), { topK });
    expect(made.bytes).toBe(made.tokens * cacheBytesPerToken(topK, vocabSize));
    ({ model: teacher } = await loadModel(join(folder, 'teacher')));
    data = await openDataset(datasetOptions(parsed(), tokenizer));
    return async () => {
      teacher.dispose();
      await data.close();
    };
  });

  test('ids and log-probabilities are those of the live teacher', async () => {
    const cache = await openTeacherCache(join(folder, 'cache'));
    const held: Batch[] = [];
    for await (const batch of data.validation()) held.push(await cache.likely(batch));
    const batches = [...held];
    for (let i = 0; i < 5; i++) batches.push(await cache.likely(await data.train.next()));
    for (const batch of batches) {
      const { ids, logProbs } = batch.likely!;
      const all = await live(teacher, batch);
      for (let i = 0; i < batch.ids.length; i += 3) {
        const own = Array.from(ids.subarray(i * topK, (i + 1) * topK));
        if (batch.places![i]! < 0) {
          expect(new Set(own)).toEqual(new Set([-1]));
          continue;
        }
        const row = all.subarray(i * vocabSize, (i + 1) * vocabSize);
        const least = Array.from(row).sort((a, b) => b - a)[topK - 1]!;
        expect(new Set(own).size).toBe(topK);
        let mass = 0;
        let kept = 0;
        for (const [k, id] of own.entries()) {
          expect(row[id]).toBeGreaterThan(least - 1e-4);
          expect(Math.abs(logProbs[i * topK + k]! - row[id]!)).toBeLessThan(5e-3);
          mass += Math.exp(row[id]!);
          kept += Math.exp(logProbs[i * topK + k]!);
        }
        // What is left for the other tokens does not suffer from float16.
        expect(Math.abs(mass - kept)).toBeLessThan(2e-6);
      }
    }
    await cache.close();
  });

  test('the loss is that of the live teacher’s top k; with all tokens kept, that of the whole distribution', async () => {
    const student = createModel(modelConfig('gemma2-nano', { ...small, vocabSize }), { seed: 9, trainable: false });
    const cache = await openTeacherCache(join(folder, 'cache'));
    await cacheTeacher(run({ teacher: { checkpoint: join(folder, 'teacher'), cache: join(folder, 'all') } }), {
      topK: vocabSize,
    });
    const whole = await openTeacherCache(join(folder, 'all'));
    for (let i = 0; i < 4; i++) {
      const batch = await data.train.next();
      const all = await live(teacher, batch);
      const sparse = { topK, ids: new Int32Array(batch.ids.length * topK), logProbs: new Float32Array(batch.ids.length * topK) };
      for (let n = 0; n < batch.ids.length; n++) {
        const row = all.subarray(n * vocabSize, (n + 1) * vocabSize);
        const best = Array.from(row.keys())
          .sort((a, b) => row[b]! - row[a]!)
          .slice(0, topK);
        sparse.ids.set(best, n * topK);
        sparse.logProbs.set(
          best.map((id) => row[id]!),
          n * topK,
        );
      }
      const [own, kept] = await Promise.all([
        lossOf(undefined, student, await cache.likely(batch), parsed()),
        lossOf(undefined, student, { ...batch, likely: sparse }, parsed()),
      ]);
      expect(Math.abs(own.total - kept.total)).toBeLessThan(2e-5 * kept.total);
      const exact = await lossOf(teacher, student, batch, parsed());
      const everything = await lossOf(undefined, student, await whole.likely(batch), parsed());
      expect(Math.abs(everything.total - exact.total)).toBeLessThan(1e-4 * exact.total);
      // Tokens that share a bucket hide what differs among them.
      expect(own.total).toBeLessThan(exact.total);
    }
    await cache.close();
    await whole.close();
    student.dispose();
  });

  test('a run learns from the cache alone, and goes on to the same bits', async () => {
    const teacherless = { teacher: { cache: join(folder, 'cache') } };
    const events = await collect(distill(run({ ...teacherless, steps: 40 })));
    const losses = events.flatMap((e) => (e.type === 'step' ? [e.loss] : []));
    expect(losses.at(-1)).toBeLessThan(0.8 * losses[0]!);
    expect(events[0]).not.toHaveProperty('teacherParameters');
    const scored = events.find((e) => e.type === 'evaluate')!;
    expect(scored.kl).toBeGreaterThan(0);
    expect(scored.agreement).toBeGreaterThan(0);

    const output = join(folder, 'parts');
    const stop = new AbortController();
    const parts: number[] = [];
    for await (const event of distill(run({ ...teacherless, output, steps: 40 }), { signal: stop.signal })) {
      if (event.type !== 'step') continue;
      parts.push(event.loss);
      if (event.step === 17) stop.abort();
    }
    for (const event of await collect(distill(run({ ...teacherless, output, steps: 40 }))))
      if (event.type === 'step') parts.push(event.loss);
    expect(parts).toEqual(losses);
    const live = distill(run({ output, steps: 41, teacher: { checkpoint: join(folder, 'teacher') } }));
    await expect(collect(live)).rejects.toMatchObject({ code: 'ERR_RESUME' });
  });

  test('rows hold whole segments, each token once an epoch', async () => {
    const { train, report, close } = await openDataset(datasetOptions(parsed(), tokenizer));
    const seen = new Set<number>();
    const ends = data.stores[0]!.ends;
    let padding = 0;
    let count = 0;
    while (count < 3 * report.trainTokens) {
      const { places, starts, positions, tokens, ids } = await train.next();
      for (const [i, place] of places!.entries()) {
        if (place < 0) {
          padding++;
          continue;
        }
        seen.add(place);
        const document = ends.findIndex((end) => place < end);
        expect(positions[i]).toBe((place - (document === 0 ? 0 : ends[document - 1]!)) % 32);
        expect(starts[i]).toBe((i % 32) - positions[i]!);
      }
      expect(ids.length).toBe(96);
      count += tokens;
    }
    expect(seen.size).toBe(report.trainTokens);
    expect(padding / count).toBeLessThan(0.12);
    await close();
  });
});

describe('files', () => {
  test('a stopped call goes on, and what is written stays', async () => {
    const cache = join(folder, 'stopped');
    const changes = { teacher: { checkpoint: join(folder, 'teacher'), cache } };
    const whole = await cacheTeacher(run(changes), { topK: 3 });
    const names = (await readdir(cache)).sort();
    expect(names).toEqual([
      'cache.json',
      'taught-00000.safetensors',
      'taught-00001.safetensors',
      'tokenizer.json',
      'tokenizer_config.json',
    ]);
    expect((await loadTokenizer(cache)).fingerprint).toBe(tokenizer.fingerprint);
    const kept = await stat(join(cache, 'taught-00000.safetensors'));
    await unlink(join(cache, 'taught-00001.safetensors'));
    await expect(openTeacherCache(cache)).rejects.toThrow('lacks 1 of its 2 files');
    const stop = new AbortController();
    stop.abort();
    await expect(cacheTeacher(run(changes), { topK: 3, signal: stop.signal })).rejects.toThrow('aborted');
    expect((await readdir(cache)).sort()).toEqual(names.filter((name) => !name.includes('00001')));
    const shown: number[] = [];
    expect(await cacheTeacher(run(changes), { topK: 3, onProgress: ({ tokens, total }) => shown.push(tokens / total) })).toEqual(
      whole,
    );
    expect(shown[0]).toBeGreaterThan(0.5);
    expect(shown.at(-1)).toBe(1);
    expect((await stat(join(cache, 'taught-00000.safetensors'))).mtimeMs).toBe(kept.mtimeMs);
  });

  test('shards begin at segments and cover a store', () => {
    const ends = Float64Array.of(0, 5, 5, 70, 71, 200);
    const store = { tokens: 200, ends, read: async () => new Int32Array(0), close: async () => {} };
    const { shards, stores } = cacheShards([store], 32, 2 ** 26 / 40);
    expect(stores).toEqual([{ tokens: 200, documents: 6 }]);
    expect(shards).toEqual([0, 69, 135, 199]);
    for (const start of shards) {
      const document = ends.findIndex((end) => start < end);
      expect((start - (document === 0 ? 0 : ends[document - 1]!)) % 32).toBe(0);
    }
    expect(cacheShards([store, store], 32, 1).shards).toEqual([0, 200]);
    expect(cacheShards([{ ...store, tokens: 0, ends: new Float64Array(0) }], 32, 1).shards).toEqual([]);
  });

  test('large vocabularies, a certain token and a shared bucket keep their probabilities', async () => {
    const cache = join(folder, 'direct');
    await cp(join(folder, 'cache'), cache, { recursive: true });
    const facts = {
      format: 1,
      teacher: '',
      tokenizer: '',
      vocabSize: 70_000,
      length: 4,
      topK: 2,
      temperature: 1,
      stores: [{ tokens: 3, documents: 1 }],
      shards: [0],
    } as const;
    await writeFile(join(cache, 'cache.json'), JSON.stringify(facts));
    const logProbs = Float32Array.of(0, Number.NEGATIVE_INFINITY, Math.log(0.7), Math.log(0.299999), -3.3, -9.1);
    const shard = { tokens: Int32Array.of(69_999, 1, 2), ids: Int32Array.of(69_998, 3, 4, 5, 6, 7), logProbs };
    await writeShard(join(cache, 'taught-00000.safetensors'), shard, facts);
    const opened = await openTeacherCache(cache);
    const batch = { ids: shard.tokens, places: Float64Array.of(0, 1, 2) } as unknown as Batch;
    const { likely } = await opened.likely(batch);
    expect(likely!.ids).toEqual(shard.ids);
    for (const [i, value] of likely!.logProbs.entries()) {
      if (Number.isFinite(logProbs[i]!)) expect(Math.abs(value - logProbs[i]!)).toBeLessThan(4e-3);
      else expect(value).toBe(logProbs[i]);
    }
    expect(Math.exp(likely!.logProbs[2]!) + Math.exp(likely!.logProbs[3]!)).toBeCloseTo(0.999999, 7);
    const other = { ids: Int32Array.of(69_999, 2, 2), places: batch.places } as unknown as Batch;
    await expect(opened.likely(other)).rejects.toMatchObject({ code: 'ERR_TEACHER_CACHE', expected: '1', actual: '2' });
    await opened.close();
  });

  test('what does not fit is refused by name', async () => {
    const fails = (changes: Record<string, unknown>) => expect(collect(distill(run({ resume: false, ...changes })))).rejects;
    await fails({ batch: { sequences: 3, length: 24 } }).toThrow(
      "batch.length: the teacher's cache was made with 32, the run has 24",
    );
    await fails({ distill: { temperature: 2 } }).toThrow('distill.temperature');
    await fails({ distill: { divergence: { kind: 'reverse_kl' } } }).toThrow('use forward_kl');
    await fails({ data: { text: join(folder, '*.txt'), isolate: false } }).toThrow('data.isolate is false');
    await fails({ data: { text: [join(folder, '0.txt'), join(folder, '1.txt')], validation: { documents: 1 } } }).toThrow(
      'tokens of source 1',
    );
    await fails({ teacher: { cache: join(folder, 'none') } }).toThrow('does not exist');
    await fails({ teacher: {} }).toThrow('give the checkpoint of the teacher, or its cache');
    await fails({ model: { preset: 'gemma2-nano', ...small, vocabSize: 320 } }).toThrow(
      'the teacher has 300 rows of vocabulary, the student 320',
    );
    await expect(cacheTeacher(run(), { topK: 21 })).rejects.toThrow('holds a cache of another topK');
    await expect(cacheTeacher(run(), { topK: 301 })).rejects.toThrow('the teacher has 300 tokens');
    await expect(cacheTeacher(run({ teacher: { checkpoint: join(folder, 'teacher') } }))).rejects.toThrow(
      'teacher.cache is missing',
    );
    const other = await trainTokenizer(['entirely other words in here'], { vocabSize: 290 });
    await other.save(join(folder, 'other'));
    await fails({ tokenizer: join(folder, 'other') }).toThrow('different tokenizers');
  });

  test('the plan counts a cached teacher and advises one', async () => {
    const without = { teacher: { checkpoint: join(folder, 'teacher') } };
    const planned = await plan(run(without), { room: 1 });
    const advice = planned.advice.find(({ change }) => change.startsWith('a cached teacher'))!;
    expect(advice.change).toContain('of disk for the 576 tokens of the run');
    expect(advice.total).toBeLessThan(planned.memory.total - planned.memory.teacher / 2);
    const cached = await plan(run({ teacher: { cache: join(folder, 'cache') } }));
    expect(cached.memory.teacher).toBe(0);
    expect(cached.parameters).not.toHaveProperty('teacher');
    expect(
      (await plan(run({ ...without, distill: { divergence: { kind: 'reverse_kl' } } }), { room: 1 })).advice.map((a) => a.change),
    ).not.toContainEqual(expect.stringContaining('cached'));
  });

  test('limbeck teach', async () => {
    await writeFile(join(folder, 'run.json'), JSON.stringify(run({ teacher: { checkpoint: join(folder, 'teacher') } })));
    const out = join(folder, 'by-command');
    const result = await limbeckHere(['teach', join(folder, 'run.json'), '--top-k', '4', '--out', out]);
    expect(result).toMatchObject({ code: 0, err: '' });
    expect(result.out).toMatch(/by-command: .* tokens in /);
    await (await openTeacherCache(out)).close();
  });
});
