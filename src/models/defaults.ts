// generation_config.json of a model folder, and its like in a GGUF file: how its makers would have it write.
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import type { GgufMetadata } from '../io/gguf-header.ts';
import { FormatError } from '../tensor/errors.ts';
import type { TokenOptions } from './generate.ts';

/** The options that a generation_config.json may give. */
export type GenerationConfig = Pick<
  TokenOptions,
  'temperature' | 'topK' | 'topP' | 'minP' | 'repetitionPenalty' | 'tokens' | 'stopIds'
>;

const file = 'generation_config.json';

/**
 * Reads generation_config.json; without one, nothing. As in Transformers `do_sample: false` means temperature 0 whatever the other fields say.
 * @throws FormatError naming the field that is wrong.
 */
export async function loadGenerationConfig(folder: string): Promise<GenerationConfig> {
  const path = join(folder, file);
  let text: string;
  try {
    text = await readFile(path, 'utf8');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return {};
    throw new FormatError(`${path}: cannot be read`, { ...about(path), cause: error });
  }
  return parseGenerationConfig(text, path);
}

/** @param path the file, for errors. @throws FormatError naming the field that is wrong */
export function parseGenerationConfig(text: string, path: string): GenerationConfig {
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch (error) {
    throw new FormatError(`${path}: not valid JSON: ${(error as Error).message}`, { ...about(path), cause: error });
  }
  return generationConfig(json, path);
}

function generationConfig(json: unknown, path: string): GenerationConfig {
  const refuse = (field: string, expected: string, actual: unknown): never => {
    const given = String(JSON.stringify(actual));
    throw new FormatError(`${path}: ${field} is ${given}, expected ${expected}`, { ...about(field), expected, actual: given });
  };
  if (typeof json !== 'object' || json === null || Array.isArray(json)) refuse('the file', 'an object', json);
  const fields = json as Record<string, unknown>;
  const config: { -readonly [K in keyof GenerationConfig]: GenerationConfig[K] } = {};
  const number = (field: string, good: (x: number) => boolean, expected: string): number | undefined => {
    const value = fields[field];
    if (value === undefined || value === null) return undefined;
    return typeof value === 'number' && good(value) ? value : refuse(field, expected, value);
  };
  const put = <K extends keyof GenerationConfig>(name: K, value: GenerationConfig[K] | undefined): void => {
    if (value !== undefined) config[name] = value;
  };
  const whole = (x: number): boolean => Number.isInteger(x) && x >= 0;

  put(
    'tokens',
    number('max_new_tokens', (x) => whole(x) && x >= 1, 'a whole number from 1'),
  );
  put(
    'repetitionPenalty',
    number('repetition_penalty', (x) => x > 0, 'a number above 0'),
  );
  const ends = fields.eos_token_id ?? [];
  const list = Array.isArray(ends) ? ends : [ends];
  if (!list.every((id) => typeof id === 'number' && whole(id))) refuse('eos_token_id', 'a token id or a list of them', ends);
  if (list.length > 0) put('stopIds', list);

  if (fields.do_sample === false) return { ...config, temperature: 0 };
  put('temperature', number('temperature', (x) => x >= 0, '0 or more') ?? (fields.do_sample === true ? 1 : undefined));
  const topK = number('top_k', whole, 'a whole number of 0 or more');
  put('topK', topK === 0 ? undefined : topK);
  put(
    'topP',
    number('top_p', (x) => x > 0 && x <= 1, 'above 0, at most 1'),
  );
  put(
    'minP',
    number('min_p', (x) => x >= 0 && x <= 1, 'from 0 to 1'),
  );
  return config;
}

/** What a generation_config.json would say: the tokens that end a text or a turn, and how llama.cpp is told to draw. */
export function generationOfGguf(metadata: GgufMetadata): Record<string, unknown> {
  const number = (key: string): number | undefined => {
    const entry = metadata.get(key);
    if (typeof entry?.value !== 'number') return undefined;
    return entry.type === 'f32' ? Number(entry.value.toPrecision(7)) : entry.value;
  };
  const ends = ['eos', 'eot', 'eom'].flatMap((name) => number(`tokenizer.ggml.${name}_token_id`) ?? []);
  const drawn = Object.entries({
    temperature: number('general.sampling.temp'),
    top_k: number('general.sampling.top_k'),
    top_p: number('general.sampling.top_p'),
    min_p: number('general.sampling.min_p'),
    repetition_penalty: number('general.sampling.penalty_repeat'),
  }).filter(([, value]) => value !== undefined);
  return {
    ...(ends.length === 0 ? {} : { eos_token_id: [...new Set(ends)] }),
    ...(drawn.length === 0 ? {} : { do_sample: true, ...Object.fromEntries(drawn) }),
  };
}

function about(argument: string) {
  return { code: 'ERR_CHECKPOINT', op: 'loadGenerationConfig', argument };
}
