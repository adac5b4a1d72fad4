// Our ONNX files in ONNX Runtime: its logits and its greedy text are ours.
import { mkdtemp, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { InferenceSession, Tensor as OrtTensor } from 'onnxruntime-node';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { halfValues, toHalf } from '../../src/io/half.ts';
import { type OnnxTensor, type OnnxType, writeOnnx } from '../../src/io/onnx.ts';
import type { DecoderConfig } from '../../src/models/decoder.ts';
import type { Gpt2Config } from '../../src/models/gpt2.ts';
import { createModel, type LanguageModel, type ModelConfig, modelConfig, saveModel } from '../../src/models/model.ts';
import { exportOnnx } from '../../src/models/onnx.ts';
import { createAdapter } from '../../src/nn/lora.ts';
import { softcap } from '../../src/ops/elementwise.ts';
import { linear } from '../../src/ops/linear.ts';
import { reshape } from '../../src/ops/reshape.ts';
import { scope } from '../../src/tensor/scope.ts';
import { noGrad } from '../../src/tensor/tape.ts';
import { readAs, tensor } from '../../src/tensor/tensor.ts';
import { trainTokenizer } from '../../src/tokenizer/train.ts';
import { limbeckHere } from '../cli/process.ts';

let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'limbeck-onnx-'));
});
afterAll(() => rm(folder, { recursive: true, force: true }));

const llama = modelConfig('smollm2-135m', {
  ...{ vocabSize: 83, width: 24, layers: 3, heads: 4, kvHeads: 2, headSize: 8, hidden: 40, context: 64 },
  ...{ tied: false, queryScalar: 8, ropeBase: 10_000, normEps: 1e-6, initStd: 0.3 },
}) as DecoderConfig;
const gemma = { activation: 'gelu', normOffset: 1, postNorms: true, scaledEmbedding: true, tied: true } as const;
const local = { layerPattern: ['local', 'global'], window: 5 } as const;

const gpt2: Gpt2Config = {
  architecture: 'gpt2',
  ...{ vocabSize: 83, width: 24, layers: 3, heads: 4, kvHeads: 4, headSize: 6, hidden: 40, context: 64 },
  ...{ window: null, layerPattern: ['global'], finalCap: null, normEps: 1e-5, initStd: 0.3, tied: true },
};

/** Each architecture with a change that must move its logits, so that what is changed is known to bite. */
const architectures: readonly (readonly [DecoderConfig, Partial<DecoderConfig>])[] = [
  [{ ...llama, architecture: 'gemma', ...gemma, postNorms: false, kvHeads: 1 }, { ropeBase: 100 }],
  [{ ...llama, architecture: 'gemma2', ...gemma, ...local, attentionCap: 2, finalCap: 3, queryScalar: 5 }, { window: 6 }],
  [
    {
      ...llama,
      architecture: 'gemma3_text',
      ...gemma,
      layerPattern: ['local', 'local', 'global'],
      window: 4,
      queryKeyNorm: true,
      ropeBase: 1_000_000,
      localRopeBase: 100,
      ropeScaling: { kind: 'linear', factor: 8 },
    },
    { localRopeBase: 1000 },
  ],
  [
    {
      ...llama,
      kvHeads: 4,
      ropeScaling: { kind: 'llama3', factor: 8, lowFrequency: 1, highFrequency: 4, context: 16 },
    },
    { ropeScaling: null },
  ],
  [{ ...llama, architecture: 'mistral', layerPattern: ['local'], window: 6 }, { window: 7 }],
  [{ ...llama, architecture: 'qwen2', bias: { qkv: true, output: false }, tied: true }, { ropeBase: 100 }],
  [{ ...llama, architecture: 'qwen3', queryKeyNorm: true, headSize: 10, heads: 6, queryScalar: 10 }, { ropeBase: 100 }],
  [{ ...llama, architecture: 'phi3' }, { ropeBase: 100 }],
  // As long texts are turned, and in part.
  [
    {
      ...llama,
      architecture: 'phi3',
      rotaryShare: 0.75,
      ropeScaling: { kind: 'longrope', short: [1, 2, 3], long: [1, 3, 9], context: 10, magnitude: 1.2 },
    },
    { rotaryShare: 1, ropeScaling: null },
  ],
  [{ ...llama, architecture: 'smollm3', rotary: [true, false] }, { rotary: [true] }],
];

