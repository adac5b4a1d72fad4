import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { exampleOf } from '../../../src/data/examples.ts';
import { openInstructions } from '../../../src/data/instructions.ts';
import { readContextPairs } from '../../../src/synth/instruct/contexts.ts';
import { bracketsOf, exampleText } from '../../../src/synth/instruct/format.ts';
import { fewShotChains, synthesizerTraining, writeFewShotChains } from '../../../src/synth/instruct/training.ts';
import { chatTemplate } from '../../../src/tokenizer/chat.ts';
import type { Tokenizer } from '../../../src/tokenizer/tokenizer.ts';
import { trainTokenizer } from '../../../src/tokenizer/train.ts';

const folder = mkdtempSync(join(tmpdir(), 'limbeck-test-'));
afterAll(() => rmSync(folder, { recursive: true }));

function file(name: string, value: unknown): string {
  const path = join(folder, name);
  mkdirSync(join(path, '..'), { recursive: true });
  const lines = Array.isArray(value) && name.endsWith('l') ? value.map((row) => JSON.stringify(row)) : [JSON.stringify(value)];
  writeFileSync(path, `${lines.join('\n')}\n`);
  return path;
}

test('SQuAD as it was published: articles of paragraphs of questions', async () => {
  const path = file('squad.json', {
    version: 'v2.0',
    data: [
      {
        title: 'Ghana',
        paragraphs: [
          {
            context: 'Accra is the capital.',
            qas: [
              {
                id: '1',
                question: 'What is the capital?',
                answers: [
                  { text: 'Accra', answer_start: 0 },
                  { text: 'Accra.', answer_start: 0 },
                ],
              },
              { id: '2', question: 'Who lives there?', is_impossible: true, answers: [] },
            ],
          },
          { context: 'no questions', qas: 'none' },
          { context: 'The Volta flows.', qas: [{ question: 'What flows?', answers: [{ text: 'the Volta' }] }] },
        ],
      },
    ],
  });
  const { examples, report } = await readContextPairs(path);
  expect(examples).toEqual([
    { dataset: 'squad', context: 'Accra is the capital.', pairs: [{ question: 'What is the capital?', answer: 'Accra' }] },
    { dataset: 'squad', context: 'The Volta flows.', pairs: [{ question: 'What flows?', answer: 'the Volta' }] },
  ]);
  expect(report).toMatchObject({ contexts: 2, pairs: 2, malformedCount: 2, datasets: { squad: 2 } });
  expect(report.malformed.map(({ field }) => field)).toEqual(['qas[1].answers', 'data[0].paragraphs[1].qas']);
  expect(report.malformed[0]!.line).toBe(1);
});

test('SQuAD as rows: questions about one context come together, in order', async () => {
  const rows = [
    { context: 'One.', question: 'a?', answers: { text: ['1', 'uno'], answer_start: [0, 0] } },
    { context: 'Two.', question: 'b?', answers: { text: ['2'], answer_start: [0] } },
    { context: 'One.', question: 'c?', answers: { text: ['3'] } },
    { context: 'One.', question: 'A?', answers: { text: ['4'] } },
    { context: 'One.', question: 'd?', answers: { text: [] } },
    { context: 5, question: 'e?', answers: { text: ['5'] } },
    { context: 'One <CON> more', question: 'f?', answers: { text: ['5'] } },
  ];
  const { examples, report } = await readContextPairs(file('rows.jsonl', rows), { dataset: 'mine', maxPairs: 1 });
  expect(examples.map(({ context, pairs }) => [context, ...pairs.map(({ answer }) => answer)])).toEqual([
    ['One.', '1'],
    ['One.', '3'],
    ['Two.', '2'],
  ]);
  expect(report.malformed.map(({ line, field }) => [line, field])).toEqual([
    [4, 'question'],
    [5, 'answers'],
    [6, 'context'],
    [7, 'context'],
  ]);
});

test('HotpotQA in both forms: titled paragraphs', async () => {
  const rows = [
    {
      question: 'q1?',
      answer: 'yes',
      context: [
        ['Ed Wood', ['He made films.', ' Some were bad.']],
        ['Accra', ['A city.']],
      ],
    },
    { question: 'q2?', answer: 'no', context: { title: ['Volta'], sentences: [['A river.', 'It is long.']] } },
    { question: 'q3?', answer: '', context: [['A', ['b']]] },
    { question: 'q4?', answer: 'x', context: [['A']] },
  ];
  const { examples, report } = await readContextPairs(file('hotpot.jsonl', rows));
  expect(examples.map(({ context }) => context)).toEqual([
    'Ed Wood\nHe made films. Some were bad.\n\nAccra\nA city.',
    'Volta\nA river. It is long.',
  ]);
  expect(report.malformed.map(({ line, field }) => [line, field])).toEqual([
    [3, 'answer'],
    [4, 'context[0]'],
  ]);
});

