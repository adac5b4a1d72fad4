// The same model, batch and optimizer step in limbeck and in PyTorch + Transformers (eager and torch.compile), taking turns in one
// run. The peer needs Python with torch 2.13 and transformers 5.18; LIMBECK_PEER_PYTHON names the interpreter.

import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as pause } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import { optimizer, randomIds, type Shape, shapes, type Task, writeModel } from './peer/cases.ts';
import { compareGemm } from './peer/gemm.ts';
import { startLimbeck, startTorch, type Turn, type Worker } from './peer/worker.ts';
import { appendResults, type Result, spread } from './results.ts';

const help = `Usage: npm run bench:peer -- [options]
  --gemm            matrix products only
  --rows 0,1,2      which shapes (default: all)
  --tasks train,distill
  --rounds 5        turns of each side
  --threads 2
  --sides limbeck,eager,compile
  --dry             do not append to bench/results.csv`;

interface Side {
  readonly worker: Worker;
  readonly label: string;
  readonly rates: number[];
  readonly losses: number[];
  peak: number;
}

async function main(): Promise<void> {
  const { values } = parseArgs({
    options: {
      gemm: { type: 'boolean', default: false },
      rows: { type: 'string', default: shapes.map((_, i) => i).join(',') },
      tasks: { type: 'string', default: 'train,distill' },
      rounds: { type: 'string', default: '5' },
      threads: { type: 'string', default: '2' },
      sides: { type: 'string', default: 'limbeck,eager,compile' },
      dry: { type: 'boolean', default: false },
      help: { type: 'boolean', default: false },
    },
  });
  if (values.help) return console.log(help);
  const rounds = Number(values.rounds);
  const threads = Number(values.threads);
  const record = (results: readonly Result[]) => (values.dry ? undefined : appendResults(results));
  if (values.gemm) return record(await compareGemm(threads, rounds));

  const asked = values.sides.split(',');
  const torch = asked.some((side) => side !== 'limbeck') ? await findTorch(threads) : undefined;
  const sides = asked.filter((side) => side === 'limbeck' || torch !== undefined);
  console.log(`float32, ${threads} threads, AdamW, median of ${rounds} turns after 2 steps each; memory is the peak after them`);
  for (const row of values.rows.split(',').map(Number)) {
    const shape = shapes[row];
    if (shape === undefined) throw new Error(`--rows: there is no row ${row}`);
    const folder = await mkdtemp(join(tmpdir(), 'limbeck-peer-'));
    try {
      const models = { student: await writeModel(folder, 'student', shape), teacher: await writeModel(folder, 'teacher', shape) };
      for (const task of values.tasks.split(',') as Task[]) {
        record(await compare(shape, task, sides, torch, models, threads, rounds));
      }
    } finally {
      await rm(folder, { recursive: true });
    }
  }
}

/** The version of torch, or undefined after saying why there is none. */
async function findTorch(threads: number): Promise<string | undefined> {
  const worker = startTorch('torch', threads);
  try {
    const found = await worker.ask<{ torch: string; transformers: string }>({ cmd: 'versions' });
    console.log(`peer: torch ${found.torch}, transformers ${found.transformers}`);
    return found.torch;
  } catch (error) {
    console.log(`peer not measured: ${(error as Error).message}`);
    console.log('It needs Python with torch 2.13 and transformers 5.18; LIMBECK_PEER_PYTHON names the interpreter.');
    return undefined;
  } finally {
    await worker.close();
  }
}

async function compare(
  shape: Shape,
  task: Task,
  names: readonly string[],
  torch: string | undefined,
  models: { student: string; teacher: string },
  threads: number,
  rounds: number,
): Promise<Result[]> {
  const sides: Side[] = [];
  try {
    for (const name of names) {
      const worker = name === 'limbeck' ? startLimbeck() : startTorch(name, threads);
      try {
        await worker.ask({ cmd: 'init', mode: name, task, ...models, ids: randomIds(shape), threads, ...optimizer });
        // Compiling, packing and the first allocations are not what is measured.
        await worker.ask({ cmd: 'run', steps: 2 });
        await worker.ask({ cmd: 'reset_peak' });
        sides.push({ worker, label: name === 'limbeck' ? name : `torch ${torch} ${name}`, rates: [], losses: [], peak: 0 });
      } catch (error) {
        await worker.close();
        if (name === 'limbeck') throw error;
        console.log(`\n${task}: peer not measured: ${name}: ${(error as Error).message}`);
      }
    }
    for (let round = 0; round < rounds; round++) {
      for (let turn = 0; turn < sides.length; turn++) {
        const side = sides[(turn + round) % sides.length]!;
        // Threads of the one before go to sleep first.
        await pause(300);
        const { seconds, loss, peak_rss_bytes } = await side.worker.ask<Turn>({ cmd: 'run', steps: shape.steps });
        side.rates.push((shape.steps * shape.batch * shape.length) / seconds);
        side.losses.push(loss);
        side.peak = Math.max(side.peak, peak_rss_bytes);
      }
    }
  } finally {
    await Promise.all(sides.map(({ worker }) => worker.close()));
  }
  return report(shape, task, sides, threads);
}

function report(shape: Shape, task: Task, sides: readonly Side[], threads: number): Result[] {
  const { vocabulary, batch, length, window } = shape;
  console.log(`\n${task}: vocabulary ${vocabulary}, batch ${batch} x ${length}, window ${window}`);
  const ours = sides.find(({ label }) => label === 'limbeck');
  const ourRate = ours && spread(ours.rates).median;
  return sides.map((side) => {
    const values = spread(side.rates);
    const peer = side !== ours;
    const ratio = peer && ourRate !== undefined ? ourRate / values.median : undefined;
    const goal = shape.goals[task][side.label.endsWith('compile') ? 1 : 0];
    console.log(
      [
        side.label.padEnd(28),
        `${values.median.toFixed(0).padStart(7)} tokens/s (${values.p20.toFixed(0)}-${values.p80.toFixed(0)})`.padEnd(34),
        `${(side.peak / 2 ** 20).toFixed(0).padStart(6)} MiB`,
        `  loss ${side.losses.at(-1)!.toFixed(5)}`,
        ratio === undefined ? '' : `  limbeck is ${ratio.toFixed(2)} x as fast (goal ${goal})`,
        peer && ours ? `, in ${(ours.peak / side.peak).toFixed(2)} of the memory (goal 0.33)` : '',
      ].join(''),
    );
    return {
      bench: 'peer',
      op: task,
      shape: `V${vocabulary} B${batch} T${length} W${window}`,
      dtype: 'f32',
      threads,
      ...values,
      unit: 'tokens/s',
      ...(peer && { peer: side.label }),
      ...(ratio !== undefined && { ratio }),
      peakMib: side.peak / 2 ** 20,
    };
  });
}

await main();
