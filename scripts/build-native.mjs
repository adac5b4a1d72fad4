// Builds build/Release/limbeck.node: with cmake-js where CMake is installed, else with the C++ compiler alone.
// Both follow native/build.json. Nothing is done when the addon is newer than everything that it is made from.
//
//   node scripts/build-native.mjs [--direct] [--force] [--tests] [--list]
//     --direct   use the compiler alone, though CMake is there
//     --force    look at every file again, even if the addon seems up to date
//     --tests    also build test/native/*_test.cpp, one program for each instruction set, and the emulated CUDA backend with
//                test/emulate/*_test.cpp; print the programs' paths
//     --emulated also build the emulated CUDA backend, which --tests has in it
//     --list     only print the files that the addon is made from
//
// Environment: CXX, LIMBECK_BLAS (builtin | auto | openblas | mkl | accelerate), LIMBECK_SANITIZE (address,undefined), LIMBECK_JOBS.
import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import os from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { buildEmulated, emulatedPrograms } from './build-emulated.mjs';
import { BuildError, list, run, runAll, stale, stampOf } from './compile.mjs';
import { writeFamilies } from './families.mjs';

const root = path.resolve(path.dirname(fileURLToPath(import.meta.url)), '..');
const native = path.join(root, 'native');
const buildFolder = path.join(root, 'build');
const addon = path.join(buildFolder, 'Release', 'limbeck.node');
const testFolder = path.join(root, 'test', 'native');
const require = createRequire(import.meta.url);

const has = (flag) => process.argv.includes(flag);
const jobs = Number(process.env.LIMBECK_JOBS) || os.availableParallelism();
const blas = process.env.LIMBECK_BLAS || 'builtin';
const sanitize = process.env.LIMBECK_SANITIZE || '';

const howToGetACompiler = {
  linux: 'apt install g++ | dnf install gcc-c++ | apk add g++',
  darwin: 'xcode-select --install',
  win32: 'limbeck has no native Windows build yet: use WSL',
};

/** The C++ compiler: $CXX, else the first of c++, g++ and clang++ that is new enough. */
function findCompiler() {
  const names = process.env.CXX ? [process.env.CXX] : ['c++', 'g++', 'clang++'];
  const found = [];
  for (const name of names) {
    const [command, ...prefix] = name.split(' ');
    const version = run(command, [...prefix, '--version']);
    if (!version.ok) continue;
    const clang = /clang version (\d+)/.exec(version.text);
    const apple = /Apple clang version (\d+)/.exec(version.text);
    const major = Number(clang?.[1] ?? run(command, [...prefix, '-dumpversion']).text.split('.')[0]);
    const kind = clang ? 'clang' : 'gcc';
    if (major >= (clang ? 14 : 11) || apple) return { name, command, prefix, kind, major };
    found.push(`${name} is ${kind} ${major}`);
  }
  const tried = found.length > 0 ? `too old: ${found.join(', ')}` : `none found (tried ${names.join(', ')})`;
  throw new BuildError(
    `limbeck: a C++ compiler is needed to build the native core: g++ 11 or newer, or clang 14 or newer; ${tried}.\n` +
      `  Install one:  ${howToGetACompiler[process.platform] ?? howToGetACompiler.linux}\n` +
      '  or set CXX to its path, then run:  npm run build:native',
  );
}

/** Every file that the addon, or with it the C++ tests, are made from. */
function inputs(tests) {
  const files = [path.join(native, 'build.json'), path.join(native, 'CMakeLists.txt')];
  files.push(...['build-native', 'compile', 'families'].map((name) => path.join(root, 'scripts', `${name}.mjs`)));
  const folders = ['core', 'cpu', 'text', 'binding'].map((folder) => path.join(native, folder));
  if (tests) folders.push(testFolder);
  for (const folder of folders) files.push(...list(folder, '.h'), ...list(folder, '.cpp'));
  return files;
}