test('the published collection: a shard belongs to the dataset of its folder', async () => {
  const rows = [
    { context: 'A text.', QA_list: [{ Q: 'a?', A: '1' }, { Q: 'b?' }, { Q: 'c?', A: '3' }] },
    { context: '', QA_list: [{ Q: 'd?', A: '4' }], rc_name: 'other' },
    { context: 'none', QA_list: [] },
    { nothing: 1 },
  ];
  const { examples, report } = await readContextPairs(file('quac/shard/0.jsonl', rows));
  expect(examples).toEqual([
    {
      dataset: 'quac',
      context: 'A text.',
      pairs: [
        { question: 'a?', answer: '1' },
        { question: 'c?', answer: '3' },
      ],
    },
    { dataset: 'other', context: '', pairs: [{ question: 'd?', answer: '4' }] },
  ]);
  expect(report.malformed.map(({ field }) => field)).toEqual(['QA_list[1].A', 'QA_list', '']);
  await expect(readContextPairs(file('bad.jsonl', [{ nothing: 1 }]))).rejects.toMatchObject({ code: 'ERR_EMPTY' });
});

let tokenizer: Tokenizer;
const examples = Array.from({ length: 40 }, (_, i) => ({
  dataset: i % 4 === 0 ? 'small' : 'large',
  context: `Country ${i} lies at ${'the sea and '.repeat(i % 7)}a river.`,
  pairs: Array.from({ length: 1 + (i % 3) }, (_, k) => ({ question: `Where is ${i} part ${k}?`, answer: `at the sea ${k}` })),
}));
beforeAll(async () => {
  tokenizer = await trainTokenizer(
    examples.map((example) => exampleText(example, { begin: '', end: '' })),
    { vocabSize: 400 },
  );
});

test('chains hold one dataset each, all examples that fit, and no more tokens than asked for', () => {
  const { chains, report } = fewShotChains(examples, { tokenizer, length: 200, seed: 3 });
  expect(report).toMatchObject({
    chains: chains.length,
    examples: 40,
    pairs: examples.reduce((n, e) => n + e.pairs.length, 0),
    tooLong: 0,
  });
  const template = chatTemplate(synthesizerTraining.template, tokenizer);
  const lengths = chains.map(({ messages }) => tokenizer.encode(template.render(messages)).length);
  expect(Math.max(...lengths)).toBeLessThanOrEqual(200);
  expect(lengths.reduce((a, b) => a + b)).toBe(report.tokens);
  expect(lengths.filter((n) => n > 120).length).toBeGreaterThan(chains.length / 2);
  const seen = chains.flatMap(({ dataset, messages }) =>
    messages.filter(({ role }) => role === 'user').map(({ content }) => [dataset, content]),
  );
  expect(seen.sort()).toEqual(examples.map(({ dataset, context }) => [dataset, ` <CON> ${context} </CON>\n\n`]).sort());
  expect(fewShotChains(examples, { tokenizer, length: 200, seed: 3 }).chains).toEqual(chains);
  expect(fewShotChains(examples, { tokenizer, length: 200, seed: 4 }).chains).not.toEqual(chains);
  expect(fewShotChains(examples, { tokenizer, length: 200, shots: 2 }).chains.every(({ messages }) => messages.length <= 4)).toBe(
    true,
  );
  const tight = fewShotChains(examples, { tokenizer, length: 60 });
  expect(tight.report.tooLong).toBeGreaterThan(0);
  expect(tight.report.examples + tight.report.tooLong).toBe(40);
  expect(() => fewShotChains(examples, { tokenizer, length: 0 })).toThrow(/length is 0/);
});

test('loss lies on the pairs and their ends, on nothing else', async () => {
  const { chains } = fewShotChains(examples, { tokenizer, length: 200 });
  const { messages } = chains.find((chain) => chain.messages.length >= 4)!;
  const template = chatTemplate(synthesizerTraining.template, tokenizer);
  const example = exampleOf(
    { messages, file: '', line: 1 },
    { template, tokenizer, mask: synthesizerTraining.mask, promptWeight: 0, length: 200, overflow: 'drop' },
  )!;
  const { begin, end } = bracketsOf(tokenizer);
  expect([begin, end]).toEqual(['<bos>', '<eos>']);
  const ids = [...example.ids, example.next];
  expect(tokenizer.decode(ids)).toBe(
    messages.map(({ role, content }) => (role === 'user' ? begin + content : content + end)).join(''),
  );
  const learned = ids.filter((_, i) => i > 0 && example.weights![i - 1] === 1);
  expect(tokenizer.decode(learned)).toBe(
    messages
      .filter(({ role }) => role === 'assistant')
      .map(({ content }) => content + end)
      .join(''),
  );

  const path = join(folder, 'chains.jsonl');
  await writeFewShotChains(path, chains);
  const data = await openInstructions({
    train: path,
    template,
    tokenizer,
    mask: synthesizerTraining.mask,
    length: 200,
    batch: 2,
  });
  expect(data.report).toMatchObject({ trainExamples: chains.length, malformedCount: 0, truncated: 0, dropped: 0 });
});
