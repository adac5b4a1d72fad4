// The plan against what runs really take, and what it says of runs that no machine here could hold.
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { distill } from '../../src/distill/distill.ts';
import { latestCheckpoint } from '../../src/models/folder.ts';
import { loadModel } from '../../src/models/model.ts';
import { withAdvice } from '../../src/plan/advice.ts';
import { plan } from '../../src/plan/plan.ts';
import { currentDevice, init, memory, shutdown } from '../../src/tensor/engine.ts';
import { ConfigError, OutOfMemoryError } from '../../src/tensor/errors.ts';
import { parseRun, type RunInput } from '../../src/train/config.ts';
import type { TrainEvent } from '../../src/train/events.ts';
import { finetune } from '../../src/train/finetune.ts';
import { pretrain } from '../../src/train/pretrain.ts';
import { writeCorpus } from '../corpus.ts';

let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'limbeck-plan-'));
  await writeCorpus(folder, 16, 400);
});
afterAll(() => rm(folder, { recursive: true, force: true }));

const base = (output: string) => ({
  output: join(folder, output),
  data: { text: join(folder, '*.txt'), validation: 0.2 },
  evaluate: { every: 100, batches: 1 },
  log: { tensorboard: false, report: false },
  steps: 4,
});
const teacherRun = (changes: object = {}): RunInput =>
  ({
    kind: 'pretrain',
    ...base('teacher'),
    tokenizer: { train: { vocabSize: 300 } },
    model: { preset: 'gemma2-nano', width: 64, hidden: 256, vocabSize: 2048 },
    batch: { sequences: 4, length: 128 },
    ...changes,
  }) as RunInput;

async function peakOf(events: AsyncIterable<TrainEvent>): Promise<number> {
  let peak = 0;
  for await (const event of events) if (event.type === 'step') peak = Math.max(peak, event.memory.peak);
  return peak;
}

test.each([
  ['plain', {}],
  ['accumulated', { batch: { sequences: 2, length: 96, accumulate: 3 } }],
  ['recomputed', { recompute: true }],
  ['with small moments', { optimizer: { moments: '8bit' } }],
])('a pretraining run, %s, takes what its plan says', async (name, changes) => {
  const run = teacherRun({ ...changes, output: join(folder, name) });
  const planned = await plan(run);
  const peak = await peakOf(pretrain(run));
  expect(planned.memory.total / peak).toBeGreaterThan(0.9);
  expect(planned.memory.total / peak).toBeLessThan(1.1);
  expect(planned.fits).toBe(true);
  expect(planned.advice).toEqual([]);
});

test.each([
  ['f32', {}],
  ['q4', { base: 'q4' }],
])('finetuning an adapter on a base of %s takes what its plan says, and less than the model', async (name, changes) => {
  const output = join(folder, `base-${name}`);
  for await (const _ of pretrain(teacherRun({ output, steps: 1 }))) {
    // only its checkpoint is needed
  }
  const rows = Array.from({ length: 40 }, (_, i) => ({ instruction: `What is ${i}?`, output: 'a number '.repeat(12) }));
  await writeFile(join(folder, 'rows.json'), JSON.stringify(rows));
  const run = {
    kind: 'finetune',
    output: join(folder, `adapter-${name}`),
    model: output,
    data: { train: join(folder, 'rows.json') },
    template: 'plain',
    adapter: { rank: 4 },
    batch: { sequences: 2, length: 128 },
    steps: 4,
    evaluate: { every: 100, batches: 1, first: false },
    responses: { samples: 0, examples: 0 },
    log: { tensorboard: false, report: false },
    ...changes,
  } as RunInput;
  const [planned, whole] = [await plan(run), await plan({ ...run, adapter: undefined, base: undefined } as RunInput)];
  const peak = await peakOf(finetune(run));
  expect(planned.memory.total / peak).toBeGreaterThan(0.9);
  expect(planned.memory.total / peak).toBeLessThan(1.1);
  expect(planned.memory.optimizer).toBeLessThan(whole.memory.optimizer / 4);
  if (name === 'q4') expect(planned.memory.student).toBeLessThan(0.8 * whole.memory.student);
});

