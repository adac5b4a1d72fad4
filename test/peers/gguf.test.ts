// Our GGUF files in llama.cpp: its log-probabilities, its best tokens and its tokenizers are ours.
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { getLlama, type Llama, LlamaLogLevel, type LlamaModel, type Token } from 'node-llama-cpp';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import type { DecoderConfig } from '../../src/models/decoder.ts';
import { exportGguf, type GgufType, openGgufModel } from '../../src/models/gguf.ts';
import { exportGgufAdapter } from '../../src/models/gguf-adapter.ts';
import type { Gpt2Config } from '../../src/models/gpt2.ts';
import { createModel, type LanguageModel, type ModelConfig, modelConfig } from '../../src/models/model.ts';
import { type AdapterOptions, createAdapter, setAdapter } from '../../src/nn/lora.ts';
import { softcap } from '../../src/ops/elementwise.ts';
import { linear } from '../../src/ops/linear.ts';
import { reshape } from '../../src/ops/reshape.ts';
import { scope } from '../../src/tensor/scope.ts';
import { noGrad } from '../../src/tensor/tape.ts';
import { readAs, tensor } from '../../src/tensor/tensor.ts';
import { type Tokenizer, tokenizerFromJson } from '../../src/tokenizer/tokenizer.ts';
import { trainTokenizer } from '../../src/tokenizer/train.ts';

let folder: string;
let llamaCpp: Llama;
let tokenizer: Tokenizer;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'limbeck-gguf-peer-'));
  llamaCpp = await getLlama({ build: 'never', gpu: false, logLevel: LlamaLogLevel.error });
  tokenizer = await trainTokenizer([text], { vocabSize: 288 });
});
afterAll(async () => {
  await llamaCpp.dispose();
  await rm(folder, { recursive: true, force: true });
});

const text = 'the people of this country shall keep a Union that is free, 1790 to 2021; the people shall keep it. '.repeat(4);

const T = 256;
const V = 320;
// Rows of 64 and 256 are whole blocks of Q8_0; a scale of weights at which the best token is seldom in doubt.
const llama = modelConfig('smollm2-135m', {
  ...{ vocabSize: V, width: 64, layers: 4, heads: 4, kvHeads: 2, headSize: 32, hidden: 128, context: 512 },
  ...{ tied: false, queryScalar: 32, ropeBase: 10_000, normEps: 1e-6, initStd: 0.15 },
}) as DecoderConfig;
const gemma = { activation: 'gelu', normOffset: 1, postNorms: true, scaledEmbedding: true, tied: true } as const;
const gemma2 = {
  ...llama,
  ...gemma,
  architecture: 'gemma2',
  layerPattern: ['local', 'global'],
  window: 64,
  attentionCap: 3,
  finalCap: 12,
} as const;

// Its rows in one matrix for queries, keys and values, and in one for both branches.
const phi3 = { ...llama, architecture: 'phi3', headSize: 16, queryScalar: 16 } as const;
const gpt2: Gpt2Config = {
  architecture: 'gpt2',
  vocabSize: V,
  width: 64,
  layers: 4,
  heads: 4,
  kvHeads: 4,
  headSize: 16,
  hidden: 128,
  window: null,
  layerPattern: ['global'],
  finalCap: null,
  normEps: 1e-5,
  initStd: 0.15,
  context: 512,
  tied: true,
};

const architectures: readonly ModelConfig[] = [
  gemma2,
  { ...gemma2, queryScalar: 18 },
  {
    ...llama,
    ...gemma,
    architecture: 'gemma3_text',
    layers: 7,
    queryKeyNorm: true,
    layerPattern: ['local', 'local', 'local', 'local', 'local', 'global'],
    window: 64,
    ropeBase: 1_000_000,
    localRopeBase: 10_000,
    queryScalar: 25,
  },
  { ...llama, ...gemma, architecture: 'gemma', postNorms: false },
  llama,
  {
    ...llama,
    tied: true,
    bias: { qkv: true, output: true },
    ropeBase: 500_000,
    ropeScaling: { kind: 'llama3', factor: 8, lowFrequency: 1, highFrequency: 4, context: 64 },
  },
  {
    ...llama,
    architecture: 'qwen2',
    heads: 2,
    kvHeads: 1,
    bias: { qkv: true, output: false },
    ropeScaling: { kind: 'linear', factor: 2 },
  },
  { ...llama, architecture: 'qwen3', queryKeyNorm: true, tied: true },
  { ...llama, architecture: 'smollm3', rotary: [true, true, true, false] },
  phi3,
  { ...phi3, tied: true, ropeScaling: { kind: 'linear', factor: 2 } },
  gpt2,
  { ...gpt2, tied: false },
];

