// Turns what zod found wrong with a run into sentences: which field, what it is, what it must be, what was probably meant.

import type { z } from 'zod';
import { zodLoaded } from './schema.ts';

type Issue = z.core.$ZodIssue;
type Path = readonly PropertyKey[];

interface Explanation {
  readonly message: string;
  /** Path of the first field at fault. */
  readonly argument: string;
  readonly expected?: string;
  readonly actual?: string;
}

interface Finding {
  readonly path: string;
  readonly text: string;
  readonly expected?: string;
  readonly actual?: string;
}

/** What other tools call our fields. */
const synonyms: Readonly<Record<string, string>> = {
  lr: 'optimizer.learningRate',
  wd: 'optimizer.weightDecay',
  epsilon: 'optimizer.eps',
  gradclip: 'optimizer.clip',
  maxgradnorm: 'optimizer.clip',
  batchsize: 'batch.sequences',
  microbatch: 'batch.sequences',
  seqlen: 'batch.length',
  sequencelength: 'batch.length',
  blocksize: 'batch.length',
  contextlength: 'batch.length',
  gradientaccumulationsteps: 'batch.accumulate',
  warmup: 'schedule.warmupSteps',
  maxsteps: 'steps',
  iterations: 'steps',
  epochs: 'steps',
  dmodel: 'model.width',
  hiddensize: 'model.width',
  nembd: 'model.width',
  nlayers: 'model.layers',
  nlayer: 'model.layers',
  numhiddenlayers: 'model.layers',
  nheads: 'model.heads',
  nhead: 'model.heads',
  numattentionheads: 'model.heads',
  numkeyvalueheads: 'model.kvHeads',
  headdim: 'model.headSize',
  intermediatesize: 'model.hidden',
  ffn: 'model.hidden',
  slidingwindow: 'model.window',
  attnlogitsoftcapping: 'model.attentionCap',
  finallogitsoftcapping: 'model.finalCap',
  ropetheta: 'model.ropeBase',
  rmsnormeps: 'model.normEps',
  out: 'output',
  outputdir: 'output',
  outdir: 'output',
  randomseed: 'seed',
  alpha: 'distill.hardWeight',
  evalevery: 'evaluate.every',
  saveevery: 'checkpoint.every',
};

/** One explanation of all issues; the first issue names the argument. */
export function explain(issues: readonly Issue[], input: unknown, schema: z.ZodType): Explanation {
  const findings = issues.flatMap((issue) => findingsOf(issue, [], input, schema));
  const first = findings[0]!;
  const message =
    findings.length === 1
      ? first.text
      : `${findings.length} fields are wrong\n${findings.map((f) => `  - ${f.text}`).join('\n')}`;
  return {
    message,
    argument: first.path,
    ...(first.expected === undefined ? {} : { expected: first.expected }),
    ...(first.actual === undefined ? {} : { actual: first.actual }),
  };
}

function findingsOf(issue: Issue, base: Path, input: unknown, schema: z.ZodType): Finding[] {
  const path = [...base, ...issue.path];
  const value = valueAt(input, path);
  switch (issue.code) {
    case 'unrecognized_keys':
      return issue.keys.map((key) => unknownField(path, key, input, schema));
    case 'invalid_union': {
      if (issue.errors.length === 0) return [choice(path, value, discriminators(schema, path, input), schema, input)];
      // The branch that got past the type of the whole value is the one that was meant.
      const meant = issue.errors.find((errors) => !errors.some((e) => e.path.length === 0 && e.code === 'invalid_type'));
      if (meant) return meant.flatMap((inner) => findingsOf(inner, path, input, schema));
      return [wrong(path, value, issue.errors.map((errors) => expectation(errors[0]!)).join(' or '), schema, input)];
    }
    case 'invalid_value':
      return [choice(path, value, issue.values.map(quote), schema, input)];
    case 'custom':
      return [
        {
          path: dotted(path),
          text: issue.path.length === 0 && path.length === 0 ? issue.message : `${dotted(path)}${readOn(issue.message)}`,
          expected: issue.message,
        },
      ];
    default:
      return [wrong(path, value, expectation(issue), schema, input)];
  }
}

