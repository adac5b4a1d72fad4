// Stages of typed records, one file each. A stage goes on where it was killed, is not run again while nothing that decides its
// outcome has changed, and writes the same bytes whatever the concurrency.

import { createHash } from 'node:crypto';
import { readdir, readFile, rm, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { chunksOf } from '../data/source.ts';
import { isPartial, writeAtomic } from '../io/atomic.ts';
import { lockFolder } from '../io/lock.ts';
import { ConfigError, DataError } from '../tensor/errors.ts';
import { checkSeed, randomBlock } from '../tensor/random.ts';
import { linesAt, lineWriter, openJournal } from './journal.ts';
import { isTooLong, type Meter } from './provider.ts';

/** What a stage makes of a record: a new record, or a reason why there is none. */
export type Outcome<T> = { readonly value: T } | { readonly dropped: string; readonly detail?: string };

/** What a stage is told beside the record. */
export interface StageContext {
  /** Place of the record in the input of the stage. */
  readonly index: number;
  /** Seed number `draw` of this record, in [0, 2^31): the same in every run. */
  seed(draw?: number): number;
  readonly signal: AbortSignal;
}

/** Works on each record alone; its results are kept one by one, so that nothing finished is done twice. */
export interface RecordStage<I, O> {
  readonly kind: 'record';
  /** Name in file names: letters, digits and hyphens. */
  readonly name: string;
  /** Everything that decides the outcome, as plain data: a change runs the stage again. */
  readonly settings: unknown;
  /** Records at work at once. Default 1. */
  readonly concurrency?: number;
  run(record: I, context: StageContext): Promise<Outcome<O>> | Outcome<O>;
}

/** Sees all records, as often as it wants; it is run as a whole. */
export interface GatherStage<I, O> {
  readonly kind: 'gather';
  readonly name: string;
  readonly settings: unknown;
  run(records: () => AsyncIterable<I>, output: GatherOutput<O>, context: Omit<StageContext, 'index'>): Promise<void>;
}

/** Where a {@link GatherStage} puts its records. */
export interface GatherOutput<O> {
  keep(record: O): Promise<void>;
  drop(record: unknown, reason: string, detail?: string): Promise<void>;
}

export type Stage<I, O> = RecordStage<I, O> | GatherStage<I, O>;

/** Where records come from. */
export interface RecordSource<T> {
  readonly settings: unknown;
  /** How many, where it is known. */
  readonly count?: number;
  records(): AsyncIterable<T>;
}

/** Stages in order, each taking what the one before gives. */
export interface Pipeline<T> {
  readonly source: RecordSource<unknown>;
  // biome-ignore lint/suspicious/noExplicitAny: `through` has checked that neighbours fit
  readonly stages: readonly Stage<any, any>[];
  through<O>(stage: Stage<T, O>): Pipeline<O>;
}

export type PipelineEvent =
  | { readonly type: 'stage'; readonly stage: string; readonly state: 'unchanged' | 'started' | 'resumed'; readonly done: number }
  | {
      readonly type: 'progress';
      readonly stage: string;
      readonly done: number;
      readonly total: number | undefined;
      readonly dropped: number;
    }
  | ({ readonly type: 'finished' } & StageSummary)
  /** What a provider was used for, at the end of a run that opened it: stages that were not run again used nothing. */
  | ({ readonly type: 'usage'; readonly provider: string } & Readonly<Meter>);

/** A finished stage, as the manifest keeps it. */
export interface StageSummary {
  readonly stage: string;
  /** Of its settings, the seed and everything before it. */
  readonly hash: string;
  readonly file: string;
  readonly input: number;
  readonly records: number;
  readonly bytes: number;
  /** Records without a result, by reason. */
  readonly dropped: Readonly<Record<string, number>>;
  /** Where they are, if there are any. */
  readonly droppedFile?: string;
}

export interface PipelineOptions {
  /** Folder of the stages' files, the manifest and the lock. */
  readonly output: string;
  /** Seed of all records. Default 0. */
  readonly seed?: number;
  readonly signal?: AbortSignal;
}

/** Name of the manifest in the output folder. */
export const manifestFile = 'manifest.json';

/** Raised when the same settings give other bytes than before. */
const version = 1;

/** A pipeline without stages. */
export function pipeline<T>(source: RecordSource<T>): Pipeline<T> {
  return make(source, []);
}

// biome-ignore lint/suspicious/noExplicitAny: see Pipeline
function make<T>(source: RecordSource<unknown>, stages: readonly Stage<any, any>[]): Pipeline<T> {
  return { source, stages, through: (stage) => make(source, [...stages, stage]) };
}

/** The numbers 0 to `count` - 1: for stages that make records from nothing. */
export function numbers(count: number): RecordSource<number> {
  return {
    settings: { numbers: count },
    count,
    async *records() {
      for (let i = 0; i < count; i++) yield i;
    },
  };
}

/** Records in memory. */
export function recordsOf<T>(records: readonly T[]): RecordSource<T> {
  return {
    settings: { records: digest(records) },
    count: records.length,
    async *records() {
      yield* records;
    },
  };
}

/** The objects of a JSON Lines file; its content decides whether stages run again. @throws FileError, DataError `ERR_MALFORMED` */
export async function jsonlRecords<T>(path: string): Promise<RecordSource<T>> {
  const hash = createHash('sha256');
  for await (const chunk of chunksOf(path)) hash.update(chunk);
  return { settings: { sha256: hash.digest('hex') }, records: () => readRecords<T>(path) };
}

/** Reads the objects of a JSON Lines file. @throws DataError `ERR_MALFORMED` naming file and line */
export async function* readRecords<T>(path: string): AsyncGenerator<T> {
  let number = 0;
  const parse = (line: Buffer): T => {
    try {
      return JSON.parse(line.toString('utf8')) as T;
    } catch (error) {
      throw new DataError(`synth: ${path}, line ${number}: not JSON: ${(error as Error).message}`, {
        code: 'ERR_MALFORMED',
        op: 'synth',
        argument: `${path}:${number}`,
        cause: error,
      });
    }
  };
  let end = 0;
  for await (const { line, from } of linesAt(path)) {
    number++;
    end = from + line.length + 1;
    if (line.length > 0 && line.toString('latin1').trim() !== '') yield parse(line);
  }
  // A file of another program may end without a line break.
  const { size } = await stat(path);
  if (size > end) {
    number++;
    const rest = (await readFile(path)).subarray(end);
    if (rest.toString('latin1').trim() !== '') yield parse(rest);
  }
}

/** SHA-256 of plain data, the order of keys aside. */
export function digest(value: unknown): string {
  const sorted = (_: string, v: unknown): unknown =>
    typeof v === 'object' && v !== null && !Array.isArray(v)
      ? Object.fromEntries(Object.entries(v).sort(([a], [b]) => (a < b ? -1 : 1)))
      : v;
  return createHash('sha256')
    .update(JSON.stringify(value, sorted) ?? 'undefined')
    .digest('hex');
}

/** What was finished in an output folder; none where there is no manifest. */
export async function readManifest(output: string): Promise<readonly StageSummary[]> {
  try {
    const { stages } = JSON.parse(await readFile(join(output, manifestFile), 'utf8')) as { stages: StageSummary[] };
    return Array.isArray(stages) ? stages : [];
  } catch {
    return [];
  }
}

/**
 * Runs a pipeline into a folder: `01-name.jsonl` and on, what each stage dropped beside it, and `manifest.json`. The same call
 * goes on after a kill or an abort; finished results are never lost and never there twice.
 * @throws FileError `ERR_LOCKED`, `ERR_WRITE`; whatever a stage throws, everything finished being kept
 */
export async function* runPipeline<T>(pipeline: Pipeline<T>, options: PipelineOptions): AsyncGenerator<PipelineEvent, void> {
  const seed = checkSeed(options.seed ?? 0);
  for (const { name } of pipeline.stages) {
    if (!/^[a-z0-9-]+$/.test(name) || pipeline.stages.filter((stage) => stage.name === name).length > 1) {
      throw new ConfigError(`synth: stage name "${name}" must be unique and of letters, digits and hyphens`, {
        code: 'ERR_CONFIG',
        op: 'synth',
        argument: 'name',
        actual: name,
      });
    }
  }
  const { output } = options;
  const lock = await lockFolder(output);
  try {
    for (const name of (await readdir(output)).filter(isPartial)) await rm(join(output, name), { force: true });
    const before = await readManifest(output);
    const finished: StageSummary[] = [];
    let hash = digest([version, seed, pipeline.source.settings]);
    let source: RecordSource<unknown> = pipeline.source;
    const names = new Set<string>();
    for (const [i, stage] of pipeline.stages.entries()) {
      hash = digest([hash, stage.kind, stage.name, stage.settings]);
      const file = `${String(i + 1).padStart(2, '0')}-${stage.name}.jsonl`;
      names.add(file);
      const known = before.find((summary) => summary.hash === hash && summary.file === file);
      let summary: StageSummary;
      if (known !== undefined && (await sizeOf(join(output, file))) === known.bytes) {
        yield { type: 'stage', stage: stage.name, state: 'unchanged', done: known.input };
        summary = known;
      } else {
        const work = { stage, source, hash, file, output, seed, signal: options.signal };
        summary = yield* stage.kind === 'record' ? runRecords({ ...work, stage }) : runGather({ ...work, stage });
      }
      finished.push(summary);
      // Later stages of the last run stay known until they are replaced: going back to old settings costs nothing.
      const later = before.filter(({ file: f }) => !finished.some((s) => s.file === f));
      const manifest = { version, seed, stages: [...finished, ...later] };
      if (summary !== known || later.length > 0) {
        await writeAtomic(join(output, manifestFile), (f) => f.writeFile(`${JSON.stringify(manifest, null, 2)}\n`));
      }
      await rm(join(output, `${file}.journal`), { force: true });
      yield { type: 'finished', ...summary };
      source = { settings: hash, count: summary.records, records: () => readRecords(join(output, file)) };
    }
    for (const { file, droppedFile } of before.filter(({ file }) => !names.has(file))) {
      await rm(join(output, file), { force: true });
      if (droppedFile !== undefined) await rm(join(output, droppedFile), { force: true });
    }
    await writeAtomic(join(output, manifestFile), (f) =>
      f.writeFile(`${JSON.stringify({ version, seed, stages: finished }, null, 2)}\n`),
    );
  } finally {
    await lock.release();
  }
}

interface Work<S> {
  readonly stage: S;
  readonly source: RecordSource<unknown>;
  readonly hash: string;
  readonly file: string;
  readonly output: string;
  readonly seed: number;
  readonly signal: AbortSignal | undefined;
}

function seeds(seed: number, name: string, index: number): (draw?: number) => number {
  const stream = Number.parseInt(digest(name).slice(0, 12), 16);
  return (draw = 0) => randomBlock(seed, stream, index * 256 + draw)[0]! >>> 1;
}

async function* runRecords(work: Work<RecordStage<unknown, unknown>>): AsyncGenerator<PipelineEvent, StageSummary> {
  const { stage, source, hash, output, file, seed } = work;
  const journal = await openJournal(join(output, `${file}.journal`), JSON.stringify({ stage: stage.name, hash }));
  // Stops what is under way when one record fails, or when the caller leaves the loop.
  const controller = new AbortController();
  const signal = work.signal === undefined ? controller.signal : AbortSignal.any([work.signal, controller.signal]);
  try {
    yield { type: 'stage', stage: stage.name, state: journal.size > 0 ? 'resumed' : 'started', done: journal.size };
    const running = new Set<Promise<void>>();
    let failure: { error: unknown } | undefined;
    let dropped = 0;
    let input = 0;
    let told = performance.now();
    let ended = false;
    const untilRoom = async function* (most: number): AsyncGenerator<PipelineEvent> {
      while (running.size > most) {
        await Promise.race(running);
        if (performance.now() - told < 200) continue;
        told = performance.now();
        yield { type: 'progress', stage: stage.name, done: journal.size, total: source.count, dropped };
      }
    };
    const one = async (record: unknown, index: number): Promise<void> => {
      try {
        const context = { index, seed: seeds(seed, stage.name, index), signal };
        const outcome = await (async () => stage.run(record, context))().catch((error: unknown) => {
          if (isTooLong(error)) return { dropped: 'too-long', detail: (error as Error).message };
          throw error;
        });
        if ('dropped' in outcome) dropped++;
        // `record` belongs to what was dropped, so that a person can see what a stage has refused.
        await journal.append(index, JSON.stringify('dropped' in outcome ? { ...outcome, record } : outcome));
      } catch (error) {
        failure ??= { error };
        controller.abort(error);
      }
    };
    try {
      for await (const record of source.records()) {
        const index = input++;
        if (journal.has(index)) continue;
        yield* untilRoom((stage.concurrency ?? 1) - 1);
        work.signal?.throwIfAborted();
        if (failure !== undefined) break;
        const promise: Promise<void> = one(record, index).finally(() => running.delete(promise));
        running.add(promise);
      }
      yield* untilRoom(0);
      ended = failure === undefined;
    } finally {
      if (!ended) controller.abort();
      // What finishes now is kept.
      await Promise.all(running);
    }
    if (failure !== undefined) throw failure.error;
    work.signal?.throwIfAborted();
    yield { type: 'progress', stage: stage.name, done: journal.size, total: input, dropped };
    return await writeStage(work, input, async (gather) => {
      for await (const { line } of journal.inOrder(input)) {
        const outcome = JSON.parse(line) as { value: unknown } | { dropped: string; detail?: string; record: unknown };
        if ('dropped' in outcome) await gather.drop(outcome.record, outcome.dropped, outcome.detail);
        else await gather.keep(outcome.value);
      }
    });
  } finally {
    controller.abort();
    await journal.close();
  }
}

async function* runGather(work: Work<GatherStage<unknown, unknown>>): AsyncGenerator<PipelineEvent, StageSummary> {
  const { stage, source, seed, signal = new AbortController().signal } = work;
  yield { type: 'stage', stage: stage.name, state: 'started', done: 0 };
  let input = 0;
  // A stage may read at several places at once.
  const records = async function* () {
    let read = 0;
    for await (const record of source.records()) {
      if ((++read & 0xff) === 0) signal.throwIfAborted();
      input = Math.max(input, read);
      yield record;
    }
  };
  return await writeStage(
    work,
    () => input,
    (gather) => stage.run(records, gather, { seed: seeds(seed, stage.name, 0), signal }),
  );
}

/** Writes the file of a stage, and what it dropped, as a whole. */
async function writeStage(
  work: Work<Stage<unknown, unknown>>,
  input: number | (() => number),
  fill: (output: GatherOutput<unknown>) => Promise<void>,
): Promise<StageSummary> {
  const { stage, hash, output, file } = work;
  const droppedFile = file.replace(/\.jsonl$/, '.dropped.jsonl');
  const dropped = new Map<string, number>();
  let records = 0;
  let bytes = 0;
  await writeAtomic(join(output, droppedFile), async (droppedHandle) => {
    await writeAtomic(join(output, file), async (handle) => {
      const kept = lineWriter(handle);
      const refused = lineWriter(droppedHandle);
      await fill({
        keep: (record) => kept.write(JSON.stringify(record)),
        drop: (record, reason, detail) => {
          dropped.set(reason, (dropped.get(reason) ?? 0) + 1);
          return refused.write(JSON.stringify({ reason, ...(detail === undefined ? {} : { detail }), record }));
        },
      });
      bytes = await kept.end();
      await refused.end();
      records = kept.lines;
    });
  });
  if (dropped.size === 0) await rm(join(output, droppedFile), { force: true });
  return {
    stage: stage.name,
    hash,
    file,
    input: typeof input === 'number' ? input : input(),
    records,
    bytes,
    dropped: Object.fromEntries([...dropped].sort(([a], [b]) => (a < b ? -1 : 1))),
    ...(dropped.size === 0 ? {} : { droppedFile }),
  };
}

async function sizeOf(path: string): Promise<number | undefined> {
  return stat(path).then(
    (info) => info.size,
    () => undefined,
  );
}
