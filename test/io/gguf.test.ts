import { mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, it, test } from 'vitest';
import { decodeBlocks, encodeBlocks, type GgmlTypeName, ggmlTypes, readableTypes } from '../../src/io/ggml.ts';
import { openGguf, writeGguf } from '../../src/io/gguf.ts';
import { type GgufInput, type GgufValue, parseGguf } from '../../src/io/gguf-header.ts';
import { openSafetensors } from '../../src/io/safetensors.ts';
import { DataError, FileError, FormatError, ShapeError } from '../../src/tensor/errors.ts';
import { rejection } from '../rejection.ts';

const golden = fileURLToPath(new URL('../golden/gguf/types.gguf', import.meta.url));
let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'limbeck-gguf-'));
});
afterAll(() => rm(folder, { recursive: true }));

const rms = (a: Float32Array, b: Float32Array): number =>
  Math.sqrt(a.reduce((sum, x, i) => sum + (x - b[i]!) ** 2, 0) / a.length);

const writable = Object.entries(ggmlTypes).flatMap(([name, type]) => ('limit' in type ? [name as GgmlTypeName] : []));

describe('files of the gguf package and llama.cpp', () => {
  it('gives the weights that the gguf package reads, of every type', async () => {
    await using file = await openGguf(golden);
    await using expected = await openSafetensors(golden.replace('.gguf', '.safetensors'));
    expect(file.version).toBe(3);
    expect([...file.tensors.keys()]).toEqual([...readableTypes, 'one', 'deep'].sort((a, b) => place(file, a) - place(file, b)));
    for (const [name, { shape }] of expected.tensors) {
      expect(file.tensors.get(name)!.shape, name).toEqual(shape);
      expect(await file.read(name), name).toEqual(await expected.read(name));
    }
    expect(readableTypes).toEqual(expect.arrayContaining(['F32', 'F16', 'BF16', 'Q8_0', 'Q4_0', 'Q4_K', 'Q6_K']));
  });

  it('reads metadata of every kind', async () => {
    await using file = await openGguf(golden);
    const value = (key: string) => file.metadata.get(`test.${key}`)!.value;
    expect(file.metadata.get('general.architecture')).toEqual({ type: 'string', value: 'test' });
    expect(['u8', 'i8', 'u16', 'i16', 'u32', 'i32'].map(value)).toEqual([255, -128, 65535, -32768, 2 ** 32 - 1, -(2 ** 31)]);
    expect([value('f32'), value('f64')]).toEqual([Math.fround(1 / 3), 1 / 3]);
    expect([value('u64'), value('i64')]).toEqual([2n ** 64n - 1n, -(2n ** 63n)]);
    expect([value('bool'), value('string')]).toEqual([true, 'quotes " and ü 😀']);
    expect(value('strings')).toEqual(['', '▁a', '\n']);
    expect([value('i32s'), value('f32s')]).toEqual([Int32Array.of(1, -2, 3), Float32Array.of(0.5, -1.25)]);
    expect(file.metadata.get('test.bools')).toEqual({ type: 'array', of: 'bool', value: Uint8Array.of(1, 0) });
    expect(value('u16s')).toEqual(Uint16Array.of(1, 2, 65535));
  });

  it('reads version 2', async () => {
    const bytes = await readFile(golden);
    bytes.writeUInt32LE(2, 4);
    await writeFile(join(folder, 'two.gguf'), bytes);
    await using file = await openGguf(join(folder, 'two.gguf'));
    expect([file.version, await file.read('one')]).toEqual([2, Float32Array.of(2.5)]);
  });

  // The bytes of llama.cpp's own quantizer.
  test.each(writable.filter((name) => !name.endsWith('_K')))('packs %s to the same bytes', async (name) => {
    await using file = await openGguf(golden);
    const { offset, bytes } = file.tensors.get(name)!;
    const theirs = (await readFile(golden)).subarray(offset, offset + bytes);
    expect(Buffer.compare(await encodeBlocks(name, await file.read('F32')), theirs)).toBe(0);
  });

  // A search among many nearly equal scales: bytes may differ, the error must not be larger.
  test.each(writable.filter((name) => name.endsWith('_K')))('packs %s as well', async (name) => {
    await using file = await openGguf(golden);
    const weights = await file.read('F32');
    const back = new Float32Array(weights.length);
    await decodeBlocks(name, await encodeBlocks(name, weights), back);
    const theirs = await file.read(name);
    expect(rms(back, weights)).toBeLessThan(1.002 * rms(theirs, weights));
  });
});

