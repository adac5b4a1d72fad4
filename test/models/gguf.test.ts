import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { openGguf, writeGguf } from '../../src/io/gguf.ts';
import type { GgufInput, GgufValue } from '../../src/io/gguf-header.ts';
import { loadGenerator } from '../../src/models/completion.ts';
import { exportGguf } from '../../src/models/gguf.ts';
import { createModel, loadModel, loadWeights, type ModelChanges, modelConfig } from '../../src/models/model.ts';
import { readAs } from '../../src/tensor/tensor.ts';
import { loadChatTemplate } from '../../src/tokenizer/chat.ts';
import type { Tokenizer } from '../../src/tokenizer/tokenizer.ts';
import { trainTokenizer } from '../../src/tokenizer/train.ts';

let folder: string;
let path: string;
let tokenizer: Tokenizer;
const tiny = { vocabSize: 270, width: 32, layers: 2, hidden: 32, heads: 2, kvHeads: 1, headSize: 16, queryScalar: 16 };
const tinyModel = (changes: ModelChanges = {}) =>
  createModel(modelConfig('gemma2-nano', { ...tiny, ...changes }), { seed: 1, trainable: false });

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'limbeck-gguf-model-'));
  path = join(folder, 'good.gguf');
  tokenizer = await trainTokenizer(['one two three two one'], { vocabSize: 270 });
  const model = tinyModel();
  await exportGguf(path, model, tokenizer, { type: 'f32' });
  model.dispose();
});
afterAll(() => rm(folder, { recursive: true, force: true }));

/** The good file with other metadata or tensors. */
async function changed(
  metadata: Readonly<Record<string, GgufValue>>,
  tensors: (all: GgufInput[]) => GgufInput[] = (all) => all,
): Promise<string> {
  await using file = await openGguf(path);
  const all = await Promise.all(
    [...file.tensors].map(async ([name, { type, shape }]) => {
      const values = await file.read(name);
      return { name, type, shape, data: () => [values] };
    }),
  );
  const to = join(folder, 'changed.gguf');
  await writeGguf(to, new Map([...file.metadata, ...Object.entries(metadata)]), tensors(all));
  return to;
}

test('a model and its tokenizer come back as they were', async () => {
  const model = tinyModel();
  const again = await loadModel(path);
  expect(again.model.config).toEqual({ ...model.config, initStd: 0.02 });
  expect(await readAs(again.model.parameters.values, 'f32')).toEqual(await readAs(model.parameters.values, 'f32'));
  expect(again.tokenizer.fingerprint).toBe(tokenizer.fingerprint);
  model.dispose();
  again.model.dispose();
});

const u32 = (value: number): GgufValue => ({ type: 'u32', value });
const text = (value: string): GgufValue => ({ type: 'string', value });
const f32 = (value: number): GgufValue => ({ type: 'f32', value });

test('chat templates, ends of turns and ways to draw come with the file', async () => {
  const none = await loadGenerator({ checkpoint: path });
  expect(none.defaults).toEqual({ stopIds: [tokenizer.eos] });
  expect(await loadChatTemplate(path, none.tokenizer)).toBeUndefined();
  none.model.dispose();

  const one = await changed({
    'tokenizer.chat_template': text('{{ bos_token }}one'),
    'tokenizer.ggml.eot_token_id': u32(5),
    'general.sampling.temp': f32(Math.fround(0.6)),
    'general.sampling.top_k': { type: 'i32', value: 20 },
    'tokenizer.ggml.add_bos_token': { type: 'bool', value: false },
  });
  const { model, tokenizer: own, defaults } = await loadGenerator({ checkpoint: one });
  model.dispose();
  expect(defaults).toEqual({ stopIds: [tokenizer.eos, 5], temperature: 0.6, topK: 20 });
  expect([own.bos, own.begins, tokenizer.begins]).toEqual([tokenizer.bos, false, true]);
  const template = await loadChatTemplate(one, own);
  expect(template!.render([])).toBe('<bos>one');
  await expect(loadChatTemplate(one, own, 'tool_use')).rejects.toMatchObject({ code: 'ERR_TEMPLATE', argument: 'name' });

  const two = await changed({
    'tokenizer.chat_template': text('{{ 1 }}'),
    'tokenizer.chat_template.tool_use': text('{{ 2 }}'),
    'general.sampling.temp': f32(-1),
  });
  await expect(loadGenerator({ checkpoint: two })).rejects.toMatchObject({ code: 'ERR_CHECKPOINT', argument: 'temperature' });
  const again = await loadModel(two);
  again.model.dispose();
  expect((await loadChatTemplate(two, again.tokenizer))!.source).toBe('{{ 1 }}');
  expect((await loadChatTemplate(two, again.tokenizer, 'tool_use'))!.source).toBe('{{ 2 }}');
});

