// The safetensors format: 8 bytes of header length, a JSON header, then the tensors' bytes without gaps, little-endian.

import { type FileHandle, open } from 'node:fs/promises';
import { DTypeError, FormatError, LimbeckError, ShapeError } from '../tensor/errors.ts';
import { readAll, readError, writeAll, writeAtomic } from './atomic.ts';
import { halfValues } from './half.ts';

// In the order of the reference implementation: by alignment. A file holds its tensors in the reverse of it.
const types = {
  BOOL: Uint8Array,
  U8: Uint8Array,
  I8: Int8Array,
  F8_E5M2: Uint8Array,
  F8_E4M3: Uint8Array,
  I16: Int16Array,
  U16: Uint16Array,
  F16: Uint16Array,
  BF16: Uint16Array,
  I32: Int32Array,
  U32: Uint32Array,
  F32: Float32Array,
  F64: Float64Array,
  I64: BigInt64Array,
  U64: BigUint64Array,
} as const;

/** A dtype as the format spells it. */
export type SafetensorsDType = keyof typeof types;

/** The values of a tensor: 16-bit and 8-bit floats as raw bits. */
export type SafetensorsArray =
  | Uint8Array
  | Int8Array
  | Uint16Array
  | Int16Array
  | Uint32Array
  | Int32Array
  | Float32Array
  | Float64Array
  | BigInt64Array
  | BigUint64Array;

/**
 * A tensor to write; `data` may be a function, called when its turn comes, so that only one tensor is in memory at a time. It gives all
 * elements at once, or pieces of them in order: an array has at most 2^32 elements.
 */
export interface SafetensorsInput {
  readonly name: string;
  readonly dtype: SafetensorsDType;
  readonly shape: readonly number[];
  readonly data: SafetensorsArray | (() => SafetensorsArray | Promise<SafetensorsArray> | AsyncIterable<SafetensorsArray>);
}

/** Where a tensor lies: `bytes` bytes from byte `offset` of the file. */
export interface SafetensorsEntry {
  readonly dtype: SafetensorsDType;
  readonly shape: readonly number[];
  readonly offset: number;
  readonly bytes: number;
}

/** Elements `from` up to, not including, `to`. */
export interface SafetensorsPart {
  readonly from: number;
  readonly to: number;
}

/** An open file; `close` it, or declare it with `await using`. */
export interface Safetensors extends AsyncDisposable {
  readonly metadata: Readonly<Record<string, string>>;
  /** In the order of the file. */
  readonly tensors: ReadonlyMap<string, SafetensorsEntry>;
  /**
   * Reads one tensor: F16 widened to a Float32Array, BF16 as raw bits in a Uint16Array, any other dtype as its own typed array.
   * Throws FormatError for a name that is not in the file or a file that has become shorter.
   */
  read(name: string): Promise<SafetensorsArray>;
  /**
   * Reads one tensor in runs of at most 1 MiB, in order: `use(run, from)` gets elements `from`.. in an array that the next run overwrites,
   * F16 as raw bits like BF16.
   * @param part only these elements; `from` is counted from the first of them
   * Throws like `read`, or what `use` throws.
   */
  each(name: string, use: (run: SafetensorsArray, from: number) => void, part?: SafetensorsPart): Promise<void>;
  close(): Promise<void>;
}

const RUN = 1 << 20;

// The limit of the reference implementation: a length above it is not a header.
const MAX_HEADER = 100_000_000;

const dtypes = Object.keys(types) as SafetensorsDType[];

/**
 * Writes a safetensors file that replaces `path` only when complete. Tensors are ordered by element size, then name, so that each
 * lies aligned. Throws ShapeError or DTypeError where data and description differ, FormatError for a reserved or repeated name,
 * FileError `ERR_WRITE` where the disk refuses.
 */
export async function writeSafetensors(
  path: string,
  tensors: Iterable<SafetensorsInput>,
  metadata: Readonly<Record<string, string>> = {},
): Promise<void> {
  const sorted = [...tensors].sort(
    (a, b) => dtypes.indexOf(b.dtype) - dtypes.indexOf(a.dtype) || Buffer.compare(Buffer.from(a.name), Buffer.from(b.name)),
  );
  const start = makeHeader(path, sorted, metadata);
  await writeAtomic(path, async (file) => {
    await writeAll(file, start);
    for (const tensor of sorted) {
      const data = typeof tensor.data === 'function' ? await tensor.data() : tensor.data;
      let count = 0;
      for await (const piece of Symbol.asyncIterator in data ? data : [data]) {
        checkType(tensor, piece);
        count += piece.length;
        await writeAll(file, piece);
      }
      checkCount(tensor, count);
    }
  });
}

