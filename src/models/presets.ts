// Configurations by name.
import type { DecoderConfig } from './decoder.ts';
import type { Gpt2Config } from './gpt2.ts';

/** What all Gemma 2 models have in common (arXiv:2408.00118). */
const gemma2 = {
  architecture: 'gemma2',
  layerPattern: ['local', 'global'],
  activation: 'gelu',
  normOffset: 1,
  postNorms: true,
  queryKeyNorm: false,
  scaledEmbedding: true,
  tied: true,
  bias: { qkv: false, output: false },
  attentionCap: 50,
  finalCap: 30,
  ropeBase: 10_000,
  localRopeBase: null,
  ropeScaling: null,
  rotary: [true],
  normEps: 1e-6,
  initStd: 0.02,
  context: 8192,
} as const;

/** What all GPT-2 models have in common. */
const gpt2 = {
  architecture: 'gpt2',
  vocabSize: 50_257,
  window: null,
  layerPattern: ['global'],
  finalCap: null,
  normEps: 1e-5,
  initStd: 0.02,
  context: 1024,
  tied: true,
} as const;

/** The published sizes, with the 256,128 rows that the report counts (public weights keep 256,000), and small ones for the CPU. */
export const presets = {
  'gemma2-2b': {
    ...gemma2,
    vocabSize: 256_128,
    width: 2304,
    layers: 26,
    heads: 8,
    kvHeads: 4,
    headSize: 256,
    hidden: 9216,
    window: 4096,
    queryScalar: 256,
  },
  'gemma2-9b': {
    ...gemma2,
    vocabSize: 256_128,
    width: 3584,
    layers: 42,
    heads: 16,
    kvHeads: 8,
    headSize: 256,
    hidden: 14_336,
    window: 4096,
    queryScalar: 256,
  },
  'gemma2-27b': {
    ...gemma2,
    vocabSize: 256_128,
    width: 4608,
    layers: 46,
    heads: 32,
    kvHeads: 16,
    headSize: 128,
    hidden: 36_864,
    window: 4096,
    queryScalar: 144,
  },
  /** 0.3 M parameters without the embedding: for tests and first tries. */
  'gemma2-nano': {
    ...gemma2,
    vocabSize: 4096,
    width: 96,
    layers: 2,
    heads: 3,
    kvHeads: 1,
    headSize: 32,
    hidden: 384,
    window: 64,
    queryScalar: 32,
    context: 512,
  },
  /** 1 M parameters without the embedding. */
  'gemma2-micro': {
    ...gemma2,
    vocabSize: 4096,
    width: 128,
    layers: 4,
    heads: 4,
    kvHeads: 2,
    headSize: 32,
    hidden: 512,
    window: 64,
    queryScalar: 32,
    context: 512,
  },
  /** 5.9 M parameters without the embedding. */
  'gemma2-mini': {
    ...gemma2,
    vocabSize: 8192,
    width: 256,
    layers: 6,
    heads: 4,
    kvHeads: 2,
    headSize: 64,
    hidden: 1024,
    window: 128,
    queryScalar: 64,
    context: 2048,
  },
  /** 31.5 M parameters without the embedding. */
  'gemma2-small': {
    ...gemma2,
    vocabSize: 8192,
    width: 512,
    layers: 8,
    heads: 8,
    kvHeads: 4,
    headSize: 64,
    hidden: 2048,
    window: 128,
    queryScalar: 64,
    context: 2048,
  },
  /** GPT-2 as published: 124 M parameters. */
  gpt2: { ...gpt2, width: 768, layers: 12, heads: 12, kvHeads: 12, headSize: 64, hidden: 3072 },
  /** 355 M parameters. */
  'gpt2-medium': { ...gpt2, width: 1024, layers: 24, heads: 16, kvHeads: 16, headSize: 64, hidden: 4096 },
  /** 0.2 M parameters without the embeddings: for tests and first tries. */
  'gpt2-nano': {
    ...gpt2,
    vocabSize: 4096,
    width: 96,
    layers: 2,
    heads: 3,
    kvHeads: 3,
    headSize: 32,
    hidden: 384,
    context: 512,
  },
  /** 0.8 M parameters without the embeddings. */
  'gpt2-micro': {
    ...gpt2,
    vocabSize: 4096,
    width: 128,
    layers: 4,
    heads: 4,
    kvHeads: 4,
    headSize: 32,
    hidden: 512,
    context: 512,
  },
} as const satisfies Record<string, DecoderConfig | Gpt2Config>;

export type Preset = keyof typeof presets;
