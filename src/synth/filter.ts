// Which records stay. Conditions by name, the published recipes among them; all but the last are looked at record by record.

import { ConfigError } from '../tensor/errors.ts';
import type { GatherStage } from './pipeline.ts';
import {
  type Category,
  type Difficulty,
  difficulties,
  type InstructionRecord,
  instructionOf,
  type Quality,
  qualities,
  responseOf,
} from './record.ts';

/** Conditions that must all hold. A record without the tag that a condition is about does not pass it. */
export interface FilterOptions {
  /** Lowest quality. */
  readonly quality?: Quality;
  /** Lowest difficulty. */
  readonly difficulty?: Difficulty;
  readonly categories?: readonly Category[];
  readonly languages?: readonly string[];
  /** Only what the tagger calls safe. */
  readonly safe?: boolean;
  /** The nearest other instruction is farther than this. */
  readonly distance?: number;
  /** The reward is above this. */
  readonly reward?: number;
  /** The reward is above the base model's by more than this. */
  readonly rewardDifference?: number;
  /** Drop instructions that end in a colon. */
  readonly noColon?: boolean;
  /** Characters of the answer. */
  readonly response?: { readonly least?: number; readonly most?: number };
  /** Of what is left, this many of the longest answers, in the order of the data. */
  readonly longest?: number;
  /** With `longest`: this share of them is of difficulty easy or below, the rest above. */
  readonly easyShare?: number;
}

/**
 * The filters of Magpie's released sets (paper, table 5). Rewards there are those of a reward model, with thresholds of −12 and 0 on
 * its own scale; ours are 0 to 100, so `reward` and `rewardDifference` are set to be as mild: above 0.
 */
export const filterRecipes = {
  'magpie-air-300k': { quality: 'good', difficulty: 'medium', distance: 0, rewardDifference: 0, longest: 300_000 },
  'magpie-pro-300k': { quality: 'average', distance: 0, reward: 0, longest: 300_000 },
  'magpie-filter-2': { quality: 'good', difficulty: 'easy', distance: 0, reward: 0, longest: 300_000 },
  'magpie-filter-3': { distance: 0, reward: 0, longest: 300_000 },
  'magpie-filter-4': { quality: 'good', difficulty: 'easy', distance: 0, rewardDifference: 0, longest: 300_000 },
  'magpie-filter-5': { quality: 'good', difficulty: 'easy', distance: 0, reward: 0 },
  'magpie-filter-6': { distance: 0, reward: 0, longest: 200_000, easyShare: 0.5 },
  'qwen2-pro-300k': { quality: 'good', reward: 0, noColon: true, longest: 300_000 },
} as const satisfies Record<string, FilterOptions>;

export type FilterRecipe = keyof typeof filterRecipes;

/** The conditions of a recipe. @throws ConfigError */
export function filterRecipe(name: string): FilterOptions {
  if (Object.hasOwn(filterRecipes, name)) return filterRecipes[name as FilterRecipe];
  const known = Object.keys(filterRecipes).join(', ');
  throw new ConfigError(`filter: there is no recipe '${name}'; known are ${known}`, {
    code: 'ERR_CONFIG',
    op: 'filter',
    argument: 'recipe',
    expected: known,
    actual: name,
  });
}

/** Why a record does not pass; undefined when it does. `longest` is not looked at. */
export function refusal(record: InstructionRecord, options: FilterOptions): string | undefined {
  const { tags = {}, nearest, reward, baseReward } = record;
  const below = <T extends string>(scale: readonly T[], value: T | null | undefined, least: T | undefined): boolean =>
    least !== undefined && !(value != null && scale.indexOf(value) >= scale.indexOf(least));
  if (below(qualities, tags.quality, options.quality)) return 'quality';
  if (below(difficulties, tags.difficulty, options.difficulty)) return 'difficulty';
  if (options.categories !== undefined && !(tags.category != null && options.categories.includes(tags.category)))
    return 'category';
  if (options.languages !== undefined && !(tags.language != null && options.languages.includes(tags.language))) return 'language';
  if (options.safe && tags.safety !== 'safe') return 'safety';
  if (options.distance !== undefined && !(nearest !== undefined && nearest.distance > options.distance)) return 'distance';
  if (options.reward !== undefined && !(reward != null && reward > options.reward)) return 'reward';
  if (options.rewardDifference !== undefined) {
    if (!(reward != null && baseReward != null && reward - baseReward > options.rewardDifference)) return 'reward-difference';
  }
  if (options.noColon && instructionOf(record).trimEnd().endsWith(':')) return 'colon';
  const { least = 0, most = Number.POSITIVE_INFINITY } = options.response ?? {};
  const length = responseOf(record).length;
  return length < least || length > most ? 'response-length' : undefined;
}

/** Keeps the records that pass. Memory does not grow with their number. */
export function filter(options: FilterOptions | FilterRecipe): GatherStage<InstructionRecord, InstructionRecord> {
  const conditions: FilterOptions = typeof options === 'string' ? filterRecipe(options) : options;
  const { longest, easyShare } = conditions;
  return {
    kind: 'gather',
    name: 'filter',
    settings: conditions,
    async run(records, output) {
      const groupOf = (record: InstructionRecord) => (easyShare === undefined ? 0 : below2(record.tags?.difficulty) ? 0 : 1);
      // The longest are found by how many answers there are of each length, in a first pass.
      const cuts: Cut[] = [];
      if (longest !== undefined) {
        const counts = [new Map<number, number>(), new Map<number, number>()];
        for await (const record of records()) {
          if (refusal(record, conditions) !== undefined) continue;
          const length = responseOf(record).length;
          const group = counts[groupOf(record)]!;
          group.set(length, (group.get(length) ?? 0) + 1);
        }
        const rooms =
          easyShare === undefined ? [longest] : [Math.round(longest * easyShare), longest - Math.round(longest * easyShare)];
        for (const [g, room] of rooms.entries()) cuts.push(cutOf(counts[g]!, room));
      }
      for await (const record of records()) {
        const reason = refusal(record, conditions);
        if (reason !== undefined) await output.drop(record, reason);
        else if (longest === undefined || passes(cuts[groupOf(record)]!, responseOf(record).length)) await output.keep(record);
        else await output.drop(record, 'longest');
      }
    },
  };
}

const below2 = (difficulty: Difficulty | null | undefined): boolean =>
  difficulty == null || difficulties.indexOf(difficulty) <= difficulties.indexOf('easy');

/** Lengths above `length` pass, and the first `room` of exactly that length. */
interface Cut {
  readonly length: number;
  room: number;
}

function cutOf(counts: ReadonlyMap<number, number>, room: number): Cut {
  let left = room;
  for (const [length, count] of [...counts].sort(([a], [b]) => b - a)) {
    if (count >= left) return { length, room: left };
    left -= count;
  }
  return { length: -1, room: 0 };
}

function passes(cut: Cut, length: number): boolean {
  return length > cut.length || (length === cut.length && cut.room-- > 0);
}
