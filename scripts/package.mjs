// Makes what is published, into build/packages: the core package, the platform package with the addon of this machine and, where it
// is built, the package with its CUDA library, which nothing installs by itself.
//   node scripts/package.mjs       prints the tarballs and the oldest system libraries that the addon runs on
import { spawnSync } from 'node:child_process';
import { copyFileSync, cpSync, existsSync, mkdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';

const root = path.resolve(path.dirname(fileURLToPath(import.meta.url)), '..');
const out = path.join(root, 'build', 'packages');
const pkg = JSON.parse(readFileSync(path.join(root, 'package.json'), 'utf8'));
const platform = `${process.platform}-${process.arch}`;
const platformName = `@limbeck/${platform}`;

// What a machine that runs Node 20 has at least: its own builds need glibc 2.28 and GCC 8's libstdc++.
const floors = { GLIBC: '2.28', GLIBCXX: '3.4.25', CXXABI: '1.3.11' };

function fail(message) {
  console.error(`limbeck: ${message}`);
  process.exit(1);
}

function run(command, args, cwd) {
  const shell = process.platform === 'win32' && command === 'npm';
  const { status, error, stdout, stderr } = spawnSync(command, args, { cwd, encoding: 'utf8', shell });
  if (error || status !== 0) fail(`${command} ${args.join(' ')} failed:\n${error?.message ?? stderr}`);
  return stdout;
}

function pack(folder) {
  const [{ filename, size, unpackedSize }] = JSON.parse(
    run('npm', ['pack', '--json', '--ignore-scripts', '--pack-destination', out], folder),
  );
  console.log(`${path.join(out, filename)}  ${(size / 1e6).toFixed(2)} MB, ${(unpackedSize / 1e6).toFixed(2)} MB unpacked`);
}

const newer = (a, b) => a.localeCompare(b, 'en', { numeric: true }) > 0;

/** The newest version of each system library's symbols that the addon asks for. */
function checkFloor(addon) {
  const symbols = spawnSync('objdump', ['-T', addon], { encoding: 'utf8' });
  if (symbols.error || symbols.status !== 0) {
    console.log('objdump is not here (apt install binutils): the oldest system that the addon runs on was not checked');
    return;
  }
  const needs = {};
  for (const [, library, version] of symbols.stdout.matchAll(/\((GLIBC|GLIBCXX|CXXABI)_([\d.]+)\)/g)) {
    if (!needs[library] || newer(version, needs[library])) needs[library] = version;
  }
  const list = Object.entries(needs).map(([library, version]) => `${library} ${version}`);
  console.log(`needs ${list.join(', ') || 'no versioned symbols'}`);
  const tooNew = Object.entries(needs).filter(([library, version]) => newer(version, floors[library]));
  for (const [library, version] of tooNew) {
    console.log(
      `  ${library} ${version} is newer than the ${floors[library]} that Node 20 itself needs: publish from an older system`,
    );
  }
}

function common() {
  const { version, license, author, repository, homepage, bugs, engines } = pkg;
  return { version, license, author, repository, homepage, bugs, engines };
}

function stage(folder, manifest, files) {
  for (const file of files) {
    const from = path.join(root, file);
    if (!existsSync(from)) continue;
    mkdirSync(path.dirname(path.join(folder, file)), { recursive: true });
    cpSync(from, path.join(folder, file), { recursive: true });
  }
  writeFileSync(path.join(folder, 'package.json'), `${JSON.stringify(manifest, null, 2)}\n`);
}

const addon = path.join(root, 'build', 'Release', 'limbeck.node');
if (!existsSync(addon)) fail('the addon is not built; run:  npm run setup');
rmSync(out, { recursive: true, force: true });
mkdirSync(out, { recursive: true });

/** A package of one binary: stripped, checked, packed. */
function packBinary(name, file, description, readme) {
  const folder = path.join(out, path.basename(name));
  const manifest = { name, description, ...common(), main: file, files: [file], os: [process.platform], cpu: [process.arch] };
  stage(folder, { ...manifest, ...(process.platform === 'linux' ? { libc: ['glibc'] } : {}) }, ['LICENSE']);
  writeFileSync(path.join(folder, 'README.md'), `# ${name}\n\n${readme}\n`);
  const packed = path.join(folder, file);
  copyFileSync(path.join(root, 'build', 'Release', file), packed);
  run('strip', [process.platform === 'darwin' ? '-x' : '--strip-unneeded', packed], root);
  console.log(`${file}  ${(statSync(packed).size / 1e6).toFixed(2)} MB`);
  if (process.platform === 'linux') checkFloor(packed);
  pack(folder);
}

const home = '[limbeck](https://www.npmjs.com/package/limbeck)';
packBinary(
  platformName,
  'limbeck.node',
  `The native core of limbeck for ${platform}`,
  `The native core of ${home} for ${platform}. Install \`limbeck\`; it brings this package along.`,
);
if (existsSync(path.join(root, 'build', 'Release', 'limbeck_cuda.so'))) {
  packBinary(
    `${platformName}-cuda`,
    'limbeck_cuda.so',
    `The CUDA kernels of limbeck for ${platform}`,
    `The CUDA kernels of ${home} for ${platform}. Install it beside \`limbeck\` on a machine with an NVIDIA GPU of compute capability 8.0 or newer.`,
  );
}

// The core package is the checkout's, less what only a checkout needs, plus the platform packages.
const { scripts: _scripts, devDependencies: _dev, files, ...manifest } = pkg;
const published = files.filter((file) => !file.startsWith('build/'));
const core = path.join(out, 'limbeck');
const entries = published.filter((file) => !file.startsWith('!'));
stage(core, { ...manifest, files: published, optionalDependencies: { [platformName]: pkg.version } }, [
  ...entries,
  'LICENSE',
  'README.md',
]);
pack(core);
console.log(`try them:  npm install ${path.join(out, '*.tgz')}`);
