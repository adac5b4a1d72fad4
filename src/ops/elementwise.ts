// One number at a time. Shapes of two operands must be equal: nothing is broadcast.
import type { DType } from '../tensor/dtype.ts';
import { ConfigError, DTypeError } from '../tensor/errors.ts';
import { op } from '../tensor/op.ts';
import type { Tensor } from '../tensor/tensor.ts';

const addOp = op({ forward: 'add(a[*], b[*]) -> y[*]', backward: 'add_backward(dy[*]) -> da = dy, db = dy' });
const subOp = op({ forward: 'sub(a[*], b[*]) -> y[*]', backward: 'sub_backward(dy[*]) -> da = dy, db[*]+' });
const mulOp = op({ forward: 'mul(a[*], b[*]) -> y[*]', backward: 'mul_backward(dy[*], a[*], b[*]) -> da[*]+, db[*]+' });
const scaleOp = op({ forward: 'scale(x[*], s) -> y[*]', backward: 'scale_backward(dy[*], s) -> dx[*]+' });
const copyOp = op({ forward: 'copy(x[*]) -> y[*]', backward: 'copy_backward(dy[*]) -> dx = dy' });
const toBf16 = op({
  forward: 'to_bf16(x[*]:float) -> y[*]:bf16',
  backward: 'to_bf16_backward(x[*]:float, dy[*]:float) -> dx[*]+',
});
const toF32 = op({
  forward: 'to_f32(x[*]:float) -> y[*]:f32',
  backward: 'to_f32_backward(x[*]:float, dy[*]:f32) -> dx[*]+',
});
const softcapOp = op({
  forward: 'softcap(x[*], cap) -> y[*]',
  backward: 'softcap_backward(dy[*], y[*], cap) -> dx[*]+',
});
const fillOp = op({ forward: 'fill(x[*]:float&, value) -> ' });
const copyInto = op({ forward: 'copy_(y[*]:float&, x[*]:float) -> ' });
const addInto = op({ forward: 'add_(y[*]&, x[*]) -> ' });

/**
 * a + b.
 * @param a [*]
 * @param b [*]
 * @returns [*]
 * @throws ShapeError when the shapes differ.
 */
export function add(a: Tensor, b: Tensor): Tensor {
  return addOp(a, b)[0]!;
}

/**
 * a - b.
 * @param a [*]
 * @param b [*]
 * @returns [*]
 * @throws ShapeError when the shapes differ.
 */
export function sub(a: Tensor, b: Tensor): Tensor {
  return subOp(a, b)[0]!;
}

/**
 * a · b.
 * @param a [*]
 * @param b [*]
 * @returns [*]
 * @throws ShapeError when the shapes differ.
 */
export function mul(a: Tensor, b: Tensor): Tensor {
  return mulOp(a, b)[0]!;
}

/**
 * s · x.
 * @param x [*]
 * @returns [*]
 */
export function scale(x: Tensor, s: number): Tensor {
  return scaleOp(x, s)[0]!;
}

/**
 * A copy in memory of its own.
 * @param x [*], f32
 * @returns [*]
 */
export function copy(x: Tensor): Tensor {
  return copyOp(x)[0]!;
}

/**
 * Converts between f32 and bf16, rounding to the nearest, ties to even. Gradients flow both ways.
 * @param x [*], f32 or bf16
 * @returns [*], always a copy
 * @throws DTypeError for any other pair of dtypes.
 */
export function cast(x: Tensor, dtype: DType): Tensor {
  if (dtype === 'bf16') return toBf16(x)[0]!;
  if (dtype === 'f32') return toF32(x)[0]!;
  throw new DTypeError(`cast: cannot convert ${x.dtype} to ${dtype}; it converts between f32 and bf16`, {
    code: 'ERR_DTYPE',
    op: 'cast',
    argument: 'dtype',
    expected: 'f32 or bf16',
    actual: dtype,
  });
}

/**
 * Bends x into (-cap, cap): cap · tanh(x / cap). Gemma 2 caps attention scores at 50 and logits at 30.
 * @param x [*]
 * @param cap above 0
 * @returns [*]
 * @throws ConfigError when the cap is not above 0.
 */
export function softcap(x: Tensor, cap: number): Tensor {
  if (!(cap > 0 && cap < Infinity)) {
    throw new ConfigError(`softcap: cap is ${cap}; give a positive number, or leave the op out for no cap`, {
      code: 'ERR_CONFIG',
      op: 'softcap',
      argument: 'cap',
      expected: 'a positive number',
      actual: String(cap),
    });
  }
  return softcapOp(x, cap)[0]!;
}

/**
 * Sets every element to `value`, in place.
 * @param x [*], f32 or bf16
 */
export function fill_(x: Tensor, value: number): void {
  fillOp(x, value);
}

/**
 * y += x, in place.
 * @param y [*], f32
 * @param x [*]
 * @throws ShapeError when the shapes differ.
 */
export function add_(y: Tensor, x: Tensor): void {
  addInto(y, x);
}

/**
 * y = x, in place; converts between f32 and bf16.
 * @param y [*]
 * @param x [*]
 * @throws ShapeError when the shapes differ.
 */
export function copy_(y: Tensor, x: Tensor): void {
  copyInto(y, x);
}
