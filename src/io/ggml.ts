// How ggml packs weights: each type is blocks of a fixed number of values with their scales (ggml-common.h of llama.cpp).
//   d scale, m minimum, q the integers

import { DataError } from '../tensor/errors.ts';
import { half, halfValues, putHalf, toHalf } from './half.ts';
import { decodeQ2_K, decodeQ3_K, decodeQ4_K, decodeQ5_K, decodeQ6_K, encodeQ4_K, encodeQ6_K } from './kquants.ts';

/** Packs and unpacks whole blocks. */
export interface GgmlType {
  /** Its number in files. */
  readonly id: number;
  /** Values in a block; a row of a tensor is whole blocks. */
  readonly values: number;
  /** Bytes of a block. */
  readonly bytes: number;
  /** The float32 values of blocks; absent for a type that cannot be read. */
  readonly decode?: (from: Uint8Array, to: Float32Array) => void;
  /** Blocks of finite float32 values; absent for a type that is not written here. */
  readonly encode?: (from: Float32Array, to: Uint8Array) => void;
}

const type = (id: number, values: number, bytes: number, decode?: GgmlType['decode'], encode?: GgmlType['encode']): GgmlType => ({
  id,
  values,
  bytes,
  ...(decode && { decode }),
  ...(encode && { encode }),
});

