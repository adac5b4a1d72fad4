// A server that speaks OpenAI's protocol in front of any provider: a model of ours, a GGUF file, another server.

import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';
import { DataError, LimbeckError } from '../tensor/errors.ts';
import type { ChatMessage, CompletionOptions, Provider, Reply, TokenScore } from './provider.ts';

export interface ServeOptions {
  /** 0 takes any free one. Default 8080. */
  readonly port?: number;
  /** Default 127.0.0.1: this machine only. */
  readonly host?: string;
  /** Clients must send it as `Authorization: Bearer ...`. Default: none is asked for. */
  readonly key?: string;
  /** Told about each request when it is answered. */
  readonly onRequest?: (request: { readonly path: string; readonly status: number; readonly milliseconds: number }) => void;
}

/** A server that runs. */
export interface Serving {
  /** Address with `/v1`, as clients want it. */
  readonly url: string;
  /** Stops listening, ends what is under way, and leaves the provider to its owner. */
  close(): Promise<void>;
}

const mostBytes = 16 << 20;

/** Serves `/v1/models`, `/v1/completions`, `/v1/chat/completions` and `/v1/embeddings`. @throws DataError `ERR_PORT` where it cannot listen */
export async function serve(provider: Provider, options: ServeOptions = {}): Promise<Serving> {
  const { port = 8080, host = '127.0.0.1' } = options;
  const stopping = new AbortController();
  const server = createServer((request, response) => void answer(provider, options, stopping.signal, request, response));
  await new Promise<void>((resolve, reject) => {
    server.once('error', (error: NodeJS.ErrnoException) => {
      const why = error.code === 'EADDRINUSE' ? 'it is in use; give another' : error.message;
      reject(
        new DataError(`serve: cannot listen on port ${port} of ${host}: ${why}`, {
          code: 'ERR_PORT',
          op: 'serve',
          argument: error.code === 'EADDRINUSE' ? 'port' : 'host',
          actual: `${host}:${port}`,
          cause: error,
        }),
      );
    });
    server.listen(port, host, resolve);
  });
  const address = server.address() as AddressInfo;
  const named = address.family === 'IPv6' ? `[${address.address}]` : address.address;
  return {
    url: `http://${named}:${address.port}/v1`,
    close: () => close(server, stopping),
  };
}

function close(server: Server, stopping: AbortController): Promise<void> {
  stopping.abort();
  return new Promise((resolve) => {
    server.close(() => resolve());
    server.closeAllConnections();
  });
}

/** What a client did wrong, or what went wrong here, with the status that says so. */
class HttpFault extends Error {
  readonly status: number;
  readonly parameter: string | null;
  constructor(status: number, message: string, parameter: string | null = null) {
    super(message);
    this.status = status;
    this.parameter = parameter;
  }
}

async function answer(
  provider: Provider,
  options: ServeOptions,
  stopping: AbortSignal,
  request: IncomingMessage,
  response: ServerResponse,
): Promise<void> {
  const began = performance.now();
  const target = request.url ?? '/';
  const path = URL.canParse(target, 'http://localhost') ? new URL(target, 'http://localhost').pathname : target;
  // A client that hangs up no longer wants the text.
  const gone = new AbortController();
  response.on('close', () => gone.abort());
  const signal = AbortSignal.any([gone.signal, stopping]);
  try {
    if (options.key !== undefined && request.headers.authorization !== `Bearer ${options.key}`) {
      throw new HttpFault(401, 'the key is missing or wrong');
    }
    const method = path === '/v1/models' || path === `/v1/models/${provider.model}` || path === '/health' ? 'GET' : 'POST';
    const handler = handlers[path as keyof typeof handlers];
    if (method === 'POST' && handler === undefined) {
      throw new HttpFault(404, `there is no ${path}; there are /v1/models, ${Object.keys(handlers).join(', ')}`);
    }
    if (request.method !== method) throw new HttpFault(405, `${path} is asked with ${method}`);
    if (path === '/health') return send(response, 200, { status: 'ok' });
    if (path === '/v1/models') return send(response, 200, { object: 'list', data: [modelCard(provider)] });
    if (method === 'GET') return send(response, 200, modelCard(provider));
    const body = await readBody(request);
    if (typeof body.model === 'string' && body.model !== provider.model) {
      throw new HttpFault(404, `the model '${body.model}' does not exist here; there is ${provider.model}`, 'model');
    }
    await handler!(provider, body, signal, response);
  } catch (error) {
    if (gone.signal.aborted) return;
    // Nobody will get the other texts of the request.
    gone.abort();
    const { status, parameter } = faultOf(error);
    const shape = {
      error: {
        message: error instanceof Error ? error.message : String(error),
        type: status < 500 ? 'invalid_request_error' : 'server_error',
        param: parameter,
        code: LimbeckError.is(error) ? error.code : null,
      },
    };
    if (response.headersSent) response.end(`data: ${JSON.stringify(shape)}\n\n`);
    else send(response, status, shape);
  } finally {
    options.onRequest?.({ path, status: response.statusCode, milliseconds: performance.now() - began });
  }
}

