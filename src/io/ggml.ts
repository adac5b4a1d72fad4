// How ggml packs weights: each type is blocks of a fixed number of values with their scales (ggml-common.h of llama.cpp).

import { DataError } from '../tensor/errors.ts';
import { pack, unpack } from '../tensor/ggml.ts';

/** A type of weights. */
export interface GgmlType {
  /** Its number in files. */
  readonly id: number;
  /** Values in a block; a row of a tensor is whole blocks. */
  readonly values: number;
  /** Bytes of a block. */
  readonly bytes: number;
  readonly readable: boolean;
  /** The largest value that can be written, NaN for any; absent for a type that is not written here. */
  readonly limit?: number;
}

const type = (id: number, values: number, bytes: number): GgmlType => ({ id, values, bytes, readable: false });
const read = (id: number, values: number, bytes: number): GgmlType => ({ id, values, bytes, readable: true });
const both = (id: number, values: number, bytes: number, limit: number): GgmlType => ({
  id,
  values,
  bytes,
  readable: true,
  limit,
});

// The least float32 that float16 rounds to infinity is no weight; scales are float16 too, at the least a sixteenth of a value.
const half = 65_519.996;
const scaled = 1e6;

/** Every type that a file may have, so that a file with one that cannot be read still opens. */
export const ggmlTypes = {
  F32: both(0, 1, 4, Number.NaN),
  F16: both(1, 1, 2, half),
  Q4_0: read(2, 32, 18),
  Q4_1: read(3, 32, 20),
  Q5_0: both(6, 32, 22, scaled),
  Q5_1: read(7, 32, 24),
  Q8_0: both(8, 32, 34, scaled),
  Q8_1: type(9, 32, 36),
  Q2_K: read(10, 256, 84),
  Q3_K: read(11, 256, 110),
  Q4_K: both(12, 256, 144, scaled),
  Q5_K: both(13, 256, 176, scaled),
  Q6_K: both(14, 256, 210, scaled),
  Q8_K: type(15, 256, 292),
  IQ2_XXS: type(16, 256, 66),
  IQ2_XS: type(17, 256, 74),
  IQ3_XXS: type(18, 256, 98),
  IQ1_S: type(19, 256, 50),
  IQ4_NL: type(20, 32, 18),
  IQ3_S: type(21, 256, 110),
  IQ2_S: type(22, 256, 82),
  IQ4_XS: type(23, 256, 136),
  I8: type(24, 1, 1),
  I16: type(25, 1, 2),
  I32: type(26, 1, 4),
  I64: type(27, 1, 8),
  F64: type(28, 1, 8),
  IQ1_M: type(29, 256, 56),
  BF16: both(30, 1, 2, Number.NaN),
  TQ1_0: type(34, 256, 54),
  TQ2_0: type(35, 256, 66),
  MXFP4: type(39, 32, 17),
  NVFP4: type(40, 64, 36),
  Q1_0: type(41, 128, 18),
} as const satisfies Record<string, GgmlType>;

/** A type as llama.cpp spells it. */
export type GgmlTypeName = keyof typeof ggmlTypes;

/** Types by their number. */
export const ggmlTypeNames: ReadonlyMap<number, GgmlTypeName> = new Map(
  Object.entries(ggmlTypes).map(([name, { id }]) => [id, name as GgmlTypeName]),
);

/** Names of the types that can be read. */
export const readableTypes: readonly GgmlTypeName[] = [...ggmlTypeNames.values()].filter((name) => ggmlTypes[name].readable);

// Values that one thread packs or unpacks at a time: of a run, enough for several threads.
const PIECE = 1 << 16;

/** Calls `work` for pieces of whole blocks, all at once. */
async function inPieces(name: GgmlTypeName, blocks: number, work: (from: number, to: number) => Promise<void>): Promise<void> {
  const step = PIECE / ggmlTypes[name].values;
  const jobs: Promise<void>[] = [];
  for (let from = 0; from < blocks; from += step) jobs.push(work(from, Math.min(blocks, from + step)));
  // All of them, also where one fails: they work on the arrays.
  for (const job of await Promise.allSettled(jobs)) if (job.status === 'rejected') throw job.reason;
}

/**
 * Packs whole blocks, on several threads.
 * @throws DataError for a value that is not finite, or too large for the type.
 */
export async function encodeBlocks(name: GgmlTypeName, from: Float32Array): Promise<Uint8Array> {
  const { values, bytes, limit } = ggmlTypes[name] as GgmlType;
  if (name === 'F32') return new Uint8Array(from.buffer, from.byteOffset, from.byteLength);
  const blocks = from.length / values;
  const to = new Uint8Array(blocks * bytes);
  await inPieces(name, blocks, async (first, end) => {
    const part = from.subarray(first * values, end * values);
    const unfit = await pack(name.toLowerCase(), part, to.subarray(first * bytes, end * bytes), limit!);
    if (unfit >= 0) throw refusal(name, part[unfit]!, limit!);
  });
  return to;
}

/** Unpacks whole blocks, on several threads. */
export async function decodeBlocks(name: GgmlTypeName, from: Uint8Array, to: Float32Array): Promise<void> {
  const { values, bytes } = ggmlTypes[name];
  if (name === 'F32') return new Uint8Array(to.buffer, to.byteOffset, to.byteLength).set(from);
  await inPieces(name, from.length / bytes, (first, end) =>
    unpack(name.toLowerCase(), from.subarray(first * bytes, end * bytes), to.subarray(first * values, end * values)),
  );
}

function refusal(name: string, value: number, limit: number): DataError {
  const expected = `at most ${name === 'F16' ? 65_504 : limit} in size`;
  const advice = Number.isFinite(value) ? 'choose BF16 or F32' : 'the model is damaged';
  return new DataError(`gguf: a weight is ${value}; values of ${name} must be ${expected}: ${advice}`, {
    code: 'ERR_GGUF_VALUE',
    op: 'gguf',
    expected,
    actual: String(value),
  });
}