function makeHeader(path: string, tensors: readonly SafetensorsInput[], metadata: Readonly<Record<string, string>>): Buffer {
  // Text rather than an object: a name like "2" must keep its place, and "__proto__" is a name like any other.
  const entries: string[] = [];
  if (Object.keys(metadata).length > 0) entries.push(`"__metadata__":${JSON.stringify(metadata)}`);
  const seen = new Set(['__metadata__']);
  let offset = 0;
  for (const { name, dtype, shape } of tensors) {
    if (!dtypes.includes(dtype)) {
      throw new DTypeError(`writeSafetensors: tensor ${show(name)} has dtype ${show(dtype)}, which the format does not know`, {
        code: 'ERR_DTYPE',
        op: 'writeSafetensors',
        argument: name,
        expected: dtypes.join(', '),
        actual: String(dtype),
      });
    }
    if (seen.has(name)) {
      throw new FormatError(`writeSafetensors: the tensor name ${show(name)} is used twice or reserved`, {
        code: 'ERR_SAFETENSORS_NAME',
        op: 'writeSafetensors',
        argument: name,
      });
    }
    seen.add(name);
    const end = offset + countOf(name, shape) * types[dtype].BYTES_PER_ELEMENT;
    entries.push(`${JSON.stringify(name)}:${JSON.stringify({ dtype, shape, data_offsets: [offset, end] })}`);
    offset = end;
  }
  const text = Buffer.from(`{${entries.join(',')}}`);
  const length = Math.ceil(text.length / 8) * 8;
  if (length > MAX_HEADER) {
    throw new FormatError(`writeSafetensors: the header of ${path} would have ${length} bytes; the format allows ${MAX_HEADER}`, {
      code: 'ERR_SAFETENSORS_HEADER',
      op: 'writeSafetensors',
      argument: path,
      expected: `at most ${MAX_HEADER}`,
      actual: String(length),
    });
  }
  const start = Buffer.alloc(8 + length, ' ');
  start.writeBigUInt64LE(BigInt(length));
  text.copy(start, 8);
  return start;
}

function checkType({ name, dtype }: SafetensorsInput, data: SafetensorsArray): void {
  if (data instanceof types[dtype]) return;
  const actual = Object.prototype.toString.call(data).slice(8, -1);
  throw new DTypeError(`writeSafetensors: tensor ${show(name)} of dtype ${dtype} needs a ${types[dtype].name}, not ${actual}`, {
    code: 'ERR_DTYPE',
    op: 'writeSafetensors',
    argument: name,
    expected: types[dtype].name,
    actual,
  });
}

function checkCount({ name, shape }: SafetensorsInput, actual: number): void {
  const count = countOf(name, shape);
  if (actual === count) return;
  const message = `tensor ${show(name)} of shape [${shape.join(', ')}] needs ${count} values, its data has ${actual}`;
  throw new ShapeError(`writeSafetensors: ${message}`, {
    code: 'ERR_SHAPE',
    op: 'writeSafetensors',
    argument: name,
    expected: String(count),
    actual: String(actual),
  });
}

/** Bytes of a tensor that is to be written. @throws ShapeError */
export function sizeOf({ name, dtype, shape }: SafetensorsInput): number {
  return countOf(name, shape) * types[dtype].BYTES_PER_ELEMENT;
}

function countOf(name: string, shape: readonly number[]): number {
  const count = product(shape);
  if (count === undefined) {
    throw new ShapeError(`writeSafetensors: tensor ${show(name)} has the impossible shape [${shape.join(', ')}]`, {
      code: 'ERR_SHAPE',
      op: 'writeSafetensors',
      argument: name,
      expected: 'sizes that are whole numbers of at least 0',
      actual: `[${shape.join(', ')}]`,
    });
  }
  return count;
}

/** The number of elements, or undefined where a size is no size or the product is not exact. */
function product(shape: readonly unknown[]): number | undefined {
  let count = 1;
  for (const size of shape) {
    if (!Number.isSafeInteger(size) || (size as number) < 0) return undefined;
    count *= size as number;
  }
  return count <= Number.MAX_SAFE_INTEGER ? count : undefined;
}

