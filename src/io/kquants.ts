// The K types of ggml: 256 values share a scale d and a minimum m, and groups of them have small integer scales and minima of their own.
// Packing searches for the scales that lose least, as llama.cpp's quantizer does without an importance matrix.

import { half, halfValues, putHalf } from './half.ts';

// Scales and minima of 16 values in four bits each, then 2 bits a value: four groups of 32 share each run of 32 bytes.
export function decodeQ2_K(from: Uint8Array, to: Float32Array): void {
  const table = halfValues();
  for (let at = 0, i = 0; i < to.length; at += 84, i += 256) {
    const d = half(table, from, at + 80);
    const m = half(table, from, at + 82);
    for (let j = 0; j < 256; j++) {
      const scale = from[at + (j >> 4)]!;
      const q = (from[at + 16 + ((j >> 7) << 5) + (j & 31)]! >> ((j >> 4) & 6)) & 3;
      to[i + j] = d * (scale & 15) * q - m * (scale >> 4);
    }
  }
}

// The third bit of all 256 values, 2 bits a value, then scales of 16 values in six bits.
export function decodeQ3_K(from: Uint8Array, to: Float32Array): void {
  const table = halfValues();
  for (let at = 0, i = 0; i < to.length; at += 110, i += 256) {
    const d = half(table, from, at + 108);
    for (let j = 0; j < 256; j++) {
      const group = j >> 4;
      const low = (from[at + 96 + (group & 7)]! >> ((group >> 1) & 4)) & 15;
      const scale = (low | (((from[at + 104 + (group & 3)]! >> ((group >> 2) * 2)) & 3) << 4)) - 32;
      const q = (from[at + 32 + ((j >> 7) << 5) + (j & 31)]! >> ((j >> 4) & 6)) & 3;
      const third = (from[at + (j & 31)]! >> (j >> 5)) & 1;
      to[i + j] = d * scale * (q - (third ? 0 : 4));
    }
  }
}

/** The six bits of scale of group j, of 8, in the 12 bytes at `at`; their minima lie four bytes further. */
const scale6 = (from: Uint8Array, at: number, j: number): number =>
  j < 4 ? from[at + j]! & 63 : (from[at + j + 4]! & 15) | ((from[at + j - 4]! >> 6) << 4);
const minimum6 = (from: Uint8Array, at: number, j: number): number =>
  j < 4 ? from[at + j + 4]! & 63 : (from[at + j + 4]! >> 4) | ((from[at + j]! >> 6) << 4);

export function decodeQ4_K(from: Uint8Array, to: Float32Array): void {
  const table = halfValues();
  for (let at = 0, i = 0; i < to.length; at += 144, i += 256) {
    const d = half(table, from, at);
    const m = half(table, from, at + 2);
    for (let group = 0; group < 8; group++) {
      const scale = d * scale6(from, at + 4, group);
      const minimum = m * minimum6(from, at + 4, group);
      const q = at + 16 + (group >> 1) * 32;
      const shift = (group & 1) * 4;
      const out = i + group * 32;
      for (let j = 0; j < 32; j++) to[out + j] = scale * ((from[q + j]! >> shift) & 15) - minimum;
    }
  }
}

export function decodeQ5_K(from: Uint8Array, to: Float32Array): void {
  const table = halfValues();
  for (let at = 0, i = 0; i < to.length; at += 176, i += 256) {
    const d = half(table, from, at);
    const m = half(table, from, at + 2);
    for (let group = 0; group < 8; group++) {
      const scale = d * scale6(from, at + 4, group);
      const minimum = m * minimum6(from, at + 4, group);
      const q = at + 48 + (group >> 1) * 32;
      const shift = (group & 1) * 4;
      const out = i + group * 32;
      for (let j = 0; j < 32; j++) {
        const fifth = ((from[at + 16 + j]! >> group) & 1) << 4;
        to[out + j] = scale * (((from[q + j]! >> shift) & 15) | fifth) - minimum;
      }
    }
  }
}

// 4 low bits, 2 high bits, signed scales of 16 values; halves of 128 values.
export function decodeQ6_K(from: Uint8Array, to: Float32Array): void {
  const table = halfValues();
  for (let at = 0, i = 0; i < to.length; at += 210, i += 256) {
    const d = half(table, from, at + 208);
    for (let group = 0; group < 16; group++) {
      const scale = d * ((from[at + 192 + group]! << 24) >> 24);
      const part = group >> 3;
      const row = (group >> 1) & 3;
      const column = (group & 1) * 16;
      const low = at + part * 64 + (row & 1) * 32 + column;
      const high = at + 128 + part * 32 + column;
      const lowShift = (row >> 1) * 4;
      const highShift = row * 2;
      const out = i + group * 16;
      for (let j = 0; j < 16; j++) {
        const q = ((from[low + j]! >> lowShift) & 15) | (((from[high + j]! >> highShift) & 3) << 4);
        to[out + j] = scale * (q - 32);
      }
    }
  }
}

