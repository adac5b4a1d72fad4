// Servers that speak OpenAI's protocol: vLLM, llama.cpp, LM Studio, `limbeck serve`, hosted ones.

import {
  type Abilities,
  type ChatMessage,
  type CompletionOptions,
  checkAbilities,
  completeInTwo,
  count,
  limiter,
  type Meter,
  type Provider,
  ProviderError,
  type Reply,
  type TokenScore,
  type Usage,
} from '../provider.ts';
import { type HttpOptions, httpClient } from './http.ts';

export interface OpenAIOptions extends HttpOptions {
  readonly model: string;
  /** Calls at work at once. Default 16. */
  readonly concurrency?: number;
  /**
   * What the server understands beyond OpenAI's own fields: `vllm` and `limbeck` take top_k, min_p, repetition_penalty, stop_token_ids
   * and structured_outputs, `llama.cpp` top_k, min_p, repeat_penalty and a grammar. Default `openai`: none of it.
   */
  readonly dialect?: 'openai' | 'vllm' | 'llama.cpp' | 'limbeck';
  /** Ask for the answer piece by piece. Default false. */
  readonly stream?: boolean;
}

/** A token with its log-probability, as chats of OpenAI's protocol and Ollama tell it. */
export interface ChatToken {
  readonly token: string;
  readonly logprob: number;
  readonly top_logprobs?: readonly { readonly token: string; readonly logprob: number }[];
}

interface Choice {
  text?: string;
  message?: { content?: string | null };
  delta?: { content?: string | null };
  finish_reason?: string | null;
  logprobs?: {
    tokens?: string[];
    token_logprobs?: (number | null)[];
    top_logprobs?: (Record<string, number> | null)[] | null;
    content?: ChatToken[] | null;
  } | null;
}

interface Answer {
  choices?: Choice[];
  usage?: { prompt_tokens?: number; completion_tokens?: number } | null;
}

/** A model behind a server of OpenAI's protocol. */
export function openaiProvider(options: OpenAIOptions): Provider {
  const { model, dialect = 'openai', concurrency = 16, stream = false } = options;
  const meter: Meter = { requests: 0, retries: 0, promptTokens: 0, completionTokens: 0 };
  const client = httpClient(options, () => meter.retries++);
  const limited = limiter(concurrency);
  const name = `openai:${model}`;
  const can: Abilities = {
    complete: true,
    chat: true,
    embed: true,
    logProbabilities: true,
    choices: dialect !== 'openai',
    bias: true,
    stopIds: dialect === 'vllm' || dialect === 'limbeck',
  };

  const fields = (sampling: CompletionOptions, chat: boolean): Record<string, unknown> => {
    checkAbilities(name, can, sampling);
    const { maxTokens = 512, temperature = 1, topP, topK, minP, repetitionPenalty, stop, stopIds, bias, seed } = sampling;
    const { choices, logProbabilities } = sampling;
    if (dialect === 'openai' && (topK !== undefined || minP !== undefined || repetitionPenalty !== undefined)) {
      throw new ProviderError(
        `${name}: OpenAI's protocol has no topK, minP or repetitionPenalty; leave them out or name a dialect`,
        {
          code: 'ERR_UNABLE',
          argument: 'dialect',
        },
      );
    }
    return {
      model,
      max_tokens: maxTokens,
      temperature,
      ...(topP === undefined ? {} : { top_p: topP }),
      ...(topK === undefined ? {} : { top_k: topK }),
      ...(minP === undefined ? {} : { min_p: minP }),
      ...(repetitionPenalty === undefined
        ? {}
        : { [dialect === 'llama.cpp' ? 'repeat_penalty' : 'repetition_penalty']: repetitionPenalty }),
      ...(stop?.length ? { stop } : {}),
      ...(stopIds?.length ? { stop_token_ids: stopIds } : {}),
      ...(bias === undefined ? {} : { logit_bias: bias }),
      ...(seed === undefined ? {} : { seed }),
      ...(choices?.length
        ? dialect === 'llama.cpp'
          ? { grammar: `root ::= ${choices.map((choice) => JSON.stringify(choice)).join(' | ')}` }
          : { structured_outputs: { choice: choices } }
        : {}),
      ...(logProbabilities === undefined
        ? {}
        : chat
          ? { logprobs: true, top_logprobs: logProbabilities }
          : { logprobs: logProbabilities }),
      ...(stream ? { stream: true, stream_options: { include_usage: true } } : {}),
    };
  };

  const ask = async (path: string, body: Record<string, unknown>, call: CompletionOptions): Promise<Reply> => {
    if (!stream) {
      const completion = read(path, (await client.json(path, body, call.signal)) as Answer);
      call.onText?.(completion.text);
      count(meter, completion.usage);
      return completion;
    }
    const text = ({ choices }: Answer): string => choices?.[0]?.text ?? choices?.[0]?.delta?.content ?? '';
    const isLast = ({ choices }: Answer): boolean => Boolean(choices?.[0]?.finish_reason);
    const parts = await client.parts<Answer>(path, body, { text, isLast, onText: call.onText }, call.signal);
    const completion = read(path, joined(parts));
    count(meter, completion.usage);
    return completion;
  };

  const read = (path: string, answer: Answer): Reply => {
    const choice = answer.choices?.[0];
    const text = choice?.text ?? choice?.message?.content;
    if (choice === undefined || typeof text !== 'string') {
      throw new ProviderError(`${options.url}/${path} answered without a text: ${JSON.stringify(answer).slice(0, 200)}`, {
        code: 'ERR_ANSWER',
        argument: options.url,
      });
    }
    const tokens = scoresOf(choice);
    return {
      text,
      finish: choice.finish_reason === 'length' ? 'length' : 'stop',
      usage: usageOf(answer),
      ...(tokens === undefined ? {} : { tokens }),
    };
  };

  const complete = (prompt: string, call: CompletionOptions): Promise<Reply> =>
    ask('completions', { ...fields(call, false), prompt }, call);

  return {
    name,
    model,
    can,
    concurrency,
    meter,
    complete: (prompt, call = {}) =>
      limited(() =>
        call.firstBias === undefined && call.firstTemperature === undefined
          ? complete(prompt, call)
          : completeInTwo(prompt, call, complete),
      ),
    chat(messages: readonly ChatMessage[], call = {}) {
      if (call.firstBias !== undefined || call.firstTemperature !== undefined) {
        return Promise.reject(
          new ProviderError(`${name}: the first token of a chat cannot be drawn in its own way; use complete()`, {
            code: 'ERR_UNABLE',
            argument: 'firstBias',
          }),
        );
      }
      return limited(() => ask('chat/completions', { ...fields(call, true), messages }, call));
    },
    embed: (texts, call = {}) =>
      limited(async () => {
        const body = { model, input: texts, encoding_format: 'float' };
        const answer = (await client.json('embeddings', body, call.signal)) as {
          data?: { index: number; embedding: number[] }[];
          usage?: NonNullable<Answer['usage']>;
        };
        if (answer.data?.length !== texts.length || answer.data.some((entry) => !Array.isArray(entry.embedding))) {
          throw new ProviderError(`${options.url}/embeddings: ${texts.length} texts went in, not as many vectors came out`, {
            code: 'ERR_ANSWER',
            argument: options.url,
          });
        }
        count(meter, usageOf(answer));
        const vectors: Float32Array[] = new Array(texts.length);
        for (const { index, embedding } of answer.data) vectors[index] = Float32Array.from(embedding);
        return vectors;
      }),
    dispose: async () => client.close(),
  };
}

