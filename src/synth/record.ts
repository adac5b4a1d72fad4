// A synthesized conversation and what the stages have found out about it.

import type { ChatMessage } from './provider.ts';

/** Grades of {@link Tags}, the lowest first. */
export const qualities = ['very poor', 'poor', 'average', 'good', 'excellent'] as const;
export const difficulties = ['very easy', 'easy', 'medium', 'hard', 'very hard'] as const;
export const categories = [
  'Information seeking',
  'Reasoning',
  'Planning',
  'Editing',
  'Coding & Debugging',
  'Math',
  'Role playing',
  'Data analysis',
  'Creative writing',
  'Advice seeking',
  'Brainstorming',
  'Others',
] as const;

export type Quality = (typeof qualities)[number];
export type Difficulty = (typeof difficulties)[number];
export type Category = (typeof categories)[number];

/** Judgements of a tagger; null where its answer could not be read. */
export interface Tags {
  readonly quality?: Quality | null;
  readonly difficulty?: Difficulty | null;
  readonly category?: Category | null;
  readonly safety?: 'safe' | 'unsafe' | null;
  /** ISO 639-1. */
  readonly language?: string | null;
}

/** How an instruction was drawn. */
export interface Origin {
  readonly model: string;
  readonly temperature: number;
  readonly topP: number;
  readonly seed: number;
  /** Rules of the sanitizer that changed the text. */
  readonly rules: readonly string[];
}

/** The nearest other instruction of the data set. */
export interface Nearest {
  /** Squared Euclidean distance of unit vectors, 0 to 4. */
  readonly distance: number;
  readonly id: string;
  /** Others closer than the threshold. */
  readonly repeats: number;
  /** The first record of those that hang together by such distances; its own id when it is the first. */
  readonly cluster: string;
}

export interface InstructionRecord {
  readonly id: string;
  /** A system message first if there is one, then user and assistant in turn. */
  readonly messages: readonly ChatMessage[];
  /** Which of several system prompts steered it. */
  readonly systemKey?: string;
  readonly origin?: Origin;
  readonly tags?: Tags;
  /** Score of the answer by a judge, 0 to 100. */
  readonly reward?: number | null;
  /** Score of the base model's answer by the same judge. */
  readonly baseReward?: number | null;
  readonly nearest?: Nearest;
  /** Unit vector of the instruction, little-endian float32 in base64; dropped by the dedupe stage. */
  readonly embedding?: string;
}

/** The first user message. */
export function instructionOf({ messages }: InstructionRecord): string {
  return messages.find((message) => message.role === 'user')?.content ?? '';
}

/** The last assistant message; empty where there is none. */
export function responseOf({ messages }: InstructionRecord): string {
  return messages.findLast((message) => message.role === 'assistant')?.content ?? '';
}
