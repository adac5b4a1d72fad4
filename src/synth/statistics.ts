// How sure a mean is, and what answers cost.

import { ConfigError } from '../tensor/errors.ts';
import { checkSeed, randomBlock } from '../tensor/random.ts';
import type { Winner } from './judge.ts';
import type { Meter } from './provider.ts';

export interface Interval {
  readonly mean: number;
  readonly low: number;
  readonly high: number;
}

export interface BootstrapOptions {
  /** Share of the resampled means between the bounds. Default 0.95. */
  readonly level?: number;
  /** Default 2000. */
  readonly resamples?: number;
  /** Default 0. */
  readonly seed?: number;
}

/** Mean and percentile bootstrap interval (Efron 1979). @throws ConfigError for no values */
export function bootstrap(values: readonly number[], options: BootstrapOptions = {}): Interval {
  const { level = 0.95, resamples = 2000, seed = 0 } = options;
  checkSeed(seed);
  const n = values.length;
  if (n === 0 || !(level > 0 && level < 1) || !(resamples >= 1)) {
    throw new ConfigError(
      `bootstrap: ${n} values, level ${level}, ${resamples} resamples; there must be a value, and a level below 1`,
      {
        code: 'ERR_CONFIG',
        op: 'bootstrap',
        argument: n === 0 ? 'values' : 'level',
      },
    );
  }
  const block = new Uint32Array(4);
  const means = new Float64Array(resamples);
  for (let r = 0; r < resamples; r++) {
    let sum = 0;
    for (let i = 0; i < n; i++) {
      if ((i & 3) === 0) randomBlock(seed, r, i >> 2, block);
      sum += values[Math.floor((block[i & 3]! / 2 ** 32) * n)]!;
    }
    means[r] = sum / n;
  }
  means.sort();
  const at = (share: number) => means[Math.min(resamples - 1, Math.max(0, Math.round(share * (resamples - 1))))]!;
  const mean = values.reduce((a, b) => a + b, 0) / n;
  return { mean, low: at((1 - level) / 2), high: at((1 + level) / 2) };
}

export interface WinRate extends Interval {
  readonly wins: number;
  readonly losses: number;
  readonly ties: number;
}

/** The share of comparisons that `a` won, a tie counting half. */
export function winRate(winners: readonly Winner[], options: BootstrapOptions = {}): WinRate {
  const points = { a: 1, b: 0, tie: 0.5 } as const;
  const of = (winner: Winner) => winners.filter((w) => w === winner).length;
  return {
    ...bootstrap(
      winners.map((w) => points[w]),
      options,
    ),
    wins: of('a'),
    losses: of('b'),
    ties: of('tie'),
  };
}

/** Lengths of texts: judges like long answers, so a report says how long they were. */
export interface Lengths {
  readonly count: number;
  readonly characters: { readonly mean: number; readonly median: number; readonly most: number };
  readonly words: { readonly mean: number; readonly median: number; readonly most: number };
}

export function lengths(texts: readonly string[]): Lengths {
  const of = (size: (text: string) => number) => {
    const sizes = texts.map(size).sort((a, b) => a - b);
    const mean = sizes.reduce((a, b) => a + b, 0) / Math.max(1, sizes.length);
    return { mean, median: sizes[sizes.length >> 1] ?? 0, most: sizes.at(-1) ?? 0 };
  };
  return {
    count: texts.length,
    characters: of((text) => text.length),
    words: of((text) => text.split(/\s+/).filter((word) => word !== '').length),
  };
}

/** Correlation of two lists of numbers (Pearson); 0 where one does not vary. Of scores and lengths: how much length was rewarded. */
export function correlation(a: readonly number[], b: readonly number[]): number {
  const n = Math.min(a.length, b.length);
  const mean = (v: readonly number[]) => v.slice(0, n).reduce((x, y) => x + y, 0) / n;
  const [ma, mb] = [mean(a), mean(b)];
  let [ab, aa, bb] = [0, 0, 0];
  for (let i = 0; i < n; i++) {
    ab += (a[i]! - ma) * (b[i]! - mb);
    aa += (a[i]! - ma) ** 2;
    bb += (b[i]! - mb) ** 2;
  }
  return aa > 0 && bb > 0 ? ab / Math.sqrt(aa * bb) : 0;
}

/** Money per million tokens. */
export interface Prices {
  readonly prompt: number;
  readonly completion: number;
}

/** What a provider's calls cost so far, together and for each of `answers`. */
export function cost(meter: Meter, prices: Prices, answers = meter.requests): { readonly total: number; readonly each: number } {
  const total = (meter.promptTokens * prices.prompt + meter.completionTokens * prices.completion) / 1e6;
  return { total, each: answers > 0 ? total / answers : 0 };
}
