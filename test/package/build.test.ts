// The native build on a machine that has nothing but Node and a compiler, in a small copy of the project.
import { spawnSync } from 'node:child_process';
import {
  chmodSync,
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  utimesSync,
  writeFileSync,
} from 'node:fs';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';

const root = join(import.meta.dirname, '../..');
const copy = mkdtempSync(join(tmpdir(), 'limbeck build ')); // paths may hold spaces
afterAll(() => rmSync(copy, { recursive: true }));

function build(args: string[] = [], env: NodeJS.ProcessEnv = {}) {
  const result = spawnSync(process.execPath, [join(copy, 'scripts/build-native.mjs'), ...args], {
    encoding: 'utf8',
    env: { ...process.env, LIMBECK_BLAS: '', LIMBECK_SANITIZE: '', ...env },
  });
  return { status: result.status, text: result.stdout + result.stderr };
}

beforeAll(() => {
  cpSync(join(root, 'scripts'), join(copy, 'scripts'), { recursive: true });
  for (const folder of ['core', 'cpu', 'binding']) mkdirSync(join(copy, 'native', folder), { recursive: true });
  for (const file of ['build.json', 'CMakeLists.txt', 'package.json'])
    cpSync(join(root, 'native', file), join(copy, 'native', file));
  for (const file of ['view.h', 'error.h', 'threads.h', 'kernel.h', 'families.h', 'cpuid.h', 'cpuid.cpp']) {
    cpSync(join(root, 'native/core', file), join(copy, 'native/core', file));
  }
  writeFileSync(
    join(copy, 'native/cpu/nothing.cpp'),
    `#include "core/kernel.h"
static void nothing(const limbeck::Call&) {}
LIMBECK_KERNELS(nothing, {"nothing", nothing})
`,
  );
  writeFileSync(
    join(copy, 'native/binding/addon.cpp'),
    `#include <node_api.h>
#include "core/cpuid.h"
NAPI_MODULE_INIT() {
  napi_value count;
  napi_create_int32(env, limbeck::choose_isa().count, &count);
  napi_set_named_property(env, exports, "families", count);
  return exports;
}
`,
  );
  symlinkSync(join(root, 'node_modules'), join(copy, 'node_modules'));
});

describe('no compiler', () => {
  test('says what is needed and how to get it', () => {
    const { status, text } = build([], { PATH: '', CXX: '' });
    expect(status).toBe(1);
    expect(text).toContain('a C++ compiler is needed');
    expect(text).toContain('npm run build:native');
    expect(text.split('\n').length).toBeLessThan(6);
  });

  test('one that is too old is named', () => {
    const old = join(copy, 'old-c++');
    writeFileSync(old, '#!/bin/sh\ncase "$1" in --version) echo "c++ (GCC) 9.4.0";; *) echo 9.4.0;; esac\n');
    chmodSync(old, 0o755);
    const { status, text } = build([], { CXX: 'old-c++', PATH: `${copy}:${process.env.PATH}` });
    expect(status).toBe(1);
    expect(text).toContain('too old: old-c++ is gcc 9');
  });
});

describe('the compiler alone', () => {
  const addon = join(copy, 'build/Release/limbeck.node');

  test('builds an addon that loads', () => {
    const { status, text } = build(['--direct']);
    expect(text).toContain('native core built');
    expect(status).toBe(0);
    expect((createRequire(import.meta.url)(addon) as { families: number }).families).toBe(1);
  });

  test('does nothing when nothing changed', () => {
    const before = statSync(addon).mtimeMs;
    expect(build(['--direct'])).toEqual({ status: 0, text: '' });
    expect(statSync(addon).mtimeMs).toBe(before);
  });

  test('compiles only what a change reaches', () => {
    const now = new Date();
    utimesSync(join(copy, 'native/core/cpuid.h'), now, now);
    expect(build(['--direct']).text).toContain('compiling 2 files'); // cpuid.cpp and addon.cpp
  });

  test('follows a kernel file that is renamed or removed', () => {
    renameSync(join(copy, 'native/cpu/nothing.cpp'), join(copy, 'native/cpu/other.cpp'));
    const wrong = build(['--direct']);
    expect(wrong.status).toBe(1);
    expect(wrong.text).toContain('LIMBECK_KERNELS(nothing, ...) must be named after the file: other');
    rmSync(join(copy, 'native/cpu/other.cpp'));
    expect(build(['--direct']).status).toBe(0);
  });

  test('an error in the source fails the build and keeps the addon', () => {
    writeFileSync(join(copy, 'native/cpu/broken.cpp'), 'this is not C++\n');
    const { status, text } = build(['--direct']);
    expect(status).toBe(1);
    expect(text).toContain('broken.cpp');
    expect(existsSync(addon)).toBe(true);
    rmSync(join(copy, 'native/cpu/broken.cpp'));
  });

  test('a BLAS is not left out in silence', () => {
    const { status, text } = build(['--direct', '--force'], { LIMBECK_BLAS: 'openblas' });
    expect(status).toBe(1);
    expect(text).toContain('LIMBECK_BLAS=openblas needs CMake');
  });
});

describe('objects of a wider instruction set', () => {
  // The linker keeps one copy of an inline function, the first. One that was compiled for AVX-512 would crash an older processor.
  const build = join(root, 'build/CMakeFiles');
  const folders = (existsSync(build) ? readdirSync(build) : []).filter((name) => /^(limbeck|engine|cpu_\w+)\.dir$/.test(name));
  const wide = folders.filter((name) => /^cpu_(?!generic|neon)/.test(name));
  const hasNm = wide.length > 0 && spawnSync('nm', ['--version']).status === 0;

  function inline(folder: string): string[] {
    const objects = readdirSync(join(build, folder), { recursive: true, encoding: 'utf8' }).filter((file) => file.endsWith('.o'));
    const options = { cwd: join(build, folder), encoding: 'utf8', maxBuffer: 1 << 28 } as const;
    return [...spawnSync('nm', ['--defined-only', ...objects], options).stdout.matchAll(/^[0-9a-f]+ [WVu] (\S+)$/gm)].map(
      (m) => m[1]!,
    );
  }

  test.skipIf(!hasNm)('share no inline function that objects before them lack', () => {
    const before = new Set(folders.filter((folder) => !wide.includes(folder)).flatMap(inline));
    for (const folder of wide) {
      const isa = /^cpu_(\w+)\.dir$/.exec(folder)![1]!;
      const own = `3cpu${isa.length}${isa}`;
      expect(inline(folder).filter((symbol) => !symbol.includes(own) && !before.has(symbol))).toEqual([]);
    }
  });
});
