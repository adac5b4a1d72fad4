// Gemma 2 on a GPU against Gemma 2 on the CPU: the same weights, bf16 against float32; and whole runs.
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { distill } from '../../src/distill/distill.ts';
import { cacheTeacher } from '../../src/distill/teach.ts';
import { generate } from '../../src/models/completion.ts';
import { createModel, type LanguageModel, modelConfig } from '../../src/models/model.ts';
import { linearCrossEntropy } from '../../src/ops/loss.ts';
import { reshape } from '../../src/ops/reshape.ts';
import { type Device, shutdown, withDevice } from '../../src/tensor/engine.ts';
import { graph } from '../../src/tensor/graph.ts';
import { scope } from '../../src/tensor/scope.ts';
import { valueAndGrad } from '../../src/tensor/tape.ts';
import { tensor } from '../../src/tensor/tensor.ts';
import type { RunInput } from '../../src/train/config.ts';
import type { StepEvent, TrainEvent } from '../../src/train/events.ts';
import { finetune } from '../../src/train/finetune.ts';
import { createOptimizer } from '../../src/train/optimizer.ts';
import { pretrain } from '../../src/train/pretrain.ts';
import { writeCorpus } from '../corpus.ts';

const T = 40;
const config = modelConfig('gemma2-nano', {
  vocabSize: 96,
  width: 64,
  layers: 2,
  heads: 2,
  kvHeads: 1,
  headSize: 64,
  hidden: 96,
  window: 16,
  queryScalar: 64,
});
const ids = Int32Array.from({ length: 2 * T }, (_, i) => (i * i * 7 + 3 * i) % 96);

afterAll(shutdown);

function batch() {
  return {
    input: {
      ids: tensor(ids, [2, T]),
      positions: tensor(
        ids.map((_, i) => i % T),
        [2, T],
      ),
      starts: tensor(
        ids.map((_, i) => (i % T < 11 ? 0 : 11)),
        [2, T],
      ),
    },
    targets: tensor(ids.map((_, i) => ids[(i + 1) % ids.length]!)),
    weights: tensor(new Float32Array(ids.length).fill(1 / ids.length)),
  };
}

function lossOf(model: LanguageModel, { input, targets, weights }: ReturnType<typeof batch>, recompute = false) {
  const hidden = reshape(model.hidden(input, { recompute }), [-1, config.width]);
  return linearCrossEntropy(hidden, model.head, targets, { weights, cap: config.finalCap }).total;
}

async function lossAndGradients(device: Device, recompute: boolean) {
  const model = withDevice(device, () => createModel(config, { seed: 5 }));
  const loss = withDevice(device, () => scope(() => valueAndGrad(() => lossOf(model, batch(), recompute))));
  const value = await loss.item();
  const gradients = new Map<string, Float32Array>();
  for (const { name, tensor: t } of model.parameters.list) gradients.set(name, (await t.grad!.read()) as Float32Array);
  loss.dispose();
  model.dispose();
  return { value, gradients };
}

const norm = (x: Float32Array): number => Math.sqrt(x.reduce((s, v) => s + v * v, 0));

test('loss and every gradient follow the CPU’s', async () => {
  const expected = await lossAndGradients('cpu', false);
  const actual = await lossAndGradients('cuda', false);
  expect(Math.abs(actual.value - expected.value)).toBeLessThan(0.01);
  for (const [name, g] of expected.gradients) {
    const off = norm(actual.gradients.get(name)!.map((v, i) => v - g[i]!)) / norm(g);
    // bf16 keeps 8 bits: 0.4 % an op, some thirty ops in a row.
    expect(off, name).toBeLessThan(0.05);
  }
  const again = await lossAndGradients('cuda', true);
  expect(again.value).toBe(actual.value);
  for (const [name, g] of actual.gradients) expect(again.gradients.get(name), `${name}, recomputed`).toEqual(g);
});

test('a step as a graph takes the same steps', async () => {
  const steps = 3;
  const options = { beta1: 0.9, beta2: 0.95, eps: 1e-8, weightDecay: 0.1, clip: 1 };
  const direct: number[] = [];
  {
    const model = createModel(config, { seed: 5 });
    const optimizer = createOptimizer(model.parameters, options);
    const b = batch();
    for (let i = 0; i < steps; i++) {
      const loss = scope(() => valueAndGrad(() => lossOf(model, b)));
      optimizer.step(1e-2).dispose();
      direct.push(await loss.item());
      loss.dispose();
    }
    for (const t of [...Object.values(b.input), b.targets, b.weights]) t.dispose();
    optimizer.dispose();
    model.dispose();
  }
  const model = createModel(config, { seed: 5 });
  const b = batch();
  const step = graph(() => valueAndGrad(() => lossOf(model, b)));
  const replayed: number[] = [];
  step.replay();
  replayed.push(await step.result.item());
  expect(replayed[0]).toBe(direct[0]);
  step.replay();
  expect(await step.result.item()).toBe(direct[0]);
  expect(direct.at(-1)).toBeLessThan(direct[0]!);
  step.result.dispose();
  step.dispose();
  for (const t of [...Object.values(b.input), b.targets, b.weights]) t.dispose();
  model.dispose();
});

