import { readFile } from 'node:fs/promises';
import { resolve } from 'node:path';
import { type Instructions, openInstructions } from '../data/instructions.ts';
import type { Batch } from '../data/pack.ts';
import { evaluateModel } from '../evaluate/evaluate.ts';
import { loadAdapter, saveAdapter } from '../models/adapter.ts';
import { resolveCheckpoint } from '../models/folder.ts';
import { adapterBase, type LanguageModel, loadModel, saveModel } from '../models/model.ts';
import { type Adapter, createAdapter, setDropout } from '../nn/lora.ts';
import { linearCrossEntropy } from '../ops/loss.ts';
import { addNoise } from '../ops/random.ts';
import { reshape } from '../ops/reshape.ts';
import { ConfigError, FileError } from '../tensor/errors.ts';
import { tensor } from '../tensor/tensor.ts';
import { type ChatTemplate, chatTemplate, loadChatTemplate } from '../tokenizer/chat.ts';
import { chatStyles } from '../tokenizer/styles.ts';
import type { Tokenizer } from '../tokenizer/tokenizer.ts';
import type { DeviceBatch } from './batch.ts';
import { type FinetuneConfig, parseRunOf, type RunInput } from './config.ts';
import type { TrainEvent, WarningEvent } from './events.ts';
import { type LoopOptions, type LossTensors, resumePoint, trainingLoop } from './loop.ts';
import { sampleResponses, writeResponses } from './responses.ts';
import { digest, validationLimit as limit, startEngine } from './setup.ts';

/**
 * Finetunes a model on conversations: cross-entropy of the tokens that the mask chooses, mean over their weights in a step.
 *
 * ```ts
 * for await (const event of finetune({ kind: 'finetune', model: 'models/base', data: { train: 'alpaca.json' }, template: 'alpaca', epochs: 2, ... })) {
 *   if (event.type === 'evaluate') console.log(event.step, event.loss);
 * }
 * ```
 * Leaving the loop early stops training and frees everything; aborting `signal` also saves a checkpoint first.
 * @throws ConfigError for a wrong field; DataError when no row can be used; see {@link pretrain} for the others.
 */
export async function* finetune(
  input: RunInput | FinetuneConfig,
  options: LoopOptions = {},
): AsyncGenerator<TrainEvent, void, undefined> {
  const parsed = parseRunOf('finetune', input);
  startEngine(parsed);
  const resume = await resumePoint(parsed);
  // Checkpoints of an adapter hold the adapter alone.
  const folder = resume === undefined || parsed.adapter !== undefined ? await resolveCheckpoint(parsed.model) : resume;
  if (parsed.base !== undefined && (await adapterBase(folder)) !== undefined) {
    throw new ConfigError(
      `${parsed.name}: model is ${folder}, an adapter, and a base of few bits (${parsed.base}) cannot take it; leave base out, or write the two as one model first: limbeck export ${parsed.model} --to safetensors`,
      { code: 'ERR_CONFIG', op: 'finetune', argument: 'base', expected: 'no base beside an adapter', actual: parsed.base },
    );
  }
  let model: LanguageModel | undefined;
  let adapter: Adapter | undefined;
  try {
    const loaded = await loadModel(
      folder,
      parsed.adapter === undefined
        ? { trainable: true, master: parsed.optimizer.master }
        : { trainable: false, weights: parsed.base },
    );
    model = loaded.model;
    adapter = await runAdapter(parsed, model, resume);
    const { tokenizer } = loaded;
    checkLength(parsed, model);
    const template = await runTemplate(parsed, folder, tokenizer);
    const { format, ...rows } = parsed.data;
    const data = await openInstructions({
      ...rows,
      ...(format === undefined ? {} : { format }),
      template,
      tokenizer,
      mask: parsed.mask,
      promptWeight: parsed.promptWeight,
      length: parsed.batch.length,
      batch: parsed.batch.sequences,
      seed: parsed.seed,
      ...(options.signal === undefined ? {} : { signal: options.signal }),
    });
    const run = inSteps(parsed, data.report.trainRows);
    const own = model;
    const beside = adapter;
    const dropping = (pass: number | undefined): void => {
      if (beside !== undefined) setDropout(beside, pass);
    };
    const answers = { model: own, tokenizer, template, heldOut: data.heldOut, run };
    yield* trainingLoop(
      {
        run,
        model,
        ...(beside === undefined ? {} : { parameters: beside.parameters }),
        tokenizer,
        data,
        warnings: warningsOf(data),
        resume,
        pinned: {
          kind: run.kind,
          seed: String(run.seed),
          tokenizer: tokenizer.fingerprint,
          batch: digest(run.batch),
          neftune: String(run.neftune),
          template: digest(template.source),
          mask: digest([run.mask, run.promptWeight]),
          adapter: digest([run.adapter ?? null, run.base ?? null]),
        },
        loss(batch, micro) {
          dropping(micro.index);
          return instructionLoss(own, batch, micro, run);
        },
        evaluate() {
          dropping(undefined);
          return evaluateModel(own, data.validation(limit(run)));
        },
        samples: (step) => sampleResponses(answers, step),
        async save(into) {
          // Transformers and others read the file of a template before what tokenizer_config.json says.
          const files = { ...loaded.files, 'chat_template.jinja': template.source };
          if (beside === undefined) return saveModel(into, own, tokenizer, { files });
          await saveAdapter(into, own, beside, { base: resolve(folder), files });
          await tokenizer.save(into);
        },
        finish: (step) => writeResponses(answers, step),
      },
      options,
    );
  } finally {
    adapter?.dispose();
    model?.dispose();
  }
}

