// A run that is stopped and goes on gives the bits of the run that was not, whatever it is made of.
import { mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { distill } from '../../src/distill/distill.ts';
import { cacheTeacher } from '../../src/distill/teach.ts';
import { latestCheckpoint } from '../../src/models/folder.ts';
import type { RunInput } from '../../src/train/config.ts';
import type { StepEvent, TrainEvent } from '../../src/train/events.ts';
import { finetune } from '../../src/train/finetune.ts';
import { pretrain } from '../../src/train/pretrain.ts';
import { writeCorpus } from '../corpus.ts';

let folder: string;
const tiny = {
  ...{ preset: 'gemma2-nano', width: 16, layers: 2, heads: 2, kvHeads: 1, headSize: 8, hidden: 32, window: 6, queryScalar: 8 },
  ...{ vocabSize: 300, context: 64 },
} as const;
const loops = { pretrain, distill, finetune } as const;

function run(changes: object): RunInput {
  const { kind = 'pretrain', ...rest } = changes as { kind?: keyof typeof loops };
  return {
    ...{ kind, batch: { sequences: 3, length: 20 }, steps: 7, checkpoint: { every: 100 }, evaluate: { every: 3, batches: 1 } },
    ...{ optimizer: { learningRate: 1e-2 }, seed: 3 },
    ...(kind === 'finetune'
      ? {
          ...{
            model: join(folder, 'base'),
            template: 'plain',
            batch: { sequences: 3, length: 48 },
            data: { train: join(folder, 'rows.jsonl'), validation: 0.2 },
          },
          responses: { samples: 0, examples: 0 },
        }
      : { data: { text: join(folder, '*.txt'), validation: 0.2 }, model: tiny }),
    ...(kind === 'pretrain' ? { tokenizer: join(folder, 'base/tokenizer') } : {}),
    ...(kind === 'distill' ? { teacher: { checkpoint: join(folder, 'base') } } : {}),
    ...rest,
  } as RunInput;
}

async function collect(input: RunInput, signal?: AbortController): Promise<TrainEvent[]> {
  const events: TrainEvent[] = [];
  for await (const event of loops[input.kind](input as never, signal === undefined ? {} : { signal: signal.signal })) {
    events.push(event);
    if (event.type === 'step' && event.step === 3) signal?.abort();
  }
  return events;
}

const figures = (events: readonly TrainEvent[]) =>
  events
    .filter((e): e is StepEvent => e.type === 'step')
    .map(({ step, tokens, loss, learningRate, gradientNorm, kl, ce }) => ({
      step,
      tokens,
      loss,
      learningRate,
      gradientNorm,
      kl,
      ce,
    }));

/** The bytes of the newest checkpoint, by file. */
async function checkpoint(output: string): Promise<Record<string, string>> {
  const path = (await latestCheckpoint(output))!;
  const names = (await readdir(path)).sort();
  return Object.fromEntries(
    await Promise.all(names.map(async (name) => [name, (await readFile(join(path, name))).toString('base64')])),
  );
}

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'limbeck-resume-'));
  await writeCorpus(folder, 12, 120);
  const rows = Array.from({ length: 30 }, (_, i) => ({
    instruction: `Say ${i}`,
    output: Array.from({ length: 1 + (i % 7) }, (_, k) => `the number ${i + k}`).join(', '),
  }));
  await writeFile(join(folder, 'rows.jsonl'), rows.map((row) => `${JSON.stringify(row)}\n`).join(''));
  await collect(run({ output: join(folder, 'base'), tokenizer: { train: { vocabSize: 300 } }, steps: 5 }));
  await cacheTeacher(
    run({ kind: 'distill', output: 'none', teacher: { checkpoint: join(folder, 'base'), cache: join(folder, 'cache') } }),
    {
      topK: 8,
    },
  );
});
afterAll(() => rm(folder, { recursive: true, force: true }));

const cases: Readonly<Record<string, () => object>> = {
  'micro-batches, moments of 8 bits, recompute': () => ({
    ...{ batch: { sequences: 2, length: 20, accumulate: 2 }, recompute: true },
    optimizer: { learningRate: 1e-2, moments: '8bit' },
  }),
  'documents that see each other, a schedule of three parts': () => ({
    data: { text: join(folder, '*.txt'), validation: 0.2, isolate: false },
    schedule: { kind: 'wsd', warmupSteps: 2, decayFraction: 0.4 },
  }),
  'going on from a model': () => ({ from: join(folder, 'base'), model: undefined, tokenizer: undefined }),
  'a teacher and the text': () => ({
    kind: 'distill',
    distill: { divergence: { kind: 'jsd' }, temperature: 2, hardWeight: 0.3 },
  }),
  'a cached teacher': () => ({ kind: 'distill', teacher: { cache: join(folder, 'cache') } }),
  'noise on embeddings, all tokens learned': () => ({ kind: 'finetune', neftune: 5, mask: 'all' }),
  'rows that are padded': () => ({
    kind: 'finetune',
    data: { train: join(folder, 'rows.jsonl'), validation: 0.2, pack: false },
    promptWeight: 0.5,
  }),
  'an adapter with dropout, B faster': () => ({ kind: 'finetune', adapter: { rank: 3, dropout: 0.3, ratio: 8 } }),
  'an adapter of lengths and directions': () => ({ kind: 'finetune', adapter: { kind: 'dora', rank: 2, rankStabilized: true } }),
  'an adapter that begins with the weights, on a base of 8 bits': () => ({
    ...{ kind: 'finetune', adapter: { rank: 2, init: 'olora', targets: ['q_proj', 'down_proj'] }, base: 'q8' },
  }),
};

test.each(Object.entries(cases))('%s', async (name, changes) => {
  const at = (part: string) => join(folder, `${name} ${part}`);
  const whole = await collect(run({ ...changes(), output: at('whole') }));
  const first = await collect(run({ ...changes(), output: at('parts') }), new AbortController());
  expect(first.at(-1)).toMatchObject({ type: 'done', reason: 'aborted' });
  const second = await collect(run({ ...changes(), output: at('parts') }));
  expect(second[0]).toMatchObject({ type: 'start', resumedFrom: { step: figures(first).at(-1)!.step } });
  expect([...figures(first), ...figures(second)]).toEqual(figures(whole));
  expect(await checkpoint(at('parts'))).toEqual(await checkpoint(at('whole')));
});
