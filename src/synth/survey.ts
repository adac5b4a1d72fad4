// What a data set is like, counted while its records go by: memory does not grow with their number.

import { randomBlock } from '../tensor/random.ts';
import { categories, difficulties, type InstructionRecord, instructionOf, qualities, responseOf } from './record.ts';

/** Counts in bins with these lower bounds, rising; what is below the first is in the first. */
export interface Histogram {
  readonly bounds: readonly number[];
  readonly counts: readonly number[];
}

export interface Spread {
  readonly count: number;
  readonly mean: number;
  readonly least: number;
  readonly most: number;
  readonly histogram: Histogram;
}

/** A data set in figures. */
export interface Survey {
  readonly records: number;
  readonly turns: Readonly<Record<string, number>>;
  /** Characters. */
  readonly instruction: Spread;
  readonly response: Spread;
  /** How many records have each value; `none` for null or absent, where any record has one. */
  readonly tags: Readonly<Record<string, Readonly<Record<string, number>>>>;
  readonly reward?: Spread;
  readonly distance?: Spread;
  /** Records by the sanitizer's rules that mended them. */
  readonly rules: Readonly<Record<string, number>>;
  /** Records drawn with equal chances. */
  readonly samples: readonly InstructionRecord[];
}

const lengthBounds = [0, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000];
const rewardBounds = [0, 10, 20, 30, 40, 50, 60, 70, 80, 90];
const distanceBounds = [0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1, 1.5];

/** Counts as records come. */
export interface Surveyor {
  add(record: InstructionRecord): void;
  done(): Survey;
}

/** @param options.samples records to show. Default 12. */
export function surveyor(options: { readonly samples?: number; readonly seed?: number } = {}): Surveyor {
  const { samples: wanted = 12, seed = 0 } = options;
  let records = 0;
  const turns = tally();
  const rules = tally();
  const tags = Object.fromEntries(['quality', 'difficulty', 'category', 'safety', 'language'].map((name) => [name, tally()]));
  const spreads = {
    instruction: spread(lengthBounds),
    response: spread(lengthBounds),
    reward: spread(rewardBounds),
    distance: spread(distanceBounds),
  };
  const samples: InstructionRecord[] = [];
  return {
    add(record) {
      const { messages, tags: given = {}, reward, nearest, origin } = record;
      // Each record takes the place of one that is shown with the chance that keeps all equal (reservoir, Vitter's R).
      if (samples.length < wanted) samples.push(record);
      else {
        const at = Math.floor((randomBlock(seed, 0x7376, records)[0]! / 2 ** 32) * (records + 1));
        if (at < wanted) samples[at] = record;
      }
      records++;
      turns.add(String(messages.filter(({ role }) => role === 'assistant').length));
      spreads.instruction.add(instructionOf(record).length);
      spreads.response.add(responseOf(record).length);
      if (typeof reward === 'number') spreads.reward.add(reward);
      if (nearest !== undefined) spreads.distance.add(nearest.distance);
      for (const [name, counts] of Object.entries(tags)) counts.add(given[name as keyof typeof given] ?? 'none');
      for (const rule of origin?.rules ?? []) rules.add(rule);
    },
    done() {
      const orders: Readonly<Record<string, readonly string[]>> = {
        quality: qualities,
        difficulty: difficulties,
        category: categories,
      };
      const shown = Object.entries(tags).filter(([, counts]) => counts.known());
      return {
        records,
        turns: turns.done(),
        instruction: spreads.instruction.done(),
        response: spreads.response.done(),
        tags: Object.fromEntries(shown.map(([name, counts]) => [name, counts.done(orders[name])])),
        ...(spreads.reward.any() ? { reward: spreads.reward.done() } : {}),
        ...(spreads.distance.any() ? { distance: spreads.distance.done() } : {}),
        rules: rules.done(),
        samples,
      };
    },
  };
}

// A field that holds anything must not fill the memory with its values.
const mostValues = 500;

function tally() {
  const counts = new Map<string, number>();
  return {
    add(value: string): void {
      const key = counts.has(value) || counts.size < mostValues ? value : 'others';
      counts.set(key, (counts.get(key) ?? 0) + 1);
    },
    known: () => [...counts.keys()].some((key) => key !== 'none'),
    done(order: readonly string[] = []): Record<string, number> {
      const place = (key: string) => (order.includes(key) ? order.indexOf(key) : order.length);
      return Object.fromEntries([...counts].sort(([a, n], [b, m]) => place(a) - place(b) || m - n || (a < b ? -1 : 1)));
    },
  };
}

function spread(bounds: readonly number[]) {
  const counts = bounds.map(() => 0);
  let count = 0;
  let sum = 0;
  let least = Number.POSITIVE_INFINITY;
  let most = Number.NEGATIVE_INFINITY;
  return {
    add(value: number): void {
      count++;
      sum += value;
      least = Math.min(least, value);
      most = Math.max(most, value);
      counts[
        Math.max(
          0,
          bounds.findLastIndex((bound) => value >= bound),
        )
      ]!++;
    },
    any: () => count > 0,
    done: (): Spread => ({
      count,
      mean: count === 0 ? 0 : sum / count,
      least: count === 0 ? 0 : least,
      most: count === 0 ? 0 : most,
      histogram: { bounds, counts },
    }),
  };
}
