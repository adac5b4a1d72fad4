import { existsSync } from 'node:fs';
import { mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { createModel, modelConfig, saveModel } from '../../src/models/model.ts';
import { trainTokenizer } from '../../src/tokenizer/train.ts';
import { limbeckHere } from './process.ts';

let folder: string;
const raw = ['One text about rivers.', 'Another about towns.', 'word '.repeat(150).trim(), 'The last one.'];
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'limbeck-synth-'));
  const tokenizer = await trainTokenizer(raw, { vocabSize: 280 });
  const config = modelConfig('gemma2-nano', {
    ...{ vocabSize: tokenizer.vocabSize, width: 32, layers: 1, hidden: 32, heads: 2, kvHeads: 1, headSize: 16 },
    context: 128,
  });
  const model = createModel(config, { seed: 1, trainable: false });
  await saveModel(join(folder, 'model'), model, tokenizer);
  model.dispose();
  await writeFile(join(folder, 'texts.jsonl'), raw.map((body) => JSON.stringify({ body })).join('\n'));
});
afterAll(() => rm(folder, { recursive: true, force: true }));

test('limbeck synth instruct: every text comes out, what the synthesizer wrote is counted, and again nothing is run', async () => {
  const output = join(folder, 'out');
  const call = ['synth', 'instruct', join(folder, 'texts.jsonl'), '--field', 'body', '--provider', join(folder, 'model')];
  const options = ['--output', output, '--rounds', '2', '--max-tokens', '12', '--json'];
  const first = await limbeckHere([...call, ...options]);
  expect(first.err).toBe('');
  const events = first.out
    .trim()
    .split('\n')
    .map((line) => JSON.parse(line) as Record<string, unknown>);
  const report = events.at(-1)!;
  // A model that was never trained writes no pairs; the text that does not fit into its context is not asked about.
  expect(report).toMatchObject({ type: 'report', texts: 4, withPairs: 0, tooLong: 1 });
  const documents = (await readFile(report.documents as string, 'utf8'))
    .trim()
    .split('\n')
    .map((line) => JSON.parse(line) as { text: string; mode: string });
  expect(documents.map(({ text }) => text).sort()).toEqual([...raw].sort());
  expect(documents.every(({ mode }) => mode === 'raw')).toBe(true);
  const page = await readFile(join(output, 'report.html'), 'utf8');
  expect(page).toMatch(/<dt>texts<\/dt><dd>4<\/dd>/);
  expect(page).toMatch(/<dt>too long to be asked about<\/dt><dd>1<\/dd>/);
  const again = await limbeckHere([...call, ...options]);
  expect(again.out).toContain('"state":"unchanged"');
  expect(again.out).not.toContain('"state":"started"');
  expect(JSON.parse(again.out.trim().split('\n').at(-1)!)).toEqual(report);
  const cut = await limbeckHere([...call, '--output', join(folder, 'cut'), '--max-tokens', '12', '--passage', '40', '--json']);
  expect(JSON.parse(cut.out.trim().split('\n').at(-1)!)).toMatchObject({ tooLong: 0 });
});

test('the report shows texts with their pairs', async () => {
  const text = { id: '7', context: 'The Rhine is a river.', pairs: [{ question: 'What is it?', answer: 'A <b>river</b>.' }] };
  const told = { finish: 'stop', promptTokens: 3, completionTokens: 4 };
  const unasked = { ...text, ...told, id: '8', pairs: [], malformed: [{ defect: 'unfinished', text: '' }] };
  const chain = { id: '0', texts: [{ ...text, ...told, malformed: [] }, unasked], waiting: [] };
  const output = join(folder, 'written');
  await mkdir(output);
  await writeFile(join(output, '01-round-1.jsonl'), `${JSON.stringify(chain)}\n`);
  const stage = { stage: 'round-1', hash: '', file: '01-round-1.jsonl', input: 1, records: 1, bytes: 1, dropped: {} };
  await writeFile(join(output, 'manifest.json'), JSON.stringify({ stages: [stage] }));
  const { code, err } = await limbeckHere(['synth', 'report', output]);
  expect([code, err]).toEqual([0, '']);
  const page = await readFile(join(output, 'report.html'), 'utf8');
  for (const part of ['The Rhine is a river.', 'What is it?', 'A &lt;b&gt;river', '<dt>no pair: unfinished</dt><dd>1</dd>'])
    expect(page).toContain(part);
});

test('texts that are none are an error that names the file, and nothing is written', async () => {
  const empty = join(folder, 'empty.txt');
  await writeFile(empty, ' \n');
  const args = ['synth', 'instruct', empty, '--provider', join(folder, 'model'), '--output', join(folder, 'none')];
  const { code, err } = await limbeckHere(args);
  expect(code).toBe(1);
  expect(err).toContain(`there is no text to ask about, in ${empty}`);
  expect(existsSync(join(folder, 'none'))).toBe(false);
});

test('what is missing is asked for', async () => {
  const texts = join(folder, 'texts.jsonl');
  for (const [args, message] of [
    [[texts], 'Give --output'],
    [[texts, '--output', 'x'], 'Give --provider'],
    [[texts, '--output', 'x', '--provider', 'http://127.0.0.1:1/v1'], '--tokenizer is missing'],
    [[texts, '--output', 'x', '--provider', 'y', '--rounds', '0'], '--rounds is "0"'],
  ] as const) {
    const { code, err } = await limbeckHere(['synth', 'instruct', ...args]);
    expect(code).toBe(2);
    expect(err).toContain(message);
  }
});
