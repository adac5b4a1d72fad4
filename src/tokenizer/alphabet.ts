// GPT-2's alphabet: a printable character stands for each byte, so that a vocabulary of byte strings fits into JSON.

import { DataError } from '../tensor/errors.ts';

const printable = (byte: number) => (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;

/** The character that stands for each byte. */
export const charOfByte: readonly string[] = (() => {
  let next = 256;
  return Array.from({ length: 256 }, (_, byte) => String.fromCharCode(printable(byte) ? byte : next++));
})();

const byteOfChar = new Map(charOfByte.map((char, byte) => [char, byte]));

/** The bytes in the order of their characters: the order that trained vocabularies begin with. */
export const alphabet: readonly number[] = Array.from({ length: 256 }, (_, byte) => byte).sort((a, b) =>
  charOfByte[a]! < charOfByte[b]! ? -1 : 1,
);

/** Bytes that a token of a byte-level vocabulary stands for; undefined when it has a character outside the alphabet. */
export function bytesOfToken(token: string): Uint8Array | undefined {
  const bytes = new Uint8Array(token.length);
  for (let i = 0; i < token.length; i++) {
    const byte = byteOfChar.get(token[i]!);
    if (byte === undefined) return undefined;
    bytes[i] = byte;
  }
  return bytes;
}

/** Checks ids against the size of a vocabulary. @throws DataError naming the first bad id and its position. */
export function checkIds(ids: ArrayLike<number>, size: number, op: string): void {
  for (let i = 0; i < ids.length; i++) {
    const id = ids[i]!;
    if (id >= 0 && id < size && Number.isInteger(id)) continue;
    throw new DataError(`${op}: token id ${id} at position ${i} is outside the vocabulary of ${size} tokens`, {
      code: 'ERR_TOKEN_RANGE',
      op,
      argument: `ids[${i}]`,
      expected: `0 to ${size - 1}`,
      actual: String(id),
    });
  }
}
