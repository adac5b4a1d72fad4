// Conversations to training batches: encode once, split, shuffle every epoch, pack or pad, and go on exactly where a run stopped.

import { createHash } from 'node:crypto';
import { setImmediate as nextTurn } from 'node:timers/promises';
import { DataError, LimbeckError } from '../tensor/errors.ts';
import { checkSeed } from '../tensor/random.ts';
import type { ChatTemplate } from '../tokenizer/chat.ts';
import type { Tokenizer } from '../tokenizer/tokenizer.ts';
import { bestFitDecreasing } from './bestfit.ts';
import { type Conversation, type ConversationFormat, conversations, malformedError } from './conversations.ts';
import { checkState, type DatasetState, type Loader } from './dataset.ts';
import { type Example, type ExampleOptions, exampleOf, type Mask } from './examples.ts';
import { type Batch, checkLayout, layOut } from './pack.ts';
import { shuffledOrder } from './rows.ts';
import type { Malformed } from './source.ts';
import { type Held, holdOut } from './split.ts';

export interface InstructionOptions {
  /** JSON Lines, JSON or Parquet: files, folders or globs. None (`[]`) to read held-out data only. */
  readonly train: string | readonly string[];
  /** Held-out conversations: a share of them (0 to 1), a number of them, or files of their own. Default: none. */
  readonly validation?: Held | string | readonly string[];
  /** How the rows are written. Default: told by their fields. */
  readonly format?: ConversationFormat;
  /** Stop at the first row that cannot be used. Default false: it is counted and left out. */
  readonly strict?: boolean;
  readonly template: ChatTemplate;
  readonly tokenizer: Tokenizer;
  /** Which tokens are learned. Default `completion`: those of the last answer. */
  readonly mask?: Mask;
  /** What the other tokens count, 0 to 1. Default 0. */
  readonly promptWeight?: number;
  /** Several examples share a row, each seeing only itself. Default true. False: a row each, padded to the longest of the batch. */
  readonly pack?: boolean;
  /** What happens to an example that is longer than a row. Default `truncate`: its end is cut, the end token stays. */
  readonly overflow?: 'truncate' | 'drop';
  /** Most tokens of a row. */
  readonly length: number;
  /** Rows of a batch. */
  readonly batch: number;
  /** Seed of the split and of the order of training. Default 0. */
  readonly seed?: number;
  readonly signal?: AbortSignal;
}

/** What was read. Counts are of training and held-out data together, unless they say otherwise. */
export interface InstructionReport {
  readonly trainExamples: number;
  readonly validationExamples: number;
  /** Rows of an epoch. */
  readonly trainRows: number;
  /** Tokens that a step sees of the training examples. */
  readonly trainTokens: number;
  /** Targets that count, by weight, in the training examples. */
  readonly trainPredicted: number;
  /** Rows that were left out: how many, and the first thousand. */
  readonly malformedCount: number;
  readonly malformed: readonly Malformed[];
  /** Examples that were cut to the length of a row. */
  readonly truncated: number;
  /** Examples that were left out because they are longer than a row, with no room for an answer or by `overflow: 'drop'`. */
  readonly dropped: number;
}

/** Instruction data for training. */
export interface Instructions {
  readonly train: Loader;
  /** The held-out data once, in the same order every time; missing rows of the last batch are padding. */
  validation(options?: { readonly batches?: number }): AsyncGenerator<Batch>;
  /** The held-out conversations. */
  readonly heldOut: readonly Conversation[];
  readonly report: InstructionReport;
}

/**
 * Opens instruction data. All ids are held in memory.
 * @throws DataError `ERR_EMPTY` when no row can be used, `ERR_SPLIT`, `ERR_MALFORMED` (strict), `ERR_NO_FILES`; FileError; FormatError
 */
export async function openInstructions(options: InstructionOptions): Promise<Instructions> {
  checkLayout(options, 'openInstructions');
  const seed = checkSeed(options.seed ?? 0);
  const { validation, pack = true } = options;
  const counts: Counts = { malformedCount: 0, malformed: [], truncated: 0, dropped: 0 };
  const all = await readAll(options.train, options, counts);
  let train = all;
  let held: Read[] = [];
  if (typeof validation === 'string' || Array.isArray(validation)) {
    held = await readAll(validation, options, counts);
  } else if (validation !== undefined) {
    const out = new Set(holdOut(validation as Held, all.length, seed, usable(counts)));
    train = all.filter((_, i) => !out.has(i));
    held = all.filter((_, i) => out.has(i));
  }
  const layout: RowLayout = {
    length: options.length,
    batch: options.batch,
    pad: options.tokenizer.pad ?? options.tokenizer.eos ?? 0,
    pack,
  };
  const examples = train.map(({ example }) => example);
  const heldExamples = held.map(({ example }) => example);
  const rows = rowsOf(heldExamples, layout);
  return {
    train: instructionLoader(examples, layout, seed),
    async *validation({ batches = Number.POSITIVE_INFINITY } = {}) {
      for (let from = 0, i = 0; from < rows.length && i < batches; from += layout.batch, i++) {
        yield batchOf(heldExamples, rows.slice(from, from + layout.batch), layout);
      }
    },
    heldOut: held.map(({ conversation }) => conversation),
    report: {
      trainExamples: examples.length,
      validationExamples: held.length,
      trainRows: rowsOf(examples, layout).length,
      trainTokens: examples.reduce((sum, { ids }) => sum + ids.length, 0),
      trainPredicted: examples.reduce((sum, { weights }) => sum + weights!.reduce((a, w) => a + w, 0), 0),
      ...counts,
    },
  };
}

interface Counts {
  malformedCount: number;
  malformed: Malformed[];
  truncated: number;
  dropped: number;
}

