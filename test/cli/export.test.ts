import { mkdtemp, readdir, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { createModel, modelConfig, saveModel } from '../../src/models/model.ts';
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