function usageOf({ usage }: Answer): Usage {
  return { promptTokens: usage?.prompt_tokens ?? 0, completionTokens: usage?.completion_tokens ?? 0 };
}

export function tokenScore({ token, logprob, top_logprobs = [] }: ChatToken): TokenScore {
  const alternatives = top_logprobs.map((top) => ({ text: top.token, logProbability: top.logprob }));
  return { text: token, logProbability: logprob, alternatives };
}

function scoresOf({ logprobs }: Choice): TokenScore[] | undefined {
  if (logprobs?.content) {
    return logprobs.content.map(tokenScore);
  }
  return logprobs?.tokens?.map((text, i) => ({
    text,
    logProbability: logprobs.token_logprobs?.[i] ?? 0,
    alternatives: Object.entries(logprobs.top_logprobs?.[i] ?? {}).map(([t, logProbability]) => ({ text: t, logProbability })),
  }));
}

/** One answer from the parts of a stream. */
function joined(parts: readonly Answer[]): Answer {
  const choices = parts.flatMap((part) => part.choices?.[0] ?? []);
  const text = choices.map((choice) => choice.text ?? choice.delta?.content ?? '').join('');
  const finish = choices.findLast((choice) => choice.finish_reason)?.finish_reason ?? 'stop';
  const content = choices.flatMap((choice) => choice.logprobs?.content ?? []);
  const tokens = choices.flatMap((choice) => choice.logprobs?.tokens ?? []);
  const logprobs = content.length
    ? { content }
    : tokens.length
      ? {
          tokens,
          token_logprobs: choices.flatMap((choice) => choice.logprobs?.token_logprobs ?? []),
          top_logprobs: choices.flatMap((choice) => choice.logprobs?.top_logprobs ?? []),
        }
      : undefined;
  const usage = parts.findLast((part) => part.usage)?.usage;
  return { choices: [{ text, finish_reason: finish, ...(logprobs ? { logprobs } : {}) }], ...(usage ? { usage } : {}) };
}
