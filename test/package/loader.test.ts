import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeEach, expect, test, vi } from 'vitest';
import type { LimbeckError } from '../../src/tensor/errors.ts';

const folder = mkdtempSync(join(tmpdir(), 'limbeck-loader-'));
afterAll(() => rmSync(folder, { recursive: true }));

// The loader remembers what it found: each test takes a fresh copy of the module.
beforeEach(() => {
  vi.resetModules();
});
afterEach(() => {
  vi.unstubAllEnvs();
});

async function failure(path: string): Promise<LimbeckError> {
  vi.stubEnv('LIMBECK_NATIVE_PATH', path);
  const { loadNative } = await import('../../src/tensor/native.ts');
  try {
    loadNative();
  } catch (error) {
    return error as LimbeckError;
  }
  return expect.fail('it was loaded');
}

test('a checkout loads its own build', async () => {
  const { loadNative, nativePath } = await import('../../src/tensor/native.ts');
  expect(nativePath()).toMatch(/build[\\/]Release[\\/]limbeck\.node$/);
  expect(loadNative()).toBe(loadNative());
});

test('a missing addon: every path that was tried, the machine, and what to run', async () => {
  const path = join(folder, 'nowhere.node');
  const error = await failure(path);
  expect(error).toMatchObject({ name: 'DeviceError', code: 'ERR_NATIVE_MISSING', actual: path });
  expect(error.message).toContain(`${path}\n    MODULE_NOT_FOUND`);
  expect(error.message).toContain(`Node ${process.version}, ${process.platform}-${process.arch}`);
  expect(error.message).toContain('To fix it:\n  point LIMBECK_NATIVE_PATH at limbeck.node');
});

test('a damaged addon: what the system said about it', async () => {
  const path = join(folder, 'damaged.node');
  writeFileSync(path, 'not a library');
  const error = await failure(path);
  expect(error).toMatchObject({ code: 'ERR_NATIVE_MISSING' });
  expect(error.message).toMatch(/ERR_DLOPEN_FAILED: .*(file too short|invalid ELF header|not a mach-o|slice is not valid)/i);
});

test('an addon of another version is refused before it is used', async () => {
  const path = join(folder, 'other.cjs');
  writeFileSync(path, 'module.exports = { abi: 999 };');
  const error = await failure(path);
  expect(error).toMatchObject({ name: 'DeviceError', code: 'ERR_NATIVE_ABI', argument: path, actual: '999' });
});

test('backendInfo tells the machine without starting the engine', async () => {
  const { backendInfo } = await import('../../src/tensor/info.ts');
  const { started } = await import('../../src/tensor/engine.ts');
  const info = backendInfo();
  expect(info).toMatchObject({
    node: process.version,
    platform: `${process.platform}-${process.arch}`,
    cuda: { available: false },
  });
  expect(info.cpu.compiled).toContain(info.cpu.isa);
  expect(info.cpu.threads).toBeGreaterThan(0);
  expect(info.cuda.reason).not.toBe('');
  expect(started()).toBe(false);
});

test('an instruction set that this machine or build lacks is refused by name', async () => {
  const { init } = await import('../../src/tensor/engine.ts');
  let error: unknown;
  try {
    init({ isa: 'abacus' });
  } catch (e) {
    error = e;
  }
  expect(error).toMatchObject({ name: 'DeviceError', code: 'ERR_ISA', argument: 'isa', actual: 'abacus' });
});
