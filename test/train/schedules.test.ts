import { expect, test } from 'vitest';
import type { Schedule } from '../../src/train/config.ts';
import { learningRate, learningRateFactor } from '../../src/train/schedules.ts';

const base: Schedule = { kind: 'cosine', warmupSteps: 4, finalFraction: 0.1, decayFraction: 0.2 };
const all = (schedule: Schedule, total: number) =>
  Array.from({ length: total }, (_, step) => learningRateFactor(schedule, step, total));

test.each(['cosine', 'linear', 'constant', 'wsd'] as const)(
  '%s: warm-up is linear, without a step at 0, up to the peak',
  (kind) => {
    expect(all({ ...base, kind }, 24).slice(0, 5)).toEqual([0.25, 0.5, 0.75, 1, 1]);
  },
);

test('cosine: peak, midpoint and floor are exact', () => {
  const schedule = { ...base, warmupSteps: 0 };
  expect(learningRateFactor(schedule, 0, 101)).toBe(1);
  expect(learningRateFactor(schedule, 50, 101)).toBeCloseTo(0.55, 15);
  expect(learningRateFactor(schedule, 100, 101)).toBeCloseTo(0.1, 15);
  expect(learningRateFactor(schedule, 25, 101)).toBeCloseTo(0.1 + (0.9 * (1 + Math.SQRT1_2)) / 2, 15);
});

test('linear: a straight line to the floor', () => {
  expect(all({ ...base, kind: 'linear', warmupSteps: 0, finalFraction: 0 }, 5)).toEqual([1, 0.75, 0.5, 0.25, 0]);
});

test('constant stays', () => {
  expect(all({ ...base, kind: 'constant', warmupSteps: 0 }, 3)).toEqual([1, 1, 1]);
});

test('wsd: warm-up, plateau, then a line to the floor over the last decayFraction', () => {
  const factors = all({ ...base, kind: 'wsd', warmupSteps: 2, finalFraction: 0, decayFraction: 0.4 }, 10);
  expect(factors).toEqual([0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]);
});

test('wsd without decay is a plateau; with nothing but decay a line', () => {
  expect(all({ ...base, kind: 'wsd', warmupSteps: 0, decayFraction: 0 }, 3)).toEqual([1, 1, 1]);
  expect(all({ ...base, kind: 'wsd', warmupSteps: 0, finalFraction: 0, decayFraction: 1 }, 4)).toEqual([0.75, 0.5, 0.25, 0]);
});

test('a run of one step, a warm-up longer than the run, and steps past the end stay within [0, 1]', () => {
  for (const kind of ['cosine', 'linear', 'constant', 'wsd'] as const) {
    for (const [total, warmupSteps] of [
      [1, 0],
      [1, 1],
      [3, 10],
    ] as const) {
      for (let step = 0; step < total + 3; step++) {
        const factor = learningRateFactor({ ...base, kind, warmupSteps }, step, total);
        expect(factor).toBeGreaterThan(0);
        expect(factor).toBeLessThanOrEqual(1);
      }
    }
    if (kind !== 'constant') expect(learningRateFactor({ ...base, kind, warmupSteps: 0 }, 99, 10)).toBeCloseTo(0.1, 15);
  }
});

test('learningRate scales the factor', () => {
  expect(learningRate(base, 3e-4, 0, 10)).toBe(3e-4 * 0.25);
});
