// The header of a GGUF file, versions 2 and 3, little-endian: counts, typed metadata, descriptions of the tensors (docs/gguf.md of ggml).

import { isUtf8 } from 'node:buffer';
import { FormatError, ShapeError } from '../tensor/errors.ts';
import { type GgmlTypeName, ggmlTypeNames, ggmlTypes } from './ggml.ts';

// In the order of their numbers in a file; `array` is number 9.
const kinds = ['u8', 'i8', 'u16', 'i16', 'u32', 'i32', 'f32', 'bool', 'string', 'array', 'u64', 'i64', 'f64'] as const;
const kindBytes = { u8: 1, i8: 1, u16: 2, i16: 2, u32: 4, i32: 4, f32: 4, bool: 1, u64: 8, i64: 8, f64: 8 } as const;
const arrays = {
  u8: Uint8Array,
  i8: Int8Array,
  u16: Uint16Array,
  i16: Int16Array,
  u32: Uint32Array,
  i32: Int32Array,
  f32: Float32Array,
  bool: Uint8Array,
  u64: BigUint64Array,
  i64: BigInt64Array,
  f64: Float64Array,
} as const;

type NumberKind = 'u8' | 'i8' | 'u16' | 'i16' | 'u32' | 'i32' | 'f32' | 'f64';
type WideKind = 'u64' | 'i64';

/** A value of the metadata, with its type in the file. An array of bools holds 0 and 1. */
export type GgufValue =
  | { readonly type: NumberKind; readonly value: number }
  | { readonly type: WideKind; readonly value: bigint }
  | { readonly type: 'bool'; readonly value: boolean }
  | { readonly type: 'string'; readonly value: string }
  | { readonly type: 'array'; readonly of: 'string'; readonly value: readonly string[] }
  | {
      readonly type: 'array';
      readonly of: NumberKind | WideKind | 'bool';
      readonly value: InstanceType<(typeof arrays)[keyof typeof arrays]>;
    };

/** Metadata by key, in the order of the file. */
export type GgufMetadata = ReadonlyMap<string, GgufValue>;

/** Where a tensor lies: `bytes` bytes from byte `offset` of the file. */
export interface GgufEntry {
  readonly type: GgmlTypeName;
  /** Rows before columns, the reverse of the order in the file. */
  readonly shape: readonly number[];
  readonly offset: number;
  readonly bytes: number;
}

/** What a file says of itself. */
export interface GgufHeader {
  readonly version: number;
  readonly metadata: GgufMetadata;
  /** In the order of the file. */
  readonly tensors: ReadonlyMap<string, GgufEntry>;
}

/** A tensor to write. */
export interface GgufInput {
  readonly name: string;
  readonly type: GgmlTypeName;
  /** Rows before columns. A row must be whole blocks of the type. */
  readonly shape: readonly number[];
  /** Gives the values in order, in runs of whole blocks: float32 to be packed, or bytes of the type. Called when its turn comes. */
  readonly data: () => Iterable<Float32Array | Uint8Array> | AsyncIterable<Float32Array | Uint8Array>;
}

const MAGIC = 0x46554747; // "GGUF"
const MAX_DIMS = 4;

/** Tensors begin at multiples of so many bytes, where a file says nothing else. */
export const ALIGNMENT = 32;

export const alignUp = (n: number, to: number): number => Math.ceil(n / to) * to;

/** Thrown where the header goes on after the bytes that were given. */
const MORE = Symbol('more');

/**
 * Reads a header from the first bytes of a file of `size` bytes; undefined where it needs more of them.
 * No count or length of the file is believed before the rest of the file has room for what it counts.
 * @param path for errors
 * @throws FormatError
 */
export function parseGguf(path: string, bytes: Buffer, size: number): GgufHeader | undefined {
  try {
    return parseHeader(path, bytes, size);
  } catch (error) {
    if (error === MORE) return undefined;
    throw error;
  }
}

