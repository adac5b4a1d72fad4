import { afterEach, describe, expect, test } from 'vitest';
import type { Provider, ProviderError } from '../../src/synth/provider.ts';
import { ollamaProvider } from '../../src/synth/providers/ollama.ts';
import { type OpenAIOptions, openaiProvider } from '../../src/synth/providers/openai.ts';
import { completion, type Exchange, json, loopback } from './scripted.ts';

const open: { dispose?(): Promise<void>; close?(): Promise<void> }[] = [];
afterEach(async () => {
  for (const one of open.splice(0)) await (one.dispose ?? one.close)?.call(one);
});

async function against(answer: (exchange: Exchange) => void | Promise<void>, options: Partial<OpenAIOptions> = {}) {
  const server = await loopback(answer);
  const provider = openaiProvider({ url: server.url, model: 'm', backoff: 1, ...options });
  open.push(provider, server);
  return { server, provider };
}

const failure = (promise: Promise<unknown>): Promise<ProviderError> =>
  promise.then(
    () => expect.fail('did not fail'),
    (error) => error,
  );

describe('OpenAI', () => {
  test('what is asked for goes into the request, and the answer comes back with its tokens', async () => {
    const seen: unknown[] = [];
    const { provider } = await against(({ path, body, response }) => {
      seen.push([path, body]);
      json(response, completion('an answer', 'length'));
    });
    const sampling = { maxTokens: 7, temperature: 0.5, topP: 0.9, stop: ['\n'], seed: 11, bias: { 3: -100 } };
    expect(await provider.complete('<s>[INST] ', sampling)).toEqual({
      text: 'an answer',
      finish: 'length',
      usage: { promptTokens: 3, completionTokens: 5 },
    });
    expect(seen).toEqual([
      [
        '/v1/completions',
        {
          model: 'm',
          prompt: '<s>[INST] ',
          max_tokens: 7,
          temperature: 0.5,
          top_p: 0.9,
          stop: ['\n'],
          seed: 11,
          logit_bias: { 3: -100 },
        },
      ],
    ]);
    expect(provider.meter).toEqual({ requests: 1, retries: 0, promptTokens: 3, completionTokens: 5 });
  });

  test('what OpenAI has no word for is refused, and said in a dialect that has one', async () => {
    const bodies: Record<string, unknown>[] = [];
    const answer = ({ body, response }: Exchange) => {
      bodies.push(body);
      json(response, completion('a'));
    };
    const plain = await against(answer);
    for (const sampling of [{ topK: 3 }, { choices: ['a'] }, { stopIds: [1] }]) {
      expect(await failure(plain.provider.complete('x', sampling))).toMatchObject({ code: 'ERR_UNABLE', retryable: false });
    }
    const vllm = await against(answer, { dialect: 'vllm' });
    await vllm.provider.complete('x', { topK: 3, choices: ['a', 'b'], stopIds: [1, 2], repetitionPenalty: 1.1 });
    expect(bodies).toHaveLength(1);
    expect(bodies[0]).toMatchObject({
      top_k: 3,
      structured_outputs: { choice: ['a', 'b'] },
      stop_token_ids: [1, 2],
      repetition_penalty: 1.1,
    });
    const llama = await against(answer, { dialect: 'llama.cpp' });
    await llama.provider.complete('x', { choices: ['a', 'b"c'] });
    expect(bodies[1]).toMatchObject({ grammar: 'root ::= "a" | "b\\"c"' });
  });

  test('a first token of its own takes two calls', async () => {
    const bodies: Record<string, unknown>[] = [];
    const { provider } = await against(({ body, response }) => {
      bodies.push(body);
      json(response, body.max_tokens === 1 ? completion('Why', 'length') : completion(' is it?'));
    });
    const { text } = await provider.complete('User: ', {
      maxTokens: 9,
      firstBias: { 2: -1e4 },
      firstTemperature: 1.2,
      temperature: 1,
    });
    expect(text).toBe('Why is it?');
    expect(bodies).toMatchObject([
      { prompt: 'User: ', max_tokens: 1, temperature: 1.2, logit_bias: { 2: -1e4 } },
      { prompt: 'User: Why', max_tokens: 8, temperature: 1 },
    ]);
    expect(bodies[1]).not.toHaveProperty('logit_bias');
  });

  test('log-probabilities in both shapes', async () => {
    const { provider } = await against(({ path, response }) =>
      json(
        response,
        path === '/v1/completions'
          ? {
              choices: [
                {
                  text: 'ab',
                  finish_reason: 'stop',
                  logprobs: { tokens: ['a', 'b'], token_logprobs: [-1, -2], top_logprobs: [{ a: -1, c: -3 }, null] },
                },
              ],
            }
          : {
              choices: [
                {
                  message: { content: 'a' },
                  finish_reason: 'stop',
                  logprobs: { content: [{ token: 'a', logprob: -1, top_logprobs: [{ token: 'c', logprob: -3 }] }] },
                },
              ],
            },
      ),
    );
    expect((await provider.complete('x', { logProbabilities: 2 })).tokens).toEqual([
      {
        text: 'a',
        logProbability: -1,
        alternatives: [
          { text: 'a', logProbability: -1 },
          { text: 'c', logProbability: -3 },
        ],
      },
      { text: 'b', logProbability: -2, alternatives: [] },
    ]);
    expect((await provider.chat([{ role: 'user', content: 'x' }], { logProbabilities: 2 })).tokens).toEqual([
      { text: 'a', logProbability: -1, alternatives: [{ text: 'c', logProbability: -3 }] },
    ]);
  });

  test('vectors come back in the order of the texts', async () => {
    const { provider } = await against(({ response }) =>
      json(response, {
        data: [
          { index: 1, embedding: [3, 4] },
          { index: 0, embedding: [1, 2] },
        ],
        usage: { prompt_tokens: 2 },
      }),
    );
    expect(await provider.embed(['a', 'b'])).toEqual([Float32Array.of(1, 2), Float32Array.of(3, 4)]);
    expect(await failure(provider.embed(['a']))).toMatchObject({ code: 'ERR_ANSWER' });
  });
});

