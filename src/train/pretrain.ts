import { type Dataset, openDataset } from '../data/dataset.ts';
import { evaluateModel } from '../evaluate/evaluate.ts';
import { resolveCheckpoint } from '../models/folder.ts';
import { createModel, type LanguageModel, loadModel } from '../models/model.ts';
import { linearCrossEntropy } from '../ops/loss.ts';
import { reshape } from '../ops/reshape.ts';
import type { Tokenizer } from '../tokenizer/tokenizer.ts';
import type { DeviceBatch } from './batch.ts';
import { type PretrainConfig, parseRunOf, type RunInput } from './config.ts';
import type { TrainEvent } from './events.ts';
import { type LoopOptions, type LossTensors, resumePoint, trainingLoop } from './loop.ts';
import { datasetOptions, validationLimit as limit, pinnedFacts, runModelConfig, runTokenizer, startEngine } from './setup.ts';

/**
 * Trains a model on text: next-token cross-entropy, mean over the predicted tokens of a step.
 *
 * ```ts
 * for await (const event of pretrain({ kind: 'pretrain', output: 'runs/first', ... })) {
 *   if (event.type === 'step') console.log(event.step, event.loss);
 * }
 * ```
 * Leaving the loop early stops training and frees everything; aborting `signal` also saves a checkpoint first.
 * @throws ConfigError for a wrong field; DataError for text that cannot be used; TrainingError `ERR_NOT_FINITE`; FileError when
 * the output folder cannot be written.
 */
export async function* pretrain(
  input: RunInput | PretrainConfig,
  options: LoopOptions = {},
): AsyncGenerator<TrainEvent, void, undefined> {
  const run = parseRunOf('pretrain', input);
  const { master } = run.optimizer;
  startEngine(run);
  const resume = await resumePoint(run);
  let model: LanguageModel | undefined;
  let data: Dataset | undefined;
  try {
    let tokenizer: Tokenizer;
    const weights = resume ?? (run.from === undefined ? undefined : await resolveCheckpoint(run.from));
    if (weights === undefined) {
      tokenizer = await runTokenizer(run, options.signal);
      model = createModel(runModelConfig(run, tokenizer), { seed: run.seed, master });
    } else {
      ({ model, tokenizer } = await loadModel(weights, { trainable: true, master }));
    }
    data = await openDataset(datasetOptions(run, tokenizer, options.signal));
    const own = model;
    const opened = data;
    yield* trainingLoop(
      {
        run,
        model,
        tokenizer,
        data,
        resume,
        pinned: pinnedFacts(run, tokenizer),
        loss: (batch) => textLoss(own, batch, run.recompute),
        evaluate: () => evaluateModel(own, opened.validation(limit(run))),
      },
      options,
    );
  } finally {
    model?.dispose();
    await data?.close();
  }
}

/** Next-token cross-entropy of a batch, weighted. */
export function textLoss(model: LanguageModel, batch: DeviceBatch, recompute: boolean): LossTensors {
  const hidden = model.hidden(batch.input, { recompute });
  const { total } = linearCrossEntropy(reshape(hidden, [-1, model.config.width]), model.head, batch.targets, {
    weights: batch.weights,
    cap: model.config.finalCap,
  });
  return { total };
}
