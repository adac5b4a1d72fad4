// What a run takes on a device, before anything of it is allocated: its own step is rehearsed, op by op, on a device that is only
// thought of. Memory is what the engine's allocator hands out; time is the roofline's: the greater of the products' time at the
// device's peak and the time that memory needs, op by op.

import { join } from 'node:path';
import type { Batch } from '../data/pack.ts';
import { cacheBytesPerToken, defaultTopK, readCacheFacts } from '../distill/cache.ts';
import { distillationLoss } from '../distill/distill.ts';
import { resolveCheckpoint } from '../models/folder.ts';
import { createModel, loadConfig, type ModelConfig, modelConfig } from '../models/model.ts';
import { blankAdapter } from '../nn/lora.ts';
import { memory, type PlannedDevice, profile, rehearse, resetPeak } from '../tensor/engine.ts';
import { ConfigError } from '../tensor/errors.ts';
import { loadTokenizer } from '../tokenizer/tokenizer.ts';
import {
  type DistillConfig,
  overridden,
  parseRun,
  plannedSteps,
  type RunConfig,
  type RunInput,
  type TextRunConfig,
  tokensPerStep,
} from '../train/config.ts';
import { bytes, count } from '../train/format.ts';
import { gradients } from '../train/loop.ts';
import { createOptimizer } from '../train/optimizer.ts';
import { textLoss } from '../train/pretrain.ts';
import { runModelConfig } from '../train/setup.ts';
import { plannedDevice } from './devices.ts';

export interface PlanOptions {
  /** `cpu`, `cuda`, or a GPU by name such as `h100`; or its figures. Default: the run's own device. */
  readonly device?: string | PlannedDevice;
  /** Bytes that tensors may take. Default: the device's memory but for 4 % that the driver and libraries take. */
  readonly room?: number;
  /** A preset to plan with where the teacher's checkpoint does not exist yet. */
  readonly teacher?: string;
}

/** Bytes of tensors. On a CPU the process itself takes some 80 MiB more, on a GPU the driver some 500. */
export interface PlannedMemory {
  readonly teacher: number;
  /** Weights that are trained, with their copies. */
  readonly student: number;
  readonly optimizer: number;
  /** What the loss head needs beside its tensors. */
  readonly loss: number;
  /** What else is alive at the worst moment of a step: activations and gradients. */
  readonly activations: number;
  readonly total: number;
}

/** A change of the run. */
interface Change {
  readonly change: string;
  /** The fields to set. */
  readonly set: Readonly<Record<string, unknown>>;
}

/** A change, and what the run takes with it. */
export interface Advice extends Change {
  readonly total: number;
  readonly seconds: number;
  readonly fits: boolean;
}

export interface Plan {
  readonly device: PlannedDevice & { readonly name: string };
  readonly parameters: { readonly student: number; readonly teacher?: number };
  readonly memory: PlannedMemory;
  readonly fits: boolean;
  readonly step: {
    readonly tokens: number;
    /** At the roofline: no real step is faster. */
    readonly seconds: number;
    readonly tokensPerSecond: number;
    /** Where it goes, the longest first. */
    readonly ops: readonly { readonly op: string; readonly seconds: number }[];
  };
  /** Single changes that save memory, the smallest result first; the last one makes all of them. Empty when the run fits. */
  readonly advice: readonly Advice[];
}

/** Left for the driver, libraries and gaps. */
const RESERVE = 0.04;

/**
 * Says what a run takes: memory by part, whether it fits, seconds a step at the roofline, and which changes would make it fit.
 * @throws ConfigError for a wrong field, an unknown device, or a vocabulary that is not known yet.
 */