/** Random weights, norms and biases included. */
function randomModel(config: ModelConfig): LanguageModel {
  const model = createModel(config, { seed: 3, trainable: false });
  for (const { name, tensor: t } of model.parameters.list) {
    if (t.shape.length !== 1) continue;
    const start = name.endsWith('bias') ? 0 : 1 - ('normOffset' in config ? config.normOffset : 0);
    model.parameters.write(
      name,
      0,
      Float32Array.from({ length: t.size }, (_, i) => start + 0.4 * Math.sin(7 * i + name.length)),
    );
  }
  model.parameters.refresh();
  return model;
}

/** Our logits [T V] of one sequence. */
async function logitsOf(model: LanguageModel, ids: readonly number[]): Promise<Float32Array> {
  const shape = [1, ids.length];
  const z = scope(() =>
    noGrad(() => {
      const positions = tensor(Int32Array.from(ids.keys()), shape);
      const y = linear(model.hidden({ ids: tensor(Int32Array.from(ids), shape), positions }), model.head);
      return reshape(model.config.finalCap === null ? y : softcap(y, model.config.finalCap), [ids.length, -1]);
    }),
  );
  return readAs(z, 'f32').finally(() => z.dispose());
}

const open = (path: string): Promise<InferenceSession> => InferenceSession.create(path, { intraOpNumThreads: 1 });
const int64 = (values: readonly number[], shape: readonly number[]): OrtTensor =>
  new OrtTensor('int64', BigInt64Array.from(values, BigInt), shape);

/** Sequences of different length side by side, padded on the left, with the cache between calls. */
function sequences(session: InferenceSession, c: ModelConfig, all: readonly (readonly number[])[]) {
  const longest = Math.max(...all.map((ids) => ids.length));
  const padding = all.map((ids) => longest - ids.length);
  let length = 0;
  let past: Record<string, OrtTensor> = {};
  for (let i = 0; i < c.layers; i++) {
    for (const kind of ['key', 'value']) {
      past[`past_key_values.${i}.${kind}`] = new OrtTensor('float32', new Float32Array(0), [
        all.length,
        c.kvHeads,
        0,
        c.headSize,
      ]);
    }
  }
  const range = (n: number): number[] => Array.from({ length: n }, (_, i) => i);
  return {
    padding,
    /** Logits [B T V] of the next tokens [B T]. */
    async step(next: readonly (readonly number[])[]): Promise<Float32Array> {
      const t = next[0]!.length;
      const total = length + t;
      const outputs = await session.run({
        input_ids: int64(next.flat(), [next.length, t]),
        attention_mask: int64(
          padding.flatMap((p) => range(total).map((i) => (i < p ? 0 : 1))),
          [next.length, total],
        ),
        position_ids: int64(
          padding.flatMap((p) => range(t).map((i) => Math.max(0, length + i - p))),
          [next.length, t],
        ),
        ...past,
      });
      length = total;
      past = Object.fromEntries(
        session.inputNames.slice(3).map((name) => [name, outputs[name.replace('past_key_values', 'present')]!]),
      );
      for (const { dims } of Object.values(past)) expect(dims).toEqual([next.length, c.kvHeads, total, c.headSize]);
      expect(outputs.logits!.dims).toEqual([next.length, t, c.vocabSize]);
      return outputs.logits!.data as Float32Array;
    },
    /** The prompts as the first call takes them. */
    prompts: all.map((ids, i) => [...Array<number>(padding[i]!).fill(0), ...ids]),
  };
}

