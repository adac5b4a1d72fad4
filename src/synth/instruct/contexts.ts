// Data of contexts, questions and answers in the forms that it is published in. A row that cannot be used is reported with file, line
// and field, and left out.

import { basename, dirname } from 'node:path';
import { type Fields, listField, ownField, RowError, textField } from '../../data/fields.ts';
import { type DataRecord, records } from '../../data/records.ts';
import type { Malformed } from '../../data/source.ts';
import { DataError } from '../../tensor/errors.ts';
import { type InstructionExample, type InstructionPair, markerIn } from './format.ts';

/**
 * `squad`: rows of context, question, answers; or of paragraphs with `qas`, also nested in articles as in the original file.
 * `hotpot`: rows of question, answer, and a context of titled paragraphs. `synthesizer`: rows of context and `QA_list`, as in
 * `instruction-pretrain/ft-instruction-synthesizer-collection`. `pairs`: rows of context and pairs of question and answer.
 */
export type ContextFormat = 'squad' | 'hotpot' | 'synthesizer' | 'pairs';

/** A context with pairs, and where it came from. */
export interface ContextPairs extends InstructionExample {
  /** Examples of one dataset make few-shot examples together. */
  readonly dataset: string;
}

export interface ContextOptions {
  /** Default: told by the fields of each row. */
  readonly format?: ContextFormat;
  /** Name of the dataset. Default: the row's `rc_name` or `dataset`, else the file's name. */
  readonly dataset?: string;
  /** Most pairs of one context; more of them go to an example of their own. Default: no limit. */
  readonly maxPairs?: number;
}

/** What was read. */
export interface ContextReport {
  readonly contexts: number;
  readonly pairs: number;
  /** Contexts by dataset. */
  readonly datasets: Readonly<Record<string, number>>;
  /** Rows, questions and answers that were left out: how many, and the first thousand. */
  readonly malformedCount: number;
  readonly malformed: readonly Malformed[];
}

/**
 * Reads JSON Lines, JSON or Parquet. Questions about the same context of a dataset come together.
 * @throws DataError `ERR_EMPTY` when no row can be used, `ERR_NO_FILES`; FileError `ERR_READ`; FormatError
 */
export async function readContextPairs(
  paths: string | readonly string[],
  options: ContextOptions = {},
): Promise<{ readonly examples: ContextPairs[]; readonly report: ContextReport }> {
  const found = new Map<string, { dataset: string; context: string; pairs: Map<string, InstructionPair> }>();
  const malformed: Malformed[] = [];
  let malformedCount = 0;
  const onMalformed = (record: Malformed): void => {
    if (++malformedCount <= 1000) malformed.push(record);
  };
  for await (const record of records(paths, onMalformed)) {
    const { file, line } = record;
    const report = (field: string, reason: string) => onMalformed({ file, line, reason, field });
    try {
      for (const { dataset, context, pairs } of contextsOf(record, options, report)) {
        const key = JSON.stringify([dataset, context]);
        const known = found.get(key) ?? { dataset, context, pairs: new Map<string, InstructionPair>() };
        found.set(key, known);
        for (const pair of pairs) {
          const asked = pair.question.toLowerCase();
          if (known.pairs.has(asked)) report('question', `the question "${short(pair.question)}" is there twice`);
          else known.pairs.set(asked, pair);
        }
      }
    } catch (error) {
      if (!(error instanceof RowError)) throw error;
      report(error.field, error.message);
    }
  }
  const most = options.maxPairs ?? Number.POSITIVE_INFINITY;
  const examples: ContextPairs[] = [];
  for (const { dataset, context, pairs } of found.values()) {
    const all = [...pairs.values()];
    for (let from = 0; from < all.length; from += most) examples.push({ dataset, context, pairs: all.slice(from, from + most) });
  }
  if (examples.length === 0) {
    const first = malformed[0];
    throw new DataError(
      `synth: no row of ${String(paths)} has a context with questions and answers${first === undefined ? '' : `; ${first.file}:${first.line}: ${first.reason}`}`,
      { code: 'ERR_EMPTY', op: 'synth', argument: String(paths) },
    );
  }
  const datasets: Record<string, number> = {};
  for (const { dataset } of examples) datasets[dataset] = (datasets[dataset] ?? 0) + 1;
  const pairs = examples.reduce((sum, example) => sum + example.pairs.length, 0);
  return { examples, report: { contexts: examples.length, pairs, datasets, malformedCount, malformed } };
}

type Report = (field: string, reason: string) => void;

function* contextsOf({ value, file }: DataRecord, options: ContextOptions, report: Report): Generator<ContextPairs> {
  const named = [value.rc_name, value.dataset].find((name) => typeof name === 'string' && name !== '') as string | undefined;
  const dataset = options.dataset ?? named ?? datasetOf(file);
  const format = options.format ?? formatOf(value);
  switch (format) {
    case 'squad':
      for (const { context, questions } of squadParagraphs(value, report)) {
        yield { dataset, context: plain(context, 'context'), pairs: squadPairs(questions, report) };
      }
      return;
    case 'hotpot': {
      const pair = checkedPair(textField(value, 'question'), textField(value, 'answer'));
      yield { dataset, context: plain(paragraphs(value.context), 'context'), pairs: [pair] };
      return;
    }
    case 'synthesizer':
      yield {
        dataset,
        context: plain(optionalText(value, 'context'), 'context'),
        pairs: listed(value, 'QA_list', 'Q', 'A', report),
      };
      return;
    case 'pairs':
      yield {
        dataset,
        context: plain(optionalText(value, 'context'), 'context'),
        pairs: listed(value, 'pairs', 'question', 'answer', report),
      };
      return;
    default:
      format satisfies never;
  }
}

