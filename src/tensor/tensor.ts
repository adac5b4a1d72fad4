import { checkChoice, checkNumbers, checkObject } from './argument.ts';
import { type ArrayOf, arrayTypes, type DataArray, type DType, dtypes } from './dtype.ts';
import { type Device, deviceNumber, devices, io, native, typed, withDevice } from './engine.ts';
import { DisposedError, DTypeError, ShapeError } from './errors.ts';
import type { Recipe } from './saved.ts';
import { keep, scope, track, untrack } from './scope.ts';

/** Where the gradient of a parameter goes. It takes memory from its first write until it is dropped. */
export interface GradientSink {
  /** The gradient; takes memory where it has none. */
  tensor(): Tensor;
  /** Gives the memory back. Doing it twice is harmless. */
  drop(): void;
  /** Whether it holds anything yet: the first write need not clear it. */
  written: boolean;
}

/**
 * An n-dimensional array in device memory. Calls on tensors return at once; the device works through them in order, and
 * {@link Tensor.read} waits for it. A tensor lives until its {@link scope} ends or {@link Tensor.dispose} is called.
 */
export class Tensor {
  readonly shape: readonly number[];
  readonly dtype: DType;
  /** @internal */ readonly handle: number;
  /** @internal Whether the user may use it. */ held = true;
  /** @internal Tapes and gradients that still need it. */ uses = 0;
  /** @internal Whether a gradient flows to it. */ tracked = false;
  /** @internal Whether another tensor shows the same memory, or did. */ shared = false;
  /** @internal */ sink: GradientSink | undefined;
  /** @internal How a tape makes it again instead of keeping it. */ recipe: Recipe | undefined;

  /** @internal */
  constructor(handle: number, dtype: DType, shape: readonly number[]) {
    this.handle = handle;
    this.dtype = dtype;
    this.shape = shape;
  }

  /** Where it lives. */
  get device(): Device {
    return devices[Math.floor(this.handle / 2 ** 51)]!;
  }

  /** Number of elements. */
  get size(): number {
    return this.shape.reduce((n, d) => n * d, 1);
  }

  /** The gradient of a {@link parameter}, once something wrote it. */
  get grad(): Tensor | undefined {
    return this.sink?.written ? this.sink.tensor() : undefined;
  }

  /** Frees the memory. Doing it twice is harmless. */
  dispose(): void {
    if (!this.held) return;
    this.held = false;
    untrack(this);
    this.sink?.drop();
    this.sink = undefined;
    if (this.uses === 0) native().release(this.handle);
  }

  [Symbol.dispose](): void {
    this.dispose();
  }

  /**
   * Copies the elements out, once the work before has run. bf16 comes as raw bits in a Uint16Array.
   * @throws whatever stopped the work before it: each error reaches the reads that depend on it.
   */
  async read(): Promise<DataArray> {
    if (this.size >= 2 ** 32) {
      throw new ShapeError(`read: ${this.size} elements do not fit into one array; read parts of it, as rows() shows them`, {
        code: 'ERR_SHAPE',
        op: 'read',
        expected: 'fewer than 2^32 elements',
        actual: String(this.size),
      });
    }
    const into = new arrayTypes[this.dtype](this.size);
    const caller = new Error();
    try {
      return await native().read(handleOf(this, 'read'), into);
    } catch (error) {
      const known = typed(error);
      if (known instanceof Error && caller.stack !== undefined) {
        known.stack = `${known.name}: ${known.message}${caller.stack.slice('Error'.length)}`;
      }
      throw known;
    }
  }

  /** The one element of a tensor of size 1. */
  async item(): Promise<number> {
    if (this.size !== 1) {
      throw new ShapeError(`item: the tensor has ${this.size} elements, item() needs exactly 1; use read()`, {
        code: 'ERR_SHAPE',
        op: 'item',
        actual: `[${this.shape.join(' ')}]`,
      });
    }
    return (await this.read())[0]!;
  }
}