function parseHeader(path: string, bytes: Buffer, size: number): GgufHeader {
  let at = 0;
  /** Moves over `count` bytes and returns where they begin. */
  const take = (count: number, what: string): number => {
    const from = at;
    if (from + count > size) throw refuse(path, `it ends at byte ${size}, inside ${what} at byte ${from}`, 'TRUNCATED');
    if (from + count > bytes.length) throw MORE;
    at = from + count;
    return from;
  };
  const u32 = (what: string): number => bytes.readUInt32LE(take(4, what));
  /** A count or length: things of at least `least` bytes each must fit into what is left of the file. */
  const count = (what: string, least: number): number => {
    const from = take(8, what);
    const n = bytes.readUInt32LE(from) + bytes.readUInt32LE(from + 4) * 2 ** 32;
    if (n * least > size - at) {
      const message = `${what} at byte ${from} is ${n}, for which the ${size - at} bytes that follow have no room`;
      throw refuse(path, message, 'COUNT', { expected: `at most ${Math.floor((size - at) / least)}`, actual: String(n) });
    }
    return n;
  };
  const string = (what: string): string => {
    const length = count(`the length of ${what}`, 1);
    const from = take(length, what);
    const part = bytes.subarray(from, from + length);
    if (!isUtf8(part)) throw refuse(path, `${what} at byte ${from} is not UTF-8`, 'STRING');
    return part.toString('utf8');
  };
  const kind = (what: string): (typeof kinds)[number] => {
    const number = u32(`the type of ${what}`);
    const found = kinds[number];
    if (found === undefined) {
      throw refuse(path, `${what} has the unknown type ${number} at byte ${at - 4}`, 'TYPE', { actual: String(number) });
    }
    return found;
  };
  const value = (what: string): GgufValue => {
    const type = kind(what);
    if (type === 'string') return { type, value: string(what) };
    if (type === 'array') {
      const of = kind(`the elements of ${what}`);
      if (of === 'array')
        throw refuse(path, `${what} at byte ${at} is an array of arrays, which llama.cpp has not either`, 'TYPE');
      if (of === 'string') {
        const n = count(`the number of elements of ${what}`, 8);
        const list: string[] = [];
        for (let i = 0; i < n; i++) list.push(string(`${what}[${i}]`));
        return { type, of, value: list };
      }
      const n = count(`the number of elements of ${what}`, kindBytes[of]);
      const from = take(n * kindBytes[of], what);
      // Copied, since a typed array must begin at a multiple of its element's size.
      const own = new arrays[of](n);
      new Uint8Array(own.buffer).set(bytes.subarray(from, at));
      if (of === 'bool' && own.some((bit) => (bit as number) > 1))
        throw refuse(path, `${what} has a bool that is neither 0 nor 1`, 'VALUE');
      return { type, of, value: own };
    }
    const from = take(kindBytes[type], what);
    switch (type) {
      case 'u8':
        return { type, value: bytes.readUInt8(from) };
      case 'i8':
        return { type, value: bytes.readInt8(from) };
      case 'u16':
        return { type, value: bytes.readUInt16LE(from) };
      case 'i16':
        return { type, value: bytes.readInt16LE(from) };
      case 'u32':
        return { type, value: bytes.readUInt32LE(from) };
      case 'i32':
        return { type, value: bytes.readInt32LE(from) };
      case 'f32':
        return { type, value: bytes.readFloatLE(from) };
      case 'f64':
        return { type, value: bytes.readDoubleLE(from) };
      case 'u64':
        return { type, value: bytes.readBigUInt64LE(from) };
      case 'i64':
        return { type, value: bytes.readBigInt64LE(from) };
      case 'bool': {
        const bit = bytes.readUInt8(from);
        if (bit > 1) throw refuse(path, `${what} at byte ${from} is ${bit}, which is no bool`, 'VALUE');
        return { type, value: bit === 1 };
      }
      default:
        throw type satisfies never;
    }
  };

  if (u32('the magic number') !== MAGIC) throw refuse(path, 'its first four bytes are not "GGUF"', 'HEADER');
  const version = u32('the version');
  if (version !== 2 && version !== 3) {
    const swapped = version === 0x02000000 || version === 0x03000000;
    throw refuse(path, swapped ? 'it is big-endian' : `it has version ${version}; known are 2 and 3`, 'VERSION', {
      expected: '2 or 3, little-endian',
      actual: String(version),
    });
  }
  // The shortest tensor has a name, no dims, a type and an offset; the shortest value a key, a type and a byte.
  const tensorCount = count('the number of tensors', 24);
  const valueCount = count('the number of metadata values', 13);

  const metadata = new Map<string, GgufValue>();
  for (let i = 0; i < valueCount; i++) {
    const key = string(`key ${i} of the metadata`);
    if (metadata.has(key)) throw refuse(path, `its metadata has the key ${show(key)} twice`, 'NAME', { argument: key });
    metadata.set(key, value(`the value of ${show(key)}`));
  }
  const alignment = alignmentOf(path, metadata);

  const found: [string, GgufEntry][] = [];
  const names = new Set<string>();
  for (let i = 0; i < tensorCount; i++) {
    const name = string(`the name of tensor ${i}`);
    if (names.has(name)) throw refuse(path, `the tensor name ${show(name)} is used twice`, 'NAME', { argument: name });
    names.add(name);
    const what = `tensor ${show(name)}`;
    const bad = (problem: string, code = 'TENSOR'): FormatError => refuse(path, `${what} ${problem}`, code, { argument: name });
    const dims = u32(`the dims of ${what}`);
    if (dims > MAX_DIMS) throw bad(`has ${dims} dims; the format allows ${MAX_DIMS}`);
    const shape: number[] = [];
    let elements = 1;
    for (let d = 0; d < dims; d++) {
      const from = take(8, `a size of ${what}`);
      const length = bytes.readUInt32LE(from) + bytes.readUInt32LE(from + 4) * 2 ** 32;
      elements *= length;
      shape.unshift(length);
    }
    if (!Number.isSafeInteger(elements) || !shape.every(Number.isSafeInteger))
      throw bad(`has the impossible shape [${shape.join(', ')}]`);
    const number = u32(`the type of ${what}`);
    const type = ggmlTypeNames.get(number);
    if (type === undefined) throw bad(`has the unknown type ${number}`, 'TYPE');
    const { values, bytes: blockBytes } = ggmlTypes[type];
    const row = shape.at(-1) ?? 1;
    if (row % values !== 0) throw bad(`has rows of ${row} values; ${type} packs blocks of ${values}`);
    const offsetAt = take(8, `the offset of ${what}`);
    const offset = bytes.readUInt32LE(offsetAt) + bytes.readUInt32LE(offsetAt + 4) * 2 ** 32;
    if (offset % alignment !== 0)
      throw bad(`lies at offset ${offset}, which is no multiple of the alignment ${alignment}`, 'OFFSET');
    found.push([name, { type, shape, offset, bytes: (elements / values) * blockBytes }]);
  }

  const start = alignUp(at, alignment);
  const tensors = new Map(found.map(([name, entry]) => [name, { ...entry, offset: start + entry.offset }]));
  checkPlaces(path, tensors, size);
  return { version, metadata, tensors };
}