describe('faults of a server', () => {
  test('429, 500 and a connection that breaks are tried again; the meter counts', async () => {
    const { provider, server } = await against(({ before, request, response }) => {
      if (before === 0) json(response, { error: { message: 'slow down' } }, 429);
      else if (before === 1) json(response, 'oops', 500);
      else if (before === 2) request.socket.destroy();
      else if (before === 3) json(response, '{"choices":[');
      else if (before === 4) {
        response.writeHead(200, { 'content-length': 100 });
        response.write('{"choices"');
        setTimeout(() => request.socket.destroy(), 5);
      } else json(response, completion('at last'));
    });
    expect((await provider.complete('x')).text).toBe('at last');
    expect([server.requests, provider.meter.retries]).toEqual([6, 5]);
  });

  test('Retry-After is waited for', async () => {
    const { provider } = await against(({ before, response }) =>
      before === 0 ? json(response, {}, 429, { 'retry-after': '0.3' }) : json(response, completion('a')),
    );
    const began = performance.now();
    await provider.complete('x');
    expect(performance.now() - began).toBeGreaterThan(280);
  });

  test('400 is not tried again, and its reason is told', async () => {
    const { provider, server } = await against(({ response }) => json(response, { error: { message: 'prompt too long' } }, 400));
    expect(await failure(provider.complete('x'))).toMatchObject({
      code: 'ERR_STATUS',
      status: 400,
      message: expect.stringContaining('prompt too long'),
    });
    expect(server.requests).toBe(1);
  });

  test('tries end', async () => {
    const { provider, server } = await against(({ response }) => json(response, {}, 503), { retries: 2 });
    expect(await failure(provider.complete('x'))).toMatchObject({
      status: 503,
      retryable: true,
      message: expect.stringContaining('3 tries'),
    });
    expect(server.requests).toBe(3);
  });

  test('a server that is down', async () => {
    const server = await loopback(() => {});
    await server.close();
    const provider = openaiProvider({ url: server.url, model: 'm', retries: 1, backoff: 1 });
    open.push(provider);
    expect(await failure(provider.complete('x'))).toMatchObject({
      code: 'ERR_CONNECTION',
      retryable: true,
      message: expect.stringContaining('ECONNREFUSED'),
    });
  });

  test('a server that is slow', async () => {
    const { provider } = await against(() => {}, { timeout: 60, retries: 0 });
    expect(await failure(provider.complete('x'))).toMatchObject({
      code: 'ERR_TIMEOUT',
      message: expect.stringContaining('60 ms'),
    });
  });

  test('an AbortSignal ends the call, the wait before a new try and the queue', async () => {
    const { provider } = await against(({ response, before }) => (before === 0 ? json(response, {}, 500) : undefined), {
      backoff: 60_000,
      concurrency: 1,
    });
    const controller = new AbortController();
    const calls = [1, 2].map(() => failure(provider.complete('x', { signal: controller.signal })));
    setTimeout(() => controller.abort(new Error('enough')), 30);
    for (const error of await Promise.all(calls)) expect(error.message).toBe('enough');
  });

  test.each([
    ['half a stream', 'data: {"choices":[{"text":"ha"}]}\n\n', 'ERR_STREAM'],
    ['an event that is not JSON', 'data: {"choices"\n\n', 'ERR_ANSWER'],
    ['an error inside', 'data: {"error":{"message":"gone"}}\n\n', 'ERR_ANSWER'],
  ])('%s is tried again, and nothing of it stays', async (_, begun, code) => {
    const whole =
      ': ready\nevent: piece\ndata: {"choices":[{"text":"hal"}]}\n\ndata: {"choices":[{"text":"lo","finish_reason":"stop"}]}\n\ndata: [DONE]\n\n';
    const { provider } = await against(
      ({ before, response }) => {
        response.writeHead(200, { 'content-type': 'text/event-stream' });
        response.end(before < 2 ? begun : whole);
      },
      { stream: true },
    );
    const pieces: string[] = [];
    expect((await provider.complete('x', { onText: (piece) => pieces.push(piece) })).text).toBe('hallo');
    expect(pieces.join('')).toBe('hallo');
    expect(provider.meter.retries).toBe(2);
    const broken = await against(({ response }) => void response.end(begun), { stream: true, retries: 0 });
    expect(await failure(broken.provider.complete('x'))).toMatchObject({ code, retryable: true });
  });

  test('an answer without a text', async () => {
    const { provider } = await against(({ response }) => json(response, { choices: [] }), { retries: 0 });
    expect(await failure(provider.complete('x'))).toMatchObject({ code: 'ERR_ANSWER' });
  });
});