/** Log-probabilities [T V] of what follows each token. */
async function ours(model: LanguageModel, ids: Int32Array): Promise<Float64Array[]> {
  const t = ids.length;
  const z = scope(() =>
    noGrad(() => {
      const positions = tensor(
        Int32Array.from({ length: t }, (_, i) => i),
        [1, t],
      );
      const logits = linear(reshape(model.hidden({ ids: tensor(ids, [1, t]), positions }), [t, -1]), model.head);
      return model.config.finalCap === null ? logits : softcap(logits, model.config.finalCap);
    }),
  );
  const all = await readAs(z, 'f32');
  z.dispose();
  return Array.from({ length: t }, (_, i) => logSoftmax(all.subarray(i * V, (i + 1) * V)));
}

function logSoftmax(logits: ArrayLike<number>): Float64Array {
  const most = Math.max(...Array.from(logits));
  const total = Math.log(Array.from(logits).reduce((sum, z) => sum + Math.exp(z - most), 0));
  return Float64Array.from(logits, (z) => z - most - total);
}

/** The same of llama.cpp. */
async function theirs(model: LlamaModel, ids: Int32Array, lora?: string): Promise<Float64Array[]> {
  const context = await model.createContext({
    contextSize: 512,
    sequences: 1,
    flashAttention: false,
    threads: 1,
    ...(lora !== undefined && { lora }),
  });
  const options = { temperature: 1, topK: 0, topP: 1, minP: 0 };
  const tokens = Array.from(ids, (id) => [id as Token, { generateNext: { probabilities: true, options } }] as [Token, never]);
  const out = await context.getSequence().controlledEvaluate(tokens);
  await context.dispose();
  return out.map((each) => {
    const p = (each as { next: { probabilities: Map<Token, number> } }).next.probabilities;
    return Float64Array.from({ length: V }, (_, id) => Math.log(p.get(id as Token) ?? 0));
  });
}

const best = (p: Float64Array): number => p.indexOf(Math.max(...p));

/** Root mean square difference of the log-probabilities of tokens that are not out of the question. */
function difference(a: readonly Float64Array[], b: readonly Float64Array[]): number {
  let squares = 0;
  let count = 0;
  for (const [i, p] of a.entries()) {
    for (const [id, logP] of p.entries()) {
      if (logP < -9) continue;
      squares += (logP - b[i]![id]!) ** 2;
      count++;
    }
  }
  return Math.sqrt(squares / count);
}

/** How far the best token of b is from the best of a, where they differ most. */
function doubt(a: readonly Float64Array[], b: readonly Float64Array[]): number {
  return Math.max(...a.map((p, i) => p[best(p)]! - p[best(b[i]!)]!));
}

const ids = Int32Array.from({ length: T }, (_, i) => (i * i * 31 + i * 7 + 5) % 288);

/** What the model says, what it says when it was read back from its file, and what llama.cpp says. */
async function answers(config: ModelConfig, type: GgufType) {
  const path = join(folder, 'model.gguf');
  const original = withBiases(createModel(config, { seed: 3, trainable: false }));
  const notes = await exportGguf(path, original, tokenizer, { type });
  await using file = await openGgufModel(path);
  const again = createModel(file.config, { trainable: false });
  await file.fill(again.parameters);
  const model = await llamaCpp.loadModel({ modelPath: path, gpuLayers: 0 });
  const result = {
    notes,
    config: file.config,
    original: await ours(original, ids),
    again: await ours(again, ids),
    llamaCpp: await theirs(model, ids),
  };
  await model.dispose();
  original.dispose();
  again.dispose();
  return result;
}

/** Biases and norms begin as constants, which a wrong order of rows would not change. */
function withBiases(model: LanguageModel): LanguageModel {
  for (const { name, tensor: t } of model.parameters.list) {
    if (t.shape.length !== 1) continue;
    const start = name.endsWith('.bias') ? 0 : 1 - ('normOffset' in model.config ? model.config.normOffset : 0);
    model.parameters.write(
      name,
      0,
      Float32Array.from({ length: t.size }, (_, i) => start + 0.3 * Math.sin(i * 1.7 + t.size)),
    );
  }
  model.parameters.refresh();
  return model;
}

