// Where documents come from. A source can be read again and again, and holds no more than a few megabytes at a time.

import { isUtf8 } from 'node:buffer';
import { open, stat } from 'node:fs/promises';
import { ConfigError, DataError } from '../tensor/errors.ts';
import { pieceEnd } from '../tokenizer/train.ts';
import { expandPaths, readError } from './paths.ts';

/** A text, or a part of one that is too long to be held. */
export interface TextDocument {
  /** UTF-8, if it is bytes. */
  readonly text: string | Uint8Array;
  readonly file: string;
  /** The next document is a continuation of this one. */
  readonly continues?: boolean;
}

/** Ids made beforehand, or a part of such a document. */
export interface TokenDocument {
  readonly ids: Uint16Array | Uint32Array | Int32Array;
  readonly file: string;
  readonly continues?: boolean;
}

/** A record that was left out. */
export interface Malformed {
  readonly file: string;
  /** Counted from 1. */
  readonly line: number;
  readonly reason: string;
  /** The field at fault, where it is one. */
  readonly field?: string;
}

export interface ReadOptions {
  /** Told about each record that is left out. */
  readonly onMalformed?: (record: Malformed) => void;
}

/** A file that a source reads, to tell whether something made from it is still good. */
export interface SourceFile {
  readonly file: string;
  readonly bytes: number;
  /** Last change, in milliseconds. */
  readonly changed: number;
}

/** The files of sources for errors: `, in a.txt, b.txt and 3 more`; nothing where they have none. */
export async function inFiles(sources: readonly Pick<Source, 'files'>[]): Promise<string> {
  const files = (await Promise.all(sources.map((source) => source.files() ?? []))).flat().map(({ file }) => file);
  if (files.length === 0) return '';
  const more = files.length > 3 ? ` and ${files.length - 3} more` : '';
  return `, in ${files.slice(0, 3).join(', ')}${more}`;
}

export interface TextSource {
  readonly kind: 'text';
  documents(options?: ReadOptions): AsyncIterable<TextDocument>;
  /** The files it reads; undefined for text that is not in files. */
  files(): Promise<SourceFile[]> | undefined;
  /** What decides, beside the files, which documents come out. */
  readonly options: string;
}

export interface TokenSource {
  readonly kind: 'tokens';
  documents(options?: ReadOptions): AsyncIterable<TokenDocument>;
  files(): Promise<SourceFile[]> | undefined;
  readonly options: string;
  /** Fingerprints of the tokenizers that made the ids, where the files tell. */
  fingerprints(): Promise<string[]>;
}

export type Source = TextSource | TokenSource;

export interface TextFilesOptions {
  /** What stands between documents, such as `\n\n\n` or `<|endoftext|>`. Default: a file is one document. */
  readonly separator?: string;
  /** `error` refuses a file that is not UTF-8, `replace` puts U+FFFD in place of bad bytes. Default `error`. */
  readonly onInvalid?: 'error' | 'replace';
}

const chunkBytes = 1 << 22;

/**
 * Plain text: files, folders (`.txt`, `.md`, `.text`) or globs. Empty documents are left out, a byte order mark too.
 * Reading throws DataError `ERR_UTF8` naming file and byte; FileError `ERR_READ`; DataError `ERR_NO_FILES`.
 * @throws ConfigError for an empty separator
 */
export function textFiles(paths: string | readonly string[], options: TextFilesOptions = {}): TextSource {
  if (options.separator === '') {
    throw new ConfigError('textFiles: separator is empty; leave it out where a file is one document', {
      code: 'ERR_CONFIG',
      op: 'textFiles',
      argument: 'separator',
      expected: 'a text that is not empty',
    });
  }
  const expand = () => expandPaths(paths, ['.txt', '.md', '.text']);
  return {
    kind: 'text',
    options: JSON.stringify(['text', options.separator, options.onInvalid]),
    files: async () => describeFiles(await expand()),
    async *documents() {
      for (const file of await expand()) yield* readText(file, options);
    },
  };
}

/** Texts in memory, one document each. */
export function texts(documents: Iterable<string>): TextSource {
  return {
    kind: 'text',
    options: 'memory',
    files: () => undefined,
    async *documents() {
      let i = 0;
      for (const text of documents) {
        if (text !== '') yield { text, file: `text ${i}` };
        i++;
      }
    },
  };
}

export async function describeFiles(files: readonly string[]): Promise<SourceFile[]> {
  return Promise.all(
    files.map(async (file) => {
      try {
        const info = await stat(file);
        return { file, bytes: info.size, changed: info.mtimeMs };
      } catch (error) {
        throw readError(file, error);
      }
    }),
  );
}

