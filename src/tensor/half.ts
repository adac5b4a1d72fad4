// Floats of 16 bits, as files have them.
import { loadNative } from './native.ts';

/** The float32 values of float16 bits. @param into as many elements */
export function widenHalf(bits: Uint16Array, into: Float32Array = new Float32Array(bits.length)): Float32Array {
  loadNative().widenHalf(bits, into);
  return into;
}

/** The float32 values of bfloat16 bits. @param into as many elements */
export function widenBf16(bits: Uint16Array, into: Float32Array = new Float32Array(bits.length)): Float32Array {
  loadNative().widenBf16(bits, into);
  return into;
}
