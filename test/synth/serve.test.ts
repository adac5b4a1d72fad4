import { connect } from 'node:net';
import OpenAI from 'openai';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import type { ChatMessage, CompletionOptions } from '../../src/synth/provider.ts';
import { openaiProvider } from '../../src/synth/providers/openai.ts';
import { type Serving, serve } from '../../src/synth/serve.ts';
import { DataError } from '../../src/tensor/errors.ts';
import { scripted } from './scripted.ts';

// The protocol is under test here, not the model: what the provider is asked, and what becomes of its answers.
const asked: { prompt: string | readonly ChatMessage[]; options: CompletionOptions }[] = [];
const tokens = [
  { text: 'one ', logProbability: -0.5, alternatives: [{ text: 'two ', logProbability: -1 }] },
  { text: 'two', logProbability: -0.25, alternatives: [] },
];
const provider = scripted({
  async complete(prompt, options) {
    asked.push({ prompt, options });
    if (prompt === 'too long') throw new DataError('prompt: 99 tokens', { code: 'ERR_CONTEXT', argument: 'prompt' });
    if (prompt === 'broken') throw new Error('a fault of ours');
    if (prompt === 'deaf') {
      // As a model does that is at work on a batch, it looks at its signal too late.
      for (let i = 0; i < 50; i++) await null;
      options.onText?.('too late');
    }
    if (prompt === 'slow') {
      await new Promise((resolve, reject) => {
        setTimeout(resolve, 60_000).unref();
        options.signal!.addEventListener('abort', () => reject(options.signal!.reason));
      });
    }
    return { text: 'one two', finish: 'length', ...(options.logProbabilities === undefined ? {} : { tokens }) };
  },
  chat(messages, options) {
    asked.push({ prompt: messages, options });
    return { text: 'one two', ...(options.logProbabilities === undefined ? {} : { tokens }) };
  },
  embed: (texts) => texts.map((text) => Float32Array.of(text.length, 0.5)),
});

let serving: Serving;
let client: OpenAI;
beforeEach(async () => {
  asked.length = 0;
  serving = await serve(provider, { port: 0, key: 'secret' });
  client = new OpenAI({ baseURL: serving.url, apiKey: 'secret', maxRetries: 0 });
});
afterEach(() => serving.close());

const model = 'scripted';
const messages: OpenAI.ChatCompletionMessageParam[] = [
  { role: 'developer', content: 'Be brief.' },
  { role: 'user', content: [{ type: 'text', text: 'Count' }] },
];

describe("OpenAI's own client", () => {
  test('models', async () => {
    expect((await client.models.list()).data).toMatchObject([{ id: model, object: 'model' }]);
    expect(await client.models.retrieve(model)).toMatchObject({ id: model });
  });

  test('completions: sampling, scores, usage', async () => {
    const answer = await client.completions.create({
      model,
      prompt: 'Count: ',
      max_tokens: 4,
      temperature: 0.5,
      top_p: 0.9,
      stop: ['\n'],
      seed: 7,
      logprobs: 1,
      logit_bias: { '5': -100 },
    });
    expect(answer).toMatchObject({
      object: 'text_completion',
      choices: [
        {
          text: 'one two',
          finish_reason: 'length',
          logprobs: {
            tokens: ['one ', 'two'],
            token_logprobs: [-0.5, -0.25],
            top_logprobs: [{ 'two ': -1 }, {}],
            text_offset: [0, 4],
          },
        },
      ],
      usage: { prompt_tokens: 1, completion_tokens: 2, total_tokens: 3 },
    });
    expect(asked[0]).toMatchObject({
      prompt: 'Count: ',
      options: { maxTokens: 4, temperature: 0.5, topP: 0.9, stop: ['\n'], seed: 7, logProbabilities: 1, bias: { 5: -100 } },
    });
  });

  test('several prompts, several copies of each: seeds differ, usage is the sum', async () => {
    const answer = await client.completions.create({ model, prompt: ['a', 'b'], n: 2, seed: 3, echo: true });
    expect(answer.choices.map((choice) => choice.text)).toEqual(['aone two', 'aone two', 'bone two', 'bone two']);
    expect(asked.map(({ prompt, options }) => [prompt, options.seed])).toEqual([
      ['a', 3],
      ['a', 4],
      ['b', 5],
      ['b', 6],
    ]);
    expect(answer.usage).toEqual({ prompt_tokens: 4, completion_tokens: 8, total_tokens: 12 });
  });

  test('streams of completions', async () => {
    const stream = await client.completions.create({ model, prompt: 'x', stream: true, stream_options: { include_usage: true } });
    const parts = [];
    for await (const part of stream) parts.push(part);
    expect(parts.map((part) => part.choices[0]?.text)).toEqual(['one ', 'two', '', undefined]);
    expect(parts[2]!.choices[0]!.finish_reason).toBe('length');
    expect(parts[3]!.usage).toEqual({ prompt_tokens: 1, completion_tokens: 2, total_tokens: 3 });
  });

  test('chat: roles, scores', async () => {
    const answer = await client.chat.completions.create({ model, messages, logprobs: true, top_logprobs: 1 });
    expect(answer.choices[0]).toMatchObject({
      message: { role: 'assistant', content: 'one two' },
      finish_reason: 'stop',
      logprobs: {
        content: [
          { token: 'one ', logprob: -0.5, bytes: [111, 110, 101, 32], top_logprobs: [{ token: 'two ', logprob: -1 }] },
          { token: 'two', logprob: -0.25, top_logprobs: [] },
        ],
      },
    });
    expect(asked[0]!.prompt).toEqual([
      { role: 'system', content: 'Be brief.' },
      { role: 'user', content: 'Count' },
    ]);
  });

  test('streams of chat', async () => {
    const runner = client.chat.completions.stream({ model, messages });
    expect(await runner.finalContent()).toBe('one two');
    expect((await runner.finalChatCompletion()).choices[0]!.finish_reason).toBe('stop');
  });

  test('embeddings, as base64 and as numbers', async () => {
    for (const encoding of [undefined, 'float'] as const) {
      const answer = await client.embeddings.create({
        model,
        input: ['a', 'bcd'],
        ...(encoding ? { encoding_format: encoding } : {}),
      });
      expect(answer.data.map((entry) => [...entry.embedding])).toEqual([
        [1, 0.5],
        [3, 0.5],
      ]);
    }
  });
});

