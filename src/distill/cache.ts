// A cached teacher: the likeliest tokens of its distribution at each token of a corpus, in files. It is keyed by place in the token store, so
// that one pass of the teacher serves every epoch, seed and student; what a token sees must then not depend on the batch, which is why rows hold
// whole segments (at most a row long) that see only themselves.
//   n tokens of a shard, k kept tokens of each
import { type FileHandle, mkdir, open, readdir, readFile } from 'node:fs/promises';
import { join } from 'node:path';
import type { Batch, Likely } from '../data/pack.ts';
import { lastUpTo } from '../data/rows.ts';
import type { TokenStore } from '../data/tokens.ts';
import { readAll, writeAll, writeAtomic } from '../io/atomic.ts';
import { halfValues, toHalf } from '../io/half.ts';
import { openSafetensors, type SafetensorsEntry, writeSafetensors } from '../io/safetensors.ts';
import { ConfigError, DataError, FormatError } from '../tensor/errors.ts';

/** What a cache was made with: the contents of its cache.json. */
export interface CacheFacts {
  readonly format: 1;
  /** Fingerprint of the teacher's weights. */
  readonly teacher: string;
  /** Fingerprint of the vocabulary, and rows of the teacher's output head. */
  readonly tokenizer: string;
  readonly vocabSize: number;
  /** Most tokens that the teacher saw at once. */
  readonly length: number;
  readonly topK: number;
  readonly temperature: number;
  /** Of the training sources in their order, then of held-out data from sources of its own. */
  readonly stores: readonly { readonly tokens: number; readonly documents: number }[];
  /** The first token of each file, the tokens of all stores counted through. */
  readonly shards: readonly number[];
}

/** Kept tokens where nothing else is said. */
export const defaultTopK = 64;

const SHARD_BYTES = 1 << 26;
const OPEN_SHARDS = 32;

/** Bytes on disk of each token: its id, the ids that are kept, a float16 for each and the log of their sum. */
export function cacheBytesPerToken(topK: number, vocabSize: number): number {
  const id = vocabSize > 65_536 ? 4 : 2;
  return id + topK * (id + 2) + 4;
}

/** Stores and shards of the facts of a cache: a shard begins at a segment, at the latest with its store, and has about 64 MiB. */
export function cacheShards(
  stores: readonly TokenStore[],
  length: number,
  bytesPerToken: number,
): Pick<CacheFacts, 'stores' | 'shards'> {
  const least = Math.max(length, Math.floor(SHARD_BYTES / bytesPerToken));
  const shards: number[] = [];
  let base = 0;
  for (const { tokens, ends } of stores) {
    let document = 0;
    let next = 0;
    for (const end of ends) {
      for (let at = document; at < end; at += length) {
        if (at < next) continue;
        shards.push(base + at);
        next = at + least;
      }
      document = end;
    }
    base += tokens;
  }
  return { stores: stores.map(({ tokens, ends }) => ({ tokens, documents: ends.length })), shards };
}

export const shardName = (shard: number): string => `taught-${String(shard).padStart(5, '0')}.safetensors`;

/** What a shard holds, collected in memory. */
export interface Shard {
  /** The tokens that the teacher read [n]. */
  readonly tokens: Int32Array;
  /** [n k] */
  readonly ids: Int32Array;
  /** [n k], natural logarithms */
  readonly logProbs: Float32Array;
}

/**
 * Writes a shard, complete or not at all. Log-probabilities are kept in float16 beside the float32 logarithm of their probabilities' sum, to
 * which they are scaled again when they are read: so rounding never changes what is left for the other tokens.
 */