function formatOf(value: Fields): ContextFormat {
  if (Object.hasOwn(value, 'QA_list')) return 'synthesizer';
  if (Object.hasOwn(value, 'pairs')) return 'pairs';
  if (['data', 'paragraphs', 'qas', 'answers'].some((field) => Object.hasOwn(value, field))) return 'squad';
  if (Object.hasOwn(value, 'answer') && typeof value.context === 'object') return 'hotpot';
  throw new RowError(
    '',
    'none of the fields "QA_list", "pairs", "qas", "answers", "paragraphs" is there, nor a context of paragraphs',
  );
}

/** A shard is named after the folder of its dataset. */
function datasetOf(file: string): string {
  const folder = basename(dirname(file));
  return folder === 'shard' ? basename(dirname(dirname(file))) : basename(file).replace(/\.[a-z]+$/, '');
}

function* squadParagraphs(value: Fields, report: Report): Generator<{ context: string; questions: readonly Fields[] }> {
  for (const field of ['data', 'paragraphs'] as const) {
    if (!Object.hasOwn(value, field)) continue;
    for (const [i, inner] of list(value, field).entries()) {
      try {
        yield* squadParagraphs(inner, (at, reason) => report(`${field}[${i}].${at}`, reason));
      } catch (error) {
        if (!(error instanceof RowError)) throw error;
        report(`${field}[${i}].${error.field}`, error.message);
      }
    }
    return;
  }
  const context = textField(value, 'context');
  yield { context, questions: Object.hasOwn(value, 'qas') ? list(value, 'qas') : [value] };
}

function squadPairs(questions: readonly Fields[], report: Report): InstructionPair[] {
  return questions.flatMap((entry, i) => {
    const at = questions.length === 1 ? '' : `qas[${i}].`;
    return attempt(at, report, () => {
      if (entry.is_impossible === true) throw new RowError('answers', 'the question has no answer in the text');
      return checkedPair(textField(entry, 'question'), firstAnswer(entry));
    });
  });
}

/** The first of several answers: of `{ text: [...] }`, of `[{ text }]`, or of `answer`. */
function firstAnswer(entry: Fields): string {
  const { answers } = entry;
  if (answers === undefined) return textField(entry, 'answer');
  const texts = Array.isArray(answers)
    ? answers.map((a: unknown) => (a as Fields | null)?.text ?? a)
    : (answers as Fields | null)?.text;
  const [first] = Array.isArray(texts) ? (texts as unknown[]) : [];
  if (first === undefined) throw new RowError('answers', 'the question has no answer in the text');
  if (typeof first !== 'string') throw new RowError('answers', 'field "answers" holds no text');
  return first;
}

/** Titled paragraphs as one text: `[[title, sentences], ...]`, or lists of titles and of sentences. */
function paragraphs(context: unknown): string {
  const { title, sentences } = (context ?? {}) as { title?: unknown; sentences?: unknown };
  const pairs: unknown =
    Array.isArray(title) && Array.isArray(sentences) ? title.map((t: unknown, i) => [t, sentences[i] as unknown]) : context;
  if (!Array.isArray(pairs) || pairs.length === 0)
    throw new RowError('context', 'field "context" is not a list of titled paragraphs');
  return pairs
    .map((entry: unknown, i) => {
      const [name, body] = Array.isArray(entry) ? (entry as unknown[]) : [];
      const joined = Array.isArray(body) && body.every((s) => typeof s === 'string') ? body.map((s) => s.trim()).join(' ') : body;
      if (typeof name !== 'string' || typeof joined !== 'string')
        throw new RowError(`context[${i}]`, `context[${i}] is no title with sentences`);
      return `${name.trim()}\n${joined.trim()}`;
    })
    .join('\n\n');
}

function listed(value: Fields, field: string, question: string, answer: string, report: Report): InstructionPair[] {
  return list(value, field).flatMap((entry, i) =>
    attempt(`${field}[${i}].`, report, () => checkedPair(textField(entry, question), textField(entry, answer))),
  );
}

/** What one question gives; a question that cannot be used leaves the others in place. */
function attempt(at: string, report: Report, read: () => InstructionPair): InstructionPair[] {
  try {
    return [read()];
  } catch (error) {
    if (!(error instanceof RowError)) throw error;
    report(`${at}${error.field}`, `${at === '' ? '' : `${at.slice(0, -1)}: `}${error.message}`);
    return [];
  }
}

function checkedPair(question: string, answer: string): InstructionPair {
  const pair = { question: plain(question, 'question').trim(), answer: plain(answer, 'answer').trim() };
  for (const field of ['question', 'answer'] as const) if (pair[field] === '') throw new RowError(field, `the ${field} is empty`);
  return pair;
}

/** A text without markers, which would end the part that it stands in. */
function plain(value: string, field: string): string {
  const marker = markerIn(value);
  if (marker !== undefined) throw new RowError(field, `the ${field} holds the marker ${marker}`);
  return value;
}

/** A text, or none. */
function optionalText(value: Fields, field: string): string {
  return (ownField(value, field) ?? null) === null ? '' : textField(value, field);
}

function list(value: Fields, field: string): readonly Fields[] {
  return listField(value, field, 'with entries');
}

function short(value: string): string {
  return value.length > 60 ? `${value.slice(0, 57)}...` : value;
}
