// What a model writes as a user is not always what a user would write. Rules mend what can be mended and refuse the rest; each tells that
// it did. Texts of several lines stay so.

export interface SanitizeOptions {
  /** Fewest characters. Default 8. */
  readonly least?: number;
  /** Most characters. Default 8192. */
  readonly most?: number;
  /** Rules that are left out, by name. */
  readonly without?: readonly SanitizeRule[];
  /** Headers of turns that must not be in a text, beside the usual ones. */
  readonly headers?: readonly string[];
}

/** Rules that change a text, in the order in which they are tried. */
export const sanitizeRules = ['header', 'label', 'quotes', 'markup', 'answer'] as const;
export type SanitizeRule = (typeof sanitizeRules)[number];

/** Why a text is refused. */
export type Refusal = 'empty' | 'short' | 'long' | 'colon' | 'no-letters' | 'repeats' | 'surrogate';

export type Sanitized =
  | { readonly text: string; readonly rules: readonly SanitizeRule[] }
  | { readonly refused: Refusal; readonly rules: readonly SanitizeRule[] };

// Frames of turns as they appear in text when a model writes them out.
const turnHeaders = [
  '<|im_start|>',
  '<|im_end|>',
  '<|start_header_id|>',
  '<|end_header_id|>',
  '<|eot_id|>',
  '<start_of_turn>',
  '<end_of_turn>',
  '<|assistant|>',
  '<|user|>',
  '<|end|>',
  '[INST]',
  '[/INST]',
  '</s>',
  '### Response:',
];
const roleLine = /^[ \t]*(?:\*\*|#+ )?(?:assistant|user|human|ai|chatbot|model)(?:\*\*)?[ \t]*(?::|$)/im;

const labels =
  '(?:original )?prompt|task|(?:the )?problem|question|query|request|instructions?|descriptions?|scenario|situation|context|challenge|exercise|user';
// "Question 3:", "Q2.", "Part 1:", "**Task:**", "## Prompt", "1.", "b)".
const label = new RegExp(
  `^(?:#+\\s*|\\*\\*\\s*|__\\s*)?(?:(?:${labels})(?:\\s*\\d+)?\\s*(?::|\\*\\*:|:\\*\\*|\\.(?=\\s)|(?<=^#.*)$)|(?:q|part)\\s*\\d+\\s*[:.)])(?:\\s*\\*\\*|__)?\\s*`,
  'im',
);
const enumerator = /^(?:\d{1,3}[.)]|[a-z]\)|\([a-z\d]\)|[-*•](?=\s))\s+/i;
const answerLine =
  /^[ \t]*(?:#+ *|\*\*)?(?:(?:(?:the |correct |final |sample |suggested )*answer|explanation|solution(?: approach)?|response|output)(?:\*\*)?[ \t]*:|(?:the (?:correct )?answer is)\b|here (?:are|is) (?:some|the|a|an|your)\b|step 1\b)/im;

/** Applies the rules. */
export function sanitize(raw: string, options: SanitizeOptions = {}): Sanitized {
  const { least = 8, most = 8192, without = [], headers = [] } = options;
  const rules: SanitizeRule[] = [];
  if (/\p{Surrogate}/u.test(raw)) return { refused: 'surrogate', rules };
  let text = raw.trim();
  const apply = (rule: SanitizeRule, change: (text: string) => string): void => {
    if (without.includes(rule)) return;
    const changed = change(text).trim();
    if (changed === text) return;
    text = changed;
    if (!rules.includes(rule)) rules.push(rule);
  };
  apply('header', (t) => beforeHeaders(t, headers));
  apply('label', unlabelled);
  apply('quotes', unquoted);
  apply('markup', unmarked);
  apply('label', unlabelled);
  apply('answer', beforeAnswer);
  const refused = ((): Refusal | undefined => {
    if (text === '') return 'empty';
    if (!/\p{L}/u.test(text)) return 'no-letters';
    if (text.length < least) return 'short';
    if (text.length > most) return 'long';
    if (repeats(text)) return 'repeats';
    return text.endsWith(':') ? 'colon' : undefined;
  })();
  return refused === undefined ? { text, rules } : { refused, rules };
}

/** Whether a text holds the beginning of another turn. */
export function hasHeader(text: string, headers: readonly string[] = []): boolean {
  return beforeHeaders(text, headers) !== text;
}

function beforeHeaders(text: string, headers: readonly string[]): string {
  const found = [...turnHeaders, ...headers].map((header) => text.indexOf(header)).filter((at) => at >= 0);
  const line = roleLine.exec(text);
  // A text may well begin with "User:"; that is a label. Behind a line break it is the next turn.
  if (line !== null && line.index > 0) found.push(line.index);
  return found.length === 0 ? text : text.slice(0, Math.min(...found));
}

function unlabelled(text: string): string {
  let rest = text;
  for (let times = 0; times < 3; times++) {
    const next = rest.replace(enumerator, '').replace(label, (match, at: number) => (at === 0 ? '' : match));
    if (next === rest) break;
    rest = next.trimStart();
  }
  // A list is a text of its own: its first number alone says nothing.
  const isList = /^(?:\d{1,3}[.)]|[-*•])\s/.test(text) && /\n\s*(?:\d{1,3}[.)]|[-*•])\s/.test(text);
  return isList || rest === '' ? text : rest;
}

const quotePairs = ['""', "''", '“”', '«»', '„“', '``'];

function unquoted(text: string): string {
  for (const pair of quotePairs) {
    const [open, close] = [...pair] as [string, string];
    if (text.length < 3 || !text.startsWith(open) || !text.endsWith(close)) continue;
    const inside = text.slice(1, -1);
    if (!inside.includes(open) && !inside.includes(close)) return inside;
  }
  return text;
}

/** Bold or italics around all of the text. */
function unmarked(text: string): string {
  for (const [open, close] of [
    ['**', '**'],
    ['<b>', '</b>'],
    ['<strong>', '</strong>'],
    ['<p>', '</p>'],
    ['*', '*'],
  ] as const) {
    if (!text.startsWith(open) || !text.endsWith(close) || text.length <= open.length + close.length) continue;
    const inside = text.slice(open.length, -close.length);
    if (!inside.includes(open) && !inside.includes(close)) return inside;
  }
  return text;
}

/** The text before a line that begins an answer, where something stands before it. */
function beforeAnswer(text: string): string {
  const found = answerLine.exec(text);
  return found === null || text.slice(0, found.index).trim() === '' ? text : text.slice(0, found.index);
}

/** Whether a text goes round in circles: its end is one piece again and again, or most of its word sequences came before. */
export function repeats(text: string): boolean {
  for (let period = 1; period <= text.length / 4 && period <= 400; period++) {
    let same = 0;
    while (same + period < text.length && text[text.length - 1 - same] === text[text.length - 1 - same - period]) same++;
    const whole = same + period;
    if (whole >= 4 * period && whole >= 48 && /[\p{L}\p{N}]/u.test(text.slice(-period))) return true;
  }
  const words = text.toLowerCase().split(/\s+/);
  if (words.length < 60) return false;
  const seen = new Set<string>();
  for (let i = 0; i + 4 <= words.length; i++) seen.add(words.slice(i, i + 4).join(' '));
  return seen.size < 0.4 * (words.length - 3);
}
