// What finds no room gives back all that it took, so that a program can go on with something smaller.
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, beforeEach, expect, test } from 'vitest';
import { createModel, modelConfig } from '../../src/models/model.ts';
import { createAdapter } from '../../src/nn/lora.ts';
import { init, memory, shutdown } from '../../src/tensor/engine.ts';
import { OutOfMemoryError } from '../../src/tensor/errors.ts';
import type { RunInput } from '../../src/train/config.ts';
import { createOptimizer, type Optimizer } from '../../src/train/optimizer.ts';
import { pretrain } from '../../src/train/pretrain.ts';
import { writeCorpus } from '../corpus.ts';

let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'limbeck-room-'));
  await writeCorpus(folder, 8, 120);
});
afterAll(() => rm(folder, { recursive: true, force: true }));

const preset = { preset: 'gemma2-nano', width: 64, hidden: 4096, vocabSize: 16_384 } as const;
const { preset: name, ...changes } = preset;
const config = modelConfig(name, changes);

type Made = { dispose(): void }[];
type Model = ReturnType<typeof createModel>;

/** A model with something made beside it. */
async function beside(model: Model, make: (model: Model) => Promise<{ dispose(): void }> | { dispose(): void }): Promise<Made> {
  try {
    return [await make(model), model];
  } catch (error) {
    model.dispose();
    throw error;
  }
}
const optimizer = ({ parameters }: Model, moments: 'f32' | '8bit'): Optimizer =>
  createOptimizer(parameters, { beta1: 0.9, beta2: 0.99, eps: 1e-8, weightDecay: 0, clip: 1, moments });
const frozen = { seed: 1, trainable: false } as const;

/** By MiB from one limit to the next. */
const cases: Readonly<Record<string, readonly [number, () => Promise<Made>]>> = {
  'a model and its optimizer': [6, () => beside(createModel(config, { seed: 1 }), (model) => optimizer(model, 'f32'))],
  'bf16 copies, moments of 8 bits': [
    4,
    () => beside(createModel(config, { seed: 1, dtype: 'bf16' }), (model) => optimizer(model, '8bit')),
  ],
  'a model of 4 bits': [2, async () => [createModel(config, { ...frozen, weights: 'q4' })]],
  'an adapter that begins with the weights': [
    4,
    () => beside(createModel(config, frozen), (model) => createAdapter(model, { rank: 32, init: 'olora' })),
  ],
  'an adapter of lengths and directions': [
    2,
    () => beside(createModel(config, frozen), (model) => createAdapter(model, { rank: 32, kind: 'dora' })),
  ],
  'a run': [
    10,
    async () => {
      const run = {
        ...{ kind: 'pretrain', output: join(folder, 'run'), data: { text: join(folder, '*.txt') }, resume: false, steps: 2 },
        ...{ tokenizer: { train: { vocabSize: 300 } }, model: preset, batch: { sequences: 8, length: 128, accumulate: 2 } },
      } as RunInput;
      for await (const event of pretrain(run)) if (event.type === 'step') break;
      return [];
    },
  ],
};

// Each begins with an engine of its own.
beforeEach(() => shutdown());

test.each(Object.entries(cases))('%s', async (_, [more, make]) => {
  let refused = 0;
  for (let limit = 2 << 20; ; limit += more << 20) {
    shutdown();
    init({ memoryLimit: limit, threads: 1 });
    try {
      for (const one of await make()) one.dispose();
      break;
    } catch (error) {
      if (!(error instanceof OutOfMemoryError)) throw error;
      refused++;
    }
    expect(memory().tensors, `after ${limit >> 20} MiB were not enough`).toBe(0);
  }
  expect(memory().tensors).toBe(0);
  expect(refused).toBeGreaterThan(1);
  shutdown();
});