/** The adapter that a run trains: a new one, or that of the checkpoint it goes on from. */
async function runAdapter(run: FinetuneConfig, model: LanguageModel, resume: string | undefined): Promise<Adapter | undefined> {
  if (run.adapter === undefined) return undefined;
  if (resume === undefined) return createAdapter(model, { ...run.adapter, seed: run.seed });
  const { ratio, dropout } = run.adapter;
  return loadAdapter(resume, model, { trainable: true, ratio, dropout, seed: run.seed });
}

/** The chat template that a run names. */
async function runTemplate(run: FinetuneConfig, folder: string, tokenizer: Tokenizer): Promise<ChatTemplate> {
  const { template } = run;
  if (template === 'model') {
    const own = await loadChatTemplate(folder, tokenizer);
    if (own !== undefined) return own;
    const known = Object.keys(chatStyles).join(', ');
    throw new ConfigError(
      `${run.name}: the model in ${folder} has no chat template; set template to a style (${known}) or the path of a .jinja file`,
      { code: 'ERR_CONFIG', op: 'finetune', argument: 'template', expected: known, actual: 'model' },
    );
  }
  if (!template.endsWith('.jinja')) return chatTemplate(template, tokenizer);
  let source: string;
  try {
    source = await readFile(template, 'utf8');
  } catch (error) {
    throw new FileError(`${run.name}: template ${template} cannot be read: ${(error as Error).message}`, {
      code: 'ERR_READ',
      op: 'finetune',
      argument: 'template',
      cause: error,
    });
  }
  return chatTemplate(source, tokenizer, template);
}

function checkLength(run: FinetuneConfig, { config }: LanguageModel): void {
  if (run.batch.length <= config.context) return;
  throw new ConfigError(`${run.name}: batch.length is ${run.batch.length}; the model reads at most ${config.context} tokens`, {
    code: 'ERR_CONFIG',
    op: 'finetune',
    argument: 'batch.length',
    expected: `at most ${config.context}`,
    actual: String(run.batch.length),
  });
}

/** The same run with its length in steps. */
function inSteps(run: FinetuneConfig, rows: number): FinetuneConfig {
  if (run.epochs === undefined) return run;
  return { ...run, steps: Math.max(1, Math.ceil((run.epochs * rows) / (run.batch.sequences * run.batch.accumulate))) };
}

function warningsOf({ report }: Instructions): WarningEvent[] {
  const { truncated, dropped, trainExamples, validationExamples } = report;
  const all = trainExamples + validationExamples + dropped;
  const told: WarningEvent[] = [];
  if (truncated > 0) {
    const message = `${truncated} of ${all} conversations were cut to the length of a row; their end tokens stay`;
    told.push({ type: 'warning', code: 'WARN_TRUNCATED', message, count: truncated });
  }
  if (dropped > 0) {
    const message = `${dropped} of ${all} conversations were left out: they are longer than a row`;
    told.push({ type: 'warning', code: 'WARN_DROPPED', message, count: dropped });
  }
  return told;
}

/** Cross-entropy of a batch, weighted; with noise on the embeddings where the run asks for it. */
export function instructionLoss(
  model: LanguageModel,
  batch: DeviceBatch,
  micro: { readonly index: number; readonly batch: Batch },
  run: Pick<FinetuneConfig, 'neftune' | 'recompute' | 'seed'>,
): LossTensors {
  const { neftune, recompute, seed } = run;
  const noise =
    neftune === 0
      ? {}
      : {
          embedded: (x: Parameters<typeof addNoise>[0]) => {
            const { rows, length } = micro.batch;
            const sizes = tensor(noiseSizes(micro.batch, neftune * tableScale(model), model.config.width), [rows, length]);
            return addNoise(x, sizes, seed, noiseStream + micro.index);
          },
        };
  const hidden = model.hidden(batch.input, { recompute, ...noise });
  const { total } = linearCrossEntropy(reshape(hidden, [-1, model.config.width]), model.head, batch.targets, {
    weights: batch.weights,
    cap: model.config.finalCap,
  });
  return { total };
}

// Above the numbers of other streams of the seed.
const noiseStream = 2 ** 40;

/** The noise is as large beside the rows of the table, whatever the model multiplies these by. */
function tableScale({ config }: LanguageModel): number {
  return 'scaledEmbedding' in config && config.scaledEmbedding ? Math.sqrt(config.width) : 1;
}

/** How far NEFTune moves each number of an embedding, α / √(L C) [B T]: L tokens of the example, C its width. */
export function noiseSizes({ starts, rows, length }: Batch, alpha: number, width: number): Float32Array {
  const sizes = new Float32Array(rows * length);
  for (let row = 0; row < rows; row++) {
    for (let from = 0, to = 0; from < length; from = to) {
      while (to < length && starts[row * length + to] === starts[row * length + from]) to++;
      sizes.fill(alpha / Math.sqrt((to - from) * width), row * length + from, row * length + to);
    }
  }
  return sizes;
}
