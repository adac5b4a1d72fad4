// Adapters beside a model: PEFT's own and ours, in and out, several, merged, and on bases of few bits.
import { mkdtempSync, rmSync } from 'node:fs';
import { cp, readFile, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, describe, expect, test } from 'vitest';
import { openSafetensors, writeSafetensors } from '../../src/io/safetensors.ts';
import { loadAdapter, saveAdapter } from '../../src/models/adapter.ts';
import { exportGguf } from '../../src/models/gguf.ts';
import { createModel, type LanguageModel, loadConfig, loadWeights, modelConfig, saveModel } from '../../src/models/model.ts';
import {
  type Adapter,
  type AdapterOptions,
  createAdapter,
  mergeAdapter,
  setAdapter,
  unmergeAdapter,
  withAdapter,
  withDropout,
} from '../../src/nn/lora.ts';
import { orthonormalColumns } from '../../src/nn/qr.ts';
import { cast, softcap } from '../../src/ops/elementwise.ts';
import { linear } from '../../src/ops/linear.ts';
import { linearCrossEntropy } from '../../src/ops/loss.ts';
import { memory } from '../../src/tensor/engine.ts';
import { ConfigError, FormatError } from '../../src/tensor/errors.ts';
import { scope } from '../../src/tensor/scope.ts';
import { noGrad, valueAndGrad } from '../../src/tensor/tape.ts';
import { readAs, type Tensor, tensor } from '../../src/tensor/tensor.ts';
import { createOptimizer } from '../../src/train/optimizer.ts';

const golden = join(import.meta.dirname, '../golden');
const gemma = join(golden, 'gemma2');
const scratch = mkdtempSync(join(tmpdir(), 'limbeck-adapter-'));
afterAll(() => rmSync(scratch, { recursive: true }));
afterEach(() => expect(memory().tensors).toBe(0));

const [rows, length] = [2, 24];
const ids: Int32Array = Int32Array.from({ length: rows * length }, (_, i) => (i * 37 + 11) % 97);

function input(tokens: Int32Array = ids) {
  const positions = Int32Array.from(tokens, (_, i) => i % length);
  return { ids: tensor(tokens, [rows, length]), positions: tensor(positions, [rows, length]) };
}

async function logits(model: LanguageModel, tokens: Int32Array = ids): Promise<Float32Array> {
  const z: Tensor = scope(() =>
    noGrad(() => {
      const y = linear(model.hidden(input(tokens)), model.head);
      return cast(model.config.finalCap === null ? y : softcap(y, model.config.finalCap), 'f32');
    }),
  );
  return readAs(z, 'f32').finally(() => z.dispose());
}

const largest = (a: Float32Array, b: Float32Array): number => a.reduce((most, x, i) => Math.max(most, Math.abs(x - b[i]!)), 0);

/** A few steps on the same tokens, so that everything that is trained moves. @returns the losses */
async function train(
  model: LanguageModel,
  adapter: Adapter,
  steps = 3,
  pass?: (step: number) => number,
  tokens: Int32Array = ids,
): Promise<number[]> {
  const optimizer = createOptimizer(adapter.parameters, { ...adamw, learningRate: 1e-2 });
  const losses: number[] = [];
  for (let step = 0; step < steps; step++) {
    const loss = scope(() => {
      const targets = tensor(
        Int32Array.from(tokens, (id) => (id * 5 + 1) % 96),
        [rows, length],
      );
      const value = withDropout(adapter, pass?.(step) ?? step, () =>
        valueAndGrad(() => linearCrossEntropy(model.hidden(input(tokens)), model.head as Tensor, targets).total),
      );
      optimizer.step(1e-2).dispose();
      return value;
    });
    losses.push(await loss.item());
    loss.dispose();
  }
  optimizer.dispose();
  return losses;
}
const adamw = { beta1: 0.9, beta2: 0.95, eps: 1e-8, weightDecay: 0, clip: null } as const;

const kinds: Record<string, AdapterOptions> = {
  lora: { rank: 3, alpha: 5 },
  rslora: { rank: 4, alpha: 3, rankStabilized: true, targets: ['q_proj', '*.layers.1.mlp.*'] },
  dora: { rank: 2, kind: 'dora', targets: ['k_proj', 'down_proj'] },
  'rank 1': { rank: 1, alpha: 1, targets: 'v_proj' },
  olora: { rank: 3, init: 'olora', targets: ['q_proj', 'gate_proj'] },
  'olora, rank stabilized': { rank: 2, init: 'olora', rankStabilized: true, targets: ['o_proj'] },
};

