// What is published, installed into an empty project: imported from JavaScript, from CommonJS and from TypeScript.
import { spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';

const root = join(import.meta.dirname, '../..');
const packages = join(root, 'build/packages');
const temporary: string[] = [];
afterAll(() => {
  for (const folder of temporary) rmSync(folder, { recursive: true });
});

function run(command: string, args: string[], cwd: string) {
  const env = { ...process.env };
  delete env.LIMBECK_NATIVE_PATH;
  const { status, stdout, stderr } = spawnSync(command, args, {
    cwd,
    encoding: 'utf8',
    env,
    shell: process.platform === 'win32',
  });
  return { status, stdout, text: stdout + stderr };
}

/** An empty project with these tarballs; what they depend on comes from this checkout, so that no registry is asked. */
function project(tarballs: string[]): string {
  const folder = mkdtempSync(join(tmpdir(), 'limbeck-consumer-'));
  temporary.push(folder);
  const { dependencies } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')) as {
    dependencies: Record<string, string>;
  };
  const names = [...Object.keys(dependencies), '@types/node', 'undici-types'];
  const local = Object.fromEntries(names.map((name) => [name, `file:${join(root, 'node_modules', name)}`]));
  writeFileSync(
    join(folder, 'package.json'),
    JSON.stringify({ name: 'consumer', private: true, type: 'module', dependencies: local }),
  );
  // Scripts: npm would run `prepare` of packages that come as folders, which published ones do without.
  const options = ['--offline', '--ignore-scripts', '--no-audit', '--no-fund', '--loglevel=error'];
  const installed = run('npm', ['install', ...options, ...tarballs], folder);
  expect(installed, installed.text).toMatchObject({ status: 0 });
  return folder;
}

const tarball = (pattern: RegExp) => join(packages, readdirSync(packages).find((file) => pattern.test(file))!);
const core = () => tarball(/^limbeck-\d.*\.tgz$/);
const platform = () => tarball(/^limbeck-(linux|darwin)-[^-]+-\d.*\.tgz$/);

beforeAll(() => {
  const made = run(process.execPath, [join(root, 'scripts/package.mjs')], root);
  expect(made, made.text).toMatchObject({ status: 0 });
});

