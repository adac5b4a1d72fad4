// Small good files of each kind, for mutation.

import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { parquetWriteBuffer } from 'hyparquet-writer';
import { writeGguf } from '../../src/io/gguf.ts';
import type { GgufValue } from '../../src/io/gguf-header.ts';
import { writeSafetensors } from '../../src/io/safetensors.ts';
import { saveAdapter } from '../../src/models/adapter.ts';
import { createModel, type LanguageModel, modelConfig } from '../../src/models/model.ts';
import { transformersText } from '../../src/models/transformers.ts';
import { createAdapter } from '../../src/nn/lora.ts';
import { exportRecords } from '../../src/synth/export.ts';
import type { ChatMessage } from '../../src/synth/provider.ts';
import { ggufVocabulary } from '../../src/tokenizer/gguf.ts';
import { trainTokenizer } from '../../src/tokenizer/train.ts';

const tokenizer = () => trainTokenizer(['the people of this country '.repeat(4)], { vocabSize: 264 });

async function written(write: (path: string) => Promise<void>): Promise<Buffer> {
  const folder = await mkdtemp(join(tmpdir(), 'limbeck-seed-'));
  const path = join(folder, 'seed');
  await write(path);
  const bytes = await readFile(path);
  await rm(folder, { recursive: true });
  return bytes;
}

/** Metadata of every kind, and tensors of several types. */
async function mixed(): Promise<Buffer> {
  const metadata: [string, GgufValue][] = [
    ['general.architecture', { type: 'string', value: 'llama' }],
    ['general.alignment', { type: 'u32', value: 32 }],
    ['a', { type: 'u8', value: 1 }],
    ['b', { type: 'f64', value: 1.5 }],
    ['c', { type: 'bool', value: true }],
    ['d', { type: 'array', of: 'string', value: ['x', '', 'yz'] }],
    ['e', { type: 'array', of: 'f32', value: Float32Array.of(1, 2, 3) }],
    ['f', { type: 'array', of: 'bool', value: Uint8Array.of(1, 0) }],
    ['g', { type: 'u64', value: 2n ** 60n }],
  ];
  const tensor = (name: string, type: 'F32' | 'F16' | 'Q8_0', shape: number[]) => {
    const values = new Float32Array(shape.reduce((a, b) => a * b, 1));
    return { name, type, shape, data: () => [values] };
  };
  return written((path) =>
    writeGguf(path, metadata, [
      tensor('x', 'F32', [2, 3]),
      tensor('y', 'Q8_0', [2, 32]),
      tensor('z', 'F16', [1]),
      tensor('none', 'F32', [0]),
    ]),
  );
}

/** The header of a model with its tokenizer. */
async function model(): Promise<Buffer> {
  const u32 = (key: string, value: number): [string, GgufValue] => [`gemma2.${key}`, { type: 'u32', value }];
  const metadata: (readonly [string, GgufValue])[] = [
    ['general.architecture', { type: 'string', value: 'gemma2' }],
    u32('context_length', 32),
    u32('embedding_length', 4),
    u32('block_count', 1),
    u32('feed_forward_length', 4),
    u32('attention.head_count', 2),
    u32('attention.head_count_kv', 1),
    u32('attention.key_length', 2),
    u32('attention.sliding_window', 8),
    ['gemma2.attention.layer_norm_rms_epsilon', { type: 'f32', value: 1e-6 }],
    ...ggufVocabulary(await tokenizer(), 264).metadata,
  ];
  const values = new Float32Array(264);
  return written((path) =>
    writeGguf(path, metadata, [{ name: 'token_embd.weight', type: 'F32', shape: [264, 1], data: () => [values] }]),
  );
}

/** Bytes of the tensors behind the header. */
export const safetensorsBytes = 24 + 8 + 1 + 440;

/** A header. */
async function safetensors(): Promise<Buffer> {
  const file = await written((path) =>
    writeSafetensors(
      path,
      [
        { name: 'x', dtype: 'F32', shape: [2, 3], data: new Float32Array(6) },
        { name: 'y', dtype: 'F16', shape: [4], data: new Uint16Array(4) },
        { name: 'z', dtype: 'U8', shape: [], data: new Uint8Array(1) },
        { name: 'none', dtype: 'I64', shape: [0, 5], data: new BigInt64Array(0) },
        { name: 'model.layers.0.mlp.down_proj.weight', dtype: 'F32', shape: [10, 11], data: new Float32Array(110) },
      ],
      { format: 'pt' },
    ),
  );
  return file.subarray(8, file.length - safetensorsBytes);
}

const json = (value: unknown): Buffer => Buffer.from(JSON.stringify(value, null, 1));

/** Rows of each format, as JSON and as JSON Lines. */
const rows: readonly (readonly object[])[] = [
  [
    { instruction: 'Name it.', input: '', output: 'Oslo', system: 'Be brief.' },
    { instruction: 'Sort.', input: '2 1', response: '1 2' },
  ],
  [
    {
      conversations: [
        { from: 'human', value: 'Hi' },
        { from: 'gpt', value: 'Hello' },
      ],
      system: 'x',
    },
    { conversations: '[{"from":"user","value":"a"},{"from":"assistant","value":"b"}]' },
  ],
  [
    {
      messages: [
        { role: 'system', content: 's' },
        { role: 'user', content: 'Hi' },
        { role: 'assistant', content: 'Hello' },
      ],
    },
    {
      messages: [
        { role: 'user', content: 'u' },
        { role: 'assistant', content: null, tool_calls: [{ id: 1 }] },
      ],
      tools: [{}],
    },
  ],
  [{ prompt: 'Oslo is in', completion: ' Norway' }],
];

