// One pass of a teacher over a corpus, into a cache that any number of students learn from.
import { createHash } from 'node:crypto';
import { join } from 'node:path';
import { openDataset, type TextDataset } from '../data/dataset.ts';
import { type Batch, layOut } from '../data/pack.ts';
import { type Piece, readRow } from '../data/rows.ts';
import type { TokenStore } from '../data/tokens.ts';
import { resolveCheckpoint } from '../models/folder.ts';
import { type LanguageModel, loadWeights } from '../models/model.ts';
import { cast, scale, softcap } from '../ops/elementwise.ts';
import { linear } from '../ops/linear.ts';
import { topK as largest, logSoftmax } from '../ops/reduce.ts';
import { reshape, rows } from '../ops/reshape.ts';
import { ConfigError } from '../tensor/errors.ts';
import { keep, scope } from '../tensor/scope.ts';
import { noGrad } from '../tensor/tape.ts';
import { readAs, type Tensor } from '../tensor/tensor.ts';
import { loadTokenizer } from '../tokenizer/tokenizer.ts';
import { upload } from '../train/batch.ts';
import { type DistillConfig, parseRunOf, type RunInput } from '../train/config.ts';
import { datasetOptions, startEngine } from '../train/setup.ts';
import {
  type CacheFacts,
  cacheBytesPerToken,
  cacheShards,
  defaultTopK,
  missingShards,
  readCacheFacts,
  type Shard,
  shardName,
  writeCacheFacts,
  writeShard,
} from './cache.ts';

export interface TeachOptions {
  /** Tokens that are kept of each distribution. Default 64. */
  readonly topK?: number;
  /** Stops; what is written stays, and the next call goes on with it. */
  readonly signal?: AbortSignal;
  /** Told of the tokens that are written, and of all. */
  readonly onProgress?: (progress: { readonly tokens: number; readonly total: number }) => void;
}

/** What {@link cacheTeacher} made. */
export interface TaughtCache {
  readonly folder: string;
  readonly tokens: number;
  /** On disk. */
  readonly bytes: number;
}

/**
 * Runs the teacher of a distillation run over its data once and keeps, for each token, the likeliest tokens to follow and their probabilities,
 * in the folder that the run names as `teacher.cache`. A run with that cache trains without the teacher in memory; seed, batch, model, steps
 * and the rest may change, data, tokenizer, `batch.length` and `distill.temperature` may not. A call that was stopped goes on.
 * @throws ConfigError where the run names no checkpoint or cache, or the folder holds a cache of something else.
 */
export async function cacheTeacher(input: RunInput | DistillConfig, options: TeachOptions = {}): Promise<TaughtCache> {
  const run = parseRunOf('distill', input);
  const { checkpoint, cache: folder } = run.teacher;
  for (const [field, value] of Object.entries({ checkpoint, cache: folder })) {
    if (value === undefined)
      throw refuse(`teacher.${field}`, `teach: teacher.${field} is missing; it names ${fields[field as 'cache']}`);
  }
  checkCachedRun(run);
  startEngine(run);
  const from = await resolveCheckpoint(checkpoint!);
  const tokenizer = await loadTokenizer(run.tokenizer ?? from);
  const teacher = await loadWeights(from, { weights: run.teacher.weights });
  let data: TextDataset | undefined;
  try {
    const { topK = Math.min(defaultTopK, teacher.config.vocabSize) } = options;
    if (!(Number.isInteger(topK) && topK >= 1 && topK <= teacher.config.vocabSize)) {
      throw refuse('topK', `teach: topK is ${topK}; the teacher has ${teacher.config.vocabSize} tokens`);
    }
    data = await openDataset(datasetOptions(run, tokenizer, options.signal));
    const { stores } = data;
    const perToken = cacheBytesPerToken(topK, teacher.config.vocabSize);
    const facts: CacheFacts = {
      format: 1,
      teacher: await fingerprint(teacher),
      tokenizer: tokenizer.fingerprint,
      vocabSize: teacher.config.vocabSize,
      length: run.batch.length,
      topK,
      temperature: run.distill.temperature,
      ...cacheShards(stores, run.batch.length, perToken),
    };
    await begin(folder!, facts);
    await tokenizer.save(folder!);
    const missing = await missingShards(folder!, facts);
    const total = stores.reduce((n, store) => n + store.tokens, 0);
    const end = (shard: number): number => facts.shards[shard + 1] ?? total;
    let tokens = missing.reduce((n, shard) => n - (end(shard) - facts.shards[shard]!), total);
    const work = { teacher, facts, pad: tokenizer.pad ?? 0, sequences: run.batch.sequences };
    for (const shard of missing) {
      const start = facts.shards[shard]!;
      const collected = await collect(work, stores, start, end(shard), (done) => {
        options.signal?.throwIfAborted();
        options.onProgress?.({ tokens: tokens + done, total });
      });
      await writeShard(join(folder!, shardName(shard)), collected, facts);
      tokens += end(shard) - start;
    }
    return { folder: folder!, tokens: total, bytes: total * perToken };
  } finally {
    teacher.dispose();
    await data?.close();
  }
}

const fields = { checkpoint: 'the teacher', cache: 'the folder to write' } as const;

function refuse(argument: string, message: string): ConfigError {
  return new ConfigError(message, { code: 'ERR_CONFIG', op: 'teach', argument });
}

/** What a run with a cached teacher must be like. @throws ConfigError */
export function checkCachedRun(run: DistillConfig): void {
  if (!run.data.isolate) {
    throw refuse(
      'data.isolate',
      'distill: data.isolate is false; what a token sees would depend on the batch, which a cached teacher cannot know',
    );
  }
  const { kind } = run.distill.divergence;
  if (kind !== 'forward_kl') {
    throw refuse(
      'distill.divergence',
      `distill: divergence is ${kind}; a cached teacher knows its likeliest tokens only: use forward_kl`,
    );
  }
}

