// The text that an instruction synthesizer reads and writes (Instruction Pre-Training, arXiv:2406.14491): a context between markers,
// then pairs of question and answer. Several such examples, one behind the other, are a few-shot prompt.

import type { Tokenizer } from '../../tokenizer/tokenizer.ts';

/** A question or instruction, and its answer. */
export interface InstructionPair {
  readonly question: string;
  readonly answer: string;
}

/** A text and pairs about it. */
export interface InstructionExample {
  /** Empty for pairs that stand alone. */
  readonly context: string;
  readonly pairs: readonly InstructionPair[];
}

const marks = { context: ' <CON> ', contextEnd: ' </CON>', question: '<QUE> ', answer: ' <ANS> ', end: ' </END>' } as const;
const gap = '\n\n';

/** Texts that mean something to the parser, and that no context, question or answer may hold. */
export const markers = ['<CON>', '</CON>', '<QUE>', '<ANS>', '</END>'] as const;

/** What begins and ends an example. */
export interface Brackets {
  readonly begin: string;
  readonly end: string;
}

/** The texts of a tokenizer's begin and end tokens; a begin token that is also the end token is left out, as GPT-2's. */
export function bracketsOf(tokenizer: Pick<Tokenizer, 'bos' | 'eos' | 'token'>): Brackets {
  const text = (id: number | undefined): string => (id === undefined ? '' : (tokenizer.token(id) ?? ''));
  return { begin: tokenizer.bos === tokenizer.eos ? '' : text(tokenizer.bos), end: text(tokenizer.eos) };
}

/** The part of an example that the synthesizer is given, without its begin token. */
export function contextText(context: string): string {
  return context === '' ? '' : `${marks.context}${context}${marks.contextEnd}${gap}`;
}

/** The part of an example that the synthesizer writes, without its end token. */
export function pairsText(pairs: readonly InstructionPair[]): string {
  return pairs.map(({ question, answer }) => `${marks.question}${question}${marks.answer}${answer}${marks.end}`).join(gap);
}

/** A whole one-shot example. */
export function exampleText({ context, pairs }: InstructionExample, { begin, end }: Brackets): string {
  return `${begin}${contextText(context)}${pairsText(pairs)}${end}`;
}

/** The first marker that a text holds. */
export function markerIn(text: string): string | undefined {
  return markers.find((marker) => text.includes(marker));
}

/** Why a piece of a synthesizer's output is no pair. */
export type PairDefect =
  /** The output stopped inside it. */
  | 'unfinished'
  /** It does not begin with the mark of a question. */
  | 'no-question-mark'
  | 'no-answer-mark'
  /** A second answer, question or context begins inside. */
  | 'stray-mark'
  | 'empty-question'
  | 'empty-answer'
  /** Its question, letters' case aside, was there before. */
  | 'duplicate';

/** A piece that is no pair. */
export interface MalformedPair {
  readonly defect: PairDefect;
  readonly text: string;
}

/** Reads a synthesizer's output: its pairs in order, and every piece that is none. */
export function parsePairs(output: string): { readonly pairs: InstructionPair[]; readonly malformed: MalformedPair[] } {
  const pieces = output.split('</END>');
  const rest = pieces.pop()!;
  const pairs: InstructionPair[] = [];
  const malformed: MalformedPair[] = [];
  const asked = new Set<string>();
  for (const piece of pieces) {
    const pair = parsePair(piece.trim());
    if (typeof pair === 'string') malformed.push({ defect: pair, text: piece.trim() });
    else if (asked.has(pair.question.toLowerCase())) malformed.push({ defect: 'duplicate', text: piece.trim() });
    else {
      asked.add(pair.question.toLowerCase());
      pairs.push(pair);
    }
  }
  if (rest.trim() !== '') malformed.push({ defect: 'unfinished', text: rest.trim() });
  return { pairs, malformed };
}

function parsePair(piece: string): InstructionPair | PairDefect {
  if (!piece.startsWith('<QUE>')) return 'no-question-mark';
  const at = piece.indexOf('<ANS>');
  if (at < 0) return 'no-answer-mark';
  const question = piece.slice('<QUE>'.length, at).trim();
  const answer = piece.slice(at + '<ANS>'.length).trim();
  if (markerIn(question) !== undefined || markerIn(answer) !== undefined) return 'stray-mark';
  if (question === '') return 'empty-question';
  return answer === '' ? 'empty-answer' : { question, answer };
}