/** What the caller can mend is his (400), all else is ours (500). */
function faultOf(error: unknown): { status: number; parameter: string | null } {
  if (error instanceof HttpFault) return error;
  const theirs = [
    'ERR_CONTEXT',
    'ERR_EMPTY',
    'ERR_CONFIG',
    'ERR_UNABLE',
    'ERR_TEMPLATE',
    'ERR_MESSAGE',
    'ERR_SEED',
    'ERR_TOKEN_RANGE',
  ];
  if (LimbeckError.is(error) && theirs.includes(error.code)) return { status: 400, parameter: error.argument ?? null };
  return { status: 500, parameter: null };
}

function send(response: ServerResponse, status: number, body: unknown): void {
  const text = JSON.stringify(body);
  response.writeHead(status, { 'content-type': 'application/json', 'content-length': Buffer.byteLength(text) });
  response.end(text);
}

async function readBody(request: IncomingMessage): Promise<Record<string, unknown>> {
  const parts: Buffer[] = [];
  let size = 0;
  for await (const part of request as AsyncIterable<Buffer>) {
    size += part.length;
    if (size > mostBytes) throw new HttpFault(413, `the request has more than ${mostBytes} bytes`);
    parts.push(part);
  }
  let value: unknown;
  try {
    value = JSON.parse(Buffer.concat(parts).toString('utf8'));
  } catch (error) {
    throw new HttpFault(400, `the request is not JSON: ${(error as Error).message}`);
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value))
    throw new HttpFault(400, 'the request is not an object');
  return value as Record<string, unknown>;
}

const started = Math.floor(Date.now() / 1000);
const modelCard = (provider: Provider) => ({ id: provider.model, object: 'model', created: started, owned_by: 'limbeck' });

let requests = 0;
const newId = (kind: string) => `${kind}-${started.toString(36)}${(requests++).toString(36).padStart(6, '0')}`;

const handlers = {
  '/v1/completions': completions,
  '/v1/chat/completions': chatCompletions,
  '/v1/embeddings': embeddings,
};

async function completions(
  provider: Provider,
  body: Record<string, unknown>,
  signal: AbortSignal,
  response: ServerResponse,
): Promise<void> {
  const prompts = typeof body.prompt === 'string' ? [body.prompt] : body.prompt;
  if (!Array.isArray(prompts) || prompts.length === 0 || prompts.some((prompt) => typeof prompt !== 'string')) {
    throw new HttpFault(400, 'prompt must be a text or a list of texts', 'prompt');
  }
  const copies = number(body, 'n', 1, 128, true) ?? 1;
  const score = number(body, 'logprobs', 0, 20, true);
  const sampling = samplingOf(body, score, 16);
  const asked = (prompts as string[]).flatMap((prompt) => Array.from({ length: copies }, () => prompt));
  const head = { id: newId('cmpl'), object: 'text_completion', created: Math.floor(Date.now() / 1000), model: provider.model };
  const echo = body.echo === true;
  const choice = (index: number, text: string, finish: string | null, tokens?: readonly TokenScore[]) => ({
    index,
    text,
    finish_reason: finish,
    logprobs: tokens === undefined ? null : legacyScores(tokens),
  });
  const run = (index: number, onText?: (text: string) => void) =>
    provider.complete(asked[index]!, { ...withSeed(sampling, index), signal, ...(onText ? { onText } : {}) });
  if (body.stream === true) {
    const usage = await streamed(response, asked.length, run, (index, text, finish, tokens) => ({
      ...head,
      choices: [choice(index, text, finish, tokens)],
    }));
    if (wantsUsage(body)) event(response, { ...head, choices: [], usage });
    response.end('data: [DONE]\n\n');
    return;
  }
  const done = await Promise.all(asked.map((_, index) => run(index)));
  const choices = done.map(({ text, finish, tokens }, i) => choice(i, echo ? asked[i]! + text : text, finish, tokens));
  send(response, 200, { ...head, choices, usage: usageOf(done) });
}

