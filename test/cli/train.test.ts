// The commands as a user runs them, on a run that takes a second: train, stop, go on, distil, score, write.

import { mkdir, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import type { TrainEvent } from '../../src/train/events.ts';
import { limbeck } from './process.ts';

let folder: string;
let teacher: string;

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'limbeck-train-'));
  await mkdir(join(folder, 'corpus'));
  const nouns = ['the Senate', 'the people', 'our country', 'the Union', 'this Government', 'every citizen'];
  const verbs = ['has served', 'will defend', 'must preserve', 'shall honour', 'does cherish'];
  let state = 1;
  const pick = (list: readonly string[]) => {
    state = (state * 48271) % 2147483647;
    return list[state % list.length]!;
  };
  for (let i = 0; i < 24; i++) {
    const sentences = Array.from({ length: 30 }, () => `${pick(nouns)} ${pick(verbs)} ${pick(nouns)}.`);
    await writeFile(join(folder, `corpus/${i}.txt`), sentences.join(' '));
  }
  await writeFile(join(folder, 'held-out.txt'), 'the Senate has served the people. every citizen must preserve our country.');
  teacher = join(folder, 'teacher.json');
  await writeFile(
    teacher,
    JSON.stringify({
      kind: 'pretrain',
      name: 'teacher',
      output: 'teacher',
      data: { text: 'corpus/*.txt', validation: 0.1 },
      tokenizer: { train: { vocabSize: 320 } },
      model: { preset: 'gemma2-nano', width: 32, heads: 2, kvHeads: 1, headSize: 16, hidden: 64, window: 16, queryScalar: 16 },
      batch: { sequences: 4, length: 32 },
      steps: 40,
      optimizer: { learningRate: 3e-3 },
      evaluate: { every: 20, samples: { prompts: ['the Senate'], tokens: 8, temperature: 0 } },
      checkpoint: { every: 10, keep: 2 },
    }),
  );
});
afterAll(() => rm(folder, { recursive: true, force: true }));

const events = (out: string): TrainEvent[] =>
  out
    .trim()
    .split('\n')
    .map((line) => JSON.parse(line));

test('pretrain: progress, files, checkpoints and a report', async () => {
  const { code, out, err } = await limbeck(['pretrain', teacher]);
  expect([code, out]).toEqual([0, '']);
  expect(err).toMatch(/pretrain teacher: [\d.]+ k parameters, 40 steps, 5,120 tokens, cpu with \d+ thread/);
  expect(err).toMatch(/step 40\/40 {2}loss \d/);
  expect(err).toMatch(/step 40 {2}validation loss \d\.\d{4}, perplexity/);
  expect(err).toMatch(/finished at step 40: 5,120 tokens in /);
  expect((await readdir(join(folder, 'teacher'))).sort()).toEqual(
    expect.arrayContaining(['checkpoints', 'metrics.jsonl', 'report.html', 'run.json']),
  );
  expect(await readdir(join(folder, 'teacher/checkpoints'))).toHaveLength(2);
  const losses = events(await readFile(join(folder, 'teacher/metrics.jsonl'), 'utf8')).flatMap((event) =>
    event.type === 'step' ? [event.loss] : [],
  );
  expect(losses).toHaveLength(40);
  expect(losses.at(-1)!).toBeLessThan(losses[0]! - 0.5);
  expect(await readFile(join(folder, 'teacher/report.html'), 'utf8')).toContain('<h2>Samples</h2>');
});

test('Ctrl-C stops at a step and saves; the same command goes on and ends where an uninterrupted run ends', async () => {
  let stopped = false;
  const args = ['pretrain', teacher, '--set', 'output=again', '--json'];
  const first = await limbeck(args, (child, out) => {
    if (!stopped && /"type":"step","step":5,/.test(out)) {
      stopped = true;
      child.kill('SIGINT');
    }
  });
  expect(first.code).toBe(130);
  const done = events(first.out).at(-1)!;
  expect(done).toMatchObject({ type: 'done', reason: 'aborted', checkpoint: expect.stringContaining('again') });
  expect(first.err).toContain('SIGINT: stopping after this step, and saving');
  const second = await limbeck(args);
  expect(second.code).toBe(0);
  const start = events(second.out)[0]!;
  expect(start).toMatchObject({ type: 'start', resumedFrom: { step: done.type === 'done' ? done.step : -1 } });
  const step = (text: string) => events(text).filter((event) => event.type === 'step');
  const whole = step(await readFile(join(folder, 'teacher/metrics.jsonl'), 'utf8'));
  const pieces = step(await readFile(join(folder, 'again/metrics.jsonl'), 'utf8'));
  expect(pieces.map((event) => [event.step, event.loss])).toEqual(whole.map((event) => [event.step, event.loss]));
});

