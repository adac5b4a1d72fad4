// Tokens from a model, with keys and values kept: some texts at a time, each with a place in the cache that the next one takes over.
//   B texts of a step, T tokens, C width, V vocabulary, K largest logits

import { cast, softcap } from '../ops/elementwise.ts';
import { linear } from '../ops/linear.ts';
import { reshape, rows } from '../ops/reshape.ts';
import { topLogits } from '../ops/sample.ts';
import { checkModel } from '../tensor/argument.ts';
import { DataError } from '../tensor/errors.ts';
import { type Graph, graph } from '../tensor/graph.ts';
import { keep, scope } from '../tensor/scope.ts';
import { noGrad } from '../tensor/tape.ts';
import { readAs, type Tensor, tensor, write } from '../tensor/tensor.ts';
import { cacheRows, type KeyValueCache } from './cache.ts';
import type { LanguageModel } from './model.ts';
import { type PrefixCache, temporaryPlaces } from './prefix.ts';
import {
  adjust,
  candidatesOf,
  chance,
  check,
  checkId,
  checkSampling,
  draw,
  isAdjusted,
  type Sampling,
  type SamplingOptions,
  type Top,
  topOf,
} from './sampling.ts';

/** How one text goes on and when it ends. */
export interface TokenOptions extends SamplingOptions {
  /** Most new tokens. Default 128. */
  readonly tokens?: number;
  /** Ids that end the text and are not part of it. Default none. */
  readonly stopIds?: readonly number[];
  /** How many of the likeliest tokens to tell beside the one that was drawn, 0 to 1024. Default 0. */
  readonly topLogProbs?: number;
  /** Ends the text after a token for which it returns true; it is called once for each, in order. */
  readonly until?: (id: number) => boolean;
}

/** A prompt, and how it goes on. */
export interface TokenRequest extends TokenOptions {
  readonly ids: ArrayLike<number>;
}

export interface BatchOptions {
  /** Texts that are worked on together. A finished one makes room for the next. Default 8. */
  readonly batch?: number;
  /** Most tokens of a prompt that are read at once. Default 512. */
  readonly chunk?: number;
  /** Ids below it can be drawn: those that the tokenizer knows. Default: the model's vocabulary. */
  readonly vocabSize?: number;
  /** Keeps keys and values for the next call, whose prompts may begin as these texts do. Default: they are forgotten. */
  readonly cache?: PrefixCache;
  readonly signal?: AbortSignal;
}

/** A token and the logarithm of its probability, before temperature and all else that changes the draw. */
export interface TokenLogProb {
  readonly id: number;
  readonly logProb: number;
}

/** `stop`: an end token, a stop text or `until`; `length`: as many tokens as asked for, or the model's context is full. */
export type FinishReason = 'stop' | 'length' | 'aborted';

export type GenerationEvent =
  /** One more token of request `index`, and with `topLogProbs` the likeliest ones, the likeliest first. */
  | ({ readonly type: 'token'; readonly index: number; readonly top?: readonly TokenLogProb[] } & TokenLogProb)
  | { readonly type: 'end'; readonly index: number; readonly reason: FinishReason };

interface Text {
  readonly index: number;
  readonly place: number;
  readonly sampling: Sampling;
  readonly stopIds: ReadonlySet<number>;
  readonly topLogProbs: number;
  readonly until: ((id: number) => boolean) | undefined;
  readonly prompt: Int32Array;
  readonly generated: number[];
  /** Most of `generated`. */
  readonly most: number;
}

/** Logits of one pass [B V] and what was read of them. */
interface Scores {
  readonly tops: readonly Top[];
  /** The logits of a text, copied. */
  row(i: number): Promise<Float32Array>;
}

/**
 * Continues prompts, each as if it were alone; tokens come as they are drawn, those of one step in the order of the requests. Leaving
 * the loop frees everything. An abort ends all texts that are not finished with the reason `aborted`.
 * @throws ConfigError for an option out of range; DataError for a prompt that is empty (`ERR_EMPTY`), not below the model's context
 *   (`ERR_CONTEXT`) or has an id outside the vocabulary, before anything runs.
 */
