import { mkdtemp, open, readdir, readFile, rm, truncate, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import {
  openSafetensors,
  type SafetensorsArray,
  type SafetensorsDType,
  type SafetensorsInput,
  writeSafetensors,
} from '../../src/io/safetensors.ts';
import { DTypeError, FileError, FormatError, LimbeckError, ShapeError } from '../../src/tensor/errors.ts';
import { rejection } from '../rejection.ts';

const golden = fileURLToPath(new URL('../golden/dtypes.safetensors', import.meta.url));
let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'limbeck-safetensors-'));
});
afterAll(() => rm(folder, { recursive: true }));

/** A file with any header, followed by `bytes` zeros. */
const craft = async (header: string | object, bytes = 0, length?: number): Promise<string> => {
  const text = Buffer.from(typeof header === 'string' ? header : JSON.stringify(header));
  const prefix = Buffer.alloc(8);
  prefix.writeBigUInt64LE(BigInt(length ?? text.length));
  const path = join(folder, 'crafted.safetensors');
  await writeFile(path, Buffer.concat([prefix, text, Buffer.alloc(bytes)]));
  return path;
};

describe('the reference implementation', () => {
  it('writes what we read', async () => {
    await using file = await openSafetensors(golden);
    expect(file.metadata).toEqual({ format: 'pt', note: 'quotes " and ü' });
    const floats = [0, -0, 1, -2.5, 1 / 3, 65504, 6e-8, Infinity, -Infinity, NaN];
    expect(await file.read('f64')).toEqual(Float64Array.from(floats));
    expect(await file.read('f32')).toEqual(Float32Array.from(floats));
    expect(file.tensors.get('f32')).toMatchObject({ dtype: 'F32', shape: [2, 5], bytes: 40 });
    // 1/3 rounds to 0x3555, 6e-8 to the smallest subnormal.
    const halves = [0, -0, 1, -2.5, 1365 / 4096, 65504, 2 ** -24, Infinity, -Infinity, NaN];
    expect(await file.read('f16')).toEqual(Float32Array.from(halves));
    const bf16 = (await file.read('bf16')) as Uint16Array;
    expect([...bf16.subarray(0, 9)]).toEqual([0, 0x8000, 0x3f80, 0xc020, 0x3eab, 0x4780, 0x3381, 0x7f80, 0xff80]);
    expect(await file.read('i64')).toEqual(BigInt64Array.of(-(2n ** 63n), 2n ** 53n + 1n, 7n));
    expect(await file.read('i32')).toEqual(Int32Array.of(-(2 ** 31), 2 ** 31 - 1));
    expect(await file.read('i16')).toEqual(Int16Array.of(-32768, 32767));
    expect(await file.read('i8')).toEqual(Int8Array.of(-128, 127));
    expect(await file.read('u8')).toEqual(Uint8Array.of(0, 1, 2));
    expect(await file.read('bool')).toEqual(Uint8Array.of(1, 0, 1));
    expect(await file.read('scalar')).toEqual(Float32Array.of(3.5));
    expect(file.tensors.get('scalar')!.shape).toEqual([]);
    expect(await file.read('empty')).toEqual(new Float32Array(0));
    expect(await file.read('na"me \\ é')).toEqual(Float32Array.of(1, 1));
  });

  it('writes the bytes that we write', async () => {
    await using file = await openSafetensors(golden);
    const raw = await readFile(golden);
    const path = join(folder, 'again.safetensors');
    const inputs: SafetensorsInput[] = [...file.tensors].reverse().map(([name, { dtype, shape, offset, bytes }]) => ({
      name,
      dtype,
      shape,
      data: async () => {
        if (dtype !== 'F16') return file.read(name);
        return new Uint16Array(raw.buffer.slice(raw.byteOffset + offset, raw.byteOffset + offset + bytes));
      },
    }));
    await writeSafetensors(path, inputs, file.metadata);
    expect(Buffer.compare(await readFile(path), raw)).toBe(0);
  });
});