test('Ctrl-C twice ends at once, and what was saved stays good', async () => {
  let interrupts = 0;
  const args = ['pretrain', teacher, '--set', 'output=twice', '--set', 'steps=100000', '--json'];
  const { code } = await limbeck(args, (child, out) => {
    if (interrupts === 0 && /"type":"checkpoint"/.test(out)) {
      interrupts = 1;
      child.kill('SIGINT');
      setTimeout(() => child.kill('SIGINT'), 1);
    }
  });
  expect(code).toBe(130);
  const { code: scored } = await limbeck([
    'evaluate',
    join(folder, 'twice'),
    '--text',
    join(folder, 'held-out.txt'),
    '--length',
    '32',
  ]);
  expect(scored).toBe(0);
});

test('distill, evaluate against the teacher, generate', async () => {
  const student = join(folder, 'student.ts');
  await writeFile(
    student,
    `import teacher from './teacher.json' with { type: 'json' };
const { tokenizer, ...rest } = teacher;
export default { ...rest, kind: 'distill', name: 'student', output: 'student', steps: 20, teacher: { checkpoint: 'teacher' } };`,
  );
  const { code, out } = await limbeck(['distill', student, '--json', '--set', 'model.hidden=32']);
  expect(code).toBe(0);
  const all = events(out);
  expect(all[0]).toMatchObject({ type: 'start', kind: 'distill', teacherParameters: expect.any(Number) });
  const kl = all.flatMap((event) => (event.type === 'step' ? [event.kl!] : []));
  expect(kl).toHaveLength(20);
  expect(kl.at(-1)!).toBeLessThan(kl[0]!);
  expect(all.at(-1)).toMatchObject({
    type: 'done',
    reason: 'finished',
    evaluation: { kl: expect.any(Number), agreement: expect.any(Number) },
  });

  const text = ['--text', join(folder, 'held-out.txt'), '--length', '32'];
  const scores = await limbeck(['evaluate', join(folder, 'student'), '--teacher', join(folder, 'teacher'), ...text, '--json']);
  expect(scores.code).toBe(0);
  const score = JSON.parse(scores.out);
  expect(score.perplexity).toBeCloseTo(Math.exp(score.loss), 9);
  expect(score.kl).toBeGreaterThan(0);

  const generated = await limbeck([
    'generate',
    join(folder, 'student'),
    '--prompt',
    'the Senate',
    '--tokens',
    '12',
    '--temperature',
    '0',
  ]);
  expect([generated.code, generated.err]).toEqual([0, '']);
  expect(generated.out).toMatch(/^the Senate.+\n$/s);
});

test('what cannot work is told with its code', async () => {
  const other = await limbeck(['pretrain', teacher, '--set', 'model.hidden=48']);
  expect([other.code, other.err]).toEqual([1, expect.stringContaining('was made with another model than this run has')]);
  const none = await limbeck(['generate', join(folder, 'nothing'), '--prompt', 'x']);
  expect([none.code, none.err]).toEqual([1, expect.stringContaining('error ERR_CHECKPOINT: ')]);
  const empty = await limbeck(['pretrain', teacher, '--set', 'data.text=nowhere/*.txt', '--set', 'output=none']);
  expect([empty.code, empty.err]).toEqual([1, expect.stringMatching(/^error ERR_\w+: .*nowhere/m)]);
});

test('finetune: a run file, its progress and answers', async () => {
  const rows = Array.from({ length: 12 }, (_, i) => ({ prompt: `the Senate ${i}`, completion: 'the people' }));
  await writeFile(join(folder, 'rows.jsonl'), [...rows, { prompt: 'x' }].map((row) => JSON.stringify(row)).join('\n'));
  const file = join(folder, 'chat.json');
  const run = {
    kind: 'finetune',
    name: 'chat',
    output: 'chat',
    model: 'teacher',
    data: { train: 'rows.jsonl', validation: 0.25 },
    template: 'chatml',
    batch: { sequences: 2, length: 128 },
    epochs: 1,
    responses: { samples: 1, examples: 2, tokens: 4 },
  };
  await writeFile(file, JSON.stringify(run));
  const { code, err } = await limbeck(['finetune', file]);
  expect([code, err]).toEqual([0, expect.stringMatching(/finetune chat: [\d.]+ k parameters, \d+ steps?/)]);
  expect(err).toMatch(/warning WARN_MALFORMED: 1 malformed .*rows\.jsonl:13: field "completion" is missing/);
  expect(err).toMatch(/step \d+ {2}2 answers in .*responses\.jsonl/);
  expect((await readFile(join(folder, 'chat/responses.jsonl'), 'utf8')).trim().split('\n')).toHaveLength(2);
  const wrong = await limbeck(['finetune', file, '--set', 'mask=answers']);
  expect([wrong.code, wrong.err]).toEqual([1, expect.stringContaining('mask is "answers"; it must be one of')]);
});
