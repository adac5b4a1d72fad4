// What a model says about an instruction: quality, difficulty, category, safety, language. Held to the allowed answers where the backend
// can; otherwise asked for JSON, which is checked, and asked again.

import type { RecordStage } from './pipeline.ts';
import type { ChatMessage, Provider, Sampling } from './provider.ts';
import { categories, difficulties, type InstructionRecord, instructionOf, qualities, responseOf, type Tags } from './record.ts';

/** What can be asked. */
export type Mission = keyof Tags;

const languages =
  'af ar bg bn ca cs da de el en es et fa fi fr gu he hi hr hu id it ja kn ko lt lv mk ml mr ne nl no pa pl pt ro ru sk sl so sq sv sw ta te th tl tr uk ur vi zh'.split(
    ' ',
  );

/** The question of each mission and its allowed answers. */
export const missions: Readonly<Record<Mission, { readonly question: string; readonly answers: readonly string[] }>> = {
  quality: {
    question:
      'Judge how well the instruction is put: is it clear, is it specific, does it hang together? A very poor one cannot be understood, an excellent one leaves no question open.',
    answers: qualities,
  },
  difficulty: {
    question:
      'Judge how hard it is to answer the instruction well, by the knowledge and the steps of thought that it takes: a very easy one takes neither, a very hard one takes those of an expert.',
    answers: difficulties,
  },
  category: { question: 'Which kind of task is the instruction, above all?', answers: categories },
  safety: {
    question:
      'Does the conversation ask for or give help with violence, crime, hatred, self-harm, or sexual content with minors?',
    answers: ['safe', 'unsafe'],
  },
  language: { question: 'In which language is the instruction written? Answer with its ISO 639-1 code.', answers: languages },
};

export interface TagOptions {
  readonly provider: Provider;
  /** Default: quality, difficulty and category. */
  readonly missions?: readonly Mission[];
  readonly sampling?: Sampling;
  /** Further tries when an answer cannot be read. Default 2. */
  readonly retries?: number;
}

/** Puts tags on records; one that stays unreadable is null. */
export function tag(options: TagOptions): RecordStage<InstructionRecord, InstructionRecord> {
  const { provider, missions: asked = ['quality', 'difficulty', 'category'], retries = 2, sampling } = options;
  const unique = [...new Set(asked)];
  return {
    kind: 'record',
    name: 'tag',
    settings: [provider.name, unique, retries, sampling],
    // Each record asks its questions at once.
    concurrency: Math.max(1, Math.ceil(provider.concurrency / unique.length)),
    async run(record, { seed, signal }) {
      const answers = await Promise.all(
        unique.map(async (mission, m) => {
          const draw = (attempt: number) => seed(m * 16 + attempt);
          return [mission, await ask(provider, mission, record, { sampling, retries, draw, signal })] as const;
        }),
      );
      return { value: { ...record, tags: { ...record.tags, ...Object.fromEntries(answers) } as Tags } };
    },
  };
}

interface Asking {
  readonly sampling: Sampling | undefined;
  readonly retries: number;
  readonly draw: (attempt: number) => number;
  readonly signal: AbortSignal;
}

async function ask(provider: Provider, mission: Mission, record: InstructionRecord, asking: Asking): Promise<string | null> {
  const { answers } = missions[mission];
  for (let attempt = 0; attempt <= asking.retries; attempt++) {
    const reply = await provider.chat(question(mission, record, provider.can.choices), {
      maxTokens: provider.can.choices ? 16 : 128,
      // The likeliest answer first; another try must be able to be another.
      temperature: attempt === 0 ? 0 : 0.7,
      ...asking.sampling,
      ...(provider.can.choices ? { choices: answers } : {}),
      seed: asking.draw(attempt),
      signal: asking.signal,
    });
    const answer = provider.can.choices ? matching(reply.text, answers) : fromJson(reply.text, mission, answers);
    if (answer !== undefined) return answer;
  }
  return null;
}

function question(mission: Mission, record: InstructionRecord, plain: boolean): ChatMessage[] {
  const { question: asked, answers } = missions[mission];
  const response = mission === 'safety' ? responseOf(record) : '';
  const form = plain
    ? `Answer with one of these and nothing else: ${answers.join(', ')}.`
    : `Answer with JSON and nothing else: {"${mission}": one of ${JSON.stringify(answers)}}.`;
  return [
    {
      role: 'user',
      content: `${asked}\n\n## Instruction\n${instructionOf(record)}\n${response === '' ? '' : `\n## Answer to it\n${response}\n`}\n## Your task\n${form}`,
    },
  ];
}

function matching(text: string, answers: readonly string[]): string | undefined {
  const plain = (t: string) => t.trim().toLowerCase();
  const exact = answers.find((answer) => plain(answer) === plain(text));
  // "Other" and "Others" are one word.
  return exact ?? answers.find((answer) => plain(answer).replace(/s$/, '') === plain(text).replace(/s$/, ''));
}

/** The answer inside the first JSON object of a text; undefined where there is none that is allowed. */
export function fromJson(text: string, field: string, answers: readonly string[]): string | undefined {
  for (const object of objectsIn(text)) {
    const value = object[field];
    const found = typeof value === 'string' ? matching(value, answers) : undefined;
    if (found !== undefined) return found;
  }
  return undefined;
}

/** The JSON objects of a text, whatever stands between them; nested braces and braces in strings are no end. */
export function* objectsIn(text: string): Generator<Record<string, unknown>> {
  for (let from = text.indexOf('{'); from >= 0; from = text.indexOf('{', from + 1)) {
    let depth = 0;
    let quoted = false;
    for (let i = from; i < text.length; i++) {
      const char = text[i];
      if (quoted) {
        if (char === '\\') i++;
        else if (char === '"') quoted = false;
      } else if (char === '"') quoted = true;
      else if (char === '{') depth++;
      else if (char === '}' && --depth === 0) {
        try {
          yield JSON.parse(text.slice(from, i + 1)) as Record<string, unknown>;
          from = i;
        } catch {
          // Not JSON: an object may begin further inside.
        }
        break;
      }
    }
  }
}
