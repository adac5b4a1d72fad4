import { appendFile, mkdtemp, readdir, readFile, rm, truncate, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { openDataset } from '../../src/data/dataset.ts';
import { distill } from '../../src/distill/distill.ts';
import { openSafetensors } from '../../src/io/safetensors.ts';
import { generateText } from '../../src/models/completion.ts';
import { latestCheckpoint } from '../../src/models/folder.ts';
import { createModel, loadModel, modelConfig } from '../../src/models/model.ts';
import { linear } from '../../src/ops/linear.ts';
import { randomNormal_ } from '../../src/ops/random.ts';
import { scope } from '../../src/tensor/scope.ts';
import { empty, tensor } from '../../src/tensor/tensor.ts';
import { parseRunOf, type RunInput } from '../../src/train/config.ts';
import type { EvaluateEvent, StepEvent, TrainEvent } from '../../src/train/events.ts';
import { trainingLoop } from '../../src/train/loop.ts';
import { pretrain, textLoss } from '../../src/train/pretrain.ts';
import { datasetOptions } from '../../src/train/setup.ts';
import { writeCorpus } from '../corpus.ts';

let folder: string;
const small = {
  preset: 'gemma2-nano',
  width: 24,
  heads: 2,
  kvHeads: 1,
  headSize: 12,
  hidden: 48,
  window: 12,
  queryScalar: 12,
} as const;

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'limbeck-loop-'));
  await writeCorpus(folder, 16, 160);
});
afterAll(() => rm(folder, { recursive: true, force: true }));

function run(output: string, changes: object = {}): RunInput {
  return {
    kind: 'pretrain',
    output: join(folder, output),
    data: { text: join(folder, '*.txt'), validation: 0.2 },
    tokenizer: { train: { vocabSize: 300 } },
    model: small,
    batch: { sequences: 4, length: 24 },
    steps: 12,
    optimizer: { learningRate: 5e-3 },
    evaluate: { every: 6 },
    checkpoint: { every: 4, keep: 2 },
    ...changes,
  } as RunInput;
}

async function collect(events: AsyncIterable<TrainEvent>): Promise<TrainEvent[]> {
  const all: TrainEvent[] = [];
  for await (const event of events) all.push(event);
  return all;
}
const steps = (events: readonly TrainEvent[]): StepEvent[] => events.filter((e) => e.type === 'step');
const losses = (events: readonly TrainEvent[]): number[] => steps(events).map((e) => e.loss);
const tokenizer = (): string => join(folder, 'whole/tokenizer');

async function weights(output: string): Promise<Map<string, unknown>> {
  const file = await openSafetensors(join((await latestCheckpoint(join(folder, output)))!, 'model.safetensors'));
  const all = new Map<string, unknown>();
  for (const name of file.tensors.keys()) all.set(name, await file.read(name));
  await file.close();
  return all;
}

let whole: TrainEvent[];
beforeAll(async () => {
  whole = await collect(pretrain(run('whole')));
});

