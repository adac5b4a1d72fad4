// Documents to ids: reading, encoding and storing overlap, and no more than a few megabytes of text are held.

import type { Tokenizer } from '../tokenizer/tokenizer.ts';
import type { Malformed, Source, TextDocument } from './source.ts';
import { checkRange, MemoryTokens, openTokenFile, type TokenFileWriter, type TokenStore, writeTokens } from './tokens.ts';

export interface CorpusReport {
  readonly documents: number;
  /** Text, in bytes; of documents that are ids already, the bytes of the ids. */
  readonly bytes: number;
  readonly tokens: number;
  readonly malformedCount: number;
  readonly malformed: readonly Malformed[];
}

export interface TokenizeOptions {
  readonly tokenizer: Tokenizer;
  readonly bos: number | undefined;
  readonly eos: number | undefined;
  readonly special: boolean;
  /** Bytes of ids that may stay in memory; more are written to the file that `spill` names. */
  readonly limit: number;
  readonly spill: () => Promise<string>;
  readonly onProgress?: ((progress: { documents: number; bytes: number; tokens: number }) => void) | undefined;
  readonly signal?: AbortSignal | undefined;
}

// Text that is encoded at once, and how many such groups may be under way.
const groupBytes = 1 << 22;
const groupsAhead = 2;
const keptRecords = 1000;
// Records that fit into the header of a cached file.
const cachedRecords = 8;

/** Ids in their order, and whether their document ends with them. */
interface Encoded {
  readonly ids: Int32Array | Uint16Array | Uint32Array;
  readonly begins: boolean;
  readonly ends: boolean;
  readonly bytes: number;
}

/** Tokenizes sources into memory, or into a file once they take more than `limit` bytes. */
export async function tokenize(
  sources: readonly Source[],
  options: TokenizeOptions,
): Promise<{ store: TokenStore; report: CorpusReport }> {
  const { tokenizer, bos, eos, onProgress } = options;
  let documents = 0;
  let bytes = 0;
  let tokens = 0;
  let malformedCount = 0;
  const malformed: Malformed[] = [];
  const encoded = encode(sources, options, (record) => {
    if (malformedCount++ < keptRecords) malformed.push(record);
  });
  const report = (records = keptRecords): CorpusReport => ({
    documents,
    bytes,
    tokens,
    malformedCount,
    malformed: malformed.slice(0, records),
  });

  /** Moves documents on until they are all done, or until `full`. */
  const drain = async (
    append: (ids: Encoded['ids']) => Promise<void> | void,
    endDocument: () => void,
    full = () => false,
  ): Promise<boolean> => {
    let sinceProgress = 0;
    while (!full()) {
      const { done, value } = await encoded.next();
      if (done) return true;
      const { ids, begins, ends, text } = value;
      const parts = [
        ...(begins && text && bos !== undefined ? [Int32Array.of(bos)] : []),
        ids,
        ...(ends && text && eos !== undefined ? [Int32Array.of(eos)] : []),
      ];
      for (const part of parts) {
        await append(part);
        tokens += part.length;
      }
      bytes += value.bytes;
      sinceProgress += value.bytes;
      if (ends) {
        endDocument();
        documents++;
      }
      if (sinceProgress >= groupBytes) {
        sinceProgress = 0;
        onProgress?.({ documents, bytes, tokens });
      }
    }
    return false;
  };

  const memory = new MemoryTokens(tokenizer.vocabSize);
  const complete =
    options.limit > 0 &&
    (await drain(
      (ids) => memory.append(ids),
      () => memory.endDocument(),
      () => memory.bytes > options.limit,
    ));
  if (complete) {
    onProgress?.({ documents, bytes, tokens });
    return { store: memory.done(), report: report() };
  }

  const path = await options.spill();
  // The report is part of the header, which is written last and has little room.
  const metadata = {
    get report() {
      const text = JSON.stringify(report(cachedRecords));
      return text.length <= 2000 ? text : JSON.stringify(report(0));
    },
  };
  await writeTokens(
    path,
    { vocabSize: tokenizer.vocabSize, fingerprint: tokenizer.fingerprint, metadata },
    async (writer: TokenFileWriter) => {
      for (const { ids, ends } of memory.pieces()) {
        await writer.append(ids);
        if (ends) writer.endDocument();
      }
      await drain(
        (ids) => writer.append(ids),
        () => writer.endDocument(),
      );
    },
  );
  onProgress?.({ documents, bytes, tokens });
  return { store: await openTokenFile(path), report: report() };
}

type Item = Encoded & { readonly text: boolean };

async function* encode(
  sources: readonly Source[],
  options: TokenizeOptions,
  onMalformed: (record: Malformed) => void,
): AsyncGenerator<Item> {
  const { tokenizer, special, signal } = options;
  const underway: Promise<Item[]>[] = [];
  let group: TextDocument[] = [];
  let groupSize = 0;
  let continued = false; // the last group ended within a document
  const launch = () => {
    const documents = group;
    const inside = continued;
    continued = documents.at(-1)!.continues ?? false;
    group = [];
    groupSize = 0;
    const work = (async () => {
      const ids = await tokenizer.encodeBatch(
        documents.map((document) => document.text),
        { special },
      );
      return documents.map(({ text, continues = false }, i): Item => {
        const begins = !(i === 0 ? inside : documents[i - 1]!.continues);
        return {
          ids: ids[i]!,
          begins,
          ends: !continues,
          bytes: typeof text === 'string' ? Buffer.byteLength(text) : text.length,
          text: true,
        };
      });
    })();
    // A failure is met where the group is awaited; until then it is not unhandled.
    work.catch(() => {});
    underway.push(work);
  };
  for (const source of sources) {
    if (source.kind === 'tokens') {
      let continued = false;
      let at = 0;
      for await (const { ids, file, continues = false } of source.documents({ onMalformed })) {
        signal?.throwIfAborted();
        checkRange(ids, tokenizer.vocabSize, file, at);
        at = continues ? at + ids.length : 0;
        yield { ids, begins: !continued, ends: !continues, bytes: ids.byteLength, text: false };
        continued = continues;
      }
      continue;
    }
    for await (const document of source.documents({ onMalformed })) {
      signal?.throwIfAborted();
      group.push(document);
      groupSize += document.text.length;
      if (groupSize < groupBytes) continue;
      launch();
      if (underway.length >= groupsAhead) yield* await underway.shift()!;
    }
    if (group.length > 0) launch();
    while (underway.length > 0) yield* await underway.shift()!;
  }
}