export async function plan(input: RunInput | RunConfig, options: PlanOptions = {}): Promise<Plan> {
  const run = parseRun(input);
  const given = options.device ?? run.device;
  const device = typeof given === 'string' ? await plannedDevice(given) : given;
  const { teacher, vocabSize } = await teacherOf(run, options.teacher);
  const student =
    run.kind === 'finetune' || (run.kind === 'pretrain' && run.from !== undefined)
      ? await loadConfig(await resolveCheckpoint(run.kind === 'finetune' ? run.model : run.from!))
      : runModelConfig(run, { vocabSize: vocabSize ?? (await vocabulary(run)) });
  const measure = (changed: RunConfig) => rehearsal(changed, device, student, teacher);

  const own = await measure(run);
  const room = options.room ?? device.memory * (1 - RESERVE);
  const fits = own.memory.total <= room;
  const advised = async ({ change, set }: Change): Promise<Advice> => {
    const { memory: m, seconds } = await measure(overridden(run, set) as RunConfig);
    return { change, set, total: m.total, seconds, fits: m.total <= room };
  };
  const advice: Advice[] = [];
  if (!fits) {
    const savers = changes(run, device, student.vocabSize);
    for (const saver of savers) advice.push(await advised(saver));
    advice.sort((a, b) => a.total - b.total);
    if (savers.length > 1)
      advice.push(await advised({ change: 'all of these', set: Object.assign({}, ...savers.map((s) => s.set)) }));
  }
  const tokens = run.batch.sequences * run.batch.length * run.batch.accumulate;
  return {
    device: { name: typeof given === 'string' ? given : device.kind, ...device },
    parameters: own.parameters,
    memory: own.memory,
    fits,
    step: { tokens, seconds: own.seconds, tokensPerSecond: tokens / own.seconds, ops: own.ops },
    advice: advice.filter(({ total }) => total < own.memory.total),
  };
}

/** The teacher's configuration, where it will be in memory, and its vocabulary. */
async function teacherOf(run: RunConfig, preset: string | undefined): Promise<{ teacher?: ModelConfig; vocabSize?: number }> {
  if (run.kind !== 'distill') return {};
  const { checkpoint, cache } = run.teacher;
  const facts = cache === undefined ? undefined : await readCacheFacts(cache);
  if (facts !== undefined) return { vocabSize: facts.vocabSize };
  if (checkpoint === undefined && preset === undefined) return {};
  const teacher = await teacherConfig(checkpoint!, preset);
  return { teacher, vocabSize: teacher.vocabSize };
}

/** Whether the teacher of a run could be a cached one. */
function cacheable(run: DistillConfig): boolean {
  return run.data.isolate && run.distill.divergence.kind === 'forward_kl';
}

async function teacherConfig(checkpoint: string, preset: string | undefined): Promise<ModelConfig> {
  if (preset !== undefined) return modelConfig(preset);
  return loadConfig(await resolveCheckpoint(checkpoint));
}

async function vocabulary(run: TextRunConfig): Promise<number> {
  const { tokenizer } = run;
  if (typeof tokenizer === 'string') return (await loadTokenizer(tokenizer)).vocabSize;
  if (tokenizer !== undefined) return tokenizer.train.vocabSize;
  throw new ConfigError('plan: the vocabulary is not known; give model.vocabSize or a tokenizer', {
    code: 'ERR_CONFIG',
    op: 'plan',
    argument: 'model.vocabSize',
  });
}

/** Changes that save memory, those that cost least first. */
function changes(run: RunConfig, device: PlannedDevice, vocabSize: number): Change[] {
  const found: Change[] = [];
  const { sequences, accumulate, length } = run.batch;
  if (sequences > 1)
    found.push({
      change: `micro-batches of ${Math.ceil(sequences / 2)} instead of ${sequences} sequences`,
      set: { 'batch.sequences': Math.ceil(sequences / 2), 'batch.accumulate': accumulate * 2 },
    });
  if (run.kind === 'distill' && run.teacher.weights === undefined)
    found.push({ change: 'a teacher of fp8 weights', set: { 'teacher.weights': 'fp8' } });
  if (run.kind === 'distill' && run.teacher.cache === undefined && cacheable(run)) {
    const tokens = plannedSteps(run) * tokensPerStep(run);
    const size = tokens * cacheBytesPerToken(Math.min(defaultTopK, vocabSize), vocabSize);
    found.push({
      change: `a cached teacher (limbeck teach): at most ${bytes(size)} of disk for the ${count(tokens)} tokens of the run, less where it sees some again`,
      set: { 'teacher.cache': join(run.output, 'teacher') },
    });
  }
  if (!run.recompute)
    found.push({ change: 'recompute: activations are made again in the backward pass', set: { recompute: true } });
  if (run.kind === 'finetune' && run.adapter !== undefined && run.base !== 'q4')
    found.push({ change: 'a base of 4 bits', set: { base: 'q4' } });
  if (run.optimizer.moments === 'f32') found.push({ change: 'moments of 8 bits', set: { 'optimizer.moments': '8bit' } });
  if (run.optimizer.master && device.kind === 'cuda')
    found.push({ change: 'no f32 originals: bf16 weights are rounded by chance', set: { 'optimizer.master': false } });
  const shorter = Math.floor(length / 2);
  if (length > 256) found.push({ change: `sequences of ${shorter} tokens`, set: { 'batch.length': shorter } });
  return found;
}