function alignmentOf(path: string, metadata: GgufMetadata): number {
  const entry = metadata.get('general.alignment');
  if (entry === undefined) return ALIGNMENT;
  const { type, value } = entry;
  if (type !== 'u32' || value < 1 || !Number.isInteger(Math.log2(value))) {
    throw refuse(path, `general.alignment is ${show(value)} of type ${type}; it should be a power of two of type u32`, 'VALUE', {
      argument: 'general.alignment',
    });
  }
  return value;
}

function checkPlaces(path: string, tensors: ReadonlyMap<string, GgufEntry>, size: number): void {
  const sorted = [...tensors].sort(([, a], [, b]) => a.offset - b.offset || a.bytes - b.bytes);
  let end = 0;
  let before = '';
  for (const [name, { offset, bytes }] of sorted) {
    if (offset + bytes > size) {
      const message = `tensor ${show(name)} ends at byte ${offset + bytes}, the file at byte ${size}`;
      throw refuse(path, message, 'TRUNCATED', { argument: name, expected: String(offset + bytes), actual: String(size) });
    }
    if (offset < end) {
      const message = `tensor ${show(name)} begins at byte ${offset}, inside ${show(before)}, which ends at ${end}`;
      throw refuse(path, message, 'OFFSET', { argument: name, expected: `at least ${end}`, actual: String(offset) });
    }
    end = offset + bytes;
    before = name;
  }
}