test('a distillation takes what its plan says, part by part', async () => {
  await peakOf(pretrain(teacherRun()));
  const run = {
    kind: 'distill',
    ...base('student'),
    teacher: { checkpoint: join(folder, 'teacher') },
    model: { preset: 'gemma2-nano', width: 32, hidden: 64, vocabSize: 2048 },
    batch: { sequences: 4, length: 128 },
  } as RunInput;
  const planned = await plan(run);
  const peak = await peakOf(distill(run));
  expect(planned.memory.total / peak).toBeGreaterThan(0.9);
  expect(planned.memory.total / peak).toBeLessThan(1.1);
  const { total, ...parts } = planned.memory;
  expect(Object.values(parts).reduce((a, b) => a + b, 0)).toBe(total);
  expect(parts.teacher).toBeGreaterThanOrEqual(4 * planned.parameters.teacher!);
  expect(parts.teacher).toBeLessThan(4.2 * planned.parameters.teacher!);
  expect(planned.step.tokens).toBe(512);
  expect(planned.step.seconds).toBeGreaterThan(0);
  expect(planned.step.ops[0]!.seconds).toBeGreaterThanOrEqual(planned.step.ops.at(-1)!.seconds);
});

test('27B to 2B on one GPU: nothing is allocated, and the advice makes it fit', async () => {
  const run = {
    kind: 'distill',
    ...base('big'),
    device: 'cuda',
    tokenizer: join(folder, 'none'),
    teacher: { checkpoint: join(folder, 'none') },
    model: 'gemma2-2b',
    batch: { sequences: 4, length: 4096 },
  } as RunInput;
  const before = { rss: process.memoryUsage.rss(), live: memory('cpu').live };
  const planned = await plan(run, { device: 'h100', teacher: 'gemma2-27b' });
  expect(process.memoryUsage.rss() - before.rss).toBeLessThan(500e6);
  expect(memory('cpu').live).toBe(before.live);
  expect(currentDevice()).toBe('cpu');
  const GB = 1e9;
  // bf16 weights; float32 originals and moments of the student.
  expect(planned.memory.teacher / GB).toBeCloseTo((2 * planned.parameters.teacher!) / GB, 0);
  expect(planned.memory.student / GB).toBeCloseTo((6 * planned.parameters.student) / GB, 0);
  expect(planned.memory.optimizer / GB).toBeCloseTo((8 * planned.parameters.student) / GB, 0);
  expect(planned.fits).toBe(false);
  expect(planned.advice.length).toBeGreaterThan(3);
  for (const { total } of planned.advice) expect(total).toBeLessThan(planned.memory.total);
  expect(planned.advice.at(-1)).toMatchObject({ change: 'all of these', fits: true });
  // 6 N operations a token for the student, 2 N for the teacher, at 989 TFLOP/s: no step can be faster.
  const tokens = 4 * 4096;
  const least = (tokens * (6 * 2.0e9 + 2 * 26e9)) / 989e12;
  expect(planned.step.seconds).toBeGreaterThan(least);
  expect(planned.step.seconds).toBeLessThan(2 * least);
});

test('a student of 9B whose moments have more elements than an array can', async () => {
  const run = {
    ...{ kind: 'pretrain', output: 'x', data: { text: 'x' }, tokenizer: { train: { vocabSize: 256_000 } }, model: 'gemma2-9b' },
    ...{ device: 'cuda', steps: 1, batch: { sequences: 1, length: 64 }, optimizer: { moments: '8bit', master: false } },
  } as RunInput;
  const { memory, fits } = await plan(run, { device: 'h200' });
  expect(fits).toBe(true);
  expect(memory.optimizer).toBeGreaterThan(2 * 9.2e9);
});

test('an unknown device is refused with those that are known', async () => {
  await expect(plan(teacherRun(), { device: 'abacus' })).rejects.toThrow(ConfigError);
  await expect(plan(teacherRun(), { device: 'abacus' })).rejects.toThrow(/h100/);
});

test('a run that finds no room says what would make it fit, and leaves the last checkpoint as it was', async () => {
  const output = join(folder, 'narrow');
  const changes = { output, checkpoint: { every: 2, keep: 2 }, steps: 2 };
  await peakOf(pretrain(teacherRun(changes)));
  const run = teacherRun({ ...changes, steps: 6, batch: { sequences: 16, length: 128 }, resume: false });
  const { total } = (await plan(run)).memory;
  shutdown();
  init({ memoryLimit: Math.floor(0.7 * total) });
  const failure = await peakOf(pretrain(run)).catch((error: unknown) => error);
  expect(failure).toBeInstanceOf(OutOfMemoryError);
  const advised = await withAdvice(failure as OutOfMemoryError, parseRun(run));
  expect(advised.message).toMatch(/no room for .*\n.*The run takes .*\n.*\(fits\): micro-batches of 8 instead of 16 sequences/s);
  expect(advised.code).toBe('ERR_OUT_OF_MEMORY');
  shutdown();
  const { model } = await loadModel((await latestCheckpoint(output))!);
  expect(model.parameters.count).toBeGreaterThan(0);
  model.dispose();
});
