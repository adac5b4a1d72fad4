// Models whose matrices are kept in one byte an element.
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, describe, expect, test } from 'vitest';
import { type DecoderConfig, decoderSpec } from '../../src/models/decoder.ts';
import { createModel, type LanguageModel, loadWeights, saveModel } from '../../src/models/model.ts';
import { presets } from '../../src/models/presets.ts';
import { countParameters } from '../../src/nn/parameters.ts';
import { cast, softcap } from '../../src/ops/elementwise.ts';
import { linear } from '../../src/ops/linear.ts';
import { memory } from '../../src/tensor/engine.ts';
import { ConfigError } from '../../src/tensor/errors.ts';
import { scope } from '../../src/tensor/scope.ts';
import { noGrad } from '../../src/tensor/tape.ts';
import { readAs, type Tensor, tensor } from '../../src/tensor/tensor.ts';

const golden = join(import.meta.dirname, '../golden/gemma2');
const config: DecoderConfig = { ...presets['gemma2-micro'], vocabSize: 512 };
const frozen = { trainable: false, weights: 'fp8' } as const;
afterEach(() => expect(memory().tensors).toBe(0));

const tokens = Int32Array.from({ length: 96 }, (_, i) => (i * 37 + 11) % 60);

async function logits(model: LanguageModel): Promise<Float32Array> {
  const z: Tensor = scope(() =>
    noGrad(() => {
      const positions = Int32Array.from(tokens, (_, i) => i % 48);
      const hidden = model.hidden({ ids: tensor(tokens, [2, 48]), positions: tensor(positions, [2, 48]) });
      return cast(softcap(linear(hidden, model.head), model.config.finalCap!), 'f32');
    }),
  );
  const read = await readAs(z, 'f32');
  z.dispose();
  return read;
}

/** Size of the difference beside the size of what is expected. */
function relative(actual: Float32Array, expected: Float32Array): number {
  const size = (x: Float32Array): number => Math.sqrt(x.reduce((s, v) => s + v * v, 0));
  return size(actual.map((v, i) => v - expected[i]!)) / size(expected);
}

describe('against the same model in f32', () => {
  // Weights and tokens of each product are off by 2.6 % of their size; the random weights of a new model average nothing out.
  test.each([1, 2, 3])('logits of a new model, seed %i', async (seed) => {
    const [exact, rounded] = [createModel(config, { seed, trainable: false }), createModel(config, { seed, ...frozen })];
    const error = relative(await logits(rounded), await logits(exact));
    exact.dispose();
    rounded.dispose();
    expect(error).toBeLessThan(0.15);
    expect(error).toBeGreaterThan(0.01);
  });

  test('a model of a file', async () => {
    const [exact, rounded] = [await loadWeights(golden), await loadWeights(golden, { weights: 'fp8' })];
    const error = relative(await logits(rounded), await logits(exact));
    exact.dispose();
    rounded.dispose();
    expect(error).toBeLessThan(0.15);
  });
});

test.each(['fp8', 'q8', 'q4'] as const)('loading and making give the same bits in %s', async (weights) => {
  const folder = mkdtempSync(join(tmpdir(), 'limbeck-fp8-'));
  // Rows that do not divide what is read or rounded at once.
  const odd: DecoderConfig = { ...config, width: 126, hidden: 3001, layers: 1 };
  const exact = createModel(odd, { seed: 4 });
  await saveModel(folder, exact);
  exact.dispose();
  const [made, loaded] = [createModel(odd, { seed: 4, ...frozen, weights }), await loadWeights(folder, { weights })];
  for (const [i, { name, weight }] of made.parameters.weights.entries()) {
    const other = loaded.parameters.weights[i]!;
    expect(other.name).toBe(name);
    for (const part of ['codes', 'scale'] as const) {
      const [a, b] = [await other.weight[part].read(), await weight[part].read()];
      expect(Buffer.from(a.buffer).equals(Buffer.from(b.buffer)), name).toBe(true);
    }
  }
  expect(relative(await logits(loaded), await logits(made))).toBe(0);
  made.dispose();
  loaded.dispose();
  rmSync(folder, { recursive: true });
});

test('a matrix takes a byte an element and four a row', () => {
  const spec = decoderSpec(config);
  const before = memory().live;
  const model = createModel(config, { seed: 1, ...frozen });
  const taken = memory().live - before;
  const each = model.parameters.values.dtype === 'f32' ? 4 : 2;
  model.dispose();
  const rest = countParameters(spec.embed) + countParameters(spec.norm) + 4 * config.width * config.layers;
  const matrices = countParameters(spec) - rest;
  expect(taken).toBeGreaterThan(matrices + each * rest);
  expect(taken).toBeLessThan(1.05 * matrices + each * rest + 16_384);
});

test('it can be neither trained nor saved', async () => {
  expect(() => createModel(config, { weights: 'fp8' })).toThrow(ConfigError);
  const model = createModel(config, { seed: 1, ...frozen });
  await expect(saveModel(join(tmpdir(), 'limbeck-nothing'), model)).rejects.toThrow(/rounded to fp8/);
  model.dispose();
});