/**
 * Opens a safetensors file and checks its header: everything that it says must be true of the file.
 * Throws FormatError (naming tensor and offset) for a file that is no safetensors file, is cut short, or lies; FileError `ERR_READ`
 * where it cannot be read.
 */
export async function openSafetensors(path: string): Promise<Safetensors> {
  let file: FileHandle | undefined;
  try {
    file = await open(path, 'r');
    return await readHeader(path, file);
  } catch (error) {
    await file?.close();
    throw LimbeckError.is(error) ? error : readError('openSafetensors', path, error);
  }
}

async function readHeader(path: string, file: FileHandle): Promise<Safetensors> {
  const info = await file.stat();
  if (!info.isFile()) throw refuse(path, 'it is not a file', 'HEADER');
  const size = info.size;
  const prefix = Buffer.alloc(8);
  if ((await readAll(file, prefix, 0)) < 8) throw refuse(path, `it has ${size} bytes; a header needs 8`, 'TRUNCATED');
  const length = Number(prefix.readBigUInt64LE());
  if (length > MAX_HEADER) {
    throw refuse(path, `its first 8 bytes promise a header of ${length} bytes; the format allows ${MAX_HEADER}`, 'HEADER');
  }
  if (8 + length > size) {
    throw refuse(path, `it ends at byte ${size}, inside a header that should end at byte ${8 + length}`, 'TRUNCATED');
  }
  const bytes = Buffer.alloc(length);
  if ((await readAll(file, bytes, 8)) < length) throw refuse(path, 'it became shorter while it was read', 'TRUNCATED');

  const { metadata, tensors } = parseSafetensors(path, bytes, size);
  const entryOf = (name: string): SafetensorsEntry => {
    const entry = tensors.get(name);
    if (entry === undefined) throw refuse(path, `it has no tensor ${show(name)}`, 'NAME', { argument: name });
    return entry;
  };
  let spare: ArrayBuffer | undefined;
  return {
    metadata,
    tensors,
    async read(name) {
      const { dtype, bytes } = entryOf(name);
      const data = new types[dtype](bytes / types[dtype].BYTES_PER_ELEMENT);
      await readElements(path, file, name, entryOf(name), data, 0);
      return dtype === 'F16' ? widen(data as Uint16Array) : data;
    },
    async each(name, use, part) {
      const entry = entryOf(name);
      const buffer = spare ?? new ArrayBuffer(RUN);
      spare = undefined;
      const type = types[entry.dtype];
      const size = type.BYTES_PER_ELEMENT;
      const { from, to } = part ?? { from: 0, to: entry.bytes / size };
      for (let at = from * size; at < to * size; at += RUN) {
        const run = new type(buffer, 0, Math.min(RUN, to * size - at) / size);
        await readElements(path, file, name, entry, run, at);
        use(run, at / size - from);
      }
      spare = buffer;
    },
    close: () => file.close(),
    [Symbol.asyncDispose]: () => file.close(),
  };
}

/**
 * Reads a header, its length left out, of a file of `size` bytes: everything that it says must be true of the file.
 * @param path for errors
 * @throws FormatError
 */
export function parseSafetensors(path: string, bytes: Buffer, size: number): Pick<Safetensors, 'metadata' | 'tensors'> {
  let text: string;
  let header: unknown;
  try {
    text = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes);
    header = JSON.parse(text);
  } catch (error) {
    throw refuse(path, 'its header is not JSON in UTF-8', 'HEADER', { cause: error });
  }
  if (!isObject(header)) throw refuse(path, 'its header is not a JSON object', 'HEADER');
  const twice = repeatedKey(text);
  if (twice !== undefined) throw refuse(path, `its header has the name ${show(twice)} twice`, 'NAME', { argument: twice });

  let metadata: Record<string, string> = {};
  const start = 8 + bytes.length;
  const found: [string, SafetensorsEntry][] = [];
  for (const [name, value] of Object.entries(header)) {
    if (name === '__metadata__') {
      if (!isObject(value) || !Object.values(value).every((item) => typeof item === 'string')) {
        throw refuse(path, '__metadata__ is not an object of strings', 'HEADER', { argument: name });
      }
      metadata = value as Record<string, string>;
    } else {
      found.push([name, parseEntry(path, name, value, start)]);
    }
  }

  // In the order of the file each tensor begins where the one before it ends, and the last one ends the file.
  found.sort(([, a], [, b]) => a.offset - b.offset || a.bytes - b.bytes);
  let at = start;
  for (const [name, { offset, bytes: count }] of found) {
    const where = { argument: name, expected: String(at), actual: String(offset) };
    if (offset + count > size) {
      const message = `tensor ${show(name)} ends at byte ${offset + count}, the file at byte ${size}`;
      throw refuse(path, message, 'TRUNCATED', { argument: name, expected: String(offset + count), actual: String(size) });
    }
    if (offset < at) throw refuse(path, `tensor ${show(name)} begins at byte ${offset}, inside another one`, 'OFFSET', where);
    if (offset > at) throw refuse(path, `tensor ${show(name)} begins at byte ${offset}, after a gap from ${at}`, 'OFFSET', where);
    at = offset + count;
  }
  if (at !== size) {
    const message = `its tensors end at byte ${at}, the file at byte ${size}`;
    throw refuse(path, message, 'OFFSET', { expected: String(at), actual: String(size) });
  }
  return { metadata, tensors: new Map(found) };
}