/** What is divided into training and held-out data, for errors. */
function usable({ malformedCount, malformed: [first] }: Counts): string {
  if (first === undefined) return 'conversations';
  return `conversations that can be used (${malformedCount} cannot; the first is ${first.file}:${first.line}: ${first.reason})`;
}

interface Read {
  readonly conversation: Conversation;
  readonly example: Example;
}

async function readAll(paths: string | readonly string[], options: InstructionOptions, counts: Counts): Promise<Read[]> {
  if (paths.length === 0) return [];
  const { mask = 'completion', promptWeight = 0, overflow = 'truncate', strict = false, format, signal } = options;
  const settings: ExampleOptions = { ...options, mask, promptWeight, overflow };
  const found: Read[] = [];
  const before = { malformed: counts.malformedCount, dropped: counts.dropped };
  const onMalformed = (record: Malformed): void => {
    if (strict) throw malformedError(record);
    if (++counts.malformedCount <= 1000) counts.malformed.push(record);
  };
  let turn = 0;
  for await (const conversation of conversations(paths, { strict, ...(format === undefined ? {} : { format }) }, onMalformed)) {
    if (++turn % 256 === 0) await nextTurn();
    signal?.throwIfAborted();
    const example = encoded(conversation, settings, onMalformed);
    if (example === undefined) continue;
    if (example === 'dropped') counts.dropped++;
    else {
      if (example.truncated) counts.truncated++;
      found.push({ conversation, example });
    }
  }
  if (found.length > 0) return found;
  const [malformed, dropped] = [counts.malformedCount - before.malformed, counts.dropped - before.dropped];
  const first = counts.malformed.find(({ file }) => file !== undefined);
  const why = malformed > 0 ? `; the first malformed one is ${first!.file}:${first!.line}: ${first!.reason}` : '';
  throw new DataError(
    `openInstructions: no row of ${String(paths)} can be used: ${malformed} malformed, ${dropped} longer than ${options.length} tokens${why}`,
    { code: 'ERR_EMPTY', op: 'openInstructions', argument: String(paths) },
  );
}

/** The example of a conversation; nothing where the template refuses it, which is told. */
function encoded(
  conversation: Conversation,
  settings: ExampleOptions,
  onMalformed: (record: Malformed) => void,
): Example | 'dropped' | undefined {
  try {
    return exampleOf(conversation, settings) ?? 'dropped';
  } catch (error) {
    if (!LimbeckError.is(error) || !/^ERR_(TEMPLATE|TEMPLATE_MASK|MESSAGE|UNKNOWN_TOKEN)$/.test(error.code)) throw error;
    const { file, line } = conversation;
    onMalformed({ file, line, reason: error.message });
    return undefined;
  }
}

interface RowLayout {
  readonly length: number;
  readonly batch: number;
  readonly pad: number;
  readonly pack: boolean;
}

/** The examples of each row. */
function rowsOf(examples: readonly Example[], { length, pack }: RowLayout, order?: ArrayLike<number>): number[][] {
  if (!pack) return Array.from({ length: examples.length }, (_, i) => [order?.[i] ?? i]);
  return bestFitDecreasing(
    examples.map(({ ids }) => ids.length),
    length,
    order,
  );
}

function batchOf(examples: readonly Example[], rows: readonly (readonly number[])[], layout: RowLayout): Batch {
  const spans = rows.map((row) => row.map((i) => examples[i]!));
  // Without packing, rows are as long as the longest needs.
  const length = layout.pack ? layout.length : Math.max(...spans.map(([span]) => span!.ids.length));
  return layOut(spans, { length, batch: layout.pack ? layout.batch : rows.length, pad: layout.pad });
}

function instructionLoader(examples: readonly Example[], layout: RowLayout, seed: number): Loader {
  const examplesOf = shuffledOrder(examples.length, seed);
  let epoch = 0;
  let position = 0; // rows of the epoch that were given out
  let tokens = 0;
  let made: { epoch: number; rows: number[][] } | undefined;
  const rowsIn = (wanted: number): number[][] => {
    if (made?.epoch !== wanted) {
      const shuffled = examplesOf(wanted);
      const rows = rowsOf(
        examples,
        layout,
        Uint32Array.from(examples, (_, i) => shuffled(i)),
      );
      // Packed rows come with the longest examples first, so they are shuffled once more.
      const place = shuffledOrder(rows.length, seed)(wanted);
      made = { epoch: wanted, rows: rows.map((_, i) => rows[place(i)]!) };
    }
    return made.rows;
  };
  const fixed = { version: 1 as const, seed, length: layout.length, data: fingerprintOf(examples, layout) };
  return {
    async next() {
      if (examples.length === 0)
        throw new DataError('next: there is no training data', { code: 'ERR_EMPTY', op: 'next', argument: 'train' });
      const rows: number[][] = [];
      while (rows.length < layout.batch) {
        const all = rowsIn(epoch);
        if (position === all.length) {
          epoch++;
          position = 0;
        } else rows.push(all[position++]!);
      }
      const batch = batchOf(examples, rows, layout);
      tokens += batch.tokens;
      return batch;
    },
    get epoch() {
      return examples.length === 0 ? 0 : epoch + position / rowsIn(epoch).length;
    },
    state: (): DatasetState => ({ ...fixed, tokens, epoch, position, waiting: [] }),
    restore(state) {
      checkState(state, fixed);
      ({ epoch, position, tokens } = state);
    },
  };
}

function fingerprintOf(examples: readonly Example[], layout: RowLayout): string {
  const hash = createHash('sha256').update(JSON.stringify([layout.pack, layout.batch]));
  for (const { ids, next, weights } of examples) hash.update(ids).update(weights!).update(Int32Array.of(next));
  return hash.digest('hex').slice(0, 16);
}
