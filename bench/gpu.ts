// Every op at the shapes of Gemma 2 2B, 9B and 27B on a GPU, and whole steps of training and distillation; FlexAttention and
// torch.compile beside it where LIMBECK_PEER_PYTHON names a Python with PyTorch.

import { execFileSync } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import {
  backendInfo,
  copy,
  createModel,
  createOptimizer,
  generateTokens,
  init,
  type LanguageModel,
  layerWindow,
  linear,
  linearCrossEntropy,
  linearDistill,
  type ModelConfig,
  memory,
  modelConfig,
  noGrad,
  type ParameterOptions,
  plannedDevice,
  profile,
  resetPeak,
  reshape,
  scope,
  sync,
  type Tensor,
  tensor,
  valueAndGrad,
} from '../src/index.ts';
import {
  attentionGroup,
  choiceGroup,
  type Group,
  gatedGroup,
  linearGroup,
  lossGroups,
  movers,
  optimizerGroup,
  quantizedGroups,
  random,
  stepGroup,
} from './kernels.ts';
import { type Ceilings, measure, printHead } from './measure.ts';
import { appendResults, type Result, spread } from './results.ts';

const { values: flags } = parseArgs({
  options: {
    filter: { type: 'string', default: '' },
    rounds: { type: 'string', default: '10' },
    steps: { type: 'boolean', default: false },
    kernels: { type: 'boolean', default: false },
    tiny: { type: 'boolean', default: false },
    json: { type: 'boolean', default: false },
    dry: { type: 'boolean', default: false },
    help: { type: 'boolean', short: 'h', default: false },
  },
});
if (flags.help) {
  process.stdout.write(`npm run bench:gpu [-- OPTIONS]: kernels and steps at Gemma 2 shapes on the first GPU
  --kernels      only kernels
  --steps        only whole steps
  --filter TEXT  only kernels whose name contains it
  --rounds N     timed rounds, of which the median is shown. Default 10
  --tiny         small shapes: whether the benchmark itself works
  --json         one JSON object a line
  --dry          do not append to bench/results.csv
`);
  process.exit(0);
}

init({ device: 'cuda' });
const rounds = Number(flags.rounds);
const small = flags.tiny;
const T = small ? 64 : 8192;
const sizes = (['gemma2-2b', 'gemma2-9b', 'gemma2-27b'] as const).map((name) =>
  modelConfig(name, {
    vocabSize: small ? 512 : 256_000,
    ...(small ? { width: 64, heads: 2, kvHeads: 1, hidden: 128, layers: 2, window: 32 } : {}),
  }),
);
const [two, , twentySeven] = sizes as [ModelConfig, ModelConfig, ModelConfig];

/** The library's largest product and a copy of memory: what the device gives today, clocks and power as they are. */
async function ceilings(): Promise<Ceilings> {
  const n = small ? 256 : 8192;
  const [x, w] = [random([n, n]), random([n, n])];
  const long = random([small ? 1 << 16 : 1 << 29]);
  const flops: number[] = [];
  const bytes: number[] = [];
  for (let i = 0; i < 7; i++) {
    const product = await profile(() => scope(() => void linear(x, w)));
    flops.push((2 * n ** 3) / product.find((t) => t.op === 'linear')!.seconds);
    const moved = await profile(() => scope(() => void copy(long)));
    bytes.push((4 * long.size) / moved.find((t) => t.op === 'copy')!.seconds);
  }
  for (const t of [x, w, long]) t.dispose();
  return { flops: Math.max(...flops), bytes: Math.max(...bytes) };
}

const groups: (() => Group | Group[])[] = [
  ...sizes.flatMap((c) => [
    () => attentionGroup({ b: 1, t: T }, c.heads, c.kvHeads, c.headSize, null),
    () => attentionGroup({ b: 1, t: T }, c.heads, c.kvHeads, c.headSize, c.window),
    () => stepGroup({ b: 1, t: T }, c.heads, c.kvHeads, c.headSize),
    () => stepGroup({ b: 8, t: T }, c.heads, c.kvHeads, c.headSize),
    () => [1, 8].flatMap((b) => quantizedGroups(b, c.width, c.hidden)),
    () => linearGroup({ b: 1, t: T }, c.width, c.hidden),
    () => gatedGroup({ b: 1, t: T }, c.hidden, c.width),
    () => movers({ b: 1, t: T }, c.width, c.heads, c.headSize, c.hidden, c.vocabSize),
  ]),
  ...[1, 8].map((b) => () => choiceGroup(b, two.vocabSize, 64)),
  () => lossGroups(T, two.width, twentySeven.width, two.vocabSize),
  () => optimizerGroup(small ? 10_000 : 500_000_000),
  () => optimizerGroup(small ? 10_000 : 500_000_000, '8bit'),
];

