// metrics.jsonl: the events of a run, one JSON object a line, each with the time it was written.

import { createReadStream } from 'node:fs';
import { type FileHandle, mkdir, open, rename, truncate } from 'node:fs/promises';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { FileError } from '../tensor/errors.ts';
import type { TrainEvent } from './events.ts';

/** An event and when it was written, in milliseconds since 1970. Numbers that were not finite come back as `null`. */
export type RecordedEvent = TrainEvent & { readonly time: number };

/** Name of the file inside a run's output folder. */
export const metricsFile = 'metrics.jsonl';

/** Appends events to `folder`/metrics.jsonl. A line is with the operating system before `write` resolves. */
export class MetricsWriter {
  readonly path: string;
  readonly #file: FileHandle;

  private constructor(path: string, file: FileHandle) {
    this.path = path;
    this.#file = file;
  }

  /**
   * Opens the file for a run that begins (an earlier file is kept as metrics.jsonl.old) or, with `resumedStep`, for one that goes
   * on: lines after that step are dropped, for those steps will be taken again. @throws FileError
   */
  static async open(folder: string, resumedStep?: number): Promise<MetricsWriter> {
    const path = join(folder, metricsFile);
    try {
      await mkdir(folder, { recursive: true });
      if (resumedStep === undefined) await rename(path, `${path}.old`).catch(ignoreMissing);
      else await truncate(path, await bytesUntil(path, resumedStep)).catch(ignoreMissing);
      return new MetricsWriter(path, await open(path, 'a'));
    } catch (error) {
      throw cannotWrite(path, error);
    }
  }

  /** Appends one event and returns it with its time. Checkpoints and the end of the run are flushed to the disk itself. */
  async write(event: TrainEvent): Promise<RecordedEvent> {
    const recorded: RecordedEvent = { time: Date.now(), ...event };
    try {
      await this.#file.appendFile(`${JSON.stringify(recorded)}\n`);
      if (event.type === 'checkpoint' || event.type === 'done') await this.#file.datasync();
    } catch (error) {
      throw cannotWrite(this.path, error);
    }
    return recorded;
  }

  async close(): Promise<void> {
    await this.#file.close();
  }
}

/** Reads a metrics file; a last line that a killed process left unfinished is skipped. Missing file: no events. */
export async function readMetrics(path: string): Promise<RecordedEvent[]> {
  const events: RecordedEvent[] = [];
  await eachLine(path, (line) => {
    const event = parse(line);
    if (event) events.push(event);
    return true;
  });
  return events;
}

/** Bytes of the leading lines that belong to steps up to `step`. */
async function bytesUntil(path: string, step: number): Promise<number> {
  let bytes = 0;
  await eachLine(path, (line) => {
    const event = parse(line);
    if (!event || ('step' in event && Number(event.step) > step)) return false;
    bytes += Buffer.byteLength(line) + 1;
    return true;
  });
  return bytes;
}

async function eachLine(path: string, visit: (line: string) => boolean): Promise<void> {
  const stream = createReadStream(path);
  try {
    for await (const line of createInterface({ input: stream, crlfDelay: Number.POSITIVE_INFINITY })) if (!visit(line)) break;
  } catch (error) {
    ignoreMissing(error);
  } finally {
    stream.destroy();
  }
}

function parse(line: string): RecordedEvent | undefined {
  try {
    return JSON.parse(line) as RecordedEvent;
  } catch {
    return undefined;
  }
}

function ignoreMissing(error: unknown): void {
  if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
}

function cannotWrite(path: string, error: unknown): FileError {
  const why = error instanceof Error ? error.message : String(error);
  return new FileError(`metrics: cannot write ${path}: ${why}; checkpoints that were saved are not touched`, {
    code: 'ERR_WRITE',
    op: 'metrics',
    argument: path,
    cause: error,
  });
}