describe('log-probabilities over 256 positions', () => {
  // llama.cpp rounds activations, keys and values as it rounds weights, so its answers are about as far from those of the rounded model as
  // these are from the model's; the best token may change only where two are closer than that.
  test.each(architectures.map((config) => [config.architecture, config] as const))(
    '%s',
    { timeout: 60_000 },
    async (_, config) => {
      for (const [type, limit] of [
        ['f16', 0.01],
        ['q8_0', 0.25],
      ] as const) {
        const r = await answers(config, type);
        const rounding = difference(r.original, r.again);
        expect(rounding).toBeLessThan(limit);
        expect(difference(r.again, r.llamaCpp)).toBeLessThan(2 * rounding);
        expect(doubt(r.again, r.llamaCpp)).toBeLessThan(8 * rounding);
        expect(r.notes).toEqual([]);
        const { queryScalar: _, initStd: __, ...same } = { queryScalar: 0, ...config };
        expect(r.config).toMatchObject(same);
        if (config.window !== null) {
          // The window bites: without it the answers are others.
          const wide = withBiases(
            createModel({ ...config, window: null, layerPattern: ['global'] }, { seed: 3, trainable: false }),
          );
          expect(difference(r.original, await ours(wide, ids))).toBeGreaterThan(20 * rounding);
          wide.dispose();
        }
      }
    },
  );

  test.each([{ ...llama, architecture: 'mistral' } as const, phi3])(
    '$architecture: the same up to its window, which llama.cpp does not follow, as the export says',
    {
      timeout: 60_000,
    },
    async (config) => {
      const { architecture } = config;
      const r = await answers({ ...config, window: 64, layerPattern: ['local'] }, 'f16');
      const first = (all: readonly Float64Array[]) => all.slice(0, 64);
      const rounding = difference(first(r.original), first(r.again));
      expect(difference(first(r.again), first(r.llamaCpp))).toBeLessThan(2 * rounding);
      expect(difference(r.again, r.llamaCpp)).toBeGreaterThan(20 * rounding);
      expect(r.notes).toEqual([expect.stringContaining('does not follow the window of 64')]);
      expect(r.config).toMatchObject({ architecture, window: 64, layerPattern: ['local'] });
      const whole = await answers(config, 'f16');
      expect(difference(whole.again, whole.llamaCpp)).toBeLessThan(2 * difference(whole.original, whole.again));
      expect(whole.notes).toEqual([]);
    },
  );

  test.each([
    ['short', 1024, 1],
    ['long', 128, 0.75],
  ] as const)('LongRoPE by the factors of %s texts', { timeout: 60_000 }, async (_, context, rotaryShare) => {
    const factors = (most: number) => Array.from({ length: 8 * rotaryShare }, (_, i) => 1 + (most * i) / 8);
    const ropeScaling = { kind: 'longrope', short: factors(1), long: factors(12), context, magnitude: 1.25 } as const;
    const config: DecoderConfig = { ...phi3, context: 2048, ropeScaling, ...(rotaryShare === 1 ? {} : { rotaryShare }) };
    for (const type of ['f16', 'q8_0'] as const) {
      const r = await answers(config, type);
      const rounding = difference(r.original, r.again);
      expect(difference(r.again, r.llamaCpp)).toBeLessThan(2 * rounding);
      expect(doubt(r.again, r.llamaCpp)).toBeLessThan(8 * rounding);
      expect(r.notes).toEqual([expect.stringContaining(`given a context above ${context}`)]);
      expect(r.config).toMatchObject({ architecture: 'phi3', ropeScaling });
      const other = withBiases(createModel({ ...config, ropeScaling: null }, { seed: 3, trainable: false }));
      expect(difference(r.original, await ours(other, ids))).toBeGreaterThan(5 * rounding);
      other.dispose();
    }
  });

  test('mixtures of K types, and tensors whose rows are no whole blocks', { timeout: 60_000 }, async () => {
    const wide = { ...gemma2, width: 256, hidden: 512, layers: 8, heads: 8, initStd: 0.1 };
    const joint = { ...phi3, width: 256, hidden: 512, layers: 8, heads: 8, headSize: 32, queryScalar: 32, initStd: 0.1 };
    const learned = { ...gpt2, width: 256, hidden: 512, heads: 8, kvHeads: 8, headSize: 32, initStd: 0.1 };
    for (const [config, type, limit] of [
      [wide, 'q6_k', 0.3],
      [wide, 'q5_k_m', 0.6],
      [wide, 'q4_k_m', 1],
      [joint, 'q4_k_m', 1.5],
      [learned, 'q5_k_m', 0.6],
    ] as const) {
      const r = await answers(config, type);
      const rounding = difference(r.original, r.again);
      expect(rounding).toBeLessThan(limit);
      expect(difference(r.again, r.llamaCpp)).toBeLessThan(rounding);
      expect(r.notes).toEqual([]);
    }
    const odd = await answers({ ...llama, width: 72, headSize: 18, queryScalar: 18, hidden: 96 }, 'q4_k_m');
    expect(odd.notes).toEqual([
      expect.stringMatching(/^30 of 39 tensors are kept as F16 and Q8_0: their rows are no multiples of 256/),
    ]);
    expect(difference(odd.again, odd.llamaCpp)).toBeLessThan(difference(odd.original, odd.again) * 2);
  });
});

