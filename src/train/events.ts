// What a run tells while it goes: plain data, one `type` each, so that a `switch` over them is checked for completeness.
// The same objects are the lines of metrics.jsonl and of `limbeck ... --json`.

import type { SourceGiven } from '../data/mixture.ts';

/** Bytes in use. */
export interface MemoryUse {
  /** Bytes of tensors alive now. */
  readonly live: number;
  /** Most bytes of tensors alive at once since the run began. */
  readonly peak: number;
  /** Resident bytes of the whole process. */
  readonly rss: number;
}

/** Averages over validation tokens. */
export interface Evaluation {
  /** Cross-entropy, nats a token. */
  readonly loss: number;
  /** `exp(loss)`. */
  readonly perplexity: number;
  /** Tokens that were scored. */
  readonly tokens: number;
  /** KL(teacher ‖ student), nats a token; only with a teacher. */
  readonly kl?: number;
  /** Share of tokens, 0 to 1, where teacher and student rank the same token first; only with a teacher. */
  readonly agreement?: number;
}

/** How the evaluations of a run went, for `evaluate.patience`. */
export interface Evaluations {
  /** The one of lowest loss after the first step. */
  readonly best?: { readonly step: number; readonly loss: number };
  /** Evaluations since then. */
  readonly stale: number;
}

/** First event of a run. */
export interface StartEvent {
  readonly type: 'start';
  readonly kind: 'pretrain' | 'distill' | 'finetune';
  readonly name: string;
  /** Trainable parameters. */
  readonly parameters: number;
  /** Parameters of the teacher; only when distilling. */
  readonly teacherParameters?: number;
  /** Optimizer steps planned. */
  readonly steps: number;
  /** Tokens planned. */
  readonly tokens: number;
  readonly device: string;
  readonly threads: number;
  /** Folder that receives the run's files. */
  readonly output: string;
  /** Where a resumed run goes on; absent in a fresh one. */
  readonly resumedFrom?: { readonly step: number; readonly path: string };
}

/** One optimizer step was taken. */
export interface StepEvent {
  readonly type: 'step';
  /** Steps taken so far, this one included; the first is 1. */
  readonly step: number;
  /** Tokens seen so far. */
  readonly tokens: number;
  /** The loss that was minimised, a token. */
  readonly loss: number;
  readonly learningRate: number;
  /** Global norm before clipping. */
  readonly gradientNorm: number;
  readonly tokensPerSecond: number;
  /** Seconds that the step took. */
  readonly seconds: number;
  readonly memory: MemoryUse;
  /** Divergence from the teacher, nats a token; only when distilling. */
  readonly kl?: number;
  /** Cross-entropy on the text, nats a token; only where it is known beside `loss`. */
  readonly ce?: number;
  /** Seconds left at the present speed. */
  readonly etaSeconds: number;
}

/** The model was scored on the validation data. */
export interface EvaluateEvent extends Evaluation {
  readonly type: 'evaluate';
  readonly step: number;
  readonly seconds: number;
  /** What each source of a mixture has given so far. */
  readonly sources?: readonly SourceGiven[];
}

/** A text written by the model as it is now. */
export interface SampleEvent {
  readonly type: 'sample';
  readonly step: number;
  readonly prompt: string;
  /** The continuation, without the prompt. */
  readonly text: string;
  /** What the data says there; only for held-out instructions. */
  readonly reference?: string;
}

/** Answers to held-out instructions are complete on disk, one JSON object a line. */
export interface ResponsesEvent {
  readonly type: 'responses';
  readonly step: number;
  readonly path: string;
  readonly count: number;
}

/** A checkpoint is complete on disk. */
export interface CheckpointEvent {
  readonly type: 'checkpoint';
  readonly step: number;
  readonly path: string;
  readonly seconds: number;
  readonly bytes: number;
}

/** Something that the run survives and its owner should know; further fields tell the facts. */
export interface WarningEvent {
  readonly type: 'warning';
  /** Stable identifier, `WARN_...`. */
  readonly code: string;
  readonly message: string;
  readonly [fact: string]: unknown;
}

/** Last event of a run that was not ended by an error. */
export interface DoneEvent {
  readonly type: 'done';
  /** `stopped`: the loss did not fall any more, see `evaluate.patience`. */
  readonly reason: 'finished' | 'aborted' | 'stopped';
  readonly step: number;
  readonly tokens: number;
  /** Seconds since this process began the run. */
  readonly seconds: number;
  /** The last evaluation; absent if none was made. */
  readonly evaluation?: Evaluation;
  /** What each source of a mixture has given. */
  readonly sources?: readonly SourceGiven[];
  /** Path of the last checkpoint; absent if none was written. */
  readonly checkpoint?: string;
  /** The evaluation of lowest loss after the first step; only with `evaluate.patience`, whose runs keep its checkpoint. */
  readonly best?: { readonly step: number; readonly loss: number; readonly checkpoint: string };
}

/** Everything that `pretrain`, `distill` and `finetune` yield. */
export type TrainEvent =
  | StartEvent
  | StepEvent
  | EvaluateEvent
  | SampleEvent
  | ResponsesEvent
  | CheckpointEvent
  | WarningEvent
  | DoneEvent;
