// Adapters as folders in the format of PEFT: adapter_config.json and adapter_model.safetensors.
import { createHash } from 'node:crypto';
import { mkdir, readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { writeAtomic } from '../io/atomic.ts';
import { openSafetensors, type Safetensors, writeSafetensors } from '../io/safetensors.ts';
import {
  type Adapter,
  type AdapterOptions,
  adapterOptions,
  checkShape,
  type LiveAdapter,
  makeAdapter,
  moduleOf,
  rememberStart,
  setAdapter,
} from '../nn/lora.ts';
import type { Parameters, SpecTree } from '../nn/parameters.ts';
import { cast } from '../ops/elementwise.ts';
import { ConfigError, FormatError } from '../tensor/errors.ts';
import { widenBf16 } from '../tensor/half.ts';
import { keep, scope } from '../tensor/scope.ts';
import { readAs, type Tensor, viewOf } from '../tensor/tensor.ts';
import { floats } from './weights.ts';

/** What makes a folder one of an adapter. */
export const adapterConfigFile = 'adapter_config.json';

const files = { config: adapterConfigFile, weights: 'adapter_model.safetensors' } as const;

/** What PEFT puts before the names of a model. */
const prefix = 'base_model.model.';

/** Keys of the file's own data: a digest of the base, and the rank of what OLoRA takes away. */
const keys = { base: 'limbeck.base', start: 'limbeck.start_rank' } as const;

/** A model as far as files of adapters need it. */
export type Base = { readonly parameters: Parameters<SpecTree> };

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
  const tensors = [...weights].flatMap(([module, { a, b, direction }]) => {
    const [rank = 0, k = 0] = a.shape;
    const [n = 0] = b.shape;
    const name = `${prefix}${module}`;
    const made = starts ? 2 * rank : rank;
    const f32 = (end: string, shape: readonly number[], data: () => Promise<Float32Array>) => ({
      name: `${name}.${end}`,
      dtype: 'F32' as const,
      shape,
      data,
    });
    return [
      f32('lora_A.weight', [made, k], () => matrixIn(adapter, module, 'A')),
      f32('lora_B.weight', [n, made], () => matrixIn(adapter, module, 'B')),
      ...(direction === undefined
        ? []
        : [f32('lora_magnitude_vector', [n], () => trainedIn(adapter, `${module}.lora_magnitude_vector`))]),
    ];
  });
  await mkdir(folder, { recursive: true });
  const metadata = {
    format: 'pt',
    [keys.base]: await digestOf(model),
    ...(starts ? { [keys.start]: String(options.rank) } : {}),
  };
  await writeSafetensors(join(folder, files.weights), tensors, metadata);
  const text = `${JSON.stringify({ ...toPeft(options, model, [...weights.keys()], starts), base_model_name_or_path: base ?? null }, null, 2)}\n`;
  for (const [name, content] of Object.entries({ ...texts, [files.config]: text }))
    await writeAtomic(join(folder, name), (file) => file.writeFile(content));
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

function toPeft(options: Required<AdapterOptions>, model: Base, modules: readonly string[], starts: boolean): object {
  return {
    peft_type: 'LORA',
    task_type: 'CAUSAL_LM',
    r: starts ? 2 * options.rank : options.rank,
    // alpha / rank, or alpha / √rank, stays what it is.
    lora_alpha: starts ? options.alpha * (options.rankStabilized ? Math.SQRT2 : 2) : options.alpha,
    lora_dropout: options.dropout,
    target_modules: shortest(model, modules),
    use_rslora: options.rankStabilized,
    use_dora: options.kind === 'dora',
    init_lora_weights: true,
    bias: 'none',
    fan_in_fan_out: false,
    inference_mode: true,
    modules_to_save: null,
    rank_pattern: {},
    alpha_pattern: {},
  };
}

/** The last parts of names where they mean these modules and no other, else the names. */
function shortest(model: Base, modules: readonly string[]): string[] {
  const last = (module: string): string => module.slice(module.lastIndexOf('.') + 1);
  const chosen = new Set(modules);
  const ends = new Set(modules.map(last));
  const others = model.parameters.linears.some(({ name }) => ends.has(last(moduleOf(name))) && !chosen.has(moduleOf(name)));
  return others ? [...modules] : [...ends].sort();
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
  const config = await readConfig(join(folder, files.config));
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
    const full = adapterOptions({
      ...config,
      ...(startRank === 0
        ? {}
        : { rank: startRank, alpha: config.alpha / (config.rankStabilized ? Math.SQRT2 : 2), init: 'olora' as const }),
      ...options,
    });
    const modules = modulesIn(path, stored, model, config.kind === 'dora', config.rank);
    const adapter = makeAdapter(model, { ...full, targets: modules }, modules, options.trainable ?? false);
    try {
      await fill(adapter, path, stored, startRank);
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

const parts = ['lora_A.weight', 'lora_B.weight', 'lora_magnitude_vector'] as const;

/** The modules of a file, in the model's order, whose tensors are all there and fit. */
function modulesIn(path: string, stored: Safetensors, model: Base, dora: boolean, rank: number): string[] {
  const found = new Map<string, Set<string>>();
  for (const name of stored.tensors.keys()) {
    const part = parts.find((end) => name.endsWith(`.${end}`));
    if (!name.startsWith(prefix) || part === undefined || (part === 'lora_magnitude_vector' && !dora)) {
      refuse(path, `'${name}'`, 'in the file', `names such as ${prefix}<module>.${parts[0]}`);
    }
    const module = name.slice(prefix.length, -(part!.length + 1));
    found.set(module, (found.get(module) ?? new Set()).add(part!));
  }
  const shapes = new Map(model.parameters.linears.map(({ name, shape }) => [moduleOf(name), shape]));
  for (const [module, has] of found) {
    const shapeOf = (part: string): readonly number[] => stored.tensors.get(`${prefix}${module}.${part}`)!.shape;
    for (const part of dora ? parts : parts.slice(0, 2))
      if (!has.has(part)) refuse(path, `'${module}'`, `without ${part}`, 'all of its tensors');
    const [a, b] = [shapeOf(parts[0]), shapeOf(parts[1])];
    if (a.length !== 2 || b.length !== 2 || a[0] !== rank || b[1] !== rank)
      refuse(
        path,
        `'${module}'`,
        `A [${a.join(' ')}] and B [${b.join(' ')}]`,
        `[${rank} K] and [N ${rank}], as r in ${files.config} says`,
      );
    checkShape(module, shapes.get(module), b[0]!, a[1]!);
    if (dora && shapeOf(parts[2]).join(' ') !== String(b[0]))
      refuse(path, `'${module}.${parts[2]}'`, `[${shapeOf(parts[2]).join(' ')}]`, `[${b[0]}]`);
  }
  if (found.size === 0) refuse(path, 'the file', 'empty', 'an adapter');
  return [...shapes.keys()].filter((module) => found.has(module));
}

async function fill({ parameters, weights }: LiveAdapter, path: string, stored: Safetensors, startRank: number): Promise<void> {
  const read = async (name: string): Promise<Float32Array> => {
    const file = `${prefix}${name}`;
    const entry = stored.tensors.get(file)!;
    const whole = new Float32Array(entry.shape.reduce((x, y) => x * y, 1));
    await stored.each(file, (run, from) => {
      const values = floats(run, entry.dtype, `${path}: '${file}'`);
      whole.set(values instanceof Uint16Array ? widenBf16(values) : values, from);
    });
    return whole;
  };
  const write = async (half?: 0 | 1): Promise<void> => {
    for (const { name, tensor } of parameters.list) {
      const whole = await read(name);
      const isB = name.endsWith('lora_B.weight');
      const part = half === undefined ? whole : halfOf(whole, isB ? tensor.shape[0]! : 1, half);
      parameters.write(name, 0, half === 1 && isB ? part.map((x) => -x) : part);
    }
    parameters.refresh();
  };
  if (startRank === 0) return write();
  // First what is taken away, so that it can be copied; then what is trained.
  await write(1);
  for (const lowRank of weights.values()) rememberStart(lowRank);
  await write(0);
}

interface PeftConfig {
  readonly kind: 'lora' | 'dora';
  readonly rank: number;
  readonly alpha: number;
  readonly rankStabilized: boolean;
  readonly dropout: number;
}

/** Initial values that change the base: such an adapter fits no other. */
const changesBase = /^(olora|pissa|corda|loftq|lora_ga)/;

async function readConfig(path: string): Promise<PeftConfig> {
  let json: unknown;
  try {
    json = JSON.parse(await readFile(path, 'utf8'));
  } catch (error) {
    throw new FormatError(
      `${path}: cannot be read: ${(error as Error).message}; an adapter is ${files.config} and ${files.weights}`,
      {
        code: 'ERR_CHECKPOINT',
        op: 'loadAdapter',
        argument: path,
        cause: error,
      },
    );
  }
  if (typeof json !== 'object' || json === null || Array.isArray(json))
    return refuse(path, 'the file', JSON.stringify(json), 'an object');
  const j = json as Record<string, unknown>;
  const number = (field: string): number =>
    typeof j[field] === 'number' && Number.isFinite(j[field])
      ? j[field]
      : refuse(path, field, JSON.stringify(j[field]), 'a number');
  if (j.peft_type !== 'LORA') refuse(path, 'peft_type', JSON.stringify(j.peft_type), '"LORA"');
  const { init_lora_weights: init } = j;
  if (typeof init === 'string' && changesBase.test(init))
    refuse(path, 'init_lora_weights', JSON.stringify(init), 'an adapter of the base as it is: PEFT converts it when it saves');
  if (j.bias !== undefined && j.bias !== 'none') refuse(path, 'bias', JSON.stringify(j.bias), '"none"');
  const isEmpty = (value: unknown): boolean =>
    value === undefined || value === null || value === false || (typeof value === 'object' && Object.keys(value).length === 0);
  for (const field of unsupported)
    if (!isEmpty(j[field])) refuse(path, field, JSON.stringify(j[field]), 'nothing: it is not supported');
  const [rank, alpha] = [number('r'), number('lora_alpha')];
  if (!(Number.isInteger(rank) && rank >= 1)) refuse(path, 'r', rank, 'a whole number of 1 or more');
  if (!(alpha > 0)) refuse(path, 'lora_alpha', alpha, 'a number above 0');
  return {
    kind: j.use_dora === true ? 'dora' : 'lora',
    rank,
    alpha,
    rankStabilized: j.use_rslora === true,
    dropout: j.lora_dropout === undefined ? 0 : number('lora_dropout'),
  };
}

const unsupported = [
  'modules_to_save',
  'rank_pattern',
  'alpha_pattern',
  'layer_replication',
  'lora_bias',
  'use_qalora',
  'use_bdlora',
  'trainable_token_indices',
  'target_parameters',
  'alora_invocation_tokens',
  'kasa_config',
  'velora_config',
  'monteclora_config',
  'arrow_config',
] as const;

function refuse(path: string, argument: string, actual: unknown, expected: string): never {
  throw new FormatError(`${path}: ${argument} is ${String(actual)}, expected ${expected}`, {
    code: 'ERR_CHECKPOINT',
    op: 'loadAdapter',
    argument,
    expected,
    actual: String(actual),
  });
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
