// Models as llama.cpp's GGUF files, to and from ours.

import { ggmlTypes } from '../io/ggml.ts';
import { type Gguf, openGguf, writeGguf } from '../io/gguf.ts';
import type { GgufInput, GgufMetadata, GgufValue } from '../io/gguf-header.ts';
import type { Parameters, SpecTree } from '../nn/parameters.ts';
import { cast } from '../ops/elementwise.ts';
import { checkModel } from '../tensor/argument.ts';
import { sync } from '../tensor/engine.ts';
import { ConfigError, FormatError } from '../tensor/errors.ts';
import { keep, scope } from '../tensor/scope.ts';
import { noGrad } from '../tensor/tape.ts';
import { readAs, type Tensor, viewOf } from '../tensor/tensor.ts';
import { ggufVocabulary, tokenizerOfGguf } from '../tokenizer/gguf.ts';
import type { Tokenizer } from '../tokenizer/tokenizer.ts';
import { fileTypes, type GgufType, ggufTypes, type Part, partsOf, typeOf } from './gguf-parts.ts';
import { fromMetadata, metadataOf, type RopeFactors, ropeFactors, ropeTensors } from './ggufconfig.ts';
import type { LanguageModel } from './model.ts';
import type { ModelConfig } from './registry.ts';
import { savedValues } from './weights.ts';

export { type GgufType, ggufTypes } from './gguf-parts.ts';

export interface ExportGgufOptions {
  /** Default f16. */
  readonly type?: GgufType;
  /** Jinja source of the chat template. Default: what tokenizer_config.json says. */
  readonly chatTemplate?: string | undefined;
  /** A name for people. */
  readonly name?: string | undefined;
  readonly signal?: AbortSignal | undefined;
  /** Bytes of tensors written, and of all. */
  readonly onProgress?: ((progress: { readonly done: number; readonly total: number }) => void) | undefined;
}

// Values of a matrix that are read at once.
const RUN = 1 << 20;

/**
 * Writes a model as a GGUF file for llama.cpp, Ollama and their like, its tokenizer included, the change of an adapter in use added to its
 * weights. It replaces `path` only when complete.
 * @returns what the user should know: tensors that are kept in another type, settings that llama.cpp does not follow
 * @throws ConfigError for a model or tokenizer that a GGUF file cannot tell of, DataError for weights that the type cannot hold.
 */
export async function exportGguf(
  path: string,
  model: LanguageModel,
  tokenizer?: Tokenizer,
  options: ExportGgufOptions = {},
): Promise<readonly string[]> {
  checkModel('exportGguf', model);
  const { type = 'f16', signal, onProgress } = options;
  const { parameters } = model;
  if (!ggufTypes.includes(type)) {
    throw new ConfigError(`exportGguf: type is ${String(type)}, expected one of ${ggufTypes.join(', ')}`, {
      code: 'ERR_CONFIG',
      op: 'exportGguf',
      argument: 'type',
      expected: ggufTypes.join(', '),
      actual: String(type),
    });
  }
  if (parameters.weights.length > 0) {
    throw new ConfigError('exportGguf: the weights of this model are rounded; export the folder that it was loaded from', {
      code: 'ERR_CONFIG',
      op: 'exportGguf',
      argument: 'model',
    });
  }
  const { config } = model;
  const about = metadataOf(config);
  const vocabulary = ggufVocabulary(tokenizer, config.vocabSize, options.chatTemplate);
  const metadata: (readonly [string, GgufValue])[] = [
    ['general.architecture', { type: 'string', value: about.architecture }],
    ['general.type', { type: 'string', value: 'model' }],
    ...(options.name === undefined ? [] : [['general.name', { type: 'string', value: options.name }] as const]),
    ['general.file_type', { type: 'u32', value: fileTypes[type] }],
    ['general.quantization_version', { type: 'u32', value: 2 }],
    ...about.metadata,
    ...vocabulary.metadata,
  ];
  const tensors: GgufInput[] = partsOf(config).map((part) => ({
    name: part.gguf,
    type: typeOf(part, type, config.layers),
    shape: part.shape,
    data: () => runsOf(parameters, part),
  }));
  for (const [kind, factors] of Object.entries(ropeFactors(config)) as [keyof RopeFactors, Float32Array][])
    tensors.push({ name: ropeTensors[kind], type: 'F32', shape: [factors.length], data: () => [factors] });
  await writeGguf(path, metadata, tensors, { signal, onProgress });
  return [...about.notes, ...vocabulary.notes, ...fallbacks(type, tensors)];
}

function fallbacks(type: GgufType, tensors: readonly GgufInput[]): string[] {
  const block = type === 'q8_0' ? 32 : type.endsWith('k') || type.endsWith('k_m') ? 256 : 1;
  const odd = tensors.filter(({ type: own, shape }) => own !== 'F32' && shape.at(-1)! % block !== 0);
  if (odd.length === 0) return [];
  const kept = [...new Set(odd.map((tensor) => tensor.type))].join(' and ');
  return [`${odd.length} of ${tensors.length} tensors are kept as ${kept}: their rows are no multiples of ${block}`];
}