/** The folder of the base that an adapter of the fixtures belongs to. */
const baseOf = (name: string): string => {
  const other = ['gpt2', 'phi3'].find((base) => name.startsWith(base));
  return other === undefined ? gemma : join(golden, 'architectures', other);
};

/** For make_adapters.py check, which asks PEFT. */
async function keepForPeft(name: string, folder: string, model: LanguageModel, tokens: Int32Array): Promise<void> {
  if (process.env.LIMBECK_KEEP_ADAPTERS === undefined) return;
  const kept = join(process.env.LIMBECK_KEEP_ADAPTERS, name.replace(/\W/g, '-'));
  await cp(folder, kept, { recursive: true });
  const vocabulary = model.config.vocabSize;
  await writeSafetensors(join(kept, 'logits.safetensors'), [
    { name: 'input_ids', dtype: 'I32', shape: [rows, length], data: tokens },
    { name: 'logits', dtype: 'F32', shape: [rows, length, vocabulary], data: await logits(model, tokens) },
  ]);
}

describe('adapters that PEFT wrote', () => {
  test.each(['lora', 'rslora', 'dora', 'patterns', 'gpt2', 'gpt2dora', 'phi3'])(
    '%s: its logits, saved again too',
    async (name) => {
      const expected = await openSafetensors(join(golden, 'adapters', 'expected.safetensors'));
      const tokens = (await expected.read('input_ids')) as Int32Array;
      const theirs = (await expected.read(name)) as Float32Array;
      await expected.close();
      const model = await loadWeights(baseOf(name), { dtype: 'f32' });
      const without = await logits(model, tokens);
      const adapter = await loadAdapter(join(golden, 'adapters', name), model);
      const ours = await logits(model, tokens);
      expect(largest(ours, theirs)).toBeLessThan(1e-4);
      expect(largest(without, theirs)).toBeGreaterThan(0.1);
      const folder = join(scratch, `again-${name}`);
      await saveAdapter(folder, model, adapter);
      await keepForPeft(`again-${name}`, folder, model, tokens);
      setAdapter(model, null);
      expect(await logits(model, tokens)).toEqual(without);
      adapter.dispose();
      const again = await loadAdapter(folder, model);
      expect(largest(await logits(model, tokens), theirs)).toBeLessThan(1e-4);
      again.dispose();
      model.dispose();
    },
  );
});

describe.each(Object.entries(kinds))('%s', (name, options) => {
  test('changes nothing at first, trains, and comes back from a file to the bit', async () => {
    const model = await loadWeights(gemma);
    const before = await logits(model);
    const adapter = await createAdapter(model, { seed: 3, ...options });
    // DoRA divides by a length and multiplies by it again; OLoRA takes away what it adds.
    expect(largest(await logits(model), before)).toBeLessThan(2e-5);
    const losses = await train(model, adapter);
    expect(losses.at(-1)!).toBeLessThan(losses[0]!);
    const after = await logits(model);
    expect(largest(after, before)).toBeGreaterThan(1e-3);

    const folder = join(scratch, name.replace(/\W/g, '-'));
    await saveAdapter(folder, model, adapter);
    await keepForPeft(name, folder, model, ids);
    adapter.dispose();
    expect(await logits(model)).toEqual(before);

    const loaded = await loadAdapter(folder, model, { trainable: true, ratio: 1 });
    expect(await logits(model)).toEqual(after);
    expect(loaded.options.rank).toBe(options.rank);
    const more = await train(model, loaded, 1);
    expect(more[0]!).toBeLessThan(losses[0]!);
    loaded.dispose();
    model.dispose();
  });

  test.each(['f32', 'bf16'] as const)('merged into %s as applied, and out again', async (dtype) => {
    const model = await loadWeights(gemma, { dtype });
    const before = await logits(model);
    const adapter = await createAdapter(model, { seed: 3, ...options });
    await train(model, adapter);
    const applied = await logits(model);
    mergeAdapter(model, adapter);
    const merged = await logits(model);
    expect(() => setAdapter(model, adapter)).toThrow(/merged/);
    unmergeAdapter(model, adapter);
    const back = await logits(model);
    // bf16 weights have 8 bits; logits are up to 3. OLoRA's share is as large as the weights, so that rounding it shows more: over 120
    // trainings that differ in the last digits 1.1e-5 in the median and 2.3e-5 at most.
    const rounding = dtype === 'bf16' ? 0.1 : options.init === 'olora' ? 4e-5 : 2e-5;
    expect(largest(merged, applied)).toBeLessThan(rounding);
    expect(largest(back, before)).toBeLessThan(rounding);
    if (dtype === 'f32') expect(largest(merged, before)).toBeGreaterThan(1e-3);
    adapter.dispose();
    model.dispose();
  });
});

