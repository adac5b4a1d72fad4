// Makes a checkout ready: packages, native core, JavaScript. Each part is skipped when it is up to date.
//   node scripts/setup.mjs [--tests]     --tests also builds the C++ tests and the emulated CUDA backend, and installs test/peers
import { spawnSync } from 'node:child_process';
import { existsSync, lstatSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';

const root = path.resolve(path.dirname(fileURLToPath(import.meta.url)), '..');

function fail(message) {
  console.error(`limbeck: ${message}`);
  process.exit(1);
}

function run(command, args, what) {
  // npm is a script on Windows, which only a shell can start.
  const shell = process.platform === 'win32' && command === 'npm';
  const { status, error } = spawnSync(command, args, { cwd: root, stdio: ['ignore', 2, 2], shell });
  if (error) fail(`${what} could not start: ${error.message}`);
  if (status !== 0) process.exit(status || 1);
}

function checkNode() {
  const [major, minor] = process.versions.node.split('.').map(Number);
  if (major < 20 || (major === 20 && minor < 19)) fail(`Node ${process.versions.node} is too old; install Node 20.19 or newer`);
}

/** The packages that the lock file of a folder asks for and its node_modules lacks or has in another version. */
function missingPackages(where) {
  const installed = path.join(where, 'node_modules', '.package-lock.json');
  if (!existsSync(installed)) return ['all of them'];
  const wanted = JSON.parse(readFileSync(path.join(where, 'package-lock.json'), 'utf8')).packages;
  const found = JSON.parse(readFileSync(installed, 'utf8')).packages;
  return Object.keys(wanted).filter((name) => {
    // Optional packages of other platforms are never installed.
    if (name === '' || wanted[name].optional || wanted[name].devOptional) return false;
    return found[name]?.version !== wanted[name].version || !existsSync(path.join(where, name));
  });
}

function installPackages(where, ...options) {
  const missing = missingPackages(where);
  if (missing.length === 0) return;
  const folder = path.join(where, 'node_modules');
  if (lstatSync(folder, { throwIfNoEntry: false })?.isSymbolicLink()) {
    console.error(`limbeck: ${folder} is a link and lacks ${missing.slice(0, 3).join(', ')}; run npm ci where it points to`);
    return;
  }
  console.error(`limbeck: installing packages of ${path.relative(root, folder)} (npm ci)`);
  run('npm', ['ci', '--include=dev', '--no-audit', '--no-fund', '--loglevel=error', `--prefix=${where}`, ...options], 'npm');
}

function sources(folder) {
  return readdirSync(folder, { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile() && entry.name.endsWith('.ts'))
    .map((entry) => path.join(entry.parentPath ?? entry.path, entry.name))
    .sort();
}

function buildTypeScript() {
  const src = path.join(root, 'src');
  const dist = path.join(root, 'dist');
  const stamp = path.join(dist, '.stamp.json');
  const files = sources(src);
  const configs = ['tsconfig.json', 'tsconfig.build.json', 'package-lock.json'].map((f) => path.join(root, f));
  const names = JSON.stringify(files.map((f) => path.relative(src, f)));
  if (existsSync(stamp) && readFileSync(stamp, 'utf8') === names) {
    const built = statSync(stamp).mtimeMs;
    if ([...files, ...configs].every((f) => statSync(f).mtimeMs <= built)) return;
  }
  console.error('limbeck: compiling TypeScript');
  rmSync(dist, { recursive: true, force: true });
  run(process.execPath, [path.join(root, 'node_modules', 'typescript', 'bin', 'tsc'), '-p', 'tsconfig.build.json'], 'tsc');
  writeFileSync(stamp, names);
}

checkNode();
installPackages(root);
const tests = process.argv.includes('--tests');
if (tests) installPackages(path.join(root, 'test', 'peers'), '--ignore-scripts');
run(process.execPath, [path.join(root, 'scripts', 'build-native.mjs'), ...(tests ? ['--tests'] : [])], 'the native build');
buildTypeScript();
