// Text to training batches: tokenize once, split by document, shuffle by segment, pack, and go on exactly where a run stopped.

import { createHash } from 'node:crypto';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { ConfigError, DataError, LimbeckError } from '../tensor/errors.ts';
import { checkSeed } from '../tensor/random.ts';
import type { Tokenizer } from '../tokenizer/tokenizer.ts';
import {
  checkMixture,
  MixedRows,
  type Mixture,
  type MixturePart,
  type PartState,
  type SourceGiven,
  type SourceReport,
  sharesOf,
} from './mixture.ts';
import { type Batch, checkLayout, type Layout, layOut } from './pack.ts';
import { type Piece, Rows, type RowsState, readRow, type Segments, segmentsOf, shuffledOrder, storeOrder } from './rows.ts';
import { inFiles, type Malformed, type Source } from './source.ts';
import { type Held, holdOut } from './split.ts';
import { type CorpusReport, tokenize } from './tokenize.ts';
import { openTokenFile, type TokenStore } from './tokens.ts';

export interface DatasetOptions extends Layout {
  /** Training data: sources one after the other, or a mixture in proportions; none (`[]`) to read held-out data only. */
  readonly train: Source | readonly Source[] | Mixture;
  /**
   * Held-out data: a share of the training documents (0 to 1), a number of them, or sources of its own. Default: none. Of a mixture, share and
   * number are taken from each source.
   */
  readonly validation?: Held | Source | readonly Source[];
  readonly tokenizer: Tokenizer;
  /** Seed of the split and of the order of training. Default 0. */
  readonly seed?: number;
  /** Put the begin token before each text. Default: where the tokenizer begins texts. */
  readonly bos?: boolean;
  /** Put the end token behind each text. Default: where the tokenizer has one. */
  readonly eos?: boolean;
  /** Whether special tokens written in the text count as tokens. Default false: they are text. */
  readonly special?: boolean;
  /** Folder where ids are kept, and found again by the next run on the same files. Default: not kept. */
  readonly cacheTokens?: string;
  /** Ids above this many bytes go to a file in `cacheTokens` or the system's temporary folder. Default 1 GiB. */
  readonly memoryLimit?: number;
  readonly onProgress?: (progress: { readonly documents: number; readonly bytes: number; readonly tokens: number }) => void;
  readonly signal?: AbortSignal;
}

/** What was read. Counts are of training and held-out data together, unless they say otherwise. */
export interface DatasetReport {
  readonly documents: number;
  readonly bytes: number;
  readonly tokens: number;
  readonly trainDocuments: number;
  readonly trainTokens: number;
  readonly validationDocuments: number;
  readonly validationTokens: number;
  /** Records that were left out: how many, and the first thousand. */
  readonly malformedCount: number;
  readonly malformed: readonly Malformed[];
  /** The sources of a mixture. */
  readonly sources?: readonly SourceReport[];
}

/** Where a loader is; plain data for a checkpoint. */
export interface DatasetState extends RowsState {
  readonly version: 1;
  readonly seed: number;
  readonly length: number;
  /** Fingerprint of the data, to refuse another corpus. */
  readonly data: string;
  /** Tokens given out since the start. */
  readonly tokens: number;
  /** Of a mixture: where each source is. The other places are then 0. */
  readonly sources?: readonly PartState[];
}

/** Batches of training data without end, each epoch in a new order. */
export interface Loader {
  next(): Promise<Batch>;
  /** Passes over the data, the part of the current one included. */
  readonly epoch: number;
  /** What each source of a mixture has given so far. */
  readonly sources?: readonly SourceGiven[] | undefined;
  state(): DatasetState;
  /** Goes on as the loader that gave this state would have, bit for bit. @throws ConfigError `ERR_RESUME` for other data or options */
  restore(state: DatasetState): void;
}

export interface Dataset {
  readonly train: Loader;
  /** The held-out data once, in the same order every time; the last row and batch are padded. */
  validation(options?: { readonly batches?: number }): AsyncGenerator<Batch>;
  readonly report: DatasetReport;
  /** Frees files; batches cannot be read afterwards. */
  close(): Promise<void>;
}

/** A dataset of running text. */
export interface TextDataset extends Dataset {
  /** Those of the training sources in their order, then that of held-out data from sources of its own. `places` number all their tokens. */
  readonly stores: readonly TokenStore[];
}

