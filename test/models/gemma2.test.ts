import { readFile } from 'node:fs/promises';
import { afterEach, describe, expect, test } from 'vitest';
import { openSafetensors } from '../../src/io/safetensors.ts';
import { type DecoderConfig, decoderSpec } from '../../src/models/decoder.ts';
import { createModel, type LanguageModel, loadWeights } from '../../src/models/model.ts';
import { presets } from '../../src/models/presets.ts';
import { countParameters } from '../../src/nn/parameters.ts';
import { softcap } from '../../src/ops/elementwise.ts';
import { linear } from '../../src/ops/linear.ts';
import { linearCrossEntropy } from '../../src/ops/loss.ts';
import { reshape } from '../../src/ops/reshape.ts';
import { init, memory, shutdown } from '../../src/tensor/engine.ts';
import { scope } from '../../src/tensor/scope.ts';
import { noGrad, valueAndGrad } from '../../src/tensor/tape.ts';
import { readAs, type Tensor, tensor, write } from '../../src/tensor/tensor.ts';
import { createOptimizer } from '../../src/train/optimizer.ts';

const folder = new URL('../golden/gemma2/', import.meta.url).pathname;

async function expected(): Promise<Map<string, { shape: readonly number[]; data: Float32Array }>> {
  const file = await openSafetensors(`${folder}expected.safetensors`);
  const all = new Map<string, { shape: readonly number[]; data: Float32Array }>();
  for (const [name, { shape }] of file.tensors) all.set(name, { shape, data: Float32Array.from(await file.read(name), Number) });
  await file.close();
  return all;
}

/** Logits [B T V] of ids [B T]. */
function logits(
  model: LanguageModel,
  ids: Int32Array,
  shape: readonly number[],
  positions?: Int32Array,
  starts?: Int32Array,
): Tensor {
  const [b = 1, t = 1] = shape;
  const place = positions ?? Int32Array.from(ids, (_, i) => i % t);
  return scope(() =>
    noGrad(() => {
      const input = {
        ids: tensor(ids, shape),
        positions: tensor(place, shape),
        ...(starts === undefined ? {} : { starts: tensor(starts, shape) }),
      };
      const z = linear(model.hidden(input), model.head);
      return reshape(model.config.finalCap === null ? z : softcap(z, model.config.finalCap), [b, t, -1]);
    }),
  );
}

function largest(a: ArrayLike<number>, b: ArrayLike<number>): number {
  let most = 0;
  for (let i = 0; i < a.length; i++) most = Math.max(most, Math.abs(a[i]! - b[i]!));
  return most;
}

/** |a - b| / |b| in the Euclidean norm. */
function relative(a: ArrayLike<number>, b: ArrayLike<number>): number {
  let difference = 0;
  let norm = 0;
  for (let i = 0; i < a.length; i++) {
    difference += (a[i]! - b[i]!) ** 2;
    norm += b[i]! ** 2;
  }
  return Math.sqrt(difference / norm);
}

/** Mean next-token cross-entropy of ids [B T]. */
function meanLoss(model: LanguageModel, ids: Int32Array, shape: readonly number[], recompute = false): Tensor {
  const [b = 1, t = 1] = shape;
  const last = (i: number): boolean => i % t === t - 1;
  const targets = ids.map((_, i) => (last(i) ? -100 : ids[i + 1]!));
  const weights = Float32Array.from(ids, (_, i) => (last(i) ? 0 : 1 / (b * (t - 1))));
  const input = {
    ids: tensor(ids, shape),
    positions: tensor(
      Int32Array.from(ids, (_, i) => i % t),
      shape,
    ),
  };
  const hidden = model.hidden(input, { recompute });
  return linearCrossEntropy(reshape(hidden, [-1, model.config.width]), model.head, tensor(targets), {
    weights: tensor(weights),
    cap: model.config.finalCap,
  }).total;
}

describe('parameter counts are those of the report', () => {
  test.each([
    ['gemma2-2b', 590_118_912, 2_024_517_888],
    ['gemma2-9b', 917_962_752, 8_324_201_984],
    ['gemma2-27b', 1_180_237_824, 26_047_480_320],
  ] as const)('%s: %d + %d', (name, embedding, rest) => {
    const spec = decoderSpec(presets[name]);
    expect(countParameters(spec.embed)).toBe(embedding);
    expect(countParameters(spec)).toBe(embedding + rest);
  });
});

describe('against Transformers, float32', () => {
  afterEach(() => expect(memory().tensors).toBe(0));

  test('logits within 1e-4', async () => {
    const want = await expected();
    const model = await loadWeights(folder);
    const ids = want.get('input_ids')!;
    const z = logits(model, Int32Array.from(ids.data), ids.shape);
    expect(largest(await readAs(z, 'f32'), want.get('logits')!.data)).toBeLessThan(1e-4);
    z.dispose();
    model.dispose();
  });

  test('two documents in one row equal two rows', async () => {
    const want = await expected();
    const model = await loadWeights(folder);
    const ids = want.get('packed.input_ids')!;
    const positions = Int32Array.from(want.get('packed.position_ids')!.data);
    const starts = positions.map((p, i) => i - p);
    const z = logits(model, Int32Array.from(ids.data), ids.shape, positions, starts);
    expect(largest(await readAs(z, 'f32'), want.get('packed.logits')!.data)).toBeLessThan(1e-4);
    z.dispose();
    model.dispose();
  });

  test('loss within 1e-5 and every gradient within 1e-4 of its norm', async () => {
    const want = await expected();
    const model = await loadWeights(folder, { trainable: true });
    const ids = want.get('input_ids')!;
    const loss = valueAndGrad(() => meanLoss(model, Int32Array.from(ids.data), ids.shape));
    expect(Math.abs((await loss.item()) - want.get('loss')!.data[0]!)).toBeLessThan(1e-5);
    loss.dispose();
    for (const { name, tensor: t } of model.parameters.list) {
      const gradient = want.get(`grad.${name}`)!.data;
      expect(relative(await readAs(t.grad!, 'f32'), gradient), name).toBeLessThan(1e-4);
    }
    model.dispose();
  });
});

