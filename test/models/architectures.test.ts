import { mkdtemp, readdir, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import { openSafetensors } from '../../src/io/safetensors.ts';
import { cacheRows, createCache } from '../../src/models/cache.ts';
import type { ModelInput } from '../../src/models/config.ts';
import { type LanguageModel, loadWeights, modelConfig, saveModel } from '../../src/models/model.ts';
import { type Preset, presets } from '../../src/models/presets.ts';
import { modelSpec } from '../../src/models/registry.ts';
import { countParameters } from '../../src/nn/parameters.ts';
import { softcap } from '../../src/ops/elementwise.ts';
import { linear } from '../../src/ops/linear.ts';
import { linearCrossEntropy } from '../../src/ops/loss.ts';
import { reshape, rows } from '../../src/ops/reshape.ts';
import { memory } from '../../src/tensor/engine.ts';
import { scope } from '../../src/tensor/scope.ts';
import { noGrad, valueAndGrad } from '../../src/tensor/tape.ts';
import { readAs, type Tensor, tensor, write } from '../../src/tensor/tensor.ts';

const golden = new URL('../golden/architectures/', import.meta.url).pathname;
const names = [
  'gemma',
  'gemma2',
  'gemma3',
  'llama2',
  'llama3',
  'mistral',
  'qwen2',
  'qwen3',
  'phi3',
  'phi3long',
  'phi3short',
  'smollm3',
  'gpt2',
];

let out: string;
beforeAll(async () => {
  out = await mkdtemp(join(tmpdir(), 'limbeck-architectures-'));
});
afterAll(() => rm(out, { recursive: true, force: true }));
afterEach(() => expect(memory().tensors).toBe(0));

interface Expected {
  readonly ids: Int32Array;
  readonly logits: Float32Array;
  readonly greedy: Int32Array;
}

async function expected(name: string): Promise<Expected> {
  await using file = await openSafetensors(join(golden, name, 'expected.safetensors'));
  return {
    ids: (await file.read('ids')) as Int32Array,
    logits: (await file.read('logits')) as Float32Array,
    greedy: (await file.read('greedy')) as Int32Array,
  };
}

const count = (n: number, from = 0): Int32Array => Int32Array.from({ length: n }, (_, i) => from + i);

/** Logits [T V] of one sequence, of its last token only where asked. */
async function logits(
  model: LanguageModel,
  ids: Int32Array,
  { from = 0, cache, last = false }: { from?: number; cache?: ModelInput['cache']; last?: boolean } = {},
): Promise<Float32Array> {
  const t = ids.length;
  const z = scope(() =>
    noGrad(() => {
      const input = { ids: tensor(ids, [1, t]), positions: tensor(count(t, from), [1, t]), cache };
      const hidden = reshape(model.hidden(input), [t, -1]);
      const y = linear(last ? rows(hidden, t - 1, t) : hidden, model.head);
      return model.config.finalCap === null ? y : softcap(y, model.config.finalCap);
    }),
  );
  try {
    return await readAs(z, 'f32');
  } finally {
    z.dispose();
  }
}

function largest(a: ArrayLike<number>, b: ArrayLike<number>): number {
  expect(a.length).toBe(b.length);
  let most = 0;
  for (let i = 0; i < a.length; i++) most = Math.max(most, Math.abs(a[i]! - b[i]!));
  return most;
}

const likeliest = (z: Float32Array): number => z.reduce((best, value, i) => (value > z[best]! ? i : best), 0);

/** Greedy continuation by full passes. */
async function greedyWhole(model: LanguageModel, ids: Int32Array, n: number): Promise<number[]> {
  const all = [...ids];
  while (all.length < ids.length + n) all.push(likeliest(await logits(model, Int32Array.from(all), { last: true })));
  return all.slice(ids.length);
}

/** Greedy continuation, each token computed once. */
async function greedyCached(model: LanguageModel, ids: Int32Array, n: number): Promise<number[]> {
  const cache = createCache(1, ids.length + n);
  const found: number[] = [];
  try {
    for (let next = ids; found.length < n; next = Int32Array.of(found.at(-1)!)) {
      const from = cache.lengths[0]!;
      const into = cacheRows(cache, [0], next.length);
      found.push(likeliest(await logits(model, next, { from, cache: into, last: true })));
      into.index.dispose();
      cache.lengths[0] = from + next.length;
    }
  } finally {
    cache.dispose();
  }
  return found;
}

describe.each(names)('%s, written by Transformers', (name) => {
  test('logits within 1e-4; 64 greedy tokens the same, with and without a cache', async () => {
    const want = await expected(name);
    const model = await loadWeights(join(golden, name));
    expect(largest(await logits(model, want.ids), want.logits)).toBeLessThan(1e-4);
    expect(await greedyWhole(model, want.ids, 64)).toEqual([...want.greedy]);
    expect(await greedyCached(model, want.ids, 64)).toEqual([...want.greedy]);
    model.dispose();
  });

  test.each([
    ['one file', 5e9],
    ['several files', 20_000],
  ])('saved in %s and loaded again: the same bits', async (_, shardBytes) => {
    const model = await loadWeights(join(golden, name));
    const { ids } = await expected(name);
    const before = await logits(model, ids);
    const folder = join(out, name);
    await saveModel(folder, model, undefined, { shardBytes });
    const weights = (await readdir(folder)).filter((file) => file.endsWith('.safetensors'));
    expect(weights.length > 1).toBe(shardBytes < 1e6);
    const again = await loadWeights(folder);
    expect(again.config).toEqual(model.config);
    expect(await logits(again, ids)).toEqual(before);
    again.dispose();
    model.dispose();
  });

  test('kept in bf16, saved in bf16: the same numbers', async () => {
    const model = await loadWeights(join(golden, name));
    const folder = join(out, `${name}-bf16`);
    await saveModel(folder, model, undefined, { dtype: 'bf16' });
    const [narrow, wide] = [await loadWeights(folder, { dtype: 'bf16' }), await loadWeights(folder)];
    expect(narrow.parameters.values.dtype).toBe('bf16');
    const bits = await readAs(narrow.parameters.values, 'bf16');
    const values = await readAs(wide.parameters.values, 'f32');
    expect(
      new Uint32Array(values.buffer, values.byteOffset, values.length).every(
        (v, i) => v >>> 16 === bits[i] && (v & 0xffff) === 0,
      ),
    ).toBe(true);
    for (const one of [model, narrow, wide]) one.dispose();
  });
});

describe.each(names)('%s, trained', (name) => {
  /** Mean next-token cross-entropy. */
  const loss = (model: LanguageModel, ids: Int32Array, recompute = false): Tensor => {
    const t = ids.length;
    const hidden = model.hidden({ ids: tensor(ids, [1, t]), positions: tensor(count(t), [1, t]) }, { recompute });
    return linearCrossEntropy(reshape(hidden, [t, -1]), model.head, tensor(Int32Array.from(ids, (_, i) => ids[(i + 1) % t]!)), {
      cap: model.config.finalCap,
    }).total;
  };

  async function gradientOf(model: LanguageModel, ids: Int32Array, recompute = false): Promise<Float32Array> {
    valueAndGrad(() => loss(model, ids, recompute)).dispose();
    const flat = new Float32Array(model.parameters.values.size);
    for (const { offset, gradient } of model.parameters.groups) flat.set(await readAs(gradient(), 'f32'), offset);
    return flat;
  }

  test('the gradient is the finite difference, and the same with recompute', async () => {
    const ids = (await expected(name)).ids.subarray(0, 20);
    const model = await loadWeights(join(golden, name), { trainable: true });
    const again = await loadWeights(join(golden, name), { trainable: true });
    const gradient = await gradientOf(model, ids);
    expect(await gradientOf(again, ids, true)).toEqual(gradient);
    again.dispose();
    const values = await readAs(model.parameters.values, 'f32');
    const at = async (moved: Float32Array): Promise<number> => {
      write(model.parameters.values, moved);
      const value = scope(() => noGrad(() => loss(model, ids)));
      try {
        return await value.item();
      } finally {
        value.dispose();
      }
    };
    // Along the directions in which it is steepest for a kind of parameter, where float32 shows it best.
    const kinds = new Map<string, { offset: number; size: number }[]>();
    for (const { name: parameter, offset, tensor: t } of model.parameters.list) {
      const kind = parameter.replace(/\.\d+\./, '.');
      kinds.set(kind, [...(kinds.get(kind) ?? []), { offset, size: t.size }]);
    }
    for (const [kind, places] of kinds) {
      const direction = new Float32Array(values.length);
      for (const { offset, size } of places) direction.set(gradient.subarray(offset, offset + size), offset);
      const norm = Math.sqrt(direction.reduce((sum, g) => sum + g * g, 0));
      expect(norm, kind).toBeGreaterThan(0);
      const h = 1e-2 / Math.max(1, norm);
      const step = (sign: number) => values.map((v, i) => v + (sign * h * direction[i]!) / norm);
      const slope = ((await at(step(1))) - (await at(step(-1)))) / (2 * h);
      expect(Math.abs(slope - norm), `${kind}: ${slope} is not ${norm}`).toBeLessThan(0.02 * norm + 2e-3);
    }
    model.dispose();
  });
});

test.each([
  ['gemma-2b', 2_506_172_416],
  ['gemma3-1b', 999_885_952],
  ['llama3.2-1b', 1_235_814_400],
  ['llama3.1-8b', 8_030_261_248],
  ['smollm2-135m', 134_515_008],
  ['mistral-7b', 7_241_732_096],
  ['qwen2.5-0.5b', 494_032_768],
  ['qwen3-0.6b', 596_049_920],
  ['phi3-mini', 3_821_079_552],
  ['gpt2', 124_439_808],
  ['gpt2-medium', 354_823_168],
] as const)('%s has the %d parameters of the published model', (preset, parameters) => {
  expect(countParameters(modelSpec(modelConfig(preset)))).toBe(parameters);
});

test('every preset is one that its files can express', () => {
  for (const preset of Object.keys(presets)) expect(modelConfig(preset)).toEqual(presets[preset as Preset]);
});