/**
 * Opens a corpus for training.
 * @throws DataError `ERR_EMPTY`, `ERR_SPLIT`, `ERR_UTF8`, `ERR_MALFORMED` (strict), `ERR_TOKEN_RANGE`, `ERR_VOCABULARY`; ConfigError
 */
export async function openDataset(options: DatasetOptions): Promise<TextDataset> {
  checkLayout(options, 'openDataset');
  const seed = checkSeed(options.seed ?? 0);
  const { validation, length } = options;
  const opened: Corpus[] = [];
  const close = async () => {
    for (const corpus of opened) await corpus.close();
  };
  const load = async (sources: readonly Source[], what: string) => {
    const corpus = await openCorpus(sources, options);
    const base = total(opened.map(({ store }) => store.tokens));
    opened.push(corpus);
    if (sources.length > 0 && corpus.store.tokens === 0) {
      throw new DataError(
        `openDataset: the ${what} data has no text: ${corpus.report.documents} documents, ${corpus.report.malformedCount} malformed${await inFiles(sources)}`,
        {
          code: 'ERR_EMPTY',
          op: 'openDataset',
          argument: what === 'validation' ? 'validation' : 'train',
        },
      );
    }
    return { store: corpus.store, base };
  };
  try {
    const mixed = 'mixture' in options.train ? options.train : undefined;
    if (mixed !== undefined) checkMixture(mixed);
    const given = mixed?.mixture ?? [{ name: 'training', source: options.train as Source | readonly Source[] }];
    const shared =
      typeof validation === 'number' ||
      (validation !== undefined && 'documents' in validation && typeof validation.documents === 'number');
    const parts: Part[] = [];
    const held: Selection[] = [];
    for (const [i, { name, source, weight, repeat }] of given.entries()) {
      const { store, base } = await load(listOf(source), name);
      const all = Uint32Array.from({ length: store.ends.length }, (_, j) => j);
      const out = shared ? holdOut(validation as Held, all.length, seed) : new Uint32Array(0);
      if (shared) held.push({ store, base, documents: out, segments: segmentsOf(store, out, length) });
      const drawn = new Set(out);
      const documents = shared ? all.filter((j) => !drawn.has(j)) : all;
      const segments = segmentsOf(store, documents, length);
      if (listOf(source).length > 0 && segments.tokens === 0)
        throw new DataError(`openDataset: the ${name} documents have no tokens`, {
          code: 'ERR_EMPTY',
          op: 'openDataset',
          argument: 'train',
        });
      parts.push({
        name,
        store,
        base,
        documents,
        segments,
        tokens: segments.tokens,
        rows: new Rows(segments, length, shuffledOrder(segments.count, seed, i), options.whole),
        ...(weight === undefined ? {} : { weight }),
        ...(repeat === undefined ? {} : { repeat }),
      });
    }
    if (validation !== undefined && !shared) {
      const { store, base } = await load(listOf(validation as Source | readonly Source[]), 'validation');
      const documents = Uint32Array.from({ length: store.ends.length }, (_, i) => i);
      held.push({ store, base, documents, segments: segmentsOf(store, documents, length) });
    }

    const reports = opened.map((corpus) => corpus.report);
    const sum = (field: 'documents' | 'bytes' | 'tokens' | 'malformedCount') =>
      reports.reduce((total, report) => total + report[field], 0);
    const padded = { ...options, pad: options.pad ?? options.tokenizer.pad ?? 0 };
    return {
      train: loader(parts, padded, seed, mixed !== undefined),
      stores: opened.map(({ store }) => store),
      async *validation({ batches = Number.POSITIVE_INFINITY } = {}) {
        let left = batches;
        for (const { store, base, segments } of held) {
          const rows = new Rows(segments, length, () => storeOrder(), options.whole);
          for (; left > 0; left--) {
            const batch = await take(() => place(store, base, rows.next(true)), padded);
            if (batch === undefined) break;
            yield batch;
          }
        }
      },
      report: {
        documents: sum('documents'),
        bytes: sum('bytes'),
        tokens: sum('tokens'),
        trainDocuments: total(parts.map(({ documents }) => documents.length)),
        trainTokens: total(parts.map(({ tokens }) => tokens)),
        validationDocuments: total(held.map(({ documents }) => documents.length)),
        validationTokens: total(held.map(({ segments }) => segments.tokens)),
        malformedCount: sum('malformedCount'),
        malformed: reports.flatMap((report) => report.malformed).slice(0, 1000),
        ...(mixed === undefined ? {} : { sources: sourceReports(parts) }),
      },
      close,
    };
  } catch (error) {
    await close();
    throw error;
  }
}