/** A refinement's text reads on from the name of the field ("must divide heads"), or stands for itself. */
function readOn(message: string): string {
  return message.startsWith('must ') ? ` ${message}` : `: ${message}`;
}

function unknownField(path: Path, key: string, input: unknown, schema: z.ZodType): Finding {
  const full = dotted([...path, key]);
  const here = keysAt(schema, path, input);
  const meant = nearest(key, here);
  const elsewhere = fields(schema, input);
  const suggestion =
    (meant && dotted([...path, meant])) ??
    elsewhere.find((field) => field === synonyms[plain(key)]) ??
    elsewhere.find((field) => plain(field.slice(field.lastIndexOf('.') + 1)) === plain(key));
  const hint = suggestion
    ? `did you mean ${suggestion}?`
    : `known ${path.length ? `in ${dotted(path)}` : 'here'}: ${here.join(', ')}`;
  return { path: full, text: `${full} is not a known field; ${hint}`, actual: key, expected: suggestion ?? here.join(', ') };
}

function choice(path: Path, value: unknown, choices: readonly string[], schema: z.ZodType, input: unknown): Finding {
  const meant =
    typeof value === 'string'
      ? nearest(
          value,
          choices.map((c) => c.replace(/^"|"$/g, '')),
        )
      : undefined;
  const finding = wrong(path, value, choices.length === 1 ? choices[0]! : `one of ${choices.join(', ')}`, schema, input);
  return meant ? { ...finding, text: `${finding.text} Did you mean ${quote(meant)}?` } : finding;
}

function wrong(path: Path, value: unknown, expected: string, schema: z.ZodType, input: unknown): Finding {
  const name = path.length ? dotted(path) : 'the run';
  const about = path.at(-1) === 'kind' ? undefined : schemasAt(schema, path, input).find((s) => s.description)?.description;
  const is = value === undefined ? 'is missing' : `is ${quote(value)}`;
  return {
    path: dotted(path),
    text: `${name} ${is}; it must be ${expected}.${about ? ` (${about})` : ''}`,
    expected,
    actual: value === undefined ? 'nothing' : quote(value),
  };
}

/** What a value must be, as the end of the sentence "it must be ...". */
function expectation(issue: Issue): string {
  switch (issue.code) {
    case 'invalid_type': {
      const names: Record<string, string> = {
        int: 'a whole number',
        number: 'a number',
        string: 'a text',
        boolean: 'true or false',
        object: 'an object',
        array: 'a list',
      };
      return names[issue.expected] ?? issue.expected;
    }
    case 'too_small': {
      if (issue.origin === 'string') return 'a text that is not empty';
      if (issue.origin === 'array') return `a list of at least ${issue.minimum}`;
      return `${issue.origin === 'int' ? 'a whole number' : 'a number'} ${issue.inclusive ? 'of at least' : 'above'} ${issue.minimum}`;
    }
    case 'too_big':
      return `${issue.origin === 'int' ? 'a whole number' : 'a number'} ${issue.inclusive ? 'of at most' : 'below'} ${issue.maximum}`;
    case 'not_multiple_of':
      return issue.divisor === 2 ? 'an even number' : `a multiple of ${issue.divisor}`;
    case 'invalid_value':
      return issue.values.map(quote).join(' or ');
    default:
      return issue.message;
  }
}

function discriminators(schema: z.ZodType, path: Path, input: unknown): string[] {
  const z = zodLoaded();
  const key = path.at(-1) as string;
  const kinds = schemasAt(schema, path.slice(0, -1), input, false).flatMap((s) => {
    const field = s instanceof z.ZodObject ? (s.shape as Record<string, z.ZodType>)[key] : undefined;
    return field instanceof z.ZodLiteral ? [...field.values].map(quote) : [];
  });
  return [...new Set(kinds)];
}

