// The whole way on the command line: a synthesizer of ours behind `limbeck serve`, raw texts to documents over HTTP, killed on the way.
import type { ChildProcess } from 'node:child_process';
import { mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { limbeck, limbeckHere, type Result } from '../../cli/process.ts';
import { tinyText, trainTinySynthesizer } from '../tiny.ts';

let folder: string;
let model: string;
let server: ChildProcess | undefined;
let served: Promise<Result>;
let url: string;
const texts = ['Avalon', 'Zenda', 'Laputa', 'Genovia', 'Utopia', 'Narnia'].flatMap((place) =>
  Array.from({ length: 4 }, (_, i) => tinyText(place, i, i + 1 + (i % 2))),
);

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'limbeck-instruct-'));
  model = await trainTinySynthesizer(folder);
  await writeFile(join(folder, 'texts.jsonl'), texts.map((text) => JSON.stringify({ text })).join('\n'));
  url = await new Promise((resolve, reject) => {
    served = limbeck(['serve', model, '--port', '0', '--name', 'synthesizer', '--json'], (child, out) => {
      server = child;
      const [first] = out.split('\n');
      if (out.includes('\n')) resolve((JSON.parse(first!) as { url: string }).url);
    });
    served.then(({ err }) => reject(new Error(err)), reject);
  });
}, 120_000);
afterAll(async () => {
  server?.kill('SIGTERM');
  await served;
  await rm(folder, { recursive: true, force: true });
});

const call = (output: string, ...provider: string[]) => [
  ...['synth', 'instruct', join(folder, 'texts.jsonl'), '--output', join(folder, output), '--provider', ...provider],
  ...['--rounds', '3', '--context', '480', '--max-tokens', '80', '--seed', '3', '--json'],
];
const remote = (output: string) =>
  call(output, url, '--model-name', 'synthesizer', '--dialect', 'limbeck', '--tokenizer', join(folder, 'tokenizer'));
/** What is in every file of a folder, but for the minute that the report was made in. */
const contents = async (output: string) => {
  const names = (await readdir(join(folder, output))).toSorted();
  const minute = /\d{4}-\d\d-\d\d \d\d:\d\d UTC/g;
  return Promise.all(
    names.map(async (name) => [name, (await readFile(join(folder, output, name), 'utf8')).replaceAll(minute, '')]),
  );
};

test('over HTTP it writes what the model writes in process', async () => {
  const there = await limbeckHere(remote('there'));
  expect(there).toMatchObject({ code: 0, err: '' });
  const report = JSON.parse(there.out.trim().split('\n').at(-1)!) as Record<string, number>;
  expect(report).toMatchObject({ type: 'report', texts: texts.length, tooLong: 0 });
  expect(report.pairs).toBeGreaterThan(texts.length / 4);
  expect(Object.keys(report.runs!).some((length) => Number(length) > 1)).toBe(true);
  const here = await limbeckHere(call('here', model));
  const mine = JSON.parse(here.out.trim().split('\n').at(-1)!) as Record<string, unknown>;
  expect({ ...mine, documents: report.documents }).toEqual(report);
  // The manifest names the provider.
  const data = (files: string[][]) => files.filter(([name]) => name !== 'manifest.json');
  expect(data(await contents('here'))).toEqual(data(await contents('there')));
  const documents = (await readFile(String(report.documents), 'utf8')).trim().split('\n');
  expect(documents.some((line) => (JSON.parse(line) as { mode: string }).mode !== 'raw')).toBe(true);
  for (const place of ['Avalon', 'Utopia']) expect(documents.join('\n')).toContain(tinyText(place, 0, 1).slice(0, 20));
}, 60_000);

test('killed in one stage after another, it goes on to the same bytes', async () => {
  const expected = await contents('there');
  const states: string[] = [];
  for (const stage of ['round-1', 'round-2', 'round-3']) {
    const { code, out } = await limbeck(remote('killed'), (child, written) => {
      // Not at once, so that some answers of the stage are there.
      if (written.includes(`"stage":"${stage}","state"`)) setTimeout(() => child.kill('SIGKILL'), 60);
    });
    expect(code).toBeNull();
    states.push(...out.split('\n').filter((line) => line.includes('"state"')));
  }
  const last = await limbeck(remote('killed'));
  expect(last).toMatchObject({ code: 0, err: '' });
  expect(await contents('killed')).toEqual(expected);
  // What a kill has left is gone on with.
  expect([...states, last.out].join('\n')).toMatch(/"state":"(resumed|unchanged)"/);
}, 90_000);