/** Every type that a file may have, so that a file with one that cannot be read still opens. */
export const ggmlTypes = {
  F32: type(0, 1, 4, decodeF32, encodeF32),
  F16: type(1, 1, 2, decodeF16, encodeF16),
  Q4_0: type(2, 32, 18, decodeQ4_0),
  Q4_1: type(3, 32, 20, decodeQ4_1),
  Q5_0: type(6, 32, 22, decodeQ5_0, encodeQ5_0),
  Q5_1: type(7, 32, 24, decodeQ5_1),
  Q8_0: type(8, 32, 34, decodeQ8_0, encodeQ8_0),
  Q8_1: type(9, 32, 36),
  Q2_K: type(10, 256, 84, decodeQ2_K),
  Q3_K: type(11, 256, 110, decodeQ3_K),
  Q4_K: type(12, 256, 144, decodeQ4_K, encodeQ4_K),
  Q5_K: type(13, 256, 176, decodeQ5_K),
  Q6_K: type(14, 256, 210, decodeQ6_K, encodeQ6_K),
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
  BF16: type(30, 1, 2, decodeBF16, encodeBF16),
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

/**
 * Packs whole blocks.
 * @throws DataError for a value that is not finite, or too large for the type.
 */
export function encodeBlocks(name: GgmlTypeName, from: Float32Array): Uint8Array {
  const { values, bytes, encode } = ggmlTypes[name] as GgmlType;
  // F32 and BF16 keep what they are given; elsewhere a value that is not finite would spoil its block, or come back as another.
  if (name !== 'F32' && name !== 'BF16') {
    const bits = new Int32Array(from.buffer, from.byteOffset, from.length);
    const limit = name === 'F16' ? 0x477fefff : 0x7f7fffff;
    for (let i = 0; i < bits.length; i++) if ((bits[i]! & 0x7fffffff) > limit) throw unfit(name, from[i]!);
  }
  const to = new Uint8Array((from.length / values) * bytes);
  encode!(from, to);
  return to;
}

function unfit(name: string, value: number): DataError {
  const expected = name === 'F16' ? 'at most 65504 in size' : 'finite';
  const advice = Number.isFinite(value) ? 'choose BF16 or F32' : 'the model is damaged';
  return new DataError(`gguf: a weight is ${value}; values of ${name} must be ${expected}: ${advice}`, {
    code: 'ERR_GGUF_VALUE',
    op: 'gguf',
    expected,
    actual: String(value),
  });
}

function decodeF32(from: Uint8Array, to: Float32Array): void {
  new Uint8Array(to.buffer, to.byteOffset, to.byteLength).set(from);
}

function encodeF32(from: Float32Array, to: Uint8Array): void {
  to.set(new Uint8Array(from.buffer, from.byteOffset, from.byteLength));
}

function decodeF16(from: Uint8Array, to: Float32Array): void {
  const table = halfValues();
  for (let i = 0; i < to.length; i++) to[i] = table[from[2 * i]! | (from[2 * i + 1]! << 8)]!;
}

function encodeF16(from: Float32Array, to: Uint8Array): void {
  const bits = new Uint16Array(to.buffer, to.byteOffset, from.length);
  const wide = new Int32Array(from.buffer, from.byteOffset, from.length);
  for (let i = 0; i < wide.length; i++) bits[i] = toHalf(wide[i]!);
}

function decodeBF16(from: Uint8Array, to: Float32Array): void {
  const bits = new Uint32Array(to.buffer, to.byteOffset, to.length);
  for (let i = 0; i < bits.length; i++) bits[i] = (from[2 * i]! << 16) | (from[2 * i + 1]! << 24);
}

function encodeBF16(from: Float32Array, to: Uint8Array): void {
  const wide = new Int32Array(from.buffer, from.byteOffset, from.length);
  const bits = new Uint16Array(to.buffer, to.byteOffset, from.length);
  for (let i = 0; i < wide.length; i++) {
    const w = wide[i]!;
    // A NaN stays one, though only its low bits say so.
    bits[i] = (w & 0x7fffffff) > 0x7f800000 ? (w >>> 16) | 64 : (w + 0x7fff + ((w >>> 16) & 1)) >>> 16;
  }
}

function decodeQ8_0(from: Uint8Array, to: Float32Array): void {
  const table = halfValues();
  for (let at = 0, i = 0; i < to.length; at += 34) {
    const d = half(table, from, at);
    for (let j = at + 2; j < at + 34; j++) to[i++] = d * ((from[j]! << 24) >> 24);
  }
}

// In float32 at every step, as the reference, so that the bytes are the same.
function encodeQ8_0(from: Float32Array, to: Uint8Array): void {
  const signed = new Int8Array(to.buffer, to.byteOffset, to.length);
  for (let at = 0, i = 0; i < from.length; at += 34, i += 32) {
    let most = 0;
    for (let j = 0; j < 32; j++) {
      const v = Math.abs(from[i + j]!);
      most = Math.max(v, most);
    }
    const d = Math.fround(most / 127);
    const inverse = d === 0 ? 0 : Math.fround(1 / d);
    putHalf(to, at, d);
    for (let j = 0; j < 32; j++) {
      // The array cuts off the fraction: halves go away from zero.
      const v = Math.fround(from[i + j]! * inverse);
      signed[at + 2 + j] = v < 0 ? v - 0.5 : v + 0.5;
    }
  }
}

function decodeQ4_0(from: Uint8Array, to: Float32Array): void {
  const table = halfValues();
  for (let at = 0, i = 0; i < to.length; at += 18, i += 32) {
    const d = half(table, from, at);
    for (let j = 0; j < 16; j++) {
      const q = from[at + 2 + j]!;
      to[i + j] = d * ((q & 15) - 8);
      to[i + j + 16] = d * ((q >> 4) - 8);
    }
  }
}

function decodeQ4_1(from: Uint8Array, to: Float32Array): void {
  const table = halfValues();
  for (let at = 0, i = 0; i < to.length; at += 20, i += 32) {
    const d = half(table, from, at);
    const m = half(table, from, at + 2);
    for (let j = 0; j < 16; j++) {
      const q = from[at + 4 + j]!;
      to[i + j] = d * (q & 15) + m;
      to[i + j + 16] = d * (q >> 4) + m;
    }
  }
}

/** The fifth bits of 32 values. */
const word = (from: Uint8Array, at: number): number =>
  from[at]! | (from[at + 1]! << 8) | (from[at + 2]! << 16) | (from[at + 3]! << 24);

function decodeQ5_0(from: Uint8Array, to: Float32Array): void {
  const table = halfValues();
  for (let at = 0, i = 0; i < to.length; at += 22, i += 32) {
    const d = half(table, from, at);
    const high = word(from, at + 2);
    for (let j = 0; j < 16; j++) {
      const q = from[at + 6 + j]!;
      to[i + j] = d * (((q & 15) | (((high >>> j) & 1) << 4)) - 16);
      to[i + j + 16] = d * (((q >> 4) | (((high >>> (j + 16)) & 1) << 4)) - 16);
    }
  }
}

function encodeQ5_0(from: Float32Array, to: Uint8Array): void {
  for (let at = 0, i = 0; i < from.length; at += 22, i += 32) {
    let largest = 0;
    for (let j = i; j < i + 32; j++) if (Math.abs(from[j]!) > Math.abs(largest)) largest = from[j]!;
    const d = largest / -16;
    const inverse = d === 0 ? 0 : Math.fround(1 / d);
    const q = (x: number): number => Math.min(31, Math.trunc(Math.fround(Math.fround(x * inverse) + 16.5)));
    putHalf(to, at, d);
    let high = 0;
    for (let j = 0; j < 16; j++) {
      const low = q(from[i + j]!);
      const up = q(from[i + j + 16]!);
      to[at + 6 + j] = (low & 15) | ((up & 15) << 4);
      high |= ((low >> 4) << j) | ((up >> 4) << (j + 16));
    }
    for (let j = 0; j < 4; j++) to[at + 2 + j] = high >>> (8 * j);
  }
}

function decodeQ5_1(from: Uint8Array, to: Float32Array): void {
  const table = halfValues();
  for (let at = 0, i = 0; i < to.length; at += 24, i += 32) {
    const d = half(table, from, at);
    const m = half(table, from, at + 2);
    const high = word(from, at + 4);
    for (let j = 0; j < 16; j++) {
      const q = from[at + 8 + j]!;
      to[i + j] = d * ((q & 15) | (((high >>> j) & 1) << 4)) + m;
      to[i + j + 16] = d * ((q >> 4) | (((high >>> (j + 16)) & 1) << 4)) + m;
    }
  }
}
