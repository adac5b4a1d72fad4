// The native engines of this JavaScript thread, one for each device: started on first use, talked to through one shared array of numbers.
import { availableParallelism } from 'node:os';
import { cudaLibrary, cudaReady } from './cuda.ts';
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
import { machineMemory } from './machine.ts';
import { loadNative, type NativeAddon } from './native.ts';

/** Where tensors live. The number of a device in the native core is its place here. */
export const devices = ['cpu', 'cuda', 'plan'] as const;
/** `plan` is a device that is only thought of: see {@link rehearse}. */
export type Device = (typeof devices)[number];

export interface EngineOptions {
  /** Where tensors are made from now on. Default `cpu`. */
  device?: Device;
  /** Most bytes that tensors may take together. Default: the machine's memory, or a container's limit where that is less; the GPU's that is free. */
  memoryLimit?: number;
  /** CPU: threads that compute, the stream's own included. Default: the cores this process may use. */
  threads?: number;
  /** CPU: instruction set to use: `generic`, `avx2`, `avx512`, `neon`. Default: the best this machine has, or `LIMBECK_ISA`. */
  isa?: string;
  /** CUDA: the GPU's number. Default 0. */
  gpu?: number;
  /**
   * CUDA: bytes of temporary memory for ops that have the choice, which are the loss heads: less memory, more time. Default: a 16th
   * of the GPU's memory, and no more than about 2 GiB.
   */
  workspaceLimit?: number;
}

/** Arguments and results of native calls; twin of kIoSlots in addon.cpp. */
export const io = new Float64Array(256);
/** Slots that one output takes in `io` after a call: handle, dtype, rank, six dims. */
export const outputSlots = 9;

let addon: NativeAddon | undefined;
let current: Device = 'cpu';
const running = new Set<Device>();

/**
 * Starts an engine of this thread with options, on the device where tensors are made from now on; without it the first tensor
 * starts the CPU's with defaults.
 * @throws ConfigError `ERR_STARTED` when it runs already, or when a value makes no sense.
 * @throws DeviceError when there is no such device: `ERR_NO_CUDA` says what is missing.
 */
export function init(options: EngineOptions = {}): void {
  const { device = 'cpu' } = options;
  start(device, options);
  current = device;
}

function start(
  device: Device,
  { threads = availableParallelism(), memoryLimit = 0, isa = '', gpu = 0, workspaceLimit = 0 }: EngineOptions,
): void {
  if (device !== 'cpu' && device !== 'cuda') {
    throw new ConfigError(`init: device is '${device}'; give 'cpu' or 'cuda'`, {
      code: 'ERR_CONFIG',
      op: 'init',
      argument: 'device',
      expected: 'cpu or cuda',
      actual: device,
    });
  }
  check('threads', threads, 1, 1024);
  check('memoryLimit', Math.floor(memoryLimit), 0, 2 ** 46);
  check('gpu', gpu, 0, 63);
  check('workspaceLimit', workspaceLimit, 0, 2 ** 40);
  const loaded = loadNative();
  try {
    if (device === 'cpu') loaded.start(io, 0, memoryLimit || machineMemory(), threads, isa);
    else loaded.start(io, devices.indexOf(device), memoryLimit, cudaReady(), gpu, workspaceLimit);
  } catch (error) {
    throw typed(error);
  }
  running.add(device);
  addon = loaded;
}

function check(argument: string, value: number, from: number, to: number): void {
  if (Number.isInteger(value) && value >= from && value <= to) return;
  throw new ConfigError(`init: ${argument} is ${value}; give a whole number from ${from} to ${to}`, {
    code: 'ERR_CONFIG',
    op: 'init',
    argument,
    expected: `${from} to ${to}`,
    actual: String(value),
  });
}

/** The native core, with the engine of the current device running. */
export function native(): NativeAddon {
  if (!running.has(current)) start(current, {});
  return addon!;
}

/** Where tensors are made now. */
export function currentDevice(): Device {
  return current;
}

/** The number of the current device in the native core. @internal */
export function deviceNumber(): number {
  return devices.indexOf(current);
}

/**
 * Runs `f` with tensors made on `device`; starts its engine with defaults where needed. `f` must not be async. An op runs where its
 * tensors are, whatever the current device.
 */
export function withDevice<T>(device: Device, f: () => T): T {
  const outer = current;
  current = device;
  try {
    native();
    return f();
  } finally {
    current = outer;
  }
}

/** {@link withDevice} for an `f` that waits; until it is done, whatever else runs makes its tensors there, too. @internal */
export async function whileOn<T>(device: Device, f: () => T | Promise<T>): Promise<T> {
  const outer = current;
  current = device;
  try {
    return await f();
  } finally {
    current = outer;
  }
}

/** A device that need not be here, as plans know it. */
export interface PlannedDevice {
  /** `cpu` computes in f32, `cuda` in bf16. */
  readonly kind: 'cpu' | 'cuda';
  /** Floating-point operations of matrix products a second, in what it computes in. */
  readonly flops: number;
  /** The same with fp8 operands. */
  readonly fastFlops: number;
  /** Bytes of memory a second. */
  readonly bandwidth: number;
  /** Bytes. */
  readonly memory: number;
  /** Threads of a CPU. */
  readonly threads?: number;
  /** Compute capability times ten, and streaming multiprocessors, of a GPU. */
  readonly architecture?: number;
  readonly processors?: number;
}