function parseEntry(path: string, name: string, value: unknown, start: number): SafetensorsEntry {
  const bad = (what: string): FormatError => refuse(path, `tensor ${show(name)} ${what}`, 'TENSOR', { argument: name });
  if (!isObject(value)) throw bad('is not described by an object');
  const { dtype: type, shape, data_offsets: offsets } = value;
  const dtype = dtypes.find((known) => known === type);
  if (dtype === undefined) throw bad(`has the unknown dtype ${show(type)}`);
  const count = Array.isArray(shape) ? product(shape) : undefined;
  if (count === undefined) throw bad(`has the impossible shape ${show(shape)}`);
  const [begin, end] = Array.isArray(offsets) && offsets.length === 2 ? offsets : [];
  if (!Number.isSafeInteger(begin) || !Number.isSafeInteger(end) || begin < 0 || end < begin) {
    throw bad(`has the impossible offsets ${show(offsets)}`);
  }
  const bytes = end - begin;
  if (bytes !== count * types[dtype].BYTES_PER_ELEMENT) {
    throw bad(`of shape ${show(shape)} and dtype ${dtype} claims ${bytes} bytes at offset ${begin}`);
  }
  return { dtype, shape: shape as number[], offset: start + begin, bytes };
}

/** The first key that an object of valid JSON has twice; `JSON.parse` silently keeps the last. */
function repeatedKey(text: string): string | undefined {
  const open: Set<string>[] = [];
  let key = '';
  for (let i = 0; i < text.length; i++) {
    const char = text[i];
    if (char === '"') {
      const from = i++;
      while (text[i] !== '"') i += text[i] === '\\' ? 2 : 1;
      key = text.slice(from, i + 1);
    } else if (char === '{') {
      open.push(new Set());
    } else if (char === '}') {
      open.pop();
    } else if (char === ':') {
      const name: string = JSON.parse(key);
      const keys = open.at(-1)!;
      if (keys.has(name)) return name;
      keys.add(name);
    }
  }
  return undefined;
}

/** Fills `data` with a tensor's elements from its byte `from` on. */
async function readElements(
  path: string,
  file: FileHandle,
  name: string,
  entry: SafetensorsEntry,
  data: SafetensorsArray,
  from: number,
): Promise<void> {
  const at = entry.offset + from;
  let got: number;
  try {
    got = await readAll(file, data, at);
  } catch (error) {
    throw readError('openSafetensors', path, error);
  }
  if (got < data.byteLength) {
    const message = `it became shorter: tensor ${show(name)} ends at byte ${entry.offset + entry.bytes}, the file at byte ${at + got}`;
    throw refuse(path, message, 'TRUNCATED', { argument: name });
  }
}

/** The float32 values of float16 bits. */
function widen(data: Uint16Array): Float32Array {
  const values = halfValues();
  return Float32Array.from(data, (bits) => values[bits]!);
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

/** A value of the header for an error text: short, whatever a hostile file put there. */
function show(value: unknown): string {
  let text: string;
  try {
    text = JSON.stringify(value) ?? String(value);
  } catch {
    text = 'that cannot be shown';
  }
  return text.length > 200 ? `${text.slice(0, 200)}...` : text;
}

function refuse(
  path: string,
  what: string,
  code: string,
  data: { argument?: string; expected?: string; actual?: string; cause?: unknown } = {},
): FormatError {
  const full = { op: 'openSafetensors', argument: path, ...data, code: `ERR_SAFETENSORS_${code}` };
  return new FormatError(`openSafetensors: ${path} cannot be used: ${what}`, full);
}
