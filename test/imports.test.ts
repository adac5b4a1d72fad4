// The layers of the source: an import may go down or sideways, never up, and never in a circle.
import { readdirSync, readFileSync } from 'node:fs';
import { dirname, join, normalize, relative } from 'node:path';
import { expect, test } from 'vitest';

const root = join(import.meta.dirname, '..');

const layers = [
  ['tensor'],
  ['ops'],
  ['nn'],
  ['models', 'data', 'tokenizer'],
  ['synth', 'distill', 'merge', 'evaluate', 'train'],
  ['plan'],
  ['cli', 'index.ts'],
];
/** What `io` may know of the layers. */
const ofIo = ['src/tensor/errors.ts', 'src/tensor/ggml.ts'];
const levelOf = (folder: string) => layers.findIndex((layer) => layer.includes(folder));

function filesOf(folder: string, ending: RegExp): string[] {
  return readdirSync(join(root, folder), { recursive: true, encoding: 'utf8' })
    .filter((name) => ending.test(name))
    .map((name) => join(folder, name))
    .sort();
}

interface Import {
  /** Relative to the root of the repository, or the name of a package. */
  readonly to: string;
  /** Gone after compilation. */
  readonly typeOnly: boolean;
}

function importsOf(file: string): Import[] {
  const text = readFileSync(join(root, file), 'utf8').replace(/^\s*\/\/.*$/gm, '');
  const found: Import[] = [];
  const statement = /^\s*(import|export)\s+(type\s+)?(?:[^'"`;]*?\sfrom\s+)?['"]([^'"]+)['"]/gm;
  for (const [, , type, to] of text.matchAll(statement)) found.push({ to: to!, typeOnly: type !== undefined });
  for (const [, to] of text.matchAll(/\bimport\(\s*['"]([^'"]+)['"]/g)) found.push({ to: to!, typeOnly: false });
  return found.map(({ to, typeOnly }) => ({ to: to.startsWith('.') ? normalize(join(dirname(file), to)) : to, typeOnly }));
}

const sources = filesOf('src', /\.ts$/);
const folderOf = (file: string) => relative('src', file).split('/')[0]!;

test('every folder of src has its place', () => {
  const known = [...layers.flat(), 'io'];
  expect([...new Set(sources.map(folderOf))].filter((folder) => !known.includes(folder))).toEqual([]);
});

test('no import goes up', () => {
  const wrong: string[] = [];
  for (const file of sources) {
    for (const { to } of importsOf(file)) {
      if (!to.startsWith('src/')) continue;
      const from = folderOf(file);
      const target = folderOf(to);
      const allowed = from === 'io' ? target === 'io' || ofIo.includes(to) : target === 'io' || levelOf(target) <= levelOf(from);
      if (!allowed) wrong.push(`${file} imports ${to}`);
    }
  }
  expect(wrong).toEqual([]);
});

test('no circle of imports, types aside', () => {
  const graph = new Map(
    sources.map((file) => [
      file,
      importsOf(file)
        .filter((i) => !i.typeOnly)
        .map((i) => i.to),
    ]),
  );
  const done = new Set<string>();
  const visit = (file: string, path: string[]): void => {
    if (path.includes(file)) expect.fail([...path.slice(path.indexOf(file)), file].join(' -> '));
    if (done.has(file)) return;
    for (const to of graph.get(file) ?? []) if (graph.has(to)) visit(to, [...path, file]);
    done.add(file);
  };
  for (const file of sources) visit(file, []);
});

test('imports name their file, and packages are declared', () => {
  const { dependencies, peerDependencies } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')) as {
    dependencies: Record<string, string>;
    peerDependencies?: Record<string, string>;
  };
  const declared = new Set(Object.keys({ ...dependencies, ...peerDependencies }));
  const wrong: string[] = [];
  for (const file of sources) {
    for (const { to } of importsOf(file)) {
      if (to.startsWith('src/') ? sources.includes(to) : to.startsWith('node:')) continue;
      const name = to
        .split('/')
        .slice(0, to.startsWith('@') ? 2 : 1)
        .join('/');
      if (!declared.has(name)) wrong.push(`${file} imports ${to}`);
    }
  }
  expect(wrong).toEqual([]);
});

test('one file loads the addon', () => {
  const loaders = sources.filter((file) => /limbeck\.node|process\.dlopen/.test(readFileSync(join(root, file), 'utf8')));
  expect(loaders).toEqual(['src/tensor/native.ts']);
  const users = sources.filter((file) => importsOf(file).some((i) => i.to === 'src/tensor/native.ts' && !i.typeOnly));
  expect(users.filter((file) => folderOf(file) !== 'tensor')).toEqual([]);
});

test('native folders know the core and themselves', () => {
  const wrong: string[] = [];
  for (const file of filesOf('native', /\.(h|cpp|cu|cuh)$/)) {
    const own = relative('native', file).split('/')[0]!;
    const text = readFileSync(join(root, file), 'utf8');
    for (const [, to] of text.matchAll(/^#include "([^"]+)"/gm)) {
      const target = to!.includes('/') ? to!.split('/')[0]! : own;
      // What Node-API shows of the text code lies between the two.
      const allowed = target === own || target === 'core' || (own === 'binding' && target === 'text');
      if (!allowed) wrong.push(`${file} includes ${to}`);
    }
  }
  expect(wrong).toEqual([]);
});
