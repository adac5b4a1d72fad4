// adapter_config.json of PEFT, in and out.
import { readFile } from 'node:fs/promises';
import type { AdapterOptions } from '../nn/lora.ts';
import { FormatError } from '../tensor/errors.ts';
import { type Base, type FileAdapter, fileMatrices } from './adapter-layout.ts';

/** What makes a folder one of an adapter. */
export const adapterConfigFile = 'adapter_config.json';

/** What a file says of an adapter. */
export interface PeftConfig {
  readonly kind: 'lora' | 'dora';
  readonly rank: number;
  readonly alpha: number;
  readonly rankStabilized: boolean;
  readonly dropout: number;
  /** Of a matrix by its name, which patterns may give others than `rank` and `alpha`. */
  rankOf(module: string): number;
  scaleOf(module: string): number;
}

/** alpha / rank, or alpha / √rank. */
const divisor = (rank: number, rankStabilized: boolean): number => (rankStabilized ? Math.sqrt(rank) : rank);

/** The fields of a file for adapters of a model. */
export function toPeft(
  options: Required<AdapterOptions>,
  model: Base,
  adapters: readonly FileAdapter[],
  starts: boolean,
): object {
  const { rankStabilized } = options;
  const rank = starts ? 2 * options.rank : options.rank;
  const usual = { rank, alpha: starts ? options.alpha * (rankStabilized ? Math.SQRT2 : 2) : options.alpha };
  const ranks: Record<string, number> = {};
  const alphas: Record<string, number> = {};
  for (const { matrix, rank, scale } of adapters) {
    const alpha = scale * divisor(rank, rankStabilized);
    // Parts side by side have a rank of their own, and what they are multiplied by stays.
    if (rank !== usual.rank) ranks[matrix.module] = rank;
    if (Math.abs(alpha - usual.alpha) > 1e-9 * alpha) alphas[matrix.module] = alpha;
  }
  return {
    peft_type: 'LORA',
    task_type: 'CAUSAL_LM',
    r: usual.rank,
    // alpha / rank, or alpha / √rank, stays what it is.
    lora_alpha: usual.alpha,
    lora_dropout: options.dropout,
    target_modules: shortest(
      model,
      adapters.map(({ matrix }) => matrix.module),
    ),
    use_rslora: rankStabilized,
    use_dora: options.kind === 'dora',
    init_lora_weights: true,
    bias: 'none',
    fan_in_fan_out: adapters.every(({ matrix }) => matrix.transposed),
    inference_mode: true,
    modules_to_save: null,
    rank_pattern: ranks,
    alpha_pattern: alphas,
  };
}

/** The last parts of names where they mean these modules and no other, else the names. */
function shortest(model: Base, modules: readonly string[]): string[] {
  const last = (module: string): string => module.slice(module.lastIndexOf('.') + 1);
  const chosen = new Set(modules);
  const ends = new Set(modules.map(last));
  const others = fileMatrices(model).some(({ module }) => ends.has(last(module)) && !chosen.has(module));
  return others ? [...modules] : [...ends].sort();
}

/** Initial values that change the base: such an adapter fits no other. */
const changesBase = /^(olora|pissa|corda|loftq|lora_ga)/;

/** Reads a file. @throws FormatError naming the field that is missing, wrong or not supported */
export async function readPeftConfig(path: string): Promise<PeftConfig> {
  let json: unknown;
  try {
    json = JSON.parse(await readFile(path, 'utf8'));
  } catch (error) {
    throw new FormatError(
      `${path}: cannot be read: ${(error as Error).message}; an adapter is ${adapterConfigFile} and adapter_model.safetensors`,
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
  const rankStabilized = j.use_rslora === true;
  const ranks = patterns(path, 'rank_pattern', j.rank_pattern, (n) => Number.isInteger(n) && n >= 1);
  const alphas = patterns(path, 'alpha_pattern', j.alpha_pattern, (x) => x > 0);
  const rankOf = (module: string): number => ranks(module) ?? rank;
  return {
    kind: j.use_dora === true ? 'dora' : 'lora',
    rank,
    alpha,
    rankStabilized,
    dropout: j.lora_dropout === undefined ? 0 : number('lora_dropout'),
    rankOf,
    scaleOf: (module) => (alphas(module) ?? alpha) / divisor(rankOf(module), rankStabilized),
  };
}

// Names, and what stands for several of them. A group that repeats could take forever to match, and so could many stars.
const plainPattern = /^[\w.^$|()[\]\\*+?-]{1,200}$/;
const slowPattern = /\)[*+?]|([*+].*){4}/;

/**
 * The number that the first fitting pattern gives a module, as PEFT finds it: a pattern is a regular expression for a name or the end of one,
 * from a dot on.
 */
function patterns(
  path: string,
  field: string,
  given: unknown,
  isGood: (value: number) => boolean,
): (module: string) => number | undefined {
  if (given === undefined || given === null) return () => undefined;
  if (typeof given !== 'object' || Array.isArray(given))
    return refuse(path, field, JSON.stringify(given), 'an object of numbers');
  const list = Object.entries(given).map(([pattern, value]: [string, unknown]) => {
    const where = `${field}['${pattern}']`;
    if (typeof value !== 'number' || !Number.isFinite(value) || !isGood(value))
      return refuse(
        path,
        where,
        JSON.stringify(value),
        field === 'rank_pattern' ? 'a whole number of 1 or more' : 'a number above 0',
      );
    const name = 'the name of a matrix, or a plain regular expression for such names';
    if (!plainPattern.test(pattern) || slowPattern.test(pattern)) return refuse(path, field, `of '${pattern}'`, name);
    try {
      return { expression: new RegExp(`^(.*\\.)?(${pattern})$`), value };
    } catch {
      return refuse(path, field, `of '${pattern}'`, name);
    }
  });
  return (module) => list.find(({ expression }) => expression.test(module))?.value;
}

const unsupported = [
  'modules_to_save',
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

/** @throws FormatError */
export function refuse(path: string, argument: string, actual: unknown, expected: string): never {
  throw new FormatError(`${path}: ${argument} is ${String(actual)}, expected ${expected}`, {
    code: 'ERR_CHECKPOINT',
    op: 'loadAdapter',
    argument,
    expected,
    actual: String(actual),
  });
}