const bytesOf = (values: Float32Array) => Buffer.from(values.buffer, values.byteOffset, values.byteLength);

const place = (file: { tensors: ReadonlyMap<string, { offset: number }> }, name: string) => file.tensors.get(name)!.offset;

const input = (name: string, type: GgmlTypeName, shape: number[], values: Float32Array): GgufInput => ({
  name,
  type,
  shape,
  data: () => [values],
});

describe('writing', () => {
  it('keeps any metadata, names, shapes and float32 values', async () => {
    const value: fc.Arbitrary<GgufValue> = fc.oneof(
      fc.record({ type: fc.constant('string' as const), value: fc.string({ unit: 'grapheme' }) }),
      fc.record({ type: fc.constant('bool' as const), value: fc.boolean() }),
      fc.record({ type: fc.constant('i16' as const), value: fc.integer({ min: -32768, max: 32767 }) }),
      fc.record({ type: fc.constant('u64' as const), value: fc.bigInt({ min: 0n, max: 2n ** 64n - 1n }) }),
      fc.record({ type: fc.constant('f32' as const), value: fc.float() }),
      fc.record({ type: fc.constant('array' as const), of: fc.constant('string' as const), value: fc.array(fc.string()) }),
      fc.record({ type: fc.constant('array' as const), of: fc.constant('f64' as const), value: fc.float64Array() }),
      fc.record({ type: fc.constant('array' as const), of: fc.constant('u8' as const), value: fc.uint8Array() }),
    );
    const name = fc.oneof(fc.string({ unit: 'grapheme' }), fc.constantFrom('__proto__', 'constructor', '1', ''));
    const metadata = fc.uniqueArray(fc.tuple(name, value), { selector: ([key]) => key, maxLength: 6 });
    const tensor = fc.tuple(name, fc.array(fc.nat(4), { maxLength: 4 })).chain(([name, shape]) => {
      const size = shape.reduce((a, b) => a * b, 1);
      return fc.float32Array({ minLength: size, maxLength: size }).map((values) => input(name, 'F32', shape, values));
    });
    const tensors = fc.uniqueArray(tensor, { selector: (t) => t.name, maxLength: 5 });
    await fc.assert(
      fc.asyncProperty(metadata, tensors, async (metadata, tensors) => {
        const path = join(folder, 'property.gguf');
        await writeGguf(path, metadata, tensors);
        await using file = await openGguf(path);
        expect([...file.metadata]).toEqual(metadata);
        expect([...file.tensors].map(([name, { shape }]) => [name, shape])).toEqual(
          tensors.map(({ name, shape }) => [name, shape]),
        );
        for (const { name, data } of tensors) {
          expect(place(file, name) % 32).toBe(0);
          expect(await file.read(name)).toEqual([...(data() as Float32Array[])][0]);
        }
      }),
      { numRuns: 150 },
    );
  });

  it('takes many runs, reads in runs, and tells how far it is', async () => {
    const path = join(folder, 'runs.gguf');
    const rows = 1200;
    const values = Float32Array.from({ length: rows * 256 }, (_, i) => Math.sin(i));
    const seen: number[] = [];
    const tensors = (['F32', 'Q8_0', 'Q6_K'] as const).map((type) => ({
      name: type,
      type,
      shape: [rows, 256],
      async *data() {
        for (let row = 0; row < rows; row += 500) yield values.subarray(row * 256, Math.min(rows, row + 500) * 256);
      },
    }));
    await writeGguf(path, [], tensors, { onProgress: ({ done, total }) => seen.push(done / total) });
    expect(seen).toEqual([...seen].sort((a, b) => a - b));
    expect(seen.at(-1)).toBe(1);
    await using file = await openGguf(path);
    for (const [name, limit] of [
      ['F32', 0],
      ['Q8_0', 1 / 220],
      ['Q6_K', 1 / 28],
    ] as const) {
      const all = await file.read(name);
      let at = 0;
      await file.each(name, (run, from) => {
        expect(from).toBe(at);
        expect(Buffer.compare(bytesOf(run), bytesOf(all.subarray(at, at + run.length)))).toBe(0);
        at += run.length;
      });
      expect(at).toBe(values.length);
      expect(all.every((v, i) => Math.abs(v - values[i]!) <= limit)).toBe(true);
    }
  });

  it('leaves the old file where it fails or is stopped', async () => {
    const path = join(folder, 'old.gguf');
    await writeGguf(path, [], [input('a', 'F32', [2], Float32Array.of(1, 2))]);
    const before = await readFile(path);
    const write = (tensors: GgufInput[], signal?: AbortSignal) => rejection(writeGguf(path, [], tensors, { signal }));
    const few = new Float32Array(32);
    expect(await write([input('a', 'F32', [33], few)])).toBeInstanceOf(ShapeError);
    expect(await write([input('a', 'F32', [31], few)])).toBeInstanceOf(ShapeError);
    expect(await write([input('a', 'Q8_0', [2, 31], new Float32Array(62))])).toBeInstanceOf(ShapeError);
    expect(await write([input('a', 'Q8_0', [2, 32], new Float32Array(33))])).toBeInstanceOf(ShapeError);
    expect(await write([input('a', 'F32', [-1], few)])).toBeInstanceOf(ShapeError);
    expect((await write([input('a', 'F32', [32], few), input('a', 'F32', [32], few)])).code).toBe('ERR_GGUF_NAME');
    await expect(writeGguf(path, [], [input('a', 'F32', [32], few)], { signal: AbortSignal.abort('enough') })).rejects.toBe(
      'enough',
    );
    expect(await readFile(path)).toEqual(before);
    expect((await readdir(folder)).filter((name) => name.startsWith('old'))).toEqual(['old.gguf']);
  });

  test.each(writable.filter((name) => name !== 'F32' && name !== 'BF16'))('%s refuses what it cannot hold', async (name) => {
    const values = new Float32Array(70_000 - (70_000 % 256)).fill(0.5);
    const at = values.length - 3;
    const [most, more] = name === 'F16' ? [65519, 65520] : [1e6, 1.1e6];
    for (const bad of [Number.NaN, Number.NEGATIVE_INFINITY, more, -more]) {
      values[at] = bad;
      const error = await rejection(encodeBlocks(name, values));
      expect(error).toBeInstanceOf(DataError);
      expect(error.actual).toBe(String(Math.fround(bad)));
    }
    values[at] = most;
    const back = new Float32Array(values.length);
    await decodeBlocks(name, await encodeBlocks(name, values), back);
    expect(back.every(Number.isFinite)).toBe(true);
    expect(Math.abs(back[at]! - most)).toBeLessThan(most / 10);
  });

  it('rounds to float16 and bfloat16 with ties to even', async () => {
    const bits = async (name: 'F16' | 'BF16', values: number[]) => [
      ...new Uint16Array((await encodeBlocks(name, Float32Array.from(values))).buffer),
    ];
    const step = 2 ** -10;
    expect(
      await bits('F16', [1, 1 + step / 2, 1 + 1.5 * step, 65504, 65519, -0, 2 ** -24, 2 ** -25, 1.5 * 2 ** -25, 2 ** -14, 1e-40]),
    ).toEqual([0x3c00, 0x3c00, 0x3c02, 0x7bff, 0x7bff, 0x8000, 1, 0, 1, 0x400, 0]);
    expect(await bits('BF16', [1, 1 + 2 ** -8, 1 + 3 * 2 ** -8, -3.4e38, Number.POSITIVE_INFINITY])).toEqual([
      0x3f80, 0x3f80, 0x3f82, 0xff80, 0x7f80,
    ]);
    expect((await bits('BF16', [Number.NaN]))[0]! & 0x7fff).toBeGreaterThan(0x7f80);
  });
});

