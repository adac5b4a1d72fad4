// The build of the CUDA library: what it takes from the compiler's report, and what it does where there is no compiler.
import { spawnSync } from 'node:child_process';
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';

const root = join(import.meta.dirname, '../..');
const script = join(root, 'scripts/build-cuda.mjs');

interface Kernel {
  readonly file: string;
  readonly name: string;
  readonly architecture: string;
  readonly registers: number;
  readonly spillStores: number;
}
interface Report {
  readonly kernels: readonly Kernel[];
  readonly notes: readonly { readonly file: string; readonly name: string; readonly text: string }[];
}
const { findNvcc, parsePtxas, problemsOf, shortName } = (await import(script)) as {
  findNvcc(): { command: string } | undefined;
  parsePtxas(text: string): { kernels: Record<string, unknown>[]; notes: { symbol: string; text: string }[]; rest: string };
  problemsOf(report: Report): string[];
  shortName(name: string): string;
};

const said = `ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1aPf' for 'sm_80'
ptxas info    : Function properties for _Z1aPf
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 3 barriers, 16 bytes stack, 4096 bytes smem, 364 bytes cmem[0]
ptxas info    : Compile time = 11.859 ms
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to non wgmma instructions defining accumulator registers of a wgmma between start and end of the pipeline stage in the function '_Z1bPf'
ptxas info    : Compiling entry function '_Z1bPf' for 'sm_90a'
ptxas info    : Function properties for _Z1bPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers
attention.cu(12): note: something else
`;

describe("the compiler's report", () => {
  const { kernels, notes, rest } = parsePtxas(said);

  test('is read whole', () => {
    const a = { symbol: '_Z1aPf', architecture: 'sm_80', registers: 255, barriers: 3, shared: 4096, stack: 16 };
    const b = { symbol: '_Z1bPf', architecture: 'sm_90a', registers: 168, barriers: 1, shared: 0, stack: 0 };
    expect(kernels).toEqual([
      { ...a, spillStores: 8, spillLoads: 12 },
      { ...b, spillStores: 0, spillLoads: 0 },
    ]);
    expect(notes).toMatchObject([{ symbol: '_Z1bPf' }]);
    expect(rest).toBe('attention.cu(12): note: something else');
  });

  test('fails attention and loss kernels by name, others not', () => {
    const report = (file: string) =>
      ({
        kernels: kernels.map((k) => ({ file, name: k.symbol, ...k })),
        notes: notes.map((n) => ({ file, name: n.symbol, ...n })),
      }) as unknown as Report;
    expect(problemsOf(report('attention_forward.cu'))).toEqual([
      'attention_forward.cu: _Z1aPf spills registers on sm_80: 8 bytes stored, 12 loaded',
      expect.stringContaining('attention_forward.cu: _Z1bPf: (C7510)'),
    ]);
    expect(problemsOf(report('loss.cu'))).toHaveLength(2);
    expect(problemsOf(report('norm.cu'))).toEqual([]);
  });

  test('names a kernel as the source does', () => {
    expect(shortName('void limbeck::cuda::rms_norm<limbeck::cuda::ptx::bf16, (limbeck::Mode)1>(float*, int)')).toBe(
      'rms_norm<bf16, (Mode)1>',
    );
  });
});

describe('without nvcc', () => {
  const build = (args: string[]) => {
    const result = spawnSync(process.execPath, ['-e', noNvcc, script, ...args], { encoding: 'utf8' });
    return { status: result.status, text: result.stdout + result.stderr };
  };
  // As on a machine that has none: no file of that name exists.
  const noNvcc = `const fs = require('node:fs'), { existsSync } = fs;
fs.existsSync = (name) => !/nvcc$/.test(name) && existsSync(name);
require('node:module').syncBuiltinESMExports();
import(process.argv[1]);`;

  test('says so and is no error', () => {
    expect(build([])).toEqual({ status: 0, text: expect.stringContaining('the CUDA library is not built') });
  });

  test('--require makes it one', () => {
    expect(build(['--require'])).toEqual({ status: 1, text: expect.stringContaining('the CUDA toolkit') });
  });
});

describe.skipIf(findNvcc() === undefined)('with nvcc', () => {
  const library = join(root, 'build/Release/limbeck_cuda.so');
  const built = () => existsSync(library) && spawnSync('nm', ['--version']).status === 0;

  test('one function is exported, and nothing else', () => {
    if (!built()) return;
    const { stdout } = spawnSync('nm', ['-D', '--defined-only', library], { encoding: 'utf8' });
    expect(stdout.split('\n').filter((line) => line !== '' && !/ T limbeck_backend$/.test(line))).toEqual([]);
  });

  test('says where it looked for a library that is missing', () => {
    if (!built()) return;
    const script = 'process.stdout.write(require(process.argv[1]).probe(process.argv[2]))';
    const env = { ...process.env, LIMBECK_CUBLASLT_PATH: '/nowhere/libcublasLt.so' };
    const addon = join(root, 'build/Release/limbeck.node');
    const { stdout } = spawnSync(process.execPath, ['-e', script, addon, library], { encoding: 'utf8', env });
    const { libraries } = JSON.parse(stdout) as { libraries: { name: string; path: string; lookedIn: string[] }[] };
    expect(libraries.map(({ name }) => name)).toEqual(['cuBLASLt', 'NCCL']);
    expect(libraries[0]).toMatchObject({ path: '', lookedIn: [expect.stringContaining('/nowhere/libcublasLt.so: cannot open')] });
  });

  test('every kernel is compiled for both architectures', () => {
    if (!built()) return;
    const { kernels } = JSON.parse(readFileSync(join(root, 'build/cuda-resources.json'), 'utf8')) as Report;
    const of = (architecture: string) =>
      kernels
        .filter((k) => k.architecture === architecture)
        .map((k) => `${k.file} ${k.name}`)
        .sort();
    expect(of('sm_80')).toEqual(of('sm_90a'));
    expect(kernels.every((k) => k.registers > 0)).toBe(true);
  });
});
