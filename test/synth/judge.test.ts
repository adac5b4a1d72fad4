import { describe, expect, test } from 'vitest';
import {
  compare,
  expectedScore,
  judgePair,
  judgeRubric,
  judgeScore,
  otherAnswers,
  readScore,
  reward,
} from '../../src/synth/judge.ts';
import type { InstructionRecord } from '../../src/synth/record.ts';
import { bootstrap, correlation, cost, lengths, winRate } from '../../src/synth/statistics.ts';
import { scripted } from './scripted.ts';

const sides = (content: string) => /Answer A\n(.*)\n\n## Answer B\n(.*)\n/.exec(content)!.slice(1) as [string, string];

const judged = { instruction: 'Add 2 and 2', response: '4', reference: 'four' };

describe('scores', () => {
  test.each([
    ['85', 85],
    [' 85. ', 85],
    ['Score: 85/100', 85],
    ['**100**', 100],
    ['The overall score is 7 points', 7],
    ['I give it 85 because it has 2 parts', undefined],
    ['This answer is good.', undefined],
    ['101', undefined],
    ['-5?', 5],
    ['', undefined],
  ])('%j', (text, score) => {
    expect(readScore(text)).toBe(score);
  });

  const alternative = (text: string, p: number) => ({ text, logProbability: Math.log(p) });

  test('the mean over score tokens, whole numbers in a token', () => {
    const tokens = [
      {
        ...alternative('80', 0.5),
        alternatives: [alternative('80', 0.5), alternative('90', 0.25), alternative('The', 0.2), alternative('999', 0.05)],
      },
    ];
    expect(expectedScore({ tokens })).toBeCloseTo((0.5 * 80 + 0.25 * 90) / 0.75, 10);
  });

  test('the mean over score tokens, a digit in a token', () => {
    const tokens = [
      { ...alternative('8', 0.5), alternatives: [alternative('8', 0.5), alternative('9', 0.5)] },
      { ...alternative('0', 1), alternatives: [alternative('0', 0.5), alternative('4', 0.5)] },
    ];
    expect(expectedScore({ tokens })).toBeCloseTo(85 + 2, 10);
  });

  test('only the written token is known', () => {
    expect(expectedScore({ tokens: [{ ...alternative('70', 0.1), alternatives: [] }] })).toBeCloseTo(70, 10);
    expect(expectedScore({ tokens: [{ ...alternative('Good', 0.1), alternatives: [] }] })).toBeUndefined();
    expect(expectedScore({})).toBeUndefined();
  });

  test('read where there are no log-probabilities; prose is asked again, then none', async () => {
    const replies = ['Well, it depends.', 'Let me think', '70'];
    const provider = scripted({ can: { logProbabilities: false }, chat: () => replies.shift() ?? 'No idea' });
    expect(await judgeScore(judged, { provider })).toEqual({ score: 70, by: 'read' });
    expect(await judgeScore(judged, { provider })).toEqual({ score: null, by: 'none' });
    const before = provider.meter.requests;
    expect(await judgeScore({ ...judged, response: ' ' }, { provider })).toEqual({ score: 0, by: 'empty' });
    expect(provider.meter.requests).toBe(before);
  });

  test('expected where there are', async () => {
    const tokens = [{ ...alternative('60', 0.5), alternatives: [alternative('60', 0.5), alternative('40', 0.5)] }];
    const provider = scripted({ chat: () => ({ text: '60', tokens }) });
    expect(await judgeScore(judged, { provider })).toEqual({ score: expect.closeTo(50, 8), by: 'expected' });
  });

  test('rewards of a record and of a base model', async () => {
    const provider = scripted({
      can: { logProbabilities: false },
      chat: ([message]) => (message!.content.includes('weak') ? '30' : '90'),
    });
    const base = scripted({ complete: (prompt) => (prompt.includes('# User\nWhy?\n') ? 'weak' : 'strange') });
    const stage = reward({ provider, base });
    const messages = [
      { role: 'user' as const, content: 'Why?' },
      { role: 'assistant' as const, content: 'So.' },
    ];
    const outcome = await stage.run({ id: 'a', messages }, { index: 0, seed: () => 1, signal: new AbortController().signal });
    expect(outcome).toMatchObject({ value: { reward: 90, baseReward: 30 } });
  });
});

