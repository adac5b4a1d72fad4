// Small good files of each kind, for mutation.

import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { writeGguf } from '../../src/io/gguf.ts';
import type { GgufValue } from '../../src/io/gguf-header.ts';
import { writeSafetensors } from '../../src/io/safetensors.ts';
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

export const seeds = {
  gguf: async () => [await mixed(), await model()],
  safetensors: async () => [await safetensors()],
  tokenizer: async () => [Buffer.from((await tokenizer()).file.text)],
};
