// GGUF files through node-llama-cpp, an optional package. Only what is used of it is declared here, so that our types need no such
// package either.

import { ConfigError } from '../../tensor/errors.ts';
import type { ChatTemplate } from '../../tokenizer/chat.ts';
import {
  type Abilities,
  type CompletionOptions,
  chatCall,
  checkAbilities,
  count,
  limiter,
  type Meter,
  type Provider,
  type Reply,
  type TokenScore,
  unable,
} from '../provider.ts';

type Token = number & { __token?: never };

interface Sequence {
  evaluateWithMetadata(
    tokens: Token[],
    metadata: { confidence?: boolean; probabilities?: boolean },
    options: Record<string, unknown>,
  ): AsyncGenerator<{ token: Token; confidence?: number; probabilities?: Map<Token, number> }>;
  clearHistory(): Promise<void>;
  dispose(): void;
}

interface Model {
  readonly tokens: { readonly bos: Token | null; readonly eos: Token | null; readonly eot: Token | null };
  tokenize(text: string, special?: boolean): Token[];
  detokenize(tokens: readonly Token[], special?: boolean, last?: readonly Token[]): string;
  isEogToken(token: Token): boolean;
  createContext(options: Record<string, unknown>): Promise<{ getSequence(): Sequence; dispose(): Promise<void> }>;
  createEmbeddingContext(options?: Record<string, unknown>): Promise<{
    getEmbeddingFor(text: string): Promise<{ readonly vector: readonly number[] }>;
    dispose(): Promise<void>;
  }>;
  dispose(): Promise<void>;
}

/** What is used of node-llama-cpp. */
export interface LlamaModule {
  getLlama(options?: Record<string, unknown>): Promise<{
    loadModel(options: { modelPath: string }): Promise<unknown>;
    dispose(): Promise<void>;
  }>;
  readonly TokenBias: { for(model: never): { set(token: never, bias: { logit: number }): unknown } };
}

export interface LlamaOptions {
  /** The .gguf file. */
  readonly file: string;
  /** For `chat`. Default: none, so that the model only continues prompts. */
  readonly template?: ChatTemplate;
  /** Texts that are worked on side by side. Default 1. */
  readonly sequences?: number;
  /** Tokens of context of each. Default 2048. */
  readonly context?: number;
  /** Options of `getLlama`, such as `{ gpu: false }`; `{ maxThreads: 1 }` where cores are shared, since its threads wait by spinning. */
  readonly llama?: Readonly<Record<string, unknown>>;
  /** The package, where the caller has it. Default: `import('node-llama-cpp')`. */
  readonly module?: LlamaModule;
}

