// A model as judge: one answer on a scale, two answers against each other, or an answer by several criteria.

import { digest, type RecordStage } from './pipeline.ts';
import type { ChatMessage, Provider, Reply, Sampling, TokenScore } from './provider.ts';
import { type InstructionRecord, instructionOf, responseOf } from './record.ts';
import { fromJson, objectsIn } from './tag.ts';

/** What is judged. */
export interface Judged {
  readonly instruction: string;
  readonly response: string;
  /** A good answer to compare with. */
  readonly reference?: string;
}

export interface JudgeOptions {
  readonly provider: Provider;
  /** Default: the likeliest tokens. */
  readonly sampling?: Sampling;
  /** Further tries when no verdict can be read. Default 2. */
  readonly retries?: number;
  readonly seed?: number;
  readonly signal?: AbortSignal;
}

export interface Score {
  /** 0 to 100; null when the judge gave none. An empty response is 0 without being asked about. */
  readonly score: number | null;
  /** `expected`: the mean over the judge's score tokens; `read`: the number that it wrote. */
  readonly by: 'expected' | 'read' | 'empty' | 'none';
}

/**
 * Scores an answer from 0 to 100. Where the backend tells log-probabilities, the score is the mean over the numbers that the judge
 * might have written, not only the likeliest.
 */
export async function judgeScore(judged: Judged, options: JudgeOptions): Promise<Score> {
  if (judged.response.trim() === '') return { score: 0, by: 'empty' };
  const { provider } = options;
  const asked = scorePrompt(judged);
  const expects = provider.can.logProbabilities;
  for (let attempt = 0; attempt <= (options.retries ?? 2); attempt++) {
    const reply = await ask(asked, options, attempt, { maxTokens: 16, ...(expects ? { logProbabilities: 20 } : {}) });
    const score = readScore(reply.text);
    if (score === undefined) continue;
    const expected = expectedScore(reply);
    return expected === undefined ? { score, by: 'read' } : { score: expected, by: 'expected' };
  }
  return { score: null, by: 'none' };
}

function scorePrompt({ instruction, response, reference }: Judged): ChatMessage[] {
  const parts = [
    `## Instruction\n${instruction}`,
    ...(reference === undefined ? [] : [`## A correct answer\n${reference}`]),
    `## Answer to judge\n${response}`,
    '## Your task\nScore the answer to judge from 0 (useless) to 100 (could not be better). Reply with the whole number only.',
  ];
  return [{ role: 'user', content: parts.join('\n\n') }];
}

/** The number of a reply that is a number and little else: prose with numbers in it is no score. */
export function readScore(text: string): number | undefined {
  const match =
    /^\W*(?:(?:the |my |final |overall )*(?:score|rating)\W*(?:is|=)?\W*)?(\d{1,3})(?:\.\d+)?\s*(?:\/\s*100|%|points?|out of 100)?\W*$/i.exec(
      text.trim(),
    );
  const score = match ? Number(match[1]) : undefined;
  return score !== undefined && score <= 100 ? score : undefined;
}

/** The mean of the numbers that the judge might have written, from its score tokens; undefined without log-probabilities. */
export function expectedScore({ tokens }: Pick<Reply, 'tokens'>): number | undefined {
  if (tokens === undefined) return undefined;
  const first = tokens.findIndex(({ text }) => /^\s*\d+$/.test(text));
  if (first < 0) return undefined;
  const digits: TokenScore[] = [];
  for (let i = first; i < tokens.length && /^\s*\d+$/.test(tokens[i]!.text); i++) digits.push(tokens[i]!);
  const whole = digits.length === 1;
  let expected = 0;
  // The places behind each token: what it counts. Later digits are taken as they follow those that were written.
  let behind = digits.reduce((sum, { text }) => sum + text.trim().length, 0);
  for (const token of digits) {
    const length = token.text.trim().length;
    behind -= length;
    let mass = 0;
    let sum = 0;
    for (const { text, logProbability } of withItself(token)) {
      const number = text.trim();
      if (!/^\d+$/.test(number) || Number(number) > 100 || (!whole && number.length !== length)) continue;
      const p = Math.exp(logProbability);
      mass += p;
      sum += p * Number(number);
    }
    if (!(mass > 0)) return undefined;
    expected += (sum / mass) * 10 ** behind;
  }
  return Math.min(100, expected);
}