describe.each([
  ['gpt2', 'all-linear', { rank: 2, alpha: 3 }],
  ['gpt2', ['q_proj', 'v_proj'], { rank: 3, alpha: 5, rankStabilized: true }],
  ['gpt2', ['k_proj', 'c_fc'], { rank: 2, kind: 'dora' }],
  ['phi3', ['q_proj', 'up_proj', 'down_proj'], { rank: 3, init: 'olora' }],
  ['phi3', '*.layers.1.*', { rank: 2 }],
] as const)('%s, %j', (base, targets, options) => {
  test('adapters of parts of joint matrices go into a file as one of the whole, and come back', async () => {
    const model = await loadWeights(baseOf(base), { dtype: 'f32' });
    const tokens = ids.map((id) => id % 96);
    const before = await logits(model, tokens);
    const adapter = await createAdapter(model, { seed: 3, ...options, targets });
    await train(model, adapter, 3, undefined, tokens);
    const after = await logits(model, tokens);
    expect(largest(after, before)).toBeGreaterThan(1e-3);
    const name = `${base}-${String(targets)}`;
    const folder = join(scratch, name.replace(/\W/g, '-'));
    await saveAdapter(folder, model, adapter);
    await keepForPeft(name, folder, model, tokens);
    await using stored = await openSafetensors(join(folder, 'adapter_model.safetensors'));
    for (const tensor of stored.tensors.keys()) expect(tensor).not.toMatch(/\.(q|k|v|gate|up)_proj/);
    const values = await readAs(adapter.parameters.values, 'f32');
    adapter.dispose();
    const loaded = await loadAdapter(folder, model, { trainable: true });
    expect(await readAs(loaded.parameters.values, 'f32')).toEqual(values);
    expect(largest(await logits(model, tokens), after)).toBeLessThan(1e-6);
    await train(model, loaded, 1, undefined, tokens);
    loaded.dispose();
    model.dispose();
  });
});

test('a merged model is an ordinary one, also in a file', async () => {
  const model = await loadWeights(gemma);
  const adapter = await createAdapter(model, kinds.dora);
  await train(model, adapter);
  mergeAdapter(model, adapter);
  const merged = await logits(model);
  await saveModel(join(scratch, 'merged'), model);
  adapter.dispose();
  model.dispose();
  const loaded = await loadWeights(join(scratch, 'merged'));
  expect(await logits(loaded)).toEqual(merged);
  loaded.dispose();
});

test.each(['lora', 'dora', 'olora'] as const)('files of a model with %s beside it have the change in them', async (kind) => {
  const model = await loadWeights(gemma);
  const before = await readAs(model.parameters.values, 'f32');
  const adapter = await createAdapter(model, kinds[kind]);
  await train(model, adapter);
  const applied = await logits(model);
  await saveModel(join(scratch, 'applied'), model);
  await exportGguf(join(scratch, 'applied.gguf'), model, undefined, { type: 'f32' });
  await saveModel(join(scratch, 'applied-bf16'), model, undefined, { dtype: 'bf16' });
  // In memory it is what it was.
  expect(await logits(model)).toEqual(applied);
  expect(await readAs(model.parameters.values, 'f32')).toEqual(before);
  mergeAdapter(model, adapter);
  const merged = await readAs(model.parameters.values, 'f32');
  adapter.dispose();
  const folder = await loadWeights(join(scratch, 'applied'));
  expect(await readAs(folder.parameters.values, 'f32')).toEqual(merged);
  // Its weights are others: norms with their 1 added, queries with their scale.
  const file = await loadWeights(join(scratch, 'applied.gguf'));
  expect(largest(await logits(file), applied)).toBeLessThan(2e-5);
  const rounded = await loadWeights(join(scratch, 'applied-bf16'), { dtype: 'bf16' });
  const copies = cast(model.parameters.values, 'bf16');
  expect(await readAs(rounded.parameters.values, 'bf16')).toEqual(await readAs(copies, 'bf16'));
  for (const each of [copies, rounded, folder, file, model]) each.dispose();
});