// 2^52 + 2^51: adding it to a double of modest size rounds to a whole number, ties to even.
const ROUND = 6755399441055744;

const weights = new Float32Array(32);
const tried = new Float32Array(32);
/** What {@link fitAffine} found beside the scale. */
let minimum = 0;

/**
 * The scale, and in `minimum` the amount that is taken away again, that lose least of `x[at..at+32]` when each becomes scale * q - minimum with
 * q from 0 to 15: of 21 spacings around the range of the values, each with its least-squares fit, the one with the least error.
 * Errors weigh more where values are large.
 */
function fitAffine(x: Float32Array, at: number): number {
  let squares = 0;
  let low = x[at]!;
  let high = low;
  for (let j = at; j < at + 32; j++) {
    const v = x[j]!;
    squares += v * v;
    if (v < low) low = v;
    if (v > high) high = v;
  }
  const typical = Math.sqrt(squares / 32);
  if (low > 0) low = 0;
  minimum = -low;
  if (high === low) return 0;
  let sumW = 0;
  let sumX = 0;
  for (let j = 0; j < 32; j++) {
    const v = x[at + j]!;
    const w = typical + Math.abs(v);
    weights[j] = w;
    sumW += w;
    sumX += w * v;
  }
  const range = high - low;
  let scale = range / 15;
  let least = errorOf(x, at, 15 / range, low, scale, low);
  for (let step = 0; step <= 20; step++) {
    const spacing = (15 - 1 + 0.1 * step) / range;
    let sumQ = 0;
    let sumQQ = 0;
    let sumXQ = 0;
    for (let j = 0; j < 32; j++) {
      const v = x[at + j]!;
      let q = spacing * (v - low) + ROUND - ROUND;
      q = q < 0 ? 0 : Math.min(q, 15);
      tried[j] = q;
      const wq = weights[j]! * q;
      sumQ += wq;
      sumQQ += wq * q;
      sumXQ += wq * v;
    }
    const determinant = sumW * sumQQ - sumQ * sumQ;
    if (!(determinant > 0)) continue;
    let s = (sumW * sumXQ - sumX * sumQ) / determinant;
    let m = (sumQQ * sumX - sumQ * sumXQ) / determinant;
    if (m > 0) {
      m = 0;
      s = sumXQ / sumQQ;
    }
    let error = 0;
    for (let j = 0; j < 32; j++) {
      const off = s * tried[j]! + m - x[at + j]!;
      error += weights[j]! * off * off;
    }
    if (error < least) {
      least = error;
      scale = s;
      minimum = -m;
    }
  }
  return scale;
}

function errorOf(x: Float32Array, at: number, spacing: number, low: number, scale: number, m: number): number {
  let error = 0;
  for (let j = 0; j < 32; j++) {
    let q = spacing * (x[at + j]! - low) + ROUND - ROUND;
    q = q < 0 ? 0 : Math.min(q, 15);
    const off = scale * q + m - x[at + j]!;
    error += weights[j]! * off * off;
  }
  return error;
}

const scales = new Float64Array(16);
const minima = new Float64Array(8);
const table6 = new Uint8Array(16);
const q = new Uint8Array(256);

export function encodeQ4_K(from: Float32Array, to: Uint8Array): void {
  const table = halfValues();
  for (let at = 0, i = 0; i < from.length; at += 144, i += 256) {
    let mostScale = 0;
    let mostMinimum = 0;
    for (let group = 0; group < 8; group++) {
      scales[group] = fitAffine(from, i + group * 32);
      minima[group] = minimum;
      mostScale = Math.max(mostScale, scales[group]!);
      mostMinimum = Math.max(mostMinimum, minimum);
    }
    putHalf(to, at, mostScale / 63);
    putHalf(to, at + 2, mostMinimum / 63);
    const d = half(table, to, at);
    const m = half(table, to, at + 2);
    for (let group = 0; group < 8; group++) {
      const scale = d === 0 ? 0 : scales[group]! / d;
      const least = m === 0 ? 0 : minima[group]! / m;
      roundAffine(from, i + group * 32, group, scale, least, d, m);
    }
    for (let group = 0; group < 4; group++) {
      to[at + 4 + group] = table6[group]! | ((table6[group + 4]! >> 4) << 6);
      to[at + 8 + group] = table6[group + 8]! | ((table6[group + 12]! >> 4) << 6);
      to[at + 12 + group] = (table6[group + 4]! & 15) | ((table6[group + 12]! & 15) << 4);
    }
    for (let pair = 0; pair < 4; pair++) {
      for (let j = 0; j < 32; j++) to[at + 16 + pair * 32 + j] = q[pair * 64 + j]! | (q[pair * 64 + 32 + j]! << 4);
    }
  }
}