/** The schemas that may hold at `path`; a `kind` in the input chooses among the members of a union. */
function schemasAt(schema: z.ZodType, path: Path, input: unknown, byKind = true): z.ZodType[] {
  const z = zodLoaded();
  const open = (s: z.ZodType, value: unknown): z.ZodType[] => {
    if (s instanceof z.ZodOptional || s instanceof z.ZodNullable || s instanceof z.ZodDefault || s instanceof z.ZodPrefault) {
      const inner = open(s.unwrap() as z.ZodType, value);
      return [s, ...inner];
    }
    if (!(s instanceof z.ZodUnion)) return [s];
    const members = s.options as z.ZodType[];
    const kind = (value as { kind?: unknown } | undefined)?.kind;
    const chosen = members.filter(
      (m) => m instanceof z.ZodObject && m.shape.kind instanceof z.ZodLiteral && m.shape.kind.value === kind,
    );
    return [s, ...(byKind && chosen.length ? chosen : members).flatMap((m) => open(m, value))];
  };
  let found = open(schema, input);
  let value: unknown = input;
  for (const key of path) {
    value = (value as Record<PropertyKey, unknown> | undefined)?.[key];
    found = found.flatMap((s) => {
      if (s instanceof z.ZodArray) return open(s.element as z.ZodType, value);
      const field = s instanceof z.ZodObject ? (s.shape as Record<PropertyKey, z.ZodType>)[key] : undefined;
      return field ? open(field, value) : [];
    });
  }
  return found;
}

function keysAt(schema: z.ZodType, path: Path, input: unknown): string[] {
  const z = zodLoaded();
  const keys = schemasAt(schema, path, input).flatMap((s) => (s instanceof z.ZodObject ? Object.keys(s.shape) : []));
  return [...new Set(keys)].filter((key) => key !== '$schema');
}

/** Every field of a run with its description, groups before their members; `input` (`{ kind }`) chooses among forms. */
export function describeFields(schema: z.ZodType, input: unknown): { field: string; about: string }[] {
  return fields(schema, input).map((field) => ({
    field,
    about: schemasAt(schema, field.replaceAll('[]', '.0').split('.'), input).find((s) => s.description)?.description ?? '',
  }));
}

/** Paths of all fields; `list[].field` for those of a list's entries. */
function fields(schema: z.ZodType, input: unknown, path: string[] = []): string[] {
  return keysAt(schema, path, input).flatMap((key) => {
    const next = [...path, key];
    return [next.join('.').replaceAll('.0', '[]'), ...fields(schema, input, next), ...fields(schema, input, [...next, '0'])];
  });
}

/** The candidate that `word` was probably meant to be. */
export function nearest(word: string, candidates: readonly string[]): string | undefined {
  const scored = candidates.map((candidate) => ({ candidate, distance: editDistance(plain(word), plain(candidate)) }));
  const best = scored.sort((a, b) => a.distance - b.distance)[0];
  return best && best.distance <= Math.max(1, Math.floor(best.candidate.length / 3)) ? best.candidate : undefined;
}

/** Letters only: learning_rate, learning-rate and learningRate are one word. */
function plain(word: string): string {
  return word.toLowerCase().replace(/[^a-z0-9]/g, '');
}

function editDistance(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, j) => j);
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++) {
      next[j] = Math.min(row[j]! + 1, next[j - 1]! + 1, row[j - 1]! + (a[i - 1] === b[j - 1] ? 0 : 1));
    }
    row = next;
  }
  return row[b.length]!;
}

function valueAt(input: unknown, path: Path): unknown {
  return path.reduce<unknown>((value, key) => (value as Record<PropertyKey, unknown> | null | undefined)?.[key], input);
}

function dotted(path: Path): string {
  return path.map(String).join('.');
}

function quote(value: unknown): string {
  const text = JSON.stringify(value) ?? String(value);
  return text.length > 60 ? `${text.slice(0, 57)}...` : text;
}