function listOf(sources: Source | readonly Source[]): readonly Source[] {
  return Array.isArray(sources) ? sources : [sources as Source];
}

function total(numbers: readonly number[]): number {
  return numbers.reduce((sum, n) => sum + n, 0);
}

/** Documents of a store. */
interface Selection {
  readonly store: TokenStore;
  /** Tokens of the stores before. */
  readonly base: number;
  readonly documents: Uint32Array;
  readonly segments: Segments;
}

/** A source of the training data. */
interface Part extends Selection, MixturePart {}

function sourceReports(parts: readonly Part[]): SourceReport[] {
  const shares = sharesOf(parts);
  return parts.map(({ name, documents, tokens }, i) => ({ name, documents: documents.length, tokens, share: shares[i]! }));
}

/** A row and the store that it lies in. */
interface PlacedRow {
  readonly store: TokenStore;
  readonly base: number;
  readonly row: readonly Piece[];
}

function place(store: TokenStore, base: number, row: readonly Piece[] | undefined): PlacedRow | undefined {
  return row === undefined ? undefined : { store, base, row };
}

/** The next rows of a walk as a batch; undefined when there are none. */
async function take(next: () => PlacedRow | undefined, layout: Layout): Promise<Batch | undefined> {
  const rows: PlacedRow[] = [];
  for (let row = next(); row !== undefined; row = next()) {
    rows.push(row);
    if (rows.length === layout.batch) break;
  }
  if (rows.length === 0) return undefined;
  return layOut(await Promise.all(rows.map(({ store, base, row }) => readRow(store, row, base))), layout);
}

function loader(parts: readonly Part[], layout: Layout, seed: number, mixture: boolean): Loader {
  const mixed = new MixedRows(parts, layout.length);
  const all = total(parts.map(({ tokens, repeat = 1 }) => tokens * repeat));
  const fixed = { version: 1 as const, seed, length: layout.length, data: partsFingerprint(parts, mixture, layout.whole) };
  const [{ rows, segments }] = parts as readonly [Part];
  let tokens = 0;
  // One batch at a time: rows are taken in the order of the calls.
  let last: Promise<unknown> = Promise.resolve();
  return {
    next() {
      const batch = last.then(async () => {
        if (all === 0)
          throw new DataError('next: there is no training data', { code: 'ERR_EMPTY', op: 'next', argument: 'train' });
        const taken = (await take(() => {
          const { part, row } = mixed.next();
          return { ...parts[part]!, row };
        }, layout))!;
        tokens += taken.tokens;
        return taken;
      });
      last = batch.catch(() => {});
      return batch;
    },
    get epoch() {
      return mixture ? tokens / all : rows.state.epoch + rows.state.position / segments.count;
    },
    get sources() {
      return mixture ? mixed.given : undefined;
    },
    state() {
      const own = mixed.state;
      if (mixture) return { ...fixed, tokens, epoch: 0, position: 0, waiting: [], sources: own };
      const { rows: _, ...state } = own[0]!;
      return { ...fixed, tokens, ...state };
    },
    restore(state) {
      checkState(state, fixed);
      mixed.state = state.sources ?? [{ ...state, rows: state.tokens / layout.length }];
      tokens = state.tokens;
    },
  };
}

/** Of documents and proportions; of a single source, of its documents alone. */
function partsFingerprint(parts: readonly Part[], mixture: boolean, whole: boolean | undefined): string {
  const own = parts.map(({ store, documents }) => dataFingerprint(store, documents, whole));
  if (!mixture) return own[0]!;
  const facts = parts.map(({ name, weight, repeat }, i) => [name, weight ?? null, repeat ?? null, own[i]]);
  return createHash('sha256').update(JSON.stringify(facts)).digest('hex').slice(0, 16);
}

