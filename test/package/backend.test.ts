// The CUDA library as the loader meets it: missing, of another version, without a driver.
import { execFileSync } from 'node:child_process';
import { existsSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, describe, expect, test, vi } from 'vitest';

const folder = mkdtempSync(join(tmpdir(), 'limbeck-backend-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));
afterEach(() => {
  vi.unstubAllEnvs();
  vi.resetModules();
});

async function fresh(library: string) {
  vi.stubEnv('LIMBECK_CUDA_PATH', library);
  vi.resetModules();
  return { ...(await import('../../src/tensor/engine.ts')), ...(await import('../../src/tensor/info.ts')) };
}

test('a library that is not there is named, and doctor says the same', async () => {
  const { init, backendInfo } = await fresh(join(folder, 'nothing.so'));
  expect(() => init({ device: 'cuda' })).toThrow(/no CUDA device to compute on: .*nothing\.so: cannot open/);
  expect(() => init({ device: 'cuda' })).toThrow(expect.objectContaining({ code: 'ERR_NO_CUDA' }));
  expect(backendInfo().cuda).toMatchObject({ available: false, reason: expect.stringContaining('nothing.so') });
});

test('a library of another version is refused before anything of it runs', async () => {
  const source = join(folder, 'old.cpp');
  const library = join(folder, 'old.so');
  const text =
    'struct Old { int abi; unsigned long call, view; }; extern "C" const Old* limbeck_backend() { static Old old = {99, 1, 1}; return &old; }';
  writeFileSync(source, text);
  execFileSync(process.env.CXX ?? 'c++', ['-shared', '-fPIC', source, '-o', library]);
  const { init } = await fresh(library);
  expect(() => init({ device: 'cuda' })).toThrow(/old\.so is version 99, this core needs a backend of version \d+/);
});

describe.skipIf(!existsSync('build/Release/limbeck_cuda.so') || existsSync('/dev/nvidia0'))(
  'on a machine without a driver',
  () => {
    test('the real library loads, says what is missing, and the CPU goes on', async () => {
      const { init, shutdown } = await fresh('build/Release/limbeck_cuda.so');
      expect(() => init({ device: 'cuda' })).toThrow(/there is no NVIDIA driver/);
      init();
      shutdown();
    });
  },
);
