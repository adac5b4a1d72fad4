// float16: its values by a table, its bits by rounding.

// 2^52 + 2^51: adding it to a double of modest size rounds to a whole number, ties to even.
const ROUND = 6755399441055744;

/** The nearest float16 of a float32, ties to even; both as bits. */
export function toHalf(bits: number): number {
  const sign = (bits >>> 16) & 0x8000;
  const magnitude = bits & 0x7fffffff;
  if (magnitude >= 0x47800000) return sign | (magnitude > 0x7f800000 ? 0x7e00 : 0x7c00);
  if (magnitude >= 0x38800000) return sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >>> 13) & 1)) >>> 13);
  // Below 2^-14 the steps are 2^-24.
  const fraction = magnitude < 0x800000 ? 0 : ((magnitude & 0x7fffff) | 0x800000) * 2 ** ((magnitude >>> 23) - 126);
  return sign | (fraction + ROUND - ROUND);
}

let halves: Float32Array | undefined;

/** The values of all float16 bits. */
export function halfValues(): Float32Array {
  halves ??= Float32Array.from({ length: 1 << 16 }, (_, bits) => {
    const sign = bits >> 15 ? -1 : 1;
    const exponent = (bits >> 10) & 31;
    const fraction = bits & 1023;
    if (exponent === 31) return fraction ? Number.NaN : sign * Number.POSITIVE_INFINITY;
    return sign * (exponent ? (1024 + fraction) * 2 ** (exponent - 25) : fraction * 2 ** -24);
  });
  return halves;
}
