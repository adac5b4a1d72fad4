// Records of JSON Lines, JSON and Parquet files, each with its place, so that what is wrong with one can be told.

import { open, readFile } from 'node:fs/promises';
import { FormatError } from '../tensor/errors.ts';
import { linesOf, parseLine } from './jsonl.ts';
import { parquetRows } from './parquet.ts';
import { expandPaths, readError } from './paths.ts';
import { checkUtf8, type Malformed } from './source.ts';

/** A record and where it stands. */
export interface DataRecord {
  readonly value: Readonly<Record<string, unknown>>;
  readonly file: string;
  /** Line where it begins, from 1; in a Parquet file the number of the row. */
  readonly line: number;
}

const endings = ['.jsonl', '.ndjson', '.json', '.parquet'];

/**
 * Records of files, folders (`.jsonl`, `.ndjson`, `.json`, `.parquet`) or globs, in order. A JSON file holds a list of objects. Whether a file
 * is JSON, JSON Lines or Parquet is told by its first bytes.
 * Reading throws FileError `ERR_READ`; DataError `ERR_NO_FILES`; FormatError `ERR_JSON`, `ERR_PARQUET` for a file that is damaged as a whole.
 * @param onMalformed told about each record that is no object.
 */
export async function* records(
  paths: string | readonly string[],
  onMalformed: (record: Malformed) => void,
): AsyncGenerator<DataRecord> {
  for (const file of await expandPaths(paths, endings)) {
    switch (await kindOf(file)) {
      case 'parquet':
        yield* parquetRecords(file);
        break;
      case 'json':
        yield* jsonEntries(file, onMalformed);
        break;
      default:
        yield* jsonLines(file, onMalformed);
    }
  }
}

async function kindOf(file: string): Promise<'parquet' | 'json' | 'jsonl'> {
  const head = Buffer.alloc(1024);
  try {
    const handle = await open(file, 'r');
    try {
      const { bytesRead } = await handle.read(head, 0, head.length, 0);
      const text = head.toString('latin1', 0, bytesRead);
      if (text.startsWith('PAR1')) return 'parquet';
      return /^(\xef\xbb\xbf)?\s*\[/.test(text) ? 'json' : 'jsonl';
    } finally {
      await handle.close();
    }
  } catch (error) {
    throw readError(file, error);
  }
}

async function* jsonLines(file: string, onMalformed: (record: Malformed) => void): AsyncGenerator<DataRecord> {
  let line = 0;
  for await (const bytes of linesOf(file)) {
    line++;
    const parsed = parseLine(bytes, 'error');
    if (parsed === undefined) continue;
    if ('reason' in parsed) onMalformed({ file, line, reason: parsed.reason });
    else yield { value: parsed.value, file, line };
  }
}

async function* jsonEntries(file: string, onMalformed: (record: Malformed) => void): AsyncGenerator<DataRecord> {
  let bytes: Buffer;
  try {
    bytes = await readFile(file);
  } catch (error) {
    throw readError(file, error);
  }
  yield* entriesOf(bytes, file, onMalformed);
}

/** @internal Records of the bytes of a JSON file. */
export function* entriesOf(bytes: Buffer, file: string, onMalformed: (record: Malformed) => void): Generator<DataRecord> {
  const text = String(checkUtf8(bytes, file, 0)).replace(/^\ufeff/, '');
  let list: unknown[];
  try {
    list = JSON.parse(text) as unknown[];
  } catch (error) {
    throw new FormatError(`data: ${file} is no valid JSON: ${(error as Error).message}`, {
      code: 'ERR_JSON',
      op: 'data',
      argument: file,
      cause: error,
    });
  }
  const lines = entryLines(text);
  for (const [i, value] of list.entries()) {
    const line = lines[i]!;
    if (typeof value !== 'object' || value === null || Array.isArray(value)) onMalformed({ file, line, reason: 'not an object' });
    else yield { value: value as Record<string, unknown>, file, line };
  }
}

/** The line on which each entry of a JSON list begins. */
export function entryLines(text: string): number[] {
  const lines: number[] = [];
  let line = 1;
  let depth = 0;
  let awaited = false; // an entry begins at the next character that is no space
  for (let i = 0; i < text.length; i++) {
    const char = text[i]!;
    if (char === '\n') line++;
    if (char.trim() === '') continue;
    if (awaited && char !== ']') lines.push(line);
    awaited = (char === '[' && depth === 0) || (char === ',' && depth === 1);
    if (char === '"') for (i++; text[i] !== '"'; i++) i += text[i] === '\\' ? 1 : 0;
    else if (char === '[' || char === '{') depth++;
    else if (char === ']' || char === '}') depth--;
  }
  return lines;
}

async function* parquetRecords(file: string): AsyncGenerator<DataRecord> {
  let line = 0;
  for await (const value of parquetRows(file)) yield { value, file, line: ++line };
}
