// Builds build/Release/limbeck_cuda_emulated.so, the CUDA backend without a GPU, and the programs of test/emulate: native/cuda as
// the C++ compiler takes it, with native/cuda/emulate in place of what only a GPU can do. For tests: users do not need it.
// Kernels are compiled with instrumentation whose functions are our own, so that every access of theirs is checked.
import { existsSync, mkdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { list, runAll, stale, stampOf } from './compile.mjs';
import { writeCudaFamilies } from './families.mjs';

const root = path.resolve(path.dirname(fileURLToPath(import.meta.url)), '..');
const native = path.join(root, 'native');
const buildFolder = path.join(root, 'build');
const library = path.join(buildFolder, 'Release', 'limbeck_cuda_emulated.so');
const objects = path.join(buildFolder, 'emulated');
const testFolder = path.join(root, 'test', 'emulate');

/** The programs that the tests are built to. */
export function emulatedPrograms() {
  return list(testFolder, '_test.cpp').map((f) => path.join(buildFolder, 'tests', `${path.basename(f, '.cpp')}.emulated`));
}

function inputs() {
  const own = ['build-emulated', 'compile', 'families'].map((name) => path.join(root, 'scripts', `${name}.mjs`));
  const folders = [...['core', 'cuda', 'cuda/emulate'].map((folder) => path.join(native, folder)), testFolder];
  return [
    path.join(native, 'build.json'),
    path.join(root, 'test', 'native', 'check.h'),
    ...own,
    ...folders.flatMap((folder) => ['.h', '.cuh', '.cpp', '.cu'].flatMap((ending) => list(folder, ending))),
  ];
}

/** A file of emulate/ stands in for the one of the same name. */
function hostSources() {
  const emulation = list(path.join(native, 'cuda', 'emulate'), '.cpp');
  const names = new Set(emulation.map((file) => path.basename(file)));
  return [...list(path.join(native, 'cuda'), '.cpp').filter((file) => !names.has(path.basename(file))), ...emulation];
}

/** Does nothing when all of it is newer than what it is made from. */
export async function buildEmulated(compiler, jobs, force) {
  const { emulated: plan, cuda } = JSON.parse(readFileSync(path.join(native, 'build.json'), 'utf8'));
  const programs = emulatedPrograms();
  const text = JSON.stringify({
    compiler: `${compiler.name} ${compiler.kind} ${compiler.major}`,
    files: inputs().map((file) => path.relative(root, file)),
  });
  const stamp = stampOf(path.join(objects, 'stamp.json'), text, [library, ...programs], inputs());
  if (!force && stamp.current()) return;
  const began = new Date();

  mkdirSync(objects, { recursive: true });
  mkdirSync(path.dirname(library), { recursive: true });
  mkdirSync(path.join(buildFolder, 'tests'), { recursive: true });
  const flags = [
    ...compiler.prefix,
    ...plan.flags,
    ...cuda.definitions.map((d) => `-D${d}`),
    ...plan.definitions.map((d) => `-D${d}`),
    `-I${native}`,
  ];
  // Other flags make other objects.
  const flagsFile = path.join(objects, 'flags.json');
  const flagsText = JSON.stringify([compiler, flags, plan.instrument]);
  const sameFlags = !force && existsSync(flagsFile) && readFileSync(flagsFile, 'utf8') === flagsText;
  const families = path.join(objects, 'families.cpp');
  writeCudaFamilies(path.join(native, 'cuda'), families);

  const tasks = [];
  const add = (source, extra = []) => {
    const object = path.join(objects, `${path.basename(path.dirname(source))}_${path.basename(source).replace('.', '_')}.o`);
    if (!sameFlags || stale(object)) {
      const args = [...flags, ...extra, '-MMD', '-MF', object.replace(/\.o$/, '.d'), '-x', 'c++', '-c', source, '-o', object];
      tasks.push({ command: compiler.command, args, label: path.relative(root, source) });
    }
    return object;
  };
  const kernels = list(path.join(native, 'cuda'), '.cu').map((source) => add(source, plan.instrument));
  const host = [families, ...[...cuda.core, ...plan.core].map((file) => path.join(native, 'core', file)), ...hostSources()].map(
    (source) => add(source),
  );
  const tests = list(testFolder, '_test.cpp').map((source) => add(source, plan.instrument));
  if (tasks.length > 0) console.error(`limbeck: compiling ${tasks.length} files of the emulated CUDA backend (${jobs} at once)`);
  rmSync(flagsFile, { force: true });
  await runAll(tasks, jobs);
  writeFileSync(flagsFile, flagsText);

  // The instrumentation's own runtime is not linked. Linked beside and renamed: a process that has the old library open keeps it.
  const link = (extra, output, label) => ({
    command: compiler.command,
    args: [...compiler.prefix, '-pthread', ...extra, ...host, ...kernels, '-ldl', '-o', output],
    label,
  });
  const shared = process.platform === 'darwin' ? ['-dynamiclib'] : ['-shared', '-Wl,-z,defs'];
  await runAll(
    [
      link(shared, `${library}.new`, 'linking limbeck_cuda_emulated.so'),
      ...tests.map((object, i) => link([object], programs[i], programs[i])),
    ],
    jobs,
  );
  renameSync(`${library}.new`, library);
  stamp.write(began);
  console.error(`limbeck: emulated CUDA backend built in ${((Date.now() - began.getTime()) / 1000).toFixed(1)} s`);
}
