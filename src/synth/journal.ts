// Results of a stage in the order in which they came, one JSON line each, behind a line that says what they belong to. Only whole lines
// count: what a killed process left of the last one is cut off.

import { type FileHandle, open } from 'node:fs/promises';
import { chunksOf } from '../data/source.ts';
import { writeAll } from '../io/atomic.ts';
import { FileError } from '../tensor/errors.ts';

/** Lines of a file with the place of each; a last line without its end is left out. */
export async function* linesAt(path: string): AsyncGenerator<{ readonly line: Buffer; readonly from: number }> {
  let from = 0;
  const parts: Buffer[] = []; // of a line that spans chunks
  for await (const chunk of chunksOf(path)) {
    let at = 0;
    for (let end = chunk.indexOf(0x0a); end >= 0; end = chunk.indexOf(0x0a, at)) {
      const tail = chunk.subarray(at, end);
      const line = parts.length === 0 ? tail : Buffer.concat([...parts.splice(0), tail]);
      yield { line, from };
      from += line.length + 1;
      at = end + 1;
    }
    if (at < chunk.length) parts.push(chunk.subarray(at));
  }
}

/** What is known of one record. */
export interface Journal {
  /** Results that are in it. */
  readonly size: number;
  has(index: number): boolean;
  /** Adds a result; done when the system has taken it. @throws FileError `ERR_WRITE`; everything before stays */
  append(index: number, line: string): Promise<void>;
  /** The lines of records 0 to `count` - 1 that it has, in the order of their numbers. */
  inOrder(count: number): AsyncGenerator<{ readonly index: number; readonly line: string }>;
  close(): Promise<void>;
}

/**
 * Opens the journal of a stage, or begins one. Results of another stage (`header` differs) are thrown away.
 * A line is `index`, a tab, and JSON.
 */
export async function openJournal(path: string, header: string): Promise<Journal> {
  const file = await open(path, 'a+').then(async (created) => {
    await created.close();
    return open(path, 'r+');
  });
  let places = new Float64Array(1024); // where the line of a record begins; 0 for none, as the header lies there
  let lengths = new Uint32Array(1024);
  let size = 0;
  let end = 0;
  const put = (index: number, from: number, length: number): void => {
    if (index >= places.length) {
      const room = 2 ** Math.ceil(Math.log2(index + 1));
      const [oldPlaces, oldLengths] = [places, lengths];
      places = new Float64Array(room);
      lengths = new Uint32Array(room);
      places.set(oldPlaces);
      lengths.set(oldLengths);
    }
    if (places[index] === 0) size++;
    places[index] = from;
    lengths[index] = length;
  };

  let first = true;
  for await (const { line, from } of linesAt(path)) {
    if (first) {
      if (line.toString() !== header) break;
      first = false;
    } else {
      const index = indexOf(line);
      // A line that is not ours: what follows cannot be trusted either.
      if (index === undefined) break;
      put(index, from, line.length);
    }
    end = from + line.length + 1;
  }
  await file.truncate(end);
  if (first) {
    await writeAt(file, path, Buffer.from(`${header}\n`), 0);
    end = header.length + 1;
  }

  // While one write is under way, the lines that come wait and go together.
  let waiting: { index: number; line: string }[] = [];
  let writing: Promise<void> | undefined;
  const flush = async (): Promise<void> => {
    const batch = waiting;
    waiting = [];
    writing = undefined;
    const buffers = batch.map(({ index, line }) => Buffer.from(`${index}\t${line}\n`));
    await writeAt(file, path, Buffer.concat(buffers), end);
    for (const [i, { index }] of batch.entries()) {
      put(index, end, buffers[i]!.length - 1);
      end += buffers[i]!.length;
    }
  };
  let last: Promise<void> = Promise.resolve();

  return {
    get size() {
      return size;
    },
    has: (index) => index < places.length && places[index]! > 0,
    append(index, line) {
      waiting.push({ index, line });
      if (writing === undefined) {
        writing = last.then(flush);
        last = writing.catch(() => {});
      }
      return writing;
    },
    async *inOrder(count) {
      let window: Buffer = Buffer.alloc(0);
      let from = 0;
      for (let index = 0; index < count; index++) {
        if (!(index < places.length && places[index]! > 0)) continue;
        const [place, length] = [places[index]!, lengths[index]!];
        if (place < from || place + length > from + window.length) {
          const room = Buffer.allocUnsafe(Math.max(length, Math.min(1 << 18, end - place)));
          const { bytesRead } = await file.read(room, 0, room.length, place);
          [window, from] = [room.subarray(0, bytesRead), place];
        }
        const line = window.toString('utf8', place - from, place - from + length);
        yield { index, line: line.slice(line.indexOf('\t') + 1) };
      }
    },
    async close() {
      await last;
      await file.close();
    },
  };
}

function indexOf(line: Buffer): number | undefined {
  const tab = line.indexOf(0x09);
  const text = tab > 0 && tab < 16 ? line.toString('latin1', 0, tab) : '';
  // A disk that lost power may hold zeros inside a whole line.
  return /^\d+$/.test(text) && line[tab + 1] === 0x7b && line.at(-1) === 0x7d ? Number(text) : undefined;
}

/** Writes at a place; on failure nothing of it stays. @throws FileError `ERR_WRITE` */
async function writeAt(file: FileHandle, path: string, data: Buffer, position: number): Promise<void> {
  try {
    let at = 0;
    while (at < data.length) at += (await file.write(data, at, data.length - at, position + at)).bytesWritten;
  } catch (error) {
    await file.truncate(position).catch(() => {});
    const { code, message } = error as NodeJS.ErrnoException;
    const reason = code === 'ENOSPC' ? 'the disk is full' : message;
    throw new FileError(`synth: cannot write ${path}: ${reason}. What was finished is there; free some space and run it again.`, {
      code: 'ERR_WRITE',
      op: 'synth',
      argument: path,
      ...(code === undefined ? {} : { actual: code }),
      cause: error,
    });
  }
}

/** A file that grows by lines, through a buffer. */
export function lineWriter(file: FileHandle): {
  write(line: string): Promise<void>;
  end(): Promise<number>;
  readonly lines: number;
} {
  let buffer: string[] = [];
  let held = 0;
  let lines = 0;
  let bytes = 0;
  const flush = async (): Promise<void> => {
    if (buffer.length === 0) return;
    const data = Buffer.from(`${buffer.join('\n')}\n`);
    buffer = [];
    held = 0;
    await writeAll(file, data);
    bytes += data.length;
  };
  return {
    get lines() {
      return lines;
    },
    async write(line) {
      buffer.push(line);
      held += line.length;
      lines++;
      if (held > 1 << 18) await flush();
    },
    async end() {
      await flush();
      return bytes;
    },
  };
}