/**
 * Rounds the scale and minimum of a group, in units of d and m, to the whole numbers nearby that lose least once the values are rounded to
 * them too; leaves these in `table6` and `q`.
 */
function roundAffine(x: Float32Array, at: number, group: number, scale: number, least: number, d: number, m: number): void {
  let squares = 0;
  for (let j = at; j < at + 32; j++) squares += x[j]! * x[j]!;
  const typical = Math.sqrt(squares / 32);
  const [s0, m0] = [Math.round(scale), Math.round(least)];
  let best = Number.POSITIVE_INFINITY;
  for (let s = Math.max(0, s0 - 1); s <= Math.min(63, s0 + 1); s++) {
    for (let l = Math.max(0, m0 - 1); l <= Math.min(63, m0 + 1); l++) {
      const step = d * s;
      const inverse = step === 0 ? 0 : 1 / step;
      const low = m * l;
      let error = 0;
      for (let j = 0; j < 32; j++) {
        const v = x[at + j]!;
        let n = (v + low) * inverse + ROUND - ROUND;
        n = n < 0 ? 0 : Math.min(n, 15);
        tried[j] = n;
        const off = step * n - low - v;
        error += (typical + Math.abs(v)) * off * off;
      }
      if (error >= best) continue;
      best = error;
      table6[group] = s;
      table6[group + 8] = l;
      q.set(tried, group * 32);
    }
  }
}

/**
 * The scale that loses least of `x[at..at+16]` when each becomes scale * q with q from -32 to 31: of 19 spacings around the largest value,
 * each with its least-squares fit. Errors weigh as the squares of the values.
 */
function fitScale(x: Float32Array, at: number): number {
  let largest = 0;
  for (let j = at; j < at + 16; j++) if (Math.abs(x[j]!) > Math.abs(largest)) largest = x[j]!;
  if (Math.abs(largest) < 1e-15) return 0;
  let best = 0;
  let scale = 0;
  // The plain spacing first: of equals it wins.
  for (let step = 0; step <= 18; step++) {
    const change = step === 0 ? 0 : step <= 9 ? step - 10 : step - 9;
    const spacing = -(32 + 0.1 * change) / largest;
    let sumXQ = 0;
    let sumQQ = 0;
    for (let j = at; j < at + 16; j++) {
      const v = x[j]!;
      let n = spacing * v + ROUND - ROUND;
      n = n < -32 ? -32 : Math.min(n, 31);
      const w = v * v * n;
      sumXQ += w * v;
      sumQQ += w * n;
    }
    if (sumQQ > 0 && sumXQ * sumXQ > best * sumQQ) {
      scale = sumXQ / sumQQ;
      best = scale * sumXQ;
    }
  }
  return scale;
}

export function encodeQ6_K(from: Float32Array, to: Uint8Array): void {
  const table = halfValues();
  for (let at = 0, i = 0; i < from.length; at += 210, i += 256) {
    let largest = 0;
    for (let group = 0; group < 16; group++) {
      const scale = fitScale(from, i + group * 16);
      scales[group] = scale;
      if (Math.abs(scale) > Math.abs(largest)) largest = scale;
    }
    to.fill(0, at, at + 210);
    if (Math.abs(largest) < 1e-15) continue;
    const perScale = -128 / largest;
    putHalf(to, at + 208, 1 / perScale);
    const d = half(table, to, at + 208);
    for (let group = 0; group < 16; group++) {
      const rounded = Math.min(127, Math.round(perScale * scales[group]!));
      to[at + 192 + group] = rounded;
      const scale = d * rounded;
      const inverse = scale === 0 ? 0 : 1 / scale;
      for (let j = group * 16; j < group * 16 + 16; j++) {
        const n = from[i + j]! * inverse + ROUND - ROUND;
        q[j] = (n < -32 ? -32 : Math.min(n, 31)) + 32;
      }
    }
    for (let part = 0; part < 2; part++) {
      for (let j = 0; j < 32; j++) {
        const [a, b, c, e] = [q[part * 128 + j]!, q[part * 128 + j + 32]!, q[part * 128 + j + 64]!, q[part * 128 + j + 96]!];
        to[at + part * 64 + j] = (a & 15) | ((c & 15) << 4);
        to[at + part * 64 + j + 32] = (b & 15) | ((e & 15) << 4);
        to[at + 128 + part * 32 + j] = (a >> 4) | ((b >> 4) << 2) | ((c >> 4) << 4) | ((e >> 4) << 6);
      }
    }
  }
}
