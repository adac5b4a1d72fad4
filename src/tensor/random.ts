// Philox4x32-10 (Salmon et al. 2011): a random number is a pure function of (seed, stream, index), so nothing has to be
// saved to resume. native/core/random.h gives the same numbers.

import { ConfigError } from './errors.ts';

const WORD = 0x1_0000_0000;

/** High half of the 64-bit product of two 32-bit numbers. */
function mulHigh(a: number, b: number): number {
  const a0 = a & 0xffff;
  const a1 = a >>> 16;
  const b0 = b & 0xffff;
  const b1 = b >>> 16;
  const low = a0 * b0;
  const mid = a1 * b0 + (low >>> 16);
  const mid2 = a0 * b1 + (mid % 0x10000);
  return (a1 * b1 + Math.floor(mid / 0x10000) + Math.floor(mid2 / 0x10000)) >>> 0;
}

/** The Philox4x32-10 block function: encrypts `block` (four 32-bit numbers) in place under a 64-bit key. */
export function philox(block: Uint32Array, key0: number, key1: number): Uint32Array {
  let [c0, c1, c2, c3] = block as unknown as [number, number, number, number];
  let k0 = key0 >>> 0;
  let k1 = key1 >>> 0;
  for (let round = 0; round < 10; round++) {
    const highA = mulHigh(0xd2511f53, c0);
    const lowA = Math.imul(0xd2511f53, c0);
    const highB = mulHigh(0xcd9e8d57, c2);
    const lowB = Math.imul(0xcd9e8d57, c2);
    c0 = (highB ^ c1 ^ k0) >>> 0;
    c1 = lowB >>> 0;
    c2 = (highA ^ c3 ^ k1) >>> 0;
    c3 = lowA >>> 0;
    k0 = (k0 + 0x9e3779b9) >>> 0;
    k1 = (k1 + 0xbb67ae85) >>> 0;
  }
  block[0] = c0;
  block[1] = c1;
  block[2] = c2;
  block[3] = c3;
  return block;
}

/** Four 32-bit numbers, written into `out`: block `index` of stream `stream` of `seed` (each an integer in [0, 2^53)). */
export function randomBlock(seed: number, stream: number, index: number, out = new Uint32Array(4)): Uint32Array {
  out[0] = index % WORD;
  out[1] = Math.floor(index / WORD);
  out[2] = stream % WORD;
  out[3] = Math.floor(stream / WORD);
  return philox(out, seed % WORD, Math.floor(seed / WORD));
}

/** Throws {@link ConfigError} unless `seed` is an integer in [0, 2^53). */
export function checkSeed(seed: number, argument = 'seed'): number {
  if (Number.isSafeInteger(seed) && seed >= 0) return seed;
  throw new ConfigError(`random: ${argument} is ${seed}, it should be an integer from 0 to 2^53 - 1`, {
    code: 'ERR_SEED',
    argument,
    expected: 'an integer in [0, 2^53)',
    actual: String(seed),
  });
}

/** A number in [0, 1) with 24 bits, exact in float32. */
export function uniform(bits: number): number {
  return (bits >>> 8) * 2 ** -24;
}

/**
 * A permutation of [0, n) in constant memory: a keyed Feistel network on the next power of four, walked until it lands inside
 * (Black and Rogaway 2002). `n` up to 2^52.
 */
export function permutation(n: number, seed: number, stream: number): (index: number) => number {
  let half = 1;
  while (4 ** half < n) half++;
  const side = 2 ** half;
  const block = new Uint32Array(4);
  return (index) => {
    let value = index;
    do {
      let left = Math.floor(value / side);
      let right = value % side;
      for (let round = 0; round < 8; round++) {
        // The right half and the round number together are the index, so that rounds never share a block.
        const mixed = randomBlock(seed, stream, right * 8 + round, block)[0]! % side;
        const next = (left ^ mixed) >>> 0;
        left = right;
        right = next;
      }
      value = left * side + right;
    } while (value >= n);
    return value;
  };
}