export async function* generateTokens(
  model: LanguageModel,
  requests: readonly TokenRequest[],
  options: BatchOptions = {},
): AsyncGenerator<GenerationEvent, void, undefined> {
  checkModel('generateTokens', model);
  const { batch = 8, chunk = 512, vocabSize = model.config.vocabSize, signal } = options;
  check('batch', batch, Number.isInteger(batch) && batch >= 1, 'a whole number from 1');
  check('chunk', chunk, Number.isInteger(chunk) && chunk >= 1, 'a whole number from 1');
  const ids = Math.min(vocabSize, model.config.vocabSize);
  const waiting = requests.map((request, index) => textOf(model, request, index, ids));
  if (waiting.length === 0) return;
  const capacity = Math.max(...waiting.map(limitOf));
  const most = Math.min(batch, waiting.length);
  const places = options.cache?.open(model, most, capacity) ?? temporaryPlaces(most, capacity);
  const step = stepper(model, places.cache, ids);
  let running: Text[] = [];
  const held = new Set<Text>();
  let sound = true;
  try {
    while (waiting.length + running.length > 0) {
      if (signal?.aborted) {
        for (const { index } of [...running, ...waiting]) yield { type: 'end', index, reason: 'aborted' };
        return;
      }
      const room = waiting.length > 0 && running.length < most;
      const fresh = room ? places.take(waiting[0]!.prompt, limitOf(waiting[0]!)) : undefined;
      const texts = fresh === undefined ? running : [{ ...waiting.shift()!, place: fresh }];
      for (const text of texts) held.add(text);
      const scores = fresh === undefined ? await step.next(running) : await step.read(texts[0]!, chunk);
      const ended = new Set<Text>();
      for (const [i, text] of texts.entries()) {
        const { token, reason } = await settle(text, scores, i);
        if (token !== undefined) yield { type: 'token', index: text.index, ...token };
        if (reason === undefined) continue;
        ended.add(text);
        held.delete(text);
        places.give(text.place, idsOf(text));
        yield { type: 'end', index: text.index, reason };
      }
      running = [...(fresh === undefined ? [] : running), ...texts].filter((text) => !ended.has(text));
    }
  } catch (error) {
    sound = false;
    throw error;
  } finally {
    step.dispose();
    for (const text of held) places.give(text.place, idsOf(text));
    places.close(sound);
  }
}

/** Most tokens that a text can come to have. */
const limitOf = ({ prompt, most }: Pick<Text, 'prompt' | 'most'>): number => prompt.length + most;

const idsOf = ({ prompt, generated }: Text): Int32Array => Int32Array.from([...prompt, ...generated]);

function textOf(
  model: LanguageModel,
  request: TokenRequest,
  index: number,
  vocabSize: number,
): Omit<Text, 'place'> & { place: -1 } {
  const { tokens = 128, stopIds = [], topLogProbs = 0, until } = request;
  const { context } = model.config;
  check('tokens', tokens, Number.isInteger(tokens) && tokens >= 1, 'a whole number from 1');
  const fits = Number.isInteger(topLogProbs) && topLogProbs >= 0 && topLogProbs <= 1024;
  check('topLogProbs', topLogProbs, fits, 'a whole number from 0 to 1024');
  const sampling = checkSampling(request, vocabSize);
  for (const id of stopIds) checkId('stopIds', id, model.config.vocabSize);
  const prompt = Int32Array.from(request.ids);
  const which = index === 0 ? 'the prompt' : `prompt ${index}`;
  if (prompt.length === 0) {
    throw new DataError(`generate: ${which} is empty; give at least one token`, {
      ...{ code: 'ERR_EMPTY', op: 'generate', argument: 'prompt' },
    });
  }
  if (prompt.length >= context) {
    throw new DataError(
      `generate: ${which} has ${prompt.length} tokens, the model's context is ${context}; shorten it to leave room for an answer`,
      {
        ...{ code: 'ERR_CONTEXT', op: 'generate', argument: 'prompt' },
        ...{ expected: `below ${context}`, actual: String(prompt.length) },
      },
    );
  }
  // As given: Int32Array would have rounded.
  for (let i = 0; i < prompt.length; i++) checkId('prompt', request.ids[i]!, model.config.vocabSize);
  return {
    ...{ index, place: -1, sampling, stopIds: new Set(stopIds), topLogProbs, until, prompt, generated: [] },
    most: Math.min(tokens, context - prompt.length),
  };
}

/** Draws the next token of a text. */
async function settle(
  text: Text,
  scores: Scores,
  i: number,
): Promise<{ token?: TokenLogProb & { top?: readonly TokenLogProb[] }; reason?: FinishReason }> {
  const { sampling, generated } = text;
  const top = scores.tops[i]!;
  const mask = sampling.allow?.(generated);
  const u = chance(sampling.seed, generated.length);
  let id: number | undefined;
  let logit: number | undefined;
  if (isAdjusted(sampling, mask)) {
    const raw = await scores.row(i);
    const row = raw.slice();
    adjust(row, sampling, sampling.repetitionPenalty === 1 ? [] : [...text.prompt, ...generated], mask);
    id = draw(topOf(row, candidatesOf(sampling, row.length), sampling.temperature), sampling, u, row)!;
    logit = raw[id]!;
  } else {
    id = draw(top, sampling, u);
    if (id === undefined) {
      const row = await scores.row(i);
      id = draw(top, sampling, u, row)!;
      logit = row[id]!;
    }
  }
  if (text.stopIds.has(id)) return { reason: 'stop' };
  const logProb = (z: number): number => z - top.values[0]! - Math.log(top.sum);
  const at = Array.prototype.indexOf.call(top.ids, id);
  const token = {
    ...{ id, logProb: logProb(logit ?? top.values[at]!) },
    ...(text.topLogProbs === 0 ? {} : { top: likeliest(top, text.topLogProbs, logProb) }),
  };
  generated.push(id);
  if (text.until?.(id) === true) return { token, reason: 'stop' };
  return generated.length === text.most ? { token, reason: 'length' } : { token };
}