/**
 * Runs `f` on a device that is only thought of: ops are checked and memory is handed out as on the real one, but nothing is computed
 * and nothing is allocated; what is read is zero. Times in {@link profile} come from the roofline. Free every tensor inside.
 * The memory that kernels of a GPU need beside their tensors is known where the CUDA library is; else that of the CPU's is taken.
 */
export async function rehearse<T>(device: PlannedDevice, f: () => T | Promise<T>): Promise<T> {
  const core = loadNative();
  const { flops, fastFlops, bandwidth, memory: bytes, threads = 1, architecture = 80, processors = 108 } = device;
  const gpu = device.kind === 'cuda';
  io.set([flops, fastFlops, bandwidth, bytes, threads, gpu ? 1 : 0, architecture, processors]);
  const number = devices.indexOf('plan');
  try {
    core.start(io, number, 0, gpu ? (cudaLibrary() ?? '') : '', 0);
  } catch (error) {
    throw typed(error);
  }
  running.add('plan');
  addon = core;
  try {
    return await whileOn('plan', f);
  } finally {
    running.delete('plan');
    core.stop(number);
  }
}

/** Counts engines of this thread: what was defined in one is unknown to the next. @internal */
export let engineNumber = 0;

/**
 * Stops the engines of this thread and frees every tensor in them; the next tensor starts a new one, on the CPU. For tests and for
 * changing options of {@link init}.
 * @throws ConfigError `ERR_BUSY` while reads are pending.
 */
export function shutdown(): void {
  if (addon === undefined) return;
  try {
    addon.stop(-1);
  } catch (error) {
    throw typed(error);
  }
  addon = undefined;
  running.clear();
  current = 'cpu';
  engineNumber++;
}

/**
 * Starts the engine for a function that computes and was told how; one that runs already stays as it is.
 * @param who names the function in the error
 * @throws ConfigError when tensors are made on another device already.
 */
export function startFor(
  who: string,
  { device, threads }: { readonly [K in 'device' | 'threads']?: EngineOptions[K] | undefined },
): void {
  if (!started()) {
    if (device === undefined && threads === undefined) return;
    init({ ...(device === undefined ? {} : { device }), ...(threads === undefined ? {} : { threads }) });
  } else if (device !== undefined && device !== current) {
    throw new ConfigError(
      `${who}: device is ${device}, but this process computes on ${current}; call init({ device: '${device}' }) before anything else`,
      { code: 'ERR_CONFIG', op: 'init', argument: 'device', expected: current, actual: device },
    );
  }
}

/** Whether an engine of this thread was started. */
export function started(): boolean {
  return running.size > 0;
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

/** Resolves when all work called so far is done, on every device; rejects with what stopped it. */
export async function sync(): Promise<void> {
  try {
    const core = native();
    await Promise.all([...running].map((device) => core.sync(devices.indexOf(device))));
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

/**
 * Memory of one of this thread's engines, without waiting for it.
 * @param device default: the current one
 */
export function memory(device: Device = current): MemoryReport {
  const number = devices.indexOf(device);
  if (number < 0) {
    throw new ConfigError(`memory: device is ${String(device)}; give one of ${devices.join(', ')}`, {
      ...{ code: 'ERR_CONFIG', op: 'memory', argument: 'device' },
      expected: devices.join(', '),
      actual: String(device),
    });
  }
  if (addon === undefined) return { live: 0, peak: 0, reserved: 0, limit: 0, tensors: 0 };
  return addon.memory(number);
}

/** Makes `memory().peak` of the current device count from now on. */
export function resetPeak(): void {
  native().resetPeak(deviceNumber());
}

/** Gives the current device's memory that is free now back to the system, once the work before this call is done. */
export function trim(): void {
  native().trim(deviceNumber());
}

/** Time by op, for finding what a step spends. */
export interface OpTime {
  readonly op: string;
  readonly count: number;
  readonly seconds: number;
  /** Most bytes that one call needed beside its tensors. */
  readonly workspace: number;
}

/** Measures every kernel that `f` enqueues on the current device. Times are those of the device, each kernel awaited. */
export async function profile(f: () => unknown): Promise<OpTime[]> {
  await sync();
  native().profile(deviceNumber(), true);
  try {
    await f();
    await sync();
    const merged = new Map<string, OpTime>();
    for (const { op, count, seconds, workspace } of native().profiled(deviceNumber())) {
      const had = merged.get(op) ?? { count: 0, seconds: 0, workspace: 0 };
      merged.set(op, {
        op,
        count: count + had.count,
        seconds: seconds + had.seconds,
        workspace: Math.max(workspace, had.workspace),
      });
    }
    return [...merged.values()].sort((a, b) => b.seconds - a.seconds);
  } finally {
    native().profile(deviceNumber(), false);
  }
}
