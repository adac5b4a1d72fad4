// What TypeScript refuses, from callers without it: a typed error that names function and argument, never what JavaScript says.
import { expect, test } from 'vitest';
import * as limbeck from '../src/index.ts';

const untyped = limbeck as unknown as Record<string, (...args: unknown[]) => unknown>;
const someModel = { config: {}, parameters: {}, hidden() {} };

test.each<[string, unknown[], string]>([
  ['tensor', [], 'data is undefined, expected an array of numbers'],
  ['tensor', [{}], 'data is object, expected an array of numbers'],
  ['zeros', [3], 'shape is number, expected a list of sizes'],
  ['empty', [], 'shape is undefined, expected a list of sizes'],
  ['tensor', [[1], [1], { trainable: true }], 'dtype is object, expected one of f32, bf16'],
  ['zeros', [[1], 'float32'], "dtype is 'float32', expected one of f32, bf16"],
  ['add', [{}, {}], 'an argument has no handle, expected a tensor'],
  ['add', ['x', 'y'], 'an argument is string, expected a tensor'],
  ['softmax', [null, 1], 'an argument is null, expected a tensor'],
  ['linear', [{}, undefined], 'w is undefined, expected a tensor'],
  ['attention', [], 'q is undefined, expected a tensor'],
  ['graph', [], 'f is undefined, expected a function'],
  ['memory', ['gpu'], 'device is gpu; give one of cpu, cuda, plan'],
  ['createModel', [], 'config is undefined, expected a config'],
  ['createAdapter', [{}], 'model has no parameters'],
  ['createOptimizer', [], "parameters is undefined, expected a model's"],
  ['createOptimizer', [{}, {}], 'parameters has no values'],
  ['createOptimizer', [{ values: {}, groups: [] }], 'options is undefined, expected settings'],
  ['loadModel', [], 'folder is undefined, expected the path of a model folder'],
  ['loadWeights', [{}], 'folder is object'],
  ['loadConfig', [1], 'folder is number'],
  ['loadTokenizer', [], 'path is undefined, expected the path of a tokenizer.json'],
  ['loadAdapter', [], 'folder is undefined'],
  ['loadAdapter', ['x'], 'model is undefined'],
  ['loadRun', [], 'path is undefined'],
  ['loadChatTemplate', [], 'folder is undefined'],
  ['saveModel', ['/nowhere'], 'model is undefined'],
  ['evaluateModel', [{}, []], 'model has no config'],
  ['exportGguf', ['x.gguf'], 'model is undefined'],
  ['exportOnnx', ['x', {}], 'model has no config'],
  ['complete', [someModel], 'tokenizer is undefined'],
  ['complete', [someModel, { encode() {}, decoder() {} }], 'prompts is undefined, expected a list of texts'],
])('%s(%j)', async (name, args, message) => {
  const call = async () => untyped[name]!(...args);
  await expect(call()).rejects.toMatchObject({ name: 'ConfigError', message: expect.stringContaining(message) });
});

test('generators refuse with their first step', async () => {
  for (const name of ['generateText', 'streamText', 'generateTokens', 'completions']) {
    const steps = untyped[name]!({}) as AsyncGenerator;
    await expect(steps.next()).rejects.toMatchObject({ code: 'ERR_ARGUMENT', argument: 'model' });
  }
});