describe('reading in runs', () => {
  it('gives the elements that read gives, in order', async () => {
    const path = join(folder, 'runs.safetensors');
    const wide = Float64Array.from({ length: 300_001 }, (_, i) => Math.sin(i));
    const half = Uint16Array.from({ length: 600_003 }, (_, i) => (i * 7919) & 0x7bff);
    await writeSafetensors(path, [
      { name: 'wide', dtype: 'F64', shape: [wide.length], data: wide },
      { name: 'half', dtype: 'F16', shape: [half.length], data: half },
      { name: 'none', dtype: 'F32', shape: [0], data: new Float32Array(0) },
    ]);
    await using file = await openSafetensors(path);
    for (const name of file.tensors.keys()) {
      const all = name === 'half' ? half : await file.read(name);
      let at = 0;
      await file.each(name, (run, from) => {
        expect(from).toBe(at);
        expect(run.byteLength).toBeLessThanOrEqual(1 << 20);
        expect(Buffer.compare(Buffer.from(run.buffer, run.byteOffset, run.byteLength), bytesOf(all, from, run.length))).toBe(0);
        at += run.length;
      });
      expect(at).toBe(all.length);
      if (all.length > 10) {
        const part: unknown[] = [];
        await file.each(name, (run, from) => part.push(from, ...run), { from: 3, to: 7 });
        expect(part).toEqual([0, ...all.subarray(3, 7)]);
      }
    }
    expect((await rejection(file.each('missing', () => {}))).code).toBe('ERR_SAFETENSORS_NAME');
  });
});

const bytesOf = (data: SafetensorsArray, from: number, count: number): Buffer => {
  const size = data.byteLength / data.length;
  return Buffer.from(data.buffer, data.byteOffset + from * size, count * size);
};

describe('writing', () => {
  it('keeps any names, shapes and values', async () => {
    const arrays: [SafetensorsDType, (bytes: Uint8Array) => SafetensorsInput['data'], number][] = [
      ['F32', (b) => new Float32Array(b.buffer), 4],
      ['BF16', (b) => new Uint16Array(b.buffer), 2],
      ['I32', (b) => new Int32Array(b.buffer), 4],
      ['I64', (b) => new BigInt64Array(b.buffer), 8],
      ['F64', (b) => new Float64Array(b.buffer), 8],
      ['U8', (b) => b, 1],
    ];
    const name = fc.oneof(fc.string({ unit: 'grapheme' }), fc.constantFrom('__proto__', 'constructor', '1', '', '"', '\\'));
    const input = fc
      .record({
        name,
        kind: fc.nat(arrays.length - 1),
        shape: fc.array(fc.nat(4), { maxLength: 4 }),
        given: fc.nat(2),
        cut: fc.nat(),
      })
      .chain(({ name, kind, shape, given, cut }) => {
        const [dtype, view, size] = arrays[kind]!;
        const bytes = size * shape.reduce((a, b) => a * b, 1);
        return fc.uint8Array({ minLength: bytes, maxLength: bytes }).map((raw) => {
          const data = view(Uint8Array.from(raw)) as Uint8Array;
          const at = cut % (data.length + 1);
          const pieces = async function* () {
            yield* [data.subarray(0, at), data.subarray(at)];
          };
          return { name, dtype, shape, data: [data, () => data, pieces][given]!, raw };
        });
      });
    const unique = fc.uniqueArray(input, { selector: (t) => t.name, maxLength: 8 });
    const metadata = fc.dictionary(fc.string(), fc.string(), { maxKeys: 3, noNullPrototype: true });
    await fc.assert(
      fc.asyncProperty(unique, metadata, async (inputs, metadata) => {
        const path = join(folder, 'property.safetensors');
        await writeSafetensors(path, inputs, metadata);
        await using file = await openSafetensors(path);
        expect(file.metadata).toEqual(metadata);
        expect(new Set(file.tensors.keys())).toEqual(new Set(inputs.map((t) => t.name)));
        for (const { name, dtype, shape, raw } of inputs) {
          const entry = file.tensors.get(name)!;
          expect(entry).toMatchObject({ dtype, shape, bytes: raw.length });
          const size = arrays.find(([known]) => known === dtype)![2];
          expect(entry.offset % size).toBe(0);
          const data = await file.read(name);
          expect(new Uint8Array(data.buffer)).toEqual(Uint8Array.from(raw));
        }
      }),
      { numRuns: 100 },
    );
  });

  it('makes lazy tensors one at a time', async () => {
    let alive = 0;
    const inputs = Array.from({ length: 5 }, (_, i) => ({
      name: `t${i}`,
      dtype: 'F32' as const,
      shape: [3],
      data: async () => {
        alive++;
        expect(alive).toBe(i + 1);
        return Float32Array.of(i, i, i);
      },
    }));
    await writeSafetensors(join(folder, 'lazy.safetensors'), inputs);
  });

  it('refuses data that is not as described, and leaves the old file', async () => {
    const path = join(folder, 'kept.safetensors');
    const data = Float32Array.of(1, 2);
    await writeSafetensors(path, [{ name: 'a', dtype: 'F32', shape: [2], data }]);
    const before = await readFile(path);
    const attempt = (...inputs: SafetensorsInput[]) => rejection(writeSafetensors(path, inputs));
    const good = { name: 'a', dtype: 'F32', shape: [2], data } as const;
    expect(await attempt({ ...good, shape: [3] })).toBeInstanceOf(ShapeError);
    expect(await attempt({ ...good, shape: [-1] })).toBeInstanceOf(ShapeError);
    expect(await attempt({ ...good, shape: [2 ** 30, 2 ** 30] })).toBeInstanceOf(ShapeError);
    expect(await attempt({ ...good, dtype: 'I32' })).toBeInstanceOf(DTypeError);
    expect(await attempt({ ...good, dtype: 'F8' as 'F32' })).toBeInstanceOf(DTypeError);
    expect(await attempt(good, good)).toMatchObject({ code: 'ERR_SAFETENSORS_NAME', argument: 'a' });
    expect(await attempt({ ...good, name: '__metadata__' })).toBeInstanceOf(FormatError);
    expect(await readFile(path)).toEqual(before);
    expect((await readdir(folder)).filter((name) => name.endsWith('.partial'))).toEqual([]);
  });
});

