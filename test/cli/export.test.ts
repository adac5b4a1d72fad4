import { mkdtemp, readdir, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { openGguf } from '../../src/io/gguf.ts';
import { saveAdapter } from '../../src/models/adapter.ts';
import { createModel, loadModel, modelConfig, saveModel } from '../../src/models/model.ts';
import { createAdapter } from '../../src/nn/lora.ts';
import { trainTokenizer } from '../../src/tokenizer/train.ts';
import { limbeckHere } from './process.ts';

let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'limbeck-export-'));
  const tokenizer = await trainTokenizer(['one two three two one'], { vocabSize: 270 });
  const config = modelConfig('gemma2-nano', {
    vocabSize: 270,
    width: 32,
    layers: 2,
    hidden: 32,
    heads: 2,
    kvHeads: 1,
    headSize: 16,
    queryScalar: 16,
  });
  const model = createModel(config, { seed: 1, trainable: false });
  await saveModel(join(folder, 'model'), model, tokenizer);
  model.dispose();
});
afterAll(() => rm(folder, { recursive: true, force: true }));

test('safetensors: a folder with the same weights', async () => {
  const out = join(folder, 'again');
  const result = await limbeckHere(['export', join(folder, 'model'), '--to', 'safetensors', '--out', out]);
  expect(result).toEqual({ code: 0, out: `${out}\n`, err: '' });
  expect(await readdir(out)).toEqual(await readdir(join(folder, 'model')));
  for (const name of await readdir(out)) {
    expect(Buffer.compare(await readFile(join(out, name)), await readFile(join(folder, 'model', name))), name).toBe(0);
  }
});

test('never in the place of what is exported', async () => {
  const result = await limbeckHere(['export', join(folder, 'model'), '--to', 'safetensors', '--out', `${folder}/./model/`]);
  expect([result.code, result.err]).toEqual([2, expect.stringContaining('where the checkpoint lies; give another path')]);
});

test('gguf: a file that loads as the same model, with notes about what it could not keep', async () => {
  const out = join(folder, 'model.gguf');
  const result = await limbeckHere(['export', join(folder, 'model'), '--to', 'gguf', '--type', 'f32', '--out', out]);
  expect(result).toEqual({ code: 0, out: `${out}\n`, err: '' });
  const small = await limbeckHere([
    'export',
    join(folder, 'model'),
    '--to',
    'gguf',
    '--type',
    'q4_k_m',
    '--out',
    `${out}2`,
    '--json',
  ]);
  expect(JSON.parse(small.out)).toMatchObject({
    format: 'gguf',
    weights: 'q4_k_m',
    notes: [expect.stringContaining('kept as Q8_0')],
  });
  const again = join(folder, 'back');
  expect((await limbeckHere(['export', out, '--to', 'safetensors', '--out', again])).code).toBe(0);
  const weights = 'model.safetensors';
  expect(Buffer.compare(await readFile(join(again, weights)), await readFile(join(folder, 'model', weights)))).toBe(0);
});

test('an adapter: in the weights of its base, and alone', async () => {
  const base = join(folder, 'model');
  const path = join(folder, 'adapter');
  const { model } = await loadModel(base);
  const adapter = await createAdapter(model, { rank: 2, targets: ['q_proj', 'up_proj'] });
  for (const { name, tensor } of adapter.parameters.list)
    if (name.endsWith('lora_B.weight')) adapter.parameters.write(name, 0, new Float32Array(tensor.size).fill(0.5));
  adapter.parameters.refresh();
  await saveAdapter(path, model, adapter);
  await saveModel(join(folder, 'expected'), model);
  adapter.dispose();
  model.dispose();
  const out = join(folder, 'with');
  const options = ['--adapter', path, '--to'];
  expect(await limbeckHere(['export', base, ...options, 'safetensors', '--out', out])).toEqual({
    code: 0,
    out: `${out}\n`,
    err: '',
  });
  const weights = async (of: string) => readFile(join(folder, of, 'model.safetensors'));
  expect(Buffer.compare(await weights('with'), await weights('expected'))).toBe(0);
  expect(Buffer.compare(await weights('with'), await weights('model'))).not.toBe(0);
  const alone = join(folder, 'alone.gguf');
  expect((await limbeckHere(['export', base, ...options, 'gguf-adapter', '--out', alone])).code).toBe(0);
  await using file = await openGguf(alone);
  expect(file.metadata.get('adapter.lora.alpha')).toEqual({ type: 'f32', value: 16 });
  expect([...file.tensors.keys()]).toEqual(
    [0, 1].flatMap((i) => ['attn_q', 'ffn_up'].flatMap((name) => ['a', 'b'].map((ab) => `blk.${i}.${name}.weight.lora_${ab}`))),
  );
});