/** The handle, or a typed error when the tensor was freed. */
export function handleOf(t: Tensor, op: string): number {
  if (typeof t?.handle !== 'number') checkObject(op, 'an argument', t, 'a tensor', 'handle');
  if (!t.held) {
    throw new DisposedError(
      `${op}: a tensor of shape [${t.shape.join(' ')}] was used after it was freed; return it from its scope to keep it`,
      {
        code: 'ERR_TENSOR_DISPOSED',
        op,
      },
    );
  }
  return t.handle;
}

/** @internal A tape or a gradient begins to need `t`. */
export function addUse(t: Tensor): Tensor {
  t.uses++;
  return t;
}

/** @internal The counterpart of {@link addUse}. */
export function releaseUse(t: Tensor): void {
  if (--t.uses === 0 && !t.held) native().release(t.handle);
}

/** @internal A tensor that belongs to nobody's scope: its maker adds a use. */
export function unscoped(handle: number, dtype: DType, shape: readonly number[]): Tensor {
  const t = new Tensor(handle, dtype, shape);
  t.held = false;
  return t;
}

/** @internal A tensor of the current scope around a handle. */
export function adopt(handle: number, dtype: DType, shape: readonly number[]): Tensor {
  const t = new Tensor(handle, dtype, shape);
  track(t);
  return t;
}

/** @internal A tensor beside `t` that belongs to nobody's scope. */
export function unscopedLike(t: Tensor, dtype: DType): Tensor {
  return withDevice(t.device, () => {
    const engine = native();
    dimsToIo(t.shape);
    return unscoped(engine.create(deviceNumber(), dtypes.indexOf(dtype), t.shape.length), dtype, t.shape);
  });
}

function dimsToIo(shape: readonly number[]): void {
  if (shape.length > 6) {
    throw new ShapeError(`tensor: ${shape.length} dims, at most 6 are supported`, {
      code: 'ERR_RANK',
      actual: String(shape.length),
    });
  }
  shape.forEach((d, i) => {
    if (!Number.isSafeInteger(d) || d < 0) {
      throw new ShapeError(`tensor: dim ${i} is ${d}; give a whole number of 0 or more`, {
        code: 'ERR_SHAPE',
        actual: `[${shape.join(' ')}]`,
      });
    }
    io[i] = d;
  });
}

/** A tensor with undefined contents. */
export function empty(shape: readonly number[], dtype: DType = 'f32'): Tensor {
  checkNumbers('empty', 'shape', shape, 'a list of sizes, such as [2, 3]');
  checkChoice('tensor', 'dtype', dtype, dtypes);
  try {
    const engine = native();
    dimsToIo(shape);
    return adopt(engine.create(deviceNumber(), dtypes.indexOf(dtype), shape.length), dtype, [...shape]);
  } catch (error) {
    throw typed(error);
  }
}

/**
 * A tensor of given elements, in row-major order. The data is copied before the call returns.
 * @param shape default: one dim of all elements.
 * @throws ShapeError when the number of elements does not fit the shape.
 */
export function tensor(data: readonly number[] | DataArray, shape?: readonly number[], dtype: DType = dtypeOf(data)): Tensor {
  checkNumbers('tensor', 'data', data, 'an array of numbers or a typed array');
  const t = empty(shape ?? [data.length], dtype);
  try {
    write(t, data);
  } catch (error) {
    t.dispose();
    throw error;
  }
  return t;
}

// Elements of a large tensor that pass through JavaScript at a time, whose arrays have at most 2^32.
const pieceSize = 1 << 24;

/** A tensor of zeros. */
export function zeros(shape: readonly number[], dtype: DType = 'f32'): Tensor {
  const t = empty(shape, dtype);
  const piece = new arrayTypes[dtype](Math.min(t.size, pieceSize));
  if (piece.length === t.size) write(t, piece);
  else for (let at = 0; at < t.size; at += pieceSize) writeAt(t, at, piece.subarray(0, t.size - at));
  return t;
}

function dtypeOf(data: readonly number[] | DataArray): DType {
  if (data instanceof Int32Array) return 'i32';
  if (data instanceof Uint8Array) return 'u8';
  if (data instanceof Uint16Array) return 'bf16';
  if (data instanceof Float64Array) return 'f64';
  return 'f32';
}