describe('errors have the shape that clients know', () => {
  test.each([
    ['no such model', { model: 'other', prompt: 'x' }, 404, 'model'],
    ['a number out of range', { model, prompt: 'x', temperature: -1 }, 400, 'temperature'],
    ['an empty stop', { model, prompt: 'x', stop: [''] }, 400, 'stop'],
    ['no prompt', { model }, 400, 'prompt'],
    ['a prompt that the model has no room for', { model, prompt: 'too long' }, 400, 'prompt'],
    ['a fault of the server', { model, prompt: 'broken' }, 500, null],
    ['choices that are none', { model, prompt: 'x', structured_outputs: { choice: [1] } }, 400, 'structured_outputs'],
  ])('%s', async (_, body, status, param) => {
    const error = await client.completions.create(body as never).then(
      () => expect.fail('did not fail'),
      (e) => e,
    );
    expect(error).toBeInstanceOf(OpenAI.APIError);
    expect(error).toMatchObject({ status, param });
  });

  test('a wrong key, a wrong path, a wrong method, a body that is no JSON or no object', async () => {
    const post = async (path: string, body: string, headers = {}) => {
      const all = { authorization: 'Bearer secret', ...headers };
      const response = await fetch(serving.url.replace('/v1', path), { method: 'POST', body, headers: all });
      return [response.status, ((await response.json()) as { error: { message: string } }).error.message];
    };
    expect(await post('/v1/completions', '{}', { authorization: '' })).toEqual([401, 'the key is missing or wrong']);
    expect((await post('/v1/nothing', '{}'))[0]).toBe(404);
    expect((await post('/v1/models', '{}'))[0]).toBe(405);
    expect(await post('/v1/completions', '{"a')).toEqual([400, expect.stringContaining('not JSON')]);
    expect(await post('/v1/completions', '[]')).toEqual([400, 'the request is not an object']);
    expect(await post('/v1/chat/completions', '{"messages":[{"role":"robot","content":"x"}]}')).toEqual([
      400,
      expect.stringContaining('messages[0]'),
    ]);
  });

  test('an error in the middle of a stream ends it with an event', async () => {
    const response = await fetch(`${serving.url}/completions`, {
      method: 'POST',
      headers: { authorization: 'Bearer secret' },
      body: JSON.stringify({ prompt: ['x', 'broken'], stream: true }),
    });
    const text = await response.text();
    if (response.status === 200) expect(text.trimEnd().split('\n').at(-1)).toContain('a fault of ours');
    else expect(response.status).toBe(500);
  });
});

test('a request that cannot be, beside one that goes on, ends both and nothing else', async () => {
  const response = await fetch(`${serving.url}/completions`, {
    method: 'POST',
    headers: { authorization: 'Bearer secret' },
    body: JSON.stringify({ prompt: ['deaf', 'too long'], stream: true }),
  });
  expect(response.status).toBe(400);
  expect(await response.json()).toMatchObject({ error: { code: 'ERR_CONTEXT' } });
  expect(asked.find(({ prompt }) => prompt === 'deaf')!.options.signal!.aborted).toBe(true);
  expect((await client.models.list()).data).toHaveLength(1);
});

test('a target that is no address is answered, too', async () => {
  const { hostname, port } = new URL(serving.url);
  const socket = connect(Number(port), hostname);
  socket.write('GET // HTTP/1.1\r\nhost: x\r\nauthorization: Bearer secret\r\nconnection: close\r\n\r\n');
  let answer = '';
  for await (const part of socket) answer += part;
  expect(answer).toMatch(/^HTTP\/1.1 404 /);
  expect((await client.models.list()).data).toHaveLength(1);
});

test('a client that hangs up ends the work', async () => {
  const controller = new AbortController();
  const call = client.completions.create({ model, prompt: 'slow' }, { signal: controller.signal });
  while (asked.length === 0) await new Promise((resolve) => setTimeout(resolve, 5));
  controller.abort();
  await expect(call).rejects.toThrow();
  await expect.poll(() => asked[0]!.options.signal!.aborted).toBe(true);
});

test('a port that is taken', async () => {
  const port = Number(new URL(serving.url).port);
  await expect(serve(provider, { port })).rejects.toMatchObject({ code: 'ERR_PORT' });
});

test('our own client speaks to our own server, streaming or not', async () => {
  for (const stream of [false, true]) {
    const ours = openaiProvider({ url: serving.url, model, key: 'secret', stream, dialect: 'limbeck' });
    const pieces: string[] = [];
    const sampling = {
      logProbabilities: 1,
      seed: 2,
      choices: ['one two'],
      stopIds: [4],
      topK: 3,
      onText: (t: string) => pieces.push(t),
    };
    expect(await ours.complete('x', sampling)).toEqual({
      text: 'one two',
      finish: 'length',
      tokens,
      usage: { promptTokens: 1, completionTokens: 2 },
    });
    expect(pieces).toEqual(stream ? ['one ', 'two'] : ['one two']);
    expect(asked.at(-1)!.options).toMatchObject({ choices: ['one two'], stopIds: [4], topK: 3, seed: 2 });
    await ours.dispose();
  }
});
