// Our own models in this process. Calls that come together are worked on together.
//   T tokens, C width

import { type TextToken, textRequest } from '../../models/completion.ts';
import { resolveCheckpoint } from '../../models/folder.ts';
import { generateTokens } from '../../models/generate.ts';
import { type LanguageModel, loadModel } from '../../models/model.ts';
import { createPrefixCache } from '../../models/prefix.ts';
import { type Device, startFor } from '../../tensor/engine.ts';
import { DataError } from '../../tensor/errors.ts';
import { scope } from '../../tensor/scope.ts';
import { noGrad } from '../../tensor/tape.ts';
import { readAs, tensor } from '../../tensor/tensor.ts';
import { type ChatTemplate, chatTemplate, loadChatTemplate } from '../../tokenizer/chat.ts';
import { encodeEscaped } from '../../tokenizer/escape.ts';
import { encodePrompt } from '../../tokenizer/sentinels.ts';
import type { Tokenizer } from '../../tokenizer/tokenizer.ts';
import {
  type Abilities,
  type CompletionOptions,
  chatCall,
  completeInTwo,
  count,
  type Meter,
  type Provider,
  type Reply,
  type TokenScore,
} from '../provider.ts';
import { choiceMask } from './choices.ts';
import { fingerprint } from './fingerprint.ts';

export interface LocalOptions {
  readonly model: LanguageModel;
  readonly tokenizer: Tokenizer;
  /** Name in records and in a server's list. Default `limbeck`. */
  readonly name?: string;
  /** For `chat`. Default: none, so that the model only continues prompts. */
  readonly template?: ChatTemplate;
  /** Texts that are worked on together. Default 8. */
  readonly batch?: number;
  /**
   * Keep keys and values between calls, so that a prompt which begins as an earlier one did is read from where they part. Logits may differ in
   * the last bits then, and with them a draw that lies on an edge. Default false.
   */
  readonly reuse?: boolean;
}

interface Waiting {
  readonly prompt: string;
  /** Whether a begin token goes first, where the prompt has none: a chat template has decided that for itself. */
  readonly begin: boolean;
  readonly options: CompletionOptions;
  readonly resolve: (reply: Reply) => void;
  readonly reject: (error: unknown) => void;
}

/** A model of this process; the caller disposes of the model. Same seed, same text, whatever else is in its batch, unless `reuse`. */
export function localProvider(options: LocalOptions): Provider {
  const { model, tokenizer, template, batch = 8, name = 'limbeck', reuse = false } = options;
  const cache = reuse ? createPrefixCache({ texts: batch }) : undefined;
  const meter: Meter = { requests: 0, retries: 0, promptTokens: 0, completionTokens: 0 };
  const can: Abilities = {
    complete: true,
    chat: template !== undefined,
    embed: true,
    logProbabilities: true,
    choices: tokenizer.eos !== undefined,
    bias: true,
    stopIds: true,
  };
  const waiting: Waiting[] = [];
  let working: Promise<void> | undefined;

  const enqueue = (prompt: string, call: CompletionOptions, begin: boolean): Promise<Reply> =>
    new Promise((resolve, reject) => {
      if (call.signal?.aborted) {
        reject(call.signal.reason);
        return;
      }
      waiting.push({ prompt, begin, options: call, resolve, reject });
      // After this turn, so that calls that are made together go together.
      working ??= new Promise<void>((next) => setImmediate(next)).then(work);
    });

  const work = async (): Promise<void> => {
    while (waiting.length > 0) {
      const calls = waiting.splice(0, batch);
      // One call that cannot be must not take the others along.
      const prepared = calls.flatMap((call) => {
        try {
          return [prepare(call)];
        } catch (error) {
          call.reject(error);
          return [];
        }
      });
      try {
        await run(prepared);
      } catch (error) {
        for (const { call } of prepared) call.reject(error);
      }
    }
    working = undefined;
  };

  const prepare = (call: Waiting) => {
    const { maxTokens = 512, temperature = 1, topP, topK, minP, repetitionPenalty, stop, stopIds, bias, seed = 0 } = call.options;
    const { choices, logProbabilities, signal } = call.options;
    const encoded = encodeEscaped(tokenizer, call.prompt);
    // A prompt may bring its begin token along; there must be one of it.
    const ids = call.begin ? encodePrompt(tokenizer, call.prompt, encoded) : encoded;
    if (ids.length >= model.config.context) {
      throw new DataError(
        `generate: the prompt has ${ids.length} tokens, the model's context is ${model.config.context}; shorten the prompt`,
        { code: 'ERR_CONTEXT', op: 'generate', argument: 'prompt', actual: String(ids.length) },
      );
    }
    const allow =
      choices === undefined
        ? undefined
        : choiceMask(
            choices.map((choice) => tokenizer.encode(choice, { special: false })),
            vocabularyOf(tokenizer, model),
            [tokenizer.eos!, ...(stopIds ?? [])],
          );
    const { request, text } = textRequest(tokenizer, ids, {
      tokens: Math.min(maxTokens, model.config.context - ids.length),
      temperature,
      seed,
      ...(topP === undefined ? {} : { topP }),
      ...(topK === undefined ? {} : { topK }),
      ...(minP === undefined ? {} : { minP }),
      ...(repetitionPenalty === undefined ? {} : { repetitionPenalty }),
      ...(bias === undefined ? {} : { logitBias: bias }),
      ...(stop === undefined ? {} : { stop }),
      ...(stopIds === undefined ? {} : { stopIds }),
      ...(allow === undefined ? {} : { allow }),
      ...(logProbabilities === undefined ? {} : { topLogProbs: logProbabilities }),
    });
    // A call that is no longer wanted ends at its next token; the others of its batch go on.
    const until = (id: number): boolean => request.until!(id) || signal?.aborted === true;
    return { call, prompt: ids.length, text, tokens: [] as TextToken[], written: '', request: { ...request, until } };
  };

  const run = async (prepared: readonly ReturnType<typeof prepare>[]): Promise<void> => {
    const requests = prepared.map(({ request }) => request);
    const together = { batch, vocabSize: tokenizer.vocabSize, ...(cache === undefined ? {} : { cache }) };
    for await (const event of generateTokens(model, requests, together)) {
      const state = prepared[event.index]!;
      const { call, text, tokens } = state;
      if (event.type === 'token') tokens.push(event);
      const piece = text.take() + (event.type === 'end' ? text.end() : '');
      if (piece !== '') {
        state.written += piece;
        call.options.onText?.(piece);
      }
      if (event.type === 'token') continue;
      if (call.options.signal?.aborted) {
        call.reject(call.options.signal.reason);
        continue;
      }
      const usage = { promptTokens: state.prompt, completionTokens: tokens.length };
      count(meter, usage);
      call.resolve({
        text: state.written,
        finish: event.reason === 'length' ? 'length' : 'stop',
        usage,
        ...(call.options.logProbabilities === undefined ? {} : { tokens: tokens.map((token) => scoreOf(token, tokenizer)) }),
      });
    }
  };

  const complete = (prompt: string, call: CompletionOptions, begin = true): Promise<Reply> =>
    call.firstBias === undefined && call.firstTemperature === undefined
      ? enqueue(prompt, call, begin)
      : completeInTwo(prompt, call, (text, options) => enqueue(text, options, begin));

  return {
    name: `limbeck:${name}`,
    model: name,
    can,
    concurrency: batch,
    meter,
    ...(template === undefined ? {} : { template }),
    complete: (prompt, call = {}) => complete(prompt, call),
    async chat(messages, call = {}) {
      const asked = chatCall(name, template, tokenizer, messages, call);
      return complete(asked.prompt, asked.call, false);
    },
    async embed(texts, { signal } = {}) {
      const vectors: Float32Array[] = [];
      for (const text of texts) {
        signal?.throwIfAborted();
        const ids = tokenizer.encode(text, { bos: tokenizer.begins, special: false });
        count(meter, { promptTokens: ids.length, completionTokens: 0 });
        vectors.push(await meanHidden(model, ids.length === 0 ? Int32Array.of(tokenizer.eos ?? 0) : ids));
      }
      return vectors;
    },
    async dispose() {
      await working;
      cache?.dispose();
    },
  };
}