describe('an adapter beside the file of its base', () => {
  test.each<[string, ModelConfig, AdapterOptions]>([
    ['llama', llama, { rank: 4, alpha: 6 }],
    ['llama', llama, { rank: 2, init: 'olora', rankStabilized: true, targets: ['q_proj', 'down_proj'] }],
    ['gemma2', { ...gemma2, queryScalar: 18 }, { rank: 3, targets: ['q_proj', 'v_proj', '*.mlp.*'] }],
    ['phi3', phi3, { rank: 4, targets: ['q_proj', 'v_proj', 'o_proj', 'up_proj'] }],
    ['gpt2', gpt2, { rank: 4 }],
  ])('%s', { timeout: 60_000 }, async (_, config, options) => {
    const paths = { base: join(folder, 'base.gguf'), adapter: join(folder, 'adapter.gguf') };
    const model = withBiases(createModel(config, { seed: 3, trainable: false }));
    const before = await ours(model, ids);
    const adapter = await createAdapter(model, options);
    for (const { name, tensor: t } of adapter.parameters.list) {
      if (!name.endsWith('lora_B.weight')) continue;
      adapter.parameters.write(
        name,
        0,
        Float32Array.from({ length: t.size }, (_, i) => 0.1 * Math.sin(i * 1.3 + t.size)),
      );
    }
    adapter.parameters.refresh();
    await exportGgufAdapter(paths.adapter, model, adapter);
    const applied = await ours(model, ids);
    setAdapter(model, null);
    await exportGguf(paths.base, model, tokenizer, { type: 'f32' });
    const peer = await llamaCpp.loadModel({ modelPath: paths.base, gpuLayers: 0 });
    // llama.cpp rounds keys and values to float16.
    const rounding = difference(before, await theirs(peer, ids));
    expect(difference(applied, await theirs(peer, ids, paths.adapter))).toBeLessThan(4 * rounding);
    expect(difference(applied, before)).toBeGreaterThan(20 * rounding);
    await peer.dispose();
    adapter.dispose();
    model.dispose();
  });

  test('DoRA is refused', async () => {
    const model = createModel(llama, { seed: 3, trainable: false });
    const adapter = await createAdapter(model, { kind: 'dora' });
    await expect(exportGgufAdapter(join(folder, 'dora.gguf'), model, adapter)).rejects.toThrow(/kind dora/);
    adapter.dispose();
    model.dispose();
  });
});

const samples = [
  'the people of this country',
  ' two  spaces   12  and 1790, 2021 \n\n 3\n4  x',
  "they're here; we'll SEE, it's 3.14 \t tab\r\n",
  'ünï çödé 日本語 ١٢٣ 😀 Ⅷ x²',
  '',
  '   ',
  'the<eos>people <bos> free<pad>',
];

