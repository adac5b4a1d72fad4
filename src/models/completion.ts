// Texts from a model: prompts in, pieces or whole completions out. All stand on `generateTokens`.
import { join } from 'node:path';
import { checkModel, checkObject } from '../tensor/argument.ts';
import { type Device, startFor } from '../tensor/engine.ts';
import { DataError } from '../tensor/errors.ts';
import { encodePrompt } from '../tokenizer/sentinels.ts';
import type { TokenDecoder, Tokenizer } from '../tokenizer/tokenizer.ts';
import { parseGenerationConfig } from './defaults.ts';
import { resolveCheckpoint } from './folder.ts';
import {
  type BatchOptions,
  type FinishReason,
  generateTokens,
  type TokenLogProb,
  type TokenOptions,
  type TokenRequest,
} from './generate.ts';
import { type LanguageModel, type LoadOptions, loadModel } from './model.ts';
import type { PrefixCache } from './prefix.ts';
import { check } from './sampling.ts';

/** A text, to be encoded with one begin token where the tokenizer begins texts, or ids, taken as they are. */
export type Prompt = string | ArrayLike<number>;

export interface TextOptions extends Omit<TokenOptions, 'until'> {
  /** Texts that end the text and are not part of it. Default none. */
  readonly stop?: string | readonly string[];
  /** Ids that end the text, beside the tokenizer's end token. Default none. */
  readonly stopIds?: readonly number[];
  /** Keeps keys and values for the next call: the turns of a conversation read only what is new. Default: none. */
  readonly cache?: PrefixCache;
  readonly signal?: AbortSignal;
}

/** What is not of one text but of a call. */
type CallOption = 'cache' | 'signal';

/** Text that is certain, and the tokens that came since the piece before. */
export interface TextPiece {
  /** Empty where tokens end inside a character or in what may become a stop text. */
  readonly text: string;
  readonly tokens: readonly TextToken[];
  /** In the last piece. */
  readonly finish?: FinishReason;
}

export interface TextToken extends TokenLogProb {
  /** With `topLogProbs`: the likeliest tokens at this place, the likeliest first. */
  readonly top?: readonly TokenLogProb[];
}

function checkCall(op: string, model: unknown, tokenizer: unknown): void {
  checkModel(op, model);
  checkObject(op, 'tokenizer', tokenizer, 'a tokenizer, as loadModel and loadTokenizer give it', 'encode', 'decoder');
}

/**
 * Continues a prompt and yields a piece for each token, and one at the end. It ends at the tokenizer's end token, a stop text or id, after
 * `tokens` tokens, or when the signal is aborted.
 * @throws ConfigError for an option out of range; DataError for a prompt without tokens, or too long for the model's context.
 */
export async function* streamText(
  model: LanguageModel,
  tokenizer: Tokenizer,
  prompt: Prompt,
  options: TextOptions = {},
): AsyncGenerator<TextPiece, void, undefined> {
  checkCall('generateText', model, tokenizer);
  const text = textWriter(tokenizer.decoder({ skipSpecial: true }), options.stop);
  const request = requestOf(tokenizer, prompt, options, text);
  for await (const event of generateTokens(model, [request], batchOptions(tokenizer, options))) {
    if (event.type === 'end') yield { text: text.end(), tokens: [], finish: event.reason };
    else {
      const { type, index, ...token } = event;
      yield { text: text.take(), tokens: [token] };
    }
  }
}

/** {@link streamText} as texts alone, without empty ones. An abort throws the signal's reason. */
export async function* generateText(
  model: LanguageModel,
  tokenizer: Tokenizer,
  prompt: Prompt,
  options: TextOptions = {},
): AsyncGenerator<string, void, undefined> {
  for await (const { text, finish } of streamText(model, tokenizer, prompt, options)) {
    if (text !== '') yield text;
    if (finish === 'aborted') options.signal!.throwIfAborted();
  }
}

/** What a prompt was continued with. */
export interface TextCompletion {
  /** Which prompt. */
  readonly index: number;
  /** Without the stop text. */
  readonly text: string;
  /** All that were generated but a stop id, so also those of a stop text. */
  readonly tokens: readonly TextToken[];
  readonly finish: FinishReason;
}

export interface CompleteOptions extends TextOptions, Pick<BatchOptions, 'batch' | 'chunk'> {
  /** Options of one prompt that differ, by its index. */
  readonly each?: (index: number) => Omit<TextOptions, CallOption>;
}

/**
 * Continues many prompts, `batch` at a time; completions come as they are finished. Prompt i draws with the seed `seed + i`, so that equal
 * prompts differ, and each text is the one that {@link streamText} would give.
 * @throws as {@link streamText}, before anything runs.
 */
export async function* completions(
  model: LanguageModel,
  tokenizer: Tokenizer,
  prompts: readonly Prompt[],
  options: CompleteOptions = {},
): AsyncGenerator<TextCompletion, void, undefined> {
  checkCall('complete', model, tokenizer);
  if (!Array.isArray(prompts)) checkObject('complete', 'prompts', undefined, 'a list of texts');
  const states = prompts.map((prompt, index) => {
    const own = { ...options, seed: (options.seed ?? 0) + index, ...options.each?.(index) };
    const text = textWriter(tokenizer.decoder({ skipSpecial: true }), own.stop);
    return { text, request: requestOf(tokenizer, prompt, own, text), tokens: [] as TextToken[] };
  });
  const requests = states.map(({ request }) => request);
  for await (const { type, index, ...event } of generateTokens(model, requests, batchOptions(tokenizer, options))) {
    const { text, tokens } = states[index]!;
    if (type === 'token') tokens.push(event as TextToken);
    else yield { index, text: text.take() + text.end(), tokens, finish: (event as { reason: FinishReason }).reason };
  }
}

