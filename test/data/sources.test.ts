import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { afterAll, expect, test } from 'vitest';
import { jsonl } from '../../src/data/jsonl.ts';
import { expandPaths, globToRegex } from '../../src/data/paths.ts';
import { firstInvalidByte, type Malformed, type TextSource, textFiles, texts } from '../../src/data/source.ts';

const folder = mkdtempSync(join(tmpdir(), 'limbeck-test-'));
afterAll(() => rmSync(folder, { recursive: true }));
const write = (name: string, content: string | Uint8Array) => {
  const path = join(folder, name);
  mkdirSync(join(path, '..'), { recursive: true });
  writeFileSync(path, content);
  return path;
};

async function read(source: TextSource, onMalformed?: (record: Malformed) => void): Promise<string[]> {
  const documents: string[] = [];
  let open = false;
  for await (const { text, continues } of source.documents(onMalformed ? { onMalformed } : {})) {
    const part = typeof text === 'string' ? text : Buffer.from(text).toString('utf8');
    if (open) documents[documents.length - 1] += part;
    else documents.push(part);
    open = continues ?? false;
  }
  expect(open).toBe(false);
  return documents;
}

test('a file is a document, or several with a separator', async () => {
  const a = write('t/a.txt', 'first');
  const b = write('t/b.txt', '\ufeffone---two------three---');
  write('t/empty.txt', '');
  expect(await read(textFiles([a, b]))).toEqual(['first', 'one---two------three---']);
  expect(await read(textFiles(join(folder, 't'), { separator: '---' }))).toEqual(['first', 'one', 'two', 'three']);
  expect(await read(texts(['x', '', 'y']))).toEqual(['x', 'y']);
  const source = textFiles(b);
  expect(await read(source)).toEqual(await read(source));
  expect(await source.files()).toEqual([{ file: b, bytes: 26, changed: expect.any(Number) }]);
  expect(() => textFiles(folder, { separator: '' })).toThrow(
    expect.objectContaining({ code: 'ERR_CONFIG', argument: 'separator' }),
  );
});

test('long documents come in parts that make the whole', async () => {
  const line = 'All work and no play makes 12 dull strings. ';
  const long = line.repeat(300_000); // 13 MB
  const path = write('long.txt', `${long}<|end|>short<|end|>${'é'.repeat(6_000_000)}`);
  const documents = await read(textFiles(path, { separator: '<|end|>' }));
  expect(documents.map((text) => text.length)).toEqual([long.length, 5, 6_000_000]);
  expect(documents[0]).toBe(long);
  expect(documents[2]).toBe('é'.repeat(6_000_000));
  let largest = 0;
  for await (const { text } of textFiles(path).documents()) largest = Math.max(largest, text.length);
  expect(largest).toBeLessThan(10_000_000);
});

test('text that is not UTF-8 is refused with file and byte, or replaced', async () => {
  const path = write('latin1.txt', Buffer.from('caf\xe9 au lait', 'latin1'));
  await expect(read(textFiles(path))).rejects.toMatchObject({
    ...{ code: 'ERR_UTF8', argument: path, actual: '0xe9 at byte 3' },
    message: expect.stringContaining("or, in a program, set onInvalid: 'replace' of textFiles()"),
  });
  expect(await read(textFiles(path, { onInvalid: 'replace' }))).toEqual(['caf\ufffd au lait']);
  const late = write('late.txt', Buffer.concat([Buffer.from('abc é '.repeat(1_500_000)), Buffer.from([0xc3])]));
  await expect(read(textFiles(late))).rejects.toMatchObject({ actual: `0xc3 at byte ${1_500_000 * 7}` });
  const utf16 = write('utf16.txt', Buffer.from('\ufeffhello', 'utf16le'));
  await expect(read(textFiles(utf16))).rejects.toThrow(/UTF-16/);
  const noise = write('noise.bin', Buffer.alloc(20_000_000, 0x80));
  await expect(read(textFiles(noise))).rejects.toMatchObject({ actual: '0x80 at byte 0' });
  expect((await read(textFiles(noise, { onInvalid: 'replace' })))[0]).toHaveLength(20_000_000);
});

