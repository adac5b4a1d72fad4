// The native engine of this JavaScript thread: started on first use, talked to through one shared array of numbers.
import { availableParallelism, totalmem } from 'node:os';
import {
  ConfigError,
  DataError,
  DeviceError,
  DisposedError,
  DTypeError,
  FormatError,
  LimbeckError,
  OutOfMemoryError,
  ShapeError,
} from './errors.ts';
import { loadNative, type NativeAddon } from './native.ts';

export interface EngineOptions {
  /** Threads that compute, the stream's own included. Default: the cores this process may use. */
  threads?: number;
  /** Most bytes that tensors may take together. Default: the machine's memory. */
  memoryLimit?: number;
  /** Instruction set to use: `generic`, `avx2`, `avx512`, `neon`. Default: the best this machine has, or `LIMBECK_ISA`. */
  isa?: string;
}

/** Arguments and results of native calls; twin of kIoSlots in addon.cpp. */
export const io = new Float64Array(256);
/** Slots that one output takes in `io` after a call: handle, dtype, rank, six dims. */
export const outputSlots = 9;

let addon: NativeAddon | undefined;

/**
 * Starts the engine of this thread with options; without it the first tensor starts it with defaults.
 * @throws ConfigError `ERR_STARTED` when it runs already, or when a value makes no sense.
 */
export function init(options: EngineOptions = {}): void {
  const threads = options.threads ?? availableParallelism();
  if (!Number.isInteger(threads) || threads < 1 || threads > 1024) {
    throw new ConfigError(`init: threads is ${threads}; give a whole number from 1 to 1024`, {
      code: 'ERR_CONFIG',
      op: 'init',
      argument: 'threads',
      expected: '1 to 1024',
      actual: String(threads),
    });
  }
  const loaded = loadNative();
  try {
    loaded.start(io, threads, options.memoryLimit ?? totalmem(), options.isa ?? '');
  } catch (error) {
    throw typed(error);
  }
  addon = loaded;
}

/** The running engine; starts it when needed. */
export function native(): NativeAddon {
  if (addon === undefined) init();
  return addon!;
}

/** Counts engines of this thread: what was defined in one is unknown to the next. @internal */
export let engineNumber = 0;

/**
 * Stops the engine of this thread and frees every tensor in it; the next tensor starts a new one. For tests and for changing
 * options of {@link init}.
 * @throws ConfigError `ERR_BUSY` while reads are pending.
 */
export function shutdown(): void {
  if (addon === undefined) return;
  try {
    addon.stop();
  } catch (error) {
    throw typed(error);
  }
  addon = undefined;
  engineNumber++;
}

/** Whether the engine of this thread was started. */
export function started(): boolean {
  return addon !== undefined;
}

const classes = {
  shape: ShapeError,
  dtype: DTypeError,
  memory: OutOfMemoryError,
  device: DeviceError,
  config: ConfigError,
  format: FormatError,
  data: DataError,
  disposed: DisposedError,
  internal: LimbeckError,
} as const;

interface NativeError extends Error {
  kind: keyof typeof classes;
  code: string;
  op?: string;
  argument?: string;
  expected?: string;
  actual?: string;
}

/** The typed twin of an error from the addon, with the caller's stack; anything else comes back as it is. */
export function typed(error: unknown): unknown {
  if (!(error instanceof Error) || !('kind' in error)) return error;
  const e = error as NativeError;
  return new classes[e.kind](e.message, e);
}

/** Resolves when all work called so far is done; rejects with what stopped it. */
export async function sync(): Promise<void> {
  try {
    await native().sync();
  } catch (error) {
    throw typed(error);
  }
}

/** Bytes of tensors on the device and how many there are. */
export interface MemoryReport {
  /** In use now. */
  readonly live: number;
  /** Most that was ever in use since {@link resetPeak}. */
  readonly peak: number;
  /** Held from the system. */
  readonly reserved: number;
  readonly limit: number;
  /** Tensors alive. */
  readonly tensors: number;
}

/** Memory of this thread's engine, without waiting for it. */
export function memory(): MemoryReport {
  return addon === undefined ? { live: 0, peak: 0, reserved: 0, limit: 0, tensors: 0 } : addon.memory();
}

/** Makes `memory().peak` count from now on. */
export function resetPeak(): void {
  native().resetPeak();
}

/** Gives memory that is free now back to the system, once the work before this call is done. */
export function trim(): void {
  native().trim();
}

/** Time by op, for finding what a step spends. */
export interface OpTime {
  readonly op: string;
  readonly count: number;
  readonly seconds: number;
}

/** Measures every kernel that `f` enqueues. Times are wall time on the stream's thread. */
export async function profile(f: () => unknown): Promise<OpTime[]> {
  await sync();
  native().profile(true);
  try {
    await f();
    await sync();
    const merged = new Map<string, OpTime>();
    for (const { op, count, seconds } of native().profiled()) {
      const had = merged.get(op);
      merged.set(op, { op, count: count + (had?.count ?? 0), seconds: seconds + (had?.seconds ?? 0) });
    }
    return [...merged.values()].sort((a, b) => b.seconds - a.seconds);
  } finally {
    native().profile(false);
  }
}
