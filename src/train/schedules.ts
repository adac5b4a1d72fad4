// Learning rate over time, as a share of its highest value. Steps count from 0; every schedule starts with a linear warm-up.

import type { Schedule } from './config.ts';

/**
 * Share of the highest learning rate, 0 to 1, that step `step` (0 is the first) of `totalSteps` uses.
 * Warm-up step i uses (i + 1) / warmupSteps, so no step is spent at a rate of 0; the last step of all uses `finalFraction`.
 */
export function learningRateFactor(schedule: Schedule, step: number, totalSteps: number): number {
  const { kind, warmupSteps, finalFraction: floor } = schedule;
  if (step < warmupSteps) return (step + 1) / warmupSteps;
  if (kind === 'constant') return 1;
  const last = totalSteps - 1;
  const stable =
    kind === 'wsd' ? Math.max(warmupSteps, totalSteps - Math.round(schedule.decayFraction * totalSteps)) : warmupSteps;
  if (step < stable) return 1;
  // WSD leaves the plateau with its first decaying step; the others start from the peak itself.
  const start = kind === 'wsd' ? stable - 1 : stable;
  const progress = last > start ? Math.min(1, (step - start) / (last - start)) : 1;
  switch (kind) {
    case 'cosine':
      return floor + ((1 - floor) * (1 + Math.cos(Math.PI * progress))) / 2;
    case 'linear':
    case 'wsd':
      return 1 + (floor - 1) * progress;
    default:
      return kind satisfies never;
  }
}

/** Learning rate of step `step` (0 is the first) of `totalSteps`, when `peak` is the highest. */
export function learningRate(schedule: Schedule, peak: number, step: number, totalSteps: number): number {
  return peak * learningRateFactor(schedule, step, totalSteps);
}