describe('tokens', () => {
  const tokensOf = async (own: Tokenizer) => {
    const path = join(folder, 'tokens.gguf');
    const model = createModel({ ...llama, vocabSize: own.vocabSize + 3 }, { seed: 1, trainable: false });
    const notes = await exportGguf(path, model, own, {
      type: 'q8_0',
      chatTemplate: "{%- generation %}{{ 'x' }}{% endgeneration -%}",
    });
    model.dispose();
    const theirs = await llamaCpp.loadModel({ modelPath: path, gpuLayers: 0, vocabOnly: true });
    const ids = samples.map((sample) => [...theirs.tokenize(sample, true)]);
    const special = { bos: theirs.tokens.bos, eos: theirs.tokens.eos, addsBos: theirs.tokens.shouldPrependBosToken };
    await theirs.dispose();
    await using file = await openGgufModel(path);
    return { ids, special, notes, again: file.tokenizer() };
  };

  test.each(['digits', 'gpt2', 'llama3', 'qwen2'] as const)('bytes cut as %s', { timeout: 60_000 }, async (preTokenizer) => {
    const own = await trainTokenizer([text, ...samples.map((sample) => sample.repeat(3))], { vocabSize: 400, preTokenizer });
    const { ids, special, notes, again } = await tokensOf(own);
    for (const [i, sample] of samples.entries()) {
      expect(ids[i], sample).toEqual([...own.encode(sample)]);
      expect([...again.encode(sample)], sample).toEqual(ids[i]);
    }
    expect(special).toEqual({ bos: own.bos, eos: own.eos, addsBos: true });
    expect(notes).toEqual([]);
    expect([again.vocabSize, again.fingerprint]).toEqual([own.vocabSize, own.fingerprint]);
    expect([again.bos, again.eos, again.pad, again.unk]).toEqual([own.bos, own.eos, own.pad, own.unk]);
    expect(again.file.config.chat_template).toBe("{%- if true %}{{ 'x' }}{% endif -%}");
  });

  test.each([true, false])(
    'characters with fallback to bytes, a space before every text: %s',
    { timeout: 60_000 },
    async (prepend) => {
      const own = tokenizerFromJson(JSON.stringify(sentencePiece(prepend)));
      expect(own.engine).toBe('native');
      const { ids, special, notes, again } = await tokensOf(own);
      for (const [i, sample] of samples.slice(0, 6).entries()) {
        expect(ids[i], sample).toEqual([...own.encode(sample)]);
        expect([...again.encode(sample)], sample).toEqual(ids[i]);
      }
      expect(special).toEqual({ bos: 2, eos: 1, addsBos: true });
      expect(notes).toEqual([]);
      expect([again.engine, again.fingerprint]).toEqual(['native', own.fingerprint]);
      expect(again.decode(again.encode(samples[3]!))).toBe(samples[3]);
    },
  );
});

/** A small vocabulary in the form of Llama 2's and Gemma's. */
function sentencePiece(prepend: boolean) {
  const pieces = [
    '<pad>',
    '<eos>',
    '<bos>',
    '<unk>',
    ...Array.from({ length: 256 }, (_, b) => `<0x${b.toString(16).toUpperCase().padStart(2, '0')}>`),
  ];
  const words = [
    '▁▁',
    'th',
    '▁th',
    '▁the',
    'the',
    'is',
    '▁is',
    'it',
    '▁p',
    'eo',
    'ple',
    'le',
    '▁peo',
    '▁people',
    'ple',
    '12',
    '▁12',
    'un',
    'ou',
    'an',
    'and',
    'nd',
    're',
    'ee',
  ];
  const letters = [...new Set([...'▁abcdefghijklmnopqrstuvwxyz0123456789ü日', ...words.join('')])];
  const vocab = new Map([...pieces, ...words, ...letters].map((token) => [token, 0]));
  for (const [id, token] of [...vocab.keys()].entries()) vocab.set(token, id);
  const merges = [...new Set(words)].flatMap((word) =>
    Array.from({ length: word.length - 1 }, (_, i) => [word.slice(0, i + 1), word.slice(i + 1)] as const).filter(
      ([a, b]) => vocab.has(a) && vocab.has(b),
    ),
  );
  const spaces = { type: 'Replace', pattern: { String: ' ' }, content: '▁' };
  const flags = { single_word: false, lstrip: false, rstrip: false, normalized: false, special: true };
  return {
    added_tokens: pieces.slice(0, 4).map((content, id) => ({ id, content, ...flags })),
    normalizer: prepend ? { type: 'Sequence', normalizers: [{ type: 'Prepend', prepend: '▁' }, spaces] } : spaces,
    pre_tokenizer: null,
    post_processor: {
      type: 'TemplateProcessing',
      single: [{ SpecialToken: { id: '<bos>', type_id: 0 } }, { Sequence: { id: 'A', type_id: 0 } }],
    },
    decoder: {
      type: 'Sequence',
      decoders: [
        { type: 'Replace', pattern: { String: '▁' }, content: ' ' },
        { type: 'ByteFallback' },
        { type: 'Fuse' },
        ...(prepend ? [{ type: 'Strip', content: ' ', start: 1, stop: 0 }] : []),
      ],
    },
    model: {
      type: 'BPE',
      unk_token: '<unk>',
      fuse_unk: true,
      byte_fallback: true,
      ignore_merges: false,
      vocab: Object.fromEntries(vocab),
      merges,
    },
  };
}
