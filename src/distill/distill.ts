import { type Dataset, openDataset } from '../data/dataset.ts';
import { evaluateModel } from '../evaluate/evaluate.ts';
import { resolveCheckpoint } from '../models/folder.ts';
import { createModel, type LanguageModel, loadModel, loadWeights } from '../models/model.ts';
import { linearDistill } from '../ops/loss.ts';
import { dot } from '../ops/reduce.ts';
import { reshape } from '../ops/reshape.ts';
import { ConfigError } from '../tensor/errors.ts';
import { scope } from '../tensor/scope.ts';
import { noGrad } from '../tensor/tape.ts';
import { loadTokenizer, type Tokenizer } from '../tokenizer/tokenizer.ts';
import type { DeviceBatch } from '../train/batch.ts';
import { type DistillConfig, parseRunOf, type RunInput } from '../train/config.ts';
import type { TrainEvent } from '../train/events.ts';
import { type LoopOptions, type LossTensors, resumePoint, trainingLoop } from '../train/loop.ts';
import { datasetOptions, validationLimit as limit, pinnedFacts, runModelConfig, startEngine } from '../train/setup.ts';

/**
 * Trains a student on the distribution of a teacher: at each token the divergence between their soft-capped distributions, mean
 * over the predicted tokens of a step, optionally mixed with the cross-entropy of the text. The logits of neither ever exist whole.
 *
 * ```ts
 * for await (const event of distill({ kind: 'distill', teacher: { checkpoint: 'runs/teacher' }, ... })) { ... }
 * ```
 * Leaving the loop early stops training and frees everything; aborting `signal` also saves a checkpoint first.
 * @throws ConfigError for a wrong field, or when teacher and student do not share a vocabulary; see {@link pretrain} for the others.
 */
export async function* distill(
  input: RunInput | DistillConfig,
  options: LoopOptions = {},
): AsyncGenerator<TrainEvent, void, undefined> {
  const run = parseRunOf('distill', input);
  const { master } = run.optimizer;
  startEngine(run);
  const resume = await resumePoint(run);
  const teacherFolder = await resolveCheckpoint(run.teacher.checkpoint);
  let teacher: LanguageModel | undefined;
  let student: LanguageModel | undefined;
  let data: Dataset | undefined;
  try {
    const teacherTokenizer = await loadTokenizer(teacherFolder);
    teacher = await loadWeights(teacherFolder, { weights: run.teacher.weights });
    let tokenizer: Tokenizer;
    if (resume === undefined) {
      tokenizer = run.tokenizer === undefined ? teacherTokenizer : await loadTokenizer(run.tokenizer);
      student = createModel(runModelConfig(run, tokenizer), { seed: run.seed, master });
    } else {
      ({ model: student, tokenizer } = await loadModel(resume, { trainable: true, master }));
    }
    checkVocabularies(teacher, student, teacherTokenizer, tokenizer);
    data = await openDataset(datasetOptions(run, tokenizer, options.signal));
    const [from, to, opened] = [teacher, student, data];
    yield* trainingLoop(
      {
        run,
        model: student,
        tokenizer,
        data,
        teacherParameters: teacher.parameters.count,
        resume,
        pinned: pinnedFacts(run, tokenizer),
        loss: (batch) => distillationLoss(from, to, batch, run),
        evaluate: () => evaluateModel(to, opened.validation(limit(run)), { teacher: from }),
      },
      options,
    );
  } finally {
    teacher?.dispose();
    student?.dispose();
    await data?.close();
  }
}

function checkVocabularies(teacher: LanguageModel, student: LanguageModel, its: Tokenizer, ours: Tokenizer): void {
  if (its.fingerprint !== ours.fingerprint) {
    throw new ConfigError(
      "distill: teacher and student have different tokenizers, so their token ids do not mean the same; use the teacher's tokenizer",
      {
        code: 'ERR_VOCABULARY',
        op: 'distill',
        argument: 'tokenizer',
        expected: its.fingerprint,
        actual: ours.fingerprint,
      },
    );
  }
  if (teacher.config.vocabSize !== student.config.vocabSize) {
    throw new ConfigError(
      `distill: the teacher has ${teacher.config.vocabSize} rows of vocabulary, the student ${student.config.vocabSize}; give the student the same model.vocabSize`,
      {
        code: 'ERR_VOCABULARY',
        op: 'distill',
        argument: 'model.vocabSize',
        expected: String(teacher.config.vocabSize),
        actual: String(student.config.vocabSize),
      },
    );
  }
}

/** The divergence of the student from the teacher on a batch, weighted. */
export function distillationLoss(
  teacher: LanguageModel,
  student: LanguageModel,
  batch: DeviceBatch,
  run: DistillConfig,
): LossTensors {
  const { divergence, temperature, squaredTemperature, hardWeight } = run.distill;
  const told = noGrad(() => scope(() => reshape(teacher.hidden(batch.input), [-1, teacher.config.width])));
  const hidden = student.hidden(batch.input, { recompute: run.recompute });
  const { total, kl, ce } = linearDistill(reshape(hidden, [-1, student.config.width]), student.head, {
    targets: batch.targets,
    weights: batch.weights,
    cap: student.config.finalCap,
    teacher: { hidden: told, head: teacher.head, cap: teacher.config.finalCap },
    divergence,
    temperature,
    squaredTemperature,
    hardWeight,
  });
  return { total, kl: dot(kl, batch.weights), ...(ce === undefined ? {} : { ce: dot(ce, batch.weights) }) };
}
