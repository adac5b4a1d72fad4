// Adapters as folders in the format of PEFT: adapter_config.json and adapter_model.safetensors.
import { createHash } from 'node:crypto';
import { mkdir } from 'node:fs/promises';
import { join } from 'node:path';
import { writeAtomic } from '../io/atomic.ts';
import {
  openSafetensors,
  type Safetensors,
  type SafetensorsArray,
  type SafetensorsInput,
  writeSafetensors,
} from '../io/safetensors.ts';
import {
  type Adapter,
  type AdapterOptions,
  adapterOptions,
  checkShape,
  type LiveAdapter,
  makeAdapter,
  moduleOf,
  rememberStart,
  rowLengths,
  setAdapter,
} from '../nn/lora.ts';
import { cast } from '../ops/elementwise.ts';
import { checkObject, checkText } from '../tensor/argument.ts';
import { ConfigError } from '../tensor/errors.ts';
import { widenBf16 } from '../tensor/half.ts';
import { keep, scope } from '../tensor/scope.ts';
import { readAs, type Tensor, viewOf } from '../tensor/tensor.ts';
import { adapterConfigFile, type PeftConfig, readPeftConfig, refuse, toPeft } from './adapter-config.ts';
import {
  type AdapterPart,
  adaptersByFile,
  type Base,
  columnsOf,
  type FileAdapter,
  type FileMatrix,
  joinedB,
  knownMatrices,
} from './adapter-layout.ts';
import { floats } from './weights.ts';

const files = { config: adapterConfigFile, weights: 'adapter_model.safetensors' } as const;

/** How the names of an adapter's tensors end. */
const ends = ['lora_A.weight', 'lora_B.weight', 'lora_magnitude_vector'] as const;

/** What PEFT puts before the names of a model. */
const prefix = 'base_model.model.';

/**
 * Keys of the file's own data: a digest of the base, the rank of what OLoRA takes away, and the ranks of parts whose adapters lie side by side
 * in that of a matrix.
 */
const keys = { base: 'limbeck.base', start: 'limbeck.start_rank', parts: 'limbeck.part_ranks' } as const;

export interface SaveAdapterOptions {
  /** Where the base lies, for who loads the adapter alone. Default: not told. */
  readonly base?: string | undefined;
  /** Texts to write beside it, by the name of the file. */
  readonly files?: Readonly<Record<string, string>> | undefined;
}

/**
 * Writes an adapter into a folder, as PEFT does. What OLoRA takes away from the base becomes part of the adapter, whose rank doubles:
 * so every program can use it beside the weights that it was made for.
 * @param model the one that it was trained beside; its digest is noted
 */
export async function saveAdapter(
  folder: string,
  model: Base,
  adapter: Adapter,
  { base, files: texts = {} }: SaveAdapterOptions = {},
): Promise<void> {
  const { options, weights } = adapter;
  const starts = [...weights.values()].some(({ start }) => start !== undefined);
  const adapters = adaptersByFile(model, adapter as LiveAdapter);
  const tensors = adapters.flatMap((own): SafetensorsInput[] => {
    const { matrix, rank, parts } = own;
    const { module, n, k } = matrix;
    const f32 = (end: string, shape: readonly number[], data: () => Promise<Float32Array> | AsyncIterable<Float32Array>) => ({
      name: `${prefix}${module}.${end}`,
      dtype: 'F32' as const,
      shape,
      data,
    });
    const each = (which: 'A' | 'B') => Promise.all(parts.map((part) => matrixIn(adapter, part.module, which)));
    return [
      f32(ends[0], [rank, k], async function* () {
        for (const part of parts) yield await matrixIn(adapter, part.module, 'A');
      }),
      f32(ends[1], [n, rank], async () => joinedB(own, await each('B'))),
      ...(options.kind === 'dora' ? [f32(ends[2], [n], () => magnitudes(adapter, model, matrix))] : []),
    ];
  });
  const joint = adapters
    .filter(({ matrix }) => matrix.parts.length > 1)
    .flatMap(({ parts }) => parts.map(({ module, rank }) => [module, rank] as const));
  await mkdir(folder, { recursive: true });
  const metadata = {
    format: 'pt',
    [keys.base]: await digestOf(model),
    ...(starts ? { [keys.start]: String(options.rank) } : {}),
    ...(joint.length > 0 ? { [keys.parts]: JSON.stringify(Object.fromEntries(joint)) } : {}),
  };
  await writeSafetensors(join(folder, files.weights), tensors, metadata);
  const text = `${JSON.stringify({ ...toPeft(options, model, adapters, starts), base_model_name_or_path: base ?? null }, null, 2)}\n`;
  for (const [name, content] of Object.entries({ ...texts, [files.config]: text }))
    await writeAtomic(join(folder, name), (file) => file.writeFile(content));
}