describe('a header that lies', () => {
  const entry = (begin: number, end: number, more: object = {}) => ({
    dtype: 'F32',
    shape: [(end - begin) / 4],
    data_offsets: [begin, end],
    ...more,
  });
  const cases: [string, () => Promise<string>, string, string?][] = [
    [
      'a file that is too short',
      async () => {
        const path = await craft('');
        await truncate(path, 5);
        return path;
      },
      'TRUNCATED',
    ],
    ['a header past the end', () => craft('{}', 0, 1000), 'TRUNCATED'],
    ['a huge header', () => craft('{}', 0, 2 ** 40), 'HEADER'],
    ['no JSON', () => craft('{"a":'), 'HEADER'],
    [
      'no UTF-8',
      async () => {
        const path = await craft('{"a":"x"}');
        const file = await open(path, 'r+');
        await file.write(Buffer.of(0xff), 0, 1, 14);
        await file.close();
        return path;
      },
      'HEADER',
    ],
    ['an array', () => craft('[]'), 'HEADER'],
    ['metadata that is no text', () => craft({ __metadata__: { a: 1 } }), 'HEADER'],
    ['an overlap', () => craft({ a: entry(0, 8), b: entry(4, 12) }, 12), 'OFFSET', 'b'],
    ['a gap', () => craft({ a: entry(0, 4), b: entry(8, 12) }, 12), 'OFFSET', 'b'],
    ['bytes after the last tensor', () => craft({ a: entry(0, 4) }, 5), 'OFFSET'],
    ['a tensor past the end', () => craft({ a: entry(0, 8) }, 7), 'TRUNCATED', 'a'],
    ['a repeated name', () => craft('{"\\u0061":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}'), 'NAME', 'a'],
    ['a repeated field', () => craft('{"a":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), 'NAME', 'dtype'],
    ['an unknown dtype', () => craft({ a: entry(0, 4, { dtype: 'F7' }) }, 4), 'TENSOR', 'a'],
    ['a size that does not follow', () => craft({ a: entry(0, 4, { shape: [2] }) }, 4), 'TENSOR', 'a'],
    ['a fractional size', () => craft({ a: entry(0, 4, { shape: [2, 0.5] }) }, 4), 'TENSOR', 'a'],
    ['a size that overflows', () => craft({ a: entry(0, 4, { shape: [2 ** 53 - 1, 2 ** 53 - 1] }) }, 4), 'TENSOR', 'a'],
    ['a negative offset', () => craft({ a: entry(-4, 0, { shape: [1] }) }, 4), 'TENSOR', 'a'],
    ['offsets in reverse', () => craft({ a: entry(4, 0, { shape: [] }) }, 4), 'TENSOR', 'a'],
    ['an offset that overflows', () => craft({ a: entry(0, 2 ** 60, { shape: [2 ** 58] }) }, 4), 'TENSOR', 'a'],
    [
      'a shape nested without end',
      () => craft(`{"a":{"dtype":"U8","shape":${'['.repeat(1e5)}${']'.repeat(1e5)}}}`),
      'TENSOR',
      'a',
    ],
    ['null', () => craft({ a: null }), 'TENSOR', 'a'],
  ];
  it.each(cases)('%s', async (_, make, code, argument) => {
    const path = await make();
    const error = await rejection(openSafetensors(path));
    expect(error).toBeInstanceOf(FormatError);
    expect(error.code).toBe(`ERR_SAFETENSORS_${code}`);
    expect(error.argument).toBe(argument ?? (code === 'HEADER' && error.argument === '__metadata__' ? '__metadata__' : path));
    expect(error.message.length).toBeLessThan(600);
  });

  it('a missing file, a folder, an unknown name, a file cut short while open', async () => {
    expect(await rejection(openSafetensors(join(folder, 'none')))).toMatchObject({ code: 'ERR_READ' });
    expect(await rejection(openSafetensors(join(folder, 'none')))).toBeInstanceOf(FileError);
    expect(await rejection(openSafetensors(folder))).toBeInstanceOf(FormatError);
    const path = await craft({ a: entry(0, 64) }, 64);
    await using file = await openSafetensors(path);
    expect(await rejection(file.read('b'))).toMatchObject({ code: 'ERR_SAFETENSORS_NAME', argument: 'b' });
    await truncate(path, 60);
    expect(await rejection(file.read('a'))).toMatchObject({ code: 'ERR_SAFETENSORS_TRUNCATED', argument: 'a' });
  });

  it('any damage is a typed error or still a file', async () => {
    const whole = await readFile(golden);
    const path = join(folder, 'fuzz.safetensors');
    const header = Number(whole.readBigUInt64LE());
    const position = fc.oneof(
      fc.nat(whole.length - 1),
      fc.nat(7),
      fc.nat(header - 1).map((at) => 8 + at),
    );
    const edit = fc.record({
      at: position,
      remove: fc.oneof(fc.constant(1), fc.nat(20), fc.constant(1e9)),
      insert: fc.oneof(
        fc.uint8Array({ maxLength: 4 }),
        fc.constantFrom(...'{}[],:"\\0123456789-').map((c) => Buffer.from(c)),
      ),
    });
    let opened = 0;
    await fc.assert(
      fc.asyncProperty(fc.array(edit, { minLength: 1, maxLength: 3 }), async (edits) => {
        let bytes = whole;
        for (const { at, remove, insert } of edits) {
          bytes = Buffer.concat([bytes.subarray(0, at), insert, bytes.subarray(at + remove)]);
        }
        await writeFile(path, bytes);
        try {
          await using file = await openSafetensors(path);
          let total = 0;
          for (const [name, entry] of file.tensors) {
            total += entry.bytes;
            await file.read(name);
          }
          expect(total).toBeLessThanOrEqual(bytes.length);
          opened++;
        } catch (error) {
          expect(LimbeckError.is(error), String(error)).toBe(true);
        }
      }),
      { numRuns: 1500 },
    );
    expect(opened).toBeGreaterThan(0);
  });
});
