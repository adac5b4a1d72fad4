// What a language model can do for us, wherever it runs: continue a prompt, answer a conversation, embed texts.

import { LimbeckError } from '../tensor/errors.ts';
import { type ChatTemplate, escapeMessages } from '../tokenizer/chat.ts';
import type { AddedTokens } from '../tokenizer/escape.ts';

/** A turn of a conversation. */
export type ChatMessage = { readonly role: 'system' | 'user' | 'assistant'; readonly content: string };

/** How a text is drawn. A backend that cannot do what is asked for refuses; none ignores it. */
export interface Sampling {
  /** Most new tokens. Default 512. */
  readonly maxTokens?: number;
  /** 0 takes the likeliest token. Default 1. */
  readonly temperature?: number;
  /** Draw from the likeliest tokens that hold this share of the probability. Default 1. */
  readonly topP?: number;
  /** Draw from the k likeliest tokens only. Default: all. */
  readonly topK?: number;
  /** Draw from tokens at least this share as likely as the likeliest. Default 0. */
  readonly minP?: number;
  /** Divides the logits of tokens that are there already. Default 1. */
  readonly repetitionPenalty?: number;
  /** Texts that end the output; they are no part of it. */
  readonly stop?: readonly string[];
  /** Tokens that end the output, beside the model's own. */
  readonly stopIds?: readonly number[];
  /** Added to the logits of tokens, by id. */
  readonly bias?: Readonly<Record<number, number>>;
  /** The same for the first token only. */
  readonly firstBias?: Readonly<Record<number, number>>;
  /** Temperature of the first token only. */
  readonly firstTemperature?: number;
  /** The output is exactly one of these. */
  readonly choices?: readonly string[];
  /** Report each token's log-probability, and those of so many alternatives. Default: none reported. */
  readonly logProbabilities?: number;
  /** Same seed, same text. Default 0. */
  readonly seed?: number;
}

/** What one call may be told beside the prompt. */
export interface CompletionOptions extends Sampling {
  readonly signal?: AbortSignal;
  /** Told each piece of text as it comes. */
  readonly onText?: (text: string) => void;
}

/** Tokens that went in and came out, as the backend counts them. */
export interface Usage {
  readonly promptTokens: number;
  readonly completionTokens: number;
}

/** A token of an output, and what else might have stood there. */
export interface TokenScore {
  readonly text: string;
  /** Natural logarithm of its probability at temperature 1. */
  readonly logProbability: number;
  readonly alternatives: readonly { readonly text: string; readonly logProbability: number }[];
}

export interface Reply {
  readonly text: string;
  /** `stop`: the model ended, or a stop text came; `length`: it was cut off. */
  readonly finish: 'stop' | 'length';
  readonly usage: Usage;
  /** With `logProbabilities`. */
  readonly tokens?: readonly TokenScore[];
}

/** What a backend can do; a stage asks before it begins. */
export interface Abilities {
  /** Continues a prompt as it stands, special tokens included. */
  readonly complete: boolean;
  readonly chat: boolean;
  readonly embed: boolean;
  readonly logProbabilities: boolean;
  /** `choices`, by constrained decoding. */
  readonly choices: boolean;
  /** `bias` and `firstBias`. */
  readonly bias: boolean;
  /** `stopIds`. */
  readonly stopIds: boolean;
}

/** What a provider has used since it was made. */
export interface Meter {
  requests: number;
  retries: number;
  promptTokens: number;
  completionTokens: number;
}

/** A model behind a backend. Calls may be made at any rate: it holds them back to `concurrency`, and batches where it can. */
export interface Provider {
  /** Backend and model: part of what decides whether a stage runs again. */
  readonly name: string;
  readonly model: string;
  readonly can: Abilities;
  /** Calls at work at once. */
  readonly concurrency: number;
  readonly meter: Readonly<Meter>;
  /** The chat template, where it is known here. */
  readonly template?: ChatTemplate;
  /** Continues `prompt` as it stands. @throws ProviderError */
  complete(prompt: string, options?: CompletionOptions): Promise<Reply>;
  /** The next turn of a conversation. @throws ProviderError */
  chat(messages: readonly ChatMessage[], options?: CompletionOptions): Promise<Reply>;
  /** A vector for each text. @throws ProviderError */
  embed(texts: readonly string[], options?: { readonly signal?: AbortSignal }): Promise<Float32Array[]>;
  dispose(): Promise<void>;
}

/** A backend did not answer, or not in a way that can be used. */
export class ProviderError extends LimbeckError {
  /** HTTP status, where there was one. */
  readonly status: number | undefined;
  /** Trying again may help. */
  readonly retryable: boolean;
  /** Seconds that the server asked to wait. */
  readonly retryAfter: number | undefined;

