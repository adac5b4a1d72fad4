// The only file that loads the addon.
import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join, resolve } from 'node:path';
import { DeviceError } from './errors.ts';
import { packageVersion, packageRoot as root } from './version.ts';

/** Twin of kAbi in native/binding/addon.cpp: raised when the meaning of a function or of the shared array changes. */
export const abi = 3;

/** A tensor's number in the native engine; 0 is none. */
export type Handle = number;

/** How the addon read an op's signature. */
export interface OpDefinition {
  readonly id: number;
  readonly op: string;
  readonly arguments: readonly { readonly name: string; readonly scalar: boolean }[];
  readonly inputs: readonly TensorDefinition[];
  readonly outputs: readonly TensorDefinition[];
  readonly aliases: readonly { readonly name: string; readonly of: string }[];
}

export interface TensorDefinition {
  readonly name: string;
  readonly optional: boolean;
  readonly inPlace: boolean;
  readonly accumulates: boolean;
  /** Whether it is f32 whatever the call computes in. */
  readonly f32: boolean;
}

/** What the addon exports. Shapes and the arguments of `call` travel in the array given to `start`. */
export interface NativeAddon {
  readonly abi: number;
  /**
   * Starts a device's engine: `threads, isa` for the CPU (0), `library, number, workspaceLimit` for CUDA (1), and for a plan (2)
   * `library` or '' with numbers in `io`. A limit of 0 is the device's default.
   */
  start(io: Float64Array, device: number, memoryLimit: number, a: number | string, b: number | string, c?: number): void;
  /** Stops one device's engine, or all with -1. */
  stop(device: number): void;
  define(signature: string): OpDefinition;
  call(op: number): void;
  create(device: number, dtype: number, rank: number): Handle;
  view(of: Handle, offset: number, rank: number): Handle;
  release(handle: Handle): void;
  write(handle: Handle, data: ArrayBufferView): void;
  read<T extends ArrayBufferView>(handle: Handle, into: T): Promise<T>;
  sync(device: number): Promise<void>;
  memory(device: number): { live: number; peak: number; reserved: number; limit: number; tensors: number };
  resetPeak(device: number): void;
  trim(device: number): void;
  profile(device: number, on: boolean): void;
  profiled(device: number): { op: string; count: number; seconds: number; workspace: number }[];
  capture(device: number): void;
  captured(device: number): number;
  replay(device: number, graph: number): void;
  drop(device: number, graph: number): void;
  /** float16 bits to float32 values. */
  widenHalf(bits: Uint16Array, into: Float32Array): void;
  /** bfloat16 bits to float32 values. */
  widenBf16(bits: Uint16Array, into: Float32Array): void;
  /** What a backend library says of this machine, as JSON. */
  probe(library: string): string;
  /** `isa` and `threads` are those of the running engine, or those it would start with. */
  info(): { compiled: string[]; isa?: string; threads?: number; blas: string; compiler: string };
}

/** The C library of this process on Linux, such as `glibc 2.36` or `musl`; empty elsewhere. */
export function libc(): string {
  if (process.platform !== 'linux') return '';
  const report = process.report.getReport() as unknown as { header: { glibcVersionRuntime?: string } };
  const version = report.header.glibcVersionRuntime;
  return version === undefined ? 'musl' : `glibc ${version}`;
}

interface Attempt {
  readonly path: string;
  readonly reason: string;
}

let loaded: { addon: NativeAddon; path: string } | undefined;

/**
 * Loads the native core, once for each thread: `LIMBECK_NATIVE_PATH` if that is set, else `build/Release` of a checkout, else the
 * platform package.
 * @throws DeviceError `ERR_NATIVE_MISSING` with every path that was tried, or `ERR_NATIVE_ABI` for an addon of another version.
 */
export function loadNative(): NativeAddon {
  return found().addon;
}

/** Where the native core was loaded from. */
export function nativePath(): string {
  return found().path;
}

function found(): { addon: NativeAddon; path: string } {
  if (loaded !== undefined) return loaded;
  const require = createRequire(import.meta.url);
  const platform = `${process.platform}-${process.arch}`;
  const named = process.env.LIMBECK_NATIVE_PATH;
  const candidates = named ? [resolve(named)] : [join(root, 'build', 'Release', 'limbeck.node'), `@limbeck/${platform}`];
  const attempts: Attempt[] = [];
  for (const path of candidates) {
    let addon: NativeAddon;
    try {
      addon = require(path) as NativeAddon;
    } catch (error) {
      const { code, message } = error as NodeJS.ErrnoException;
      // Node's own text repeats the stack of requires; its first line says what happened.
      attempts.push({ path, reason: `${code ?? 'Error'}: ${message.split('\n')[0]}` });
      continue;
    }
    if (addon.abi !== abi) throw wrongVersion(path, addon.abi);
    loaded = { addon, path };
    return loaded;
  }
  throw missing(platform, attempts);
}

function fix(platform: string): string {
  if (process.env.LIMBECK_NATIVE_PATH) return 'point LIMBECK_NATIVE_PATH at limbeck.node, or unset it';
  if (existsSync(join(root, 'tsconfig.json'))) return 'npm run build:native';
  if (platform === 'linux-x64' && libc() !== 'musl') return `npm install @limbeck/${platform}@${packageVersion()}`;
  // No binary is published for this platform; the sources are in the package.
  return `npm install node-addon-api@8 node-api-headers@1 && node ${join(root, 'scripts', 'build-native.mjs')}`;
}

function missing(platform: string, attempts: readonly Attempt[]): DeviceError {
  const machine = `Node ${process.version}, ${[platform, libc()].filter(Boolean).join(', ')}`;
  const tried = attempts.map(({ path, reason }) => `  ${path}\n    ${reason}`).join('\n');
  return new DeviceError(
    `limbeck: the native core could not be loaded (${machine}). Tried:\n${tried}\nTo fix it:\n  ${fix(platform)}`,
    {
      code: 'ERR_NATIVE_MISSING',
      op: 'load',
      expected: `limbeck.node for ${platform}`,
      actual: attempts.map(({ path }) => path).join(', '),
    },
  );
}

function wrongVersion(path: string, actual: unknown): DeviceError {
  const platform = `${process.platform}-${process.arch}`;
  return new DeviceError(
    `limbeck: the native core at ${path} speaks version ${String(actual)}, this package speaks ${abi}. To fix it:\n  ${fix(platform)}`,
    { code: 'ERR_NATIVE_ABI', op: 'load', argument: path, expected: String(abi), actual: String(actual) },
  );
}
