// float16, which files have and tensors do not.
import { loadNative } from './native.ts';

/** The float32 values of float16 bits. @param into as many elements */
export function widenHalf(bits: Uint16Array, into: Float32Array = new Float32Array(bits.length)): Float32Array {
  loadNative().widenHalf(bits, into);
  return into;
}

/** The float32 values of bfloat16 bits. */
export function widenBf16(bits: Uint16Array): Float32Array {
  const wide = new Uint32Array(bits.length);
  for (let i = 0; i < bits.length; i++) wide[i] = bits[i]! << 16;
  return new Float32Array(wide.buffer);
}