function withItself(token: TokenScore): readonly { text: string; logProbability: number }[] {
  return token.alternatives.some(({ text }) => text === token.text) ? token.alternatives : [token, ...token.alternatives];
}

/** Who won: a, b, or neither. */
export type Winner = 'a' | 'b' | 'tie';

export interface Comparison {
  readonly winner: Winner;
  /** What the judge said in each order of the two; null when it could not be read. */
  readonly verdicts: readonly [Winner | null, Winner | null];
}

/** Compares two answers in both orders; a judge that changes its mind with the order means a tie. */
export async function judgePair(
  pair: { readonly instruction: string; readonly a: string; readonly b: string },
  options: JudgeOptions,
): Promise<Comparison> {
  const swapped = { a: 'b', b: 'a', tie: 'tie' } as const;
  const [straight, reversed] = await Promise.all([
    verdict(pair.instruction, pair.a, pair.b, options, 0),
    verdict(pair.instruction, pair.b, pair.a, options, 8),
  ]);
  const second = reversed === null ? null : swapped[reversed];
  return { winner: straight !== null && straight === second ? straight : 'tie', verdicts: [straight, second] };
}

async function verdict(instruction: string, a: string, b: string, options: JudgeOptions, draw: number): Promise<Winner | null> {
  const content = [
    `## Instruction\n${instruction}`,
    `## Answer A\n${a}`,
    `## Answer B\n${b}`,
    '## Your task\nWhich answer is better? Neither length nor order counts. Reply with A, B or tie, and nothing else.',
  ].join('\n\n');
  const choices = options.provider.can.choices ? { choices: ['A', 'B', 'tie'] } : {};
  for (let attempt = 0; attempt <= (options.retries ?? 2); attempt++) {
    const reply = await ask([{ role: 'user', content }], options, draw + attempt, { maxTokens: 8, ...choices });
    const match = /^\W*(?:answer\s+)?(a|b|tie)\W*$/i.exec(reply.text.trim());
    if (match) return match[1]!.toLowerCase() as Winner;
  }
  return null;
}

/** Grades 1 to 5 by criterion; null where the judge gave none. */
export async function judgeRubric(
  judged: Judged,
  criteria: Readonly<Record<string, string>>,
  options: JudgeOptions,
): Promise<Record<string, number | null>> {
  const names = Object.keys(criteria);
  const grades = ['1', '2', '3', '4', '5'];
  const list = names.map((name) => `- ${name}: ${criteria[name]}`).join('\n');
  const content = [
    `## Instruction\n${judged.instruction}`,
    ...(judged.reference === undefined ? [] : [`## A correct answer\n${judged.reference}`]),
    `## Answer to judge\n${judged.response}`,
    `## Criteria\n${list}`,
    `## Your task\nGrade the answer to judge by each criterion, from 1 (not at all) to 5 (fully). Reply with JSON and nothing else: {${names.map((name) => `${JSON.stringify(name)}: grade`).join(', ')}}`,
  ].join('\n\n');
  const found: Record<string, number | null> = Object.fromEntries(names.map((name) => [name, null]));
  for (let attempt = 0; attempt <= (options.retries ?? 2) && Object.values(found).includes(null); attempt++) {
    const reply = await ask([{ role: 'user', content }], options, attempt, { maxTokens: 32 + 16 * names.length });
    const numbers = [...objectsIn(reply.text)].map((object) =>
      JSON.stringify(object, (_, v) => (typeof v === 'number' ? String(v) : v)),
    );
    for (const name of names) {
      const grade = numbers.map((text) => fromJson(text, name, grades)).find((g) => g !== undefined);
      if (grade !== undefined) found[name] ??= Number(grade);
    }
  }
  return found;
}