/** A GGUF model in this process. @throws ConfigError `ERR_MODULE` when node-llama-cpp is not installed */
export async function openLlamaProvider(options: LlamaOptions): Promise<Provider> {
  const { file, template, sequences = 1, context = 2048 } = options;
  const library = options.module ?? (await importLlama());
  const llama = await library.getLlama({ logLevel: 'error', ...options.llama });
  const model = (await llama.loadModel({ modelPath: file })) as Model;
  const held = await model.createContext({ sequences, contextSize: context });
  const free = Array.from({ length: sequences }, () => held.getSequence());
  let embedder: Awaited<ReturnType<Model['createEmbeddingContext']>> | undefined;
  const limited = limiter(sequences);
  const meter: Meter = { requests: 0, retries: 0, promptTokens: 0, completionTokens: 0 };
  const name = file.split(/[\\/]/).at(-1)!;
  const can: Abilities = {
    complete: true,
    chat: template !== undefined,
    embed: true,
    logProbabilities: true,
    // Its grammars did not come to an end with a small model of ours; answers are checked instead.
    choices: false,
    // Calls with a token bias have been seen to hang; until that is understood they are refused.
    bias: false,
    stopIds: true,
  };

  const biased = (bias: Readonly<Record<number, number>>): unknown => {
    const made = library.TokenBias.for(model as never);
    for (const [id, logit] of Object.entries(bias)) made.set(Number(id) as never, { logit });
    return made;
  };

  const run = async (sequence: Sequence, prompt: string, call: CompletionOptions): Promise<Reply> => {
    checkAbilities(name, can, call);
    const { maxTokens = 512, temperature = 1, topP, topK, minP, repetitionPenalty, stop = [], stopIds = [], seed = 0 } = call;
    const { bias, firstBias, firstTemperature, logProbabilities, signal, onText } = call;
    const ids = model.tokenize(prompt, true);
    if (model.tokens.bos !== null && ids[0] !== model.tokens.bos) ids.unshift(model.tokens.bos);
    const ends = new Set<number>(stopIds);
    const most = Math.min(maxTokens, context - ids.length);
    if (most < 1) {
      throw new ConfigError(
        `${name}: the prompt has ${ids.length} tokens, the context ${context}; shorten it or give more context`,
        {
          code: 'ERR_CONTEXT',
          op: 'generate',
          argument: 'prompt',
        },
      );
    }
    const tokens: Token[] = [];
    const scores: TokenScore[] = [];
    let text = '';
    let told = 0;
    let finish: Reply['finish'] = 'length';
    // Text is read from all tokens: one alone may be half a character.
    const settings = (first: boolean): Record<string, unknown> => ({
      temperature: (first ? firstTemperature : undefined) ?? temperature,
      seed,
      ...(topP === undefined ? {} : { topP }),
      ...(topK === undefined ? {} : { topK }),
      ...(minP === undefined ? {} : { minP }),
      ...(repetitionPenalty === undefined ? {} : { repeatPenalty: { punishTokens: () => tokens, penalty: repetitionPenalty } }),
      ...(bias === undefined && firstBias === undefined
        ? {}
        : { tokenBias: () => biased({ ...bias, ...(tokens.length === 0 ? firstBias : {}) }) }),
      yieldEogToken: true,
    });
    await sequence.clearHistory();
    const wanted = { probabilities: logProbabilities !== undefined };
    let generator = sequence.evaluateWithMetadata(ids, wanted, settings(true));
    try {
      for (;;) {
        signal?.throwIfAborted();
        const { value, done } = await generator.next();
        if (done || value === undefined) {
          finish = 'stop';
          break;
        }
        const { token, probabilities } = value;
        if (model.isEogToken(token) || ends.has(token)) {
          finish = 'stop';
          break;
        }
        tokens.push(token);
        if (logProbabilities !== undefined) scores.push(scoreOf(model, token, probabilities, logProbabilities));
        text = model.detokenize(tokens, false);
        const at = stop.map((s) => text.indexOf(s)).filter((i) => i >= 0);
        if (at.length > 0) {
          text = text.slice(0, Math.min(...at));
          finish = 'stop';
          break;
        }
        if (onText !== undefined && stop.length === 0 && !text.endsWith('\ufffd')) {
          onText(text.slice(told));
          told = text.length;
        }
        if (tokens.length >= most) break;
        // A first token of its own temperature: the rest is another evaluation, of that token.
        if (tokens.length === 1 && firstTemperature !== undefined) {
          await generator.return?.(undefined);
          generator = sequence.evaluateWithMetadata([token], wanted, settings(false));
        }
      }
    } finally {
      await generator.return?.(undefined);
    }
    if (told < text.length) onText?.(text.slice(told));
    const usage = { promptTokens: ids.length, completionTokens: tokens.length };
    count(meter, usage);
    return { text, finish, usage, ...(logProbabilities === undefined ? {} : { tokens: scores }) };
  };

  const complete = (prompt: string, call: CompletionOptions): Promise<Reply> =>
    limited(async () => {
      const sequence = free.pop()!;
      try {
        return await run(sequence, prompt, call);
      } finally {
        free.push(sequence);
      }
    });

  return {
    name: `gguf:${name}`,
    model: name,
    can,
    concurrency: sequences,
    meter,
    ...(template === undefined ? {} : { template }),
    complete: (prompt, call = {}) => complete(prompt, call),
    async chat(messages, call = {}) {
      if (template === undefined) throw unable(name, 'answer a conversation', 'give the chat template of the model');
      const asked = chatCall(template, messages, call, (text) => {
        const ids = model.tokenize(text, true);
        return ids.length === 1 ? ids[0] : undefined;
      });
      return complete(asked.prompt, asked.call);
    },
    async embed(texts, { signal } = {}) {
      embedder ??= await model.createEmbeddingContext({ contextSize: context });
      const vectors: Float32Array[] = [];
      for (const text of texts) {
        signal?.throwIfAborted();
        vectors.push(Float32Array.from((await embedder.getEmbeddingFor(text)).vector));
        count(meter, { promptTokens: model.tokenize(text).length, completionTokens: 0 });
      }
      return vectors;
    },
    async dispose() {
      await embedder?.dispose();
      await held.dispose();
      await model.dispose();
      await llama.dispose();
    },
  };
}

function scoreOf(model: Model, token: Token, probabilities: Map<Token, number> | undefined, count: number): TokenScore {
  const text = (id: Token) => model.detokenize([id], true);
  const top: { text: string; logProbability: number }[] = [];
  for (const [id, p] of probabilities ?? []) {
    if (top.length >= count) break;
    top.push({ text: text(id), logProbability: Math.log(p) });
  }
  return { text: text(token), logProbability: Math.log(probabilities?.get(token) ?? 1), alternatives: top };
}

async function importLlama(): Promise<LlamaModule> {
  try {
    // A name that is no constant: the package is there only where somebody wants it.
    const name = 'node-llama-cpp';
    return (await import(name)) as LlamaModule;
  } catch (cause) {
    throw new ConfigError(
      'gguf: node-llama-cpp is not installed; npm install node-llama-cpp, or hand the package in as `module`',
      {
        code: 'ERR_MODULE',
        op: 'openLlamaProvider',
        argument: 'module',
        cause,
      },
    );
  }
}
