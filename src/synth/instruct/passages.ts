// Raw texts for a synthesizer: the documents of a source, those that are long cut into passages.

import { createHash } from 'node:crypto';
import { inFiles, type TextSource } from '../../data/source.ts';
import { DataError } from '../../tensor/errors.ts';
import type { Tokenizer } from '../../tokenizer/tokenizer.ts';
import type { GatherStage, RecordSource } from '../pipeline.ts';

/** A text to be given pairs. */
export interface RawText {
  readonly id: string;
  readonly text: string;
}

/**
 * The documents of a source as records; their content decides whether stages run again.
 * @throws DataError `ERR_EMPTY` for a source without text; what reading the source throws
 */
export async function textRecords(source: TextSource): Promise<RecordSource<RawText>> {
  const hash = createHash('sha256');
  let count = 0;
  for await (const { text } of documents(source)) {
    hash.update(text).update('\0');
    count++;
  }
  if (count === 0) {
    throw new DataError(`synth: there is no text to ask about${await inFiles([source])}`, {
      code: 'ERR_EMPTY',
      op: 'synth',
      argument: 'texts',
    });
  }
  return {
    settings: { texts: hash.digest('hex') },
    count,
    async *records() {
      let number = 0;
      for await (const { text } of documents(source)) yield { id: String(number++), text };
    },
  };
}

/** Whole documents; blank ones are left out. */
async function* documents(source: TextSource): AsyncGenerator<{ text: string }> {
  let parts: string[] = [];
  for await (const { text, continues = false } of source.documents()) {
    parts.push(typeof text === 'string' ? text : Buffer.from(text.buffer, text.byteOffset, text.length).toString('utf8'));
    if (continues) continue;
    const whole = parts.join('');
    parts = [];
    if (whole.trim() !== '') yield { text: whole };
  }
}

/** A stage that cuts texts into passages of at most `tokens` tokens. */
export function passageStage(options: { readonly tokenizer: Tokenizer; readonly tokens: number }): GatherStage<RawText, RawText> {
  const { tokenizer, tokens } = options;
  return {
    kind: 'gather',
    name: 'passages',
    settings: { tokenizer: tokenizer.digest, tokens },
    async run(records, output) {
      for await (const { id, text } of records()) {
        const cut = passagesOf(text, tokens, (part) => tokenizer.encode(part, { special: false }).length);
        for (const [i, passage] of cut.entries()) await output.keep({ id: cut.length === 1 ? id : `${id}.${i}`, text: passage });
      }
    },
  };
}

/** Where a text may be cut, the best places first: paragraphs, lines, sentences, words. */
const breaks = [/(?<=\n\s*\n)/, /(?<=\n)/, /(?<=[.!?]["')\]]?\s)/, /(?<=\s)/];

/**
 * Cuts a text into passages of at most `most` tokens as `count` counts them, at the ends of paragraphs where these are short enough, else of
 * lines, sentences or words. A word that is longer stays whole. White space around passages is left out.
 */
export function passagesOf(text: string, most: number, count: (text: string) => number): string[] {
  return pack(text, most, count, 0)
    .map((passage) => passage.trim())
    .filter((passage) => passage !== '');
}

function pack(text: string, most: number, count: (text: string) => number, level: number): string[] {
  if (level === breaks.length || count(text.trim()) <= most) return [text];
  const passages: string[] = [];
  let open = '';
  for (const part of text.split(breaks[level]!)) {
    if (open !== '' && count((open + part).trim()) > most) {
      passages.push(open);
      open = '';
    }
    open += part;
    if (count(open.trim()) <= most) continue;
    const inner = pack(open, most, count, level + 1);
    // The last piece may have room for what follows.
    open = inner.pop()!;
    passages.push(...inner);
  }
  return open === '' ? passages : [...passages, open];
}
