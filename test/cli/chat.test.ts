import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { complete } from '../../src/models/completion.ts';
import { exportGguf } from '../../src/models/gguf.ts';
import { createModel, type LanguageModel, saveModel } from '../../src/models/model.ts';
import { presets } from '../../src/models/presets.ts';
import { chatTemplate } from '../../src/tokenizer/chat.ts';
import { chatStyles } from '../../src/tokenizer/styles.ts';
import type { Tokenizer } from '../../src/tokenizer/tokenizer.ts';
import { trainTokenizer } from '../../src/tokenizer/train.ts';
import { limbeck, limbeckHere } from './process.ts';

let folder: string;
let model: LanguageModel;
let tokenizer: Tokenizer;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'limbeck-chat-'));
  tokenizer = await trainTokenizer(['one two three, two and one: three'], { vocabSize: 270 });
  const config = {
    ...presets['gemma2-nano'],
    vocabSize: tokenizer.vocabSize,
    width: 24,
    hidden: 20,
    initStd: 0.4,
    context: 8192,
  };
  model = createModel(config, { seed: 5, trainable: false });
  await saveModel(folder, model, tokenizer);
});
afterAll(async () => {
  model.dispose();
  await rm(folder, { recursive: true });
});

/** What the model says to a conversation, by the library. */
async function answer(messages: { role: string; content: string }[], stop = '<|im_end|>'): Promise<string> {
  const text = chatTemplate('chatml', tokenizer).render(messages, { addGenerationPrompt: true });
  const [one] = await complete(model, tokenizer, [tokenizer.encode(text)], { temperature: 0, tokens: 9, stop });
  return one!.text.trim();
}

const flags = ['--template', 'chatml', '--temperature', '0', '--tokens', '9'];

test('turns from standard input are one conversation, which can be reset and saved', async () => {
  const saved = join(folder, 'chat.jsonl');
  const lines = ['/system Be brief.', 'one?', 'and two?', `/save ${saved}`, '/reset', '', 'one?', '/what', '/exit', 'three?'];
  const { code, out, err } = await limbeck(['chat', folder, ...flags], undefined, `${lines.join('\n')}\n`);
  const system = { role: 'system', content: 'Be brief.' };
  const one = { role: 'user', content: 'one?' };
  const first = { role: 'assistant', content: await answer([system, one]) };
  const two = { role: 'user', content: 'and two?' };
  const second = { role: 'assistant', content: await answer([system, one, first, two]) };
  expect(JSON.parse(await readFile(saved, 'utf8'))).toEqual({ messages: [system, one, first, two, second] });
  expect(out.split('\n').length).toBeGreaterThan(3);
  expect(out.replaceAll(/\s+/g, ' ').trim()).toBe(
    [first.content, second.content, first.content].join(' ').replaceAll(/\s+/g, ' ').trim(),
  );
  expect(err).toContain('There is no /what.');
  expect(code).toBe(0);
});

test('a GGUF file talks by its own template and stops at its own end of a turn', async () => {
  const path = join(folder, 'chat.gguf');
  await exportGguf(path, model, tokenizer, { type: 'f32', chatTemplate: chatStyles.chatml });
  const { code, out } = await limbeck(['chat', path, ...flags.slice(2)], undefined, 'one?\n');
  expect([code, out.trim()]).toEqual([0, await answer([{ role: 'user', content: 'one?' }])]);
});

test('with --json every event is an object', async () => {
  const { code, out } = await limbeck(['chat', folder, ...flags, '--json', '--system', 'Be brief.'], undefined, 'one?\n/reset\n');
  const events = out
    .trim()
    .split('\n')
    .map((line) => JSON.parse(line) as { type: string; text?: string });
  const text = events.flatMap((event) => (event.type === 'text' ? [event.text] : [])).join('');
  expect(text.trim()).toBe(
    await answer([
      { role: 'system', content: 'Be brief.' },
      { role: 'user', content: 'one?' },
    ]),
  );
  expect(events.slice(-2)).toEqual([
    { type: 'end', finish: 'length', tokens: 9 },
    { type: 'note', text: 'A new conversation.' },
  ]);
  expect(code).toBe(0);
});

test('Ctrl-C stops the answer and twice leaves', async () => {
  // Signals: during the answer; then, nothing being under way, a first and a second.
  const seen = ['"type":"text"', '"type":"end"', 'again leaves'];
  let signals = 0;
  const flags = ['--template', 'chatml', '--tokens', '8000', '--temperature', '3', '--json'];
  const { code, out } = await limbeck(
    ['chat', folder, ...flags, '--logit-bias', `${tokenizer.eos}=-Infinity`],
    (child, text) => {
      if (signals < seen.length && text.includes(seen[signals]!)) {
        signals++;
        child.kill('SIGINT');
      }
    },
    'one?\n',
  );
  expect(out).toContain('"type":"end","finish":"aborted"');
  expect([signals, code]).toEqual([3, 0]);
});

