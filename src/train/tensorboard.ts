// TensorBoard event files without TensorFlow: protobuf messages in length-prefixed records with masked CRC-32C sums.

import { type FileHandle, mkdir, open } from 'node:fs/promises';
import { hostname } from 'node:os';
import { join } from 'node:path';
import { FileError } from '../tensor/errors.ts';
import type { TrainEvent } from './events.ts';

/** Writes one event file into `folder`; `tensorboard --logdir folder` shows it. */
export class TensorBoardWriter {
  readonly path: string;
  readonly #file: FileHandle;

  private constructor(path: string, file: FileHandle) {
    this.path = path;
    this.#file = file;
  }

  /** A resumed run gives the step it goes on from: what an earlier file holds of later steps is then hidden. @throws FileError */
  static async open(folder: string, resumedStep?: number): Promise<TensorBoardWriter> {
    const now = Date.now();
    const path = join(
      folder,
      `events.out.tfevents.${String(Math.floor(now / 1000)).padStart(10, '0')}.${hostname()}.${process.pid}`,
    );
    try {
      await mkdir(folder, { recursive: true });
      const writer = new TensorBoardWriter(path, await open(path, 'a'));
      await writer.#append(message(double(1, now / 1000), text(3, 'brain.Event:2')));
      if (resumedStep !== undefined) {
        const sessionStart = message(varint(1, 1));
        await writer.#append(message(double(1, now / 1000), varint(2, resumedStep + 1), bytes(7, sessionStart)));
      }
      return writer;
    } catch (error) {
      throw cannotWrite(path, error);
    }
  }

  /** Adds the numbers and texts of an event; events without any are skipped. */
  async write(event: TrainEvent, time = Date.now()): Promise<void> {
    const values = summaries(event);
    if (values.length === 0) return;
    const step = 'step' in event ? Number(event.step) : 0;
    await this.#append(
      message(double(1, time / 1000), varint(2, step), bytes(5, message(...values.map((value) => bytes(1, value))))),
    );
  }

  async close(): Promise<void> {
    await this.#file.close();
  }

  async #append(event: Buffer): Promise<void> {
    try {
      await this.#file.appendFile(record(event));
    } catch (error) {
      throw cannotWrite(this.path, error);
    }
  }
}

function summaries(event: TrainEvent): Buffer[] {
  const scalars = (values: Record<string, number | undefined>) =>
    Object.entries(values).flatMap(([tag, value]) => (value === undefined ? [] : [message(text(1, tag), float(2, value))]));
  switch (event.type) {
    case 'step':
      return scalars({
        'train/loss': event.loss,
        'train/kl': event.kl,
        'train/cross_entropy': event.ce,
        'train/learning_rate': event.learningRate,
        'train/gradient_norm': event.gradientNorm,
        'speed/tokens_per_second': event.tokensPerSecond,
        'memory/tensors_live': event.memory.live,
        'memory/tensors_peak': event.memory.peak,
        'memory/process': event.memory.rss,
      });
    case 'evaluate':
      return scalars({
        'validation/loss': event.loss,
        'validation/perplexity': event.perplexity,
        'validation/kl': event.kl,
        'validation/agreement': event.agreement,
      });
    case 'sample':
      return [textSummary(`sample/${event.prompt}`, `**${event.prompt}**${event.text}`)];
    case 'warning':
      return [textSummary(`warning/${event.code}`, event.message)];
    default:
      return [];
  }
}

/** Summary.Value for the text dashboard: a string tensor of shape [1] and the plugin's name. */
function textSummary(tag: string, value: string): Buffer {
  const shape = message(bytes(2, message(varint(1, 1))));
  const tensor = message(varint(1, 7), bytes(2, shape), text(8, value));
  const metadata = message(bytes(1, message(text(1, 'text'))));
  return message(text(1, tag), bytes(8, tensor), bytes(9, metadata));
}

// Protobuf: a field is a tag (number × 8 + wire type) and its value.

const message = (...fields: Buffer[]): Buffer => Buffer.concat(fields);

function variable(value: number): number[] {
  const out: number[] = [];
  let rest = value;
  while (rest >= 128) {
    out.push((rest % 128) + 128);
    rest = Math.floor(rest / 128);
  }
  out.push(rest);
  return out;
}

function varint(field: number, value: number): Buffer {
  return Buffer.from([field * 8, ...variable(value)]);
}

function bytes(field: number, value: Buffer): Buffer {
  return Buffer.concat([Buffer.from([field * 8 + 2, ...variable(value.length)]), value]);
}

function text(field: number, value: string): Buffer {
  return bytes(field, Buffer.from(value, 'utf8'));
}

function double(field: number, value: number): Buffer {
  const out = Buffer.alloc(9);
  out[0] = field * 8 + 1;
  out.writeDoubleLE(value, 1);
  return out;
}

function float(field: number, value: number): Buffer {
  const out = Buffer.alloc(5);
  out[0] = field * 8 + 5;
  out.writeFloatLE(value, 1);
  return out;
}

/** A record: length, sum of the length, data, sum of the data. */
function record(data: Buffer): Buffer {
  const out = Buffer.alloc(data.length + 16);
  out.writeBigUInt64LE(BigInt(data.length), 0);
  out.writeUInt32LE(maskedCrc(out.subarray(0, 8)), 8);
  data.copy(out, 12);
  out.writeUInt32LE(maskedCrc(data), data.length + 12);
  return out;
}

const table = Uint32Array.from({ length: 256 }, (_, byte) => {
  let crc = byte;
  for (let bit = 0; bit < 8; bit++) crc = crc & 1 ? (crc >>> 1) ^ 0x82f63b78 : crc >>> 1;
  return crc;
});

/** CRC-32C (Castagnoli) of `data`. */
export function crc32c(data: Uint8Array): number {
  let crc = 0xffffffff;
  for (const byte of data) crc = (crc >>> 8) ^ table[(crc ^ byte) & 255]!;
  return (crc ^ 0xffffffff) >>> 0;
}

/** The sum of data that itself may hold sums is rotated and shifted, as TFRecord files want it. */
function maskedCrc(data: Uint8Array): number {
  const crc = crc32c(data);
  return (((crc >>> 15) | (crc << 17)) + 0xa282ead8) >>> 0;
}

function cannotWrite(path: string, error: unknown): unknown {
  if (error instanceof FileError) return error;
  const why = error instanceof Error ? error.message : String(error);
  return new FileError(`tensorboard: cannot write ${path}: ${why}; set log.tensorboard to false to go without`, {
    code: 'ERR_WRITE',
    op: 'tensorboard',
    argument: path,
    cause: error,
  });
}
