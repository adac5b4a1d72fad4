import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { texts } from '../../../src/data/source.ts';
import { bracketsOf, contextText, exampleText, pairsText } from '../../../src/synth/instruct/format.ts';
import { passageStage, passagesOf, type RawText, textRecords } from '../../../src/synth/instruct/passages.ts';
import { documentStage, type RenderedDocument, renderStage } from '../../../src/synth/instruct/render.ts';
import {
  type InstructionChain,
  runsOf,
  type SynthesizerOptions,
  synthesisReport,
  synthesizeInstructions,
} from '../../../src/synth/instruct/synthesize.ts';
import { pipeline, readManifest, readRecords, recordsOf, runPipeline } from '../../../src/synth/pipeline.ts';
import type { Tokenizer } from '../../../src/tokenizer/tokenizer.ts';
import { trainTokenizer } from '../../../src/tokenizer/train.ts';
import { type Script, scripted } from '../scripted.ts';

const root = mkdtempSync(join(tmpdir(), 'limbeck-test-'));
afterAll(() => rmSync(root, { recursive: true }));
let folders = 0;
const folder = () => join(root, String(folders++));

let tokenizer: Tokenizer;
beforeAll(async () => {
  tokenizer = await trainTokenizer(['Text about rivers and towns. <QUE> What? <ANS> 5 </END> <CON> </CON>'.repeat(20)], {
    vocabSize: 320,
  });
});

const raw = (count: number): RawText[] =>
  Array.from({ length: count }, (_, i) => ({ id: `t${i}`, text: `Text ${i} about rivers.` }));

async function run(
  input: readonly RawText[],
  options: Omit<SynthesizerOptions, 'tokenizer'>,
  output = folder(),
): Promise<InstructionChain[]> {
  const chain = synthesizeInstructions(pipeline(recordsOf(input)), { tokenizer, ...options });
  for await (const _ of runPipeline(chain, { output, seed: 1 }));
  const file = (await readManifest(output)).at(-1)!.file;
  const chains: InstructionChain[] = [];
  for await (const record of readRecords<InstructionChain>(join(output, file))) chains.push(record);
  return chains;
}

/** Two pairs about the last text of a prompt. */
function answer(prompt: string): string {
  const number = prompt.split('Text ').at(-1)!.split(' ')[0]!;
  return pairsText([
    { question: `Which number is ${number}?`, answer: number },
    { question: `What is text ${number} about?`, answer: 'rivers' },
  ]);
}

test('each text of a chain is asked behind those before it and their pairs', async () => {
  const prompts: string[] = [];
  const provider = scripted({
    complete(prompt, options) {
      expect(options).toMatchObject({ temperature: 0, maxTokens: 400, stop: ['<CON>'] });
      prompts.push(prompt);
      return answer(prompt);
    },
  });
  const chains = await run(raw(7), { provider, rounds: 3 });
  // 7 texts in 3 chains: the last round has one text only.
  expect(chains.map(({ texts: t }) => t.map(({ id }) => id))).toEqual([
    ['t0', 't3', 't6'],
    ['t1', 't4'],
    ['t2', 't5'],
  ]);
  expect(chains.flatMap(({ texts: t }) => t.map(({ shown }) => shown))).toEqual([0, 1, 2, 0, 1, 0, 1]);
  expect(chains.every(({ waiting }) => waiting.length === 0)).toBe(true);
  const brackets = bracketsOf(tokenizer);
  const [first, second, third] = chains[0]!.texts;
  expect(prompts).toContain(
    `${exampleText(first!, brackets)}${exampleText(second!, brackets)}${brackets.begin}${contextText('Text 6 about rivers.')}`,
  );
  expect(third!.pairs).toEqual([
    { question: 'Which number is 6?', answer: '6' },
    { question: 'What is text 6 about?', answer: 'rivers' },
  ]);
  expect(await synthesisReport(chains)).toMatchObject({
    texts: 7,
    withPairs: 7,
    pairs: 14,
    tooLong: 0,
    malformed: {},
    runs: { 3: 1, 2: 2 },
  });
});

test('a text without pairs ends its run; what is malformed is counted by kind', async () => {
  const provider = scripted({
    complete: (prompt) =>
      prompt.endsWith(contextText('Text 1 about rivers.')) ? '<QUE> What? </END> <QUE> cut' : answer(prompt),
  });
  const [chain] = await run(raw(4), { provider, rounds: 4 });
  expect(chain!.texts.map(({ shown, pairs }) => [shown, pairs.length])).toEqual([
    [0, 2],
    [1, 0],
    [0, 2],
    [1, 2],
  ]);
  expect(runsOf(chain!).map((texts) => texts.map(({ id }) => id))).toEqual([['t0'], ['t1'], ['t2', 't3']]);
  expect(await synthesisReport([chain!])).toMatchObject({
    withPairs: 3,
    malformed: { 'no-answer-mark': 1, unfinished: 1 },
    runs: { 1: 1, 2: 1 },
  });
});

