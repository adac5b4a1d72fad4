// The loop that pretraining and distillation share: steps, schedule, evaluation, checkpoints, resume, abort, and the guard against
// losses that are not finite. The device works one step ahead of what is reported.

import type { Loader } from '../data/dataset.ts';
import type { Batch } from '../data/pack.ts';
import type { Malformed } from '../data/source.ts';
import { lockFolder } from '../io/lock.ts';
import { generateText } from '../models/completion.ts';
import { checkpointFolder, latestCheckpoint, setAside } from '../models/folder.ts';
import { type LanguageModel, saveModel } from '../models/model.ts';
import type { Parameters, SpecTree } from '../nn/parameters.ts';
import { memory, native, resetPeak } from '../tensor/engine.ts';
import { ConfigError, TrainingError } from '../tensor/errors.ts';
import { keep, scope } from '../tensor/scope.ts';
import { valueAndGrad } from '../tensor/tape.ts';
import type { Tensor } from '../tensor/tensor.ts';
import type { Tokenizer } from '../tokenizer/tokenizer.ts';
import { type DeviceBatch, upload } from './batch.ts';
import { readState, restoreOptimizer, saveCheckpoint, type TrainingState } from './checkpoint.ts';
import { plannedSteps, type RunConfig, tokensPerStep } from './config.ts';
import type { Evaluation, Evaluations, SampleEvent, TrainEvent, WarningEvent } from './events.ts';
import { createOptimizer } from './optimizer.ts';
import { learningRate } from './schedules.ts';

export interface LoopOptions {
  /** Stops after the step that is under way, and saves. */
  readonly signal?: AbortSignal;
}

/** What a loss gives: `total` is minimised; the others are reported, summed over tokens with the batch's weights. */
export interface LossTensors {
  readonly total: Tensor;
  readonly kl?: Tensor;
  readonly ce?: Tensor;
}

/** What the loop asks of data. */
export interface TrainingData {
  readonly train: Loader;
  readonly report: { readonly malformedCount: number; readonly malformed: readonly Malformed[] };
}

/** The parts that make a run. */
export interface TrainingParts {
  readonly run: RunConfig;
  readonly model: LanguageModel;
  readonly tokenizer: Tokenizer;
  readonly data: TrainingData;
  /** What is trained. Default: all of the model. */
  readonly parameters?: Parameters<SpecTree>;
  /** To be told at the beginning. */
  readonly warnings?: readonly WarningEvent[];
  readonly teacherParameters?: number;
  /** Checkpoint that the model's weights came from; the rest of the state is read from it. */
  readonly resume: string | undefined;
  /** Facts that must be the same before and after a resume. */
  readonly pinned: Readonly<Record<string, string>>;
  /** @param micro number of the micro-batch since the beginning of the run, from 0, and the batch as it was uploaded. */
  loss(batch: DeviceBatch, micro: { readonly index: number; readonly batch: Batch }): LossTensors;
  evaluate(): Promise<Evaluation>;
  /** Texts written at an evaluation. Default: continuations of the run's prompts. */
  samples?(step: number): AsyncIterable<TrainEvent>;
  /** Writes a checkpoint's model. Default: as a model folder. */
  save?(folder: string): Promise<void>;
  /** What comes after the last step. */
  finish?(step: number): AsyncIterable<TrainEvent>;
}

/** Where a run begins: the checkpoint to go on from, by the run's `resume` setting. */
export async function resumePoint(run: RunConfig): Promise<string | undefined> {
  if (run.resume === false) return undefined;
  return run.resume === 'auto' ? latestCheckpoint(run.output) : run.resume;
}

/** Numbers of one optimizer step, read from the device. */
interface Reading {
  readonly step: number;
  readonly tokens: number;
  readonly rate: number;
  readonly values: Promise<{ loss: number; norm: number; kl?: number; ce?: number }>;
}

export async function* trainingLoop(
  parts: TrainingParts,
  options: LoopOptions = {},
): AsyncGenerator<TrainEvent, void, undefined> {
  // Two runs in one folder would remove each other's checkpoints.
  const lock = await lockFolder(parts.run.output);
  try {
    yield* train(parts, options);
  } finally {
    await lock.release();
  }
}

