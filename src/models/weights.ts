// Parameters from and to the files of a model folder.

import type { SafetensorsArray, SafetensorsInput } from '../io/safetensors.ts';
import { openWeights, type Weights, writeWeights } from '../io/sharded.ts';
import { mergedWeight } from '../nn/lora.ts';
import type { Parameters, SpecTree } from '../nn/parameters.ts';
import { cast } from '../ops/elementwise.ts';
import type { DType } from '../tensor/dtype.ts';
import { sync } from '../tensor/engine.ts';
import { ConfigError, FormatError } from '../tensor/errors.ts';
import { widenBf16, widenHalf } from '../tensor/half.ts';
import { keep } from '../tensor/scope.ts';
import { piecesOf, type Tensor, viewOf } from '../tensor/tensor.ts';
import { type FileLayout, fileLayout, type ModelConfig, type Place } from './registry.ts';

/** A parameter and where it lies in files. */
interface Part extends Place {
  readonly name: string;
  /** Its own. */
  readonly rows: number;
}

/** Each tensor of the files, with the parameters in it, in the order of the parameters. */
function partsOf(parameters: Parameters<SpecTree>, layout: FileLayout): Map<string, Part[]> {
  const parts = new Map<string, Part[]>();
  const all = [...parameters.list.map(({ name, tensor }) => ({ name, shape: tensor.shape })), ...parameters.weights];
  for (const { name, shape } of all) {
    const place = layout.place(name) ?? { tensor: name, shape, from: 0, transposed: false };
    const list = parts.get(place.tensor) ?? [];
    list.push({ name, rows: shape[0]!, ...place });
    parts.set(place.tensor, list);
  }
  return parts;
}

/** Fills the parameters of a model from the files of a folder. @throws FormatError for files that do not fit the config */
export async function readParameters(folder: string, config: ModelConfig, parameters: Parameters<SpecTree>): Promise<void> {
  const stored = await openWeights(folder);
  try {
    const layout = fileLayout(config);
    const wanted = partsOf(parameters, layout);
    const nameIn = storedNames(stored, layout);
    checkFit(folder, stored, layout, wanted, nameIn);
    // While the stream has nothing to do, the CPU's writes go straight into place.
    await sync();
    for (const [tensor, parts] of wanted) {
      for (const part of parts) await readPart(stored, nameIn(tensor), part, parameters);
    }
    if (config.tied) await checkTied(stored, nameIn(layout.embedding));
    parameters.refresh();
  } finally {
    await stored.close();
  }
}

const head = 'lm_head.weight';

/** The name of a tensor in the files: that of Transformers, or without the prefix where they were saved from a model without a head. */
function storedNames(stored: Weights, { prefix }: FileLayout): (tensor: string) => string {
  const bare = ![...stored.tensors.keys()].some((name) => name.startsWith(prefix));
  return (tensor) => (bare && tensor.startsWith(prefix) ? tensor.slice(prefix.length) : tensor);
}

function checkFit(
  folder: string,
  stored: Weights,
  layout: FileLayout,
  wanted: ReadonlyMap<string, readonly Part[]>,
  nameIn: (tensor: string) => string,
): void {
  for (const [tensor, [part]] of wanted) {
    const name = nameIn(tensor);
    const entry = stored.tensors.get(name);
    const expected = `[${part!.shape.join(' ')}]`;
    if (entry === undefined) {
      const why = tensor === head ? ' (tie_word_embeddings is false)' : '';
      throw refuse(`${folder}: there is no tensor '${name}', which config.json asks for${why}`, name, expected);
    }
    const actual = `[${entry.shape.join(' ')}]`;
    if (actual !== expected) {
      throw refuse(
        `${stored.pathOf(name)}: '${name}' has shape ${actual}, config.json asks for ${expected}`,
        name,
        expected,
        actual,
      );
    }
  }
  const known = new Set([...wanted.keys()].map(nameIn)).add(head);
  for (const name of stored.tensors.keys()) {
    if (known.has(name) || layout.ignored.test(`.${name}`)) continue;
    throw refuse(
      `${stored.pathOf(name)}: the model that config.json describes has no place for the tensor '${name}'`,
      name,
      'no such tensor',
    );
  }
}

async function readPart(stored: Weights, tensor: string, part: Part, parameters: Parameters<SpecTree>): Promise<void> {
  const { name, rows, shape, from, transposed } = part;
  const { dtype } = stored.tensors.get(tensor)!;
  const what = `${stored.pathOf(tensor)}: '${tensor}'`;
  if (!transposed) {
    const row = shape.slice(1).reduce((a, b) => a * b, 1);
    const range = { from: from * row, to: (from + rows) * row };
    const kept = parameters.values.dtype;
    await stored.each(tensor, (run, at) => parameters.write(name, at, floats(run, dtype, what, kept)), range);
    await sync(); // where writes wait in the stream, no more than a tensor's
    return;
  }
  // [K ... N ...] in the file to [N K]: element by element, since a run may end within a row.
  const [k = 0, width = 0] = shape;
  const turned = new Float32Array(rows * k);
  await stored.each(tensor, (run, at) => {
    const wide = floats(run, dtype, what, 'f32');
    for (let i = 0; i < wide.length; ) {
      const [row, col] = [Math.floor((at + i) / width), (at + i) % width];
      const end = Math.min(wide.length, i + width - col);
      const [first, last] = [Math.max(0, from - col), Math.min(end - i, from + rows - col)];
      for (let j = first, to = (col + first - from) * k + row; j < last; j++, to += k) turned[to] = wide[i + j]!;
      i = end;
    }
  });
  parameters.write(name, 0, turned);
}

