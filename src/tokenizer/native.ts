// The native tokenizer: BPE over bytes, or over characters with byte fallback.

import { textAddon } from '../tensor/text.ts';
import { bytesOfToken, checkIds } from './alphabet.ts';
import { type NativePlan, type NormalForm, saveTokenizer, type TokenizerFile } from './file.ts';
import { joinIds } from './ids.ts';
import { sentinels } from './sentinels.ts';
import type { TokenDecoder, Tokenizer } from './tokenizer.ts';

// Bytes that one job of a batch takes: large enough to make the job cheap, small enough to keep several threads busy.
const jobBytes = 1 << 20;
const jobsAtOnce = 4;

export function nativeTokenizer(file: TokenizerFile, plan: NativePlan): Tokenizer {
  const { characters } = plan;
  const pool = laidOut(file.added.map(({ content, id }) => [content, id]));
  const whole = laidOut(plan.ignoreMerges ? wholeWords(file) : []);
  const encoder = new (textAddon().BpeEncoder)(
    plan.byteIds,
    plan.merges,
    plan.rules,
    pool.bytes,
    pool.ends,
    pool.ids,
    whole.bytes,
    whole.ends,
    whole.ids,
    ...(characters === undefined ? [] : ([characters.codes, characters.ids, characters.joins, characters.prepend] as const)),
  );
  const vocabSize = file.tokens.length;
  const table = tokenBytes(file, characters !== undefined);
  const strip = characters?.strip ?? 0;
  const specials = new Set(file.added.filter((token) => token.special).map((token) => token.id));
  const normalize = plan.normalizer === undefined ? undefined : normalizer(plan.normalizer, file);

  // A text whose normal form is not itself: added tokens are found in the raw text, and nowhere in the normal form.
  const encodeText = (text: string | Uint8Array, added: boolean): Int32Array => {
    const parts = normalize?.(text, added);
    if (parts === undefined) return encoder.encode(text, added);
    return joinIds(parts.map((part) => (typeof part === 'number' ? Int32Array.of(part) : encoder.encode(part, false))));
  };

  return {
    vocabSize,
    fingerprint: file.fingerprint,
    digest: file.digest,
    bos: file.bos,
    eos: file.eos,
    pad: file.pad,
    unk: file.unk,
    begins: file.begins,
    engine: 'native',
    file,
    encode(text, options = {}) {
      return sentinels(file, options)(encodeText(text, options.special ?? true));
    },
    async encodeBatch(texts, options = {}) {
      const wrap = sentinels(file, options);
      const added = options.special ?? true;
      const results = new Array<Int32Array>(texts.length);
      const jobs = inJobs(texts);
      const worker = async () => {
        for (let job = jobs.next(); !job.done; job = jobs.next()) {
          const [from, to] = job.value;
          const plain = texts.slice(from, to);
          const normal = plain.map((text) => normalize?.(text, added));
          const bytes = plain.map((text, i) =>
            normal[i] !== undefined ? Buffer.alloc(0) : typeof text === 'string' ? Buffer.from(text) : text,
          );
          const ends = new Float64Array(bytes.length);
          let end = 0;
          for (const [i, b] of bytes.entries()) ends[i] = end += b.length;
          const [ids, idEnds] = await encoder.encodeBatch(bytes.length === 1 ? bytes[0]! : Buffer.concat(bytes), ends, added);
          for (let i = 0; i < bytes.length; i++) {
            const own = ids.subarray(i === 0 ? 0 : idEnds[i - 1], idEnds[i]);
            results[from + i] = wrap(normal[i] === undefined ? own.slice() : encodeText(texts[from + i]!, added));
          }
        }
      };
      await Promise.all(Array.from({ length: jobsAtOnce }, worker));
      return results;
    },
    decode(ids, options = {}) {
      checkIds(ids, vocabSize, 'decode');
      return stripper(strip)(utf8().decode(table.join(ids, options.skipSpecial ? specials : undefined)));
    },
    decoder(options = {}): TokenDecoder {
      const decoder = utf8();
      const stripped = stripper(strip);
      return {
        push(id) {
          checkIds([id], vocabSize, 'decoder.push');
          return stripped(decoder.decode(table.join([id], options.skipSpecial ? specials : undefined), { stream: true }));
        },
        end: () => stripped(decoder.decode()),
      };
    },
    id: (token) => file.ids.get(token),
    token: (id) => file.tokens[id],
    save: (path) => saveTokenizer(file, path),
  };
}