/** Lengths of the rows of a file's matrix [N]: trained ones, and of parts without an adapter those that they have. */
async function magnitudes(adapter: Adapter, model: Base, { n, parts }: FileMatrix): Promise<Float32Array> {
  const all = new Float32Array(n);
  for (const { module, from } of parts) {
    const place = model.parameters.linears.find(({ name }) => moduleOf(name) === module)!;
    all.set(await (adapter.weights.has(module) ? trainedIn(adapter, `${module}.${ends[2]}`) : rowLengths(place)), from);
  }
  return all;
}

/** What was trained, from the originals of f32 where the ops read copies of bf16. */
async function trainedIn({ parameters: { list, values } }: Adapter, name: string): Promise<Float32Array> {
  const { offset, tensor } = list.find((each) => each.name === name)!;
  return valuesOf(keep(viewOf(values, [tensor.size], offset)));
}

/** Reads a tensor as float32, and frees it. */
async function valuesOf(t: Tensor): Promise<Float32Array> {
  const wide = t.dtype === 'f32' ? t : keep(cast(t, 'f32'));
  return readAs(wide, 'f32').finally(() => {
    for (const each of new Set([t, wide])) each.dispose();
  });
}

/**
 * @internal A [R K] or B [N R] of a matrix as files have it: what OLoRA takes away is part of it, and R twice the rank.
 */
export async function matrixIn(adapter: Adapter, module: string, which: 'A' | 'B'): Promise<Float32Array> {
  const { start, b } = adapter.weights.get(module)!;
  const own = await trainedIn(adapter, `${module}.lora_${which}.weight`);
  if (start === undefined) return own;
  const taken = await valuesOf(keep(viewOf(which === 'A' ? start.a : start.b, [own.length])));
  return which === 'A'
    ? joinRows(own, taken, 1)
    : joinRows(
        own,
        taken.map((x) => -x),
        b.shape[0]!,
      );
}

/** Each row of x followed by that of y, of matrices of `rows` rows of one width. */
function joinRows(x: Float32Array, y: Float32Array, rows: number): Float32Array {
  const joined = new Float32Array(2 * x.length);
  const width = x.length / rows;
  for (let i = 0; i < rows; i++) {
    joined.set(x.subarray(i * width, (i + 1) * width), 2 * i * width);
    joined.set(y.subarray(i * width, (i + 1) * width), (2 * i + 1) * width);
  }
  return joined;
}

/** The first or the second half of each row: what {@link joinRows} joined. */
function halfOf(joined: Float32Array, rows: number, half: 0 | 1): Float32Array {
  const width = joined.length / 2 / rows;
  const part = new Float32Array(joined.length / 2);
  for (let i = 0; i < rows; i++) part.set(joined.subarray((2 * i + half) * width, (2 * i + half + 1) * width), i * width);
  return part;
}

/** Options of {@link loadAdapter}; what the file says is not among them. */
export type LoadAdapterOptions = Pick<AdapterOptions, 'ratio' | 'dropout' | 'seed'> & {
  /** With gradients, to train on. Default false. */
  readonly trainable?: boolean;
};

/**
 * Loads an adapter that {@link saveAdapter} or PEFT wrote, and puts it to use in a model.
 * @throws FormatError for files that are missing, damaged or contradict one another, and for what is not supported, by name.
 * @throws ConfigError for an adapter of another base.
 */