function largest(a: Float32Array, b: Float32Array): number {
  expect(a.length).toBe(b.length);
  return a.reduce((most, value, i) => Math.max(most, Math.abs(value - b[i]!)), 0);
}

function argmax(logits: Float32Array): number {
  return logits.reduce((best, value, i) => (value > logits[best]! ? i : best), 0);
}

const prompts = [
  Array.from({ length: 20 }, (_, i) => (i * i * 7 + 3 * i + 11) % 83),
  Array.from({ length: 13 }, (_, i) => (i * 31 + 5) % 83),
];

const cases: readonly (readonly [ModelConfig, object])[] = [
  ...architectures,
  [gpt2, { normEps: 0.5 }],
  [{ ...gpt2, tied: false, hidden: 96 }, { normEps: 0.5 }],
];
describe.each(cases.map(([config, change], i) => [`${config.architecture} ${i}`, config, change] as const))(
  '%s',
  (name, config, change) => {
    let model: LanguageModel;
    let session: InferenceSession;
    beforeAll(async () => {
      model = randomModel(config);
      await exportOnnx(join(folder, name), model);
      session = await open(join(folder, name, 'onnx', 'model.onnx'));
      return async () => {
        model.dispose();
        await session.release();
      };
    });

    test('logits of two sequences, one padded on the left', async () => {
      const batch = sequences(session, config, prompts);
      const logits = await batch.step(batch.prompts);
      const size = batch.prompts[0]!.length * config.vocabSize;
      for (const [i, ids] of prompts.entries()) {
        const theirs = logits.subarray(i * size + batch.padding[i]! * config.vocabSize, (i + 1) * size);
        const ours = await logitsOf(model, ids);
        expect(Math.max(...ours)).toBeGreaterThan(0.5);
        expect(largest(theirs, ours)).toBeLessThan(1e-4);
      }
      const other = randomModel({ ...config, ...change } as ModelConfig);
      expect(largest(await logitsOf(other, prompts[0]!), await logitsOf(model, prompts[0]!))).toBeGreaterThan(0.02);
      other.dispose();
    });

    test('32 greedy tokens with the cache', async () => {
      const batch = sequences(session, config, prompts);
      let next: readonly (readonly number[])[] = batch.prompts;
      const written = prompts.map((): number[] => []);
      for (let step = 0; step < 32; step++) {
        const logits = await batch.step(next);
        const size = next[0]!.length * config.vocabSize;
        next = prompts.map((_, i) => [argmax(logits.subarray((i + 1) * size - config.vocabSize, (i + 1) * size))]);
        for (const [i, [id]] of next.entries()) written[i]!.push(id!);
      }
      for (const [i, prompt] of prompts.entries()) {
        const ids = [...prompt];
        for (let step = 0; step < 32; step++) ids.push(argmax((await logitsOf(model, ids)).subarray(-config.vocabSize)));
        expect(written[i]).toEqual(ids.slice(prompt.length));
      }
    });
  },
);

test.each([
  ['gemma2', architectures[1]![0], { rank: 3 }],
  ['gpt2, DoRA', gpt2, { rank: 2, kind: 'dora' }],
] as const)('%s: weights are written with the change of the adapter in use', async (name, config, options) => {
  const model = randomModel(config);
  const before = await logitsOf(model, prompts[0]!);
  const adapter = await createAdapter(model, options);
  for (const { name, tensor: t } of adapter.parameters.list)
    if (name.endsWith('lora_B.weight'))
      adapter.parameters.write(
        name,
        0,
        Float32Array.from({ length: t.size }, (_, i) => 0.1 * Math.sin(i * 1.3 + t.size)),
      );
  adapter.parameters.refresh();
  const ours = await logitsOf(model, prompts[0]!);
  await exportOnnx(join(folder, name), model);
  expect(await logitsOf(model, prompts[0]!)).toEqual(ours);
  const session = await open(join(folder, name, 'onnx', 'model.onnx'));
  const batch = sequences(session, config, prompts.slice(0, 1));
  const theirs = await batch.step(batch.prompts).finally(() => session.release());
  expect(largest(theirs, ours)).toBeLessThan(1e-4);
  expect(largest(ours, before)).toBeGreaterThan(0.1);
  adapter.dispose();
  model.dispose();
});