function vocabularyOf(tokenizer: Tokenizer, model: LanguageModel): number {
  return Math.min(tokenizer.vocabSize, model.config.vocabSize);
}

function scoreOf({ id, logProb, top = [] }: TextToken, tokenizer: Tokenizer): TokenScore {
  const text = (token: number) => tokenizer.decode([token]);
  return {
    text: text(id),
    logProbability: logProb,
    alternatives: top.map((other) => ({ text: text(other.id), logProbability: other.logProb })),
  };
}

/** Mean [C] of the hidden states of a text, which is cut to the model's context. */
async function meanHidden(model: LanguageModel, all: Int32Array): Promise<Float32Array> {
  const ids = all.subarray(0, model.config.context);
  const t = ids.length;
  const hidden = scope(() =>
    noGrad(() =>
      model.hidden({
        ids: tensor(Int32Array.from(ids), [1, t]),
        positions: tensor(
          Int32Array.from({ length: t }, (_, i) => i),
          [1, t],
        ),
      }),
    ),
  );
  const states = await readAs(hidden, 'f32').finally(() => hidden.dispose());
  const { width } = model.config;
  const mean = new Float32Array(width);
  for (let i = 0; i < states.length; i++) mean[i % width]! += states[i]! / t;
  return mean;
}

export interface LocalFolderOptions extends Omit<LocalOptions, 'model' | 'tokenizer' | 'template'> {
  /** A chat template, the name of a style, or Jinja source. Default: the one in the folder, if there is one. */
  readonly template?: ChatTemplate | string;
  /** Where to compute, if the engine does not run yet. Default "cpu". */
  readonly device?: Device;
  /** Threads, if the engine does not run yet. Default: the cores of the machine. */
  readonly threads?: number;
}

/** {@link localProvider} with the model of a folder, which `dispose` frees. @throws FormatError */
export async function openLocalProvider(checkpoint: string, options: LocalFolderOptions = {}): Promise<Provider> {
  const { template: given, device, threads, ...rest } = options;
  startFor('localProvider', { device, threads });
  const folder = await resolveCheckpoint(checkpoint);
  const { model, tokenizer } = await loadModel(folder);
  try {
    const template =
      typeof given === 'string' ? chatTemplate(given, tokenizer) : (given ?? (await loadChatTemplate(folder, tokenizer)));
    const provider = localProvider({
      name: checkpoint.replace(/\/+$/, '').split('/').at(-1) || 'limbeck',
      ...rest,
      model,
      tokenizer,
      ...(template === undefined ? {} : { template }),
    });
    return {
      ...provider,
      name: `${provider.name}@${await fingerprint(folder, template?.source)}`,
      async dispose() {
        await provider.dispose();
        model.dispose();
      },
    };
  } catch (error) {
    model.dispose();
    throw error;
  }
}