async function chatCompletions(
  provider: Provider,
  body: Record<string, unknown>,
  signal: AbortSignal,
  response: ServerResponse,
): Promise<void> {
  const messages = messagesOf(body.messages);
  const copies = number(body, 'n', 1, 128, true) ?? 1;
  const score = body.logprobs === true ? (number(body, 'top_logprobs', 0, 20, true) ?? 0) : undefined;
  const sampling = samplingOf(body, score, undefined);
  const created = Math.floor(Date.now() / 1000);
  const id = newId('chatcmpl');
  const scores = (tokens?: readonly TokenScore[]) => (tokens === undefined ? null : { content: tokens.map(chatScore) });
  const run = (index: number, onText?: (text: string) => void) =>
    provider.chat(messages, { ...withSeed(sampling, index), signal, ...(onText ? { onText } : {}) });
  if (body.stream === true) {
    const head = { id, object: 'chat.completion.chunk', created, model: provider.model };
    let first = true;
    const usage = await streamed(response, copies, run, (index, text, finish, tokens) => {
      const delta = finish === null ? { ...(first ? { role: 'assistant' } : {}), content: text } : {};
      first = false;
      return { ...head, choices: [{ index, delta, finish_reason: finish, logprobs: scores(tokens) }] };
    });
    if (wantsUsage(body)) event(response, { ...head, choices: [], usage });
    response.end('data: [DONE]\n\n');
    return;
  }
  const done = await Promise.all(Array.from({ length: copies }, (_, index) => run(index)));
  send(response, 200, {
    id,
    object: 'chat.completion',
    created,
    model: provider.model,
    choices: done.map(({ text, finish, tokens }, index) => ({
      index,
      message: { role: 'assistant', content: text, refusal: null },
      finish_reason: finish,
      logprobs: scores(tokens),
    })),
    usage: usageOf(done),
  });
}

async function embeddings(
  provider: Provider,
  body: Record<string, unknown>,
  signal: AbortSignal,
  response: ServerResponse,
): Promise<void> {
  const texts = typeof body.input === 'string' ? [body.input] : body.input;
  if (!Array.isArray(texts) || texts.length === 0 || texts.some((text) => typeof text !== 'string')) {
    throw new HttpFault(400, 'input must be a text or a list of texts', 'input');
  }
  const before = provider.meter.promptTokens;
  const vectors = await provider.embed(texts as string[], { signal });
  // The openai client asks for base64 unless told otherwise.
  const base64 = body.encoding_format === 'base64';
  const tokens = provider.meter.promptTokens - before;
  send(response, 200, {
    object: 'list',
    model: provider.model,
    data: vectors.map((vector, index) => ({
      object: 'embedding',
      index,
      embedding: base64
        ? Buffer.from(vector.buffer, vector.byteOffset, vector.byteLength).toString('base64')
        : Array.from(vector),
    })),
    usage: { prompt_tokens: tokens, total_tokens: tokens },
  });
}

type Frame = (index: number, text: string, finish: string | null, tokens?: readonly TokenScore[]) => unknown;

/** Sends pieces as they come, and the end of each choice with its scores. */
async function streamed(
  response: ServerResponse,
  count: number,
  run: (index: number, onText: (text: string) => void) => Promise<Reply>,
  frame: Frame,
) {
  const begin = () => {
    if (!response.headersSent) {
      response.writeHead(200, { 'content-type': 'text/event-stream', 'cache-control': 'no-cache', connection: 'keep-alive' });
    }
  };
  const done = await Promise.all(
    Array.from({ length: count }, async (_, index) => {
      const completion = await run(index, (text) => {
        begin();
        event(response, frame(index, text, null));
      });
      begin();
      event(response, frame(index, '', completion.finish, completion.tokens));
      return completion;
    }),
  );
  return usageOf(done);
}

function event(response: ServerResponse, value: unknown): void {
  // Another text of the request may have failed, and the answer ended, before this one has seen that it is not wanted.
  if (!response.writableEnded) response.write(`data: ${JSON.stringify(value)}\n\n`);
}

const wantsUsage = (body: Record<string, unknown>) =>
  (body.stream_options as { include_usage?: boolean } | undefined)?.include_usage === true;

function usageOf(done: readonly Reply[]) {
  const sum = (field: 'promptTokens' | 'completionTokens') => done.reduce((total, { usage }) => total + usage[field], 0);
  const [prompt, completion] = [sum('promptTokens'), sum('completionTokens')];
  return { prompt_tokens: prompt, completion_tokens: completion, total_tokens: prompt + completion };
}

const chatScore = ({ text, logProbability, alternatives }: TokenScore) => ({
  token: text,
  logprob: logProbability,
  bytes: [...Buffer.from(text)],
  top_logprobs: alternatives.map((a) => ({ token: a.text, logprob: a.logProbability, bytes: [...Buffer.from(a.text)] })),
});

