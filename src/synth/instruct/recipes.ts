// The three ways to pretrain that Instruction Pre-Training (arXiv:2406.14491) compares, and its recipe for going on from a trained model, as the
// `data.mixture` of a run.

import { ConfigError } from '../../tensor/errors.ts';
import type { RunInput } from '../../train/config.ts';

/** The sources of a run's `data.mixture`. */
export type RunMixture = NonNullable<Extract<RunInput, { kind: 'pretrain' }>['data']['mixture']>;

/** Where a source lies: the `source` of a mixture's entry. */
export type RunSource = RunMixture[number]['source'];

/**
 * `vanilla`: the raw corpus. `mix`: it and the synthesizer's training data. `instruct`: the raw corpus with a part of it converted, and the
 * synthesizer's training data. Compare them at equal tokens: give their runs the same `steps` or `tokens`.
 */
export type PretrainingRecipe = 'vanilla' | 'mix' | 'instruct';

export interface RecipeSources {
  /** The part of the corpus that stays raw; four fifths of it in the paper. */
  readonly text: RunSource;
  /** The other part as it was. */
  readonly convertible: RunSource;
  /** The other part with pairs: documents of {@link renderStage}. Needed by `instruct`. */
  readonly converted?: RunSource;
  /** The synthesizer's training data, rendered. Needed by `mix` and `instruct`. */
  readonly tuning?: RunSource;
}

/**
 * The mixture of a run from scratch; every source counts by its size.
 * @param options.tuningRepeat how often the synthesizer's training data comes while the corpus comes once. Default 4, as in the paper.
 * @throws ConfigError `ERR_CONFIG` for a source that the recipe needs and that is not given
 */
export function pretrainingMixture(
  recipe: PretrainingRecipe,
  sources: RecipeSources,
  options: { readonly tuningRepeat?: number } = {},
): RunMixture {
  const needed = (name: 'converted' | 'tuning'): RunSource => {
    const source = sources[name];
    if (source !== undefined) return source;
    throw new ConfigError(`pretrainingMixture: the recipe "${recipe}" needs the source ${name}`, {
      code: 'ERR_CONFIG',
      op: 'pretrainingMixture',
      argument: name,
    });
  };
  const text = { name: 'text', source: sources.text };
  const tuning = () => ({ name: 'tuning', source: needed('tuning'), repeat: options.tuningRepeat ?? 4 });
  switch (recipe) {
    case 'vanilla':
      return [text, { name: 'convertible', source: sources.convertible }];
    case 'mix':
      return [text, { name: 'convertible', source: sources.convertible }, tuning()];
    case 'instruct':
      return [text, { name: 'converted', source: needed('converted') }, tuning()];
    default:
      return recipe satisfies never;
  }
}

export interface ContinualOptions {
  /** Text of the new domain, converted or raw. */
  readonly domain: RunSource;
  /** General instructions: question and answer as plain text. */
  readonly general: RunSource;
  /** Text like that of the first pretraining, which keeps what the model knows. Default: none. */
  readonly replay?: RunSource;
  /** Share of the tokens that are general instructions. Default 0.5, as in the paper. */
  readonly generalShare?: number;
  /** Share of the tokens that are replayed. Default 0.1 where there is a source. */
  readonly replayShare?: number;
  /** Most passes over the domain's text. Default: no limit. */
  readonly passes?: number;
}

/**
 * The mixture of a run that goes on from a trained model (`from`), shares by tokens.
 *
 * At the start of such a run a model first loses some of what it knew, in the new domain too, before it gains (the stability gap,
 * arXiv:2406.14833). What helps: a smaller and better part of the domain's text for several passes in place of a single pass over all of it
 * (choose it, and set `passes`); the best texts, as a model's perplexity or a judge tells; and other text that resembles what the model was
 * first trained on (`replay`).
 * @throws ConfigError `ERR_CONFIG` for shares that leave nothing to the domain
 */
export function continualMixture(options: ContinualOptions): RunMixture {
  const { domain, general, replay, generalShare = 0.5, replayShare = replay === undefined ? 0 : 0.1, passes } = options;
  for (const [name, share] of Object.entries({ generalShare, replayShare })) {
    if (share >= 0 && share < 1) continue;
    throw refuse(name, `is ${share}; it should be from 0 to below 1`);
  }
  const left = 1 - generalShare - replayShare;
  if (!(left > 0))
    throw refuse(
      'generalShare',
      `and replayShare are ${generalShare} and ${replayShare}; they should leave a share to the domain`,
    );
  if (replayShare > 0 && replay === undefined) throw refuse('replay', 'is missing; replayShare asks for it');
  return [
    { name: 'domain', source: domain, weight: left, ...(passes === undefined ? {} : { repeat: passes }) },
    ...(generalShare === 0 ? [] : [{ name: 'general', source: general, weight: generalShare }]),
    ...(replay === undefined || replayShare === 0 ? [] : [{ name: 'replay', source: replay, weight: replayShare }]),
  ];
}

function refuse(argument: string, why: string): ConfigError {
  return new ConfigError(`continualMixture: ${argument} ${why}`, { code: 'ERR_CONFIG', op: 'continualMixture', argument });
}