export async function writeShard(path: string, { tokens, ids, logProbs }: Shard, facts: CacheFacts): Promise<void> {
  const { topK, vocabSize } = facts;
  const [dtype, type] = vocabSize > 65_536 ? (['U32', Uint32Array] as const) : (['U16', Uint16Array] as const);
  const n = tokens.length;
  const mass = Float32Array.from({ length: n }, (_, i) => {
    const sum = logProbs.subarray(i * topK, (i + 1) * topK).reduce((all, logProb) => all + Math.exp(logProb), 0);
    // A sum of 1 and a rounding is 1.
    return Math.min(0, Math.log(sum));
  });
  const bits = new Int32Array(logProbs.buffer, logProbs.byteOffset, logProbs.length);
  await writeSafetensors(path, [
    { name: 'tokens', dtype, shape: [n], data: type.from(tokens) },
    { name: 'ids', dtype, shape: [n, topK], data: type.from(ids) },
    { name: 'logProbs', dtype: 'F16', shape: [n, topK], data: Uint16Array.from(bits, toHalf) },
    { name: 'mass', dtype: 'F32', shape: [n], data: mass },
  ]);
}

/** An open cache. */
export interface TeacherCache {
  readonly facts: CacheFacts;
  /**
   * The batch with what the teacher found likely at each of its tokens.
   * @throws DataError `ERR_TEACHER_CACHE` where the tokens are not those that the teacher read.
   */
  likely(batch: Batch): Promise<Batch>;
  close(): Promise<void>;
}

/** The facts of a cache; undefined where there is none. @throws FormatError */
export async function readCacheFacts(folder: string): Promise<CacheFacts | undefined> {
  const path = join(folder, 'cache.json');
  try {
    const facts = JSON.parse(await readFile(path, 'utf8')) as CacheFacts;
    if (facts.format === 1) return facts;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    if (!(error instanceof SyntaxError)) throw error;
  }
  throw new FormatError(`${path}: not the facts of a teacher's cache; make it again with \`limbeck teach\``, {
    code: 'ERR_TEACHER_CACHE',
    op: 'distill',
    argument: path,
  });
}

/** Begins a cache. */
export async function writeCacheFacts(folder: string, facts: CacheFacts): Promise<void> {
  await mkdir(folder, { recursive: true });
  const text = Buffer.from(`${JSON.stringify(facts, null, 2)}\n`);
  await writeAtomic(join(folder, 'cache.json'), (file) => writeAll(file, text));
}

/** The shards of a cache that are not there yet. */
export async function missingShards(folder: string, { shards }: CacheFacts): Promise<number[]> {
  const there = new Set(await readdir(folder));
  return Array.from(shards.keys()).filter((shard) => !there.has(shardName(shard)));
}

/** Opens a complete cache. @throws ConfigError `ERR_TEACHER_CACHE` for one that is missing or not complete; FormatError */
export async function openTeacherCache(folder: string): Promise<TeacherCache> {
  const refuse = (why: string): never => {
    throw new ConfigError(
      `distill: teacher.cache ${folder} ${why}; \`limbeck teach\` with this run makes it, or goes on with it`,
      {
        code: 'ERR_TEACHER_CACHE',
        op: 'distill',
        argument: 'teacher.cache',
        actual: folder,
      },
    );
  };
  const facts = (await readCacheFacts(folder)) ?? refuse('does not exist');
  const missing = await missingShards(folder, facts);
  if (missing.length > 0) refuse(`lacks ${missing.length} of its ${facts.shards.length} files`);
  const opened = new Map<string, Promise<OpenShard>>();
  /** The most recently used stay open. */
  const shardOf = async (name: string): Promise<OpenShard> => {
    const shard = opened.get(name) ?? openShard(join(folder, name), facts);
    opened.delete(name);
    opened.set(name, shard);
    if (opened.size > OPEN_SHARDS) {
      const [oldest, old] = opened.entries().next().value!;
      opened.delete(oldest);
      await (await old).release();
    }
    return shard;
  };
  return {
    facts,
    async likely(batch) {
      const { topK, shards } = facts;
      const likely: Likely = {
        topK,
        ids: new Int32Array(batch.ids.length * topK).fill(-1),
        logProbs: new Float32Array(batch.ids.length * topK),
      };
      for (const [from, count] of runsOf(batch.places!)) {
        const place = batch.places![from]!;
        const shard = lastUpTo(shards, place);
        const file = await shardOf(shardName(shard));
        await file.read(place - shards[shard]!, batch.ids.subarray(from, from + count), likely, from);
      }
      return { ...batch, likely };
    },
    async close() {
      for (const shard of opened.values()) await (await shard).release();
      opened.clear();
    },
  };
}

