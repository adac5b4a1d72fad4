import { expect, test } from 'vitest';
import { widenBf16, widenHalf } from '../../src/tensor/half.ts';

test('float16: all 65,536 values', () => {
  const bits = Uint16Array.from({ length: 1 << 16 }, (_, i) => i);
  const wide = widenHalf(bits);
  for (const i of bits) {
    const sign = i >> 15 ? -1 : 1;
    const [exponent, fraction] = [(i >> 10) & 31, i & 1023];
    if (exponent === 31) expect(wide[i]).toBe(fraction ? Number.NaN : sign * Number.POSITIVE_INFINITY);
    else if (wide[i] !== sign * (exponent ? (1024 + fraction) * 2 ** (exponent - 25) : fraction * 2 ** -24))
      expect.fail(`bits ${i}`);
  }
  expect(Object.is(wide[0x8000], -0)).toBe(true);
  expect(widenHalf(bits.subarray(0, 0)).length).toBe(0);
});

test('bfloat16: the upper half of a float32', () => {
  expect(widenBf16(Uint16Array.of(0x3f80, 0xc049, 0x7f80, 0))).toEqual(
    Float32Array.of(1, -3.140625, Number.POSITIVE_INFINITY, 0),
  );
});
