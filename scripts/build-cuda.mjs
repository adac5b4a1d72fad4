// Builds build/Release/limbeck_cuda.so from native/cuda with nvcc, as native/build.json says: for the architectures listed there and,
// as PTX, for later ones. The CUDA runtime is inside; the driver, cuBLASLt and NCCL are found when the library is used.
//
//   node scripts/build-cuda.mjs [--require] [--force] [--report]
//     --require   no nvcc is an error; without it, it is said and nothing is built
//     --force     compile every file again
//     --report    print what the compiler said of each kernel: registers, shared memory, spills
//
// build/cuda-resources.json has the same as data. A kernel of attention* or loss* that spills registers, or whose wgmma instructions
// were serialised, fails the build.
//
// Environment: CUDA_HOME, LIMBECK_JOBS (default 2: one compilation of kernels takes a gigabyte).
import { existsSync, mkdirSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { BuildError, list, run, runAll, stale, stampOf } from './compile.mjs';
import { writeCudaFamilies } from './families.mjs';

const root = path.resolve(path.dirname(fileURLToPath(import.meta.url)), '..');
const native = path.join(root, 'native');
const buildFolder = path.join(root, 'build');
const library = path.join(buildFolder, 'Release', 'limbeck_cuda.so');
const objects = path.join(buildFolder, 'cuda');
const report = path.join(buildFolder, 'cuda-resources.json');
const jobs = Math.min(Number(process.env.LIMBECK_JOBS) || 2, 2);

/** Families whose kernels are laid out so that every register counts. */
const strict = /^(attention|loss)/;

/** Where nvcc may be: CUDA_HOME, PATH, /usr/local/cuda*, newest first. */
function candidates() {
  const { CUDA_HOME, CUDA_PATH, PATH = '' } = process.env;
  const installed = existsSync('/usr/local')
    ? readdirSync('/usr/local')
        .filter((name) => /^cuda(-|$)/.test(name))
        .sort((a, b) => b.localeCompare(a, 'en', { numeric: true }))
    : [];
  const homes = [CUDA_HOME, CUDA_PATH].filter(Boolean).map((home) => path.join(home, 'bin'));
  const folders = [...homes, ...PATH.split(path.delimiter), ...installed.map((name) => path.join('/usr/local', name, 'bin'))];
  return [...new Set(folders.filter(Boolean).map((folder) => path.join(folder, 'nvcc')))];
}

/** The CUDA compiler { command, version }, or undefined. */
export function findNvcc() {
  for (const command of candidates()) {
    if (!existsSync(command)) continue;
    const version = /release [\d.]+, V([\d.]+)/.exec(run(command, ['--version']).text)?.[1];
    if (version !== undefined) return { command, version };
  }
  return undefined;
}

/**
 * What ptxas -v said of each kernel.
 * @returns kernels { symbol, architecture, registers, barriers, shared, stack, spillStores, spillLoads }, sizes in bytes; notes
 * { symbol, text } of what it could not make fast; and the text that is neither.
 */
export function parsePtxas(text) {
  const kernels = [];
  const notes = [];
  const rest = [];
  let now; // the kernel that the lines are about
  let about = ''; // the function of the properties that follow
  const lines = [
    [
      /^ptxas\s+info\s*: Compiling entry function '(.+)' for '(.+)'/,
      (symbol, architecture) => {
        now = { symbol, architecture, registers: 0, barriers: 0, shared: 0, stack: 0, spillStores: 0, spillLoads: 0 };
        kernels.push(now);
      },
    ],
    [/^ptxas\s+\w+\s*: Function properties for (.+)/, (symbol) => (about = symbol)],
    [
      /^\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads/,
      (stack, stores, loads) => {
        if (now === undefined) return;
        // Functions that a kernel calls are listed after it: what they spill is the kernel's.
        if (about === now.symbol) now.stack = Number(stack);
        now.spillStores += Number(stores);
        now.spillLoads += Number(loads);
      },
    ],
    [
      /^ptxas\s+info\s*: Used (\d+) registers(?:, used (\d+) barriers)?(?:.* (\d+) bytes smem)?/,
      (registers, barriers = 0, shared = 0) => {
        const used = { registers: Number(registers), barriers: Number(barriers), shared: Number(shared) };
        if (now !== undefined && about === now.symbol) Object.assign(now, used);
      },
    ],
    [/^ptxas\s+\w+\s*: (.*(?:\(C75\d\d\)|wgmma.*serialized).*'(.+?)'.*)/, (note, symbol) => notes.push({ symbol, text: note })],
    [/^ptxas\s+info\s*: (?:\d+ bytes gmem|Compile time)|^\s*$/, () => {}],
  ];
  for (const line of text.split('\n')) {
    const known = lines.some(([pattern, take]) => {
      const found = pattern.exec(line);
      if (found !== null) take(...found.slice(1));
      return found !== null;
    });
    if (!known) rest.push(line);
  }
  return { kernels, notes, rest: rest.join('\n') };
}

/** What fails a build, one line each: spills and serialised wgmma where every register counts. */
export function problemsOf({ kernels, notes }) {
  const spilled = kernels.filter((k) => strict.test(k.file) && k.spillStores + k.spillLoads > 0);
  const serialised = notes.filter((n) => strict.test(n.file));
  return [
    ...spilled.map(
      (k) => `${k.file}: ${k.name} spills registers on ${k.architecture}: ${k.spillStores} bytes stored, ${k.spillLoads} loaded`,
    ),
    ...serialised.map((n) => `${n.file}: ${n.name}: ${n.text}`),
  ];
}

/** Symbols as they read in the source, without namespaces and parameters; as they are where c++filt is not installed. */
function readable(symbols) {
  const { ok, text } = run('c++filt', [], { input: symbols.join('\n') });
  const lines = text.split('\n');
  return new Map(symbols.map((symbol, i) => [symbol, ok ? shortName(lines[i] ?? symbol) : symbol]));
}

export function shortName(name) {
  const plain = name.replace(/\(anonymous namespace\)::|limbeck::cuda::(ptx::)?|limbeck::/g, '').replace(/^void /, '');
  let depth = 0;
  for (let i = 0; i < plain.length; i++) {
    if (plain[i] === '<') depth++;
    else if (plain[i] === '>') depth--;
    else if (plain[i] === '(' && depth === 0) return plain.slice(0, i);
  }
  return plain;
}

function inputs() {
  const own = ['build-cuda', 'compile', 'families'].map((name) => path.join(root, 'scripts', `${name}.mjs`));
  const folders = ['core', 'cuda'].map((folder) => path.join(native, folder));
  return [
    path.join(native, 'build.json'),
    ...own,
    ...folders.flatMap((folder) => ['.h', '.cuh', '.cpp', '.cu'].flatMap((ending) => list(folder, ending))),
  ];
}

async function build(nvcc, force) {
  const plan = JSON.parse(readFileSync(path.join(native, 'build.json'), 'utf8')).cuda;
  const flags = [
    ...plan.flags,
    ...plan.host.map((flag) => `-Xcompiler=${flag}`),
    ...plan.definitions.map((d) => `-D${d}`),
    `-I${native}`,
    ...plan.architectures.map((architecture) => `-gencode=${architecture}`),
  ];
  mkdirSync(objects, { recursive: true });
  mkdirSync(path.dirname(library), { recursive: true });
  const flagsFile = path.join(objects, 'flags.json');
  const flagsText = JSON.stringify([nvcc, flags]);
  const sameFlags = !force && existsSync(flagsFile) && readFileSync(flagsFile, 'utf8') === flagsText;
  const families = path.join(objects, 'families.cpp');
  writeCudaFamilies(path.join(native, 'cuda'), families);

  const units = [
    families,
    ...plan.core.map((file) => path.join(native, 'core', file)),
    ...list(path.join(native, 'cuda'), '.cpp'),
    ...list(path.join(native, 'cuda'), '.cu'),
  ].map((source) => {
    const object = path.join(objects, `${path.basename(path.dirname(source))}_${path.basename(source).replace('.', '_')}.o`);
    return { source, object, said: object.replace(/\.o$/, '.json') };
  });
  const old = units.filter(({ object, said }) => !sameFlags || stale(object) || !existsSync(said));
  if (old.length > 0) console.error(`limbeck: compiling ${old.length} CUDA files with nvcc ${nvcc.version} (${jobs} at once)`);
  rmSync(flagsFile, { force: true });
  const tasks = old.map(({ source, object, said }) => ({
    command: nvcc.command,
    args: [...flags, '-MMD', '-MF', object.replace(/\.o$/, '.d'), '-c', source, '-o', object],
    label: path.relative(root, source),
    said(text, ok) {
      const { kernels, notes, rest } = parsePtxas(text);
      if (rest !== '') console.error(rest);
      if (ok) writeFileSync(said, JSON.stringify({ file: path.basename(source), kernels, notes }));
      else rmSync(object, { force: true });
    },
  }));
  await runAll(tasks, jobs);
  writeFileSync(flagsFile, flagsText);

  const resources = collect(nvcc, units);
  writeFileSync(report, `${JSON.stringify(resources, null, 1)}\n`);
  const problems = problemsOf(resources);
  if (problems.length > 0) {
    throw new BuildError(`limbeck: kernels that must not lose registers or overlap do:\n  ${problems.join('\n  ')}`);
  }

  // Nothing but the one function is seen from outside. Linked beside and renamed: a process that has the old library open keeps it.
  const symbols = path.join(objects, 'exports.map');
  writeFileSync(symbols, '{ global: limbeck_backend; local: *; };\n');
  const link = ['-shared', '-cudart=static', `-Xlinker=--version-script=${symbols}`, '-Xlinker=-z,defs'];
  const libraries = ['-ldl', '-lpthread'];
  await runAll(
    [
      {
        command: nvcc.command,
        args: [
          ...link,
          ...plan.architectures.map((a) => `-gencode=${a}`),
          ...units.map((u) => u.object),
          ...libraries,
          '-o',
          `${library}.new`,
        ],
        label: 'linking limbeck_cuda.so',
      },
    ],
    1,
  );
  renameSync(`${library}.new`, library);
}

function collect(nvcc, units) {
  const files = units.map(({ said }) => JSON.parse(readFileSync(said, 'utf8')));
  const symbols = files.flatMap(({ kernels, notes }) => [...kernels, ...notes].map((k) => k.symbol));
  const names = readable([...new Set(symbols)]);
  const named = (what) =>
    files.flatMap((f) => f[what].map(({ symbol, ...k }) => ({ file: f.file, name: names.get(symbol), ...k })));
  return { nvcc: nvcc.version, kernels: named('kernels'), notes: named('notes') };
}

function printReport() {
  if (!existsSync(report)) throw new BuildError('limbeck: there is no report yet; run:  npm run build:cuda');
  const { nvcc, kernels, notes } = JSON.parse(readFileSync(report, 'utf8'));
  console.log(`Kernels as nvcc ${nvcc} compiled them; static shared memory, stack and spills in bytes.\n`);
  console.log('| File | Kernel | Target | Registers | Barriers | Shared | Stack | Spilled |');
  console.log('|---|---|---|--:|--:|--:|--:|--:|');
  for (const k of kernels) {
    const cells = [k.registers, k.barriers, k.shared, k.stack, k.spillStores + k.spillLoads];
    console.log(`| ${k.file} | \`${k.name}\` | ${k.architecture} | ${cells.join(' | ')} |`);
  }
  for (const n of notes) console.log(`\n${n.file}: \`${n.name}\`: ${n.text}`);
}

async function main() {
  const has = (flag) => process.argv.includes(flag);
  const nvcc = findNvcc();
  if (nvcc === undefined) {
    const places = `looked for nvcc in CUDA_HOME, PATH and /usr/local/cuda*`;
    if (has('--require')) throw new BuildError(`limbeck: the CUDA toolkit (12.4 or newer) is needed and not here: ${places}`);
    console.error(`limbeck: the CUDA library is not built, the CPU is not concerned: ${places}`);
  } else {
    const text = JSON.stringify({ nvcc, files: inputs().map((file) => path.relative(root, file)) });
    const stamp = stampOf(path.join(objects, 'stamp.json'), text, [library, report], inputs());
    if (has('--force') || !stamp.current()) {
      const began = new Date();
      await build(nvcc, has('--force'));
      stamp.write(began);
      const seconds = ((Date.now() - began.getTime()) / 1000).toFixed(1);
      console.error(`limbeck: CUDA library built in ${seconds} s (nvcc ${nvcc.version})`);
    }
  }
  if (has('--report')) printReport();
}

if (process.argv[1] !== undefined && path.resolve(process.argv[1]) === fileURLToPath(import.meta.url)) {
  main().catch((error) => {
    console.error(error instanceof BuildError ? error.message : error);
    process.exit(1);
  });
}
