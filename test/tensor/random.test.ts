import { expect, test } from 'vitest';
import { permutation, philox, randomBlock, uniform } from '../../src/tensor/random.ts';

test('philox agrees with the known answers of Random123', () => {
  const hex = (block: Uint32Array) => [...block].map((x) => x.toString(16).padStart(8, '0')).join(' ');
  expect(hex(philox(new Uint32Array(4), 0, 0))).toBe('6627e8d5 e169c58d bc57ac4c 9b00dbd8');
  const ones = 0xffffffff;
  expect(hex(philox(new Uint32Array(4).fill(ones), ones, ones))).toBe('408f276d 41c83b0e a20bc7c6 6d5451fd');
  const pi = new Uint32Array([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344]);
  expect(hex(philox(pi, 0xa4093822, 0x299f31d0))).toBe('d16cfe09 94fdcceb 5001e420 24126ea1');
});

test('a block depends on seed, stream and index, each wider than 32 bits', () => {
  const seen = new Set(
    [0, 1, 2 ** 32, 2 ** 52].flatMap((a) =>
      [randomBlock(a, 5, 5), randomBlock(5, a, 5), randomBlock(5, 5, a)].map((b) => b.join()),
    ),
  );
  expect(seen.size).toBe(12);
});

test('a permutation hits every index once and differs by epoch', () => {
  for (const n of [1, 2, 3, 4, 5, 16, 17, 1000, 4097]) {
    const p = permutation(n, 7, 0);
    expect(new Set(Array.from({ length: n }, (_, i) => p(i))).size).toBe(n);
  }
  const order = (stream: number) => Array.from({ length: 50 }, (_, i) => permutation(50, 7, stream)(i)).join();
  expect(order(0)).not.toBe(order(1));
  expect(order(3)).toBe(order(3));
  expect(permutation(2 ** 45, 1, 1)(2 ** 44)).toBeLessThan(2 ** 45);
});

test('uniform numbers stay below one and are exact in float32', () => {
  expect(uniform(0)).toBe(0);
  expect(uniform(0xffffffff)).toBe(1 - 2 ** -24);
  expect(Math.fround(uniform(0x12345678))).toBe(uniform(0x12345678));
});