async function* train(parts: TrainingParts, options: LoopOptions): AsyncGenerator<TrainEvent, void, undefined> {
  const { run, model, data, tokenizer } = parts;
  const steps = plannedSteps(run);
  const started = performance.now();
  const optimizer = createOptimizer(parts.parameters ?? model.parameters, { ...run.optimizer, seed: run.seed });
  /** The step that the device works on, not reported yet. */
  let ahead: Reading | undefined;
  try {
    resetPeak();
    let step = 0;
    let tokens = 0;
    let evaluations: Evaluations = { stale: 0 };
    const { patience } = run.evaluate;
    const stale = () => patience !== undefined && evaluations.stale >= patience;
    if (parts.resume !== undefined) {
      const state = await readState(parts.resume);
      checkPinned(parts.resume, state.pinned, parts.pinned);
      await restoreOptimizer(parts.resume, optimizer, state);
      data.train.restore(state.data);
      ({ step, tokens, evaluations = evaluations } = state);
    }
    const first = step;
    yield {
      type: 'start',
      kind: run.kind,
      name: run.name,
      parameters: (parts.parameters ?? model.parameters).count,
      ...(parts.teacherParameters === undefined ? {} : { teacherParameters: parts.teacherParameters }),
      steps,
      tokens: steps * tokensPerStep(run),
      device: run.device,
      threads: native().info().threads ?? 1,
      output: run.output,
      ...(parts.resume === undefined ? {} : { resumedFrom: { step, path: parts.resume } }),
    };
    const { malformedCount, malformed } = data.report;
    if (malformedCount > 0) {
      const named = malformed.slice(0, 3).map(({ file, line, reason }) => `${file}:${line}: ${reason}`);
      const more = malformedCount > named.length ? `; and ${malformedCount - named.length} more` : '';
      yield {
        type: 'warning',
        code: 'WARN_MALFORMED',
        message: `${malformedCount === 1 ? '1 malformed line was' : `${malformedCount} malformed lines were`} left out: ${named.join('; ')}${more}`,
        count: malformedCount,
        malformed: malformed.slice(0, 10),
      };
    }

    yield* parts.warnings ?? [];

    let evaluation: Evaluation | undefined;
    let saved: { step: number; path: string } | undefined;
    let last = performance.now();
    let pace: number | undefined; // seconds of a step, smoothed
    let counted = tokens; // tokens of the steps that were told

    const launch = async (): Promise<Reading> => {
      const batches: Batch[] = [];
      for (let i = 0; i < run.batch.accumulate; i++) batches.push(await data.train.next());
      const predicted = batches.reduce((n, b) => n + b.predicted, 0);
      const rate = learningRate(run.schedule, run.optimizer.learningRate, step, steps);
      const share = predicted > 0 ? 1 / predicted : 1;
      const from = step * run.batch.accumulate;
      const losses: LossTensors[] = [];
      let norm: Tensor;
      try {
        for (const [i, batch] of batches.entries()) losses.push(gradients(parts.loss, batch, share, from + i));
        norm = keep(optimizer.step(rate));
      } catch (error) {
        for (const one of losses) free(one);
        throw error;
      }
      step++;
      tokens += batches.reduce((n, b) => n + b.tokens, 0);
      const values = readStep(losses, norm);
      // A failure is met where the step is reported; until then it is not unhandled.
      values.catch(() => {});
      return { step, tokens, rate, values };
    };
    const report = async function* (reading: Reading): AsyncGenerator<TrainEvent> {
      const values = await reading.values;
      const now = performance.now();
      const seconds = (now - last) / 1000;
      last = now;
      if (!Number.isFinite(values.loss) || !Number.isFinite(values.norm))
        throw notFinite(reading, values, saved?.path ?? parts.resume);
      const tokensPerSecond = (reading.tokens - counted) / seconds;
      counted = reading.tokens;
      pace = pace === undefined ? seconds : pace + 0.1 * (seconds - pace);
      if (reading.step % run.log.every === 0 || reading.step === steps) {
        yield {
          type: 'step',
          step: reading.step,
          tokens: reading.tokens,
          loss: values.loss,
          learningRate: reading.rate,
          gradientNorm: values.norm,
          tokensPerSecond,
          seconds,
          memory: { live: memory().live, peak: memory().peak, rss: process.memoryUsage.rss() },
          ...(values.kl === undefined ? {} : { kl: values.kl }),
          ...(values.ce === undefined ? {} : { ce: values.ce }),
          etaSeconds: (steps - reading.step) * pace,
        };
      }
    };
    const write = parts.save ?? ((folder) => saveModel(folder, model, tokenizer));
    const save = async (): Promise<TrainEvent> => {
      const from = performance.now();
      const state: TrainingState = {
        format: 1,
        kind: run.kind,
        step,
        tokens,
        updates: optimizer.updates,
        data: data.train.state(),
        ...(patience === undefined ? {} : { evaluations }),
        pinned: parts.pinned,
      };
      if (saved === undefined) await setAside(run.output, first);
      const { path, bytes } = await saveCheckpoint(run.output, { optimizer, save: write }, state, run.checkpoint.keep);
      saved = { step, path };
      return { type: 'checkpoint', step, path, seconds: (performance.now() - from) / 1000, bytes };
    };

    const given = () => (data.train.sources === undefined ? {} : { sources: data.train.sources });
    const evaluate = async function* (): AsyncGenerator<TrainEvent> {
      const from = performance.now();
      evaluation = await parts.evaluate();
      const { best } = evaluations;
      const better = best === undefined || evaluation.loss < best.loss;
      if (step > 0)
        evaluations = better ? { best: { step, loss: evaluation.loss }, stale: 0 } : { best, stale: evaluations.stale + 1 };
      yield { type: 'evaluate', step, ...evaluation, seconds: (performance.now() - from) / 1000, ...given() };
      yield* parts.samples?.(step) ?? samples(parts, step);
    };
    const isBest = () => patience !== undefined && evaluations.best?.step === step;

    if (step === 0 && run.evaluate.first && !options.signal?.aborted) {
      yield* evaluate();
      last = performance.now();
    }

    while (step < steps && !stale() && !options.signal?.aborted) {
      const before = ahead;
      ahead = await launch();
      if (before !== undefined) yield* report(before);
      const evaluates = step % run.evaluate.every === 0 || step === steps;
      const saves = step % run.checkpoint.every === 0 || step === steps;
      if (!evaluates && !saves) continue;
      yield* report(ahead);
      ahead = undefined;
      if (evaluates) yield* evaluate();
      if (saves || (evaluates && isBest())) yield await save();
      last = performance.now();
    }
    if (ahead !== undefined) yield* report(ahead);
    const aborted = step < steps && !stale();
    // A run that had nothing left to do still tells how good its model is.
    if (!aborted && evaluation === undefined) yield* evaluate();
    if (step > first && saved?.step !== step) yield await save();
    if (!aborted) yield* parts.finish?.(step) ?? [];
    const { best } = evaluations;
    yield {
      type: 'done',
      reason: aborted ? 'aborted' : stale() ? 'stopped' : 'finished',
      step,
      tokens,
      seconds: (performance.now() - started) / 1000,
      ...(evaluation === undefined ? {} : { evaluation }),
      ...given(),
      ...(saved === undefined ? {} : { checkpoint: saved.path }),
      ...(patience === undefined || best === undefined
        ? {}
        : { best: { ...best, checkpoint: checkpointFolder(run.output, best.step) } }),
    };
  } finally {
    // Left early: what is on its way still owns tensors.
    await ahead?.values.catch(() => {});
    optimizer.dispose();
  }
}