function legacyScores(tokens: readonly TokenScore[]) {
  let at = 0;
  return {
    tokens: tokens.map((token) => token.text),
    token_logprobs: tokens.map((token) => token.logProbability),
    top_logprobs: tokens.map((token) => Object.fromEntries(token.alternatives.map((a) => [a.text, a.logProbability]))),
    text_offset: tokens.map((token) => {
      const from = at;
      at += token.text.length;
      return from;
    }),
  };
}

/** Copies of one prompt differ by their seed. */
function withSeed(sampling: CompletionOptions, index: number): CompletionOptions {
  return { ...sampling, seed: ((sampling.seed ?? 0) + index) % 2 ** 31 };
}

function samplingOf(body: Record<string, unknown>, score: number | undefined, maxTokens: number | undefined): CompletionOptions {
  const at = <K extends string, V>(name: K, value: V | undefined) => (value === undefined ? {} : { [name]: value });
  const { stop, logit_bias: bias, stop_token_ids: stopIds, structured_outputs: structured } = body;
  const stops = typeof stop === 'string' ? [stop] : (stop ?? []);
  if (!Array.isArray(stops) || stops.some((text) => typeof text !== 'string' || text === '')) {
    throw new HttpFault(400, 'stop must be a text or a list of texts, none of them empty', 'stop');
  }
  if (stopIds !== undefined && stopIds !== null && !(Array.isArray(stopIds) && stopIds.every(Number.isInteger))) {
    throw new HttpFault(400, 'stop_token_ids must be a list of whole numbers', 'stop_token_ids');
  }
  const choices = (structured as { choice?: unknown } | undefined)?.choice;
  if (choices !== undefined && !(Array.isArray(choices) && choices.every((choice) => typeof choice === 'string'))) {
    throw new HttpFault(400, 'structured_outputs.choice must be a list of texts', 'structured_outputs');
  }
  if (bias !== undefined && bias !== null && Object.values(bias as object).some((value) => typeof value !== 'number')) {
    throw new HttpFault(400, 'logit_bias must give a number to each token id', 'logit_bias');
  }
  const most = number(body, 'max_completion_tokens', 1, 1 << 20, true) ?? number(body, 'max_tokens', 1, 1 << 20, true);
  return {
    ...at('maxTokens', most ?? maxTokens),
    ...at('temperature', number(body, 'temperature', 0, 100)),
    ...at('topP', number(body, 'top_p', 0, 1)),
    ...at('topK', number(body, 'top_k', 0, 1 << 30, true) || undefined),
    ...at('minP', number(body, 'min_p', 0, 1)),
    ...at('repetitionPenalty', number(body, 'repetition_penalty', 0, 100)),
    ...at('seed', number(body, 'seed', 0, 2 ** 53 - 1, true) ?? Math.floor(Math.random() * 2 ** 31)),
    ...(stops.length > 0 ? { stop: stops as string[] } : {}),
    ...(stopIds ? { stopIds: stopIds as number[] } : {}),
    ...(bias ? { bias: bias as Record<number, number> } : {}),
    ...(choices === undefined ? {} : { choices: choices as string[] }),
    ...at('logProbabilities', score),
  };
}

function messagesOf(value: unknown): ChatMessage[] {
  if (!Array.isArray(value) || value.length === 0) throw new HttpFault(400, 'messages must be a list with a message', 'messages');
  return value.map((message: { role?: unknown; content?: unknown }, i) => {
    const content = Array.isArray(message?.content)
      ? message.content.map((part: { text?: unknown }) => part?.text).join('')
      : message?.content;
    const role = message?.role === 'developer' ? 'system' : message?.role;
    if (typeof content !== 'string' || (role !== 'system' && role !== 'user' && role !== 'assistant')) {
      throw new HttpFault(400, `messages[${i}] needs a role (system, user or assistant) and a text as content`, `messages[${i}]`);
    }
    return { role, content };
  });
}

/** A number of the request; null counts as absent. */
function number(body: Record<string, unknown>, name: string, least: number, most: number, whole = false): number | undefined {
  const value = body[name] ?? undefined;
  if (value === undefined) return undefined;
  if (typeof value !== 'number' || !(value >= least && value <= most) || (whole && !Number.isInteger(value))) {
    const kind = whole ? 'whole number' : 'number';
    throw new HttpFault(400, `${name} is ${JSON.stringify(value)}; it must be a ${kind} from ${least} to ${most}`, name);
  }
  return value;
}
