// JSON over HTTP, tried again where that may help.

import { type ClientRequest, type IncomingMessage, Agent as PlainAgent, request as plainRequest } from 'node:http';
import { Agent as SecureAgent, request as secureRequest } from 'node:https';
import { setTimeout as sleep } from 'node:timers/promises';
import { ProviderError } from '../provider.ts';

export interface HttpOptions {
  /** Address of the server with what its paths have in common, such as `http://127.0.0.1:8000/v1`. */
  readonly url: string;
  /** Sent as `Authorization: Bearer ...`. */
  readonly key?: string;
  readonly headers?: Readonly<Record<string, string>>;
  /** Milliseconds until an answer must be complete. Default 600,000. */
  readonly timeout?: number;
  /** Tries after the first, on 429, 5xx, and answers that never came or broke off. Default 5. */
  readonly retries?: number;
  /** Milliseconds before the first new try; each further one waits twice as long, at most 30 s. Default 500. */
  readonly backoff?: number;
}

/** A client of one server; connections are kept open. */
export interface HttpClient {
  /** Posts JSON, reads JSON. @throws ProviderError */
  json(path: string, body: unknown, signal?: AbortSignal): Promise<unknown>;
  /**
   * Posts JSON, reads an answer that comes in parts: events (`data: {...}`) or lines of JSON. It is whole when one part says so, or
   * `[DONE]` has come.
   * @throws ProviderError
   */
  parts<T>(path: string, body: unknown, reader: PartReader<T>, signal?: AbortSignal): Promise<T[]>;
  close(): void;
}

/** What the parts of a streamed answer mean. */
export interface PartReader<T> {
  text(part: T): string;
  isLast(part: T): boolean;
  /** Told each piece of text as it comes; once, however often the call is tried. */
  readonly onText: ((text: string) => void) | undefined;
}

export function httpClient(options: HttpOptions, onRetry: () => void): HttpClient {
  const { timeout = 600_000, retries = 5, backoff = 500 } = options;
  const base = new URL(options.url.endsWith('/') ? options.url : `${options.url}/`);
  const secure = base.protocol === 'https:';
  const agent = secure ? new SecureAgent({ keepAlive: true }) : new PlainAgent({ keepAlive: true });
  const headers = {
    'content-type': 'application/json',
    ...(options.key === undefined ? {} : { authorization: `Bearer ${options.key}` }),
    ...options.headers,
  };

  /** One try: the whole answer, its lines handed on as they come. */
  const once = (path: string, body: string, signal: AbortSignal | undefined, onLine?: (line: string) => void): Promise<string> =>
    new Promise((resolve, reject) => {
      const url = new URL(path, base);
      let request: ClientRequest | undefined;
      const fail = (error: unknown): void => {
        clearTimeout(clock);
        signal?.removeEventListener('abort', abort);
        request?.destroy();
        reject(error);
      };
      const abort = () => fail(signal!.reason);
      const clock = setTimeout(
        () => fail(broken(url, 'ERR_TIMEOUT', `did not answer completely within ${timeout} ms`, undefined)),
        timeout,
      );
      if (signal?.aborted) {
        fail(signal.reason);
        return;
      }
      signal?.addEventListener('abort', abort, { once: true });
      request = (secure ? secureRequest : plainRequest)(
        url,
        { method: 'POST', agent, headers: { ...headers, 'content-length': Buffer.byteLength(body) } },
        (response: IncomingMessage) => {
          let text = '';
          let rest = '';
          const good = response.statusCode! >= 200 && response.statusCode! < 300;
          response.setEncoding('utf8');
          response.on('data', (chunk: string) => {
            if (!good || onLine === undefined) {
              text += chunk;
              return;
            }
            try {
              const lines = (rest + chunk).split('\n');
              rest = lines.pop()!;
              for (const line of lines) onLine(line);
            } catch (error) {
              fail(error);
            }
          });
          response.on('error', (error) => fail(broken(url, 'ERR_CONNECTION', 'broke off in the middle of its answer', error)));
          response.on('aborted', () => fail(broken(url, 'ERR_CONNECTION', 'broke off in the middle of its answer', undefined)));
          response.on('end', () => {
            clearTimeout(clock);
            signal?.removeEventListener('abort', abort);
            if (!good) return reject(refused(url, response, text));
            try {
              if (rest !== '') onLine?.(rest);
              resolve(text);
            } catch (error) {
              reject(error);
            }
          });
        },
      );
      request.on('error', (error) => fail(broken(url, 'ERR_CONNECTION', `cannot be reached: ${error.message || error}`, error)));
      request.end(body);
    });

  const tried = async <T>(attempt: () => Promise<T>, signal: AbortSignal | undefined): Promise<T> => {
    for (let failed = 0; ; failed++) {
      try {
        return await attempt();
      } catch (error) {
        if (!(error instanceof ProviderError) || !error.retryable || failed >= retries) {
          throw error instanceof ProviderError && failed > 0 ? afterTries(error, failed + 1) : error;
        }
        onRetry();
        // A little by chance, so that many clients do not come back at the same moment.
        const wait = Math.min(30_000, backoff * 2 ** failed) * (0.75 + Math.random() / 2);
        await sleep(error.retryAfter === undefined ? wait : 1000 * error.retryAfter, undefined, signal ? { signal } : {}).catch(
          () => signal?.throwIfAborted(),
        );
      }
    }
  };

  return {
    json(path, body, signal) {
      const text = JSON.stringify(body);
      return tried(async () => {
        const answer = await once(path, text, signal);
        try {
          return JSON.parse(answer) as unknown;
        } catch (cause) {
          throw broken(new URL(path, base), 'ERR_ANSWER', `answered with what is not JSON: ${excerpt(answer)}`, cause);
        }
      }, signal);
    },
    parts<T>(path: string, body: unknown, { text, isLast, onText }: PartReader<T>, signal?: AbortSignal) {
      const request = JSON.stringify(body);
      let told = 0;
      return tried(async () => {
        const parts: T[] = [];
        let whole = false;
        let length = 0;
        await once(path, request, signal, (line) => {
          const isEvent = line.startsWith('data:');
          const data = (isEvent ? line.slice('data:'.length) : line).trim();
          if (data === '[DONE]') whole = true;
          // Events have names and remarks, and blank lines between them.
          if (data === '[DONE]' || !(isEvent || data.startsWith('{'))) return;
          const part = parsePart<T>(options.url, data);
          parts.push(part);
          whole ||= isLast(part);
          const piece = text(part);
          length += piece.length;
          if (length <= told) return;
          onText?.(piece.slice(told - length));
          told = length;
        });
        if (!whole) throw broken(options.url, 'ERR_STREAM', 'ended its stream in the middle', undefined);
        return parts;
      }, signal);
    },
    close: () => agent.destroy(),
  };
}