/** A header from pieces: numbers are u32, bigints u64, texts strings with their length. */
const craft = (...parts: (number | bigint | string | Buffer)[]): Buffer =>
  Buffer.concat(
    parts.map((part) => {
      if (Buffer.isBuffer(part)) return part;
      if (typeof part === 'number') return Buffer.from(Uint32Array.of(part).buffer);
      if (typeof part === 'bigint') return Buffer.from(BigUint64Array.of(part).buffer);
      const text = Buffer.from(part);
      return Buffer.concat([Buffer.from(BigUint64Array.of(BigInt(text.length)).buffer), text]);
    }),
  );
const start = (tensors: bigint, values: bigint) => craft(0x46554747, 3, tensors, values);
const pad = (bytes: Buffer, extra = 0) =>
  Buffer.concat([bytes, Buffer.alloc((32 - (bytes.length % 32)) % 32), Buffer.alloc(extra)]);
/** One tensor after no metadata, then zeros. */
const one = (name: string, dims: bigint[], type: number, offset: bigint, data = 0) =>
  pad(craft(start(1n, 0n), name, dims.length, ...dims, type, offset), data);

describe('a file that lies is refused, with the place', () => {
  const many = 2n ** 40n;
  test.each<[string, Buffer, string, RegExp]>([
    ['nothing', Buffer.alloc(0), 'TRUNCATED', /ends at byte 0/],
    ['other magic', Buffer.from('GGML\x03\0\0\0'), 'HEADER', /not "GGUF"/],
    ['version 1', craft(0x46554747, 1, 0n, 0n), 'VERSION', /version 1/],
    ['big-endian', craft(0x46554747, 0x03000000, 0n, 0n), 'VERSION', /big-endian/],
    ['cut inside the counts', start(0n, 0n).subarray(0, 20), 'TRUNCATED', /inside the number of metadata values at byte 16/],
    ['a trillion tensors', pad(start(many, 0n)), 'COUNT', /the number of tensors at byte 8 is 1099511627776/],
    ['a trillion values', pad(start(0n, many)), 'COUNT', /the number of metadata values at byte 16/],
    ['2^64 - 1 values', pad(start(0n, 2n ** 64n - 1n)), 'COUNT', /number of metadata values/],
    ['a long key', pad(craft(start(0n, 1n), many), 64), 'COUNT', /the length of key 0/],
    ['a key that is not UTF-8', pad(craft(start(0n, 1n), 2n, Buffer.from([0xc3, 0x28]), 4, 1), 32), 'STRING', /not UTF-8/],
    ['an unknown kind', pad(craft(start(0n, 1n), 'key', 13, 1), 32), 'TYPE', /"key" has the unknown type 13/],
    ['arrays of arrays', pad(craft(start(0n, 1n), 'key', 9, 9, 1n), 32), 'TYPE', /array of arrays/],
    [
      'a long array of numbers',
      pad(craft(start(0n, 1n), 'key', 9, 10, many), 32),
      'COUNT',
      /number of elements of the value of "key"/,
    ],
    ['a long array of strings', pad(craft(start(0n, 1n), 'key', 9, 8, many), 32), 'COUNT', /number of elements/],
    ['a long string in an array', pad(craft(start(0n, 1n), 'key', 9, 8, 1n, many), 32), 'COUNT', /"key"\[0\]/],
    ['a bool of 2', pad(craft(start(0n, 1n), 'key', 7, 2), 32), 'VALUE', /no bool/],
    ['a key twice', pad(craft(start(0n, 2n), 'key', 4, 1, 'key', 4, 2)), 'NAME', /the key "key" twice/],
    ['an alignment of 3', pad(craft(start(0n, 1n), 'general.alignment', 4, 3)), 'VALUE', /power of two/],
    ['an alignment of 0', pad(craft(start(0n, 1n), 'general.alignment', 4, 0)), 'VALUE', /power of two/],
    ['an alignment of text', pad(craft(start(0n, 1n), 'general.alignment', 8, '32')), 'VALUE', /type string/],
    ['five dims', one('w', [1n, 1n, 1n, 1n, 1n], 0, 0n, 32), 'TENSOR', /5 dims/],
    ['a product beyond 2^53', one('w', [2n ** 32n, 2n ** 32n], 0, 0n, 32), 'TENSOR', /impossible shape/],
    ['a type unknown', one('w', [32n], 4, 0n, 64), 'TYPE', /unknown type 4/],
    ['rows that are no blocks', one('w', [33n, 2n], 8, 0n, 256), 'TENSOR', /rows of 33 values; Q8_0 packs blocks of 32/],
    ['an offset out of line', one('w', [8n], 0, 8n, 64), 'OFFSET', /no multiple of the alignment 32/],
    ['a tensor past the end', one('w', [9n], 0, 0n, 32), 'TRUNCATED', /tensor "w" ends at byte 100, the file at byte 96/],
    ['an offset past the end', one('w', [8n], 0, 2n ** 45n, 32), 'TRUNCATED', /tensor "w" ends/],
    [
      'tensors that overlap',
      pad(craft(start(2n, 0n), 'a', 1, 16n, 0, 0n, 'b', 1, 8n, 0, 32n), 64),
      'OFFSET',
      /"b" begins at byte \d+, inside "a"/,
    ],
    ['a tensor twice', pad(craft(start(2n, 0n), 'a', 1, 8n, 0, 0n, 'a', 1, 8n, 0, 32n), 64), 'NAME', /used twice/],
  ])('%s', async (_, bytes, code, text) => {
    const path = join(folder, 'crafted.gguf');
    await writeFile(path, bytes);
    const error = await rejection(openGguf(path));
    expect(error).toBeInstanceOf(FormatError);
    expect(error.code).toBe(`ERR_GGUF_${code}`);
    expect(error.message).toMatch(text);
    expect(error.message).toContain(path);
  });

  it('opens with types that it cannot unpack, and says which when they are read', async () => {
    const path = join(folder, 'iq.gguf');
    await writeFile(path, one('w', [256n], 16, 0n, 96));
    await using file = await openGguf(path);
    expect(file.tensors.get('w')).toMatchObject({ type: 'IQ2_XXS', bytes: 66 });
    const error = await rejection(file.read('w'));
    expect([error.code, error.actual]).toEqual(['ERR_GGUF_TYPE', 'IQ2_XXS']);
    expect((await rejection(file.read('x'))).code).toBe('ERR_GGUF_NAME');
  });

  it('a file that is missing, a folder, or became shorter', async () => {
    expect(await rejection(openGguf(join(folder, 'none.gguf')))).toBeInstanceOf(FileError);
    expect((await rejection(openGguf(folder))).code).toMatch(/ERR_READ|ERR_GGUF_HEADER/);
    const path = join(folder, 'shorter.gguf');
    await writeFile(path, await readFile(golden));
    await using file = await openGguf(path);
    await writeFile(path, (await readFile(golden)).subarray(0, 4000));
    expect((await rejection(file.read('Q6_K'))).code).toBe('ERR_GGUF_TRUNCATED');
  });

  it('asks for more bytes of a long header, at any place that it was cut', async () => {
    const bytes = await readFile(golden);
    const whole = parseGguf('x', bytes, bytes.length)!;
    const end = Math.min(...[...whole.tensors.values()].map(({ offset }) => offset));
    for (let cut = 0; cut < end - 32; cut += 7) expect(parseGguf('x', bytes.subarray(0, cut), bytes.length)).toBeUndefined();
    // Longer than the first window of the reader.
    const path = join(folder, 'long.gguf');
    const words = Array.from({ length: 60_000 }, (_, i) => `word number ${i}`);
    await writeGguf(
      path,
      [['words', { type: 'array', of: 'string', value: words }]],
      [input('a', 'F32', [1], Float32Array.of(7))],
    );
    await using file = await openGguf(path);
    expect((file.metadata.get('words')!.value as string[]).join()).toBe(words.join());
    expect(await file.read('a')).toEqual(Float32Array.of(7));
  });
});