/** Where each tensor lies after the header. */
export function placesOf(
  metadata: readonly (readonly [string, GgufValue])[],
  tensors: readonly GgufInput[],
): { offset: number; bytes: number }[] {
  const seen = new Set<string>();
  for (const name of [...metadata.map(([key]) => key), ...tensors.map((tensor) => `tensor ${tensor.name}`)]) {
    if (seen.has(name)) {
      throw new FormatError(`writeGguf: ${show(name)} is there twice`, {
        code: 'ERR_GGUF_NAME',
        op: 'writeGguf',
        argument: name,
      });
    }
    seen.add(name);
  }
  let offset = 0;
  return tensors.map((tensor) => {
    const { values, bytes: blockBytes } = ggmlTypes[tensor.type];
    const row = tensor.shape.at(-1) ?? 1;
    const elements = tensor.shape.reduce((a, b) => a * b, 1);
    if (
      tensor.shape.length > MAX_DIMS ||
      !tensor.shape.every((n) => Number.isInteger(n) && n >= 0) ||
      !Number.isSafeInteger(elements)
    ) {
      throw shapeError(tensor, 'has a shape that the format does not know');
    }
    if (row % values !== 0) throw shapeError(tensor, `has rows of ${row} values; ${tensor.type} packs blocks of ${values}`);
    const place = { offset, bytes: (elements / values) * blockBytes };
    offset = alignUp(offset + place.bytes, ALIGNMENT);
    return place;
  });
}

export function headerBytes(
  metadata: readonly (readonly [string, GgufValue])[],
  tensors: readonly GgufInput[],
  places: readonly { readonly offset: number }[],
): Buffer {
  const parts: Buffer[] = [];
  const number = (kind: keyof typeof arrays, value: number | bigint): void => {
    const array = kind === 'u64' || kind === 'i64' ? new arrays[kind]([BigInt(value)]) : new arrays[kind]([Number(value)]);
    parts.push(Buffer.from(array.buffer));
  };
  const string = (text: string): void => {
    const bytes = Buffer.from(text);
    number('u64', bytes.length);
    parts.push(bytes);
  };
  const kind = (name: (typeof kinds)[number]): void => number('u32', kinds.indexOf(name));

  number('u32', MAGIC);
  number('u32', 3);
  number('u64', tensors.length);
  number('u64', metadata.length);
  for (const [key, entry] of metadata) {
    string(key);
    kind(entry.type);
    if (entry.type === 'array') {
      kind(entry.of);
      number('u64', entry.value.length);
      if (entry.of === 'string') for (const text of entry.value) string(text);
      else parts.push(Buffer.from(entry.value.buffer, entry.value.byteOffset, entry.value.byteLength));
    } else if (entry.type === 'string') string(entry.value);
    else number(entry.type, entry.type === 'bool' ? Number(entry.value) : entry.value);
  }
  for (const [i, { name, type, shape }] of tensors.entries()) {
    string(name);
    number('u32', shape.length);
    for (const size of [...shape].reverse()) number('u64', size);
    number('u32', ggmlTypes[type].id);
    number('u64', places[i]!.offset);
  }
  const header = Buffer.concat(parts);
  return Buffer.concat([header, Buffer.alloc(alignUp(header.length, ALIGNMENT) - header.length)]);
}

/** @internal */
export function shapeError({ name, shape }: GgufInput, problem: string): ShapeError {
  return new ShapeError(`writeGguf: tensor ${show(name)} of shape [${shape.join(', ')}] ${problem}`, {
    code: 'ERR_SHAPE',
    op: 'writeGguf',
    argument: name,
  });
}

/** A value of the file for an error text: short, whatever a hostile file put there. */
export function show(value: unknown): string {
  const text = typeof value === 'string' ? JSON.stringify(value) : String(value);
  return text.length > 200 ? `${text.slice(0, 200)}...` : text;
}

/** @internal */
export function refuse(
  path: string,
  what: string,
  code: string,
  data: { argument?: string; expected?: string; actual?: string } = {},
): FormatError {
  const full = { op: 'openGguf', argument: path, ...data, code: `ERR_GGUF_${code}` };
  return new FormatError(`openGguf: ${path} cannot be used: ${what}`, full);
}
