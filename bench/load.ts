// How fast a checkpoint of 500 MB is loaded from the page cache, and how much memory that takes beyond the model's own.

import { execFileSync } from 'node:child_process';
import { mkdtemp, readFile, rm, stat, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { init, loadWeights, modelConfig, sync, writeSafetensors } from '../src/index.ts';
import { modelSpec } from '../src/models/registry.ts';
import { transformersText } from '../src/models/transformers.ts';
import { specsOf } from '../src/nn/parameters.ts';
import { appendResults, type Result, spread } from './results.ts';

const dtypes = ['F32', 'BF16', 'F16'] as const;
type FileDType = (typeof dtypes)[number];
const BYTES = 500e6;

interface Turn {
  readonly seconds: number;
  readonly file: number;
  /** Bytes at the worst moment beyond those of the parameters. */
  readonly extra: number;
}

/** A model of about as many bytes, with random bits that are small numbers in each dtype. */
async function writeCheckpoint(folder: string, dtype: FileDType): Promise<void> {
  const width = dtype === 'F32' ? 768 : 1088;
  const config = modelConfig('gemma2-small', {
    vocabSize: 32_000,
    width,
    layers: 12,
    heads: 12,
    kvHeads: 4,
    hidden: Math.round(BYTES / (dtype === 'F32' ? 4 : 2) / 36 / width) - 1200,
  });
  await writeFile(join(folder, 'config.json'), transformersText(config));
  const block = new Uint16Array(1 << 16).map((_, i) => 0x2c00 + ((i * 40_503) & 0x3ff));
  await writeSafetensors(
    join(folder, 'model.safetensors'),
    specsOf(modelSpec(config)).map(({ name, shape }) => ({
      name,
      dtype,
      shape,
      data: () => {
        const count = shape.reduce((a, b) => a * b, 1);
        const bits = new Uint16Array(dtype === 'F32' ? 2 * count : count);
        for (let at = 0; at < bits.length; at += block.length)
          bits.set(block.subarray(0, Math.min(block.length, bits.length - at)), at);
        return dtype === 'F32' ? new Float32Array(bits.buffer) : bits;
      },
    })),
  );
}

/** In a process of its own, so that nothing is warm but the page cache. */
async function load(folder: string, kept: 'f32' | 'bf16'): Promise<Turn> {
  init();
  const peak = async (): Promise<number> => 1024 * Number(/VmHWM:\s+(\d+)/.exec(await readFile('/proc/self/status', 'utf8'))![1]);
  const before = await peak();
  const started = performance.now();
  const model = await loadWeights(folder, { dtype: kept });
  await sync();
  const seconds = (performance.now() - started) / 1000;
  const { values } = model.parameters;
  const own = values.size * (values.dtype === 'f32' ? 4 : 2);
  return { seconds, file: (await stat(join(folder, 'model.safetensors'))).size, extra: (await peak()) - before - own };
}

async function main(): Promise<void> {
  const { values } = parseArgs({
    options: {
      one: { type: 'string' },
      kept: { type: 'string' },
      rounds: { type: 'string', default: '5' },
      dry: { type: 'boolean', default: false },
    },
  });
  if (values.one !== undefined) {
    console.log(JSON.stringify(await load(values.one, values.kept as 'f32')));
    return;
  }
  const folder = await mkdtemp(join(tmpdir(), 'limbeck-load-'));
  const results: Result[] = [];
  try {
    for (const [dtype, kept] of [
      ['F32', 'f32'],
      ['BF16', 'bf16'],
      ['BF16', 'f32'],
      ['F16', 'f32'],
    ] as const) {
      await writeCheckpoint(folder, dtype);
      const turns = Array.from({ length: Number(values.rounds) }, (): Turn => {
        const script = [fileURLToPath(new URL('../node_modules/.bin/jiti', import.meta.url)), fileURLToPath(import.meta.url)];
        return JSON.parse(execFileSync(process.execPath, [...script, '--one', folder, '--kept', kept], { encoding: 'utf8' }));
      });
      const rates = spread(turns.map(({ file, seconds }) => file / seconds / 1e9));
      const extra = Math.max(...turns.map((turn) => turn.extra));
      console.log(
        `${dtype} kept as ${kept}: ${rates.median.toFixed(2)} GB/s (${rates.p20.toFixed(2)} to ${rates.p80.toFixed(2)}), ` +
          `at most ${(extra / 2 ** 20).toFixed(0)} MiB more than the model, ${((100 * extra) / turns[0]!.file).toFixed(1)} % of the file`,
      );
      results.push({
        bench: 'load',
        op: `${dtype} as ${kept}`,
        shape: `${(turns[0]!.file / 1e6).toFixed(0)} MB`,
        dtype: kept,
        threads: 2,
        ...rates,
        unit: 'GB/s',
        peakMib: extra / 2 ** 20,
      });
    }
  } finally {
    await rm(folder, { recursive: true });
  }
  if (!values.dry) appendResults(results);
}

await main();