/** The bytes of a file in chunks that stay valid. */
export async function* chunksOf(file: string): AsyncGenerator<Buffer> {
  const system = <T>(promise: Promise<T>) =>
    promise.catch((error: unknown) => {
      throw readError(file, error);
    });
  const handle = await system(open(file, 'r'));
  try {
    // A small file gets a small buffer: a corpus may be a million of them. A pipe has no size.
    const { size } = await system(handle.stat());
    const room = size > 0 ? Math.min(chunkBytes, size + 1) : chunkBytes;
    for (;;) {
      const { buffer, bytesRead } = await system(handle.read(Buffer.allocUnsafe(room), 0, room, null));
      if (bytesRead === 0) return;
      yield buffer.subarray(0, bytesRead);
    }
  } finally {
    await handle.close();
  }
}

// What reads files by a program only: run files and commands have no such option.
const replaceHint = ", or, in a program, set onInvalid: 'replace' of textFiles()";

async function* readText(file: string, options: TextFilesOptions): AsyncGenerator<TextDocument> {
  const separator = options.separator === undefined ? undefined : Buffer.from(options.separator);
  let rest: Buffer = Buffer.alloc(0);
  let at = 0; // place of `rest` in the file
  let inside = false; // a part of the current document was given out
  const document = (text: Buffer, continues: boolean): TextDocument => {
    const checked = checkUtf8(text, file, at, options.onInvalid, replaceHint);
    inside = continues;
    return continues ? { text: checked, file, continues } : { text: checked, file };
  };
  for await (const chunk of chunksOf(file)) {
    rest = rest.length === 0 ? chunk : Buffer.concat([rest, chunk]);
    if (at === 0 && rest.length >= 3 && rest[0] === 0xef && rest[1] === 0xbb && rest[2] === 0xbf) {
      rest = rest.subarray(3);
      at = 3;
    }
    for (let end = separator === undefined ? -1 : rest.indexOf(separator); end >= 0; end = rest.indexOf(separator!)) {
      if (end > 0 || inside) yield document(rest.subarray(0, end), false);
      rest = rest.subarray(end + separator!.length);
      at += end + separator!.length;
    }
    // A separator that begins in the last bytes may end in the next chunk.
    const room = rest.length - (separator?.length ?? 1);
    while (rest.length > 2 * chunkBytes) {
      const end = pieceEnd(rest, 0, Math.min(chunkBytes, room));
      yield document(rest.subarray(0, end), true);
      rest = rest.subarray(end);
      at += end;
    }
  }
  if (rest.length > 0 || inside) yield document(rest, false);
}

/**
 * `text` if it is UTF-8; otherwise an error that names the byte, or a string with replacements.
 * @param hint what else than converting the file can be done
 */
export function checkUtf8(
  text: Buffer,
  file: string,
  at: number,
  onInvalid: 'error' | 'replace' = 'error',
  hint = '',
): Buffer | string {
  if (isUtf8(text)) return text;
  if (onInvalid === 'replace') return text.toString('utf8');
  const offset = firstInvalidByte(text);
  const byte = text[offset]!.toString(16).padStart(2, '0');
  const utf16 = at + offset === 0 && (text[0] === 0xff || text[0] === 0xfe) ? ' (the file looks like UTF-16)' : '';
  throw new DataError(`data: ${file} is not UTF-8: byte 0x${byte} at offset ${at + offset}${utf16}; convert the file${hint}`, {
    code: 'ERR_UTF8',
    op: 'data',
    argument: file,
    expected: 'UTF-8',
    actual: `0x${byte} at byte ${at + offset}`,
  });
}

/** Where the first sequence that is not UTF-8 begins; the length when there is none. */
export function firstInvalidByte(text: Buffer): number {
  // Bisection over prefixes that end where a character may begin.
  let good = 0;
  let bad = text.length;
  const boundary = (at: number) => {
    let to = at;
    while (to > good && (text[to]! & 0xc0) === 0x80) to--;
    return to;
  };
  while (bad - good > 64) {
    const middle = boundary((good + bad) >>> 1);
    if (middle === good) break;
    if (isUtf8(text.subarray(good, middle))) good = middle;
    else bad = middle;
  }
  while (good < text.length) {
    const length = [1, 2, 3, 4].find((n) => good + n <= text.length && isUtf8(text.subarray(good, good + n)));
    if (length === undefined) return good;
    good += length;
  }
  return good;
}