describe('pretraining', () => {
  test('tells what it does, in order, and learns', async () => {
    expect(whole.map((e) => e.type)).toEqual(
      ['start', 4, 'checkpoint', 2, 'evaluate', 2, 'checkpoint', 4, 'evaluate', 'checkpoint', 'done'].flatMap((e) =>
        typeof e === 'number' ? Array<string>(e).fill('step') : [e],
      ),
    );
    expect(steps(whole).map((e) => e.step)).toEqual(Array.from({ length: 12 }, (_, i) => i + 1));
    expect(losses(whole).at(-1)).toBeLessThan(losses(whole)[0]! - 0.5);
    const scored = whole.find((e): e is EvaluateEvent => e.type === 'evaluate')!;
    expect(scored.perplexity).toBeCloseTo(Math.exp(scored.loss), 6);
    expect(await readdir(join(folder, 'whole/checkpoints'))).toEqual(['step-00000008', 'step-00000012']);
  });

  test('resumes to the same bits', async () => {
    const controller = new AbortController();
    const first: TrainEvent[] = [];
    for await (const event of pretrain(run('parts', { tokenizer: tokenizer() }), { signal: controller.signal })) {
      first.push(event);
      if (event.type === 'step' && event.step === 6) controller.abort();
    }
    expect(first.at(-1)).toMatchObject({ type: 'done', reason: 'aborted' });
    const second = await collect(pretrain(run('parts', { tokenizer: tokenizer() })));
    expect(second[0]).toMatchObject({
      type: 'start',
      resumedFrom: { step: first.at(-1)!.type === 'done' ? steps(first).at(-1)!.step : 0 },
    });
    expect([...losses(first), ...losses(second)]).toEqual(losses(whole));
    expect(await weights('parts')).toEqual(await weights('whole'));
  });

  test('recompute takes the same steps', async () => {
    expect(losses(await collect(pretrain(run('recompute', { tokenizer: tokenizer(), recompute: true, steps: 4 }))))).toEqual(
      losses(await collect(pretrain(run('plain', { tokenizer: tokenizer(), steps: 4 })))),
    );
  });

  test('two micro-batches of two are one batch of four', async () => {
    const constant = { tokenizer: tokenizer(), steps: 3, schedule: { kind: 'constant' } };
    const one = losses(await collect(pretrain(run('four', constant))));
    const two = losses(
      await collect(pretrain(run('twice-two', { ...constant, batch: { sequences: 2, length: 24, accumulate: 2 } }))),
    );
    for (const [i, loss] of two.entries()) expect(loss).toBeCloseTo(one[i]!, 4);
  });

  test('a loss that is not finite stops the run and keeps the last good checkpoint', async () => {
    const wild = run('wild', {
      tokenizer: tokenizer(),
      model: { ...small, finalCap: null, attentionCap: null },
      optimizer: { learningRate: 1e37, clip: null },
      checkpoint: { every: 1 },
    });
    await expect(collect(pretrain(wild))).rejects.toMatchObject({ name: 'TrainingError', code: 'ERR_NOT_FINITE' });
    const { model } = await loadModel((await latestCheckpoint(join(folder, 'wild')))!);
    model.dispose();
  });

  test('what stops a step that is ahead comes out of the loop, however slowly events are taken', async () => {
    const parsed = parseRunOf('pretrain', run('ahead', { tokenizer: tokenizer() }));
    const { model, tokenizer: words } = await loadModel((await latestCheckpoint(join(folder, 'whole')))!, { trainable: true });
    const data = await openDataset(datasetOptions(parsed, words));
    const events = trainingLoop({
      ...{ run: parsed, model, tokenizer: words, data, resume: undefined, pinned: {} },
      loss(batch, { index }) {
        const { ids } = batch.input;
        const wrong = tensor(new Int32Array(ids.size).fill(1 << 20), ids.shape);
        return textLoss(model, index < 1 ? batch : { ...batch, input: { ...batch.input, ids: wrong } }, false);
      },
      evaluate: () => Promise.reject(new Error('comes later')),
    });
    const taken = (async () => {
      for await (const event of events) if (event.type === 'step') await new Promise((resolve) => setTimeout(resolve, 100));
    })();
    await expect(taken).rejects.toMatchObject({ name: 'DataError', code: 'ERR_TOKEN_RANGE' });
    model.dispose();
    await data.close();
  });

  test.each([2 ** 53 - 1, 1_800_000_000_000])('any seed will do: %d', async (seed) => {
    expect(steps(await collect(pretrain(run(`seed-${seed}`, { tokenizer: tokenizer(), steps: 1, seed }))))).toHaveLength(1);
  });

  test('a run that begins anew does not lose its checkpoints to those of the run before', async () => {
    const short = { tokenizer: tokenizer(), steps: 6, evaluate: { every: 6 } };
    await collect(pretrain(run('anew', { ...short, steps: 8 })));
    const events = await collect(pretrain(run('anew', { ...short, seed: 5, resume: false })));
    expect(events.at(-1)).toMatchObject({ type: 'done', reason: 'finished' });
    expect(await readdir(join(folder, 'anew/checkpoints'))).toEqual(['step-00000004', 'step-00000006']);
    expect(await readdir(join(folder, 'anew/checkpoints.old'))).toEqual(['step-00000004', 'step-00000008']);
    // Back to a checkpoint of its own, from which it goes another way.
    const back = join(folder, 'anew/checkpoints/step-00000004');
    const again = await collect(pretrain(run('anew', { ...short, steps: 5, seed: 5, resume: back })));
    expect(again[0]).toMatchObject({ type: 'start', resumedFrom: { step: 4, path: back } });
    expect(await readdir(join(folder, 'anew/checkpoints'))).toEqual(['step-00000004', 'step-00000005']);
    expect(await readdir(join(folder, 'anew/checkpoints.old'))).toEqual(['step-00000004', 'step-00000006', 'step-00000008']);
  });

  test('leaving the loop early frees everything', async () => {
    for await (const event of pretrain(run('left', { tokenizer: tokenizer() }))) if (event.type === 'step') break;
  });
});