interface Rehearsed {
  readonly parameters: Plan['parameters'];
  readonly memory: PlannedMemory;
  readonly seconds: number;
  readonly ops: readonly { op: string; seconds: number }[];
}

/** Two steps: the second is like all that follow. */
async function rehearsal(
  run: RunConfig,
  device: PlannedDevice,
  config: ModelConfig,
  teacherConfig: ModelConfig | undefined,
): Promise<Rehearsed> {
  const cache = run.kind === 'distill' ? run.teacher.cache : undefined;
  const topK = cache === undefined ? undefined : ((await readCacheFacts(cache))?.topK ?? Math.min(defaultTopK, config.vocabSize));
  return rehearse(device, async () => {
    const live = (): number => memory('plan').live;
    const dtype = device.kind === 'cpu' ? 'f32' : 'bf16';
    const weights = run.kind === 'distill' ? run.teacher.weights : undefined;
    const teacher =
      teacherConfig === undefined || cache !== undefined
        ? undefined
        : createModel(teacherConfig, { trainable: false, dtype, weights });
    const afterTeacher = live();
    const beside = run.kind === 'finetune' ? run.adapter : undefined;
    const student =
      run.kind === 'finetune' && beside !== undefined
        ? createModel(config, { dtype, trainable: false, weights: run.base })
        : createModel(config, { dtype, master: run.optimizer.master });
    const adapter = beside === undefined ? undefined : blankAdapter(student, beside);
    const afterStudent = live();
    const optimizer = createOptimizer((adapter ?? student).parameters, run.optimizer);
    const before = live();
    const batch = blank(run.batch.sequences, run.batch.length, topK);
    const loss = (b: Parameters<typeof textLoss>[1]) =>
      run.kind !== 'distill' ? textLoss(student, b, run.recompute) : distillationLoss(teacher, student, b, run);
    const micro = (): void => {
      const { total, kl, ce } = gradients(loss, batch, 1);
      for (const t of [total, kl, ce]) t?.dispose();
    };
    // Further micro-batches are like the second: the gradients are there already.
    const repeats = Math.min(run.batch.accumulate, 2);
    const step = (): void => {
      for (let i = 0; i < repeats; i++) micro();
      optimizer.step(1e-3).dispose();
    };
    step();
    resetPeak();
    const times = await profile(step);
    const peak = memory('plan').peak;
    const updating = new Set(['adamw', 'adamw_8bit', 'squared_norm']);
    const scale = (op: string): number => (updating.has(op) ? 1 : run.batch.accumulate / repeats);
    const ops = times.map(({ op, seconds }) => ({ op, seconds: seconds * scale(op) })).sort((a, b) => b.seconds - a.seconds);
    const lossBytes = Math.max(
      0,
      ...times.filter(({ op }) => /^linear_(cross|distill)/.test(op)).map(({ workspace }) => workspace),
    );
    optimizer.dispose();
    adapter?.dispose();
    student.dispose();
    teacher?.dispose();
    return {
      parameters: {
        student: student.parameters.count,
        ...(teacher === undefined ? {} : { teacher: teacher.parameters.count }),
      },
      memory: {
        teacher: afterTeacher,
        student: afterStudent - afterTeacher,
        optimizer: before - afterStudent,
        loss: lossBytes,
        activations: Math.max(0, peak - before - lossBytes),
        total: peak,
      },
      seconds: ops.reduce((sum, { seconds }) => sum + seconds, 0),
      ops,
    };
  });
}

/** A batch of the right shape; nobody looks at what is in it. */
function blank(rows: number, length: number, topK?: number): Batch {
  const n = rows * length;
  const zeros = (): Int32Array => new Int32Array(n);
  return {
    rows,
    length,
    ids: zeros(),
    targets: zeros(),
    weights: new Float32Array(n).fill(1),
    positions: zeros(),
    starts: zeros(),
    ...(topK === undefined
      ? {}
      : { likely: { topK, ids: new Int32Array(n * topK).fill(-1), logProbs: new Float32Array(n * topK) } }),
    tokens: n,
    predicted: n,
  };
}
