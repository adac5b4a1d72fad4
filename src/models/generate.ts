// Text from a model, one token at a time, with keys and values kept.
import { softcap } from '../ops/elementwise.ts';
import { linear } from '../ops/linear.ts';
import { reshape, rows } from '../ops/reshape.ts';
import { init, started } from '../tensor/engine.ts';
import { ConfigError, DataError } from '../tensor/errors.ts';
import { checkSeed, randomBlock, uniform } from '../tensor/random.ts';
import { scope } from '../tensor/scope.ts';
import { noGrad } from '../tensor/tape.ts';
import { readAs, type Tensor, tensor } from '../tensor/tensor.ts';
import type { Tokenizer } from '../tokenizer/tokenizer.ts';
import { cacheRows, createCache, type KeyValueCache } from './cache.ts';
import { resolveCheckpoint } from './folder.ts';
import { type LanguageModel, loadModel } from './model.ts';

export interface SamplingOptions {
  /** Most new tokens. Default 128. */
  readonly tokens?: number;
  /** 0 takes the likeliest token. Default 0.8. */
  readonly temperature?: number;
  /** Draw from the k likeliest tokens only. Default: all. */
  readonly topK?: number;
  /** Draw from the likeliest tokens that together hold this share of the probability. Default 1. */
  readonly topP?: number;
  /** Same seed, same text. Default 0. */
  readonly seed?: number;
  readonly signal?: AbortSignal;
}

/**
 * Continues a text; yields pieces as they are certain, never half a character. Ends at the tokenizer's end token.
 * @throws ConfigError for an option out of range; DataError when prompt and new tokens exceed the model's context.
 */
export async function* generateText(
  model: LanguageModel,
  tokenizer: Tokenizer,
  prompt: string,
  options: SamplingOptions = {},
): AsyncGenerator<string, void, undefined> {
  const { tokens = 128, temperature = 0.8, topK = model.config.vocabSize, topP = 1, seed = 0, signal } = options;
  check('tokens', tokens, Number.isInteger(tokens) && tokens >= 1, 'a whole number from 1');
  check('temperature', temperature, temperature >= 0 && Number.isFinite(temperature), '0 or more');
  check('topK', topK, Number.isInteger(topK) && topK >= 1, 'a whole number from 1');
  check('topP', topP, topP > 0 && topP <= 1, 'above 0, at most 1');
  checkSeed(seed);
  const { context } = model.config;
  const ids = tokenizer.encode(prompt, { bos: tokenizer.bos !== undefined });
  if (ids.length === 0) {
    throw new DataError('generate: the prompt is empty and the tokenizer has no begin token; give some text', {
      code: 'ERR_EMPTY',
      op: 'generate',
      argument: 'prompt',
    });
  }
  if (ids.length >= context) {
    throw new DataError(`generate: the prompt has ${ids.length} tokens, the model's context is ${context}; shorten the prompt`, {
      code: 'ERR_CONTEXT',
      op: 'generate',
      argument: 'prompt',
      expected: `below ${context}`,
      actual: String(ids.length),
    });
  }
  const end = Math.min(context, ids.length + tokens);
  const cache = createCache(1, end);
  const decoder = tokenizer.decoder({ skipSpecial: true });
  try {
    let next: ArrayLike<number> = ids;
    for (let drawn = 0; ids.length + drawn < end; drawn++) {
      signal?.throwIfAborted();
      const scores = await nextScores(model, cache, next);
      const id = draw(scores, { temperature, topK, topP }, uniform(randomBlock(seed, 0, drawn)[0]!));
      if (id === tokenizer.eos || id >= tokenizer.vocabSize) break;
      const text = decoder.push(id);
      if (text !== '') yield text;
      next = [id];
    }
    const rest = decoder.end();
    if (rest !== '') yield rest;
  } finally {
    cache.dispose();
  }
}

/** Reads new tokens into the cache and gives the logits [V] after the last. */
async function nextScores(model: LanguageModel, cache: KeyValueCache, ids: ArrayLike<number>): Promise<Float32Array> {
  const { width, finalCap } = model.config;
  const logits = scope(() =>
    noGrad((): Tensor => {
      const t = ids.length;
      const input = {
        ids: tensor(Int32Array.from(ids), [1, t]),
        positions: tensor(
          Int32Array.from({ length: t }, (_, i) => cache.lengths[0]! + i),
          [1, t],
        ),
        cache: cacheRows(cache, [0], t),
      };
      const last = rows(reshape(model.hidden(input), [t, width]), t - 1, t);
      const z = linear(last, model.head);
      return finalCap === null ? z : softcap(z, finalCap);
    }),
  );
  cache.lengths[0]! += ids.length;
  try {
    return await readAs(logits, 'f32');
  } finally {
    logits.dispose();
  }
}

/** Draws an id from logits. `u` in [0, 1) decides. */
function draw(logits: Float32Array, options: { temperature: number; topK: number; topP: number }, u: number): number {
  let best = 0;
  for (let i = 1; i < logits.length; i++) if (logits[i]! > logits[best]!) best = i;
  if (options.temperature === 0) return best;
  const top = logits[best]!;
  const weights = Float64Array.from(logits, (z) => Math.exp((z - top) / options.temperature));
  let order: Uint32Array | undefined;
  if (options.topK < logits.length || options.topP < 1) {
    order = Uint32Array.from(logits.keys()).sort((a, b) => weights[b]! - weights[a]! || a - b);
    const all = weights.reduce((a, b) => a + b, 0);
    let mass = 0;
    let kept = 0;
    while (kept < Math.min(options.topK, order.length) && mass < options.topP * all) mass += weights[order[kept++]!]!;
    order = order.subarray(0, Math.max(1, kept));
  }
  const candidates = order ?? weights.keys();
  let sum = 0;
  for (const i of order ?? weights.keys()) sum += weights[i]!;
  let left = u * sum;
  let id = best;
  for (const i of candidates) {
    id = i;
    left -= weights[i]!;
    if (left < 0) break;
  }
  return id;
}

function check(name: string, value: number, good: boolean, expected: string): void {
  if (good) return;
  throw new ConfigError(`generate: ${name} is ${value}, expected ${expected}`, {
    code: 'ERR_CONFIG',
    op: 'generate',
    argument: name,
    expected,
    actual: String(value),
  });
}

export interface GenerateOptions extends SamplingOptions {
  /** A model folder, or the output folder of a run: its newest checkpoint. */
  readonly checkpoint: string;
  readonly prompt: string;
  /** Threads, if the engine does not run yet. Default: the cores of the machine. */
  readonly threads?: number;
}

/** {@link generateText} with the model of a folder. */
export async function* generate(options: GenerateOptions): AsyncGenerator<string, void, undefined> {
  if (!started() && options.threads !== undefined) init({ threads: options.threads });
  const { model, tokenizer } = await loadModel(await resolveCheckpoint(options.checkpoint));
  try {
    yield* generateText(model, tokenizer, options.prompt, options);
  } finally {
    model.dispose();
  }
}
