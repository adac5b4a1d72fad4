import { expect, test } from 'vitest';
import { modeWeights, type RenderMode, randomStream, renderChain, renderExamples } from '../../../src/synth/instruct/render.ts';
import type { SynthesizedText } from '../../../src/synth/instruct/synthesize.ts';
import { pairTemplates } from '../../../src/synth/instruct/templates.ts';

const qa = (n: number, count = 3) => ({
  context: `Context-${n} {answer} $& {context}`,
  pairs: Array.from({ length: count }, (_, k) => ({
    question: `Question-${n}-${k} {label}?`,
    answer: `Answer-${n}-${k} {question}`,
  })),
});
const only = (mode: RenderMode) => ({ weights: { [mode]: 1 }, inversion: 0 });
const modes = Object.keys(modeWeights) as RenderMode[];

test('whatever the mode and the templates, each text, question and answer is there once and as it was', () => {
  const examples = [qa(1), qa(2, 2)];
  for (const mode of modes) {
    for (let seed = 0; seed < 200; seed++) {
      const { text, mode: drawn, pairs, texts } = renderExamples(examples, randomStream(seed), only(mode));
      expect([drawn, pairs, texts]).toEqual([mode, 5, 2]);
      for (const { context, pairs: own } of examples) {
        for (const part of [context, ...own.flatMap(({ question, answer }) => [question, answer])])
          expect(text.split(part)).toHaveLength(2);
        const place = (part: string) => text.indexOf(part);
        for (const { question, answer } of own) {
          expect(place(context)).toBeLessThan(place(question));
          expect(place(question)).toBeLessThan(place(answer));
        }
      }
      // All questions of a text come before its answers, in this mode only.
      expect(text.indexOf('Question-1-2') < text.indexOf('Answer-1-0')).toBe(mode === 'numbered');
      expect(text).not.toMatch(/\{(number|option|steps)\}/);
    }
  }
});

test('modes come as often as their weights say, the pairs first in one of twenty', () => {
  const count = 4000;
  const seen = new Map<string, number>();
  let inverted = 0;
  for (let seed = 0; seed < count; seed++) {
    const rendered = renderExamples([qa(1)], randomStream(seed));
    seen.set(rendered.mode, (seen.get(rendered.mode) ?? 0) + 1);
    if (!rendered.inverted) continue;
    inverted++;
    expect(['classic', 'dialog']).toContain(rendered.mode);
    expect(rendered.text.indexOf('Answer-1-2')).toBeLessThan(rendered.text.indexOf('Context-1'));
  }
  // Four standard deviations.
  const near = (got: number, share: number) =>
    expect(Math.abs(got - count * share)).toBeLessThan(4 * Math.sqrt(count * share * (1 - share)));
  for (const [mode, weight] of Object.entries(modeWeights)) near(seen.get(mode)!, weight / 100);
  near(inverted, 0.05 * 0.85);
  // With a single pair there is nothing to number, to show or to continue.
  const single = Array.from({ length: 1000 }, (_, seed) => renderExamples([qa(1), qa(2, 1)], randomStream(seed)).mode);
  expect(new Set(single)).toEqual(new Set(['classic', 'dialog']));
});

test('draws of one stream are not tied to each other', () => {
  // With a stream that begins anew for each draw, the same frame would always come with the same pattern.
  const together = new Map<string, Set<string>>();
  for (let seed = 0; seed < 3000; seed++) {
    const { text } = renderExamples(
      [{ context: 'CONTEXT', pairs: [{ question: 'QUESTION', answer: 'ANSWER' }] }],
      randomStream(seed),
      only('classic'),
    );
    const [before, after] = text.split('CONTEXT') as [string, string];
    if (before !== '') together.set(before, (together.get(before) ?? new Set()).add(after));
  }
  expect(together.size).toBeGreaterThan(25);
  for (const afters of together.values()) expect(afters.size).toBeGreaterThan(15);
});

