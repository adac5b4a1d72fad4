// Mutated files against the parsers: whatever the bytes, an answer or a typed error, in little time and memory.
//   npm run fuzz -- gguf --inputs 1000000 --seed 7

import { writeFileSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { setImmediate as nextTurn } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import { type Conversation, conversationOf, conversations } from '../../src/data/conversations.ts';
import { parseLine } from '../../src/data/jsonl.ts';
import { type DataRecord, entriesOf } from '../../src/data/records.ts';
import { parseGguf } from '../../src/io/gguf-header.ts';
import { parseSafetensors } from '../../src/io/safetensors.ts';
import { openWeights } from '../../src/io/sharded.ts';
import { loadAdapter } from '../../src/models/adapter.ts';
import { fromMetadata } from '../../src/models/ggufconfig.ts';
import { type LanguageModel, loadConfig } from '../../src/models/model.ts';
import { configFrom, modelSpec } from '../../src/models/registry.ts';
import { countParameters } from '../../src/nn/parameters.ts';
import { LimbeckError } from '../../src/tensor/errors.ts';
import { randomBlock } from '../../src/tensor/random.ts';
import { tokenizerOfGguf } from '../../src/tokenizer/gguf.ts';
import { tokenizerFromJson } from '../../src/tokenizer/tokenizer.ts';
import { loadRun, parseRun } from '../../src/train/config.ts';
import { adapterBase, safetensorsBytes, seeds, writeAdapter, writeShards } from './seeds.ts';

/** Rows of a data set in a file: those that can be used are conversations, the others are told. */
async function rows(path: string): Promise<boolean> {
  let used = 0;
  let told = 0;
  for await (const one of conversations(path, {}, () => told++)) used += checked(one);
  return used > 0 && told === 0;
}

/** The same, from bytes. */
function rowsOf(bytes: Buffer): boolean {
  let used = 0;
  let told = 0;
  const tell = (): void => void told++;
  const take = (record: DataRecord): void => {
    const one = conversationOf(record, undefined, tell);
    if (one !== undefined) used += checked(one);
  };
  if (/^\s*\[/.test(bytes.toString('latin1'))) for (const record of entriesOf(bytes, 'rows.json', tell)) take(record);
  else {
    for (const line of bytes.toString('latin1').split('\n')) {
      const parsed = parseLine(Buffer.from(line, 'latin1'), 'error');
      if (parsed === undefined) continue;
      if ('reason' in parsed) tell();
      else take({ value: parsed.value, file: 'rows.jsonl', line: 1 });
    }
  }
  return used > 0 && told === 0;
}

function checked({ messages }: Conversation): number {
  if (messages.at(-1)?.role !== 'assistant') throw new Error('a conversation without an answer');
  return 1;
}

/** What JSON holds, or undefined: that it is none is for the readers of files to say. */
function jsonOf(bytes: Buffer): unknown {
  try {
    return JSON.parse(bytes.toString('utf8'));
  } catch {
    return undefined;
  }
}

// Files take most of the time: every so many inputs are read from one, the others from memory.
const asFile = 32;

/**
 * What reads the bytes of each kind of file; what it throws must be a LimbeckError.
 */
const targets: Readonly<Record<keyof typeof seeds, Reader>> = {
  gguf: {
    read(bytes, index) {
      const header = parseGguf('fuzz.gguf', bytes, bytes.length);
      if (header === undefined) throw new Error('a whole file was not enough');
      fromMetadata(header, 'fuzz.gguf', {});
      // A tokenizer takes longer than all else together.
      if (index % 8 === 0) tokenizerOfGguf(header.metadata, 'fuzz.gguf');
      return true;
    },
  },
  safetensors: {
    read(bytes) {
      // The bytes of tensors mean nothing to the parser.
      parseSafetensors('fuzz.safetensors', bytes, 8 + bytes.length + safetensorsBytes);
      return true;
    },
  },
  tokenizer: {
    read(bytes) {
      tokenizerFromJson(bytes.toString('utf8')).encode('the people <eos> 12 ü');
      return true;
    },
  },
  rows: { file: 'rows.json', every: asFile, read: (bytes, _index, path) => (path === undefined ? rowsOf(bytes) : rows(path)) },
  parquet: { file: 'rows.parquet', read: (_bytes, _index, path) => rows(path!) },
  run: {
    file: 'run.json',
    every: asFile,
    read(bytes, _index, path) {
      if (path !== undefined) return loadRun(path).then(() => true);
      parseRun(jsonOf(bytes));
      return true;
    },
  },
  config: {
    file: 'config.json',
    every: asFile,
    async read(bytes, _index, path) {
      const config = path === undefined ? configFrom(jsonOf(bytes), 'config.json') : await loadConfig(dirname(path));
      countParameters(modelSpec(config));
      return true;
    },
  },
  index: {
    file: 'model.safetensors.index.json',
    prepare: writeShards,
    async read(_bytes, _index, path) {
      await (await openWeights(dirname(path!))).close();
      return true;
    },
  },
  // The configuration beside good weights, and the other way round.
  adapter: adapter('adapter_config.json'),
  adapterweights: adapter('adapter_model.safetensors'),
};

function adapter(file: string): Reader {
  return {
    file,
    async prepare(folder) {
      const base = adapterBase();
      await writeAdapter(folder, base);
      return base;
    },
    async read(_bytes, _index, path, base) {
      (await loadAdapter(dirname(path!), base!)).dispose();
      return true;
    },
  };
}

interface Reader {
  /** The name of the file that the bytes are written to, for one of `every` inputs (default: of 1). Without it they never are. */
  readonly file?: string;
  readonly every?: number;
  /** What lies beside it, and what the reader needs. */
  prepare?(folder: string): Promise<LanguageModel | undefined>;
  /** Whether the bytes were taken for a good file. @param path of the file, if any; @param prepared what `prepare` gave */
  read(bytes: Buffer, index: number, path: string | undefined, prepared: LanguageModel | undefined): boolean | Promise<boolean>;
}

export type Target = keyof typeof seeds;

export interface FuzzReport {
  readonly inputs: number;
  /** Inputs that were taken for good files. */
  readonly accepted: number;
  readonly seconds: number;
  /** Milliseconds of the slowest input, and which it was. */
  readonly slowest: { readonly ms: number; readonly index: number };
  /** Growth of the process while it ran, in bytes. */
  readonly memory: number;
}

/**
 * Runs a parser on `inputs` mutated files; the same for the same seed.
 * @throws Error with the seed and index of an input that gave neither an answer nor a LimbeckError.
 */
export async function fuzz(target: Target, inputs: number, seed: number, first = 0): Promise<FuzzReport> {
  const { file, every = 1, prepare, read } = targets[target];
  const folder = await mkdtemp(join(tmpdir(), 'limbeck-fuzz-'));
  const path = join(folder, file ?? 'none');
  const [bases, prepared] = [await seeds[target](), await prepare?.(folder)];
  let index = first;
  const again = () => `npm run fuzz -- ${target} --seed ${seed} --first ${index} --inputs 1`;
  // A promise that is never settled lets Node end without a word.
  const unanswered = (): void => {
    process.stderr.write(`${target}, input ${index} of seed ${seed}: no answer (${again()})\n`);
    process.exitCode = 1;
  };
  process.once('beforeExit', unanswered);
  const started = performance.now();
  const before = process.memoryUsage().rss;
  let [accepted, peak, slowest] = [0, before, { ms: 0, index: -1 }];
  try {
    for (; index < first + inputs; index++) {
      const bytes = mutated(bases, seed, index);
      const written = file !== undefined && index % every === 0;
      if (written) writeFileSync(path, bytes);
      const from = performance.now();
      try {
        const taken = read(bytes, index, written ? path : undefined, prepared);
        if (typeof taken === 'boolean' ? taken : await taken) accepted++;
      } catch (error) {
        if (!LimbeckError.is(error)) {
          throw new Error(`${target}, input ${index} of seed ${seed}: ${String(error)} (${again()})`, { cause: error });
        }
      }
      const ms = performance.now() - from;
      if (ms > slowest.ms) slowest = { ms, index };
      if (index % 256 !== 0) continue;
      peak = Math.max(peak, process.memoryUsage().rss);
      await nextTurn(); // native objects are freed between turns of the event loop
    }
  } finally {
    process.off('beforeExit', unanswered);
    prepared?.dispose();
    await rm(folder, { recursive: true });
  }
  return { inputs, accepted, seconds: (performance.now() - started) / 1000, slowest, memory: peak - before };
}

// Values where counts, lengths and offsets go wrong.
const edges = [
  0,
  1,
  2,
  7,
  8,
  9,
  31,
  32,
  33,
  127,
  128,
  255,
  256,
  65535,
  2 ** 31 - 1,
  2 ** 31,
  2 ** 32 - 1,
  2 ** 32,
  2 ** 53,
  2 ** 63,
  2 ** 64 - 1,
];

function mutated(bases: readonly Buffer[], seed: number, index: number): Buffer {
  let [block, at]: [ArrayLike<number>, number] = [[], 0];
  let round = 0;
  const draw = (below: number): number => {
    if (at >= block.length) [block, at] = [randomBlock(seed, index, round++), 0];
    return block[at++]! % Math.max(1, below);
  };
  let bytes = Buffer.from(bases[draw(bases.length)]!);
  for (let edits = 1 + draw(3); edits > 0; edits--) {
    const place = draw(bytes.length);
    switch (draw(8)) {
      case 0:
        bytes[place] = bytes[place]! ^ (1 << draw(8));
        break;
      case 1:
        bytes[place] = draw(256);
        break;
      case 2: {
        const wide = Buffer.alloc(8);
        wide.writeBigUInt64LE(BigInt(edges[draw(edges.length)]!) & (2n ** 64n - 1n));
        wide.copy(bytes, place, 0, draw(2) === 0 ? 4 : 8);
        break;
      }
      case 3:
        bytes = bytes.subarray(0, place);
        break;
      case 4:
        bytes = Buffer.concat([bytes.subarray(0, place), bytes.subarray(place + 1 + draw(16))]);
        break;
      case 5: {
        const from = draw(bytes.length);
        bytes = Buffer.concat([bytes.subarray(0, place), bytes.subarray(from, from + 1 + draw(64)), bytes.subarray(place)]);
        break;
      }
      case 6: {
        const other = bases[draw(bases.length)]!;
        other.copy(bytes, place, draw(other.length), Math.min(other.length, place + draw(64)));
        break;
      }
      default: {
        // Digits and signs, for headers that are text.
        const text = Buffer.from(['-1', '1e400', '99999999999999999999', 'null', '{}', '[]', '"', '\\u0000', '\ufffd'][draw(9)]!);
        bytes = Buffer.concat([bytes.subarray(0, place), text, bytes.subarray(place + draw(4))]);
      }
    }
    if (bytes.length === 0) break;
  }
  return Buffer.from(bytes);
}

const help = `
npm run fuzz -- [TARGET...] [--inputs N] [--seed N] [--first N]

Mutated files against the parsers. A parser must give an answer or a LimbeckError, in little time and memory.

  TARGET      ${Object.keys(seeds).join(', ')}; default: all
  --inputs    files for each target; default 100000
  --seed      of the mutations; default 1. The same seed gives the same files
  --first     index of the first file, to see one again; default 0

A line of JSON for each target: inputs, how many of them were good files, seconds, the slowest input, growth of memory in bytes.
An input with another outcome ends the run, with the command that runs it alone. Files are written to the folder of TMPDIR: one in memory
(/dev/shm) makes targets that read files twice as fast.
`.trimStart();

async function main(): Promise<void> {
  const text = { type: 'string' } as const;
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: { inputs: text, seed: text, first: text, help: { type: 'boolean', short: 'h' } },
  });
  if (values.help) return void process.stdout.write(help);
  const number = (name: 'inputs' | 'seed' | 'first', usual: number): number => {
    const value = Number(values[name] ?? usual);
    if (Number.isSafeInteger(value) && value >= 0) return value;
    throw new Error(`--${name} is ${values[name]}, expected a whole number of 0 or more`);
  };
  const unknown = positionals.find((name) => !Object.hasOwn(seeds, name));
  if (unknown !== undefined) throw new Error(`there is no target ${unknown}; there are ${Object.keys(seeds).join(', ')}`);
  const [inputs, seed, first] = [number('inputs', 100_000), number('seed', 1), number('first', 0)];
  for (const target of (positionals.length > 0 ? positionals : Object.keys(seeds)) as Target[]) {
    process.stdout.write(`${JSON.stringify({ target, ...(await fuzz(target, inputs, seed, first)) })}\n`);
  }
}

if (process.argv[1]?.endsWith('parsers.ts')) {
  await main().catch((error: Error) => {
    process.stderr.write(`${error.stack}\n`);
    process.exitCode = 1;
  });
}