function likeliest(top: Top, count: number, logProb: (z: number) => number): TokenLogProb[] {
  return Array.from({ length: Math.min(count, top.size) }, (_, i) => ({ id: top.ids[i]!, logProb: logProb(top.values[i]!) }));
}

/** Runs the model over prompts and over one token of each running text. */
function stepper(model: LanguageModel, cache: KeyValueCache, vocabSize: number) {
  const { width, finalCap } = model.config;

  const hidden = (ids: Tensor, positions: Tensor, places: readonly number[]): Tensor =>
    model.hidden({ ids, positions, cache: cacheRows(cache, places, ids.shape[1]!) });

  /** The largest logits of the last token of each row, beside the logits [B V]. */
  const head = (h: Tensor, texts: readonly Text[]) => {
    const z = linear(h, model.head);
    const logits = finalCap === null ? z : softcap(z, finalCap);
    const temperatures = texts.map(({ sampling: { temperature: t } }) => (t === 0 ? 1 : t));
    const k = Math.max(
      ...texts.map((text) => Math.min(vocabSize, Math.max(text.topLogProbs, candidatesOf(text.sampling, vocabSize)))),
    );
    return { logits, ...topLogits(logits, tensor(temperatures), k, vocabSize) };
  };
  type Head = ReturnType<typeof head>;

  const read = async (result: Head, texts: readonly Text[]): Promise<Scores> => {
    const row = async (i: number): Promise<Float32Array> => {
      const one = scope(() => {
        const z = rows(result.logits, i, i + 1);
        return z.dtype === 'f32' ? z : noGrad(() => cast(z, 'f32'));
      });
      return (await readAs(one, 'f32').finally(() => one.dispose())).subarray(0, vocabSize);
    };
    const [values, ids, sums] = await Promise.all([
      readAs(result.values, 'f32'),
      readAs(result.ids, 'i32'),
      readAs(result.sums, 'f32'),
    ]);
    const k = result.values.shape[1]!;
    const tops = texts.map((_, i) => ({
      ...{ size: vocabSize, sum: sums[2 * i]!, tempered: sums[2 * i + 1]! },
      ...{ values: values.subarray(i * k, (i + 1) * k), ids: ids.subarray(i * k, (i + 1) * k) },
    }));
    return { tops, row };
  };

  let last: Head | undefined; // logits may be asked for until the next pass
  const forget = (): void => {
    for (const t of Object.values(last ?? {})) t.dispose();
    last = undefined;
  };

  // A step over the same texts is recorded: all that changes from one to the next lies in two tensors.
  let recorded: { texts: string; ids: Tensor; positions: Tensor; graph: Graph<Head> } | undefined;
  const drop = (): void => {
    if (recorded === undefined) return;
    for (const t of [recorded.ids, recorded.positions, ...Object.values(recorded.graph.result)]) t.dispose();
    recorded.graph.dispose();
    recorded = undefined;
  };

  const one = (ids: Tensor, positions: Tensor, texts: readonly Text[]): Head =>
    noGrad(() => {
      const h = hidden(
        ids,
        positions,
        texts.map(({ place }) => place),
      );
      return head(reshape(h, [texts.length, width]), texts);
    });

  return {
    /** Reads what the cache has not of the prompt of a text. */
    async read(text: Text, chunk: number): Promise<Scores> {
      const { prompt, place } = text;
      forget();
      for (let from = cache.lengths[place]!; from < prompt.length; from += chunk) {
        const t = Math.min(chunk, prompt.length - from);
        const result = scope(() =>
          noGrad(() => {
            const positions = Int32Array.from({ length: t }, (_, i) => from + i);
            const h = hidden(tensor(prompt.slice(from, from + t), [1, t]), tensor(positions, [1, t]), [place]);
            return from + t < prompt.length ? undefined : head(rows(reshape(h, [t, width]), t - 1, t), [text]);
          }),
        );
        cache.lengths[place]! += t;
        if (result !== undefined) last = keep(result);
      }
      return read(last!, [text]);
    },

    /** One more token of each text: the last that was drawn. */
    async next(texts: readonly Text[]): Promise<Scores> {
      forget();
      const b = texts.length;
      const ids = Int32Array.from(texts, (text) => text.generated.at(-1)!);
      const positions = Int32Array.from(texts, ({ place }) => cache.lengths[place]!);
      const names = texts.map(({ index }) => index).join();
      if (recorded?.texts !== names) {
        drop();
        const input = { ids: keep(tensor(ids, [b, 1])), positions: keep(tensor(positions, [b, 1])) };
        recorded = { texts: names, ...input, graph: graph(() => one(input.ids, input.positions, texts)) };
        keep(recorded.graph.result);
      } else {
        write(recorded.ids, ids);
        write(recorded.positions, positions);
      }
      recorded.graph.replay();
      const { result } = recorded.graph;
      for (const { place } of texts) cache.lengths[place]!++;
      return read(result, texts);
    },

    dispose(): void {
      forget();
      drop();
    },
  };
}