test('chains are as long as the context allows, by the tokens of the tokenizer', async () => {
  const brackets = bracketsOf(tokenizer);
  const lengths: number[] = [];
  const provider = scripted({
    complete(prompt) {
      lengths.push(tokenizer.encode(prompt).length);
      return { text: answer(prompt), finish: 'length' };
    },
  });
  const input = raw(6);
  const example = exampleText(
    {
      context: input[0]!.text,
      pairs: [
        { question: 'Which number is 0?', answer: '0' },
        { question: 'What is text 0 about?', answer: 'rivers' },
      ],
    },
    brackets,
  );
  const asked = `${brackets.begin}${contextText(input[1]!.text)}`;
  // Room for one example before the text, to the token.
  const room = tokenizer.encode(example + asked).length;
  const [chain] = await run([...input, { id: 'long', text: 'rivers '.repeat(room) }], {
    provider,
    rounds: 7,
    context: room + 20,
    maxTokens: 20,
  });
  expect(Math.max(...lengths)).toBe(room);
  expect(chain!.texts.map(({ shown }) => shown)).toEqual([0, 1, 0, 1, 0, 1, 0]);
  expect(chain!.texts.at(-1)).toMatchObject({ finish: 'too-long', pairs: [], promptTokens: 0 });
  expect(await synthesisReport([chain!])).toMatchObject({ tooLong: 1, cutOff: 6, runs: { 2: 3 } });
  const [tighter] = await run(input, { provider, rounds: 6, context: room + 19, maxTokens: 20 });
  expect(tighter!.texts.map(({ shown }) => shown)).toEqual([0, 0, 0, 0, 0, 0]);
});

test('the same bytes whatever the concurrency, and after a stop', async () => {
  const seeds = new Map<string, Set<number>>();
  const script = (wait: boolean): Script => ({
    concurrency: wait ? 5 : 1,
    async complete(prompt, { seed }) {
      if (wait) await new Promise((resolve) => setTimeout(resolve, (prompt.length * 7) % 5));
      seeds.set(prompt, (seeds.get(prompt) ?? new Set()).add(seed!));
      return answer(prompt);
    },
  });
  const stages = (provider: ReturnType<typeof scripted>) =>
    synthesizeInstructions(pipeline(recordsOf(raw(23))), { tokenizer, provider, rounds: 3 })
      .through(renderStage())
      .through(documentStage());
  const whole = folder();
  for await (const _ of runPipeline(stages(scripted(script(false))), { output: whole, seed: 9 }));
  const stopped = folder();
  let asked = 0;
  const failing = script(true);
  const once = scripted({
    ...failing,
    complete(prompt, options) {
      if (++asked === 12) throw new Error('the server is gone');
      return failing.complete!(prompt, options);
    },
  });
  await expect(async () => {
    for await (const _ of runPipeline(stages(once), { output: stopped, seed: 9 }));
  }).rejects.toThrow(/the server is gone/);
  for await (const _ of runPipeline(stages(once), { output: stopped, seed: 9 }));
  const manifest = await readManifest(whole);
  expect(await readManifest(stopped)).toEqual(manifest);
  for (const { file } of manifest)
    expect(readFileSync(join(stopped, file), 'utf8'), file).toBe(readFileSync(join(whole, file), 'utf8'));
  // Nothing that was finished is asked again, so a few more calls than texts at most.
  expect(asked).toBeLessThan(23 + 6);
  expect([...seeds.values()].every((own) => own.size === 1)).toBe(true);
  const documents: RenderedDocument[] = [];
  for await (const d of readRecords<RenderedDocument>(join(whole, manifest.at(-1)!.file))) documents.push(d);
  expect(documents.reduce((n, d) => n + d.texts, 0)).toBe(23);
  expect(documents.reduce((n, d) => n + d.pairs, 0)).toBe(46);
});

test('settings and providers that cannot work are refused', () => {
  const provider = scripted({ can: { complete: false } });
  const source = pipeline(recordsOf(raw(1)));
  expect(() => synthesizeInstructions(source, { tokenizer, provider })).toThrow(/raw/);
  const able = scripted({});
  expect(() => synthesizeInstructions(source, { tokenizer, provider: able, rounds: 0 })).toThrow(/rounds is 0/);
  expect(() => synthesizeInstructions(source, { tokenizer, provider: able, context: 300 })).toThrow(/context is 300/);
});

test('documents become passages that are short enough and lose no word', async () => {
  const count = (text: string) => tokenizer.encode(text).length;
  const document = [
    'A short paragraph.',
    `A long one. ${'It has many sentences about rivers. '.repeat(12)}`,
    `${'word '.repeat(80)}`,
    'x'.repeat(200),
    'The end.\nReally.',
  ].join('\n\n');
  for (const most of [20, 37, 64, 400]) {
    const passages = passagesOf(document, most, count);
    expect(passages.join(' ').split(/\s+/)).toEqual(document.trim().split(/\s+/));
    for (const passage of passages) if (passage.includes(' ')) expect(count(passage)).toBeLessThanOrEqual(most);
    if (most === 400) expect(passages.length).toBeLessThan(4);
  }
  const source = await textRecords(texts(['One.', ' \n', document]));
  expect(source.count).toBe(2);
  const output = folder();
  for await (const _ of runPipeline(pipeline(source).through(passageStage({ tokenizer, tokens: 64 })), { output }));
  const ids: string[] = [];
  for await (const { id } of readRecords<RawText>(join(output, '01-passages.jsonl'))) ids.push(id);
  expect(ids.slice(0, 3)).toEqual(['0', '1.0', '1.1']);
  expect((await readManifest(output))[0]!.input).toBe(2);
  expect((await textRecords(texts(['One.', 'Two.']))).settings).not.toEqual((await textRecords(texts(['One.Two.']))).settings);
});
