// What a run is: one zod schema gives the checks, the defaults, the TypeScript types and the JSON Schema for editors.
import { createRequire } from 'node:module';
import type * as zod from 'zod';

let loaded: typeof zod.z | undefined;

/** zod, at first use: a script that never reads a run file should not carry it, for it takes more memory than our own code. */
export function zodLoaded(): typeof zod.z {
  loaded ??= (createRequire(import.meta.url)('zod') as typeof zod).z;
  return loaded;
}

function makeSchemas() {
  const z = zodLoaded();
  const positive = () => z.number().gt(0);
  const count = () => z.int().min(1);
  const share = () => z.number().min(0).max(1);
  const paths = () => z.union([z.string().min(1), z.array(z.string().min(1)).min(1)]);

  const tokenizerSchema = z.union([
    z.string().min(1),
    z.strictObject({
      train: z
        .strictObject({
          vocabSize: z.int().min(260).describe('Entries of the vocabulary, the 256 bytes and the special tokens included.'),
          specialTokens: z
            .array(z.string().min(1))
            .optional()
            .describe('Texts that are one token each. Default: the ones of the tokenizer trainer.'),
        })
        .describe('Train a byte-level BPE on the training text; the result is saved in the output folder.'),
    }),
  ]);

  const sourceShape = {
    text: paths().optional().describe('Plain text: files, folders or globs.'),
    jsonl: paths().optional().describe('JSON Lines: files, folders or globs, one document a line.'),
    tokens: paths().optional().describe('Files of token ids made beforehand.'),
  };

  const oneSource = (value: { text?: unknown; jsonl?: unknown; tokens?: unknown }) =>
    [value.text, value.jsonl, value.tokens].filter((source) => source !== undefined).length === 1;

  const separator = () => z.string().min(1).optional();

  const mixtureSource = z
    .strictObject({
      name: z.string().min(1).optional().describe('What reports call it. Default: its first path.'),
      source: z
        .strictObject({
          ...sourceShape,
          separator: separator().describe("What stands between the documents of a text file. Default: the data's."),
          field: z.string().min(1).optional().describe("Field of a JSON line that holds the text. Default: the data's."),
        })
        .refine(oneSource, 'must name exactly one of text, jsonl and tokens')
        .describe('Where it lies.'),
      weight: positive()
        .optional()
        .describe('Share of the training tokens, relative to the others; all sources have one, or none. Default: by size.'),
      repeat: positive()
        .optional()
        .describe('Passes while a source of repeat 1 comes once (default 1); with weights, the most passes (default: no limit).'),
    })
    .describe('A source and its part.');

  const dataSchema = z
    .strictObject({
      ...sourceShape,
      mixture: z
        .array(mixtureSource)
        .min(1)
        .optional()
        .describe('Several sources in proportions of tokens, which hold at every step. In place of text, jsonl and tokens.'),
      separator: separator().describe(
        'What stands between the documents of a text file, such as "\\n\\n\\n". Default: a file is one document.',
      ),
      field: z.string().min(1).default('text').describe('Field of a JSON line that holds the text. Default "text".'),
      validation: z
        .union([
          z.number().gt(0).lt(1),
          z.strictObject({ documents: count().describe('How many documents are held out, drawn by the seed.') }),
          z.strictObject(sourceShape).refine(oneSource, 'must name exactly one of text, jsonl and tokens'),
        ])
        .default(0.01)
        .describe('Held-out data: a share of the documents (0 to 1), { documents: n }, or a source of its own. Default 0.01.'),
      isolate: z.boolean().default(true).describe('Tokens attend to their own document only. Default true.'),
      strict: z
        .boolean()
        .default(false)
        .describe('Stop at the first malformed line instead of counting and skipping it. Default false.'),
    })
    .refine(
      (data) => oneSource(data) !== (data.mixture !== undefined),
      'must name exactly one of text, jsonl, tokens and mixture',
    )
    .refine(({ mixture = [] }) => new Set(mixture.map(({ weight }) => weight === undefined)).size < 2, {
      path: ['mixture'],
      error: 'give all sources a weight, or none',
    });

  const modelObject = z
    .strictObject({
      preset: z.string().min(1).optional().describe('Named configuration that the other fields change.'),
      vocabSize: count().optional().describe("Rows of the embedding table. Default: the tokenizer's vocabulary."),
      width: count().optional().describe('Width of the residual stream.'),
      layers: count().optional().describe('Number of layers.'),
      heads: count().optional().describe('Query heads.'),
      kvHeads: count().optional().describe('Key and value heads; must divide heads.'),
      headSize: z.int().min(2).multipleOf(2).optional().describe('Width of one head; even.'),
      hidden: count().optional().describe('Width inside the feed-forward block, per branch.'),
      window: count().nullable().optional().describe('Keys that a local layer sees, the token itself included; null for none.'),
      layerPattern: z
        .array(z.enum(['local', 'global']))
        .min(1)
        .optional()
        .describe('What each layer sees, repeated over the layers: "local" (the window) or "global".'),
      tied: z.boolean().optional().describe('Whether the embedding table is the output head too.'),
      attentionCap: positive().nullable().optional().describe('Soft cap of attention scores; null for none.'),
      finalCap: positive().nullable().optional().describe('Soft cap of logits; null for none.'),
      queryScalar: positive().optional().describe('Queries are divided by its square root.'),
      ropeBase: z.number().gt(1).optional().describe('Base of the rotary frequencies.'),
      localRopeBase: z.number().gt(1).nullable().optional().describe('That of local layers; null: the same.'),
      normEps: positive().optional().describe('Added to the mean square inside RMSNorm.'),
      initStd: positive().optional().describe('Standard deviation of the initial weights.'),
      context: count().optional().describe('Most tokens of a sequence; informative, for exported files.'),
    })
    .refine((model) => model.heads === undefined || model.kvHeads === undefined || model.heads % model.kvHeads === 0, {
      path: ['kvHeads'],
      error: (issue) => {
        const { heads, kvHeads } = issue.input as { heads: number; kvHeads: number };
        return `must divide heads (${heads}), ${kvHeads} does not`;
      },
    });

  const divergenceKind = <const K extends string>(kind: K) =>
    z.literal(kind).describe('"forward_kl", "reverse_kl", "jsd", "skew_forward_kl" or "skew_reverse_kl".');
  const skewAlpha = () =>
    z.number().gt(0).lt(1).default(0.1).describe('Share α of the other in the skew divergences. Default 0.1.');

  const divergenceSchema = z
    .discriminatedUnion('kind', [
      z.strictObject({ kind: divergenceKind('forward_kl') }).describe('KL(teacher ‖ student): the student covers the teacher.'),
      z
        .strictObject({ kind: divergenceKind('reverse_kl') })
        .describe('KL(student ‖ teacher): the student keeps to modes of the teacher.'),
      z
        .strictObject({
          kind: divergenceKind('jsd'),
          beta: z.number().gt(0).lt(1).default(0.5).describe('Weight β of "jsd". Default 0.5.'),
        })
        .describe('β KL(p ‖ m) + (1−β) KL(q ‖ m), m = β p + (1−β) q. Default β 0.5.'),
      z
        .strictObject({ kind: divergenceKind('skew_forward_kl'), alpha: skewAlpha() })
        .describe('KL(p ‖ α p + (1−α) q). Default α 0.1.'),
      z
        .strictObject({ kind: divergenceKind('skew_reverse_kl'), alpha: skewAlpha() })
        .describe('KL(q ‖ (1−α) p + α q). Default α 0.1.'),
    ])
    .describe('How far the student is from the teacher; p teacher, q student. Default { kind: "forward_kl" }.');

  const scheduleSchema = z.strictObject({
    kind: z
      .enum(['cosine', 'linear', 'constant', 'wsd'])
      .default('cosine')
      .describe('Shape after the warm-up; wsd is stable, then a linear decay. Default "cosine".'),
    warmupSteps: z.int().min(0).default(0).describe('Steps in which the rate rises linearly from 0. Default 0.'),
    finalFraction: share().default(0.1).describe('Last rate as a share of learningRate. Default 0.1; unused by "constant".'),
    decayFraction: share().default(0.2).describe('Share of all steps that decay, "wsd" only. Default 0.2.'),
  });

  const optimizerSchema = z
    .strictObject({
      learningRate: positive().default(1e-3).describe('Highest learning rate. Default 1e-3.'),
      beta1: z.number().min(0).lt(1).default(0.9).describe('Decay of the first moment. Default 0.9.'),
      beta2: z.number().min(0).lt(1).default(0.95).describe('Decay of the second moment. Default 0.95.'),
      eps: positive().default(1e-8).describe('Added to the root of the second moment. Default 1e-8.'),
      weightDecay: z.number().min(0).default(0.1).describe('Decoupled decay of matrices; norms are left out. Default 0.1.'),
      moments: z
        .enum(['f32', '8bit'])
        .default('f32')
        .describe('How moments are kept; 8bit takes 2 bytes a parameter instead of 8. Default "f32".'),
      master: z
        .boolean()
        .default(true)
        .describe('On a GPU: f32 originals of the bf16 weights; without them updates are rounded by chance. Default true.'),
      clip: positive().nullable().default(1).describe('Largest global gradient norm; null for no clipping. Default 1.'),
    })
    .describe('AdamW (arXiv:1711.05101).');

  const shared = {
    $schema: z.string().optional().describe('JSON Schema for editors; ignored.'),
    name: z.string().min(1).default('run').describe('Name shown in reports. Default "run".'),
    output: z.string().min(1).describe('Folder for checkpoints, metrics and the report; made if missing.'),
    seed: z.int().min(0).default(0).describe('Seed of initial weights, order of data and samples. Default 0.'),
    device: z.enum(['cpu', 'cuda']).default('cpu').describe('Where tensors live: "cpu" or "cuda". Default "cpu".'),
    threads: count().optional().describe('Threads of the CPU backend. Default: the cores of the machine.'),
    data: dataSchema.describe('Training and validation text. Paths are relative to the run file.'),
    model: z
      .union([z.string().min(1), modelObject])
      .describe('Name of a preset, or a preset with changed fields, or all fields.'),
    batch: z
      .strictObject({
        sequences: count().default(8).describe('Sequences in a micro-batch. Default 8.'),
        length: z.int().min(2).default(256).describe('Tokens in a sequence. Default 256.'),
        accumulate: count().default(1).describe('Micro-batches added up before an optimizer step. Default 1.'),
      })
      .refine(({ sequences, length }) => sequences * length < 2 ** 31, 'must have fewer than 2^31 tokens, sequences × length')
      .prefault({})
      .describe('What one optimizer step sees: sequences × length × accumulate tokens.'),
    steps: count().optional().describe('Optimizer steps; give this or tokens.'),
    tokens: count().optional().describe('Training tokens, rounded up to whole steps; give this or steps.'),
    optimizer: optimizerSchema.prefault({}),
    schedule: scheduleSchema.prefault({}).describe('Learning rate over time.'),
    evaluate: z
      .strictObject({
        every: count().default(200).describe('Steps between evaluations; one more follows the last step. Default 200.'),
        batches: count().optional().describe('Micro-batches scored each time. Default: all validation data.'),
        first: z.boolean().default(false).describe('Also score before the first step. Default false; true in "finetune".'),
        patience: count()
          .optional()
          .describe('Stop after so many evaluations in a row without a lower loss; the best checkpoint stays. Default: never.'),
        samples: z
          .strictObject({
            prompts: z.array(z.string()).min(1).describe('Beginnings that the model continues.'),
            tokens: count().default(48).describe('New tokens a prompt. Default 48.'),
            temperature: z.number().min(0).default(0.8).describe('0 takes the likeliest token. Default 0.8.'),
          })
          .optional()
          .describe('Texts written at each evaluation. Default: none.'),
      })
      .prefault({})
      .describe('Scoring on the validation data.'),
    checkpoint: z
      .strictObject({
        every: count().default(500).describe('Steps between checkpoints; one more follows the last step. Default 500.'),
        keep: count().default(3).describe('Newest checkpoints that stay. Default 3.'),
      })
      .prefault({})
      .describe('Saving: safetensors and the state needed for an exact resume.'),
    log: z
      .strictObject({
        every: count().default(1).describe('Steps between `step` events. Default 1.'),
        tensorboard: z.boolean().default(true).describe('Write TensorBoard event files. Default true.'),
        report: z.boolean().default(true).describe('Write report.html at each evaluation and at the end. Default true.'),
      })
      .prefault({})
      .describe('What is told and kept about the run; metrics.jsonl is always written.'),
    recompute: z
      .boolean()
      .default(false)
      .describe('Recompute activations in backward: less memory, a third more work. Default false.'),
    resume: z
      .union([z.literal('auto'), z.literal(false), z.string().min(1)])
      .default('auto')
      .describe(
        '"auto" goes on from the newest checkpoint in output, false starts anew, a path names a checkpoint; newer ones then move to checkpoints.old. Default "auto".',
      ),
  };

  const { samples: _, ...evaluation } = shared.evaluate.unwrap().shape;

  const instructionData = z.strictObject({
    train: paths().describe('Conversations as JSON Lines, JSON or Parquet: files, folders or globs.'),
    validation: z
      .union([
        z.number().gt(0).lt(1),
        z.strictObject({ documents: count().describe('How many conversations are held out, drawn by the seed.') }),
        paths(),
      ])
      .default(0.1)
      .describe('Held-out conversations: a share (0 to 1), { documents: n }, or files of their own. Default 0.1.'),
    format: z
      .enum(['alpaca', 'sharegpt', 'messages', 'prompt'])
      .optional()
      .describe('How rows are written. Default: told by the fields of each row.'),
    strict: z
      .boolean()
      .default(false)
      .describe('Stop at the first row that cannot be used instead of counting and skipping it. Default false.'),
    pack: z
      .boolean()
      .default(true)
      .describe('Several examples share a row, each seeing only itself; false pads a row each. Default true.'),
    overflow: z
      .enum(['truncate', 'drop'])
      .default('truncate')
      .describe(
        'What happens to an example longer than a row: its end is cut and the end token stays, or it is left out. Default "truncate".',
      ),
  });

  const oneLength = <T extends { steps?: number | undefined; tokens?: number | undefined }>(run: T) =>
    (run.steps === undefined) !== (run.tokens === undefined);
  const howLong = { path: ['steps'], error: 'give exactly one of steps and tokens: how long to train' };

  const pretrainSchema = z
    .strictObject({
      kind: z.literal('pretrain').describe('Which loop: "pretrain" trains on text.'),
      ...shared,
      model: shared.model.optional(),
      tokenizer: tokenizerSchema.optional().describe('Path of a tokenizer.json, or { train: { vocabSize } }.'),
      from: z
        .string()
        .min(1)
        .optional()
        .describe('Continual pretraining: begin with this model (a folder, or the output folder of a run) and its tokenizer.'),
    })
    .refine(oneLength, howLong)
    .superRefine(({ from, model, tokenizer }, context) => {
      for (const [name, value] of Object.entries({ model, tokenizer })) {
        if ((value === undefined) === (from !== undefined)) continue;
        const error =
          from === undefined ? 'must be given, or `from`, a model to go on from' : 'must be left out: it comes with `from`';
        context.addIssue({ code: 'custom', path: [name], message: error, input: value });
      }
    });

  const distillSchema = z
    .strictObject({
      kind: z.literal('distill').describe('Which loop: "distill" trains on the distribution of a teacher.'),
      ...shared,
      tokenizer: z
        .string()
        .min(1)
        .optional()
        .describe('Path of a tokenizer.json. Default: the one saved with the teacher, whose ids the student must share.'),
      teacher: z
        .strictObject({
          checkpoint: z.string().min(1).optional().describe('Checkpoint folder of the teacher; not needed with a cache.'),
          cache: z
            .string()
            .min(1)
            .optional()
            .describe('Folder of what the teacher found likely at each token, made by `limbeck teach`; then it is not loaded.'),
          weights: z
            .enum(['fp8', 'q8', 'q4'])
            .optional()
            .describe(
              'Keeps the matrices of its layers rounded, in 8 ("fp8"), 8.5 ("q8") or 4.25 bits ("q4") each. Default: like the student.',
            ),
        })
        .refine(({ checkpoint, cache }) => checkpoint !== undefined || cache !== undefined, {
          path: ['checkpoint'],
          error: 'give the checkpoint of the teacher, or its cache',
        })
        .describe('Whose distribution is learned.'),
      distill: z
        .strictObject({
          divergence: divergenceSchema.prefault({ kind: 'forward_kl' }),
          temperature: positive().default(1).describe('Divides the (capped) logits of both before the softmax. Default 1.'),
          squaredTemperature: z
            .boolean()
            .default(true)
            .describe('Multiply the divergence by temperature², which keeps the size of its gradient. Default true.'),
          hardWeight: share()
            .default(0)
            .describe('Weight w of the text itself: loss = (1−w) divergence + w cross-entropy. Default 0.'),
        })
        .prefault({})
        .describe('The loss of a student.'),
    })
    .refine(oneLength, howLong);

  const adapterSchema = z.strictObject({
    kind: z.enum(['lora', 'dora']).default('lora').describe('"dora" trains lengths apart from directions. Default "lora".'),
    rank: count().default(8).describe('Rows of A and columns of B. Default 8.'),
    alpha: positive().default(16).describe('The change is alpha / rank times B A. Default 16.'),
    rankStabilized: z.boolean().default(false).describe('alpha / √rank instead (rsLoRA). Default false.'),
    targets: z
      .union([z.string().min(1), z.array(z.string().min(1)).min(1)])
      .default('all-linear')
      .describe('Which matrices: ends of names ("q_proj"), patterns with * ("*.mlp.*"), or "all-linear". Default "all-linear".'),
    ratio: positive().default(1).describe('Learning rate of B beside that of A (LoRA+). Default 1.'),
    init: z
      .enum(['zero', 'olora'])
      .default('zero')
      .describe('Initial values; "olora" takes them from the weights. Default "zero".'),
    dropout: z.number().min(0).lt(1).default(0).describe('Share of what A reads that is dropped in training. Default 0.'),
  });

  const finetuneSchema = z
    .strictObject({
      kind: z.literal('finetune').describe('Which loop: "finetune" trains a model on conversations.'),
      ...shared,
      model: z.string().min(1).describe('Model to begin with: a folder, or the output folder of a run.'),
      adapter: adapterSchema
        .optional()
        .describe(
          'Trains an adapter of low rank beside the model, which stays as it is; checkpoints hold the adapter. Default: the model.',
        ),
      base: z
        .enum(['fp8', 'q8', 'q4'])
        .optional()
        .describe(
          'Beside an adapter: what the model is kept in, 8, 8.5 or 4.25 bits a number of its matrices. Default: as it is computed.',
        ),
      template: z
        .string()
        .min(1)
        .default('model')
        .describe(
          'How conversations become text: "model" (its own template), "alpaca", "chatml", "gemma", "llama3", "mistral", "phi3", "plain", or the path of a .jinja file. Default "model".',
        ),
      data: instructionData.describe('Conversations to train on and to hold out. Paths are relative to the run file.'),
      mask: z
        .enum(['all', 'completion', 'assistant-turns'])
        .default('completion')
        .describe('Which tokens are learned: all, those of the last answer, or those of every answer. Default "completion".'),
      promptWeight: share().default(0).describe('What a token outside the mask counts, 0 to 1. Default 0.'),
      epochs: positive().optional().describe('Passes over the training data; give this, steps or tokens.'),
      optimizer: optimizerSchema
        .extend({ learningRate: positive().default(5e-5).describe('Highest learning rate. Default 5e-5.') })
        .describe('AdamW (arXiv:1711.05101).')
        .prefault({}),
      neftune: z
        .number()
        .min(0)
        .default(0)
        .describe('α of NEFTune: noise on embeddings while training (arXiv:2310.05914); 5 is usual. Default 0.'),
      evaluate: z
        .strictObject({
          ...evaluation,
          first: z.boolean().default(true).describe('Also score before the first step. Default true.'),
        })
        .prefault({})
        .describe('Scoring on the held-out conversations.'),
      responses: z
        .strictObject({
          samples: z.int().min(0).default(3).describe('Held-out instructions answered at each evaluation. Default 3.'),
          examples: z
            .int()
            .min(0)
            .default(100)
            .describe('Held-out instructions answered at the end, into responses.jsonl. Default 100.'),
          tokens: count().default(256).describe('Most tokens of an answer. Default 256.'),
          temperature: z.number().min(0).default(0).describe('0 takes the likeliest token. Default 0.'),
        })
        .prefault({})
        .describe('Answers to held-out instructions.'),
    })
    .refine((run) => [run.steps, run.tokens, run.epochs].filter((length) => length !== undefined).length === 1, {
      path: ['epochs'],
      error: 'give exactly one of epochs, steps and tokens: how long to train',
    })
    .refine((run) => run.base === undefined || run.adapter !== undefined, {
      path: ['base'],
      error: 'must be left out without an adapter: weights of few bits cannot be trained',
    });

  return {
    pretrain: pretrainSchema,
    distill: distillSchema,
    finetune: finetuneSchema,
    run: z.discriminatedUnion('kind', [pretrainSchema, distillSchema, finetuneSchema]),
    divergence: divergenceSchema,
    schedule: scheduleSchema,
  };
}

export type RunSchemas = ReturnType<typeof makeSchemas>;

let made: RunSchemas | undefined;

/** The schemas of runs and of their parts. */
export function runSchemas(): RunSchemas {
  made ??= makeSchemas();
  return made;
}