const small: DecoderConfig = {
  ...presets['gemma2-nano'],
  vocabSize: 61,
  width: 20,
  layers: 2,
  heads: 4,
  kvHeads: 2,
  headSize: 6,
  hidden: 28,
  window: 3,
  attentionCap: 1.5,
  finalCap: 2,
  queryScalar: 4,
  ropeBase: 100,
  normEps: 1e-6,
  initStd: 0.3,
  context: 64,
};
const shape = [2, 9] as const;
const someIds = Int32Array.from({ length: 18 }, (_, i) => (i * 23 + 5) % 61);

/** Gradients of all parameters, laid out like their values. */
async function flatGradient({ parameters }: LanguageModel): Promise<Float32Array> {
  const flat = new Float32Array(parameters.values.size);
  for (const { offset, gradient } of parameters.groups) flat.set(await readAs(gradient(), 'f32'), offset);
  return flat;
}

async function gradientOf(options: { recompute?: boolean; threads?: number }): Promise<Float32Array> {
  if (options.threads !== undefined) {
    shutdown();
    init({ threads: options.threads });
  }
  const model = createModel(small, { seed: 7 });
  valueAndGrad(() => meanLoss(model, someIds, shape, options.recompute)).dispose();
  const flat = await flatGradient(model);
  model.dispose();
  return flat;
}

test('the gradient of the whole model is its finite difference', async () => {
  const model = createModel(small, { seed: 3 });
  valueAndGrad(() => meanLoss(model, someIds, shape)).dispose();
  const gradient = await flatGradient(model);
  const values = await readAs(model.parameters.values, 'f32');
  const at = async (moved: Float32Array): Promise<number> => {
    write(model.parameters.values, moved);
    const loss = scope(() => noGrad(() => meanLoss(model, someIds, shape)));
    const value = await loss.item();
    loss.dispose();
    return value;
  };
  // Along random directions, so that every parameter takes part.
  for (let d = 0; d < 6; d++) {
    const direction = values.map((_, i) => Math.sin(1 + i * (d + 1) * 1.618));
    const h = 2e-3;
    const plus = await at(values.map((v, i) => v + h * direction[i]!));
    const minus = await at(values.map((v, i) => v - h * direction[i]!));
    const slope = gradient.reduce((sum, g, i) => sum + g * direction[i]!, 0);
    // float32 differences of a loss near 4 carry an error of about 1e-3.
    expect(Math.abs((plus - minus) / (2 * h) - slope)).toBeLessThan(0.01 * Math.abs(slope) + 0.01);
  }
  model.dispose();
});

test('recompute gives the same bits', async () => {
  expect(await gradientOf({ recompute: true })).toEqual(await gradientOf({ recompute: false }));
});

test('one, two and three threads give the same bits', async () => {
  const one = await gradientOf({ threads: 1 });
  expect(await gradientOf({ threads: 2 })).toEqual(one);
  expect(await gradientOf({ threads: 3 })).toEqual(one);
});

interface Reference {
  readonly decayed: 'all' | 'matrices';
  readonly optimizer: { lr: number; betas: [number, number]; eps: number; weight_decay: number; clip_norm: number };
  readonly input_ids: number[][][];
  readonly losses: number[];
  readonly gradient_norms: number[];
  readonly first_batch_after: number;
}

test('five AdamW steps give the losses and gradient norms of torch', async () => {
  const references = JSON.parse(await readFile(`${folder}training.json`, 'utf8')) as Reference[];
  const reference = references.find((r) => r.decayed === 'matrices')!;
  const { lr, betas, eps, weight_decay: weightDecay, clip_norm: clip } = reference.optimizer;
  const model = await loadWeights(folder, { trainable: true });
  const optimizer = createOptimizer(model.parameters, {
    learningRate: lr,
    beta1: betas[0],
    beta2: betas[1],
    eps,
    weightDecay,
    clip,
  });
  const lossOf = (ids: number[][]): Tensor => meanLoss(model, Int32Array.from(ids.flat()), [ids.length, ids[0]!.length]);
  for (const [i, ids] of reference.input_ids.entries()) {
    const loss = valueAndGrad(() => lossOf(ids));
    const norm = optimizer.step(lr);
    expect(await loss.item()).toBeCloseTo(reference.losses[i]!, 4);
    expect(Math.sqrt(await norm.item())).toBeCloseTo(reference.gradient_norms[i]!, 3);
    loss.dispose();
    norm.dispose();
  }
  const after = scope(() => noGrad(() => lossOf(reference.input_ids[0]!)));
  expect(await after.item()).toBeCloseTo(reference.first_batch_after, 4);
  after.dispose();
  optimizer.dispose();
  model.dispose();
});
