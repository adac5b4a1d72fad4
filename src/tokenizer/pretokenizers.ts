// The pre-tokenizers that native/text/split.cpp knows, as they stand in a tokenizer.json.

const fold = 1;
const anyPrefix = 2;
const newlines = 4;
const numberSpace = 8;
const cutNumbers = 16;
const numberLength = (n: number) => n << 8;

/** A way to cut text into words before BPE. */
export type PreTokenizerName = 'digits' | 'gpt2' | 'llama3' | 'qwen2';

const contractions = "'s|'t|'re|'ve|'m|'ll|'d";
const modern = (numbers: string) =>
  `(?i:${contractions})|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|${numbers}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+`;

// Readers disagree about what `Digits` takes for one, and agree about this.
const number = '\\p{N}';

const gpt2 = `${contractions}| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+`;

const known: Record<PreTokenizerName, { regex: string; rules: number }> = {
  digits: { regex: gpt2, rules: numberSpace | cutNumbers },
  gpt2: { regex: gpt2, rules: numberSpace },
  llama3: { regex: modern('\\p{N}{1,3}'), rules: fold | anyPrefix | newlines | numberLength(3) },
  qwen2: { regex: modern('\\p{N}'), rules: fold | anyPrefix | newlines | numberLength(1) },
};

/** Names of the pre-tokenizers that can be trained with. */
export const preTokenizerNames = Object.keys(known) as PreTokenizerName[];

/** Rules for the native splitter. */
export function rulesOf(name: PreTokenizerName): number {
  return known[name].rules;
}

/**
 * The `pre_tokenizer` entry of a tokenizer.json. The expression is spelled out, although ByteLevel has GPT-2's built in, because
 * readers disagree about what `\s` means in the built-in one.
 */
export function preTokenizerJson(name: PreTokenizerName): object {
  return {
    type: 'Sequence',
    pretokenizers: [
      ...(name === 'digits' ? [{ type: 'Split', pattern: { Regex: number }, behavior: 'Isolated', invert: false }] : []),
      { type: 'Split', pattern: { Regex: known[name].regex }, behavior: 'Isolated', invert: false },
      { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: false },
    ],
  };
}

interface Json {
  readonly [key: string]: unknown;
}

const isByteLevel = (json: Json, regex: boolean) =>
  json.type === 'ByteLevel' && json.add_prefix_space === false && (json.use_regex ?? true) === regex;

// What `digits` was before: it keeps a space of several apart from the digit behind them, which no other reader of tokenizers has a name for.
const oldDigits = { regex: `${contractions}| ?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+`, rules: numberLength(1) };

/** Rules for the native splitter that do exactly what a `pre_tokenizer` entry says, or undefined when there are none. */
export function rulesFor(json: unknown): number | undefined {
  const entry = json as Json | null;
  if (entry === null || typeof entry !== 'object') return undefined;
  if (isByteLevel(entry, true)) return known.gpt2.rules;
  const parts = entry.type === 'Sequence' ? entry.pretokenizers : undefined;
  if (!Array.isArray(parts) || !parts.every((part) => typeof part === 'object' && part !== null)) return undefined;
  const [first, ...rest] = parts as Json[];
  const isNumber =
    first?.type === 'Split' && (first.pattern as Json | undefined)?.Regex === number && first.behavior === 'Isolated';
  if ((first?.type === 'Digits' && first.individual_digits === true) || (isNumber && first.invert !== true)) {
    return wordRules(rest) === known.gpt2.rules ? known.digits.rules : undefined;
  }
  return wordRules(parts as Json[]);
}

/** Rules of an expression and the bytes after it. */
function wordRules([first, second, ...more]: readonly Json[]): number | undefined {
  if (first === undefined || more.length > 0) return undefined;
  if (second === undefined) return isByteLevel(first, true) ? known.gpt2.rules : undefined;
  if (first.type !== 'Split' || first.behavior !== 'Isolated' || first.invert === true || !isByteLevel(second, false))
    return undefined;
  const regex = (first.pattern as Json | undefined)?.Regex;
  const { digits: _, ...plain } = known;
  return [...Object.values(plain), oldDigits].find((k) => k.regex === regex)?.rules;
}

/** Our name of what a `pre_tokenizer` entry says, where there is one. */
export function preTokenizerOf(json: unknown): PreTokenizerName | undefined {
  const rules = rulesFor(json);
  return preTokenizerNames.find((name) => known[name].rules === rules);
}
