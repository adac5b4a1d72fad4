// How fast weights are packed into ggml's types and unpacked, in memory, and a model as a GGUF file, out and in.

import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { createModel, exportGguf, init, loadWeights, modelConfig, sync } from '../src/index.ts';
import { decodeBlocks, encodeBlocks, type GgmlType, type GgmlTypeName, ggmlTypes, readableTypes } from '../src/io/ggml.ts';
import { appendResults, type Result, spread } from './results.ts';

const VALUES = 1 << 20;
const { values: options } = parseArgs({
  options: { rounds: { type: 'string', default: '7' }, dry: { type: 'boolean', default: false } },
});
const results: Result[] = [];

/** Bytes of float32 a second, over rounds after one that warms up. */
async function measure(op: string, shape: string, dtype: string, count: number, work: () => Promise<unknown>): Promise<void> {
  await work();
  const rates: number[] = [];
  for (let round = 0; round < Number(options.rounds); round++) {
    const started = performance.now();
    await work();
    rates.push((4 * count) / (performance.now() - started) / 1000);
  }
  const rate = spread(rates);
  console.log(`${op} ${dtype}: ${rate.median.toFixed(0)} MB/s of float32 (${rate.p20.toFixed(0)} to ${rate.p80.toFixed(0)})`);
  results.push({ bench: 'ggml', op, shape, dtype, threads: 2, ...rate, unit: 'MB/s' });
}

const weights = Float32Array.from({ length: VALUES }, (_, i) => 0.04 * (Math.sin(i * 1.1) + Math.sin(i * i * 0.7)));
const back = new Float32Array(VALUES);
for (const name of readableTypes.filter((name) => name !== 'F32')) {
  const { values, bytes, limit } = ggmlTypes[name] as GgmlType;
  const packed = new Uint8Array((VALUES / values) * bytes).map((_, i) => (i * 37) & 63);
  if (limit !== undefined) await measure('pack', '4 MiB', name, VALUES, () => encodeBlocks(name as GgmlTypeName, weights));
  await measure('unpack', '4 MiB', name, VALUES, () => decodeBlocks(name, packed, back));
}

init();
const folder = await mkdtemp(join(tmpdir(), 'limbeck-ggml-'));
try {
  const sizes = { vocabSize: 32_000, width: 768, layers: 6, heads: 12, kvHeads: 4, hidden: 3072 };
  const model = createModel(modelConfig('gemma2-small', sizes), { seed: 1, trainable: false });
  const { count } = model.parameters;
  for (const type of ['f16', 'q8_0', 'q4_k_m'] as const) {
    const path = join(folder, `${type}.gguf`);
    const shape = `${(count / 1e6).toFixed(0)}M parameters`;
    await measure('export', shape, type, count, () => exportGguf(path, model, undefined, { type }));
    await measure('load', shape, type, count, async () => {
      const loaded = await loadWeights(path);
      await sync();
      loaded.dispose();
    });
  }
  model.dispose();
} finally {
  await rm(folder, { recursive: true });
}
if (!options.dry) appendResults(results);