describe('the folder', () => {
  const [config] = architectures[1]!;
  let model: LanguageModel;
  beforeAll(() => {
    model = randomModel(config);
    return () => model.dispose();
  });
  const logits = async (path: string): Promise<Float32Array> => {
    const session = await open(path);
    const batch = sequences(session, config, prompts.slice(0, 1));
    return batch.step(batch.prompts).finally(() => session.release());
  };

  test('f16 and external weights stand beside the others, and config.json tells of both', async () => {
    const out = join(folder, 'variants');
    const tokenizer = await trainTokenizer(['one two three two one'], { vocabSize: 270 });
    const shown: number[] = [];
    await exportOnnx(out, model, tokenizer, { onProgress: ({ done, total }) => shown.push(done / total) });
    expect(shown.at(-1)).toBe(1);
    await exportOnnx(out, model, tokenizer, { type: 'f16', external: true });
    expect((await readdir(out)).sort()).toEqual([
      'config.json',
      'generation_config.json',
      'onnx',
      'tokenizer.json',
      'tokenizer_config.json',
    ]);
    const files = ['model.onnx', 'model_fp16.onnx', 'model_fp16.onnx_data'];
    expect((await readdir(join(out, 'onnx'))).sort()).toEqual(files);
    const json = JSON.parse(await readFile(join(out, 'config.json'), 'utf8'));
    expect(json.model_type).toBe('gemma2');
    expect(json['transformers.js_config']).toEqual({ dtype: 'fp16', use_external_data_format: { 'model_fp16.onnx': 1 } });

    const rounded = randomModel(config);
    const halves = (values: Float32Array): Float32Array =>
      Float32Array.from(new Int32Array(values.buffer, values.byteOffset, values.length), (bits) => halfValues()[toHalf(bits)]!);
    for (const { name, tensor: t } of rounded.parameters.list) {
      if (t.shape.length > 1) rounded.parameters.write(name, 0, halves(await readAs(t, 'f32')));
    }
    rounded.parameters.refresh();
    const ours = await logitsOf(rounded, prompts[0]!);
    rounded.dispose();
    expect(largest(await logits(join(out, 'onnx', 'model_fp16.onnx')), ours)).toBeLessThan(1e-4);
    const inside = await logits(join(out, 'onnx', 'model.onnx'));
    await exportOnnx(out, model, tokenizer, { external: true });
    expect((await stat(join(out, 'onnx', 'model.onnx'))).size).toBeLessThan(100_000);
    expect(await logits(join(out, 'onnx', 'model.onnx'))).toEqual(inside);
    await exportOnnx(out, model, tokenizer, { external: false });
    expect((await readdir(join(out, 'onnx'))).sort()).toEqual(files);
  });

  test('a stopped export, a blocked path and weights that do not fit leave nothing', async () => {
    const out = join(folder, 'stopped');
    const stop = new AbortController();
    const stopped = exportOnnx(out, model, undefined, { external: true, signal: stop.signal, onProgress: () => stop.abort() });
    await expect(stopped).rejects.toThrow('aborted');
    expect(await readdir(join(out, 'onnx'))).toEqual([]);

    await writeFile(join(folder, 'file'), '');
    await expect(exportOnnx(join(folder, 'file'), model)).rejects.toMatchObject({ code: 'ERR_WRITE' });

    const fp8 = createModel(config, { seed: 1, trainable: false, weights: 'fp8' });
    await expect(exportOnnx(out, fp8)).rejects.toThrow(/exportOnnx: 'model\.layers\.0\..*' is kept in 8 or 4 bits/);
    fp8.dispose();
    const wide = randomModel(config);
    wide.parameters.write('model.embed_tokens.weight', 0, Float32Array.of(1e5));
    await expect(exportOnnx(out, wide, undefined, { type: 'f16' })).rejects.toThrow('f16 cannot hold');
    wide.dispose();
    expect(await readdir(join(out, 'onnx'))).toEqual([]);
  });
});