export async function loadAdapter(folder: string, model: Base, options: LoadAdapterOptions = {}): Promise<Adapter> {
  checkText('loadAdapter', 'folder', folder, 'the path of a folder');
  checkObject('loadAdapter', 'model', model, 'the model that it belongs to', 'config', 'parameters');
  const config = await readPeftConfig(join(folder, files.config));
  const path = join(folder, files.weights);
  const stored = await openSafetensors(path);
  try {
    const known = stored.metadata[keys.base];
    if (known !== undefined && known !== (await digestOf(model))) {
      throw new ConfigError(
        `${path}: the adapter was trained beside another base; its own has the digest ${known} of embedding and norms`,
        { code: 'ERR_CONFIG', op: 'loadAdapter', argument: 'model', expected: known, actual: await digestOf(model) },
      );
    }
    const startRank = Number(stored.metadata[keys.start] ?? 0);
    if (startRank !== 0 && 2 * startRank !== config.rank) refuse(path, keys.start, startRank, `half of r (${config.rank})`);
    const { kind, rank, alpha, rankStabilized, dropout } = config;
    const full = adapterOptions({
      ...{ kind, rank, alpha, rankStabilized, dropout },
      ...(startRank === 0 ? {} : { rank: startRank, alpha: alpha / (rankStabilized ? Math.SQRT2 : 2), init: 'olora' as const }),
      ...options,
    });
    const adapters = adaptersIn(path, stored, model, config);
    const own = new Map(
      adapters.flatMap(({ parts }) =>
        parts.map(({ module, rank, scale }) => {
          if (startRank !== 0 && rank % 2 !== 0)
            refuse(path, `'${module}'`, `of rank ${rank}`, `an even one, as ${keys.start} says`);
          return [module, { rank: startRank === 0 ? rank : rank / 2, scale }] as const;
        }),
      ),
    );
    const modules = model.parameters.linears.map(({ name }) => moduleOf(name)).filter((module) => own.has(module));
    const adapter = makeAdapter(model, { ...full, targets: modules }, modules, options.trainable ?? false, own);
    try {
      await fill(adapter, path, stored, adapters, startRank !== 0);
      setAdapter(model, adapter);
      return adapter;
    } catch (error) {
      adapter.dispose();
      throw error;
    }
  } finally {
    await stored.close();
  }
}

/** The adapters of a file, whose tensors are all there and fit the model. */
function adaptersIn(path: string, stored: Safetensors, model: Base, config: PeftConfig): FileAdapter[] {
  const dora = config.kind === 'dora';
  const found = new Map<string, Set<string>>();
  for (const name of stored.tensors.keys()) {
    const end = ends.find((end) => name.endsWith(`.${end}`));
    if (!name.startsWith(prefix) || end === undefined || (end === 'lora_magnitude_vector' && !dora)) {
      refuse(path, `'${name}'`, 'in the file', `names such as ${prefix}<module>.${ends[0]}`);
    }
    const module = name.slice(prefix.length, -(end!.length + 1));
    found.set(module, (found.get(module) ?? new Set()).add(end!));
  }
  if (found.size === 0) refuse(path, 'the file', 'empty', 'an adapter');
  const known = knownMatrices(model);
  const sideBySide = partRanks(path, stored.metadata[keys.parts]);
  const taken = new Set<string>();
  return [...found].map(([module, has]) => {
    const shapeOf = (end: string): readonly number[] => stored.tensors.get(`${prefix}${module}.${end}`)!.shape;
    for (const end of dora ? ends : ends.slice(0, 2))
      if (!has.has(end)) refuse(path, `'${module}'`, `without ${end}`, 'all of its tensors');
    const rank = config.rankOf(module);
    const [a, b] = [shapeOf(ends[0]), shapeOf(ends[1])];
    if (a.length !== 2 || b.length !== 2 || a[0] !== rank || b[1] !== rank)
      refuse(
        path,
        `'${module}'`,
        `A [${a.join(' ')}] and B [${b.join(' ')}]`,
        `[${rank} K] and [N ${rank}], as r in ${files.config} says`,
      );
    const matrix = known.get(module);
    checkShape(module, matrix && [matrix.n, matrix.k], b[0]!, a[1]!);
    if (dora && shapeOf(ends[2]).join(' ') !== String(b[0]))
      refuse(path, `'${module}.${ends[2]}'`, `[${shapeOf(ends[2]).join(' ')}]`, `[${b[0]}]`);
    const scale = config.scaleOf(module);
    let at = 0;
    const parts = matrix!.parts.flatMap((part): AdapterPart[] => {
      // Without a word of it they all read the same A.
      const own = sideBySide === undefined || matrix!.parts.length === 1 ? rank : sideBySide.get(part.module);
      if (own === undefined) return [];
      if (taken.has(part.module)) refuse(path, `'${part.module}'`, 'there twice', 'one adapter for each matrix');
      taken.add(part.module);
      const from = own === rank ? 0 : at;
      at += own;
      return [{ ...part, at: from, rank: own, scale }];
    });
    if (parts.length === 0 || parts.some(({ at, rank: own }) => at + own > rank))
      refuse(path, keys.parts, JSON.stringify(parts.map(({ rank }) => rank)), `ranks of '${module}' that add up to ${rank}`);
    return { matrix: matrix!, rank, scale, parts };
  });
}