/** Parquet files of plain columns and of lists, whole, compressed, and in several row groups. */
async function parquet(): Promise<Buffer[]> {
  const texts = (name: string, data: string[]) => ({ name, data, type: 'STRING' as const });
  const plain = [
    texts('instruction', ['Name it.', 'Sort.', 'Add.']),
    texts('input', ['', '2 1', '1 1']),
    texts('output', ['Oslo', '1 2', '2']),
  ];
  const written = (options: Omit<Parameters<typeof parquetWriteBuffer>[0], 'columnData'>) =>
    Buffer.from(parquetWriteBuffer({ columnData: plain, statistics: false, ...options }));
  const folder = await mkdtemp(join(tmpdir(), 'limbeck-seed-'));
  const path = join(folder, 'rows.parquet');
  const turns: ChatMessage[] = [
    { role: 'user', content: 'Hi' },
    { role: 'assistant', content: 'Hello' },
  ];
  await exportRecords(path, [
    { id: '0', messages: turns },
    { id: '1', messages: [...turns, ...turns] },
  ]);
  const lists = await readFile(path);
  await rm(folder, { recursive: true });
  return [written({ codec: 'UNCOMPRESSED' }), written({ codec: 'SNAPPY', rowGroupSize: 2 }), lists];
}

const text = { output: 'out', data: { text: ['a.txt'], validation: 0.1 }, steps: 5, batch: { sequences: 2, length: 16 } };
const runs: readonly object[] = [
  { kind: 'pretrain', ...text, tokenizer: { train: { vocabSize: 300 } }, model: { preset: 'gemma2-nano', heads: 4, kvHeads: 2 } },
  {
    kind: 'distill',
    ...text,
    model: 'gemma2-nano',
    teacher: { checkpoint: 'runs/teacher', weights: 'q8' },
    distill: { divergence: { kind: 'jsd', beta: 0.5 }, temperature: 2 },
    schedule: { kind: 'wsd', warmupSteps: 1 },
  },
  {
    kind: 'finetune',
    output: 'out',
    model: 'base',
    data: { train: 'rows.json', validation: { documents: 2 } },
    template: 'alpaca',
    adapter: { rank: 4, targets: ['q_proj'] },
    epochs: 2,
  },
  { kind: 'pretrain', ...text, data: { mixture: [{ source: { jsonl: 'a.jsonl' }, weight: 1 }] }, tokenizer: 'tokenizer.json' },
];

/** A model that an adapter of {@link writeAdapter} fits. */
export function adapterBase(): LanguageModel {
  const sizes = { vocabSize: 16, width: 8, layers: 1, heads: 1, kvHeads: 1, headSize: 8, hidden: 8, queryScalar: 8, context: 32 };
  return createModel(modelConfig('gemma2-nano', sizes), { seed: 1, trainable: false });
}

/** Writes an adapter beside a model into a folder. */
export async function writeAdapter(folder: string, base: LanguageModel): Promise<void> {
  const adapter = await createAdapter(base, { rank: 2, targets: ['q_proj', 'down_proj'] });
  await saveAdapter(folder, base, adapter, { base: folder });
  adapter.dispose();
}

async function adapterFile(name: string): Promise<Buffer> {
  const folder = await mkdtemp(join(tmpdir(), 'limbeck-seed-'));
  const base = adapterBase();
  await writeAdapter(folder, base);
  base.dispose();
  const bytes = await readFile(join(folder, name));
  await rm(folder, { recursive: true });
  return bytes;
}

const shards = { x: 'model-00001-of-00002.safetensors', y: 'model-00002-of-00002.safetensors' };

/** The files of the index among the seeds. */
export async function writeShards(folder: string): Promise<undefined> {
  for (const [name, file] of Object.entries(shards))
    await writeSafetensors(join(folder, file), [{ name, dtype: 'F32', shape: [1], data: new Float32Array(1) }]);
}

const architectures = ['gemma2-nano', 'gemma3-1b', 'llama3.2-1b', 'mistral-7b', 'qwen2.5-0.5b', 'phi3-mini', 'gpt2'];

/** Good files of each kind. */
export const seeds = {
  gguf: async () => [await mixed(), await model()],
  safetensors: async () => [await safetensors()],
  tokenizer: async () => [Buffer.from((await tokenizer()).file.text)],
  rows: async () => [...rows.map(json), ...rows.map((list) => Buffer.from(list.map((row) => JSON.stringify(row)).join('\n')))],
  parquet,
  run: async () => runs.map(json),
  config: async () => architectures.map((name) => Buffer.from(transformersText(modelConfig(name)))),
  index: async () => [json({ metadata: { total_size: 8 }, weight_map: shards })],
  adapter: async () => [await adapterFile('adapter_config.json')],
  adapterweights: async () => [await adapterFile('adapter_model.safetensors')],
};