let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'limbeck-cuda-'));
  await writeCorpus(folder, 8, 120);
});
afterAll(() => rm(folder, { recursive: true, force: true }));

const small = {
  preset: 'gemma2-nano',
  width: 32,
  layers: 1,
  heads: 2,
  kvHeads: 1,
  headSize: 64,
  hidden: 48,
  window: 12,
  queryScalar: 64,
} as const;

async function losses(events: ReturnType<typeof pretrain>): Promise<number[]> {
  const all: number[] = [];
  for await (const event of events) if (event.type === 'step') all.push((event as StepEvent).loss);
  return all;
}

test('the loops run unchanged: a teacher, a student, a resumed run to the same bits', async () => {
  const base = {
    device: 'cuda',
    data: { text: join(folder, '*.txt'), validation: 0.2 },
    model: small,
    batch: { sequences: 2, length: 20 },
    optimizer: { learningRate: 1e-2 },
    evaluate: { every: 100, batches: 1 },
    checkpoint: { every: 3, keep: 3 },
    log: { tensorboard: false, report: false },
  };
  const teacher = (output: string, steps: number, tokenizer: unknown = { train: { vocabSize: 280 } }): RunInput =>
    ({ kind: 'pretrain', ...base, output: join(folder, output), tokenizer, steps }) as RunInput;
  const whole = await losses(pretrain(teacher('teacher', 6)));
  expect(whole.at(-1)).toBeLessThan(whole[0]!);
  const schedule = { kind: 'constant' };
  const tokenizer = join(folder, 'teacher/tokenizer');
  const straight = await losses(pretrain({ ...teacher('straight', 6, tokenizer), schedule } as RunInput));
  const first = await losses(pretrain({ ...teacher('parts', 3, tokenizer), schedule } as RunInput));
  const second = await losses(pretrain({ ...teacher('parts', 6, tokenizer), schedule } as RunInput));
  expect([...first, ...second]).toEqual(straight);

  const student = {
    kind: 'distill',
    ...base,
    output: join(folder, 'student'),
    teacher: { checkpoint: join(folder, 'teacher') },
    optimizer: { learningRate: 1e-2, moments: '8bit', master: false },
    recompute: true,
    steps: 4,
  } as RunInput;
  const learned = await losses(distill(student));
  expect(learned).toHaveLength(4);
  expect(learned.at(-1)).toBeLessThan(learned[0]!);

  // Without the teacher: what it found likely, in rows of whole segments.
  const cached = {
    ...student,
    output: join(folder, 'taught'),
    teacher: { checkpoint: join(folder, 'teacher'), cache: join(folder, 'cache') },
  };
  await cacheTeacher(cached as RunInput, { topK: 16 });
  const taught = await losses(distill(cached as RunInput));
  expect(taught[0]).toBeGreaterThan(0);
  expect(taught[0]).toBeLessThan(1.2 * learned[0]!);
  expect(taught.at(-1)).toBeLessThan(taught[0]!);
});

test('finetuning with an adapter beside weights of 4 bits, and its answers', async () => {
  const rows = Array.from({ length: 12 }, (_, i) => ({ instruction: `${i} and 1?`, output: `It is ${i + 1}.` }));
  await writeFile(join(folder, 'rows.json'), JSON.stringify(rows));
  const events: TrainEvent[] = [];
  const run = {
    kind: 'finetune',
    device: 'cuda',
    output: join(folder, 'adapted'),
    model: join(folder, 'teacher'),
    data: { train: join(folder, 'rows.json'), validation: { documents: 2 } },
    template: 'plain',
    batch: { sequences: 2, length: 48 },
    steps: 3,
    optimizer: { learningRate: 1e-2 },
    adapter: { rank: 4 },
    base: 'q4',
    checkpoint: { every: 3 },
    responses: { samples: 0, examples: 2, tokens: 5 },
    log: { tensorboard: false, report: false },
  };
  for await (const event of finetune(run as RunInput)) events.push(event);
  const scores = events.flatMap((event) => (event.type === 'evaluate' ? [event.loss] : []));
  expect(scores.at(-1)).toBeLessThan(scores[0]!);
  const answers = events.find((event) => event.type === 'responses');
  expect(answers).toBeDefined();
  const texts: string[] = [];
  for await (const piece of generate({ checkpoint: run.output, prompt: '3 and 1?', device: 'cuda', temperature: 0, tokens: 5 }))
    texts.push(piece);
  expect(texts.join('').length).toBeGreaterThan(0);
});