function ask(messages: ChatMessage[], options: JudgeOptions, attempt: number, own: Sampling): Promise<Reply> {
  const { provider, sampling, seed = 0, signal } = options;
  return provider.chat(messages, {
    temperature: attempt % 8 === 0 ? 0 : 0.7,
    ...own,
    ...sampling,
    seed: (seed + attempt) % 2 ** 31,
    ...(signal ? { signal } : {}),
  });
}

export interface RewardOptions extends Omit<JudgeOptions, 'seed' | 'signal'> {
  /** Answers of a base model, scored too: what alignment adds is the difference. */
  readonly base?: Provider;
}

/** Scores the answer of each record, and a base model's answer where there is one. */
export function reward(options: RewardOptions): RecordStage<InstructionRecord, InstructionRecord> {
  const { provider, base, sampling, retries } = options;
  return {
    kind: 'record',
    name: 'reward',
    settings: [provider.name, base?.name, sampling, retries],
    concurrency: provider.concurrency,
    async run(record, { seed, signal }) {
      const instruction = instructionOf(record);
      const { score } = await judgeScore({ instruction, response: responseOf(record) }, { ...options, seed: seed(), signal });
      if (base === undefined) return { value: { ...record, reward: score } };
      // A base model has no template: it is shown a few exchanges and goes on (URIAL, arXiv:2312.01552, in our own words).
      const reply = await base.complete(`${examples}# User\n${instruction}\n\n# Assistant\n`, {
        temperature: 0,
        maxTokens: 512,
        stop: ['\n# User'],
        seed: seed(16),
        signal,
      });
      const other = await judgeScore({ instruction, response: reply.text }, { ...options, seed: seed(32), signal });
      return { value: { ...record, reward: score, baseReward: other.score } };
    },
  };
}

/** Other answers by the ids of their records, with the instructions that they answer. */
export type OtherAnswers = ReadonlyMap<string, { readonly instruction: string; readonly response: string }>;

/** Answers to compare with. */
export async function otherAnswers(
  records: AsyncIterable<InstructionRecord> | Iterable<InstructionRecord>,
): Promise<OtherAnswers> {
  const answers = new Map<string, { instruction: string; response: string }>();
  for await (const record of records) {
    answers.set(record.id, { instruction: instructionOf(record), response: responseOf(record) });
  }
  return answers;
}

export interface CompareOptions extends Omit<JudgeOptions, 'seed' | 'signal'> {
  readonly against: OtherAnswers;
}

/** A record whose answer was compared: `a` is its own, `b` the other. */
export type ComparedRecord = InstructionRecord & { readonly comparison: Comparison };

/** Compares the answer of each record with another one to the same instruction, in both orders. */
export function compare(options: CompareOptions): RecordStage<InstructionRecord, ComparedRecord> {
  const { provider, against, sampling, retries } = options;
  return {
    kind: 'record',
    name: 'compare',
    settings: [provider.name, digest([...against]), sampling, retries],
    // Both orders are asked at once.
    concurrency: Math.max(1, provider.concurrency >> 1),
    async run(record, { seed, signal }) {
      const other = against.get(record.id);
      if (other === undefined) return { dropped: 'no-other-answer' };
      const instruction = instructionOf(record);
      if (other.instruction !== instruction) return { dropped: 'other-instruction', detail: other.instruction };
      const pair = { instruction, a: responseOf(record), b: other.response };
      return { value: { ...record, comparison: await judgePair(pair, { ...options, seed: seed(), signal }) } };
    },
  };
}

const examples = `Below are questions of users, and the complete and friendly answers of an assistant.

# User
Why is the sky blue?

# Assistant
Sunlight holds all colours. Air scatters blue light much more than red, so blue reaches our eyes from every part of the sky.

# User
Give me three ideas for a rainy Sunday.

# Assistant
1. Bake bread and read while it rises.
2. Visit a museum that you have always passed by.
3. Call somebody you have not spoken to for a year.

`;
