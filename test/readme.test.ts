// The examples of the README do what they say.
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { expect, test, vi } from 'vitest';

const root = new URL('..', import.meta.url).pathname;

/** The TypeScript blocks of the README. */
async function examples(): Promise<string[]> {
  const text = await readFile(join(root, 'README.md'), 'utf8');
  return [...text.matchAll(/```ts\n(.*?)```/gs)].map((m) => m[1]!.replace("from 'limbeck'", `from '${root}src/index.ts'`));
}

test('the example of an own model learns', async () => {
  const code = (await examples()).find((block) => block.includes('createParameters'))!;
  const folder = await mkdtemp(join(root, 'test/.readme-'));
  const printed: number[] = [];
  const log = vi.spyOn(console, 'log').mockImplementation((value: number) => void printed.push(value));
  try {
    await writeFile(join(folder, 'example.ts'), `${code}\noptimizer.dispose();\nmodel.dispose();\n`);
    await import(join(folder, 'example.ts'));
  } finally {
    log.mockRestore();
    await rm(folder, { recursive: true });
  }
  expect(printed).toHaveLength(5);
  expect(printed.at(-1)).toBeLessThan(printed[0]! / 2);
});