function stamp(compiler, tests) {
  const { version } = JSON.parse(readFileSync(require.resolve('node-addon-api/package.json'), 'utf8'));
  const made = tests ? testPrograms() : [addon];
  const text = JSON.stringify({
    compiler: `${compiler.name} ${compiler.kind} ${compiler.major}`,
    blas,
    sanitize,
    addonApi: version,
    files: inputs(tests).map((file) => path.relative(root, file)),
  });
  return stampOf(path.join(buildFolder, tests ? 'tests' : 'Release', 'stamp.json'), text, made, inputs(tests));
}

function headerFolders() {
  try {
    const api = require('node-addon-api');
    return [require('node-api-headers').include_dir, api.include_dir];
  } catch (error) {
    throw new BuildError(`limbeck: the build needs the development packages (${error.code}). Run:  npm ci`);
  }
}

function canUseCMake() {
  try {
    require.resolve('cmake-js/package.json');
  } catch {
    return false;
  }
  return run('cmake', ['--version']).ok && (run('ninja', ['--version']).ok || run('make', ['--version']).ok);
}

function withCMake(compiler, tests) {
  const cmakeJs = path.join(path.dirname(require.resolve('cmake-js/package.json')), 'bin', 'cmake-js');
  const common = ['-d', native, '-O', buildFolder, '-l', 'warn', '-p', String(jobs)];
  const options = [`--CDLIMBECK_BLAS=${blas}`, `--CDLIMBECK_SANITIZE=${sanitize}`, `--CDCMAKE_CXX_COMPILER=${compiler.command}`];
  const cmake = (args) => {
    const { status, error } = spawnSync(process.execPath, [cmakeJs, ...args], { cwd: root, stdio: ['ignore', 2, 2] });
    if (error || status !== 0) throw new BuildError('limbeck: the native build failed; the messages above say where.');
  };
  // A build folder that was configured elsewhere (a moved or copied checkout) cannot be used again.
  const cache = path.join(buildFolder, 'CMakeCache.txt');
  if (existsSync(cache) && !readFileSync(cache, 'utf8').includes(`CMAKE_HOME_DIRECTORY:INTERNAL=${native}\n`)) {
    rmSync(cache);
    rmSync(path.join(buildFolder, 'CMakeFiles'), { recursive: true, force: true });
  }
  cmake(['configure', ...common, ...options]);
  cmake(['build', ...common, ...options]);
  if (tests) cmake(['build', ...common, ...options, '-T', 'native_tests']);
}