describe('both packages', () => {
  let folder: string;
  beforeAll(() => {
    folder = project([core(), platform()]);
  });

  test('hold what they need and nothing else', () => {
    const listed = run('tar', ['tzf', core()], root)
      .stdout.split('\n')
      .map((line) => line.replace('package/', ''));
    const tops = [...new Set(listed.filter(Boolean).map((line) => line.split('/')[0]))].sort();
    const allowed = ['CHANGELOG.md', 'LICENSE', 'README.md', 'binding.gyp', 'dist', 'docs', 'native', 'package.json', 'scripts'];
    expect(tops.filter((top) => !allowed.includes(top!))).toEqual([]);
    const needed = ['dist/index.js', 'dist/index.d.ts', 'dist/cli/main.js', 'native/CMakeLists.txt', 'scripts/families.mjs'];
    expect(needed.filter((file) => !listed.includes(file))).toEqual([]);
    const manifest = JSON.parse(readFileSync(join(folder, 'node_modules/limbeck/package.json'), 'utf8')) as Record<
      string,
      unknown
    >;
    expect(manifest).not.toHaveProperty('scripts');
    expect(manifest).toMatchObject({ gypfile: false });
    expect(run('tar', ['tzf', platform()], root).stdout.split('\n').filter(Boolean).sort()).toEqual(
      ['LICENSE', 'README.md', 'limbeck.node', 'package.json'].map((file) => `package/${file}`),
    );
  });

  test('work from JavaScript', () => {
    writeFileSync(
      join(folder, 'main.js'),
      `import { backendInfo, tensor } from 'limbeck';
const t = tensor([1, 2, 3]);
console.log(JSON.stringify({ path: backendInfo().native.path, data: [...(await t.read())] }));
`,
    );
    const { status, stdout, text } = run(process.execPath, ['main.js'], folder);
    expect(status, text).toBe(0);
    const result = JSON.parse(stdout) as { path: string; data: number[] };
    expect(result).toEqual({ path: `@limbeck/${process.platform}-${process.arch}`, data: [1, 2, 3] });
  });

  // Twenty lines that pretrain a teacher and distil a student: JavaScript and TypeScript at once.
  const twentyLines = `import { distill, generate, pretrain } from 'limbeck';
import { writeFileSync } from 'node:fs';

writeFileSync('corpus.txt', 'The people of the United States shall keep their Union. '.repeat(300));
const shared = {
  data: { text: 'corpus.txt', validation: { text: 'corpus.txt' } },
  model: { preset: 'gemma2-nano', width: 32, hidden: 64 },
  batch: { sequences: 4, length: 32 },
  steps: 12,
};
for await (const event of pretrain({ kind: 'pretrain', output: 'teacher', tokenizer: { train: { vocabSize: 300 } }, ...shared })) {
  if (event.type === 'evaluate') console.log('teacher', event.loss.toFixed(3));
}
for await (const event of distill({ kind: 'distill', output: 'student', teacher: { checkpoint: 'teacher' }, ...shared })) {
  if (event.type === 'evaluate') console.log('student', event.loss.toFixed(3), event.kl?.toFixed(3));
}
let text = '';
for await (const piece of generate({ checkpoint: 'student', prompt: 'The people', tokens: 8 })) text += piece;
console.log('text', text.length);
`;

  test('train and distil in twenty lines', () => {
    writeFileSync(join(folder, 'train.mjs'), twentyLines);
    const { status, stdout, text } = run(process.execPath, ['train.mjs'], folder);
    expect(status, text).toBe(0);
    expect(stdout).toMatch(/^teacher \d\.\d{3}\nstudent \d\.\d{3} \d\.\d{3}\ntext \d+\n$/);
  });

  test('work from CommonJS', () => {
    writeFileSync(join(folder, 'main.cjs'), "console.log(require('limbeck').backendInfo().limbeck);\n");
    const { status, stdout, text } = run(process.execPath, ['--no-warnings', 'main.cjs'], folder);
    expect(status, text).toBe(0);
    expect(stdout.trim()).toMatch(/^\d+\.\d+\.\d+$/);
  });

  test('work from TypeScript, with types', () => {
    writeFileSync(
      join(folder, 'main.ts'),
      `import { type BackendInfo, backendInfo, tensor } from 'limbeck';
const info: BackendInfo = backendInfo();
const shape: readonly number[] = tensor([1, 2, 3, 4], [2, 2]).shape;
// @ts-expect-error: a shape is not text
tensor([1], 'two');
export const answer: string = info.cpu.isa + shape.length;
`,
    );
    const options = {
      target: 'es2022',
      module: 'nodenext',
      strict: true,
      noEmit: true,
      types: ['node'],
      lib: ['es2022'],
    };
    writeFileSync(join(folder, 'train.mts'), twentyLines);
    const files = ['main.ts', 'train.mts'];
    writeFileSync(join(folder, 'tsconfig.json'), JSON.stringify({ compilerOptions: options, files }));
    const { status, text } = run(process.execPath, [join(root, 'node_modules/typescript/bin/tsc'), '-p', '.'], folder);
    expect(status, text).toBe(0);
  }, 90_000);

  test('bring the command line', () => {
    const { status, text } = run(join(folder, 'node_modules/.bin/limbeck'), ['doctor'], folder);
    expect(status, text).toBe(0);
    expect(text).toContain(process.version);
  });
});

test('the core package alone says what to install', () => {
  const folder = project([core()]);
  expect(existsSync(join(folder, 'node_modules/@limbeck'))).toBe(false);
  writeFileSync(join(folder, 'main.js'), "import { backendInfo } from 'limbeck';\nbackendInfo();\n");
  const { status, text } = run(process.execPath, ['main.js'], folder);
  expect(status).not.toBe(0);
  expect(text).toContain('ERR_NATIVE_MISSING');
  expect(text).toContain(join('build', 'Release', 'limbeck.node'));
  expect(text).toContain(`@limbeck/${process.platform}-${process.arch}\n    MODULE_NOT_FOUND`);
  expect(text).toMatch(/To fix it:\n {2}npm install/);
});

test('the lock file names no registry and every platform', () => {
  const text = readFileSync(join(root, 'package-lock.json'), 'utf8');
  expect(text).not.toContain('"resolved"');
  const { packages } = JSON.parse(text) as { packages: Record<string, { optionalDependencies?: Record<string, string> }> };
  const missing = Object.entries(packages).flatMap(([path, { optionalDependencies }]) =>
    Object.keys(optionalDependencies ?? {}).filter(
      (name) => !packages[`node_modules/${name}`] && !packages[`${path}/node_modules/${name}`],
    ),
  );
  expect(missing).toEqual([]);
});