test('constants of every type and size come back, inside and outside', async () => {
  const types: Record<OnnxType, (size: number) => ArrayBufferView> = {
    float: (size) => Float32Array.from({ length: size }, (_, i) => i - 0.5),
    float16: (size) => Uint16Array.from({ length: size }, (_, i) => i),
    int64: (size) => BigInt64Array.from({ length: size }, (_, i) => BigInt(-i) * 2n ** 40n),
    bool: (size) => Uint8Array.from({ length: size }, (_, i) => i % 2),
  };
  const shapes = [[], [0], [1], [3, 0, 2], [127], [128, 3], [1, 1, 5000]];
  const tensors = Object.entries(types).flatMap(([type, make]) =>
    shapes.map((shape, i): OnnxTensor => {
      const data = make(shape.reduce((a, b) => a * b, 1));
      const bytes = new Uint8Array(data.buffer);
      // In two pieces, where there is anything to cut.
      const pieces = (): Uint8Array[] => [bytes.subarray(0, 1), bytes.subarray(1)];
      return { name: `${type} ${i}`, type: type as OnnxType, shape, data: i % 2 === 0 ? data : pieces };
    }),
  );
  const graph = {
    name: 'constants',
    inputs: [],
    outputs: tensors.map(({ name, type, shape }) => ({ name: `${name} out`, type, shape })),
    tensors,
    nodes: tensors.map(({ name }) => ({ op: 'Identity', name, inputs: [name], outputs: [`${name} out`] })),
  };
  for (const external of [false, true]) {
    const path = join(folder, `constants-${external}.onnx`);
    expect(await writeOnnx(path, graph, { external })).toBe(external);
    const session = await open(path);
    const outputs = await session.run({});
    for (const { name, shape, type } of tensors) {
      const { data, dims } = outputs[`${name} out`]!;
      const made = types[type](shape.reduce((a, b) => a * b, 1));
      const bytes = (view: ArrayBufferView): Uint8Array => new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
      expect(dims, name).toEqual(shape);
      expect(bytes(data as Float32Array), name).toEqual(bytes(made));
    }
    await session.release();
  }
  const short = { ...graph, tensors: [{ name: 'x', type: 'float', shape: [3], data: new Float32Array(2) }] } as const;
  await expect(writeOnnx(join(folder, 'short.onnx'), short)).rejects.toMatchObject({ code: 'ERR_ONNX_TENSOR', actual: '8' });
});

test('limbeck export --to onnx', async () => {
  const tokenizer = await trainTokenizer(['one two three two one'], { vocabSize: 270 });
  const model = randomModel({ ...architectures[1]![0], vocabSize: 270 });
  const files = { 'chat_template.jinja': '{% generation %}x{% endgeneration %}', 'generation_config.json': '{"top_k": 20}' };
  await saveModel(join(folder, 'saved'), model, tokenizer, { files });
  model.dispose();
  const out = join(folder, 'exported');
  const result = await limbeckHere(['export', join(folder, 'saved'), '--to', 'onnx', '--type', 'f16', '--out', out]);
  expect(result).toEqual({ code: 0, out: `${out}\n`, err: '' });
  expect(await readdir(join(out, 'onnx'))).toEqual(['model_fp16.onnx']);
  const json = async (name: string) => JSON.parse(await readFile(join(out, name), 'utf8'));
  expect((await json('tokenizer_config.json')).chat_template).toBe('{% if true %}x{% endif %}');
  expect(await json('generation_config.json')).toEqual({ bos_token_id: 2, eos_token_id: 1, pad_token_id: 0, top_k: 20 });
});
