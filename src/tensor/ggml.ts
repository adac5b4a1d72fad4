// The twin of native/binding/ggml.cpp: weights in ggml's blocks, packed and unpacked beside the event loop.
import { loadNative } from './native.ts';

interface GgmlAddon {
  unpack(kernel: string, blocks: Uint8Array, values: Float32Array): Promise<void>;
  pack(kernel: string, values: Float32Array, blocks: Uint8Array, limit: number): Promise<number>;
}

const addon = (): GgmlAddon => loadNative() as unknown as GgmlAddon;

/** The values of whole blocks of a type. Both arrays belong to the work until it is done. @param type such as `q4_k` */
export function unpack(type: string, blocks: Uint8Array, values: Float32Array): Promise<void> {
  return addon().unpack(`unpack_${type}`, blocks, values);
}

/**
 * Packs values into whole blocks of a type, unless one is larger than `limit` or not a number: its index, or -1. Both arrays belong to the
 * work until it is done. @param limit NaN for none
 */
export function pack(type: string, values: Float32Array, blocks: Uint8Array, limit: number): Promise<number> {
  return addon().pack(`pack_${type}`, values, blocks, limit);
}
