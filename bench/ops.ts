// Every op at training shapes: time of its kernel, GFLOP/s or GB/s, and the share of what this machine reaches in the same run.

import { cpus } from 'node:os';
import { parseArgs } from 'node:util';
import {
  attention,
  copy,
  createOptimizer,
  createParameters,
  dot,
  embedding,
  empty,
  gatedLinear,
  geglu,
  init,
  linear,
  linearCrossEntropy,
  linearDistill,
  matrix,
  noGrad,
  type OpTime,
  op,
  parameter,
  profile,
  randomNormal_,
  rmsNorm,
  rmsNormAdd,
  rope,
  ropeTable,
  scope,
  type Tensor,
  tensor,
  valueAndGrad,
  zeroGrad,
} from '../src/index.ts';
import { native } from '../src/tensor/engine.ts';
import { appendResults, type Result, spread } from './results.ts';

/** One kernel that is timed. */
interface Part {
  readonly kernel: string;
  /** Useful floating-point operations; 0 for what only moves bytes. */
  readonly flops: number;
  /** Least bytes to read and write. */
  readonly bytes: number;
}

/** What runs together and is timed kernel by kernel. */
interface Group {
  readonly shape: string;
  readonly parts: readonly Part[];
  readonly tensors: readonly Tensor[];
  run(): void;
}

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

let stream = 0;
function random(shape: readonly number[], std = 1): Tensor {
  const t = empty(shape);
  randomNormal_(t, 1, stream++, std);
  return t;
}

const ids = (n: number, vocab: number): Tensor =>
  tensor(
    Int32Array.from({ length: n }, (_, i) => (i * 7919) % vocab),
    [n],
  );

/** Forward and backward with a dense gradient from behind. */
function both(
  shape: string,
  trained: readonly Tensor[],
  f: () => Tensor,
  parts: readonly Part[],
  constants: readonly Tensor[] = [],
): Group {
  for (const t of trained) parameter(t);
  const y = noGrad(f);
  const dy = random(y.shape);
  y.dispose();
  return {
    shape,
    parts,
    tensors: [...trained, ...constants, dy],
    run() {
      zeroGrad(trained);
      valueAndGrad(() => dot(f(), dy)).dispose();
    },
  };
}

/** B sequences of T tokens. */
interface Tokens {
  readonly b: number;
  readonly t: number;
}

function linearGroup({ b, t }: Tokens, k: number, n: number): Group {
  const rows = b * t;
  const [x, w] = [random([rows, k]), random([n, k], k ** -0.5)];
  const flops = 2 * rows * k * n;
  const bytes = 4 * (rows * k + k * n + rows * n);
  return both(`${rows}x${k} -> ${n}`, [x, w], () => linear(x, w), [
    { kernel: 'linear', flops, bytes },
    { kernel: 'linear_backward', flops: 2 * flops, bytes: 2 * bytes },
  ]);
}

function gatedGroup({ b, t }: Tokens, f: number, n: number): Group {
  const rows = b * t;
  const [gate, up, w] = [random([rows, f]), random([rows, f]), random([n, f], f ** -0.5)];
  const flops = 2 * rows * f * n;
  const bytes = 4 * (2 * rows * f + f * n + rows * n);
  return both(`${rows}x${f} -> ${n}`, [gate, up, w], () => gatedLinear(gate, up, w, { activation: 'gelu' }), [
    { kernel: 'gated_linear', flops, bytes },
    { kernel: 'gated_linear_backward', flops: 2 * flops, bytes: 2 * bytes },
  ]);
}

function attentionGroup({ b, t }: Tokens, h: number, g: number, d: number, window: number | null): Group {
  const [q, k, v] = [random([b, t, h, d]), random([b, t, g, d]), random([b, t, g, d])];
  let pairs = 0;
  for (let i = 0; i < t; i++) pairs += Math.min(i + 1, window ?? t);
  const useful = b * h * pairs * d;
  const bytes = 4 * b * t * d * (2 * h + 2 * g);
  return both(
    `${b}x${t} h${h}/${g} d${d} window ${window ?? 'none'} cap 50`,
    [q, k, v],
    () => attention(q, k, v, { cap: 50, window }),
    [
      { kernel: 'attention', flops: 4 * useful, bytes },
      { kernel: 'attention_backward', flops: 10 * useful, bytes: 2 * bytes },
    ],
  );
}