/** The values of a tensor as the file has them, a run of rows at a time. */
async function* runsOf(parameters: Parameters<SpecTree>, { pieces, shape }: Part): AsyncGenerator<Float32Array> {
  const columns = columnsOf(shape);
  for (const { name, rows, heads, add, factor } of pieces) {
    const source = savedValues(parameters, name)!;
    const size = rows * columns;
    const run = heads > 0 ? size : Math.max(1, Math.floor(RUN / columns)) * columns;
    try {
      for (let at = 0; at < size; at += run) {
        const view = (): Tensor => {
          const part = viewOf(source, [Math.min(run, size - at)], at);
          return part.dtype === 'f32' ? part : cast(part, 'f32');
        };
        const piece = keep(scope(() => noGrad(view)));
        const data = await readAs(piece, 'f32').finally(() => piece.dispose());
        if (add !== 0 || factor !== 1) for (let i = 0; i < data.length; i++) data[i] = (data[i]! + add) * factor;
        yield heads > 0 ? reordered(data, heads, columns, true) : data;
      }
    } finally {
      source.dispose();
    }
  }
}

const columnsOf = (shape: readonly number[]): number => (shape.length === 1 ? 1 : shape.at(-1)!);

/** @internal Llama's rows in llama.cpp's order, where the two that rotary embedding turns together are neighbours; or back. */
export function reordered(data: Float32Array, heads: number, columns: number, toFile: boolean): Float32Array {
  const half = data.length / columns / heads / 2;
  const to = new Float32Array(data.length);
  for (let head = 0; head < heads; head++) {
    for (let i = 0; i < half; i++) {
      for (let side = 0; side < 2; side++) {
        const ours = (head * 2 + side) * half + i;
        const theirs = (head * half + i) * 2 + side;
        const [from, into] = toFile ? [ours, theirs] : [theirs, ours];
        to.set(data.subarray(from * columns, (from + 1) * columns), into * columns);
      }
    }
  }
  return to;
}

/** A model in a GGUF file. */
export interface GgufModel extends AsyncDisposable {
  readonly config: ModelConfig;
  readonly metadata: GgufMetadata;
  /** Reads all weights into parameters that were made for `config`. */
  fill(parameters: Pick<Parameters<SpecTree>, 'write' | 'refresh'>): Promise<void>;
  /** @throws FormatError for a vocabulary that our tokenizers have not. */
  tokenizer(): Tokenizer;
}

/** True for the path of a GGUF file. */
export const isGguf = (path: string): boolean => path.endsWith('.gguf');

/**
 * Opens a GGUF file as a model.
 * @throws FormatError for a file that is damaged, of another architecture, or whose tensors do not fit its metadata.
 */
export async function openGgufModel(path: string): Promise<GgufModel> {
  const file = await openGguf(path);
  try {
    const config = fromMetadata(file, path, await factorsOf(file));
    const parts = partsOf(config);
    checkTensors(path, file, parts);
    return {
      config,
      metadata: file.metadata,
      async fill(parameters) {
        // While the stream has nothing to do, the CPU's writes go straight into place.
        await sync();
        for (const part of parts) await fillPart(file, part, parameters);
        parameters.refresh();
      },
      tokenizer: () => tokenizerOfGguf(file.metadata, path),
      [Symbol.asyncDispose]: () => file.close(),
    };
  } catch (error) {
    await file.close();
    throw error;
  }
}

async function fillPart(
  file: Gguf,
  { gguf, shape, pieces }: Part,
  parameters: Pick<Parameters<SpecTree>, 'write'>,
): Promise<void> {
  const columns = columnsOf(shape);
  if (pieces.some(({ heads }) => heads > 0)) {
    const all = await file.read(gguf);
    let from = 0;
    for (const { name, rows, heads } of pieces) {
      const own = all.subarray(from, from + rows * columns);
      parameters.write(name, 0, heads > 0 ? reordered(own, heads, columns, false) : own);
      from += own.length;
    }
    return;
  }
  await file.each(gguf, (run, from) => {
    let start = 0;
    for (const { name, rows, add } of pieces) {
      const end = start + rows * columns;
      const [first, last] = [Math.max(start, from), Math.min(end, from + run.length)];
      if (first < last) {
        const own = run.subarray(first - from, last - from);
        if (add !== 0) for (let i = 0; i < own.length; i++) own[i] = own[i]! - add;
        parameters.write(name, first - start, own);
      }
      start = end;
    }
  });
  await sync(); // where writes wait in the stream, no more than a tensor's
}

async function factorsOf(file: Gguf): Promise<RopeFactors> {
  const found: { -readonly [K in keyof RopeFactors]: RopeFactors[K] } = {};
  for (const [kind, name] of Object.entries(ropeTensors) as [keyof RopeFactors, string][])
    if (file.tensors.has(name)) found[kind] = await file.read(name);
  return found;
}

function checkTensors(path: string, file: Gguf, parts: readonly Part[]): void {
  const refuse = (name: string, problem: string): never => {
    throw new FormatError(`${path}: tensor '${name}' ${problem}`, { code: 'ERR_CHECKPOINT', op: 'loadModel', argument: name });
  };
  const known = new Set<string>(Object.values(ropeTensors));
  for (const { gguf, shape } of parts) {
    known.add(gguf);
    const entry = file.tensors.get(gguf);
    if (entry === undefined) refuse(gguf, 'is missing, which the metadata asks for');
    else if (entry.shape.join() !== shape.join()) {
      refuse(gguf, `has shape [${entry.shape.join(' ')}], the metadata asks for [${shape.join(' ')}]`);
    } else if (!ggmlTypes[entry.type].readable) refuse(gguf, `is ${entry.type}, which cannot be read`);
  }
  for (const name of file.tensors.keys()) if (!known.has(name)) refuse(name, 'has no place in a model of this architecture');
}
