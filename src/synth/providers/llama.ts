// GGUF files through node-llama-cpp, an optional package. Only what is used of it is declared here, so that our types need no such
// package either.

import { availableParallelism } from 'node:os';
import { textWriter } from '../../models/completion.ts';
import { adjust, candidatesOf, chance, checkSampling, draw, type Sampling, topOf } from '../../models/sampling.ts';
import { ConfigError, DataError } from '../../tensor/errors.ts';
import { type ChatTemplate, chatTemplate } from '../../tokenizer/chat.ts';
import { encodeEscaped } from '../../tokenizer/escape.ts';
import { windowDecoder } from '../../tokenizer/window.ts';
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
import { choiceMask } from './choices.ts';
import { fingerprint } from './fingerprint.ts';

type Token = number & { __token?: never };

interface Sequence {
  /** What is given to `next` is what the text goes on with. */
  evaluateWithMetadata(
    tokens: readonly Token[],
    metadata: { probabilities?: boolean },
    options: Record<string, unknown>,
  ): AsyncGenerator<{ token: Token; probabilities?: Map<Token, number> }, void, Token | undefined>;
  clearHistory(): Promise<void>;
}

interface Model {
  readonly tokens: {
    readonly bos: Token | null;
    readonly eos: Token | null;
    readonly eot: Token | null;
    readonly shouldPrependBosToken: boolean;
  };
  readonly fileInfo: {
    readonly metadata: {
      readonly tokenizer?: {
        readonly chat_template?: string;
        readonly ggml?: { readonly tokens?: readonly string[]; readonly token_type?: readonly number[] };
      };
    };
  };
  readonly trainContextSize: number;
  tokenize(text: string, special?: boolean, options?: 'trimLeadingSpace'): Token[];
  detokenize(tokens: readonly Token[], special?: boolean): string;
  isEogToken(token: Token): boolean;
  createContext(options: Record<string, unknown>): Promise<{ getSequence(): Sequence; dispose(): Promise<void> }>;
  createEmbeddingContext(options?: Record<string, unknown>): Promise<{
    getEmbeddingFor(tokens: readonly Token[]): Promise<{ readonly vector: readonly number[] }>;
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
  /** For `chat`: a template, the name of a style, or Jinja source. Default: the file's own; without one the model only continues prompts. */
  readonly template?: ChatTemplate | string;
  /** Texts that are worked on side by side. Default 1. */
  readonly sequences?: number;
  /** Most tokens of each, its prompt included. Default 2048, or what the model was trained for if that is less. */
  readonly context?: number;
  /**
   * Threads on the CPU. They wait for each other by spinning, so that with more of them than cores that are free a token takes some hundred
   * times as long. Default: the cores of the machine but one; give 1 where other programs are at work.
   */
  readonly threads?: number;
  /** Options of `getLlama`, such as `{ gpu: false }`. */
  readonly llama?: Readonly<Record<string, unknown>>;
  /** The package, where the caller has it. Default: `import('node-llama-cpp')`. */
  readonly module?: LlamaModule;
}

/**
 * A GGUF model in this process. Log-probabilities, `choices` and what concerns the first token alone are drawn here, from whole
 * distributions, by the rules and seeds of our own models; llama.cpp draws the rest, and cuts (topK, topP, minP) before it applies
 * the temperature.
 * @throws ConfigError `ERR_MODULE` when node-llama-cpp is not installed
 */
export async function openLlamaProvider(options: LlamaOptions): Promise<Provider> {
  const { file, sequences = 1, threads = Math.max(1, availableParallelism() - 1) } = options;
  // Its own default is at least 4 of them, whatever the machine.
  const library = options.module ?? (await importLlama());
  const llama = await library.getLlama({ logLevel: 'error', maxThreads: threads, ...options.llama });
  const name = file.split(/[\\/]/).at(-1)!;
  try {
    const model = (await llama.loadModel({ modelPath: file })) as Model;
    const context = Math.min(options.context ?? 2048, model.trainContextSize);
    const template = typeof options.template === 'object' ? options.template : templateOf(model, name, options.template);
    const digest = await fingerprint(file, template?.source);
    return await provide(model, library, { name, digest, sequences, context, template, close: () => llama.dispose() });
  } catch (error) {
    await llama.dispose();
    throw error;
  }
}

interface Setting {
  readonly name: string;
  readonly digest: string;
  readonly sequences: number;
  readonly context: number;
  readonly template: ChatTemplate | undefined;
  close(): Promise<void>;
}

async function provide(model: Model, library: LlamaModule, setting: Setting): Promise<Provider> {
  const { name, sequences, context, template } = setting;
  const held = await model.createContext({ sequences, contextSize: context });
  const free = Array.from({ length: sequences }, () => held.getSequence());
  let embedder: ReturnType<Model['createEmbeddingContext']> | undefined;
  const limited = limiter(sequences);
  const meter: Meter = { requests: 0, retries: 0, promptTokens: 0, completionTokens: 0 };
  const { bos, eos, eot, shouldPrependBosToken } = model.tokens;
  const ends = [eos, eot].filter((id) => id !== null);
  const can: Abilities = {
    complete: true,
    chat: template !== undefined,
    embed: true,
    logProbabilities: true,
    choices: ends.length > 0,
    bias: true,
    stopIds: true,
  };

  const vocabulary = vocabularyOf(model);
  const encode = (prompt: string, begin: boolean): Token[] => {
    const ids: Token[] = [...encodeEscaped(vocabulary, prompt)];
    // A prompt may bring its begin token along; there must be one of it.
    if (begin && bos !== null && shouldPrependBosToken && ids[0] !== bos) ids.unshift(bos);
    if (ids.length > 0 && ids.length < context) return ids;
    const [code, what] =
      ids.length === 0
        ? ['ERR_EMPTY', 'the prompt is empty and the model has no begin token; give some text']
        : ['ERR_CONTEXT', `the prompt has ${ids.length} tokens, the context ${context}; shorten it or give more context`];
    throw new DataError(`${name}: ${what}`, { code, op: 'generate', argument: 'prompt', actual: String(ids.length) });
  };

  const run = async (sequence: Sequence, prompt: string, call: CompletionOptions, begin: boolean): Promise<Reply> => {
    checkAbilities(name, can, call);
    const { maxTokens = 512, stop = [], stopIds = [], logProbabilities, signal, onText } = call;
    const ids = encode(prompt, begin);
    const draws = drawsOf(model, library, ends, ids, call);
    const most = Math.min(maxTokens, context - ids.length);
    const text = textWriter(
      windowDecoder((tokens) => model.detokenize(tokens)),
      stop,
    );
    const scores: TokenScore[] = [];
    let written = '';
    let finish: Reply['finish'] = 'length';
    let completionTokens = 0;
    const take = (piece: string): void => {
      written += piece;
      if (piece !== '') onText?.(piece);
    };
    await sequence.clearHistory();
    for await (const { token, score } of tokensOf(sequence, ids, draws)) {
      signal?.throwIfAborted();
      if (model.isEogToken(token) || stopIds.includes(token)) {
        finish = 'stop';
        break;
      }
      completionTokens++;
      if (score !== undefined) scores.push(score);
      if (text.push(token)) finish = 'stop';
      take(text.take());
      if (finish === 'stop' || completionTokens === most) break;
    }
    take(text.end());
    const usage = { promptTokens: ids.length, completionTokens };
    count(meter, usage);
    return { text: written, finish, usage, ...(logProbabilities === undefined ? {} : { tokens: scores }) };
  };

  // A chat template has decided for itself whether a begin token goes first.
  const complete = (prompt: string, call: CompletionOptions, begin = true): Promise<Reply> =>
    limited(async () => {
      call.signal?.throwIfAborted();
      const sequence = free.pop()!;
      try {
        return await run(sequence, prompt, call, begin);
      } finally {
        free.push(sequence);
      }
    });

  return {
    name: `gguf:${name}@${setting.digest}`,
    model: name,
    can,
    concurrency: sequences,
    meter,
    ...(template === undefined ? {} : { template }),
    complete: (prompt, call = {}) => complete(prompt, call),
    async chat(messages, call = {}) {
      const asked = chatCall(name, template, vocabulary, messages, call);
      return complete(asked.prompt, asked.call, false);
    },
    async embed(texts, { signal } = {}) {
      embedder ??= model.createEmbeddingContext({ contextSize: context });
      const embedding = await embedder;
      const vectors: Float32Array[] = [];
      for (const text of texts) {
        signal?.throwIfAborted();
        // Cut to the context, with room for the tokens that begin and end it; of an empty text, those of the end alone.
        const ids = model.tokenize(text).slice(0, context - 3);
        const { vector } = await embedding.getEmbeddingFor(ids.length === 0 ? ends.slice(0, 1) : ids);
        vectors.push(Float32Array.from(vector));
        count(meter, { promptTokens: ids.length, completionTokens: 0 });
      }
      return vectors;
    },
    async dispose() {
      await (await embedder)?.dispose();
      await held.dispose();
      await model.dispose();
      await setting.close();
    },
  };
}

interface Drawn {
  readonly token: Token;
  readonly score?: TokenScore;
}

/** How the tokens of a call are drawn. */
interface Draws {
  /** How many of the first tokens are drawn here. */
  readonly here: number;
  /** Options with which llama.cpp tells distributions as the model has them, but for a repetition penalty. */
  readonly whole: Readonly<Record<string, unknown>>;
  /** Options with which it draws by itself. */
  readonly theirs: Readonly<Record<string, unknown>>;
  readonly generated: Token[];
  /** Draws the next token here. */
  pick(probabilities: ReadonlyMap<Token, number>): Drawn;
}

/** The tokens of a text without end; each that is taken goes on it. */
async function* tokensOf(sequence: Sequence, ids: readonly Token[], draws: Draws): AsyncGenerator<Drawn, void> {
  const { here, generated } = draws;
  let given = ids;
  for (let whole = here > 0; ; whole = false) {
    const steps = sequence.evaluateWithMetadata(given, { probabilities: whole }, whole ? draws.whole : draws.theirs);
    try {
      for (let step = await steps.next(); step.done !== true; step = await steps.next(generated.at(-1))) {
        const drawn = whole ? draws.pick(step.value.probabilities!) : { token: step.value.token };
        generated.push(drawn.token);
        yield drawn;
        if (whole && generated.length === here) break;
      }
    } finally {
      await steps.return();
    }
    given = generated.slice(-1);
  }
}

function drawsOf(
  model: Model,
  library: LlamaModule,
  ends: readonly Token[],
  ids: readonly Token[],
  call: CompletionOptions,
): Draws {
  const { temperature = 1, topP, topK, minP, repetitionPenalty = 1, seed, choices, stopIds = [], logProbabilities } = call;
  const { bias = {}, firstBias, firstTemperature } = call;
  if (repetitionPenalty !== 1 && logProbabilities !== undefined) {
    throw unable('llama.cpp', 'tell log-probabilities from before a repetition penalty', 'leave one of the two out');
  }
  const size = model.fileInfo.metadata.tokenizer!.ggml!.tokens!.length;
  const encoded = choices?.map((choice) => model.tokenize(choice, false, 'trimLeadingSpace'));
  const sampling = (temperature: number, logitBias: Readonly<Record<number, number>>): Sampling =>
    checkSampling(
      {
        ...{ temperature, logitBias, repetitionPenalty },
        ...(topP === undefined ? {} : { topP }),
        ...(topK === undefined ? {} : { topK }),
        ...(minP === undefined ? {} : { minP }),
        ...(seed === undefined ? {} : { seed }),
        ...(encoded === undefined ? {} : { allow: choiceMask(encoded, size, [...ends, ...stopIds]) }),
      },
      size,
    );
  const later = sampling(temperature, bias);
  const first = sampling(firstTemperature ?? temperature, { ...bias, ...firstBias });
  const generated: Token[] = [];
  const common = {
    yieldEogToken: true,
    ...(repetitionPenalty === 1
      ? {}
      : { repeatPenalty: { punishTokens: () => [...ids, ...generated], penalty: repetitionPenalty } }),
  };
  const biased = library.TokenBias.for(model as never);
  for (const [id, logit] of later.logitBias) biased.set(id as never, { logit });
  // Their bias passes over tokens that end a text.
  const all = encoded !== undefined || logProbabilities !== undefined || later.logitBias.some(([id]) => model.isEogToken(id));
  const other = firstBias !== undefined || firstTemperature !== undefined;
  return {
    generated,
    here: all ? Number.POSITIVE_INFINITY : other ? 1 : 0,
    whole: { ...common, temperature: 0 },
    theirs: {
      ...{ ...common, temperature, seed: later.seed, topK: topK ?? 0, topP: later.topP, minP: later.minP },
      ...(later.logitBias.length === 0 ? {} : { tokenBias: biased }),
    },
    pick(probabilities) {
      const s = generated.length === 0 ? first : later;
      // Logarithms of probabilities are as good as logits. What was rounded to nothing stays the least likely, not impossible.
      const row = new Float32Array(size);
      for (const [id, p] of probabilities) row[id] = Math.log(Math.max(p, leastProbability));
      const changed = row.slice();
      // The penalty needs the logits themselves: llama.cpp has applied it.
      adjust(changed, { ...s, repetitionPenalty: 1 }, [], s.allow?.(generated));
      const top = topOf(changed, candidatesOf(s, size), s.temperature);
      const token = draw(top, s, chance(s.seed, generated.length), changed)!;
      return { token, ...(logProbabilities === undefined ? {} : { score: scoreOf(model, row, token, logProbabilities) }) };
    },
  };
}

/** The smallest number above 0 in float32. */
const leastProbability = 2 ** -149;

function scoreOf(model: Model, row: Float32Array, token: Token, count: number): TokenScore {
  const { values, ids, sum } = topOf(row, Math.max(1, count), 1);
  const score = (id: number, z: number) => ({
    text: model.detokenize([id], true),
    logProbability: z - values[0]! - Math.log(sum),
  });
  const alternatives = Array.from({ length: Math.min(count, row.length) }, (_, i) => score(ids[i]!, values[i]!));
  return { ...score(token, row[token]!), alternatives };
}

/** llama.cpp's number for tokens that are no text. */
const controlType = 3;

/** Control tokens are found in prompts by their texts, but not in what messages say. */
function vocabularyOf(model: Model) {
  const { tokens = [], token_type: types = [] } = model.fileInfo.metadata.tokenizer?.ggml ?? {};
  const added = tokens.map((content, id) => ({ id, content, special: types[id] === controlType }));
  return {
    file: { added: added.filter(({ special }) => special) },
    encode: (text: string) => Int32Array.from(model.tokenize(text, true)),
    id: (text: string) => {
      const ids = model.tokenize(text, true);
      return ids.length === 1 ? ids[0] : undefined;
    },
  };
}

/** A template by name or source, else the file's own. */
function templateOf(model: Model, name: string, given: string | undefined): ChatTemplate | undefined {
  const { bos, eos } = model.tokens;
  const token = (id: number) => model.detokenize([id], true);
  const vocabulary = { bos: bos ?? undefined, eos: eos ?? undefined, pad: undefined, unk: undefined, token };
  const source = given ?? model.fileInfo.metadata.tokenizer?.chat_template;
  return source === undefined ? undefined : chatTemplate(source, vocabulary, given === undefined ? name : undefined);
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
