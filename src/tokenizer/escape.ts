// The text of special tokens in what people write: it stays text, and only what a template itself writes becomes a token.

import type { TokenizerFile } from './file.ts';
import { joinIds } from './ids.ts';

/** Where a text is cut before it is encoded. A noncharacter of Unicode: no text that is meant to be read holds it. */
const mark = '\ufdd3';

interface SpecialTexts {
  /** Finds where one may begin. */
  readonly first: RegExp;
  readonly whole: ReadonlySet<string>;
  /** Proper beginnings and endings of them. */
  readonly begins: ReadonlySet<string>;
  readonly ends: ReadonlySet<string>;
  readonly longest: number;
}

/** What is used of a tokenizer. */
export interface AddedTokens {
  readonly file: Pick<TokenizerFile, 'added'>;
}

const known = new WeakMap<AddedTokens['file'], SpecialTexts | null>();

/** Null for a vocabulary without special tokens. One of a single character cannot be cut, and is left out. */
function specialTexts({ file }: AddedTokens): SpecialTexts | null {
  const made = known.get(file);
  if (made !== undefined) return made;
  const whole = file.added.filter(({ special, content }) => special && [...content].length > 1).map(({ content }) => content);
  const inner = (text: string): number[] => Array.from({ length: text.length - 1 }, (_, i) => i + 1);
  const codes = new Set(whole.map((text) => `\\u{${text.codePointAt(0)!.toString(16)}}`));
  const found =
    whole.length === 0
      ? null
      : {
          first: new RegExp(`[${[...codes].join('')}]`, 'gu'),
          whole: new Set(whole),
          begins: new Set(whole.flatMap((text) => inner(text).map((at) => text.slice(0, at)))),
          ends: new Set(whole.flatMap((text) => inner(text).map((at) => text.slice(at)))),
          longest: Math.max(...whole.map((text) => text.length)),
        };
  known.set(file, found);
  return found;
}

/**
 * The value with marks in all its texts, such that {@link encodeEscaped} finds no special token in them, nor one that begins or ends in them,
 * whatever stands before or after. Texts that hold nothing of a special token stay as they are, so that templates see what was written.
 */
export function escapeSpecial<T>(tokenizer: AddedTokens, value: T): T {
  const specials = specialTexts(tokenizer);
  return specials === null ? value : (escaped(value, specials) as T);
}

function escaped(value: unknown, specials: SpecialTexts): unknown {
  if (typeof value === 'string') return escapedText(value, specials);
  if (Array.isArray(value)) return value.map((one) => escaped(one, specials));
  if (typeof value !== 'object' || value === null) return value;
  return Object.fromEntries(Object.entries(value).map(([key, one]) => [escapedText(key, specials), escaped(one, specials)]));
}

function escapedText(text: string, { first, whole, begins, ends, longest }: SpecialTexts): string {
  const cuts = new Set<number>();
  // Templates trim what they are given, so a cut at an end lies beside what is not white space.
  const [start, end] = [text.length - text.trimStart().length, text.trimEnd().length];
  for (const { index, 0: character } of text.matchAll(first)) {
    for (let to = index + 1; to <= text.length; to++) {
      const part = text.slice(index, to);
      if (whole.has(part)) cuts.add(index + character.length);
      if (!begins.has(part)) break;
      if (to === end || to === text.length) cuts.add(end);
    }
  }
  for (const from of new Set([0, start])) {
    for (let to = from + 1; to < from + longest && to <= text.length; to++) if (ends.has(text.slice(from, to))) cuts.add(start);
  }
  if (cuts.size === 0) return text;
  const at = [0, ...[...cuts].sort((a, b) => a - b), text.length];
  return at
    .slice(1)
    .map((to, i) => text.slice(at[i], to))
    .join(mark);
}

/** The ids of a text that {@link escapeSpecial} has marked, wholly or in parts: each piece between marks is encoded by itself. */
export function encodeEscaped(tokenizer: { encode(text: string): Int32Array }, text: string): Int32Array {
  if (!text.includes(mark)) return tokenizer.encode(text);
  return joinIds(text.split(mark).map((part) => tokenizer.encode(part)));
}