test('the first invalid byte is found', () => {
  const decoder = new TextDecoder('utf-8', { fatal: true });
  const slow = (bytes: Buffer) => {
    // The longest prefix that can be decoded.
    for (let n = bytes.length; n >= 0; n--) {
      try {
        decoder.decode(bytes.subarray(0, n));
        return n;
      } catch {}
    }
    return 0;
  };
  const piece = fc.oneof(
    fc.constantFrom('a', 'é', '中', '😀').map((c) => Buffer.from(c)),
    fc.uint8Array({ maxLength: 2 }).map((b) => Buffer.from(b)),
  );
  fc.assert(
    fc.property(fc.array(piece, { maxLength: 120 }), (pieces) => {
      const bytes = Buffer.concat(pieces);
      expect(firstInvalidByte(bytes)).toBe(slow(bytes));
    }),
    { numRuns: 300 },
  );
});

test('JSON Lines: bad lines are told with file and line, and left out', async () => {
  const path = write(
    'a.jsonl',
    Buffer.concat([
      Buffer.from('\ufeff{"text":"one","n":1}\n\n{"text":"two"\n{"body":"x"}\n{"text":5}\n[1]\nnull\r\n{"text":""}\r\n'),
      Buffer.from([0x7b, 0xff, 0x7d, 0x0a]),
      Buffer.from('{"text":"last é"}'),
    ]),
  );
  const bad: Malformed[] = [];
  expect(await read(jsonl(path), (record) => bad.push(record))).toEqual(['one', 'last é']);
  expect(bad.map(({ line }) => line)).toEqual([3, 4, 5, 6, 7, 9]);
  expect(bad.every(({ file }) => file === path)).toBe(true);
  expect(bad[1]!.reason).toBe('no field "text"');
  expect(bad[2]!.reason).toBe('field "text" is not a text');
  expect(bad[5]!.reason).toContain('not UTF-8 at byte 1');
  await expect(read(jsonl(path, { strict: true }))).rejects.toMatchObject({ code: 'ERR_MALFORMED', argument: `${path}:3` });
  expect(await read(jsonl(path, { field: 'body' }))).toEqual(['x']);
  const proto = write('p.jsonl', '{"text":"a"}\n{"toString":"b"}');
  expect(await read(jsonl(proto, { field: 'toString' }))).toEqual(['b']);
});

test('JSON Lines: lines longer than a chunk', async () => {
  const long = 'x é '.repeat(3_000_000);
  const path = write(
    'long.jsonl',
    [JSON.stringify({ text: long }), JSON.stringify({ text: 'b' }), JSON.stringify({ text: long })].join('\n'),
  );
  const documents = await read(jsonl(path));
  expect(documents.map((text) => text.length)).toEqual([long.length, 1, long.length]);
  expect(documents[2]).toBe(long);
});

test('paths, folders and globs give files in one order', async () => {
  for (const name of ['g/b.txt', 'g/a.txt', 'g/sub/c.txt', 'g/sub/deep/d.txt', 'g/e.md', 'g/f.json', 'g/we[ird].txt'])
    write(name, 'x');
  const at = (...names: string[]) => names.map((name) => join(folder, 'g', name));
  const found = (pattern: string | string[]) => expandPaths(pattern, ['.txt', '.md']);
  expect(await found(join(folder, 'g'))).toEqual(at('a.txt', 'b.txt', 'e.md', 'sub/c.txt', 'sub/deep/d.txt', 'we[ird].txt'));
  expect(await found(join(folder, 'g/*.txt'))).toEqual(at('a.txt', 'b.txt', 'we[ird].txt'));
  expect(await found(join(folder, 'g/**/*.txt'))).toEqual(at('a.txt', 'b.txt', 'sub/c.txt', 'sub/deep/d.txt', 'we[ird].txt'));
  expect(await found(join(folder, 'g/{a,b}.{txt,md}'))).toEqual(at('a.txt', 'b.txt'));
  expect(await found(join(folder, 'g/sub/?.txt'))).toEqual(at('sub/c.txt'));
  expect(await found(at('b.txt', 'a.txt', 'b.txt'))).toEqual(at('b.txt', 'a.txt'));
  expect(await found(join(folder, 'g/we[ird].txt'))).toEqual(at('we[ird].txt'));
  await expect(found(join(folder, 'g/none.txt'))).rejects.toMatchObject({ code: 'ERR_READ' });
  await expect(found(join(folder, 'g/*.none'))).rejects.toMatchObject({ code: 'ERR_NO_FILES' });
  expect(globToRegex('a.b/[!x]*').test('a.b/yz')).toBe(true);
  expect(globToRegex('a.b/[!x]*').test('aqb/yz')).toBe(false);
});
