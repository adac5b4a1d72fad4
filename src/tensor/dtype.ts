/** Element types. Numbers in `dtypes` are those of the native core. */
export const dtypes = ['f32', 'bf16', 'i32', 'u8', 'f64'] as const;

/** `bf16` is storage for weights: kernels widen it to float32. */
export type DType = (typeof dtypes)[number];

/** What {@link Tensor.read} gives for each dtype; bf16 comes as its raw 16 bits. */
export interface ArrayOf {
  f32: Float32Array;
  bf16: Uint16Array;
  i32: Int32Array;
  u8: Uint8Array;
  f64: Float64Array;
}
export type DataArray = ArrayOf[DType];

export const arrayTypes = {
  f32: Float32Array,
  bf16: Uint16Array,
  i32: Int32Array,
  u8: Uint8Array,
  f64: Float64Array,
} as const;
