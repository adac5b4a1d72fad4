import { cp, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { openSafetensors, type SafetensorsArray, writeSafetensors } from '../../src/io/safetensors.ts';
import { createModel, loadModel, loadWeights, modelConfig, saveModel } from '../../src/models/model.ts';
import { memory } from '../../src/tensor/engine.ts';
import type { LimbeckError } from '../../src/tensor/errors.ts';
import { readAs } from '../../src/tensor/tensor.ts';
import { tokenizerFromJson } from '../../src/tokenizer/tokenizer.ts';

const golden = new URL('../golden/architectures/', import.meta.url).pathname;

let folder: string;
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'limbeck-folder-'));
});
afterEach(async () => {
  await rm(folder, { recursive: true, force: true });
  expect(memory().tensors).toBe(0);
});

/** A copy of a golden folder with changes. */
async function copied(name: string, config: Record<string, unknown> = {}): Promise<string> {
  await cp(join(golden, name), folder, { recursive: true });
  const path = join(folder, 'config.json');
  await writeFile(path, JSON.stringify({ ...JSON.parse(await readFile(path, 'utf8')), ...config }));
  return folder;
}

type Stored = Map<string, { dtype: 'F32' | 'BF16' | 'F16'; shape: readonly number[]; data: SafetensorsArray }>;

/** Rewrites the weights of the folder. */
async function rewrite(change: (tensors: Stored) => void): Promise<void> {
  const path = join(folder, 'model.safetensors');
  const tensors: Stored = new Map();
  {
    await using file = await openSafetensors(path);
    for (const [name, { dtype, shape }] of file.tensors) {
      tensors.set(name, { dtype: dtype === 'F16' ? 'F32' : (dtype as 'F32' | 'BF16'), shape, data: await file.read(name) });
    }
  }
  change(tensors);
  await writeSafetensors(
    path,
    [...tensors].map(([name, rest]) => ({ name, ...rest })),
  );
}

async function refusal(path = folder): Promise<LimbeckError> {
  try {
    (await loadWeights(path)).dispose();
  } catch (error) {
    return error as LimbeckError;
  }
  return expect.fail('it was loaded');
}

const longrope = { type: 'longrope', short_factor: [1], long_factor: [1] };

describe('what limbeck does not compute is refused by name', () => {
  test.each([
    ['llama2', { model_type: 'bert', architectures: ['BertModel'] }, 'model_type', /"bert".*BertModel.*it knows gemma, /],
    ['llama2', { model_type: 'mixtral' }, 'model_type', /"mixtral"/],
    ['llama2', { architectures: ['LlamaForSequenceClassification'] }, 'architectures', /LlamaForCausalLM/],
    ['llama2', { rope_scaling: { rope_type: 'yarn', factor: 4 } }, 'rope_scaling.rope_type', /"yarn"/],
    ['llama2', { rope_scaling: { type: 'dynamic', factor: 4 } }, 'rope_scaling.type', /"dynamic"/],
    ['llama2', { rope_scaling: { type: 'longrope', short_factor: [1], long_factor: [1] } }, 'rope_scaling.type', /"longrope"/],
    ['llama2', { partial_rotary_factor: 0.75 }, 'partial_rotary_factor', /0\.75/],
    ['phi3', { rope_parameters: null, partial_rotary_factor: 0.1 }, 'rotaryShare', /rotaryShare is 0\.1/],
    ['phi3long', { original_max_position_embeddings: 'x', rope_scaling: longrope }, 'original_max_position_embeddings', /"x"/],
    ['phi3long', { rope_scaling: longrope }, 'ropeScaling.short', /\[1\], expected 3 positive numbers/],
    ['phi3long', { rope_scaling: { ...longrope, long_factor: 'no' } }, 'rope_scaling.long_factor', /a list of numbers/],
    ['llama2', { hidden_act: 'relu' }, 'hidden_act', /"relu".*"silu"/],
    ['llama2', { mlp_bias: true }, 'mlp_bias', /true/],
    ['llama2', { quantization_config: { quant_method: 'awq' } }, 'quantization_config', /awq/],
    ['gemma3', { use_bidirectional_attention: true }, 'use_bidirectional_attention', /true/],
    ['qwen2', { layer_types: ['full_attention', 'chunked_attention', 'full_attention'] }, 'layer_types', /chunked/],
    ['gpt2', { scale_attn_by_inverse_layer_idx: true }, 'scale_attn_by_inverse_layer_idx', /true/],
    ['gpt2', { activation_function: 'relu' }, 'activation_function', /"relu"/],
    ['llama2', { num_attention_heads: 4.5 }, 'heads', /heads is 4.5/],
    ['llama2', { num_hidden_layers: 1e12 }, 'num_hidden_layers', /1 to 10,000/],
    ['llama2', { head_dim: 7 }, 'headSize', /headSize is 7/],
    ['llama2', { vocab_size: 'many' }, 'vocab_size', /"many"/],
  ])('%s with %j', async (name, changes, argument, message) => {
    const error = await refusal(await copied(name, changes));
    expect(error.name).toBe('FormatError');
    expect(error.message).toMatch(message);
    expect(error.argument).toBe(argument);
  });
});

