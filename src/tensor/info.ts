// What limbeck runs on.
import { availableParallelism, cpus, freemem } from 'node:os';
import { type CudaProbe, cudaLibrary, probeCuda } from './cuda.ts';
import { machineMemory } from './machine.ts';
import { libc, loadNative, nativePath } from './native.ts';
import { packageVersion } from './version.ts';

/** The machine, the build and the backends, as `limbeck doctor` shows them. */
export interface BackendInfo {
  readonly limbeck: string;
  readonly node: string;
  readonly napi: string;
  /** Such as `linux-x64`. */
  readonly platform: string;
  /** Such as `glibc 2.36`; empty where it does not apply. */
  readonly libc: string;
  readonly cpu: {
    readonly available: true;
    readonly model: string;
    /** Cores that this process may use. */
    readonly cores: number;
    /** Threads that compute. */
    readonly threads: number;
    /** The instruction set in use. */
    readonly isa: string;
    /** The instruction sets that were compiled, the widest last. */
    readonly compiled: readonly string[];
    /** What plain matrix products run on. */
    readonly blas: string;
  };
  readonly cuda: CudaProbe & {
    readonly available: boolean;
    /** Where the backend's library is; empty without one. */
    readonly path: string;
  };
  /** Bytes of the machine; in a container that allows less, `total` is that. */
  readonly memory: { readonly total: number; readonly free: number };
  readonly native: { readonly path: string; readonly compiler: string };
}

/**
 * Tells versions, processor, instruction sets, threads, BLAS and which backends there are, and why one is not. Starts nothing.
 * @throws DeviceError `ERR_NATIVE_MISSING` when the native core cannot be loaded.
 */
export function backendInfo(): BackendInfo {
  const native = loadNative().info();
  const cuda = probeCuda();
  return {
    limbeck: packageVersion(),
    node: process.version,
    napi: process.versions.napi ?? '',
    platform: `${process.platform}-${process.arch}`,
    libc: libc(),
    cpu: {
      available: true,
      model: cpus()[0]?.model.trim() || 'unknown',
      cores: availableParallelism(),
      threads: native.threads ?? availableParallelism(),
      isa: native.isa ?? '',
      compiled: native.compiled,
      blas: native.blas,
    },
    cuda: { available: cuda.reason === '', path: cudaLibrary() ?? '', ...cuda },
    memory: { total: machineMemory(), free: freemem() },
    native: { path: nativePath(), compiler: native.compiler },
  };
}