test('several adapters on one base, one in use at a time', async () => {
  const model = await loadWeights(gemma);
  const none = await logits(model);
  const first = await createAdapter(model, { targets: ['q_proj', 'v_proj'], seed: 1 });
  await train(model, first);
  const one = await logits(model);
  const second = await createAdapter(model, { targets: '*.mlp.*', rank: 2, seed: 2 });
  expect(largest(await logits(model), none)).toBe(0);
  await train(model, second);
  const two = await logits(model);
  setAdapter(model, first);
  expect(await logits(model)).toEqual(one);
  setAdapter(model, null);
  expect(await logits(model)).toEqual(none);
  setAdapter(model, first);
  const hidden: Tensor = withAdapter(model, second, () => scope(() => noGrad(() => model.hidden(input()))));
  hidden.dispose();
  expect(await logits(model)).toEqual(one);
  expect(() =>
    withAdapter(model, null, () => {
      throw new Error('inside');
    }),
  ).toThrow('inside');
  expect(await logits(model)).toEqual(one);
  first.dispose();
  expect(await logits(model)).toEqual(none);
  setAdapter(model, second);
  expect(await logits(model)).toEqual(two);
  second.dispose();
  model.dispose();
});

test('what is chosen by a pattern', async () => {
  const model = await loadWeights(gemma);
  const count = async (targets: string | string[]): Promise<number> => {
    const adapter = await createAdapter(model, { targets, rank: 1 });
    const { size } = adapter.weights;
    adapter.dispose();
    return size;
  };
  const { layers } = model.config;
  expect(await count('all-linear')).toBe(7 * layers);
  expect(await count('q_proj')).toBe(layers);
  expect(await count(['mlp.up_proj', 'model.layers.0.self_attn.o_proj'])).toBe(layers + 1);
  expect(await count('*.mlp.*')).toBe(3 * layers);
  expect(await count('model.layers.1.*')).toBe(7);
  await expect(createAdapter(model, { targets: ['q_proj', 'query'] })).rejects.toThrow(
    "adapter: targets is 'query', which is no matrix of this model, expected 'all-linear' or patterns such as q_proj",
  );
  await expect(createAdapter(model, { targets: 'roj' })).rejects.toThrow(ConfigError);
  await expect(createAdapter(model, { targets: [] })).rejects.toThrow(/empty/);
  model.dispose();
});

test('options out of range', async () => {
  const model = await loadWeights(gemma);
  const wrong: AdapterOptions[] = [
    { rank: 0 },
    { rank: 1.5 },
    { alpha: 0 },
    { alpha: Number.NaN },
    { ratio: 0 },
    { dropout: 1 },
    { dropout: -0.1 },
    { seed: -1 },
    { kind: 'ia3' as 'lora' },
    { init: 'pissa' as 'zero' },
    { init: 'olora', kind: 'dora' },
    { init: 'olora', rank: 25 },
  ];
  for (const options of wrong) await expect(createAdapter(model, options), JSON.stringify(options)).rejects.toThrow(ConfigError);
  model.dispose();
  const trainable = createModel(modelConfig('gemma2-nano', { layers: 1 }), { seed: 1 });
  await expect(createAdapter(trainable)).rejects.toThrow(/frozen model/);
  trainable.dispose();
});

test('LoRA+: the first update of B is `ratio` times that of A', async () => {
  const model = await loadWeights(gemma);
  const adapter = await createAdapter(model, { ratio: 16, targets: 'q_proj', rank: 2 });
  const read = (of: 'a' | 'b') => Promise.all([...adapter.weights.values()].map((w) => readAs(w[of], 'f32')));
  await train(model, adapter, 1);
  // With one step of AdamW each element that has a gradient moves by the learning rate. A has none while B is zero.
  for (const b of await read('b')) for (const x of b) expect(Math.abs(x)).toBeCloseTo(16 * 1e-2, 4);
  const before = await read('a');
  await train(model, adapter, 1);
  for (const [i, a] of (await read('a')).entries())
    for (const [j, x] of a.entries()) expect(Math.abs(x - before[i]![j]!)).toBeCloseTo(1e-2, 4);
  adapter.dispose();
  model.dispose();
});

