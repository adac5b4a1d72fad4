// Token stores: the ids of a corpus with the ends of its documents, in memory or in a file.
// A token file is a safetensors file: `tokens` (U16 or U32) and `ends` (I64: where each document ends).

import { type FileHandle, open } from 'node:fs/promises';
import { readAll, writeAll, writeAtomic } from '../io/atomic.ts';
import { openSafetensors } from '../io/safetensors.ts';
import { ConfigError, DataError, FormatError } from '../tensor/errors.ts';
import type { Ids } from './pack.ts';
import { expandPaths, readError } from './paths.ts';
import { describeFiles, type TokenDocument, type TokenSource } from './source.ts';

/** Ids that can be read from any place. */
export interface TokenStore {
  readonly tokens: number;
  /** Where each document ends, counted in tokens. */
  readonly ends: Float64Array;
  /** `count` ids from place `from`. */
  read(from: number, count: number): Promise<Ids>;
  close(): Promise<void>;
}

// Ids of one piece of a store in memory, and of one read of a file.
const chunkIds = 1 << 20;

/** A list of numbers that grows. */
export class GrowingEnds {
  #data = new Float64Array(1024);
  length = 0;

  push(value: number): void {
    if (this.length === this.#data.length) {
      const larger = new Float64Array(this.length * 2);
      larger.set(this.#data);
      this.#data = larger;
    }
    this.#data[this.length++] = value;
  }
  done(): Float64Array {
    return this.#data.slice(0, this.length);
  }
}

/** Collects ids in memory; 16 bits each when the vocabulary allows. */
export class MemoryTokens {
  readonly #chunks: (Uint16Array | Uint32Array)[] = [];
  readonly #wide: boolean;
  readonly #ends = new GrowingEnds();
  tokens = 0;

