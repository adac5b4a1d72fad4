// Providers for tests: one that answers by a function, and servers whose every answer a test decides.
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';
import {
  type Abilities,
  type ChatMessage,
  type CompletionOptions,
  limiter,
  type Provider,
  type Reply,
} from '../../src/synth/provider.ts';

type Answer = string | Partial<Reply>;

export interface Script {
  complete?(prompt: string, options: CompletionOptions): Answer | Promise<Answer>;
  chat?(messages: readonly ChatMessage[], options: CompletionOptions): Answer | Promise<Answer>;
  embed?(texts: readonly string[]): Float32Array[];
  can?: Partial<Abilities>;
  concurrency?: number;
}

/** A provider that does what the script says; tokens are words. */
export function scripted(script: Script): Provider {
  const meter = { requests: 0, retries: 0, promptTokens: 0, completionTokens: 0 };
  const limited = limiter(script.concurrency ?? 4);
  const words = (text: string) => text.split(/\s+/).filter((word) => word !== '').length;
  const finish = (prompt: string, answer: Answer, options: CompletionOptions): Reply => {
    options.signal?.throwIfAborted();
    const given = typeof answer === 'string' ? { text: answer } : answer;
    const text = given.text ?? '';
    const usage = { promptTokens: words(prompt), completionTokens: words(text) };
    meter.requests++;
    meter.promptTokens += usage.promptTokens;
    meter.completionTokens += usage.completionTokens;
    for (const piece of text.match(/\s*\S+\s*/g) ?? []) options.onText?.(piece);
    return { text, finish: 'stop', usage, ...given };
  };
  const none = (): never => {
    throw new Error('not in the script');
  };
  return {
    name: 'scripted',
    model: 'scripted',
    can: {
      complete: true,
      chat: true,
      embed: true,
      logProbabilities: true,
      choices: true,
      bias: true,
      stopIds: true,
      ...script.can,
    },
    concurrency: script.concurrency ?? 4,
    meter,
    complete: (prompt, options = {}) =>
      limited(async () => finish(prompt, await (script.complete ?? none)(prompt, options), options)),
    chat: (messages, options = {}) =>
      limited(async () =>
        finish(messages.map((m) => m.content).join('\n'), await (script.chat ?? none)(messages, options), options),
      ),
    embed: async (texts) => (script.embed ?? none)(texts),
    dispose: async () => {},
  };
}

export interface Exchange {
  readonly path: string;
  readonly body: Record<string, unknown>;
  /** Requests that came before this one. */
  readonly before: number;
  readonly request: IncomingMessage;
  readonly response: ServerResponse;
}

/** A server on the loopback; gives its address and how to end it. */
export async function loopback(answer: (exchange: Exchange) => void | Promise<void>) {
  let before = 0;
  const server = createServer(async (request, response) => {
    const parts: Buffer[] = [];
    for await (const part of request) parts.push(part as Buffer);
    const body = JSON.parse(Buffer.concat(parts).toString() || '{}') as Record<string, unknown>;
    await answer({ path: request.url!, body, before: before++, request, response });
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const { port } = server.address() as AddressInfo;
  return {
    url: `http://127.0.0.1:${port}/v1`,
    get requests() {
      return before;
    },
    close: () =>
      new Promise<void>((resolve) => {
        server.close(() => resolve());
        server.closeAllConnections();
      }),
  };
}

export function json(response: ServerResponse, value: unknown, status = 200, headers: Record<string, string> = {}): void {
  response.writeHead(status, { 'content-type': 'application/json', ...headers });
  response.end(typeof value === 'string' ? value : JSON.stringify(value));
}

/** An answer of OpenAI's completions. */
export const completion = (text: string, finish = 'stop') => ({
  choices: [{ index: 0, text, finish_reason: finish }],
  usage: { prompt_tokens: 3, completion_tokens: 5, total_tokens: 8 },
});