describe('a file that does not fit is refused by name', () => {
  test.each<[string, Record<string, GgufValue>, ((all: GgufInput[]) => GgufInput[]) | undefined, RegExp]>([
    [
      'another architecture',
      { 'general.architecture': text('mamba') },
      undefined,
      /general.architecture is mamba, expected gemma, gemma2/,
    ],
    ['an absurd number of layers', { 'gemma2.block_count': u32(2 ** 32 - 1) }, undefined, /block_count is 4294967295/],
    ['a number that is text', { 'gemma2.embedding_length': text('32') }, undefined, /embedding_length is 32, expected a number/],
    ['an absurd width', { 'gemma2.embedding_length': u32(2 ** 31) }, undefined, /'token_embd.weight' has shape \[270 32\]/],
    ['heads that do not divide', { 'gemma2.attention.head_count_kv': u32(3) }, undefined, /kvHeads is 3/],
    ['a part of several', { 'split.count': { type: 'u16', value: 4 } }, undefined, /split.count is 4.*--merge/],
    ['experts', { 'gemma2.expert_count': u32(8) }, undefined, /expert_count is 8/],
    ['another scaling', { 'gemma2.rope.scaling.type': text('yarn') }, undefined, /rope.scaling.type is yarn/],
    [
      'a tensor missing',
      {},
      (all) => all.filter(({ name }) => name !== 'blk.1.ffn_up.weight'),
      /'blk.1.ffn_up.weight' is missing/,
    ],
    ['a tensor too many', {}, (all) => [...all, { ...all[1]!, name: 'blk.0.extra' }], /'blk.0.extra' has no place/],
    [
      'a type that cannot be read',
      {},
      (all) => all.map((t) => (t.name.endsWith('ffn_up.weight') ? iq4(t) : t)),
      /is IQ4_NL, which cannot be read/,
    ],
  ])('%s', async (_, metadata, tensors, message) => {
    await expect(loadWeights(await changed(metadata, tensors))).rejects.toThrow(message);
  });

  test.each<[string, Record<string, GgufValue>, RegExp]>([
    ['an unknown way to cut text', { 'tokenizer.ggml.pre': text('tekken') }, /tokenizer.ggml.pre is tekken/],
    ['a tokenizer of another kind', { 'tokenizer.ggml.model': text('t5') }, /tokenizer.ggml.model is t5.*loadWeights/],
    [
      'types that are too few',
      { 'tokenizer.ggml.token_type': { type: 'array', of: 'i32', value: Int32Array.of(1) } },
      /a list of \d+ numbers/,
    ],
    ['a merge of one', { 'tokenizer.ggml.merges': { type: 'array', of: 'string', value: ['one'] } }, /merges\[0\] is one/],
    [
      'a tokenizer bigger than the embedding',
      { 'tokenizer.ggml.tokens': { type: 'array', of: 'string', value: Array.from({ length: 300 }, (_, i) => `token ${i}`) } },
      /token_type|300 ids/,
    ],
  ])('%s', async (_, metadata, message) => {
    await expect(loadModel(await changed(metadata))).rejects.toThrow(message);
  });
});

const iq4 = ({ name, shape }: GgufInput): GgufInput => ({
  name,
  shape,
  type: 'IQ4_NL',
  data: () => [new Uint8Array(18 * shape[0]!)],
});

describe('what a file cannot tell of is refused by name', () => {
  test.each<[string, ModelChanges, RegExp]>([
    ['a window in another pattern', { layerPattern: ['global', 'local'] }, /layerPattern/],
    ['another activation', { activation: 'silu' }, /activation is silu/],
  ])('%s', async (_, changes, message) => {
    let model: ReturnType<typeof tinyModel>;
    try {
      model = tinyModel(changes);
    } catch (error) {
      // Where the architecture itself does not allow it, that is said first.
      expect((error as { code: string }).code).toBe('ERR_CONFIG');
      return;
    }
    await expect(exportGguf(join(folder, 'no.gguf'), model, tokenizer)).rejects.toThrow(message);
    model.dispose();
  });

  test('a tokenizer bigger than the embedding', async () => {
    const model = tinyModel({ vocabSize: 200 });
    await expect(exportGguf(join(folder, 'no.gguf'), model, tokenizer)).rejects.toThrow(
      /has \d+ tokens, the model's embedding 200 rows/,
    );
    model.dispose();
  });
});