  constructor(
    message: string,
    data: {
      code: string;
      argument?: string;
      actual?: string;
      cause?: unknown;
      status?: number;
      retryable?: boolean;
      retryAfter?: number;
    },
  ) {
    super(message, { op: 'provider', ...data });
    this.status = data.status;
    this.retryable = data.retryable ?? false;
    this.retryAfter = data.retryAfter;
  }
}

/** Whether a call was refused because its prompt has no room in the model's context: the fault of one record, not of the run. */
export function isTooLong(error: unknown): boolean {
  if (!LimbeckError.is(error)) return false;
  if (error.code === 'ERR_CONTEXT') return true;
  const status = error instanceof ProviderError ? error.status : undefined;
  return status === 413 || (status === 400 && /context|too long|maximum.*(length|tokens)/i.test(error.message));
}

/** What a backend says when it is asked for what it cannot do. */
export function unable(provider: string, what: string, advice: string): ProviderError {
  return new ProviderError(`${provider} cannot ${what}; ${advice}`, { code: 'ERR_UNABLE', argument: what });
}

/** Abilities that a call needs and the backend lacks are refused. @throws ProviderError `ERR_UNABLE` */
export function checkAbilities(name: string, can: Abilities, sampling: Sampling): void {
  const has = (value: object | undefined) => value !== undefined && Object.keys(value).length > 0;
  if ((has(sampling.bias) || has(sampling.firstBias)) && !can.bias) {
    throw unable(name, 'change the scores of tokens (bias, firstBias)', 'leave them out or use another backend');
  }
  if (has(sampling.choices) && !can.choices) {
    throw unable(name, 'hold its output to given texts (choices)', 'leave them out and check the answer, or use another backend');
  }
  if (has(sampling.stopIds) && !can.stopIds) {
    throw unable(name, 'stop at token ids (stopIds)', 'give the texts of these tokens as `stop`');
  }
  if (sampling.logProbabilities !== undefined && !can.logProbabilities) {
    throw unable(name, 'report log-probabilities', 'leave them out or use another backend');
  }
}

/**
 * A conversation as a call of `complete`, for backends without a template of their own: it stops at the text that ends a turn, and
 * at its token, where the text is one, since a special token has no text.
 * @throws ProviderError `ERR_UNSUPPORTED` without a template
 */
export function chatCall(
  name: string,
  template: ChatTemplate | undefined,
  tokenizer: AddedTokens & { id(text: string): number | undefined },
  messages: readonly ChatMessage[],
  call: CompletionOptions,
): { prompt: string; call: CompletionOptions } {
  if (template === undefined) {
    throw unable(name, 'answer a conversation', 'the model has no chat template; give one, or the name of a style');
  }
  const { turnEnd } = template;
  const prompt = template.render(escapeMessages(tokenizer, messages), { addGenerationPrompt: true });
  if (turnEnd === '') return { prompt, call };
  const id = tokenizer.id(turnEnd);
  return {
    prompt,
    call: {
      ...call,
      stop: [...(call.stop ?? []), turnEnd],
      ...(id === undefined ? {} : { stopIds: [...(call.stopIds ?? []), id] }),
    },
  };
}

/** At most `count` of the calls run at once; the others wait in the order in which they came. */
export function limiter(count: number): <T>(run: () => Promise<T>) => Promise<T> {
  let free = count;
  const waiting: (() => void)[] = [];
  return async (run) => {
    if (free > 0) free--;
    else await new Promise<void>((resolve) => waiting.push(resolve));
    try {
      return await run();
    } finally {
      const next = waiting.shift();
      if (next === undefined) free++;
      else next();
    }
  };
}

/** Adds a call to what was used. */
export function count(meter: Meter, usage: Usage): void {
  meter.requests++;
  meter.promptTokens += usage.promptTokens;
  meter.completionTokens += usage.completionTokens;
}

/**
 * A first token drawn in its own way, then the rest, for backends that know one way for all tokens: two calls, the second of
 * which goes on from the first token's text.
 */
export async function completeInTwo(
  prompt: string,
  { firstBias, firstTemperature, ...options }: CompletionOptions,
  complete: (prompt: string, options: CompletionOptions) => Promise<Reply>,
): Promise<Reply> {
  const { maxTokens = 512, bias, temperature } = options;
  const first = await complete(prompt, {
    ...options,
    maxTokens: 1,
    ...(firstBias === undefined && bias === undefined ? {} : { bias: { ...bias, ...firstBias } }),
    ...(firstTemperature === undefined && temperature === undefined ? {} : { temperature: firstTemperature ?? temperature! }),
  });
  if (first.finish === 'stop' || maxTokens === 1) return first;
  const rest = await complete(prompt + first.text, { ...options, maxTokens: maxTokens - 1 });
  return {
    text: first.text + rest.text,
    finish: rest.finish,
    usage: {
      promptTokens: first.usage.promptTokens,
      completionTokens: first.usage.completionTokens + rest.usage.completionTokens,
    },
    ...(first.tokens && rest.tokens ? { tokens: [...first.tokens, ...rest.tokens] } : {}),
  };
}
