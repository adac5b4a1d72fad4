// GGUF files of llama.cpp: a header, then the tensors' bytes, each aligned.

import { type FileHandle, open } from 'node:fs/promises';
import { LimbeckError } from '../tensor/errors.ts';
import { readAll, readError, writeAll, writeAtomic } from './atomic.ts';
import { decodeBlocks, encodeBlocks, ggmlTypes, readableTypes } from './ggml.ts';
import {
  ALIGNMENT,
  alignUp,
  type GgufHeader,
  type GgufInput,
  type GgufValue,
  headerBytes,
  parseGguf,
  placesOf,
  refuse,
  shapeError,
  show,
} from './gguf-header.ts';

/** An open file; `close` it, or declare it with `await using`. */
export interface Gguf extends GgufHeader, AsyncDisposable {
  /**
   * Reads one tensor as float32, whatever it is packed in.
   * @throws FormatError for a name that is not in the file, a type that cannot be read, or a file that has become shorter.
   */
  read(name: string): Promise<Float32Array>;
  /** Reads one tensor in runs, in order: `use(run, from)` gets elements `from`.. in an array that the next run overwrites. */
  each(name: string, use: (run: Float32Array, from: number) => void): Promise<void>;
  close(): Promise<void>;
}

export interface GgufWriteOptions {
  readonly signal?: AbortSignal | undefined;
  /** Bytes of tensors written, and of all. */
  readonly onProgress?: ((progress: { readonly done: number; readonly total: number }) => void) | undefined;
}

// Values of a tensor that are read at once, and how many such runs are on their way while one is used.
const RUN = 1 << 18;
const AHEAD = 3;
// A vocabulary of a million tokens takes 40 MiB; no file that means well has a header like this.
const MAX_HEADER = 1 << 29;
const FIRST_WINDOW = 1 << 20;

/**
 * Opens a GGUF file and checks its header: everything that it says must be true of the file.
 * @throws FormatError `ERR_GGUF_...` (naming the key or tensor and the place) for a file that is none, is cut short, or lies; FileError
 * `ERR_READ` where it cannot be read.
 */
export async function openGguf(path: string): Promise<Gguf> {
  let file: FileHandle | undefined;
  try {
    file = await open(path, 'r');
    return await openHandle(path, file);
  } catch (error) {
    await file?.close();
    throw LimbeckError.is(error) ? error : readError('openGguf', path, error);
  }
}

