// What an instruction synthesizer is finetuned on: examples of one dataset in a row, as conversations in which the "user" gives a context and
// the "assistant" writes the pairs. With `synthesizerTraining`, loss lies on the pairs alone.

import { writeAll, writeAtomic } from '../../io/atomic.ts';
import { ConfigError } from '../../tensor/errors.ts';
import { checkSeed, permutation } from '../../tensor/random.ts';
import type { Tokenizer } from '../../tokenizer/tokenizer.ts';
import type { ChatMessage } from '../provider.ts';
import type { ContextPairs } from './contexts.ts';
import { bracketsOf, contextText, exampleText, pairsText } from './format.ts';

export interface FewShotOptions {
  readonly tokenizer: Tokenizer;
  /** Most tokens of a chain. */
  readonly length: number;
  /** Most examples of a chain. Default: as many as fit. */
  readonly shots?: number;
  /** Seed of the order. Default 0. */
  readonly seed?: number;
}

/** A few-shot example for finetuning: a row of the form `messages`. */
export interface FewShotChain {
  readonly dataset: string;
  readonly messages: readonly ChatMessage[];
}

export interface FewShotReport {
  readonly chains: number;
  readonly examples: number;
  readonly pairs: number;
  readonly tokens: number;
  /** Examples that are longer than a chain may be, and were left out. */
  readonly tooLong: number;
}

/** What `finetune` is to be told about such data: each example stands between begin and end token, and the pairs are learned. */
export const synthesizerTraining = {
  template: `{%- for message in messages %}
{%- if message.role == 'assistant' %}{%- generation %}{{- message.content + eos_token }}{%- endgeneration %}
{%- else %}{%- if bos_token and bos_token != eos_token %}{{- bos_token }}{%- endif %}{{- message.content }}{%- endif %}
{%- endfor %}
`,
  mask: 'assistant-turns',
} as const;

/**
 * Groups examples of one dataset, in an order drawn by the seed, as long as the next one fits: few-shot examples as they are seen whole.
 * @throws ConfigError
 */
export function fewShotGroups(
  examples: readonly ContextPairs[],
  { tokenizer, length, shots = Number.POSITIVE_INFINITY, seed = 0 }: FewShotOptions,
): { readonly groups: ContextPairs[][]; readonly report: FewShotReport } {
  checkSeed(seed);
  for (const [name, value] of Object.entries({ length, shots })) {
    if (value >= 1 && (Number.isInteger(value) || value === Number.POSITIVE_INFINITY)) continue;
    throw new ConfigError(`fewShotGroups: ${name} is ${value}; it should be a positive integer`, {
      code: 'ERR_CONFIG',
      op: 'fewShotGroups',
      argument: name,
      expected: 'a positive integer',
      actual: String(value),
    });
  }
  const brackets = bracketsOf(tokenizer);
  const byDataset = new Map<string, ContextPairs[]>();
  for (const example of examples) {
    const own = byDataset.get(example.dataset);
    if (own === undefined) byDataset.set(example.dataset, [example]);
    else own.push(example);
  }
  const groups: ContextPairs[][] = [];
  const totals = { examples: 0, pairs: 0, tokens: 0, tooLong: 0 };
  for (const [number, own] of [...byDataset.values()].entries()) {
    const place = permutation(own.length, seed, orderStream + number);
    let group: ContextPairs[] = [];
    let filled = 0;
    for (let i = 0; i < own.length; i++) {
      const example = own[place(i)]!;
      // A tokenizer may join what the turns of a chain keep apart: one token for each cut is left free.
      const tokens = tokenizer.encode(exampleText(example, brackets)).length + 1;
      if (tokens > length) {
        totals.tooLong++;
        continue;
      }
      if (group.length === 0 || filled + tokens > length || group.length === shots) {
        group = [];
        groups.push(group);
        filled = 0;
      }
      group.push(example);
      filled += tokens;
      totals.examples++;
      totals.pairs += example.pairs.length;
      totals.tokens += tokens - 1;
    }
  }
  return { groups, report: { chains: groups.length, ...totals } };
}

/** The groups of {@link fewShotGroups} as rows for `finetune`. @throws ConfigError */
export function fewShotChains(
  examples: readonly ContextPairs[],
  options: FewShotOptions,
): { readonly chains: FewShotChain[]; readonly report: FewShotReport } {
  const { groups, report } = fewShotGroups(examples, options);
  const chains = groups.map((group) => ({
    dataset: group[0]!.dataset,
    messages: group.flatMap(({ context, pairs }): ChatMessage[] => [
      { role: 'user', content: contextText(context) },
      { role: 'assistant', content: pairsText(pairs) },
    ]),
  }));
  return { chains, report };
}
// A stream number of the seed that nothing else uses.
const orderStream = 0x5f3c_0000;

/** Writes chains as JSON Lines, for `finetune`. @throws FileError `ERR_WRITE` */
export async function writeFewShotChains(path: string, chains: readonly FewShotChain[]): Promise<void> {
  await writeAtomic(path, async (file) => {
    for (const chain of chains) await writeAll(file, Buffer.from(`${JSON.stringify(chain)}\n`));
  });
}