test('a folder takes one run at a time', async () => {
  const shared = run('shared', { tokenizer: tokenizer() });
  const one = pretrain(shared);
  await one.next();
  await expect(pretrain(shared).next()).rejects.toMatchObject({ code: 'ERR_LOCKED' });
  await one.return();
  const again = pretrain(shared);
  expect((await again.next()).value).toMatchObject({ type: 'start' });
  await again.return();
});

describe('distillation', () => {
  const student = (output: string, changes: object = {}): RunInput =>
    ({
      ...run(output, changes),
      kind: 'distill',
      tokenizer: undefined,
      teacher: { checkpoint: join(folder, 'whole') },
    }) as RunInput;

  test('brings the student closer to the teacher', async () => {
    const events = await collect(distill(student('student', { steps: 30, evaluate: { every: 10 } })));
    const kl = events.filter((e): e is EvaluateEvent => e.type === 'evaluate').map((e) => e.kl!);
    expect(kl.at(-1)).toBeLessThan(kl[0]!);
    for (const e of steps(events)) expect(e.loss).toBeCloseTo(e.kl!, 5);
  });

  test('with hard labels the loss is the stated mixture', async () => {
    const mixed = { divergence: { kind: 'jsd', beta: 0.5 }, temperature: 2, hardWeight: 0.25 };
    for (const e of steps(await collect(distill(student('mixed', { steps: 2, distill: mixed }))))) {
      expect(e.loss).toBeCloseTo(0.75 * 4 * e.kl! + 0.25 * e.ce!, 4);
    }
  });

  test('a teacher of fp8 weights says nearly the same', async () => {
    const losses = async (output: string, changes: object) =>
      steps(await collect(distill({ ...student(output, { steps: 2 }), ...changes } as RunInput))).map((e) => e.loss);
    const [exact] = await losses('exact', {});
    const [rounded] = await losses('rounded', { teacher: { checkpoint: join(folder, 'whole'), weights: 'fp8' } });
    expect(rounded).not.toBe(exact);
    expect(Math.abs(rounded! / exact! - 1)).toBeLessThan(0.05);
  });

  test('another tokenizer or vocabulary is refused', async () => {
    await collect(pretrain(run('other', { steps: 1, tokenizer: { train: { vocabSize: 290 } } })));
    const foreign = { ...student('foreign'), tokenizer: join(folder, 'other/tokenizer') } as RunInput;
    await expect(collect(distill(foreign))).rejects.toMatchObject({ code: 'ERR_VOCABULARY', argument: 'tokenizer' });
    await expect(collect(distill(student('rows', { model: { ...small, vocabSize: 512 } })))).rejects.toMatchObject({
      code: 'ERR_VOCABULARY',
      argument: 'model.vocabSize',
    });
  });
});