/** The ranks of parts that lie side by side in their matrix, as {@link saveAdapter} notes them. */
function partRanks(path: string, text: string | undefined): Map<string, number> | undefined {
  if (text === undefined) return undefined;
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch {
    json = undefined;
  }
  const entries = typeof json === 'object' && json !== null ? Object.entries(json) : [];
  if (entries.length === 0 || !entries.every(([, rank]) => Number.isSafeInteger(rank) && rank >= 1))
    refuse(path, keys.parts, text, 'ranks by the names of matrices');
  return new Map(entries);
}

async function fill(
  { parameters, weights }: LiveAdapter,
  path: string,
  stored: Safetensors,
  adapters: readonly FileAdapter[],
  starts: boolean,
): Promise<void> {
  const read = async (module: string, end: string, from: number, to: number): Promise<Float32Array> => {
    const name = `${prefix}${module}.${end}`;
    const { dtype } = stored.tensors.get(name)!;
    const values = new Float32Array(to - from);
    const use = (run: SafetensorsArray, at: number): void => {
      const own = floats(run, dtype, `${path}: '${name}'`);
      values.set(own instanceof Uint16Array ? widenBf16(own) : own, at);
    };
    await stored.each(name, use, { from, to });
    return values;
  };
  const write = async (half?: 0 | 1): Promise<void> => {
    for (const { matrix, rank, parts } of adapters) {
      const { module: file, k } = matrix;
      for (const part of parts) {
        const { module, at, from, rows, rank: own } = part;
        const a = await read(file, ends[0], at * k, (at + own) * k);
        const b = columnsOf(await read(file, ends[1], from * rank, (from + rows) * rank), rank, part);
        const ownB = half === undefined ? b : halfOf(b, rows, half);
        parameters.write(`${module}.${ends[0]}`, 0, half === undefined ? a : halfOf(a, 1, half));
        parameters.write(`${module}.${ends[1]}`, 0, half === 1 ? ownB.map((x) => -x) : ownB);
        if (weights.get(module)!.direction !== undefined)
          parameters.write(`${module}.${ends[2]}`, 0, await read(file, ends[2], from, from + rows));
      }
    }
    parameters.refresh();
  };
  if (!starts) return write();
  // First what is taken away, so that it can be copied; then what is trained.
  await write(1);
  for (const lowRank of weights.values()) rememberStart(lowRank);
  await write(0);
}

/**
 * A digest of a base that does not depend on what its matrices are kept in: of its norms, and of 16 rows of its embedding, all rounded
 * to bf16.
 */
async function digestOf(model: Base): Promise<string> {
  const linear = new Set(model.parameters.linears.map(({ name }) => name));
  const hash = createHash('sha256');
  for (const { name, tensor } of model.parameters.list) {
    if (linear.has(name) || tensor.size === 0) continue;
    const [rows = 1, ...rest] = tensor.shape;
    const width = rest.reduce((x, y) => x * y, 1);
    const places = rest.length === 0 ? [0] : Array.from({ length: 16 }, (_, i) => Math.floor((i * rows) / 16));
    hash.update(`${name} ${tensor.shape.join(' ')}\n`);
    for (const place of new Set(places)) {
      const part = scope(() => {
        const view = viewOf(tensor, rest.length === 0 ? [rows] : [width], place * width);
        return keep(cast(view, 'bf16'));
      });
      const bits = await readAs(part, 'bf16').finally(() => part.dispose());
      hash.update(bits);
    }
  }
  return hash.digest('hex').slice(0, 32);
}