/** Neighbours whose places follow one another, padding left out. */
function* runsOf(places: Float64Array): Generator<readonly [from: number, count: number]> {
  for (let from = 0; from < places.length; ) {
    let to = from + 1;
    while (to < places.length && places[to] === places[to - 1]! + 1 && places[from]! >= 0) to++;
    if (places[from]! >= 0) yield [from, to - from];
    from = to;
  }
}

interface OpenShard {
  /** Reads what was likely at `tokens`, which stand at place `at` of the shard, into places `to` and on of `likely`. */
  read(at: number, tokens: Int32Array, likely: Likely, to: number): Promise<void>;
  release(): Promise<void>;
}

async function openShard(path: string, { topK, vocabSize }: CacheFacts): Promise<OpenShard> {
  const header = await openSafetensors(path);
  const entries = header.tensors;
  await header.close();
  const [dtype, Ids] = vocabSize > 65_536 ? (['U32', Uint32Array] as const) : (['U16', Uint16Array] as const);
  const entry = (name: string, type: string, width: number): SafetensorsEntry => {
    const found = entries.get(name);
    if (found?.dtype === type && (found.shape[1] ?? 1) === width) return found;
    throw new FormatError(`${path}: not a shard of this cache: '${name}' is missing or of another type`, {
      code: 'ERR_TEACHER_CACHE',
      op: 'distill',
      argument: path,
    });
  };
  const places = [entry('tokens', dtype, 1), entry('ids', dtype, topK), entry('logProbs', 'F16', topK), entry('mass', 'F32', 1)];
  const file = await open(path, 'r');
  const halves = halfValues();
  return {
    async read(at, tokens, likely, to) {
      const n = tokens.length;
      const data = [new Ids(n), new Ids(n * topK), new Uint16Array(n * topK), new Float32Array(n)] as const;
      await Promise.all(data.map((array, i) => readPart(file, path, places[i]!, array, at * (array.byteLength / n))));
      const [read, ids, logProbs, mass] = data;
      for (let i = 0; i < n; i++) {
        if (read[i] !== tokens[i]) throw otherTokens(path, at + i, read[i]!, tokens[i]!);
        let sum = 0;
        for (let k = i * topK; k < (i + 1) * topK; k++) sum += Math.exp(halves[logProbs[k]!]!);
        const shift = mass[i]! - Math.log(sum);
        for (let k = 0; k < topK; k++) {
          likely.ids[(to + i) * topK + k] = ids[i * topK + k]!;
          likely.logProbs[(to + i) * topK + k] = halves[logProbs[i * topK + k]!]! + shift;
        }
      }
    },
    release: () => file.close(),
  };
}

async function readPart(
  file: FileHandle,
  path: string,
  entry: SafetensorsEntry,
  into: ArrayBufferView,
  from: number,
): Promise<void> {
  if (from + into.byteLength <= entry.bytes && (await readAll(file, into, entry.offset + from)) === into.byteLength) return;
  throw new FormatError(`${path}: ends before the tokens that this data has`, {
    code: 'ERR_TEACHER_CACHE',
    op: 'distill',
    argument: path,
  });
}

function otherTokens(path: string, at: number, read: number, token: number): DataError {
  return new DataError(
    `distill: the teacher's cache was made for other data: token ${at} of ${path} is ${read}, that of the run ${token}; make a new cache`,
    { code: 'ERR_TEACHER_CACHE', op: 'distill', argument: 'teacher.cache', expected: String(read), actual: String(token) },
  );
}