  constructor(vocabSize: number) {
    this.#wide = vocabSize > 65_536;
  }
  get bytes(): number {
    return this.tokens * (this.#wide ? 4 : 2);
  }
  append(ids: Ids): void {
    for (let from = 0; from < ids.length; ) {
      const at = this.tokens % chunkIds;
      if (at === 0) this.#chunks.push(this.#wide ? new Uint32Array(chunkIds) : new Uint16Array(chunkIds));
      const part = ids.subarray(from, from + chunkIds - at);
      this.#chunks.at(-1)!.set(part, at);
      from += part.length;
      this.tokens += part.length;
    }
  }
  endDocument(): void {
    this.#ends.push(this.tokens);
  }
  /** Everything collected so far, document by document, in pieces. */
  *pieces(): Generator<{ ids: Ids; ends: boolean }> {
    let at = 0;
    for (const end of this.#ends.done()) {
      do {
        const to = Math.min(end, (Math.floor(at / chunkIds) + 1) * chunkIds);
        yield { ids: this.#slice(at, to - at), ends: to === end };
        at = to;
      } while (at < end);
    }
    if (at < this.tokens) yield* this.#unfinished(at);
  }
  *#unfinished(from: number): Generator<{ ids: Ids; ends: boolean }> {
    for (let at = from; at < this.tokens; ) {
      const to = Math.min(this.tokens, (Math.floor(at / chunkIds) + 1) * chunkIds);
      yield { ids: this.#slice(at, to - at), ends: false };
      at = to;
    }
  }
  done(): TokenStore {
    return {
      tokens: this.tokens,
      ends: this.#ends.done(),
      read: async (from, count) => this.#slice(from, count),
      close: async () => {},
    };
  }
  #slice(from: number, count: number): Ids {
    const chunk = Math.floor(from / chunkIds);
    const at = from % chunkIds;
    if (at + count <= chunkIds) return (this.#chunks[chunk] ?? new Uint16Array(0)).subarray(at, at + count);
    const ids = new Int32Array(count);
    for (let done = 0, c = chunk, offset = at; done < count; c++, offset = 0) {
      const part = this.#chunks[c]!.subarray(offset, offset + count - done);
      ids.set(part, done);
      done += part.length;
    }
    return ids;
  }
}

/** Writes ids to a token file as they come. */
export interface TokenFileWriter {
  append(ids: Ids): Promise<void>;
  endDocument(): void;
}

export interface TokenFileOptions {
  /** Largest id + 1; decides whether ids take 16 or 32 bits. */
  readonly vocabSize: number;
  /** Fingerprint of the tokenizer that made the ids; checked when the file is used. */
  readonly fingerprint?: string;
  /** More to keep in the file's header. */
  readonly metadata?: Readonly<Record<string, string>>;
}

// Room for the header, which is known only at the end.
const headerBytes = 4096;

/**
 * Writes a token file, one document after the other, with bounded memory; the file appears when complete.
 * @throws FileError `ERR_WRITE`; DataError `ERR_TOKEN_RANGE` for an id that the vocabulary does not have
 */
export async function writeTokenFile(
  path: string,
  documents: AsyncIterable<Ids> | Iterable<Ids>,
  options: TokenFileOptions,
): Promise<void> {
  await writeTokens(path, options, async (writer) => {
    for await (const ids of documents) {
      await writer.append(ids);
      writer.endDocument();
    }
  });
}

/** As {@link writeTokenFile}, for ids that come in pieces. */
export async function writeTokens(
  path: string,
  options: TokenFileOptions,
  fill: (writer: TokenFileWriter) => Promise<void>,
): Promise<void> {
  const { vocabSize, fingerprint, metadata } = options;
  if (!Number.isInteger(vocabSize) || vocabSize < 1) {
    throw new ConfigError(`writeTokenFile: vocabSize is ${vocabSize}; it should be a positive integer`, {
      code: 'ERR_CONFIG',
      op: 'writeTokenFile',
      argument: 'vocabSize',
      expected: 'a positive integer',
      actual: String(vocabSize),
    });
  }
  const wide = vocabSize > 65_536;
  const ends = new GrowingEnds();
  let tokens = 0;
  await writeAtomic(path, async (file) => {
    await writeAll(file, new Uint8Array(8 + headerBytes));
    await fill({
      async append(ids) {
        checkRange(ids, vocabSize, path, tokens);
        const exact = wide ? Uint32Array : Uint16Array;
        for (let from = 0; from < ids.length; from += chunkIds)
          await writeAll(file, new exact(ids.subarray(from, from + chunkIds)));
        tokens += ids.length;
      },
      endDocument: () => ends.push(tokens),
    });
    await writeAll(file, BigInt64Array.from(ends.done(), BigInt));
    const width = wide ? 4 : 2;
    const header = {
      __metadata__: {
        ...metadata,
        format: 'limbeck.tokens',
        vocab_size: String(vocabSize),
        ...(fingerprint === undefined ? {} : { fingerprint }),
      },
      tokens: { dtype: wide ? 'U32' : 'U16', shape: [tokens], data_offsets: [0, tokens * width] },
      ends: { dtype: 'I64', shape: [ends.length], data_offsets: [tokens * width, tokens * width + ends.length * 8] },
    };
    const head = Buffer.alloc(8 + headerBytes, ' ');
    const text = Buffer.from(JSON.stringify(header));
    if (text.length > headerBytes)
      throw new ConfigError(`writeTokenFile: the metadata takes more than ${headerBytes} bytes`, {
        code: 'ERR_CONFIG',
        argument: 'metadata',
      });
    head.writeBigUInt64LE(BigInt(headerBytes), 0);
    text.copy(head, 8);
    await file.write(head, 0, head.length, 0);
  });
}

/** A token file that is open for reading. */
export interface TokenFile extends TokenStore {
  readonly vocabSize: number;
  readonly fingerprint: string | undefined;
  readonly metadata: Readonly<Record<string, string>>;
}

/** Opens a token file. @throws FormatError saying what is wrong with it; FileError `ERR_READ` */
export async function openTokenFile(path: string): Promise<TokenFile> {
  const header = await openSafetensors(path);
  try {
    const { metadata } = header;
    const refuse = (what: string) =>
      new FormatError(`openTokenFile: ${path} is not a token file: ${what}`, {
        code: 'ERR_TOKEN_FILE',
        op: 'openTokenFile',
        argument: path,
      });
    const entry = header.tensors.get('tokens');
    const endsEntry = header.tensors.get('ends');
    if (entry === undefined || endsEntry === undefined) throw refuse('it has no tensors named tokens and ends');
    if ((entry.dtype !== 'U16' && entry.dtype !== 'U32') || entry.shape.length !== 1)
      throw refuse('tokens is not a list of U16 or U32');
    if (endsEntry.dtype !== 'I64' || endsEntry.shape.length !== 1) throw refuse('ends is not a list of I64');
    const vocabSize = Number(metadata.vocab_size);
    if (!Number.isInteger(vocabSize) || vocabSize < 1) throw refuse('its header has no vocab_size');
    const tokens = entry.shape[0]!;
    const ends = Float64Array.from((await header.read('ends')) as BigInt64Array, Number);
    for (const [i, end] of ends.entries()) {
      if (end < (ends[i - 1] ?? 0) || end > tokens)
        throw refuse(`document ${i} ends at token ${end}, outside ${ends[i - 1] ?? 0} to ${tokens}`);
    }
    if ((ends.at(-1) ?? 0) !== tokens) throw refuse(`its documents end at token ${ends.at(-1) ?? 0} of ${tokens}`);
    return {
      tokens,
      ends,
      vocabSize,
      metadata,
      fingerprint: metadata.fingerprint,
      ...(await rangeReader(path, entry.dtype, entry.offset, vocabSize)),
    };
  } finally {
    await header.close();
  }
}

async function rangeReader(path: string, dtype: 'U16' | 'U32', offset: number, vocabSize: number) {
  let file: FileHandle | undefined;
  try {
    file = await open(path, 'r');
  } catch (error) {
    throw readError(path, error);
  }
  const width = dtype === 'U16' ? 2 : 4;
  return {
    async read(from: number, count: number): Promise<Ids> {
      const ids = dtype === 'U16' ? new Uint16Array(count) : new Uint32Array(count);
      let got: number;
      try {
        got = await readAll(file, ids, offset + from * width);
      } catch (error) {
        throw readError(path, error);
      }
      if (got < ids.byteLength) {
        throw new FormatError(`openTokenFile: ${path} became shorter while it was in use`, {
          code: 'ERR_TOKEN_FILE',
          op: 'read',
          argument: path,
        });
      }
      checkRange(ids, vocabSize, path, from);
      return ids;
    },
    close: () => file.close(),
  };
}

/** @throws DataError `ERR_TOKEN_RANGE` naming the id and its place */
export function checkRange(ids: Ids, vocabSize: number, file: string, from: number): void {
  for (let i = 0; i < ids.length; i++) {
    const id = ids[i]!;
    if (id >= 0 && id < vocabSize) continue;
    throw new DataError(
      `data: token id ${id} at position ${from + i} of ${file} is outside the vocabulary of ${vocabSize} tokens`,
      {
        code: 'ERR_TOKEN_RANGE',
        op: 'data',
        argument: `${file}:${from + i}`,
        expected: `0 to ${vocabSize - 1}`,
        actual: String(id),
      },
    );
  }
}

export interface RawTokens {
  /** Bytes of an id in a file without a header (`.bin`): little-endian, as nanoGPT writes them. */
  readonly dtype?: 'u16' | 'u32';
  /** Id that ends a document in such a file. Default: a file is one document. */
  readonly end?: number;
}

/**
 * Ids made beforehand: token files (`.safetensors`, see {@link writeTokenFile}), or raw little-endian ids with `dtype`.
 * Ids are used as they are: no begin or end token is added.
 */
export function tokenFile(paths: string | readonly string[], raw: RawTokens = {}): TokenSource {
  const expand = () => expandPaths(paths, raw.dtype === undefined ? ['.safetensors'] : ['.bin']);
  return {
    kind: 'tokens',
    options: JSON.stringify(['tokens', raw.dtype, raw.end]),
    files: async () => describeFiles(await expand()),
    async fingerprints() {
      if (raw.dtype !== undefined) return [];
      const all = await Promise.all(
        (await expand()).map(async (path) => {
          const file = await openTokenFile(path);
          await file.close();
          return file.fingerprint;
        }),
      );
      return all.filter((fingerprint) => fingerprint !== undefined);
    },
    async *documents() {
      for (const path of await expand())
        yield* raw.dtype === undefined ? documentsIn(path) : rawDocuments(path, raw.dtype, raw.end);
    },
  };
}

async function* documentsIn(path: string): AsyncGenerator<TokenDocument> {
  const file = await openTokenFile(path);
  try {
    let at = 0;
    for (const end of file.ends) {
      do {
        const to = Math.min(end, at + chunkIds);
        const ids = await file.read(at, to - at);
        yield to < end ? { ids, file: path, continues: true } : { ids, file: path };
        at = to;
      } while (at < end);
    }
  } finally {
    await file.close();
  }
}

async function* rawDocuments(path: string, dtype: 'u16' | 'u32', end: number | undefined): AsyncGenerator<TokenDocument> {
  const width = dtype === 'u16' ? 2 : 4;
  const bytes = (await describeFiles([path]))[0]!.bytes;
  if (bytes % width !== 0) {
    throw new FormatError(`tokenFile: ${path} has ${bytes} bytes, which is no whole number of ${dtype} ids`, {
      code: 'ERR_TOKEN_FILE',
      op: 'tokenFile',
      argument: path,
      expected: `a multiple of ${width} bytes`,
      actual: String(bytes),
    });
  }
  const { read, close } = await rangeReader(path, dtype === 'u16' ? 'U16' : 'U32', 0, Number.POSITIVE_INFINITY);
  try {
    let open = false;
    for (let at = 0; at < bytes / width; at += chunkIds) {
      let ids = await read(at, Math.min(chunkIds, bytes / width - at));
      for (let stop = end === undefined ? -1 : ids.indexOf(end); stop >= 0; stop = ids.indexOf(end!)) {
        yield { ids: ids.subarray(0, stop + 1), file: path };
        ids = ids.subarray(stop + 1);
        open = false;
      }
      if (ids.length === 0) continue;
      yield { ids, file: path, continues: true };
      open = true;
    }
    if (open) yield { ids: new Int32Array(0), file: path };
  } finally {
    await close();
  }
}