/** All {@link completions}, in the order of the prompts. */
export async function complete(
  model: LanguageModel,
  tokenizer: Tokenizer,
  prompts: readonly Prompt[],
  options: CompleteOptions = {},
): Promise<TextCompletion[]> {
  const all: TextCompletion[] = [];
  for await (const completion of completions(model, tokenizer, prompts, options)) all[completion.index] = completion;
  return all;
}

function batchOptions(tokenizer: Tokenizer, { batch, cache, chunk, signal }: CompleteOptions): BatchOptions {
  return {
    vocabSize: tokenizer.vocabSize,
    ...(cache === undefined ? {} : { cache }),
    ...(batch === undefined ? {} : { batch }),
    ...(chunk === undefined ? {} : { chunk }),
    ...(signal === undefined ? {} : { signal }),
  };
}

/** A request for {@link generateTokens} and what becomes of its tokens: for callers that batch in their own way. */
export function textRequest(
  tokenizer: Tokenizer,
  prompt: Prompt,
  options: Omit<TextOptions, CallOption>,
): { readonly request: TokenRequest; readonly text: TextWriter } {
  const text = textWriter(tokenizer.decoder({ skipSpecial: true }), options.stop);
  return { text, request: requestOf(tokenizer, prompt, options, text) };
}

function requestOf(tokenizer: Tokenizer, prompt: Prompt, options: TextOptions, text: TextWriter): TokenRequest {
  const ids = typeof prompt === 'string' ? encodePrompt(tokenizer, prompt) : prompt;
  if (ids.length === 0) {
    throw new DataError('generate: the prompt is empty and no begin token is put before it; give some text', {
      ...{ code: 'ERR_EMPTY', op: 'generate', argument: 'prompt' },
    });
  }
  const stopIds = [...(options.stopIds ?? []), ...(tokenizer.eos === undefined ? [] : [tokenizer.eos])];
  return { ...options, ids, stopIds, until: (id) => text.push(id) };
}

/** From ids to text. */
export interface TextWriter {
  /** Whether a stop text is complete. */
  push(id: number): boolean;
  /** What is certain since the last time. */
  take(): string;
  /** The rest. */
  end(): string;
}

/** From ids to text that ends before the first stop text. */
export function textWriter(decoder: TokenDecoder, stop: string | readonly string[] = []): TextWriter {
  const stops = typeof stop === 'string' ? [stop] : stop;
  for (const [i, text] of stops.entries()) check(`stop[${i}]`, JSON.stringify(text), text !== '', 'a text that is not empty');
  let ready = '';
  let held = ''; // may be the beginning of a stop text
  let stopped = false;
  const add = (text: string): void => {
    if (stopped) return;
    held += text;
    const found = stops.map((s) => held.indexOf(s)).filter((at) => at >= 0);
    if (found.length > 0) {
      stopped = true;
      ready += held.slice(0, Math.min(...found));
      held = '';
      return;
    }
    let keep = Math.min(held.length, Math.max(0, ...stops.map((s) => s.length - 1)));
    while (keep > 0 && !stops.some((s) => s.startsWith(held.slice(-keep)))) keep--;
    ready += held.slice(0, held.length - keep);
    held = held.slice(held.length - keep);
  };
  const take = (): string => {
    const text = ready;
    ready = '';
    return text;
  };
  return {
    push(id) {
      add(decoder.push(id));
      return stopped;
    },
    take,
    end() {
      add(decoder.end());
      ready += held;
      held = '';
      return take();
    },
  };
}

export interface GenerateOptions extends Omit<TextOptions, 'cache'> {
  /** A model folder, or the output folder of a run: its newest checkpoint. */
  readonly checkpoint: string;
  readonly prompt: Prompt;
  /** How the weights are kept. Default f32 on the CPU; bf16 takes half the memory and reads it in half the time. On a GPU bf16. */
  readonly dtype?: LoadOptions['dtype'];
  /** Matrices of few bits: `fp8`, `q8` or `q4` take 8.0, 8.5 or 4.25 bits an element. Default: as `dtype` says. */
  readonly weights?: LoadOptions['weights'];
  /** Where to compute, if the engine does not run yet. Default "cpu". */
  readonly device?: Device;
  /** Threads, if the engine does not run yet. Default: the cores of the machine. */
  readonly threads?: number;
}

/** A model, its tokenizer, and the options that its generation_config.json, or a GGUF file's metadata, asks for. */
export interface Generator {
  readonly model: LanguageModel;
  readonly tokenizer: Tokenizer;
  readonly defaults: TextOptions;
}

/** Loads what {@link streamText} needs from a checkpoint. The caller disposes of the model. @throws FormatError */
export async function loadGenerator({
  checkpoint,
  dtype,
  weights,
  device,
  threads,
}: Pick<GenerateOptions, 'checkpoint' | 'dtype' | 'weights' | 'device' | 'threads'>): Promise<Generator> {
  startFor('generate', { device, threads });
  const folder = await resolveCheckpoint(checkpoint);
  const { model, tokenizer, files } = await loadModel(folder, { dtype, weights });
  try {
    const name = 'generation_config.json';
    const text = files[name];
    return { model, tokenizer, defaults: text === undefined ? {} : parseGenerationConfig(text, join(folder, name)) };
  } catch (error) {
    model.dispose();
    throw error;
  }
}

/** {@link generateText} with the model of a folder; options that are not given come from its generation_config.json. */
export async function* generate(options: GenerateOptions): AsyncGenerator<string, void, undefined> {
  const { model, tokenizer, defaults } = await loadGenerator(options);
  try {
    yield* generateText(model, tokenizer, options.prompt, { ...defaults, ...options });
  } finally {
    model.dispose();
  }
}