/** A head in the files of a model whose head is the embedding must be the embedding, as some programs save it. */
async function checkTied(stored: Weights, embedding: string): Promise<void> {
  const entry = stored.tensors.get(head);
  if (entry === undefined) return;
  const differs = refuse(
    `${stored.pathOf(head)}: '${head}' is not '${embedding}', but config.json says tie_word_embeddings`,
    head,
    `the same as '${embedding}', or "tie_word_embeddings": false`,
  );
  const { dtype, shape } = stored.tensors.get(embedding)!;
  if (entry.dtype !== dtype || entry.shape.join() !== shape.join()) throw differs;
  const bytes = (run: SafetensorsArray): Uint8Array => new Uint8Array(run.buffer, run.byteOffset, run.byteLength);
  const count = shape.reduce((a, b) => a * b, 1);
  const step = 1 << 17; // one run of either
  for (let from = 0; from < count; from += step) {
    const part = { from, to: Math.min(from + step, count) };
    let own: Uint8Array | undefined;
    await stored.each(
      embedding,
      (run) => {
        own = bytes(run).slice();
      },
      part,
    );
    await stored.each(
      head,
      (run) => {
        if (Buffer.compare(bytes(run), own!) !== 0) throw differs;
      },
      part,
    );
  }
}

/**
 * @internal What a file holds: values, or bits of bf16 where they are kept as bf16. They are overwritten by the next call's.
 */
export function floats(data: SafetensorsArray, dtype: string, what: string, kept: 'f32'): Float32Array;
export function floats(data: SafetensorsArray, dtype: string, what: string, kept?: DType): Float32Array | Uint16Array;
export function floats(data: SafetensorsArray, dtype: string, what: string, kept: DType = 'bf16'): Float32Array | Uint16Array {
  if (data instanceof Float32Array) return data;
  if (data instanceof Uint16Array && dtype === 'BF16') return kept === 'bf16' ? data : widenBf16(data, room(data.length));
  if (data instanceof Uint16Array && dtype === 'F16') return widenHalf(data, room(data.length));
  if (data instanceof Float64Array) return Float32Array.from(data);
  throw refuse(`${what} is ${dtype}; weights are F32, F16, BF16 or F64`, 'dtype', 'F32, F16, BF16 or F64', dtype);
}

let wide = new Float32Array(0);

function room(length: number): Float32Array {
  if (wide.length < length) wide = new Float32Array(length);
  return wide.subarray(0, length);
}

/**
 * @internal The values that files of a model get for a parameter, in order, f32 or bf16: its originals, or the matrix with the change of the
 * adapter in use. Undefined for one that is kept in few bits. The caller frees it.
 */
export function savedValues({ list, linears, values }: Parameters<SpecTree>, name: string): Tensor | undefined {
  const found = list.find((each) => each.name === name);
  if (found === undefined) return undefined;
  const place = linears.find((each) => each.name === name);
  return (place && mergedWeight(place)) ?? keep(viewOf(values, [found.tensor.size], found.offset));
}

export type SavedType = 'f32' | 'bf16';

/**
 * Writes the parameters of a model into the files of a folder, matrices with the change of the adapter in use.
 * @throws ConfigError for a model of weights of few bits
 */
export async function writeParameters(
  folder: string,
  config: ModelConfig,
  parameters: Parameters<SpecTree>,
  dtype: SavedType,
  shardBytes: number,
): Promise<void> {
  const { list, weights } = parameters;
  if (weights.length > 0) {
    const { format } = weights[0]!.weight;
    throw new ConfigError(
      `saveModel: the weights of this model are rounded to ${format}; keep the folder that it was loaded from`,
      {
        code: 'ERR_CONFIG',
        op: 'saveModel',
        argument: 'model',
      },
    );
  }
  const sizes = new Map(list.map(({ name, tensor }) => [name, tensor.size]));
  const type = dtype === 'f32' ? Float32Array : Uint16Array;
  const inputs = [...partsOf(parameters, fileLayout(config))].map(([name, parts]): SafetensorsInput => {
    const [{ shape, transposed }] = parts as [Part, ...Part[]];
    const read = async function* ({ name }: Part): AsyncGenerator<Float32Array | Uint16Array> {
      const source = savedValues(parameters, name)!;
      const as = source.dtype === dtype ? undefined : (piece: Tensor) => cast(piece, dtype);
      try {
        yield* piecesOf(source, 0, source.size, as) as AsyncIterable<Float32Array | Uint16Array>;
      } finally {
        source.dispose();
      }
    };
    const whole = async (): Promise<Float32Array | Uint16Array> => {
      const all = new type(shape.reduce((a, b) => a * b, 1));
      for (const part of parts) {
        const own = new type(sizes.get(part.name)!);
        let at = 0;
        for await (const piece of read(part)) {
          own.set(piece, at);
          at += piece.length;
        }
        place(all, part, own);
      }
      return all;
    };
    const data = () => (parts.length === 1 && !transposed ? read(parts[0]!) : whole());
    return { name, dtype: dtype === 'f32' ? 'F32' : 'BF16', shape, data };
  });
  await writeWeights(folder, inputs, shardBytes);
}

/** Puts a parameter's values into the tensor of the file. */
function place(
  into: Float32Array | Uint16Array,
  { shape, from, rows, transposed }: Part,
  data: Float32Array | Uint16Array,
): void {
  if (!transposed) {
    into.set(data, from * (data.length / rows));
    return;
  }
  const [k = 0, width = 0] = shape;
  for (let row = 0; row < rows; row++) for (let i = 0; i < k; i++) into[i * width + from + row] = data[row * k + i]!;
}

function refuse(message: string, argument: string, expected: string, actual?: string): FormatError {
  const data = { code: 'ERR_CHECKPOINT', op: 'loadModel', argument, expected };
  return new FormatError(message, actual === undefined ? data : { ...data, actual });
}