/** Refuses a state that another sequence of batches would follow. @throws ConfigError `ERR_RESUME` naming the field */
export function checkState(state: DatasetState, now: Pick<DatasetState, 'version' | 'seed' | 'length' | 'data'>): void {
  for (const [field, value] of Object.entries(now)) {
    const saved = state[field as keyof typeof now];
    if (saved === value) continue;
    throw new ConfigError(
      `restore: the saved state has ${field} ${saved}, this loader ${value}; the sequence of batches would differ`,
      {
        code: 'ERR_RESUME',
        op: 'restore',
        argument: field,
        expected: String(value),
        actual: String(saved),
      },
    );
  }
}

function dataFingerprint(store: TokenStore, documents: Uint32Array, whole = false): string {
  const hash = createHash('sha256');
  if (whole) hash.update('whole');
  hash.update(store.ends);
  hash.update(documents);
  return hash.digest('hex').slice(0, 16);
}

interface Corpus {
  readonly store: TokenStore;
  readonly report: CorpusReport;
  close(): Promise<void>;
}

/** Tokenizes sources, or takes the ids of an earlier run on the same files. */
async function openCorpus(sources: readonly Source[], options: DatasetOptions): Promise<Corpus> {
  const limit = options.memoryLimit ?? 2 ** 30;
  const { tokenizer, cacheTokens } = options;
  const bos = (options.bos ?? tokenizer.begins) ? tokenizer.bos : undefined;
  const eos = (options.eos ?? true) ? tokenizer.eos : undefined;
  for (const [name, id] of Object.entries({ bos, eos })) {
    if (options[name as 'bos' | 'eos'] !== true || id !== undefined) continue;
    throw new ConfigError(`openDataset: ${name} was asked for, but the tokenizer has no such token`, {
      code: 'ERR_NO_TOKEN',
      op: 'openDataset',
      argument: name,
    });
  }
  await checkVocabulary(sources, tokenizer);
  const settings = {
    tokenizer,
    bos,
    eos,
    special: options.special ?? false,
    limit,
    onProgress: options.onProgress,
    signal: options.signal,
  };

  const key = cacheTokens === undefined ? undefined : await cacheKey(sources, tokenizer, [bos, eos, settings.special]);
  if (key === undefined) {
    let folder = '';
    const spill = async () => {
      folder = await mkdtemp(join(tmpdir(), 'limbeck-'));
      return join(folder, 'tokens.safetensors');
    };
    const remove = async () => {
      if (folder !== '') await rm(folder, { recursive: true, force: true });
    };
    try {
      const { store, report } = await tokenize(sources, { ...settings, spill });
      return {
        store,
        report,
        close: async () => {
          await store.close();
          await remove();
        },
      };
    } catch (error) {
      await remove();
      throw error;
    }
  }
  const path = join(cacheTokens!, `${key}.safetensors`);
  const found = await cached(path);
  if (found !== undefined) return found;
  const { store, report } = await tokenize(sources, { ...settings, limit: 0, spill: async () => path });
  return { store, report, close: () => store.close() };
}

async function cached(path: string): Promise<Corpus | undefined> {
  try {
    const file = await openTokenFile(path);
    const report = JSON.parse(file.metadata.report ?? '') as CorpusReport;
    return { store: file, report, close: () => file.close() };
  } catch (error) {
    // Whatever is wrong with a cached file, it can be made again.
    if (LimbeckError.is(error) || error instanceof SyntaxError) return undefined;
    throw error;
  }
}

/** Names the result of tokenizing; undefined where a source is not in files. */
async function cacheKey(sources: readonly Source[], tokenizer: Tokenizer, settings: unknown): Promise<string | undefined> {
  const hash = createHash('sha256');
  hash.update(JSON.stringify([1, tokenizer.digest, settings]));
  for (const source of sources) {
    const files = await source.files();
    if (files === undefined) return undefined;
    hash.update(JSON.stringify([source.options, files]));
  }
  return hash.digest('hex').slice(0, 32);
}

async function checkVocabulary(sources: readonly Source[], tokenizer: Tokenizer): Promise<void> {
  for (const source of sources) {
    if (source.kind !== 'tokens') continue;
    for (const fingerprint of await source.fingerprints()) {
      if (fingerprint === tokenizer.fingerprint) continue;
      throw new DataError(
        `openDataset: the token files were made with another vocabulary (${fingerprint}) than the tokenizer has (${tokenizer.fingerprint}); tokenize the text again`,
        {
          code: 'ERR_VOCABULARY',
          op: 'openDataset',
          argument: 'tokenizer',
          expected: fingerprint,
          actual: tokenizer.fingerprint,
        },
      );
    }
  }
}