describe('Ollama', () => {
  const ollama = async (answer: (exchange: Exchange) => void, stream = false): Promise<Provider> => {
    const server = await loopback(answer);
    const provider = ollamaProvider({ url: server.url.replace('/v1', ''), model: 'llama3', backoff: 1, stream, context: 2048 });
    open.push(provider, server);
    return provider;
  };

  test('raw prompts; sampling inside options', async () => {
    let seen: unknown;
    const provider = await ollama(({ path, body, response }) => {
      seen = [path, body];
      json(response, { response: 'Hi', done: true, done_reason: 'stop', prompt_eval_count: 4, eval_count: 1 });
    });
    expect(await provider.complete('<|user|>', { maxTokens: 5, temperature: 0, seed: 3, stop: ['x'] })).toEqual({
      text: 'Hi',
      finish: 'stop',
      usage: { promptTokens: 4, completionTokens: 1 },
    });
    expect(seen).toEqual([
      '/api/generate',
      {
        model: 'llama3',
        stream: false,
        raw: true,
        prompt: '<|user|>',
        options: {
          num_predict: 5,
          temperature: 0,
          top_p: 1,
          top_k: 0,
          min_p: 0,
          repeat_penalty: 1,
          stop: ['x'],
          seed: 3,
          num_ctx: 2048,
        },
      },
    ]);
  });

  test('chat held to choices, streamed; embeddings; bias is refused', async () => {
    const provider = await ollama(({ path, body, response }) => {
      if (path === '/api/embed') return json(response, { embeddings: [[1, 0]] });
      expect(body.format).toEqual({ type: 'string', enum: ['good', 'bad'] });
      response.write(`${JSON.stringify({ message: { content: '"go' } })}\n`);
      response.end(`${JSON.stringify({ message: { content: 'od"' }, done: true, done_reason: 'stop', eval_count: 3 })}\n`);
    }, true);
    const pieces: string[] = [];
    const answer = await provider.chat([{ role: 'user', content: 'x' }], {
      choices: ['good', 'bad'],
      onText: (t) => pieces.push(t),
    });
    expect([answer.text, pieces]).toEqual(['good', ['"go', 'od"']]);
    expect(await provider.embed(['a'])).toEqual([Float32Array.of(1, 0)]);
    expect(await failure(provider.complete('x', { bias: { 1: 1 } }))).toMatchObject({ code: 'ERR_UNABLE' });
  });

  test('half a stream', async () => {
    const provider = await ollama(({ before, response }) => {
      response.write(`${JSON.stringify({ response: 'a' })}\n`);
      response.end(before === 0 ? '' : `${JSON.stringify({ response: 'b', done: true })}\n`);
    }, true);
    expect((await provider.complete('x')).text).toBe('ab');
    expect(provider.meter.retries).toBe(1);
  });
});

test('64 calls at a time against 50 ms of latency', async () => {
  const { provider } = await against(({ response }) => void setTimeout(() => json(response, completion('a')), 50), {
    concurrency: 64,
  });
  const call = () => Promise.all(Array.from({ length: 640 }, () => provider.complete('x')));
  await Promise.all(Array.from({ length: 64 }, () => provider.complete('x'))); // connections open
  const began = performance.now();
  await call();
  // Ten rounds of 50 ms; a busy machine is no fault, work one after the other would take 32 s.
  expect(performance.now() - began).toBeLessThan(5000);
});
