// The CUDA backend's library: where it is, and what it finds on this machine.
import { execFileSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join, resolve } from 'node:path';
import { DeviceError } from './errors.ts';
import { nativePath } from './native.ts';
import { packageRoot } from './version.ts';

/** What the library told of this machine. */
export interface CudaProbe {
  /** Such as `13.0`; empty without a driver. */
  readonly driver: string;
  readonly devices: readonly {
    readonly name: string;
    /** Compute capability, such as `9.0`. */
    readonly architecture: string;
    /** Bytes. */
    readonly memory: number;
    /** Streaming multiprocessors. */
    readonly processors: number;
  }[];
  /** Libraries that are opened at run time, and where they were looked for. */
  readonly libraries: readonly {
    readonly name: string;
    readonly path: string;
    readonly version: string;
    readonly lookedIn: readonly string[];
  }[];
  /** Why there is no device to compute on; empty when there is. */
  readonly reason: string;
}

/** The library's path, or undefined with no library here: `LIMBECK_CUDA_PATH`, else the checkout's build, else the platform package. */
export function cudaLibrary(): string | undefined {
  const named = process.env.LIMBECK_CUDA_PATH;
  if (named) return resolve(named);
  const built = join(packageRoot, 'build', 'Release', 'limbeck_cuda.so');
  if (existsSync(built)) return built;
  try {
    return createRequire(import.meta.url).resolve(`@limbeck/${process.platform}-${process.arch}-cuda`);
  } catch {
    return undefined;
  }
}

let probed: CudaProbe | undefined;

/** Asks the library in a process of its own: a broken driver must not take this one along. */
export function probeCuda(): CudaProbe {
  probed ??= probe();
  return probed;
}

function nothing(reason: string): CudaProbe {
  return { driver: '', devices: [], libraries: [], reason };
}

function probe(): CudaProbe {
  const library = cudaLibrary();
  if (library === undefined) {
    const fix = existsSync(join(packageRoot, 'tsconfig.json'))
      ? 'npm run build:cuda (needs nvcc)'
      : `npm install @limbeck/${process.platform}-${process.arch}-cuda`;
    return nothing(`the CUDA backend is not installed; ${fix}`);
  }
  const script = 'process.stdout.write(require(process.argv[1]).probe(process.argv[2]))';
  try {
    const json = execFileSync(process.execPath, ['-e', script, nativePath(), library], {
      encoding: 'utf8',
      timeout: 60_000,
      stdio: ['ignore', 'pipe', 'pipe'],
    });
    return JSON.parse(json) as CudaProbe;
  } catch (error) {
    const { signal, stderr = '' } = error as { signal?: string; stderr?: string };
    const said = /Error: (.*)/.exec(stderr)?.[1] ?? stderr.trim().split('\n').at(-1) ?? '';
    return nothing(signal ? `the driver ended the process that asked it (${signal})` : said || String(error));
  }
}

/**
 * The library's path, once the machine is known to have a device for it.
 * @throws DeviceError `ERR_NO_CUDA` with what is missing.
 */
export function cudaReady(): string {
  const { reason } = probeCuda();
  const library = cudaLibrary();
  if (reason === '' && library !== undefined) return library;
  throw new DeviceError(`init: there is no CUDA device to compute on: ${reason}. Use device "cpu", or see limbeck doctor`, {
    code: 'ERR_NO_CUDA',
    op: 'init',
    argument: 'device',
    expected: 'a GPU with its driver',
    actual: reason,
  });
}