/** Replaces the contents of `t`, in the order of the stream. */
export function write(t: Tensor, data: readonly number[] | DataArray): void {
  const type = arrayTypes[t.dtype];
  if (data.length !== t.size) {
    throw new ShapeError(`tensor: ${data.length} elements for shape [${t.shape.join(' ')}], which takes ${t.size}`, {
      code: 'ERR_SHAPE',
      expected: String(t.size),
      actual: String(data.length),
    });
  }
  if (t.dtype === 'bf16' && !(data instanceof Uint16Array)) {
    throw new DTypeError('tensor: bf16 is written as raw bits in a Uint16Array; make f32 and use cast()', {
      code: 'ERR_DTYPE',
      expected: 'Uint16Array',
    });
  }
  try {
    native().write(handleOf(t, 'write'), data instanceof type ? data : new type(data as readonly number[]));
  } catch (error) {
    throw typed(error);
  }
}

/** @internal Replaces the elements of `t` from `offset` on. */
export function writeAt(t: Tensor, offset: number, data: DataArray): void {
  const part = viewOf(t, [data.length], offset);
  try {
    write(part, data);
  } finally {
    part.dispose();
  }
}

/**
 * The same elements under another shape, without a copy; gradients flow through {@link reshape} of `ops`, not through this.
 * @param offset first element of `t` that the view shows. Default 0.
 * @internal
 */
export function viewOf(t: Tensor, shape: readonly number[], offset = 0): Tensor {
  try {
    const handle = handleOf(t, 'view');
    dimsToIo(shape);
    return sharing(t, adopt(native().view(handle, offset, shape.length), t.dtype, [...shape]));
  } catch (error) {
    throw typed(error);
  }
}

/** @internal A view that belongs to nobody's scope, of a tensor that may already have left its own. */
export function unscopedView(t: Tensor, shape: readonly number[]): Tensor {
  dimsToIo(shape);
  return sharing(t, unscoped(native().view(t.handle, 0, shape.length), t.dtype, [...shape]));
}

function sharing(t: Tensor, view: Tensor): Tensor {
  t.shared = true;
  view.shared = true;
  return view;
}

/** Reads with the array type of a dtype that is known. */
export async function readAs<D extends DType>(t: Tensor, dtype: D): Promise<ArrayOf[D]> {
  if (t.dtype !== dtype) {
    throw new DTypeError(`read: the tensor is ${t.dtype}, expected ${dtype}`, {
      code: 'ERR_DTYPE',
      expected: dtype,
      actual: t.dtype,
    });
  }
  return (await t.read()) as ArrayOf[D];
}

/**
 * Reads elements `from` up to, not including, `to`, in pieces: a large tensor does not fit into one array. Nothing may write to it meanwhile.
 * @param as what a piece is read as
 * @internal
 */
export async function* piecesOf(
  t: Tensor,
  from = 0,
  to = t.size,
  as: (piece: Tensor) => Tensor = (piece) => piece,
): AsyncGenerator<DataArray, void, undefined> {
  for (let at = from; at < to; at += pieceSize) {
    const piece = keep(scope(() => as(viewOf(t, [Math.min(pieceSize, to - at)], at))));
    yield await piece.read().finally(() => piece.dispose());
  }
}

/** A copy of `t` on another device, once the work before has run; the caller frees both. */
export async function toDevice(t: Tensor, device: Device): Promise<Tensor> {
  const data = await t.read();
  return withDevice(device, () => tensor(data, t.shape, t.dtype));
}

/**
 * Makes a tensor trainable: {@link valueAndGrad} adds its gradient to `t.grad`, which exists until {@link zeroGrad}.
 * @returns `t` itself.
 */
export function parameter(t: Tensor): Tensor {
  return t.sink === undefined ? withSink(t, ownGradient(t)) : t;
}

/** @internal Makes a tensor trainable, with a gradient that lies somewhere else. */
export function withSink(t: Tensor, sink: GradientSink): Tensor {
  t.sink = sink;
  t.tracked = true;
  return t;
}

function ownGradient(t: Tensor): GradientSink {
  let gradient: Tensor | undefined;
  return {
    written: false,
    tensor() {
      gradient ??= withDevice(t.device, () => keep(empty(t.shape)));
      return gradient;
    },
    drop() {
      this.written = false;
      gradient?.dispose();
      gradient = undefined;
    },
  };
}