function movers({ b, t }: Tokens, c: number, h: number, d: number, f: number, v: number): Group[] {
  const rows = b * t;
  const size = 4 * rows * c;
  const token = ids(rows, v);
  const table = random([v, c]);
  const groups: Group[] = [];
  {
    const [x, w] = [random([rows, c]), random([c])];
    groups.push(
      both(`${rows}x${c}`, [x, w], () => rmsNorm(x, w, { offset: 1 }), [
        { kernel: 'rms_norm', flops: 0, bytes: 2 * size },
        { kernel: 'rms_norm_backward', flops: 0, bytes: 3 * size },
      ]),
    );
  }
  {
    const [x, w, residual] = [random([rows, c]), random([c]), random([rows, c])];
    groups.push(
      both(`${rows}x${c}`, [x, w, residual], () => rmsNormAdd(x, w, residual, { offset: 1 }), [
        { kernel: 'rms_norm_add', flops: 0, bytes: 3 * size },
        { kernel: 'rms_norm_add_backward', flops: 0, bytes: 3 * size },
      ]),
    );
  }
  groups.push(
    both(
      `${rows} of ${v}x${c}`,
      [table],
      () => embedding(token, table, { scale: 16 }),
      [
        { kernel: 'embedding', flops: 0, bytes: 2 * size },
        { kernel: 'embedding_backward', flops: 0, bytes: size + 4 * v * c },
      ],
      [token],
    ),
  );
  {
    const x = random([b, t, h, d]);
    const positions = tensor(
      Int32Array.from({ length: rows }, (_, i) => i % t),
      [b, t],
    );
    const angles = ropeTable(positions, { headSize: d });
    groups.push(
      both(
        `${b}x${t}x${h}x${d}`,
        [x],
        () => rope(x, angles),
        [
          { kernel: 'rope', flops: 0, bytes: 8 * rows * h * d },
          { kernel: 'rope_backward', flops: 0, bytes: 8 * rows * h * d },
        ],
        [positions, angles],
      ),
    );
  }
  {
    const [gate, up] = [random([rows, f]), random([rows, f])];
    groups.push(
      both(`${rows}x${f}`, [gate, up], () => geglu(gate, up), [
        { kernel: 'geglu', flops: 0, bytes: 12 * rows * f },
        { kernel: 'geglu_backward', flops: 0, bytes: 20 * rows * f },
      ]),
    );
  }
  return groups;
}

function lossGroups(rows: number, c: number, e: number, v: number): Group[] {
  const [x, w, tx, tw] = [random([rows, c]), random([v, c], c ** -0.5), random([rows, e]), random([v, e], e ** -0.5)];
  const targets = ids(rows, v);
  const learned = [parameter(x), parameter(w)];
  const one = (kernel: string, products: number, f: () => Tensor): Group => ({
    shape: `${rows}x${c}, vocabulary ${v}${kernel.includes('distill') ? `, teacher ${e}` : ''}`,
    parts: [{ kernel, flops: products, bytes: 0 }],
    tensors: [x, w, tx, tw, targets],
    run() {
      zeroGrad(learned);
      valueAndGrad(f).dispose();
    },
  });
  return [
    one('linear_cross_entropy', 6 * rows * c * v, () => linearCrossEntropy(x, w, targets, { cap: 30 }).total),
    one(
      'linear_distill',
      6 * rows * c * v + 2 * rows * e * v,
      () => linearDistill(x, w, { cap: 30, teacher: { hidden: tx, head: tw, cap: 30 } }).total,
    ),
  ];
}

function optimizerGroup(n: number): Group {
  const parameters = createParameters({ w: matrix('w', [n], 0.02) }, { seed: 1 });
  const optimizer = createOptimizer(parameters, {
    learningRate: 1e-3,
    beta1: 0.9,
    beta2: 0.95,
    eps: 1e-8,
    weightDecay: 0.1,
    clip: 1,
  });
  return {
    shape: `${n}`,
    parts: [
      { kernel: 'squared_norm', flops: 0, bytes: 4 * n },
      { kernel: 'adamw', flops: 0, bytes: 28 * n },
    ],
    tensors: [],
    run() {
      optimizer.step(1e-3).dispose();
    },
  };
}

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
const results: Result[] = [];
if (!flags.json) {
  process.stdout.write(
    `${cpus()[0]?.model ?? 'unknown machine'}, ${peak.threads} threads; ceilings of this run: ${(peak.flops / 1e9).toFixed(0)} GFLOP/s, copy ${(peak.bytes / 1e9).toFixed(1)} GB/s\n\n` +
      `${'kernel'.padEnd(24)}${'shape'.padEnd(46)}${'median ms'.padStart(11)}${'GFLOP/s'.padStart(10)}${'GB/s'.padStart(8)}${'of peak'.padStart(9)}\n`,
  );
}
for (const make of groups) {
  const made = [make()].flat();
  for (const group of made) {
    if (!group.parts.some((p) => p.kernel.includes(flags.filter))) continue;
    group.run(); // first touch of memory, and threads that wake up
    const rounds: OpTime[][] = [];
    for (let i = 0; i < Number(flags.rounds); i++) rounds.push(await profile(() => group.run()));
    for (const part of group.parts) {
      if (!part.kernel.includes(flags.filter)) continue;
      const seconds = rounds.map((times) => {
        const t = times.find((one) => one.op === part.kernel)!;
        return t.seconds / t.count;
      });
      const { median, p20, p80 } = spread(seconds);
      const moves = part.flops === 0;
      const rate = (moves ? part.bytes : part.flops) / median;
      const share = rate / (moves ? peak.bytes : peak.flops);
      results.push({
        bench: 'ops',
        op: part.kernel,
        shape: group.shape,
        dtype: 'f32',
        threads: peak.threads,
        median: median * 1000,
        p20: p20 * 1000,
        p80: p80 * 1000,
        unit: 'ms',
      });
      if (flags.json) {
        process.stdout.write(
          `${JSON.stringify({ op: part.kernel, shape: group.shape, ms: median * 1000, gflops: moves ? null : rate / 1e9, gbs: moves ? rate / 1e9 : null, share })}\n`,
        );
      } else {
        process.stdout.write(
          `${part.kernel.padEnd(24)}${group.shape.padEnd(46)}${(median * 1000).toFixed(3).padStart(11)}${(moves ? '' : (rate / 1e9).toFixed(1)).padStart(10)}${(moves ? (rate / 1e9).toFixed(1) : '').padStart(8)}${`${(100 * share).toFixed(0)} %`.padStart(9)}\n`,
        );
      }
    }
  }
  for (const t of new Set(made.flatMap((g) => g.tensors))) t.dispose();
}
if (flags.save) appendResults(results);