describe('pairs', () => {
  const pair = { instruction: 'x', a: 'long answer', b: 'short' };

  test('the better one wins in both orders', async () => {
    const provider = scripted({ chat: ([m]) => (sides(m!.content)[0] === 'short' ? 'A' : 'Answer B.') });
    expect(await judgePair(pair, { provider })).toEqual({ winner: 'b', verdicts: ['b', 'b'] });
  });
  test('a judge that likes the first is a tie', async () => {
    const provider = scripted({ chat: () => 'A' });
    expect(await judgePair(pair, { provider })).toEqual({ winner: 'tie', verdicts: ['a', 'b'] });
  });
  test('a tie, and a judge that talks', async () => {
    expect(await judgePair(pair, { provider: scripted({ chat: () => 'tie' }) })).toEqual({
      winner: 'tie',
      verdicts: ['tie', 'tie'],
    });
    const talker = scripted({ chat: () => 'Both have their merits, A is longer' });
    expect(await judgePair(pair, { provider: talker })).toEqual({ winner: 'tie', verdicts: [null, null] });
    expect(talker.meter.requests).toBe(6);
  });
});

test('a stage compares answers by id, and refuses those of other instructions', async () => {
  const record = (id: string, question: string, answer: string): InstructionRecord => ({
    id,
    messages: [
      { role: 'user', content: question },
      { role: 'assistant', content: answer },
    ],
  });
  const provider = scripted({ chat: ([m]) => (sides(m!.content)[0] === 'short' ? 'A' : 'B') });
  const mine = [record('1', 'Q?', 'short'), record('2', 'Q?', 'long'), record('3', 'Q?', 'short'), record('4', 'Q?', 'short')];
  const others = [record('1', 'Q?', 'long'), record('2', 'Q?', 'short'), record('3', 'R?', 'long')];
  const stage = compare({ provider, against: await otherAnswers(others) });
  const context = { index: 0, seed: () => 1, signal: new AbortController().signal };
  const outcomes = await Promise.all(mine.map((one) => stage.run(one, context)));
  expect(outcomes).toMatchObject([
    { value: { id: '1', comparison: { winner: 'a', verdicts: ['a', 'a'] } } },
    { value: { id: '2', comparison: { winner: 'b' } } },
    { dropped: 'other-instruction' },
    { dropped: 'no-other-answer' },
  ]);
  // Other answers make another stage.
  const changed = compare({ provider, against: await otherAnswers(others.slice(1)) });
  expect(changed.settings).not.toEqual(stage.settings);
});

test('a rubric: grades as numbers or texts, missing ones asked for again', async () => {
  const replies = ['{"clear": 4}', 'Here: {"clear": 1, "true": "5"}'];
  const provider = scripted({ chat: () => replies.shift() ?? 'no' });
  const criteria = { clear: 'Is it clear?', true: 'Is it true?', kind: 'Is it kind?' };
  expect(await judgeRubric(judged, criteria, { provider })).toEqual({ clear: 4, true: 5, kind: null });
});

describe('statistics', () => {
  test('bootstrap: the interval of a mean', () => {
    const values = Array.from({ length: 400 }, (_, i) => (i * 7919) % 100);
    const { mean, low, high } = bootstrap(values, { seed: 1 });
    expect(mean).toBeCloseTo(49.5, 6);
    // Normal theory: 1.96 σ / √n with σ = 28.9.
    expect(high - mean).toBeCloseTo(2.83, 0);
    expect(mean - low).toBeCloseTo(2.83, 0);
    expect(bootstrap(values, { seed: 1 })).toEqual({ mean, low, high });
    expect(bootstrap([3])).toEqual({ mean: 3, low: 3, high: 3 });
    expect(() => bootstrap([])).toThrow('0 values');
  });
  test('rates, lengths, correlation, cost', () => {
    expect(winRate(['a', 'b', 'tie', 'a'])).toMatchObject({ mean: 0.625, wins: 2, losses: 1, ties: 1 });
    expect(lengths(['a b', 'abcd', ''])).toMatchObject({
      count: 3,
      characters: { mean: 7 / 3, median: 3, most: 4 },
      words: { mean: 1, most: 2 },
    });
    expect(correlation([1, 2, 3], [2, 4, 6])).toBeCloseTo(1, 12);
    expect(correlation([1, 2, 3], [5, 5, 5])).toBe(0);
    expect(cost({ requests: 4, retries: 0, promptTokens: 2e6, completionTokens: 1e6 }, { prompt: 1, completion: 3 })).toEqual({
      total: 5,
      each: 1.25,
    });
  });
});
