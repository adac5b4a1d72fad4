import { expect, test } from 'vitest';
import { continualMixture, pretrainingMixture } from '../../../src/synth/instruct/recipes.ts';
import { type PretrainConfig, parseRun } from '../../../src/train/config.ts';

const text = { text: 'corpus' };
const convertible = { jsonl: 'raw.jsonl' };
const converted = { jsonl: 'documents.jsonl' };
const tuning = { jsonl: 'tuning.jsonl' };
const all = { text, convertible, converted, tuning };

test('the three recipes: which sources, and how often', () => {
  const told = (recipe: 'vanilla' | 'mix' | 'instruct', options = {}) =>
    pretrainingMixture(recipe, all, options).map(({ source, repeat = 1 }) => [source, repeat]);
  expect(told('vanilla')).toEqual([
    [text, 1],
    [convertible, 1],
  ]);
  expect(told('mix')).toEqual([
    [text, 1],
    [convertible, 1],
    [tuning, 4],
  ]);
  expect(told('instruct', { tuningRepeat: 2 })).toEqual([
    [text, 1],
    [converted, 1],
    [tuning, 2],
  ]);
  expect(() => pretrainingMixture('instruct', { text, convertible, tuning })).toThrow(/needs the source converted/);
  expect(() => pretrainingMixture('mix', { text, convertible })).toThrow(/needs the source tuning/);
});

test('continual pretraining: shares by tokens, half of them general instructions unless told otherwise', () => {
  const general = { jsonl: 'general.jsonl' };
  const shares = (options = {}) =>
    continualMixture({ domain: converted, general, ...options }).map(({ name, weight, repeat }) => [name, weight, repeat]);
  expect(shares()).toEqual([
    ['domain', 0.5, undefined],
    ['general', 0.5, undefined],
  ]);
  expect(shares({ generalShare: 0.25, passes: 4 })).toEqual([
    ['domain', 0.75, 4],
    ['general', 0.25, undefined],
  ]);
  expect(shares({ replay: text })).toEqual([
    ['domain', 0.4, undefined],
    ['general', 0.5, undefined],
    ['replay', 0.1, undefined],
  ]);
  expect(shares({ generalShare: 0 })).toEqual([['domain', 1, undefined]]);
  expect(() => shares({ generalShare: 1 })).toThrow(/generalShare is 1/);
  expect(() => shares({ generalShare: 0.95, replay: text })).toThrow(/leave a share/);
  expect(() => shares({ replayShare: 0.2 })).toThrow(/replay is missing/);
});

test('a run takes a recipe as its mixture, and begins anew or with a model', () => {
  const run = { kind: 'pretrain', output: 'out', steps: 1 } as const;
  const parsed = parseRun(
    { ...run, data: { mixture: pretrainingMixture('instruct', all) }, tokenizer: 'tokenizer.json', model: 'gemma2-nano' },
    { base: '/base' },
  ) as PretrainConfig;
  expect(parsed.data.mixture!.map(({ source }) => source)).toEqual([
    { text: '/base/corpus' },
    { jsonl: '/base/documents.jsonl' },
    { jsonl: '/base/tuning.jsonl' },
  ]);
  const data = { mixture: continualMixture({ domain: converted, general: text }) };
  expect(parseRun({ ...run, data, from: 'base' }, { base: '/base' })).toMatchObject({ from: '/base/base' });
  expect(() => parseRun({ ...run, data, from: 'base', model: 'gemma2-nano' })).toThrow(/model must be left out/);
  expect(() => parseRun({ ...run, data })).toThrow(/model must be given/);
  expect(() => parseRun({ ...run, data: { mixture: [{ source: text, weight: 1 }, { source: tuning }] }, from: 'base' })).toThrow(
    /a weight, or none/,
  );
});
