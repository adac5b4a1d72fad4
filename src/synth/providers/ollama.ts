// Models of an Ollama server, whose raw mode takes a prompt as it stands.

import {
  type Abilities,
  type CompletionOptions,
  checkAbilities,
  completeInTwo,
  count,
  limiter,
  type Meter,
  type Provider,
  ProviderError,
  type Reply,
} from '../provider.ts';
import { type HttpOptions, httpClient } from './http.ts';
import { type ChatToken, tokenScore } from './openai.ts';

export interface OllamaOptions extends Omit<HttpOptions, 'url'> {
  /** Address of the server. Default `http://127.0.0.1:11434`. */
  readonly url?: string;
  readonly model: string;
  /** Calls at work at once; the server decides how many of them run side by side. Default 4. */
  readonly concurrency?: number;
  /** Tokens of context that the server reserves. Default: the server's own. */
  readonly context?: number;
  /** Ask for the answer piece by piece. Default false. */
  readonly stream?: boolean;
}

interface Answer {
  response?: string;
  message?: { content?: string };
  done?: boolean;
  done_reason?: string;
  prompt_eval_count?: number;
  eval_count?: number;
  logprobs?: ChatToken[];
}

/** A model behind an Ollama server. */
export function ollamaProvider(options: OllamaOptions): Provider {
  const { model, url = 'http://127.0.0.1:11434', concurrency = 4, context, stream = false } = options;
  const meter: Meter = { requests: 0, retries: 0, promptTokens: 0, completionTokens: 0 };
  const client = httpClient({ ...options, url }, () => meter.retries++);
  const limited = limiter(concurrency);
  const name = `ollama:${model}`;
  const can: Abilities = {
    complete: true,
    chat: true,
    embed: true,
    logProbabilities: true,
    choices: true,
    bias: false,
    stopIds: false,
  };

  // Ollama reads sampling from `options` only; at the top level it is silently ignored.
  const fields = (call: CompletionOptions): Record<string, unknown> => {
    checkAbilities(name, can, call);
    const { maxTokens = 512, temperature = 1, topP = 1, topK = 0, minP = 0, repetitionPenalty = 1, stop, seed, choices } = call;
    return {
      model,
      stream,
      options: {
        num_predict: maxTokens,
        temperature,
        top_p: topP,
        top_k: topK,
        min_p: minP,
        repeat_penalty: repetitionPenalty,
        ...(stop?.length ? { stop } : {}),
        ...(seed === undefined ? {} : { seed }),
        ...(context === undefined ? {} : { num_ctx: context }),
      },
      ...(choices?.length ? { format: { type: 'string', enum: choices } } : {}),
      ...(call.logProbabilities === undefined ? {} : { logprobs: true, top_logprobs: call.logProbabilities }),
    };
  };

  const ask = async (path: string, body: Record<string, unknown>, call: CompletionOptions): Promise<Reply> => {
    const piece = ({ response, message }: Answer): string | undefined => response ?? message?.content;
    const reader = {
      text: (part: Answer) => piece(part) ?? '',
      isLast: ({ done }: Answer) => done === true,
      onText: call.onText,
    };
    const answers = stream
      ? await client.parts<Answer>(path, body, reader, call.signal)
      : [(await client.json(path, body, call.signal)) as Answer];
    const last = answers.at(-1)!;
    const pieces = answers.map(piece);
    if (pieces.every((piece) => piece === undefined)) {
      throw new ProviderError(`${url}/${path} answered without a text: ${JSON.stringify(last).slice(0, 200)}`, {
        code: 'ERR_ANSWER',
        argument: url,
      });
    }
    const text = pieces.join('');
    const tokens = answers.flatMap(({ logprobs = [] }) => logprobs.map(tokenScore));
    const usage = { promptTokens: last.prompt_eval_count ?? 0, completionTokens: last.eval_count ?? 0 };
    count(meter, usage);
    const completion: Reply = {
      text: call.choices?.length ? unquoted(text) : text,
      finish: last.done_reason === 'length' ? 'length' : 'stop',
      usage,
      ...(call.logProbabilities === undefined || tokens.length === 0 ? {} : { tokens }),
    };
    if (!stream) call.onText?.(completion.text);
    return completion;
  };

  const complete = (prompt: string, call: CompletionOptions): Promise<Reply> =>
    ask('api/generate', { ...fields(call), prompt, raw: true }, call);

  return {
    name,
    model,
    can,
    concurrency,
    meter,
    complete: (prompt, call = {}) =>
      limited(() => (call.firstTemperature === undefined ? complete(prompt, call) : completeInTwo(prompt, call, complete))),
    chat: (messages, call = {}) => limited(() => ask('api/chat', { ...fields(call), messages }, call)),
    embed: (texts, call = {}) =>
      limited(async () => {
        const answer = (await client.json('api/embed', { model, input: texts }, call.signal)) as {
          embeddings?: number[][];
          prompt_eval_count?: number;
        };
        if (answer.embeddings?.length !== texts.length) {
          throw new ProviderError(`${url}/api/embed: ${texts.length} texts went in, not as many vectors came out`, {
            code: 'ERR_ANSWER',
            argument: url,
          });
        }
        count(meter, { promptTokens: answer.prompt_eval_count ?? 0, completionTokens: 0 });
        return answer.embeddings.map((vector) => Float32Array.from(vector));
      }),
    dispose: async () => client.close(),
  };
}

/** An answer that was held to a JSON Schema of strings is a JSON string. */
function unquoted(text: string): string {
  try {
    const value: unknown = JSON.parse(text);
    return typeof value === 'string' ? value : text;
  } catch {
    return text;
  }
}
