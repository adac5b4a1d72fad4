// The examples of the README do what they say.
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { expect, test, vi } from 'vitest';
import { factbookProse, factbookRows } from '../examples/factbook.ts';
import { createModel, modelConfig, saveModel } from '../src/models/model.ts';
import { trainTokenizer } from '../src/tokenizer/train.ts';

const root = new URL('..', import.meta.url).pathname;

/** The TypeScript blocks of the README. */
async function examples(): Promise<string[]> {
  const text = await readFile(join(root, 'README.md'), 'utf8');
  return [...text.matchAll(/```ts\n(.*?)```/gs)].map((m) => m[1]!.replace("from 'limbeck'", `from '${root}src/index.ts'`));
}

/** What the block that has `word` in it prints, run in a folder of its own. */
async function run(word: string, prepare: (code: string, folder: string) => Promise<string> | string): Promise<number[][]> {
  const code = (await examples()).find((block) => block.includes(word))!;
  const folder = await mkdtemp(join(root, 'test/.readme-'));
  const printed: number[][] = [];
  const log = vi.spyOn(console, 'log').mockImplementation((...values: number[]) => void printed.push(values));
  try {
    await writeFile(join(folder, 'example.ts'), await prepare(code, folder));
    await import(join(folder, 'example.ts'));
  } finally {
    log.mockRestore();
    await rm(folder, { recursive: true });
  }
  return printed;
}

test('the example of finetuning learns', async () => {
  const printed = await run('finetune(', async (code, folder) => {
    const tokenizer = await trainTokenizer(factbookProse().slice(0, 20), { vocabSize: 800 });
    const model = createModel(modelConfig('gpt2-nano', { vocabSize: tokenizer.vocabSize }), { seed: 1 });
    await saveModel(join(folder, 'base'), model, tokenizer);
    model.dispose();
    await writeFile(join(folder, 'rows.json'), JSON.stringify(factbookRows().slice(0, 60)));
    return code
      .replace('runs/chat', join(folder, 'chat'))
      .replace('runs/student', join(folder, 'base'))
      .replace('instructions.json', join(folder, 'rows.json'));
  });
  expect(printed.map(([step]) => step)).toEqual([0, expect.any(Number)]);
  expect(printed[1]![1]).toBeLessThan(printed[0]![1]!);
});

test('the example of an own model learns', async () => {
  const finish = 'optimizer.dispose();\nmodel.dispose();\n';
  const printed = (await run('createParameters', (code) => `${code}\n${finish}`)).map(([loss]) => loss!);
  expect(printed).toHaveLength(5);
  expect(printed.at(-1)).toBeLessThan(printed[0]! / 2);
});
