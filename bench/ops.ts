// Every op at training shapes: time of its kernel, GFLOP/s or GB/s, and the share of what this machine reaches in the same run.

import { cpus } from 'node:os';
import { parseArgs } from 'node:util';
import { copy, init, op, profile, scope, type Tensor } from '../src/index.ts';
import { native } from '../src/tensor/engine.ts';
import { attentionGroup, type Group, gatedGroup, linearGroup, lossGroups, movers, optimizerGroup, random } from './kernels.ts';
import { measure, printHead } from './measure.ts';
import { appendResults } from './results.ts';

const { values: flags } = parseArgs({
  options: {
    filter: { type: 'string', default: '' },
    rounds: { type: 'string', default: '7' },
    threads: { type: 'string' },
    json: { type: 'boolean', default: false },
    save: { type: 'boolean', default: false },
    debug: { type: 'boolean', default: false },
    help: { type: 'boolean', short: 'h', default: false },
  },
});
if (flags.help) {
  process.stdout.write(`npm run bench [-- OPTIONS]: every op at training shapes
  --filter TEXT  only kernels whose name contains it
  --rounds N     timed rounds, of which the median is shown. Default 7
  --threads N    default: the cores of the machine
  --json         one JSON object a line
  --save         append to bench/results.csv
`);
  process.exit(0);
}
init(flags.threads === undefined ? {} : { threads: Number(flags.threads) });

const student = { b: 8, t: 256 };
const groups: (() => Group | Group[])[] = [
  ...[
    [256, 256],
    [256, 128],
    [256, 1024],
    [512, 512],
    [512, 2048],
    [2048, 512],
  ].map(
    ([k, n]) =>
      () =>
        linearGroup(student, k!, n!),
  ),
  () => gatedGroup(student, 1024, 256),
  () => gatedGroup(student, 2048, 512),
  () => attentionGroup({ b: 8, t: 256 }, 4, 2, 64, 128),
  () => attentionGroup({ b: 4, t: 512 }, 4, 2, 64, 256),
  () => attentionGroup({ b: 2, t: 2048 }, 4, 2, 64, 512),
  () => attentionGroup({ b: 2, t: 2048 }, 4, 2, 64, null),
  () => attentionGroup({ b: 2, t: 2048 }, 8, 4, 64, 512),
  () => attentionGroup({ b: 1, t: 1024 }, 8, 4, 256, null),
  () => movers(student, 256, 4, 64, 1024, 8192),
  () => lossGroups(2048, 256, 512, 8192),
  () => lossGroups(2048, 256, 512, 32_000),
  () => optimizerGroup(8_000_000),
];

const peakOp = op({ forward: 'peak_flops(rounds) -> flops[]:f64' });

/** Multiply-adds in registers and a copy of memory, on all threads. */
async function ceilings(): Promise<{ flops: number; bytes: number; threads: number }> {
  const flops: number[] = [];
  const bytes: number[] = [];
  const x = random([1 << 25]);
  for (let i = 0; i < 7; i++) {
    let counted: Tensor | undefined;
    const [time] = await profile(() => {
      counted = peakOp(200)[0]!;
    });
    flops.push((await counted!.item()) / time!.seconds);
    counted!.dispose();
    const times = await profile(() => scope(() => void copy(x)));
    bytes.push((8 * x.size) / times.find((t) => t.op === 'copy')!.seconds);
  }
  x.dispose();
  return { flops: Math.max(...flops), bytes: Math.max(...bytes), threads: native().info().threads ?? 1 };
}

const peak = await ceilings();
if (!flags.json) printHead(`${cpus()[0]?.model ?? 'unknown machine'}, ${peak.threads} threads`, peak);
const results = await measure(groups, peak, {
  filter: flags.filter,
  rounds: Number(flags.rounds),
  json: flags.json,
  bench: 'ops',
  dtype: 'f32',
  threads: peak.threads,
});
if (flags.save) appendResults(results);