test('options are shuffled, and the answer is the label where labels tell them apart', () => {
  const pair = { question: 'Which is a river?\nOptions:\n- Accra\n- Volta\n- Kumasi', answer: 'Volta' };
  let labelled = 0;
  const orders = new Set<string>();
  for (let seed = 0; seed < 300; seed++) {
    const { text } = renderExamples([{ context: '', pairs: [pair] }], randomStream(seed), {
      bank: { ...pairTemplates, led: 0, pairs: [{ question: '{question}', gap: '\n=', answer: '{answer}', between: '\n' }] },
      ...only('classic'),
    });
    const [question, answer] = text.split('\n=') as [string, string];
    const names = ['Accra', 'Volta', 'Kumasi'].sort((a, b) => question.indexOf(a) - question.indexOf(b));
    orders.add(names.join());
    for (const name of names) expect(question.split(name)).toHaveLength(2);
    if (answer === 'Volta') continue;
    labelled++;
    const place = names.indexOf('Volta');
    expect(['ABC'[place], 'abc'[place], '123'[place]]).toContain(answer);
    expect(question).toMatch(new RegExp(`${answer}[\\]).: -]+Volta`));
  }
  expect(orders.size).toBe(6);
  expect(labelled).toBeGreaterThan(150);
  expect(labelled).toBeLessThan(300);
});

test('reasoning is kept and its conclusion stays', () => {
  const pair = {
    question: "How many?\nOptions:\n- 5\n- 7\nLet's think step by step.",
    answer: 'Two and three.\nTherefore, the answer is 5',
  };
  let labelled = 0;
  const plain = { ...pair, question: "How many?\nLet's think step by step." };
  for (let seed = 0; seed < 100; seed++) {
    const { text } = renderExamples([{ context: '', pairs: [plain] }], randomStream(seed), only('classic'));
    expect(text).toContain('How many?');
    expect(text).toContain('Two and three.');
    expect(text).toMatch(/\b5\b/);
    expect(text).not.toContain('\nTherefore, the answer is ');
    const both = renderExamples([{ context: '', pairs: [pair] }], randomStream(seed), only('classic')).text;
    expect(both).toContain('Two and three.');
    expect(both).not.toMatch(/Therefore, the answer is|think step by step/);
    if (/(answer is|Final answer:|Conclusion:) [ABab]$/.test(both)) labelled++;
  }
  expect(labelled).toBeGreaterThan(5);
});

test('a chain: one document for each run, texts without pairs as they were, the same for the same seed', () => {
  const entry = (n: number, shown: number, count: number): SynthesizedText => ({
    ...qa(n, count),
    id: String(n),
    shown,
    malformed: [],
    finish: 'stop',
    promptTokens: 0,
    completionTokens: 0,
  });
  const chain = { texts: [entry(1, 0, 3), entry(2, 1, 2), entry(3, 2, 0), entry(4, 0, 2)] };
  const documents = renderChain(chain, 5);
  expect(documents.map(({ texts, pairs }) => [texts, pairs])).toEqual([
    [2, 5],
    [1, 0],
    [1, 2],
  ]);
  expect(documents[1]).toMatchObject({ mode: 'raw', text: qa(3).context });
  expect(renderChain(chain, 5)).toEqual(documents);
  expect(renderChain(chain, 6)).not.toEqual(documents);
});

test('the bank: dozens of forms, none twice, each with all that it needs', () => {
  const has = (form: unknown, ...names: string[]) => {
    for (const name of names) expect(JSON.stringify(form).split(`{${name}}`), JSON.stringify(form)).toHaveLength(2);
  };
  for (const list of [
    pairTemplates.frames,
    pairTemplates.leads,
    pairTemplates.pairs,
    pairTemplates.options,
    pairTemplates.dialogs,
    pairTemplates.numbered,
    pairTemplates.shown,
    pairTemplates.nextTurns,
    pairTemplates.steps,
    pairTemplates.trailers,
  ]) {
    expect(list.length).toBeGreaterThanOrEqual(12);
    expect(new Set(list.map((form) => JSON.stringify(form))).size).toBe(list.length);
  }
  for (const frame of pairTemplates.frames) has(frame, 'context');
  for (const form of [...pairTemplates.pairs, ...pairTemplates.dialogs, ...pairTemplates.shown, ...pairTemplates.nextTurns])
    has(form, 'question', 'answer');
  for (const { question, answer } of pairTemplates.numbered) {
    has(question, 'question', 'number');
    has(answer, 'answer', 'number');
  }
  for (const form of pairTemplates.steps) has(form, 'question', 'steps', 'answer');
  for (const form of pairTemplates.options) has(form, 'option', ...(/[A-Za-z0-9]/.test(form.labels) ? ['label'] : []));
});