/** Texts that the model writes as it is now. */
async function* samples({ run, model, tokenizer }: TrainingParts, step: number): AsyncGenerator<SampleEvent> {
  if (!('samples' in run.evaluate) || run.evaluate.samples === undefined) return;
  const { prompts, tokens, temperature } = run.evaluate.samples;
  for (const prompt of prompts) {
    let text = '';
    for await (const piece of generateText(model, tokenizer, prompt, { tokens, temperature, seed: run.seed })) text += piece;
    yield { type: 'sample', step, prompt, text };
  }
}

/** Adds the gradient of one micro-batch; the returned sums are still on the device. */
export function gradients(loss: TrainingParts['loss'], batch: Batch, share: number, index = 0): LossTensors {
  return keep(
    scope(() => {
      let reported: Omit<LossTensors, 'total'> = {};
      try {
        const total = valueAndGrad(() => {
          const { total, ...rest } = loss(upload(batch, share), { index, batch });
          // What is only reported must outlive the pass.
          reported = keep(rest);
          return total;
        });
        return { ...reported, total };
      } catch (error) {
        free(reported);
        throw error;
      }
    }),
  );
}

async function readStep(
  losses: readonly LossTensors[],
  norm: Tensor,
): Promise<{ loss: number; norm: number; kl?: number; ce?: number }> {
  const sum = async (tensors: readonly (Tensor | undefined)[]): Promise<number | undefined> => {
    const given = tensors.filter((t) => t !== undefined);
    if (given.length === 0) return undefined;
    const values = await Promise.all(given.map((t) => t.item()));
    return values.reduce((a, b) => a + b, 0);
  };
  try {
    const [loss, kl, ce, squared] = await Promise.all([
      sum(losses.map((l) => l.total)),
      sum(losses.map((l) => l.kl)),
      sum(losses.map((l) => l.ce)),
      norm.item(),
    ]);
    return { loss: loss!, norm: Math.sqrt(squared), ...(kl === undefined ? {} : { kl }), ...(ce === undefined ? {} : { ce }) };
  } finally {
    for (const one of losses) free(one);
    norm.dispose();
  }
}

function free({ total, kl, ce }: Partial<LossTensors>): void {
  for (const t of [total, kl, ce]) t?.dispose();
}

function notFinite(reading: Reading, values: { loss: number; norm: number }, checkpoint: string | undefined): TrainingError {
  const what = Number.isFinite(values.loss) ? `the gradient norm is ${values.norm}` : `the loss is ${values.loss}`;
  const advice = checkpoint === undefined ? 'no checkpoint was written yet' : `the last good checkpoint is ${checkpoint}`;
  return new TrainingError(
    `step ${reading.step}: ${what}; training stopped and nothing was saved over: ${advice}. Lower the learning rate, warm up longer or clip`,
    {
      code: 'ERR_NOT_FINITE',
      op: 'train',
      argument: Number.isFinite(values.loss) ? 'gradientNorm' : 'loss',
      actual: String(Number.isFinite(values.loss) ? values.norm : values.loss),
    },
  );
}

function checkPinned(checkpoint: string, was: Readonly<Record<string, string>>, is: Readonly<Record<string, string>>): void {
  for (const [field, value] of Object.entries(is)) {
    if (was[field] === value) continue;
    throw new ConfigError(
      `${checkpoint}: was made with another ${field} than this run has; change the run back, give it another output folder, or set resume to false`,
      { code: 'ERR_RESUME', op: 'resume', argument: field, expected: String(was[field]), actual: value },
    );
  }
}