test('a GGUF file is a model like any other, and brings its template', async () => {
  const path = join(folder, 'model.gguf');
  await exportGguf(path, model, tokenizer, { type: 'f32', chatTemplate: chatTemplate('chatml', tokenizer).source });
  const [own, other] = [await limbeckHere(['generate', folder, ...greedy]), await limbeckHere(['generate', path, ...greedy])];
  expect([own.code, own.err]).toEqual([0, '']);
  expect(other).toEqual(own);
  const talk = await limbeck(['chat', path, ...flags.slice(2)], undefined, 'one two\n');
  expect([talk.code, talk.err]).toEqual([0, '']);
  expect(talk.out.trim()).toBe(await answer([{ role: 'user', content: 'one two' }]));
});
const greedy = ['--prompt', 'one two', '--temperature', '0', '--tokens', '9'];

test('what cannot work is told', async () => {
  const help = await limbeckHere(['chat', '--help']);
  expect([help.code, help.err]).toEqual([0, '']);
  for (const text of ['/system TEXT', '/save FILE', '--top-p', 'limbeck chat models/smollm']) expect(help.out).toContain(text);
  const none = await limbeckHere(['chat', folder]);
  expect([none.code, none.err]).toEqual([2, expect.stringContaining('has no chat template; name a style with --template')]);
  const style = await limbeckHere(['chat', folder, '--template', 'klingon']);
  expect([style.code, style.err]).toEqual([1, expect.stringContaining("there is no style 'klingon'")]);
  const dtype = await limbeckHere(['chat', folder, '--dtype', 'f8']);
  expect([dtype.code, dtype.err]).toEqual([2, expect.stringContaining('--dtype is "f8"; it must be f32 or bf16')]);
  for (const [name, value, expected] of [
    ['weights', 'q5', 'fp8, q8 or q4'],
    ['device', 'gpu', 'cpu or cuda'],
  ] as const) {
    const { code, err } = await limbeckHere(['chat', folder, `--${name}`, value]);
    expect([code, err]).toEqual([2, expect.stringContaining(`--${name} is "${value}"; it must be ${expected}`)]);
  }
});

test('generate: options, events and stops', async () => {
  const args = ['generate', folder, '--prompt', 'one', '--temperature', '0', '--tokens', '6'];
  const [free] = await complete(model, tokenizer, ['one'], { temperature: 0, tokens: 6 });
  const plain = await limbeckHere(args);
  expect([plain.code, plain.out]).toEqual([0, `one${free!.text}\n`]);
  const json = await limbeckHere([...args, '--json', '--log-probs', '2', '--dtype', 'f32']);
  const events = json.out
    .trim()
    .split('\n')
    .map((line) => JSON.parse(line));
  expect(events.flatMap((event) => event.tokens ?? []).map(({ id }: { id: number }) => id)).toEqual(
    free!.tokens.map(({ id }) => id),
  );
  expect(events[0].tokens[0].top).toHaveLength(2);
  expect(events.at(-1)).toEqual({ type: 'end', finish: 'length' });
  const biased = await limbeckHere([...args, '--logit-bias', `${free!.tokens[0]!.id}=-Infinity`, '--stop', '~~', '--stop', 'qq']);
  expect(biased.out).not.toBe(plain.out);
  for (const [wrong, text] of [
    [['--logit-bias', 'x=1'], '--logit-bias x=1: write id=number'],
    [['--min-p', 'a'], '--min-p is "a"'],
  ] as const) {
    const { code, err } = await limbeckHere([...args, ...wrong]);
    expect([code, err]).toEqual([2, expect.stringContaining(text)]);
  }
  const range = await limbeckHere([...args, '--top-p', '1.5']);
  expect([range.code, range.err]).toEqual([2, expect.stringContaining('--top-p is "1.5"; it must be a number from 0 to 1')]);
  await writeFile(join(folder, 'generation_config.json'), JSON.stringify({ max_new_tokens: 2, do_sample: false }));
  const config = await limbeckHere(['generate', folder, '--prompt', 'one']);
  const [short] = await complete(model, tokenizer, ['one'], { temperature: 0, tokens: 2 });
  expect(config.out).toBe(`one${short!.text}\n`);
  await rm(join(folder, 'generation_config.json'));
});