function parsePart<T>(url: string, data: string): T {
  let part: T & { error?: string | { message?: string } };
  try {
    part = JSON.parse(data) as typeof part;
  } catch (cause) {
    throw broken(url, 'ERR_ANSWER', `sent a part that is not JSON: ${excerpt(data)}`, cause);
  }
  const { error } = part;
  if (!error) return part;
  throw broken(url, 'ERR_ANSWER', `stopped with an error: ${typeof error === 'string' ? error : error.message}`, undefined);
}

/** A fault of the connection or of the server that may be gone next time. */
export function broken(url: URL | string, code: string, what: string, cause: unknown): ProviderError {
  return new ProviderError(`${url} ${what}`, { code, argument: String(url), retryable: true, ...(cause ? { cause } : {}) });
}

function refused(url: URL, response: IncomingMessage, text: string): ProviderError {
  const status = response.statusCode!;
  let why = excerpt(text);
  try {
    const { error } = JSON.parse(text) as { error?: { message?: string } | string };
    why = (typeof error === 'string' ? error : error?.message) ?? why;
  } catch {
    // Not every server explains itself in JSON.
  }
  const retryAfter = waitOf(response.headers['retry-after']);
  const hint = status === 404 ? '; is the address right, and the model there?' : status === 401 ? '; give a key' : '';
  return new ProviderError(`${url} answered ${status}: ${why}${hint}`, {
    code: 'ERR_STATUS',
    argument: String(url),
    actual: String(status),
    status,
    retryable: status === 429 || status >= 500,
    ...(retryAfter === undefined ? {} : { retryAfter }),
  });
}

/** Retry-After is in seconds or a date; nobody is made to wait more than five minutes. */
function waitOf(header: string | undefined): number | undefined {
  if (header === undefined) return undefined;
  const seconds = /^\s*\d+(\.\d+)?\s*$/.test(header) ? Number(header) : (Date.parse(header) - Date.now()) / 1000;
  return Number.isFinite(seconds) ? Math.min(300, Math.max(0, seconds)) : undefined;
}

function afterTries(error: ProviderError, tries: number): ProviderError {
  return new ProviderError(`${error.message} (${tries} tries)`, {
    code: error.code,
    cause: error,
    retryable: error.retryable,
    ...(error.argument === undefined ? {} : { argument: error.argument }),
    ...(error.actual === undefined ? {} : { actual: error.actual }),
    ...(error.status === undefined ? {} : { status: error.status }),
  });
}

function excerpt(text: string): string {
  const line = text.replaceAll(/\s+/g, ' ').trim();
  return line.length > 200 ? `${line.slice(0, 200)}…` : line || 'nothing';
}