async function openHandle(path: string, file: FileHandle): Promise<Gguf> {
  const info = await file.stat();
  if (!info.isFile()) throw refuse(path, 'it is not a file', 'HEADER');
  let header: GgufHeader | undefined;
  // How long a header is, only reading it tells; a second try costs less than asking for each value.
  for (let window = FIRST_WINDOW; header === undefined; window *= 4) {
    const bytes = Buffer.alloc(Math.min(window, MAX_HEADER, info.size));
    if ((await readAll(file, bytes, 0)) < bytes.length) throw refuse(path, 'it became shorter while it was read', 'TRUNCATED');
    header = parseGguf(path, bytes, info.size);
    if (header === undefined && bytes.length === MAX_HEADER) {
      throw refuse(path, `its header has more than ${MAX_HEADER} bytes`, 'HEADER');
    }
  }
  const { version, metadata, tensors } = header;
  /** Reads and unpacks a tensor in runs, some at a time, each into the array that `room` gives; `use` takes them in order. */
  const each = async (
    name: string,
    room: (count: number, from: number, slot: number) => Float32Array,
    use: (run: Float32Array, from: number) => void,
  ): Promise<void> => {
    const entry = tensors.get(name);
    if (entry === undefined) throw refuse(path, `it has no tensor ${show(name)}`, 'NAME', { argument: name });
    const { values, bytes, readable } = ggmlTypes[entry.type];
    if (!readable) {
      const known = readableTypes.join(', ');
      const message = `tensor ${show(name)} is ${entry.type}, which cannot be read; known are ${known}`;
      throw refuse(path, message, 'TYPE', { argument: name, expected: known, actual: entry.type });
    }
    const size = (entry.bytes / bytes) * values;
    const packed: Buffer[] = [];
    const load = async (from: number, slot: number): Promise<Float32Array> => {
      const count = Math.min(RUN, size - from);
      const wide = room(count, from, slot);
      const length = (count / values) * bytes;
      if (entry.type !== 'F32') packed[slot] ??= Buffer.allocUnsafe(length);
      const part = packed[slot]?.subarray(0, length) ?? new Uint8Array(wide.buffer, wide.byteOffset, length);
      if ((await readAll(file, part, entry.offset + (from / values) * bytes)) < length) {
        throw refuse(path, `it became shorter than its tensor ${show(name)}`, 'TRUNCATED', { argument: name });
      }
      if (entry.type !== 'F32') await decodeBlocks(entry.type, part, wide);
      return wide;
    };
    const ahead: Promise<Float32Array>[] = [];
    const start = (from: number, slot: number): void => {
      ahead[slot] = load(from, slot);
      ahead[slot].catch(() => {}); // it is told when its turn comes
    };
    for (let slot = 0; slot < AHEAD && slot * RUN < size; slot++) start(slot * RUN, slot);
    try {
      for (let from = 0, slot = 0; from < size; from += RUN, slot = (slot + 1) % AHEAD) {
        use(await ahead[slot]!, from);
        if (from + AHEAD * RUN < size) start(from + AHEAD * RUN, slot);
      }
    } finally {
      // They work on the file and their arrays.
      await Promise.allSettled(ahead);
    }
  };
  return {
    version,
    metadata,
    tensors,
    async read(name) {
      const size = (tensors.get(name)?.shape ?? []).reduce((a, b) => a * b, 1);
      let all: Float32Array | undefined;
      const room = (count: number, from: number): Float32Array => {
        all ??= new Float32Array(size);
        return all.subarray(from, from + count);
      };
      await each(name, room, () => {});
      return all ?? new Float32Array(0);
    },
    each(name, use) {
      const wide: Float32Array[] = [];
      const room = (count: number, _: number, slot: number): Float32Array => {
        wide[slot] ??= new Float32Array(count);
        return wide[slot].subarray(0, count);
      };
      return each(name, room, use);
    },
    close: () => file.close(),
    [Symbol.asyncDispose]: () => file.close(),
  };
}

/**
 * Writes a GGUF file, version 3, that replaces `path` only when complete. One run of one tensor is in memory at a time.
 * @throws ShapeError where data and description differ or a row is no whole number of blocks, DataError for a value that the type cannot
 * hold, FormatError for a repeated name, FileError `ERR_WRITE` where the disk refuses.
 */
export async function writeGguf(
  path: string,
  metadata: Iterable<readonly [string, GgufValue]>,
  tensors: readonly GgufInput[],
  options: GgufWriteOptions = {},
): Promise<void> {
  const entries = [...metadata];
  const places = placesOf(entries, tensors);
  const total = places.reduce((sum, { bytes }) => sum + bytes, 0);
  const { signal, onProgress } = options;
  await writeAtomic(path, async (file) => {
    const head = headerBytes(entries, tensors, places);
    await writeAll(file, head);
    let done = 0;
    for (const [i, tensor] of tensors.entries()) {
      let written = 0;
      // One run is written while the next is made; but no run of the caller's, whose memory may be used again.
      let last = Promise.resolve();
      try {
        for await (const run of tensor.data()) {
          signal?.throwIfAborted();
          const packed = run instanceof Float32Array ? await encodeRun(tensor, run) : run;
          await last;
          if (written + packed.length > places[i]!.bytes) {
            written = Number.POSITIVE_INFINITY;
            break;
          }
          written += packed.length;
          last = writeAll(file, packed);
          if (packed.buffer === run.buffer) await last;
          else last.catch(() => {}); // it is told before the next
          onProgress?.({ done: done + written, total });
        }
      } finally {
        await last;
      }
      if (written !== places[i]!.bytes) {
        throw shapeError(
          tensor,
          `needs ${places[i]!.bytes} bytes of ${tensor.type}, its data has ${Number.isFinite(written) ? written : 'more'}`,
        );
      }
      done += written;
      await writeAll(file, new Uint8Array(alignUp(written, ALIGNMENT) - written));
    }
  });
}

function encodeRun(tensor: GgufInput, run: Float32Array): Promise<Uint8Array> {
  const { values } = ggmlTypes[tensor.type];
  if (run.length % values !== 0)
    throw shapeError(tensor, `came in a run of ${run.length} values; ${tensor.type} packs blocks of ${values}`);
  return encodeBlocks(tensor.type, run);
}
