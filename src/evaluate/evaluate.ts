import { openDataset } from '../data/dataset.ts';
import type { Batch } from '../data/pack.ts';
import { resolveCheckpoint } from '../models/folder.ts';
import { type LanguageModel, loadModel, loadWeights } from '../models/model.ts';
import { linearCrossEntropy, linearDistill } from '../ops/loss.ts';
import { dot } from '../ops/reduce.ts';
import { reshape } from '../ops/reshape.ts';
import { checkModel } from '../tensor/argument.ts';
import { type Device, startFor } from '../tensor/engine.ts';
import { DataError } from '../tensor/errors.ts';
import { scope } from '../tensor/scope.ts';
import { noGrad } from '../tensor/tape.ts';
import type { Tensor } from '../tensor/tensor.ts';
import { upload } from '../train/batch.ts';
import type { Evaluation } from '../train/events.ts';
import { sourceOf } from '../train/setup.ts';

export interface ComparisonOptions {
  /** Compare with this model: KL(teacher ‖ model) and top-1 agreement. */
  readonly teacher?: LanguageModel;
  readonly signal?: AbortSignal;
}

/**
 * Scores a model on batches: means over the predicted tokens. Batches of a cached teacher are compared with what it found likely.
 * @throws DataError `ERR_EMPTY` when no token is predicted.
 */
export async function evaluateModel(
  model: LanguageModel,
  batches: AsyncIterable<Batch> | Iterable<Batch>,
  options: ComparisonOptions = {},
): Promise<Evaluation> {
  checkModel('evaluateModel', model);
  const sums = { loss: 0, kl: 0, agreement: 0 };
  let tokens = 0;
  let compared = false;
  for await (const batch of batches) {
    options.signal?.throwIfAborted();
    const measured = scope(() => noGrad(() => measure(model, batch, options.teacher)));
    compared = 'kl' in measured;
    for (const [name, t] of Object.entries(measured)) {
      sums[name as keyof typeof sums] += await t.item();
      t.dispose();
    }
    tokens += batch.predicted;
  }
  if (tokens === 0) {
    throw new DataError('evaluate: the validation data predicts no token; give more text or a larger validation share', {
      code: 'ERR_EMPTY',
      op: 'evaluate',
      argument: 'validation',
    });
  }
  const loss = sums.loss / tokens;
  return {
    loss,
    perplexity: Math.exp(loss),
    tokens,
    ...(compared ? { kl: sums.kl / tokens, agreement: sums.agreement / tokens } : {}),
  };
}

/** Sums over the predicted tokens of a batch. */
function measure(model: LanguageModel, batch: Batch, teacher: LanguageModel | undefined): Record<string, Tensor> {
  const { input, targets, weights, likely } = upload(batch, 1);
  const flat = (m: LanguageModel): Tensor => reshape(m.hidden(input), [-1, m.config.width]);
  const x = flat(model);
  if (teacher === undefined && likely === undefined) {
    return { loss: linearCrossEntropy(x, model.head, targets, { weights, cap: model.config.finalCap }).total };
  }
  const { kl, ce, agree } = linearDistill(x, model.head, {
    targets,
    weights,
    cap: model.config.finalCap,
    teacher: teacher === undefined ? likely! : { hidden: flat(teacher), head: teacher.head, cap: teacher.config.finalCap },
    divergence: { kind: 'forward_kl' },
    agreement: true,
  });
  return { loss: dot(ce!, weights), kl: dot(kl, weights), agreement: dot(agree!, weights) };
}

export interface EvaluateOptions {
  /** A model folder, or the output folder of a run: its newest checkpoint. */
  readonly checkpoint: string;
  /** The text to score: one of the three. */
  readonly data: {
    readonly text?: string | string[];
    readonly jsonl?: string | string[];
    readonly tokens?: string | string[];
    readonly field?: string;
  };
  /** Checkpoint to compare with: adds KL and top-1 agreement. */
  readonly teacher?: string;
  /** Tokens of a sequence. Default 256. */
  readonly length?: number;
  /** Sequences of a batch. Default 8. */
  readonly sequences?: number;
  /** Score at most so many batches. Default: all. */
  readonly batches?: number;
  /** Where to compute, if the engine does not run yet. Default "cpu". */
  readonly device?: Device;
  /** Threads, if the engine does not run yet. Default: the cores of the machine. */
  readonly threads?: number;
  readonly signal?: AbortSignal;
}

/** Scores the model of a folder on text. @throws FormatError, DataError, ConfigError */
export async function evaluate(options: EvaluateOptions): Promise<Evaluation> {
  const { length = 256, sequences = 8, batches, signal } = options;
  startFor('evaluate', options);
  const { model, tokenizer } = await loadModel(await resolveCheckpoint(options.checkpoint));
  let teacher: LanguageModel | undefined;
  try {
    if (options.teacher !== undefined) teacher = await loadWeights(await resolveCheckpoint(options.teacher));
    const source = sourceOf(options.data);
    const data = await openDataset({
      train: [],
      validation: source,
      tokenizer,
      length,
      batch: sequences,
      ...(signal === undefined ? {} : { signal }),
    });
    try {
      const scored = data.validation(batches === undefined ? {} : { batches });
      return await evaluateModel(model, scored, {
        ...(teacher === undefined ? {} : { teacher }),
        ...(signal === undefined ? {} : { signal }),
      });
    } finally {
      await data.close();
    }
  } finally {
    model.dispose();
    teacher?.dispose();
  }
}