test('dropout: the same pass gives the same loss, another a different one, and outside of training there is none', async () => {
  const model = await loadWeights(gemma);
  const run = async (pass: number): Promise<number> => {
    const adapter = await createAdapter(model, { dropout: 0.5, seed: 7 });
    const [, second] = await train(model, adapter, 2, (step) => pass + step);
    expect(await logits(model)).toEqual(await logits(model));
    adapter.dispose();
    return second!;
  };
  const [a, b, c] = [await run(0), await run(0), await run(10)];
  expect(a).toBe(b);
  expect(a).not.toBe(c);
  model.dispose();
});

describe('on bases of few bits', () => {
  const config = modelConfig('gemma2-micro', { vocabSize: 97 });

  test.each([
    ['fp8', 1.035],
    ['q8', 1.07],
    ['q4', 0.54],
  ] as const)(
    '%s: at most %f bytes for each parameter of a matrix; an adapter trains, and the base stays',
    async (weights, bytes) => {
      const before = memory().live;
      const model = createModel(config, { seed: 1, trainable: false, weights });
      const rest = model.parameters.values.size * (model.parameters.values.dtype === 'f32' ? 4 : 2);
      const matrices = model.parameters.linears.reduce((sum, { shape }) => sum + shape[0] * shape[1], 0);
      // A tensor takes whole blocks of the allocator.
      expect((memory().live - before - rest) / matrices).toBeLessThan(
        bytes + (64 * 2 * model.parameters.weights.length) / matrices,
      );
      const read = () =>
        Promise.all(model.parameters.weights.map(async ({ weight }) => Buffer.from((await weight.codes.read()).buffer)));
      const codes = await read();
      const adapter = await createAdapter(model, { rank: 4, kind: weights === 'q8' ? 'dora' : 'lora' });
      const losses = await train(model, adapter, 8);
      expect(losses.at(-1)!).toBeLessThan(losses[0]! - 0.2);
      expect((await read()).every((now, i) => now.equals(codes[i]!))).toBe(true);
      expect(() => mergeAdapter(model, adapter)).toThrow(/f32 or bf16/);
      adapter.dispose();
      model.dispose();
    },
  );

  test('an adapter that was trained on 4 bits belongs to the base of f32 too', async () => {
    const folder = join(scratch, 'four');
    const model = await loadWeights(gemma, { weights: 'q4' });
    const adapter = await createAdapter(model, { rank: 2 });
    await train(model, adapter);
    await saveAdapter(folder, model, adapter);
    adapter.dispose();
    model.dispose();
    const exact = await loadWeights(gemma);
    (await loadAdapter(folder, exact)).dispose();
    exact.dispose();
  });
});