describe('weights that do not fit the config', () => {
  test.each([
    [
      'another width',
      'llama2',
      { intermediate_size: 45 },
      undefined,
      'model.layers.0.mlp.gate_proj.weight',
      /\[44 32\].*\[45 32\]/,
    ],
    ['a layer too many', 'llama2', { num_hidden_layers: 3 }, undefined, 'model.layers.2.input_layernorm.weight', /no tensor/],
    ['a layer too few', 'llama2', { num_hidden_layers: 1 }, undefined, undefined, /no place for the tensor 'model\.layers\.1\./],
    ['biases that nobody asked for', 'llama3', { attention_bias: false }, undefined, undefined, /no place for .*_proj\.bias/],
    [
      'no head though untied',
      'llama3',
      { tie_word_embeddings: false },
      undefined,
      'lm_head.weight',
      /tie_word_embeddings is false/,
    ],
    ['another head though tied', 'llama2', { tie_word_embeddings: true }, undefined, 'lm_head.weight', /tie_word_embeddings/],
    [
      'fused rows',
      'phi3',
      { num_key_value_heads: 1 },
      undefined,
      'model.layers.0.self_attn.qkv_proj.weight',
      /\[64 32\].*\[48 32\]/,
    ],
    [
      'numbers that are no weights',
      'llama2',
      {},
      (t: Stored) => t.set('model.norm.weight', { dtype: 'I32' as 'F32', shape: [32], data: new Int32Array(32) }),
      'dtype',
      /I32/,
    ],
  ] as const)('%s', async (_, name, config, change, argument, message) => {
    await copied(name, config);
    if (change !== undefined) await rewrite(change);
    const error = await refusal();
    expect(error.name).toBe('FormatError');
    expect(error.message).toMatch(message);
    if (argument !== undefined) expect(error.argument).toBe(argument);
  });
});

describe('several files', () => {
  const indexOf = async () => JSON.parse(await readFile(join(folder, 'model.safetensors.index.json'), 'utf8'));
  const writeIndex = (index: unknown) => writeFile(join(folder, 'model.safetensors.index.json'), JSON.stringify(index));

  test('one is missing', async () => {
    await copied('qwen2');
    await rm(join(folder, 'model-00002-of-00002.safetensors'));
    expect((await refusal()).message).toMatch(/'model-00002-of-00002\.safetensors'.*missing/);
  });

  test.each([
    ['../elsewhere.safetensors', /not the name/],
    ['/etc/passwd', /not the name/],
    [7, /not the name/],
  ])('the index names %s', async (place, message) => {
    await copied('qwen2');
    const index = await indexOf();
    index.weight_map['model.norm.weight'] = place;
    await writeIndex(index);
    expect((await refusal()).message).toMatch(message);
  });

  test('the index is wrong about where a tensor is, or knows too few', async () => {
    await copied('qwen2');
    const index = await indexOf();
    const [first, second] = [...new Set(Object.values(index.weight_map))] as [string, string];
    const name = Object.keys(index.weight_map).find((key) => index.weight_map[key] === first)!;
    await writeIndex({ weight_map: { ...index.weight_map, [name]: second } });
    expect((await refusal()).message).toMatch(/is not in|does not know/);
    delete index.weight_map[name];
    await writeIndex(index);
    expect((await refusal()).message).toMatch(/does not know/);
    for (const bad of [{}, { weight_map: [] }, { weight_map: {} }, null]) {
      await writeIndex(bad);
      expect((await refusal()).code).toBe('ERR_CHECKPOINT');
    }
  });

  test('no weights at all, or those of another format', async () => {
    await copied('llama2');
    await rm(join(folder, 'model.safetensors'));
    expect((await refusal()).message).toMatch(/no weights/);
    await writeFile(join(folder, 'pytorch_model.bin'), '');
    expect((await refusal()).message).toMatch(/pytorch_model\.bin is another format/);
  });

  test('what lay there before is gone when the new weights are there', async () => {
    const model = await loadWeights(join(golden, 'llama2'));
    const weights = async () => (await readdir(folder)).filter((name) => name.startsWith('model'));
    await saveModel(folder, model, undefined, { shardBytes: 30_000 });
    const many = await weights();
    expect(many.length).toBeGreaterThan(3);
    await saveModel(folder, model);
    expect(await weights()).toEqual(['model.safetensors']);
    await saveModel(folder, model, undefined, { shardBytes: 30_000 });
    expect(await weights()).toEqual(many);
    model.dispose();
  });
});

test.each(['llama2', 'gpt2'])('%s: names without prefix, a tied head once more, leftovers of older versions', async (name) => {
  const want = await loadWeights(join(golden, name));
  await copied(name);
  await rewrite((tensors) => {
    for (const [key, value] of [...tensors]) {
      tensors.delete(key);
      tensors.set(key.replace(/^(model|transformer)\./, ''), value);
    }
    const [leftover, count] = name === 'gpt2' ? ['h.0.attn.bias', 4] : ['layers.0.self_attn.rotary_emb.inv_freq', 4];
    tensors.set(leftover!, { dtype: 'F32', shape: [count!], data: new Float32Array(4) });
    if (name === 'gpt2') tensors.set('lm_head.weight', tensors.get('wte.weight')!);
  });
  const model = await loadWeights(folder);
  expect(await readAs(model.parameters.values, 'f32')).toEqual(await readAs(want.parameters.values, 'f32'));
  model.dispose();
  want.dispose();
});

const vocabulary = (n: number): string =>
  JSON.stringify({
    version: '1.0',
    added_tokens: [],
    normalizer: null,
    pre_tokenizer: { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: true },
    post_processor: null,
    decoder: { type: 'ByteLevel', add_prefix_space: true, trim_offsets: true, use_regex: true },
    model: { type: 'BPE', vocab: Object.fromEntries(Array.from({ length: n }, (_, i) => [`t${i}`, i])), merges: [] },
  });

test('a tokenizer may be smaller than the embedding, not larger; texts beside the model are kept', async () => {
  await copied('llama2');
  await writeFile(join(folder, 'tokenizer.json'), vocabulary(97));
  await expect(loadModel(folder)).rejects.toMatchObject({ name: 'FormatError', argument: 'tokenizer.json', actual: '97' });
  await writeFile(join(folder, 'tokenizer.json'), vocabulary(90));
  await writeFile(join(folder, 'generation_config.json'), '{"eos_token_id": [2, 7]}');
  await writeFile(join(folder, 'chat_template.jinja'), '{{ messages }}');
  const { model, tokenizer, files } = await loadModel(folder);
  expect(tokenizer.vocabSize).toBe(tokenizerFromJson(vocabulary(90)).vocabSize);
  const again = join(folder, 'again');
  await saveModel(again, model, tokenizer, { files });
  expect(await readFile(join(again, 'generation_config.json'), 'utf8')).toBe('{"eos_token_id": [2, 7]}');
  expect(await readFile(join(again, 'chat_template.jinja'), 'utf8')).toBe('{{ messages }}');
  model.dispose();
});

test('a config that its files could not express is refused before anything is trained', () => {
  const config = modelConfig('gemma2-nano');
  for (const changes of [
    { queryKeyNorm: true },
    { activation: 'silu' },
    { localRopeBase: 100 },
    { bias: { qkv: true, output: false } },
  ]) {
    const [field] = Object.keys(changes);
    expect(() => createModel({ ...config, ...changes } as typeof config)).toThrow(expect.objectContaining({ argument: field }));
  }
  expect(() => createModel({ ...config, architecture: 'bert' } as never)).toThrow(/one of gemma, /);
});