async function withCompiler(compiler, tests) {
  if (blas !== 'builtin' && blas !== 'auto') {
    throw new BuildError(`limbeck: LIMBECK_BLAS=${blas} needs CMake, which is not here:  apt install cmake | brew install cmake`);
  }
  const build = plan();
  const { isas } = build;
  const objects = path.join(buildFolder, 'direct');
  const sanitizer = sanitize ? [`-fsanitize=${sanitize}`, '-fno-omit-frame-pointer', '-g'] : [];
  const flags = [
    ...compiler.prefix,
    ...build.flags,
    ...sanitizer,
    ...build.definitions.map((d) => `-D${d}`),
    '-DLIMBECK_BLAS_NAME="builtin"',
    `-I${native}`,
    ...headerFolders().flatMap((folder) => ['-isystem', folder]),
  ];
  mkdirSync(path.join(objects, 'tests'), { recursive: true });
  mkdirSync(path.dirname(addon), { recursive: true });
  // Other flags make other objects.
  const flagsFile = path.join(objects, 'flags.json');
  const flagsText = JSON.stringify([compiler, flags, isas, build.exact]);
  const sameFlags = existsSync(flagsFile) && readFileSync(flagsFile, 'utf8') === flagsText;
  const families = path.join(objects, 'families.cpp');
  writeFamilies(
    path.join(native, build.perIsa),
    families,
    isas.map((isa) => isa.name),
  );

  const tasks = [];
  const add = (source, object, extra = []) => {
    if (!sameFlags || stale(object)) {
      const args = [...flags, ...extra, '-MMD', '-MF', object.replace(/\.o$/, '.d'), '-c', source, '-o', object];
      tasks.push({ command: compiler.command, args, label: path.relative(root, source) });
    }
    return object;
  };
  const place = (folder, source, suffix = '') => path.join(objects, `${folder}_${path.basename(source, '.cpp')}${suffix}.o`);
  const engine = [add(families, path.join(objects, 'families.o'))];
  const binding = [];
  for (const folder of build.baseline) {
    const to = folder === 'binding' ? binding : engine;
    for (const source of list(path.join(native, folder), '.cpp')) to.push(add(source, place(folder, source)));
  }
  // The linker keeps the first copy of an inline function that several objects define: baseline first, then portable, then wider.
  const kernels = [];
  const programs = [];
  for (const isa of isas) {
    const extra = [...isa.flags, `-DLIMBECK_ISA=${isa.name}`];
    for (const source of list(path.join(native, build.perIsa), '.cpp')) {
      const exact = build.exact.files.includes(path.basename(source, '.cpp')) ? build.exact.flags : [];
      kernels.push(add(source, place('cpu', source, `.${isa.name}`), [...extra, ...exact]));
    }
    if (!tests) continue;
    for (const source of list(testFolder, '_test.cpp')) {
      const stem = `${path.basename(source, '.cpp')}.${isa.name}`;
      programs.push({
        output: path.join(buildFolder, 'tests', stem),
        object: add(source, path.join(objects, 'tests', `${stem}.o`), extra),
      });
    }
  }
  if (tasks.length > 0) console.error(`limbeck: compiling ${tasks.length} files with ${compiler.name} (${jobs} at once)`);
  rmSync(flagsFile, { force: true });
  await runAll(tasks, jobs);
  writeFileSync(flagsFile, flagsText);

  // Linked beside and renamed: a process that has the old addon open keeps it.
  const linkFlags = [...compiler.prefix, ...sanitizer];
  const link = [
    {
      command: compiler.command,
      args: [
        ...linkFlags,
        ...(build.link[process.platform] ?? build.link.linux),
        ...engine,
        ...binding,
        ...kernels,
        '-o',
        `${addon}.new`,
      ],
      label: 'linking limbeck.node',
    },
  ];
  mkdirSync(path.join(buildFolder, 'tests'), { recursive: true });
  for (const { output, object } of programs) {
    link.push({
      command: compiler.command,
      args: [...linkFlags, '-pthread', ...engine, ...kernels, object, '-o', output],
      label: output,
    });
  }
  await runAll(link, jobs);
  renameSync(`${addon}.new`, addon);
}

function plan() {
  const build = JSON.parse(readFileSync(path.join(native, 'build.json'), 'utf8'));
  return { ...build, isas: build.isas[process.arch] ?? build.isas.other };
}

/** One program for each test file and instruction set. */
function testPrograms() {
  const names = list(testFolder, '_test.cpp').map((f) => path.basename(f, '.cpp'));
  return names.flatMap((name) => plan().isas.map((isa) => path.join(buildFolder, 'tests', `${name}.${isa.name}`)));
}

async function main() {
  if (has('--list')) {
    for (const file of inputs(false)) console.log(path.relative(root, file));
    return;
  }
  const compiler = findCompiler();
  headerFolders();
  const tests = has('--tests') && testPrograms().length > 0;
  const stamps = [stamp(compiler, false), ...(tests ? [stamp(compiler, true)] : [])];
  if (has('--force') || !stamps.every((s) => s.current())) {
    const began = new Date();
    const direct = has('--direct') || !canUseCMake();
    if (direct) await withCompiler(compiler, tests);
    else withCMake(compiler, tests);
    for (const s of stamps) s.write(began);
    const seconds = ((Date.now() - began.getTime()) / 1000).toFixed(1);
    console.error(`limbeck: native core built in ${seconds} s (${direct ? compiler.name : 'cmake-js'})`);
  }
  if (tests || has('--emulated')) await buildEmulated(compiler, jobs, has('--force'));
  if (!tests) return;
  for (const program of [...testPrograms(), ...emulatedPrograms()]) console.log(program);
}

main().catch((error) => {
  console.error(error instanceof BuildError ? error.message : error);
  process.exit(1);
});
