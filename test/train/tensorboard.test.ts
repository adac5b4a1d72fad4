import { mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { FileError } from '../../src/tensor/errors.ts';
import type { TrainEvent } from '../../src/train/events.ts';
import { crc32c, TensorBoardWriter } from '../../src/train/tensorboard.ts';

let folder: string;
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'limbeck-board-'));
});
afterEach(() => rm(folder, { recursive: true, force: true }));

// An independent reader: the sum bit by bit, the records, and a generic protobuf walk.

function slowCrc(data: Uint8Array): number {
  let crc = 0xffffffffn;
  for (const byte of data) {
    crc ^= BigInt(byte);
    for (let bit = 0; bit < 8; bit++) crc = crc & 1n ? (crc >> 1n) ^ 0x82f63b78n : crc >> 1n;
  }
  const sum = crc ^ 0xffffffffn;
  return Number((((sum >> 15n) | (sum << 17n)) + 0xa282ead8n) & 0xffffffffn);
}

function records(file: Buffer): Buffer[] {
  const out: Buffer[] = [];
  for (let at = 0; at < file.length; ) {
    const length = Number(file.readBigUInt64LE(at));
    expect(file.readUInt32LE(at + 8)).toBe(slowCrc(file.subarray(at, at + 8)));
    const data = file.subarray(at + 12, at + 12 + length);
    expect(file.readUInt32LE(at + 12 + length)).toBe(slowCrc(data));
    out.push(data);
    at += length + 16;
  }
  return out;
}

type Fields = Map<number, (number | Buffer)[]>;

function decode(data: Buffer): Fields {
  const fields: Fields = new Map();
  let at = 0;
  const varint = () => {
    let value = 0;
    for (let shift = 1; ; shift *= 128) {
      const byte = data[at++]!;
      value += (byte & 127) * shift;
      if (byte < 128) return value;
    }
  };
  while (at < data.length) {
    const tag = varint();
    const value: number | Buffer = (() => {
      switch (tag & 7) {
        case 0:
          return varint();
        case 1:
          at += 8;
          return data.readDoubleLE(at - 8);
        case 2: {
          const length = varint();
          at += length;
          return data.subarray(at - length, at);
        }
        case 5:
          at += 4;
          return data.readFloatLE(at - 4);
        default:
          throw new Error(`wire type ${tag & 7}`);
      }
    })();
    fields.set(tag >> 3, [...(fields.get(tag >> 3) ?? []), value]);
  }
  return fields;
}

const inner = (fields: Fields, number: number) => decode(fields.get(number)![0] as Buffer);
const string = (fields: Fields, number: number) => String(fields.get(number)![0]);

async function written(): Promise<Fields[]> {
  const [name] = await readdir(folder);
  return records(await readFile(join(folder, name!))).map(decode);
}

function scalars(event: Fields): Record<string, number> {
  const values = inner(event, 5).get(1) as Buffer[];
  return Object.fromEntries(values.map(decode).map((value) => [string(value, 1), value.get(2)![0] as number]));
}

const step: TrainEvent = {
  type: 'step',
  step: 300,
  tokens: 614400,
  loss: 4.25,
  kl: 0.5,
  learningRate: 0.0009765625,
  gradientNorm: 1.5,
  tokensPerSecond: 2048,
  seconds: 1,
  memory: { live: 1024, peak: 2048, rss: 4096 },
  etaSeconds: 9,
};

test('CRC-32C of the RFC 3720 examples', () => {
  expect(crc32c(new Uint8Array(32))).toBe(0x8a9136aa);
  expect(crc32c(new Uint8Array(32).fill(255))).toBe(0x62a8ab43);
  expect(crc32c(Uint8Array.from({ length: 32 }, (_, i) => i))).toBe(0x46dd794e);
  expect(crc32c(Buffer.from('123456789'))).toBe(0xe3069283);
});

test('a file begins with its version; steps and evaluations become scalars', async () => {
  const board = await TensorBoardWriter.open(folder);
  await board.write(step, 1_700_000_000_500);
  await board.write({ type: 'evaluate', step: 300, loss: 4, perplexity: 54.5, tokens: 10, agreement: 0.25, seconds: 1 });
  await board.write({ type: 'checkpoint', step: 300, path: 'x', seconds: 1, bytes: 1 });
  await board.close();
  const [version, first, second, ...rest] = await written();
  expect(rest).toEqual([]);
  expect(string(version!, 3)).toBe('brain.Event:2');
  expect(first!.get(1)).toEqual([1_700_000_000.5]);
  expect(first!.get(2)).toEqual([300]);
  expect(scalars(first!)).toEqual({
    'train/loss': 4.25,
    'train/kl': 0.5,
    'train/learning_rate': 0.0009765625,
    'train/gradient_norm': 1.5,
    'speed/tokens_per_second': 2048,
    'memory/tensors_live': 1024,
    'memory/tensors_peak': 2048,
    'memory/process': 4096,
  });
  expect(scalars(second!)).toEqual({ 'validation/loss': 4, 'validation/perplexity': 54.5, 'validation/agreement': 0.25 });
});

test('samples go to the text dashboard', async () => {
  const board = await TensorBoardWriter.open(folder);
  await board.write({ type: 'sample', step: 7, prompt: 'Ünï', text: ' code ✓' });
  await board.close();
  const value = inner(inner((await written())[1]!, 5), 1);
  expect(string(value, 1)).toBe('sample/Ünï');
  expect(string(inner(inner(value, 9), 1), 1)).toBe('text');
  const tensor = inner(value, 8);
  expect(tensor.get(1)).toEqual([7]);
  expect(string(tensor, 8)).toBe('**Ünï** code ✓');
  expect(inner(inner(tensor, 2), 2).get(1)).toEqual([1]);
});

test('a resumed run hides what an earlier file holds of later steps', async () => {
  const board = await TensorBoardWriter.open(folder, 500);
  await board.close();
  const start = (await written())[1]!;
  expect(start.get(2)).toEqual([501]);
  expect(inner(start, 7).get(1)).toEqual([1]);
});

test('a folder that cannot be made is a FileError', async () => {
  await writeFile(join(folder, 'file'), '');
  await expect(TensorBoardWriter.open(join(folder, 'file'))).rejects.toBeInstanceOf(FileError);
});