/** Figures of PyTorch on the same GPU, by kernel and shape; empty without it. */
function peers(): Map<string, { ms: number; name: string }> {
  const python = process.env.LIMBECK_PEER_PYTHON;
  const found = new Map<string, { ms: number; name: string }>();
  if (python === undefined || small) return found;
  const script = fileURLToPath(new URL('peer/gpu_peer.py', import.meta.url));
  const text = execFileSync(python, [script, String(rounds)], {
    encoding: 'utf8',
    maxBuffer: 1 << 26,
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  for (const line of text.trim().split('\n')) {
    const { op, shape, ms, name } = JSON.parse(line) as { op: string; shape: string; ms: number; name: string };
    found.set(`${op} ${shape}`, { ms, name });
  }
  return found;
}

interface Step {
  readonly name: string;
  readonly student: ModelConfig;
  readonly teacher?: ModelConfig;
  readonly options: ParameterOptions;
  readonly length: number;
  /** Teacher's weights. */
  readonly weights?: 'bf16' | 'fp8';
  /** Whether layers are computed again in the backward pass: what does not fit 80 GB otherwise. */
  readonly recompute: boolean;
}

const steps: Step[] = [
  { name: '2B train', student: two, options: {}, length: T, recompute: false },
  { name: '2B train, recompute', student: two, options: {}, length: T, recompute: true },
  {
    name: '27B to 2B distill, bf16 teacher',
    student: two,
    teacher: twentySeven,
    options: { master: false },
    length: T,
    weights: 'bf16',
    recompute: true,
  },
  {
    name: '27B to 2B distill, fp8 teacher',
    student: two,
    teacher: twentySeven,
    options: { master: false },
    length: T,
    weights: 'fp8',
    recompute: false,
  },
];

/** Useful operations of a step: 6 a parameter and token, 2 a teacher's; attention and heads as they are. */
function usefulFlops({ student, teacher, length }: Step): number {
  const attention = (c: ModelConfig, factor: number): number => {
    const pairs = (window: number): number => {
      const w = Math.min(window, length);
      return (w * (w + 1)) / 2 + (length - w) * w;
    };
    const all = Array.from({ length: c.layers }, (_, i) => pairs(layerWindow(c, i) ?? length)).reduce((a, b) => a + b, 0);
    return factor * c.heads * c.headSize * all;
  };
  const matrices = (c: ModelConfig): number =>
    c.layers * c.width * (2 * c.headSize * (c.heads + c.kvHeads) + 3 * c.hidden) + c.vocabSize * c.width;
  const own = 6 * matrices(student) * length + attention(student, 14);
  return teacher === undefined ? own : own + 2 * matrices(teacher) * length + attention(teacher, 4);
}

async function timeStep(step: Step, peak: Ceilings): Promise<Result[]> {
  const { student: c, teacher: tc, length } = step;
  const model = createModel(c, { seed: 1, ...step.options });
  const teacher =
    tc === undefined
      ? undefined
      : createModel(tc, { seed: 2, trainable: false, ...(step.weights === 'fp8' ? { weights: 'fp8' } : {}) });
  const optimizer = createOptimizer(model.parameters, {
    beta1: 0.9,
    beta2: 0.95,
    eps: 1e-8,
    weightDecay: 0.1,
    clip: 1,
    moments: '8bit',
  });
  const ids = Int32Array.from({ length }, (_, i) => (i * 7919 + 13) % c.vocabSize);
  const input = {
    ids: tensor(ids, [1, length]),
    positions: tensor(
      ids.map((_, i) => i),
      [1, length],
    ),
  };
  const targets = tensor(ids.map((_, i) => ids[(i + 1) % length]!));
  const weights = tensor(new Float32Array(length).fill(1 / length));
  const hidden = (m: LanguageModel): Tensor => reshape(m.hidden(input, { recompute: step.recompute }), [-1, m.config.width]);
  const run = (): Tensor => {
    const loss = valueAndGrad(() => {
      if (teacher === undefined)
        return linearCrossEntropy(hidden(model), model.head, targets, { weights, cap: c.finalCap }).total;
      const told = noGrad(() => scope(() => hidden(teacher)));
      return linearDistill(hidden(model), model.head, {
        weights,
        cap: c.finalCap,
        teacher: { hidden: told, head: teacher.head, cap: teacher.config.finalCap },
      }).total;
    });
    optimizer.step(1e-4).dispose();
    return loss;
  };
  const seconds: number[] = [];
  run().dispose();
  await sync();
  resetPeak();
  for (let i = 0; i < Math.max(3, rounds / 2); i++) {
    const from = performance.now();
    const loss = run();
    await loss.item();
    await sync();
    seconds.push((performance.now() - from) / 1000);
    loss.dispose();
  }
  const bytes = memory().peak;
  for (const t of [input.ids, input.positions, targets, weights]) t.dispose();
  optimizer.dispose();
  model.dispose();
  teacher?.dispose();
  const { median, p20, p80 } = spread(seconds.map((s) => length / s));
  const share = (usefulFlops(step) * median) / length / peak.flops;
  const line = { op: step.name, tokens_per_second: median, of_measured_peak: share, peak_gib: bytes / 2 ** 30 };
  process.stdout.write(
    flags.json
      ? `${JSON.stringify(line)}\n`
      : `${step.name.padEnd(40)}${median.toFixed(0).padStart(9)} tokens/s${`${(100 * share).toFixed(0)} %`.padStart(7)} of the product's ceiling${(bytes / 2 ** 30).toFixed(1).padStart(8)} GiB\n`,
  );
  return [
    {
      bench: 'gpu-step',
      op: step.name,
      shape: `1x${length}`,
      dtype: 'bf16',
      threads: 0,
      median,
      p20,
      p80,
      unit: 'tokens/s',
      peakMib: bytes / 2 ** 20,
    },
  ];
}

interface Writing {
  readonly weights?: 'q8' | 'q4';
  readonly texts: number;
}

/** Tokens a second once all prompts are read. */
async function timeWriting({ weights, texts }: Writing): Promise<Result> {
  const model = createModel(two, { seed: 1, trainable: false, ...(weights === undefined ? {} : { weights }) });
  const [prompt, tokens] = small ? [16, 8] : [512, 256];
  const requests = Array.from({ length: texts }, (_, i) => ({
    ids: Int32Array.from({ length: prompt }, (_, j) => (j * 7919 + i) % two.vocabSize),
    temperature: 0,
    tokens,
  }));
  const rates: number[] = [];
  for (let i = 0; i < Math.max(3, rounds / 2); i++) {
    const started = new Set<number>();
    let [from, written] = [0, 0];
    for await (const event of generateTokens(model, requests, { batch: texts })) {
      if (event.type === 'end') continue;
      started.add(event.index);
      if (started.size < texts) continue;
      if (from === 0) from = performance.now();
      else written++;
    }
    rates.push((written * 1000) / (performance.now() - from));
  }
  model.dispose();
  const { median, p20, p80 } = spread(rates);
  const name = `2B generate, ${weights ?? 'bf16'}`;
  process.stdout.write(
    flags.json
      ? `${JSON.stringify({ op: name, texts, tokens_per_second: median })}\n`
      : `${`${name}, ${texts} at a time`.padEnd(40)}${median.toFixed(0).padStart(9)} tokens/s\n`,
  );
  return {
    ...{ bench: 'gpu-step', op: name, shape: `${texts}x(${prompt}+${tokens})`, dtype: weights ?? 'bf16', threads: 0 },
    ...{ median, p20, p80, unit: 'tokens/s' },
  };
}

const gpu = backendInfo().cuda.devices[0]?.name ?? 'GPU';
const peak = await ceilings();
if (!flags.json) printHead(gpu, peak);
// What was measured is kept when something later fails.
const record = (results: readonly Result[]): void => {
  if (!flags.dry && !small) appendResults(results, gpu);
};
if (!flags.steps) {
  const measured = await measure(groups, peak, {
    filter: flags.filter,
    rounds,
    json: flags.json,
    bench: 'gpu',
    dtype: 'bf16',
    threads: 0,
  });
  record(measured);
  for (const [key, { ms, name }] of peers()) {
    const ours = measured.find((r) => `${r.op} ${r.shape}` === key);
    if (ours === undefined) continue;
    record([{ ...ours, median: ms, p20: ms, p80: ms, peer: name, ratio: ms / ours.median }]);
    process.stdout.write(
      flags.json
        ? `${JSON.stringify({ op: ours.op, shape: ours.shape, peer: name, ms, ratio: ms / ours.median })}\n`
        : `${ours.op.padEnd(24)}${ours.shape.padEnd(46)}${ms.toFixed(3).padStart(11)}  ${name}: ${(ms / ours.median).toFixed(2)} x\n`,
    );
  }
}
if (!flags.kernels) {
  for (const step of steps) {
    const need = step.teacher === undefined ? 0 : 60e9;
    if (!small && (await plannedDevice('cuda')).memory < need) {
      process.stdout.write(`${step.name}: skipped, the GPU has less than ${(need / 1e9).toFixed(0)} GB\n`);
      continue;
    }
    record(await timeStep(step, peak));
  }
  for (const texts of [1, 8])
    for (const weights of [undefined, 'q8', 'q4'] as const)
      record([await timeWriting({ texts, ...(weights === undefined ? {} : { weights }) })]);
}