describe('damaged checkpoints', () => {
  const copyOf = async (name: string): Promise<string> => {
    await collect(pretrain(run(name, { tokenizer: tokenizer(), steps: 2 })));
    return (await latestCheckpoint(join(folder, name)))!;
  };

  test('truncated, foreign and mixed files are refused by name', async () => {
    const checkpoint = await copyOf('damaged');
    const again = (): Promise<TrainEvent[]> => collect(pretrain(run('damaged', { tokenizer: tokenizer(), steps: 4 })));
    const file = join(checkpoint, 'optimizer.safetensors');
    await truncate(file, 1000);
    await expect(again()).rejects.toMatchObject({ name: 'FormatError' });
    await writeFile(join(checkpoint, 'state.json'), '{"format":1}');
    await expect(again()).rejects.toMatchObject({ name: 'FormatError', code: 'ERR_CHECKPOINT' });
    await appendFile(join(checkpoint, 'model.safetensors'), 'x');
    await expect(again()).rejects.toMatchObject({ name: 'FormatError' });
    await writeFile(join(checkpoint, 'config.json'), JSON.stringify({ model_type: 'bert' }));
    await expect(again()).rejects.toMatchObject({ name: 'FormatError', argument: 'model_type' });
  });

  test('a run that was changed is not resumed', async () => {
    await copyOf('changed');
    const changed = run('changed', { tokenizer: tokenizer(), steps: 4, batch: { sequences: 2, length: 24 } });
    await expect(collect(pretrain(changed))).rejects.toMatchObject({ code: 'ERR_RESUME', argument: 'batch' });
  });

  test('config.json says what Transformers expects', async () => {
    const config = JSON.parse(await readFile(join((await latestCheckpoint(join(folder, 'whole')))!, 'config.json'), 'utf8'));
    expect(config).toMatchObject({
      architectures: ['Gemma2ForCausalLM'],
      model_type: 'gemma2',
      sliding_window: 12,
      query_pre_attn_scalar: 12,
    });
  });
});

test('generation: the same seed gives the same text, temperature 0 needs none, an empty prompt begins', async () => {
  const { model, tokenizer: words } = await loadModel((await latestCheckpoint(join(folder, 'whole')))!);
  const text = async (prompt: string, options: object): Promise<string> => {
    let all = '';
    for await (const piece of generateText(model, words, prompt, { tokens: 12, ...options })) all += piece;
    return all;
  };
  expect(await text('the people', { seed: 3 })).toBe(await text('the people', { seed: 3 }));
  expect(await text('the people', { temperature: 0, seed: 1 })).toBe(await text('the people', { temperature: 0, seed: 2 }));
  expect(await text('the people', { topK: 1, seed: 4 })).toBe(await text('the people', { temperature: 0 }));
  expect((await text('', { topP: 0.5 })).length).toBeGreaterThan(0);
  await expect(text('the', { temperature: -1 })).rejects.toMatchObject({ code: 'ERR_CONFIG', argument: 'temperature' });
  model.dispose();
});

test('the event loop keeps ticking while the device computes', async () => {
  const [x, w] = [empty([2048, 1024]), empty([1024, 1024])];
  randomNormal_(x, 1, 0, 1);
  randomNormal_(w, 1, 1, 0.03);
  let ticks = 0;
  const timer = setInterval(() => ticks++, 2);
  const from = performance.now();
  const y = scope(() => {
    let h = x;
    for (let i = 0; i < 24; i++) h = scope(() => linear(h, w));
    return h;
  });
  const called = performance.now() - from;
  await y.read();
  const all = performance.now() - from;
  clearInterval(timer);
  expect(called).toBeLessThan(all / 4);
  expect(ticks).toBeGreaterThan(Math.min(20, all / 20));
  for (const t of [x, w, y]) t.dispose();
});

test('presets that do not exist are named, and a configuration is checked field by field', () => {
  expect(() => modelConfig('gemma9')).toThrow(expect.objectContaining({ code: 'ERR_CONFIG', argument: 'preset' }));
  const wrong =
    (changes: object): (() => unknown) =>
    () =>
      createModel({ ...modelConfig('gemma2-nano'), ...changes });
  expect(wrong({ window: 0 })).toThrow(expect.objectContaining({ argument: 'window' }));
  expect(wrong({ heads: 3, kvHeads: 2 })).toThrow(expect.objectContaining({ argument: 'kvHeads' }));
  expect(wrong({ headSize: 7 })).toThrow(expect.objectContaining({ argument: 'headSize' }));
});
