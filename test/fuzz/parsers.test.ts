import { expect, test } from 'vitest';
import { fuzz } from './parsers.ts';

// A short run of what `npm run fuzz` does for a million inputs.
test.each([
  ['gguf', 4000],
  ['safetensors', 8000],
  ['tokenizer', 300],
  ['rows', 500],
  ['parquet', 300],
  ['run', 300],
  ['config', 500],
  ['index', 300],
  ['adapter', 200],
  ['adapterweights', 200],
] as const)('%s: %d mutated files give an answer or a typed error, at once', async (target, inputs) => {
  const report = await fuzz(target, inputs, 20_261_127);
  expect(report.inputs).toBe(inputs);
  expect(report.accepted).toBeGreaterThan(0);
  expect(report.accepted).toBeLessThan(inputs);
  expect(report.slowest.ms, `input ${report.slowest.index}`).toBeLessThan(5000);
  expect(report.memory).toBeLessThan(512 * 2 ** 20);
});