async function begin(folder: string, facts: CacheFacts): Promise<void> {
  const found = await readCacheFacts(folder);
  if (found === undefined) return writeCacheFacts(folder, facts);
  const differs = Object.keys(facts).find(
    (name) => JSON.stringify(found[name as keyof CacheFacts]) !== JSON.stringify(facts[name as keyof CacheFacts]),
  );
  if (differs === undefined) return;
  throw new ConfigError(`teach: ${folder} holds a cache of another ${differs}; choose another folder, or remove this one`, {
    code: 'ERR_TEACHER_CACHE',
    op: 'teach',
    argument: 'teacher.cache',
    expected: JSON.stringify(found[differs as keyof CacheFacts]),
    actual: JSON.stringify(facts[differs as keyof CacheFacts]),
  });
}

/** Tells teachers of the same shape apart by some of their weights. */
async function fingerprint({ config, parameters: { list } }: LanguageModel): Promise<string> {
  const hash = createHash('sha256').update(JSON.stringify(Object.entries(config).sort()));
  for (const { tensor } of [list[0]!, list.at(-1)!]) {
    const some = keep(scope(() => cast(rows(reshape(tensor, [tensor.size]), 0, Math.min(tensor.size, 4096)), 'f32')));
    hash.update(await readAs(some, 'f32').finally(() => some.dispose()));
  }
  return hash.digest('hex').slice(0, 32);
}

interface Work {
  readonly teacher: LanguageModel;
  readonly facts: CacheFacts;
  readonly pad: number;
  readonly sequences: number;
}

async function collect(
  work: Work,
  stores: readonly TokenStore[],
  start: number,
  end: number,
  onBatch: (done: number) => void,
): Promise<Shard> {
  const { topK, length } = work.facts;
  const n = end - start;
  const shard = { tokens: new Int32Array(n), ids: new Int32Array(n * topK), logProbs: new Float32Array(n * topK) };
  // A shard lies in one store.
  let base = 0;
  let i = 0;
  for (; base + stores[i]!.tokens <= start; i++) base += stores[i]!.tokens;
  const store = stores[i]!;
  let done = 0;
  for (const pieces of batchesOf(segmentsIn(store, length, start - base, end - base), length, work.sequences)) {
    const spans = await Promise.all(pieces.map((row) => readRow(store, row, base)));
    const batch = layOut(spans, { length, batch: work.sequences, pad: work.pad, whole: true });
    const places = batch.places!;
    let from = 0;
    for (const { values, ids } of likeliest(work, batch)) {
      const [logProbs, tokens] = await Promise.all([readAs(values, 'f32'), readAs(ids, 'i32')]);
      values.dispose();
      ids.dispose();
      for (let i = 0; i < tokens.length / topK; i++) {
        if (places[from + i]! < 0) continue;
        const at = places[from + i]! - start;
        shard.tokens[at] = batch.ids[from + i]!;
        shard.ids.set(tokens.subarray(i * topK, (i + 1) * topK), at * topK);
        shard.logProbs.set(logProbs.subarray(i * topK, (i + 1) * topK), at * topK);
      }
      from += tokens.length / topK;
    }
    done += batch.tokens;
    onBatch(done);
  }
  return shard;
}

// Logits that exist at a time.
const LOGITS = 1 << 23;

/** The likeliest tokens to follow each of a batch, [some of N, k] at a time; they belong to the caller. */
function likeliest({ teacher, facts }: Work, batch: Batch): { values: Tensor; ids: Tensor }[] {
  const { width, vocabSize, finalCap } = teacher.config;
  return keep(
    scope(() =>
      noGrad(() => {
        const hidden = reshape(teacher.hidden(upload(batch, 1).input), [-1, width]);
        // Logits in float32, whatever the teacher computes in.
        const x = hidden.dtype === 'f32' ? hidden : cast(hidden, 'f32');
        const n = batch.ids.length;
        const each = Math.max(1, Math.floor(LOGITS / vocabSize));
        return Array.from({ length: Math.ceil(n / each) }, (_, i) =>
          scope(() => {
            const logits = linear(rows(x, i * each, Math.min(n, (i + 1) * each)), teacher.head);
            const capped = finalCap === null ? logits : softcap(logits, finalCap);
            const { temperature, topK } = facts;
            return { ...largest(logSoftmax(temperature === 1 ? capped : scale(capped, 1 / temperature)), topK) };
          }),
        );
      }),
    ),
  );
}

/** The segments of a store that lie in a range, as a dataset cuts them. */
function* segmentsIn({ ends }: TokenStore, length: number, start: number, end: number): Generator<Piece> {
  let document = ends.findIndex((at) => at > start);
  for (let at = start; at < end; ) {
    const stop = ends[document]!;
    const count = Math.min(length, stop - at);
    if (count > 0) yield [at, count, at + count < stop ? 1 : 0];
    at += count;
    if (at === stop) document++;
  }
}

/** Segments in their order, each in the first row that has room; a batch ends with the first that fits nowhere. */
function* batchesOf(segments: Iterable<Piece>, length: number, count: number): Generator<Piece[][]> {
  let batch: Piece[][] = [];
  let rooms: number[] = [];
  for (const piece of segments) {
    let row = rooms.findIndex((room) => room >= piece[1]);
    if (row < 0) {
      if (batch.length === count) {
        yield batch;
        batch = [];
        rooms = [];
      }
      row = batch.push([]) - 1;
      rooms.push(length);
    }
    batch[row]!.push(piece);
    rooms[row]! -= piece[1];
  }
  if (batch.length > 0) yield batch;
}