describe('adapters that do not belong here', () => {
  const save = async (name: string, options: AdapterOptions = { rank: 2, targets: ['q_proj'] }): Promise<string> => {
    const model = await loadWeights(gemma);
    const adapter = await createAdapter(model, options);
    await saveAdapter(join(scratch, name), model, adapter);
    adapter.dispose();
    model.dispose();
    return join(scratch, name);
  };
  const refused = async (folder: string, error: typeof ConfigError | typeof FormatError, text: RegExp): Promise<void> => {
    const model = await loadWeights(gemma);
    const before = await logits(model);
    const attempt = loadAdapter(folder, model);
    await expect(attempt).rejects.toThrow(text);
    await expect(attempt).rejects.toBeInstanceOf(error);
    expect(await logits(model)).toEqual(before);
    model.dispose();
  };
  const change = async (folder: string, changes: Record<string, unknown>): Promise<void> => {
    const path = join(folder, 'adapter_config.json');
    await writeFile(path, JSON.stringify({ ...JSON.parse(await readFile(path, 'utf8')), ...changes }));
  };

  test('one of the same shapes and other numbers', async () => {
    const folder = await save('foreign');
    const config = await loadConfig(gemma);
    const other = createModel(config, { seed: 5, trainable: false });
    await expect(loadAdapter(folder, other)).rejects.toThrow(/another base/);
    other.dispose();
  });

  test('one of another width, or of matrices that are not there', async () => {
    const model = createModel(modelConfig('gemma2-nano', { vocabSize: 97 }), { seed: 5, trainable: false });
    await expect(loadAdapter(join(golden, 'adapters', 'lora'), model)).rejects.toThrow(/made for another base/);
    model.dispose();
    const shallow = { ...(await loadConfig(gemma)), layers: 1 };
    const missing = createModel(shallow, { seed: 5, trainable: false });
    await expect(loadAdapter(join(golden, 'adapters', 'lora'), missing)).rejects.toThrow(
      /'model.layers.1.* is missing in this model/,
    );
    missing.dispose();
  });

  test.each([
    ['peft_type', 'IA3', /peft_type is "IA3", expected "LORA"/],
    ['modules_to_save', ['lm_head'], /modules_to_save is \["lm_head"\]/],
    ['rank_pattern', { q_proj: 4 }, /expected \[4 K\] and \[N 4\]/],
    ['rank_pattern', { q_proj: 1.5 }, /rank_pattern\['q_proj'\] is 1.5, expected a whole number/],
    ['alpha_pattern', { q_proj: '4' }, /alpha_pattern\['q_proj'\] is "4", expected a number above 0/],
    ['alpha_pattern', ['q_proj'], /alpha_pattern is \["q_proj"\], expected an object/],
    ['alpha_pattern', { '(.*.*)+x': 1 }, /alpha_pattern is of '\(\.\*\.\*\)\+x', expected the name of a matrix/],
    ['alpha_pattern', { '([': 1 }, /alpha_pattern is of '\(\['/],
    ['bias', 'all', /bias is "all"/],
    ['init_lora_weights', 'pissa', /init_lora_weights is "pissa"/],
    ['lora_bias', true, /lora_bias/],
    ['r', 5, /expected \[5 K\] and \[N 5\]/],
    ['r', 'two', /r is "two", expected a number/],
    ['r', 0, /r is 0, expected a whole number/],
    ['lora_alpha', -1, /lora_alpha is -1/],
    ['lora_alpha', null, /lora_alpha/],
    ['use_dora', true, /without lora_magnitude_vector/],
  ])('%s: %j', async (field, value, text) => {
    const folder = await save('changed');
    await change(folder, { [field]: value });
    await refused(folder, FormatError, text);
  });

  test('files that are missing, damaged or hold other tensors', async () => {
    await refused(join(scratch, 'nowhere'), FormatError, /adapter_config.json: cannot be read/);
    const folder = await save('damaged');
    await writeFile(join(folder, 'adapter_config.json'), '[]');
    await refused(folder, FormatError, /expected an object/);
    await writeFile(join(folder, 'adapter_config.json'), '{"peft_type":');
    await refused(folder, FormatError, /cannot be read/);
    const other = await save('other');
    const path = join(other, 'adapter_model.safetensors');
    await writeSafetensors(path, [{ name: 'model.norm.weight', dtype: 'F32', shape: [1], data: Float32Array.of(1) }]);
    await refused(other, FormatError, /'model.norm.weight'/);
    await writeSafetensors(path, [
      {
        name: 'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight',
        dtype: 'F32',
        shape: [2, 1],
        data: Float32Array.of(1, 2),
      },
    ]);
    await refused(other, FormatError, /without lora_B.weight/);
    await writeSafetensors(path, []);
    await refused(other, FormatError, /empty/);
  });
});

test('QR: the golden vector, and Q of random matrices', () => {
  const q = orthonormalColumns(Float32Array.from([1, 2, 3, 4, 5, 6]), 3, 2);
  for (const [i, x] of [-0.16903085, -0.50709255, -0.84515425].entries()) expect(q[2 * i]).toBeCloseTo(x, 7);
  const [n, r] = [13, 5];
  const x = Float32Array.from({ length: n * r }, (_, i) => Math.sin(i * i + 1));
  const made = orthonormalColumns(x, n, r);
  const dot = (a: Float32Array, i: number, b: Float32Array, j: number): number => {
    let sum = 0;
    for (let row = 0; row < n; row++) sum += a[row * r + i]! * b[row * r + j]!;
    return sum;
  };
  for (let i = 0; i < r; i++) for (let j = 0; j < r; j++) expect(dot(made, i, made, j)).toBeCloseTo(i === j ? 1 : 0, 6);
  // R is upper triangular: column j of x has no part along later columns of Q.
  for (let i = 0; i < r; i++) for (let j = 0; j < i; j++) expect(dot(made, i, x, j)).toBeCloseTo(0, 5);
  // A column of zeros, and one that has its place already.
  expect([...orthonormalColumns(Float32Array.from([2, 0, 0, 0]), 2, 2)]).toEqual([1, 0, 0, 1]);
});
