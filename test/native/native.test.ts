// The C++ tests: every TEST of every *_test.cpp, once for each instruction set; those of test/emulate once.
import { spawnSync } from 'node:child_process';
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';

const root = join(import.meta.dirname, '../..');
const build = JSON.parse(readFileSync(join(root, 'native/build.json'), 'utf8')) as {
  isas: Record<string, { name: string }[] | undefined>;
};
const isas = build.isas[process.arch] ?? build.isas.other!;

const testsIn = (folder: string) =>
  readdirSync(folder)
    .filter((f) => f.endsWith('_test.cpp'))
    .map((f) => f.slice(0, -'.cpp'.length));
const stems = [
  ...testsIn(import.meta.dirname).flatMap((name) => isas.map((isa) => `${name}.${isa.name}`)),
  ...testsIn(join(root, 'test/emulate')).map((name) => `${name}.emulated`),
];

for (const stem of stems) {
  const program = join(root, 'build/tests', stem);
  describe(stem, () => {
    if (!existsSync(program)) {
      test('is built', () => expect.fail(`${program} is missing; run: node scripts/build-native.mjs --tests`));
      return;
    }
    const { stdout, stderr, status, signal } = spawnSync(program, { encoding: 'utf8', timeout: 60_000 });
    if (stdout.startsWith('skipped:')) {
      test.skip(stdout.split('\n')[0]!, () => {});
      return;
    }
    // Lines that a test prints come before its own `ok name` or `FAILED name`.
    let notes: string[] = [];
    let failures = 0;
    for (const line of stdout.split('\n')) {
      const result = /^(ok|FAILED) (\w+)$/.exec(line);
      if (!result) {
        notes.push(line);
        continue;
      }
      const text = notes.join('\n');
      notes = [];
      if (result[1] === 'FAILED') failures++;
      test(result[2]!, () => {
        if (result[1] === 'FAILED') expect.fail(text);
      });
    }
    test('ends cleanly', () => {
      expect({ status, signal, stderr }).toEqual({ status: failures > 0 ? 1 : 0, signal: null, stderr: '' });
      expect(notes.join('\n')).toMatch(/\d+ passed, \d+ failed/);
    });
  });
}
