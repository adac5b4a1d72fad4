// Tokens a second of generation, in limbeck and in Transformers and llama.cpp where they are installed, taking turns in one run.
// A Llama of SmolLM-135M's shape with random weights; the speed does not depend on them. LIMBECK_PEER_PYTHON names a Python with torch,
// transformers and, for llama.cpp's file, gguf; node-llama-cpp comes from test/peers.

import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { Worker } from './peer/worker.ts';
import { appendResults, type Result, spread } from './results.ts';

const help = `Usage: npm run bench:generate -- [options]
  --tokens 64       new tokens of a text, after a prompt of 16
  --batch 1,8       texts at once (llama.cpp: 1 only)
  --rounds 3        turns of each side
  --threads 2
  --sides f32,bf16,transformers,llama
  --folder PATH     keep the model there, and use it if it is there
  --dry             do not append to bench/results.csv`;

/** SmolLM-135M, as its config.json says it. */
const config = {
  architectures: ['LlamaForCausalLM'],
  model_type: 'llama',
  vocab_size: 49_152,
  hidden_size: 576,
  num_hidden_layers: 30,
  num_attention_heads: 9,
  num_key_value_heads: 3,
  head_dim: 64,
  intermediate_size: 1536,
  max_position_embeddings: 2048,
  rms_norm_eps: 1e-5,
  rope_theta: 10_000,
  hidden_act: 'silu',
  tie_word_embeddings: true,
  attention_bias: false,
  mlp_bias: false,
  initializer_range: 0.041666666666666664,
  bos_token_id: null,
  eos_token_id: null,
  torch_dtype: 'float32',
};

interface Turn {
  readonly seconds: number;
}

const file = (name: string): string => fileURLToPath(new URL(`peer/${name}`, import.meta.url));

async function main(): Promise<void> {
  const { values } = parseArgs({
    options: {
      tokens: { type: 'string', default: '64' },
      batch: { type: 'string', default: '1,8' },
      rounds: { type: 'string', default: '3' },
      threads: { type: 'string', default: '2' },
      sides: { type: 'string', default: 'f32,bf16,transformers,llama' },
      folder: { type: 'string' },
      dry: { type: 'boolean', default: false },
      help: { type: 'boolean', default: false },
    },
  });
  if (values.help) return console.log(help);
  const [tokens, rounds, threads] = [Number(values.tokens), Number(values.rounds), Number(values.threads)];
  const folder = values.folder ?? (await mkdtemp(join(tmpdir(), 'limbeck-generate-')));
  await mkdir(folder, { recursive: true });
  const workers = new Map<string, Worker>();
  try {
    await writeFile(join(folder, 'config.json'), JSON.stringify(config));
    for (const side of ['f32', ...values.sides.split(',').filter((name) => name !== 'f32')]) {
      const worker = start(side, threads);
      try {
        await worker.ask({ cmd: 'init', folder, threads, dtype: side });
        workers.set(side, worker);
      } catch (error) {
        console.log(`${side} not measured: ${(error as Error).message}`);
        await worker.close();
      }
    }
    for (const batch of values.batch.split(',').map(Number)) {
      const rates = new Map(
        [...workers].filter(([name]) => batch === 1 || name !== 'llama').map(([name]) => [name, [] as number[]]),
      );
      for (const side of rates.keys()) await workers.get(side)!.ask({ cmd: 'run', batch, tokens: 8 });
      for (let round = 0; round < rounds; round++) {
        for (const [side, all] of rates) {
          const { seconds } = await workers.get(side)!.ask<Turn>({ cmd: 'run', batch, tokens });
          all.push((batch * tokens) / seconds);
        }
      }
      const results = resultsOf(rates, `135M B${batch} P16 N${tokens}`, threads);
      for (const r of results)
        console.log(
          `B${batch}  ${(r.peer ?? 'limbeck').padEnd(14)} ${r.dtype.padEnd(5)} ${r.median.toFixed(1).padStart(7)} tokens/s${r.ratio === undefined ? '' : `   limbeck × ${r.ratio.toFixed(2)}`}`,
        );
      if (!values.dry) appendResults(results);
    }
  } finally {
    for (const worker of workers.values()) await worker.close();
    if (values.folder === undefined) await rm(folder, { recursive: true });
  }
}

/** Ratios are those of limbeck in the same width of weights. */
function resultsOf(rates: ReadonlyMap<string, readonly number[]>, shape: string, threads: number): Result[] {
  const sides = { f32: ['f32'], bf16: ['bf16'], transformers: ['f32', 'transformers'], llama: ['f16', 'llama.cpp'] } as const;
  const median = (name: string): number | undefined => {
    const all = rates.get(name);
    return all === undefined ? undefined : spread(all).median;
  };
  return [...rates].map(([name, all]) => {
    const [dtype, peer] = sides[name as keyof typeof sides];
    const ours = median(name === 'llama' ? 'bf16' : 'f32');
    const ratio = peer === undefined || ours === undefined ? {} : { ratio: ours / spread(all).median };
    return {
      ...{ bench: 'generate', op: 'greedy', shape, dtype, threads, ...spread(all), unit: 'tokens/s' },
      ...(peer === undefined ? {} : { peer }),
      ...ratio,
    };
  });
}

function start(side: string, threads: number): Worker {
  if (side !== 'transformers')
    return new Worker(side, process.execPath, [file(`generate_${side === 'llama' ? 'llama' : 'limbeck'}.mjs`)], {});
  return new Worker(side, process.env.LIMBECK_PEER_PYTHON ?? 'python3', [file('generate_peer.py')], {
    OMP_NUM_THREADS: String(threads),
    MKL_NUM_THREADS: String(threads),
    TRANSFORMERS_VERBOSITY: 'error',
    HF_HUB_OFFLINE: '1',
    PYTHONWARNINGS: 'ignore',
  });
}

await main();
