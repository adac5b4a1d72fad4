// Magpie with a GGUF file of ours in llama.cpp: from nothing to a data set that our own model tags and scores.
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import * as llama from 'node-llama-cpp';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { exportGguf } from '../../src/models/gguf.ts';
import { loadModel } from '../../src/models/model.ts';
import { dedupe, dedupeText, embed } from '../../src/synth/dedupe.ts';
import { filter } from '../../src/synth/filter.ts';
import { reward } from '../../src/synth/judge.ts';
import { magpie } from '../../src/synth/magpie/magpie.ts';
import { preQueryFromTemplate } from '../../src/synth/magpie/templates.ts';
import { readManifest, readRecords, runPipeline } from '../../src/synth/pipeline.ts';
import { type LlamaModule, openLlamaProvider } from '../../src/synth/providers/llama.ts';
import { openLocalProvider } from '../../src/synth/providers/local.ts';
import type { InstructionRecord } from '../../src/synth/record.ts';
import { tag } from '../../src/synth/tag.ts';
import { chatTemplate } from '../../src/tokenizer/chat.ts';
import { trainTinyChat } from '../synth/tiny.ts';

let folder: string;
let model: string;
let file: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'limbeck-magpie-'));
  model = await trainTinyChat(folder);
  file = join(folder, 'tiny.gguf');
  const loaded = await loadModel(model);
  try {
    await exportGguf(file, loaded.model, loaded.tokenizer);
  } finally {
    loaded.model.dispose();
  }
}, 120_000);
afterAll(() => rm(folder, { recursive: true, force: true }));

test('from nothing to a filtered, tagged data set without repeats, twice the same', async () => {
  const { tokenizer, model: loaded } = await loadModel(model);
  loaded.dispose();
  const template = chatTemplate('chatml', tokenizer);
  const writer = await openLlamaProvider({
    file,
    template,
    context: 256,
    // Its threads wait for each other by spinning: beside other tests two are a hundred times slower than one.
    llama: { build: 'never', gpu: false, maxThreads: 1 },
    module: llama as unknown as LlamaModule,
  });
  const judge = await openLocalProvider(model, { template: 'chatml', name: 'tiny', batch: 8 });
  try {
    const made: string[][] = [];
    for (const output of [join(folder, 'one'), join(folder, 'two')]) {
      const chain = magpie({
        provider: writer,
        count: 16,
        template: preQueryFromTemplate(template),
        instruction: { maxTokens: 40, temperature: [0.8, 1], stop: ['<|endoftext|>'] },
        response: { maxTokens: 80 },
      })
        .through(dedupeText({ threshold: 1 }))
        .through(embed({ provider: judge }))
        .through(dedupe({ threshold: 1e-6 }))
        .through(tag({ provider: judge, missions: ['quality'] }))
        .through(reward({ provider: judge, retries: 0 }))
        .through(filter({ quality: 'very poor' }));
      for await (const _ of runPipeline(chain, { output, seed: 7 })) void 0;
      const records: InstructionRecord[] = [];
      const last = (await readManifest(output)).at(-1)!;
      for await (const record of readRecords<InstructionRecord>(join(output, last.file))) records.push(record);
      expect(records.filter(({ messages }) => /What is the \w+ of \w+\?/.test(messages[0]!.content)).length).toBeGreaterThan(2);
      for (const { tags } of records) expect(typeof tags!.quality).toBe('string');
      made.push(records.map(({ messages }) => messages.map(({ content }) => content).join('\n')));
    }
    expect(new Set(made[0]).size).toBe(made[0]!.length);
    expect(made[1]).toEqual(made[0]);
  } finally {
    await writer.dispose();
    await judge.dispose();
  }
}, 120_000);
