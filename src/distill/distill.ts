import { type Dataset, openDataset, type TextDataset } from '../data/dataset.ts';
import { evaluateModel } from '../evaluate/evaluate.ts';
import { resolveCheckpoint } from '../models/folder.ts';
import { createModel, type LanguageModel, loadModel, loadWeights } from '../models/model.ts';
import { linearDistill, type TeacherOutput } from '../ops/loss.ts';
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
import { openTeacherCache, type TeacherCache } from './cache.ts';
import { checkCachedRun } from './teach.ts';

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
  let teacher: LanguageModel | undefined;
  let cache: TeacherCache | undefined;
  let student: LanguageModel | undefined;
  let data: TextDataset | undefined;
  try {
    if (run.teacher.cache !== undefined) cache = await openTeacherCache(run.teacher.cache);
    const teacherFolder = run.teacher.cache ?? (await resolveCheckpoint(run.teacher.checkpoint!));
    const teacherTokenizer = await loadTokenizer(teacherFolder);
    if (cache === undefined) teacher = await loadWeights(teacherFolder, { weights: run.teacher.weights });
    let tokenizer: Tokenizer;
    if (resume === undefined) {
      tokenizer = run.tokenizer === undefined ? teacherTokenizer : await loadTokenizer(run.tokenizer);
      student = createModel(runModelConfig(run, tokenizer), { seed: run.seed, master });
    } else {
      ({ model: student, tokenizer } = await loadModel(resume, { trainable: true, master }));
    }
    checkVocabularies(teacher?.config.vocabSize ?? cache!.facts.vocabSize, student, teacherTokenizer, tokenizer);
    data = await openDataset(datasetOptions(run, tokenizer, options.signal));
    if (cache !== undefined) checkCache(cache, run, data);
    const [from, to] = [teacher, student];
    const opened = cache === undefined ? data : taught(data, cache);
    yield* trainingLoop(
      {
        run,
        model: student,
        tokenizer,
        data: opened,
        ...(teacher === undefined ? {} : { teacherParameters: teacher.parameters.count }),
        resume,
        pinned: { ...pinnedFacts(run, tokenizer), ...(cache === undefined ? {} : { teacher: cache.facts.teacher }) },
        loss: (batch) => distillationLoss(from, to, batch, run),
        evaluate: () => evaluateModel(to, opened.validation(limit(run)), from === undefined ? {} : { teacher: from }),
      },
      options,
    );
  } finally {
    teacher?.dispose();
    student?.dispose();
    await data?.close();
    await cache?.close();
  }
}

/** The dataset with what the teacher found likely in each batch. */
function taught(data: TextDataset, cache: TeacherCache): Dataset {
  const { train } = data;
  return {
    ...data,
    train: {
      next: async () => cache.likely(await train.next()),
      get epoch() {
        return train.epoch;
      },
      get sources() {
        return train.sources;
      },
      state: () => train.state(),
      restore: (state) => train.restore(state),
    },
    async *validation(options) {
      for await (const batch of data.validation(options)) yield await cache.likely(batch);
    },
  };
}

/** @throws ConfigError `ERR_TEACHER_CACHE` naming what differs between the cache and the run. */
function checkCache({ facts }: TeacherCache, run: DistillConfig, data: TextDataset): void {
  checkCachedRun(run);
  const differences: (readonly [string, unknown, unknown])[] = [
    ['batch.length', facts.length, run.batch.length],
    ['distill.temperature', facts.temperature, run.distill.temperature],
    ...data.stores.flatMap(({ tokens, ends }, i) => [
      [`tokens of source ${i + 1}`, facts.stores[i]?.tokens, tokens] as const,
      [`documents of source ${i + 1}`, facts.stores[i]?.documents, ends.length] as const,
    ]),
  ];
  for (const [what, its, ours] of differences) {
    if (its === ours) continue;
    throw new ConfigError(
      `distill: ${what}: the teacher's cache was made with ${its}, the run has ${ours}; make a cache for this run`,
      {
        code: 'ERR_TEACHER_CACHE',
        op: 'distill',
        argument: 'teacher.cache',
        expected: String(its),
        actual: String(ours),
      },
    );
  }
}

function checkVocabularies(vocabSize: number, student: LanguageModel, its: Tokenizer, ours: Tokenizer): void {
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
  if (vocabSize !== student.config.vocabSize) {
    throw new ConfigError(
      `distill: the teacher has ${vocabSize} rows of vocabulary, the student ${student.config.vocabSize}; give the student the same model.vocabSize`,
      {
        code: 'ERR_VOCABULARY',
        op: 'distill',
        argument: 'model.vocabSize',
        expected: String(vocabSize),
        actual: String(student.config.vocabSize),
      },
    );
  }
}

/** The divergence of the student from the teacher on a batch, weighted; without a teacher, from what is `likely` in the batch. */
export function distillationLoss(
  teacher: LanguageModel | undefined,
  student: LanguageModel,
  batch: DeviceBatch,
  run: DistillConfig,
): LossTensors {
  const { divergence, temperature, squaredTemperature, hardWeight } = run.distill;
  const told = teacher === undefined ? batch.likely! : spoken(teacher, batch);
  const hidden = student.hidden(batch.input, { recompute: run.recompute });
  const { total, kl, ce } = linearDistill(reshape(hidden, [-1, student.config.width]), student.head, {
    targets: batch.targets,
    weights: batch.weights,
    cap: student.config.finalCap,
    teacher: told,
    divergence,
    temperature,
    squaredTemperature,
    hardWeight,
  });
  return { total, kl: dot(kl, batch.weights), ...(ce === undefined ? {} : { ce: dot(ce, batch.weights) }) };
}

function spoken(teacher: LanguageModel, batch: DeviceBatch): TeacherOutput {
  const hidden = noGrad(() => scope(() => reshape(teacher.hidden(batch.input), [-1, teacher.config.width])));
  return { hidden, head: teacher.head, cap: teacher.config.finalCap };
}