const utf8 = () => new TextDecoder('utf-8', { ignoreBOM: true });

/** Texts laid end to end in UTF-8, where each ends, and their ids. */
function laidOut(entries: readonly (readonly [text: string | Uint8Array, id: number])[]) {
  const parts = entries.map(([text]) => (typeof text === 'string' ? Buffer.from(text) : text));
  const ends = new Int32Array(parts.length);
  let end = 0;
  for (const [i, part] of parts.entries()) ends[i] = end += part.length;
  return { bytes: Buffer.concat(parts), ends, ids: Int32Array.from(entries, ([, id]) => id) };
}

function wholeWords(file: TokenizerFile): [Uint8Array, number][] {
  const added = new Set(file.added.map((token) => token.id));
  return file.tokens.flatMap((token, id) => {
    const bytes = token === undefined || added.has(id) ? undefined : bytesOfToken(token);
    return bytes === undefined ? [] : [[bytes, id]];
  });
}

/** Takes up to `count` spaces from the beginning of what passes through. */
function stripper(count: number): (text: string) => string {
  let left = count;
  return (text) => {
    let from = 0;
    while (left > 0 && from < text.length) {
      if (text[from] !== ' ') left = 0;
      else {
        from++;
        left--;
      }
    }
    return text.slice(from);
  };
}

/** The bytes of tokens, made when first wanted: a vocabulary has many that never are. */
function tokenBytes(file: TokenizerFile, overCharacters: boolean) {
  const added = new Set(file.added.map((token) => token.id));
  const made: Uint8Array[] = [];
  const bytesOf = (id: number): Uint8Array => {
    const token = file.tokens[id] ?? '';
    if (overCharacters) {
      const byte = /^<0x([0-9A-Fa-f]{2})>$/.exec(token)?.[1];
      return byte === undefined ? Buffer.from(token.replaceAll('\u2581', ' ')) : Uint8Array.of(Number.parseInt(byte, 16));
    }
    return (added.has(id) ? undefined : bytesOfToken(token)) ?? Buffer.from(token);
  };
  return {
    join(ids: ArrayLike<number>, skip: ReadonlySet<number> | undefined): Uint8Array {
      const parts: Uint8Array[] = [];
      for (let i = 0; i < ids.length; i++) {
        const id = ids[i]!;
        if (skip?.has(id)) continue;
        made[id] ??= bytesOf(id);
        parts.push(made[id]);
      }
      return parts.length === 1 ? parts[0]! : Buffer.concat(parts);
    },
  };
}

/** Cuts a text that is not in normal form into added tokens and normalized parts; undefined for a text that is. */
function normalizer(form: NormalForm, file: TokenizerFile) {
  const ids = new Map(file.added.map((token) => [token.content, token.id]));
  const escaped = [...ids.keys()].sort((a, b) => b.length - a.length).map((text) => text.replace(/[\\^$.*+?()[\]{}|/]/g, '\\$&'));
  const pattern = escaped.length === 0 ? undefined : new RegExp(`(${escaped.join('|')})`);
  return (text: string | Uint8Array, added: boolean): (string | number)[] | undefined => {
    const string = typeof text === 'string' ? text : utf8().decode(text);
    if (string.normalize(form) === string) return undefined;
    const parts = added && pattern !== undefined ? string.split(pattern) : [string];
    return parts.map((part, i) => (i % 2 === 1 ? ids.get(part)! : part.normalize(form)));
  };
}

/** Runs of texts that together fill a job. */
function* inJobs(texts: readonly (string | Uint8Array)[]): Generator<[from: number, to: number], undefined> {
  let from = 0;
  let bytes = 0;
  for (const [i, text] of texts.entries()) {
    bytes += text.length;
    if (bytes < jobBytes && i + 1 < texts.length) continue;
    yield [from, i + 1];
    from = i + 1;
    bytes = 0;
  }
  return undefined;
}
