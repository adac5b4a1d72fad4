// JSON Lines: one document a line. A line that cannot be used is counted and left out, unless asked otherwise.

import { isUtf8 } from 'node:buffer';
import { DataError } from '../tensor/errors.ts';
import { expandPaths } from './paths.ts';
import { chunksOf, describeFiles, firstInvalidByte, type ReadOptions, type TextDocument, type TextSource } from './source.ts';

export interface JsonlOptions {
  /** The field with the text. Default `text`. */
  readonly field?: string;
  /** Stop at the first line that cannot be used. Default false: it is reported and left out. */
  readonly strict?: boolean;
  /** `error` counts a line that is not UTF-8 as malformed, `replace` puts U+FFFD in place of bad bytes. Default `error`. */
  readonly onInvalid?: 'error' | 'replace';
}

/**
 * JSON Lines: files, folders (`.jsonl`, `.ndjson`) or globs. Blank lines and empty texts are left out.
 * Reading throws DataError `ERR_MALFORMED` naming file and line when `strict`; FileError `ERR_READ`; DataError `ERR_NO_FILES`.
 */
export function jsonl(paths: string | readonly string[], options: JsonlOptions = {}): TextSource {
  const expand = () => expandPaths(paths, ['.jsonl', '.ndjson']);
  return {
    kind: 'text',
    options: JSON.stringify(['jsonl', options.field, options.strict, options.onInvalid]),
    files: async () => describeFiles(await expand()),
    async *documents(read = {}) {
      for (const file of await expand()) yield* readLines(file, options, read);
    },
  };
}

async function* readLines(file: string, options: JsonlOptions, read: ReadOptions): AsyncGenerator<TextDocument> {
  const field = options.field ?? 'text';
  let number = 0;
  for await (const line of linesOf(file)) {
    number++;
    const text = textOf(line, field, options.onInvalid ?? 'error');
    if (typeof text === 'string') {
      if (text !== '') yield { text, file };
    } else if (text !== undefined) {
      if (options.strict) {
        throw new DataError(`data: ${file}, line ${number}: ${text.reason}`, {
          code: 'ERR_MALFORMED',
          op: 'data',
          argument: `${file}:${number}`,
          actual: text.reason,
        });
      }
      read.onMalformed?.({ file, line: number, reason: text.reason });
    }
  }
}

/** The text of a line, nothing for a blank line, or why there is none. */
function textOf(line: Buffer, field: string, onInvalid: 'error' | 'replace'): string | { reason: string } | undefined {
  const parsed = parseLine(line, onInvalid);
  if (parsed === undefined || 'reason' in parsed) return parsed;
  const { value } = parsed;
  const text: unknown = Object.hasOwn(value, field) ? value[field] : undefined;
  if (text === undefined) return { reason: `no field "${field}"` };
  return typeof text === 'string' ? text : { reason: `field "${field}" is not a text` };
}

/** The object of a line, nothing for a blank line, or why there is none. */
export function parseLine(
  line: Buffer,
  onInvalid: 'error' | 'replace',
): { value: Record<string, unknown> } | { reason: string } | undefined {
  if (onInvalid === 'error' && !isUtf8(line)) return { reason: `not UTF-8 at byte ${firstInvalidByte(line)} of the line` };
  const source = line.toString('utf8').trim();
  if (source === '') return undefined;
  let value: unknown;
  try {
    value = JSON.parse(source);
  } catch (error) {
    return { reason: `not JSON: ${(error as Error).message}` };
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value)) return { reason: 'not an object' };
  return { value: value as Record<string, unknown> };
}

/** The lines of a file, without a byte order mark. */
export async function* linesOf(file: string): AsyncGenerator<Buffer> {
  const parts: Buffer[] = []; // of a line that spans chunks
  let first = true;
  for await (let chunk of chunksOf(file)) {
    if (first && chunk[0] === 0xef && chunk[1] === 0xbb && chunk[2] === 0xbf) chunk = chunk.subarray(3);
    first = false;
    let from = 0;
    for (let end = chunk.indexOf(0x0a); end >= 0; end = chunk.indexOf(0x0a, from)) {
      const tail = chunk.subarray(from, end);
      yield parts.length === 0 ? tail : Buffer.concat([...parts.splice(0), tail]);
      from = end + 1;
    }
    if (from < chunk.length) parts.push(chunk.subarray(from));
  }
  if (parts.length > 0) yield Buffer.concat(parts);
}
