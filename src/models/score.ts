// How likely given texts are, without the logits of all tokens.
//   B texts of a pass, T tokens, C width
import { linearCrossEntropy } from '../ops/loss.ts';
import { reshape } from '../ops/reshape.ts';
import { DataError } from '../tensor/errors.ts';
import { scope } from '../tensor/scope.ts';
import { noGrad } from '../tensor/tape.ts';
import { readAs, tensor } from '../tensor/tensor.ts';
import type { LanguageModel } from './model.ts';
import { check, checkId } from './sampling.ts';

/** Tokens and what is to be said of them. */
export interface ScoreRequest {
  readonly ids: ArrayLike<number>;
  /** The first of `ids` to be scored, those before are its prompt. Default 1: all that have a token before them. */
  readonly from?: number;
}

/**
 * The logarithm of the probability of each token, given those before it in its text. Texts are taken together while they have no more than
 * `tokens` tokens, shorter ones with shorter ones; what a text scores does not depend on the others.
 * @returns for each request `ids.length - from` numbers, in nats
 * @throws DataError for an id outside the vocabulary, or a text longer than the model's context; ConfigError for a `from` out of range.
 */
export async function scoreTokens(
  model: LanguageModel,
  requests: readonly ScoreRequest[],
  options: { readonly tokens?: number; readonly signal?: AbortSignal } = {},
): Promise<Float32Array[]> {
  const { tokens = 4096, signal } = options;
  check('tokens', tokens, Number.isInteger(tokens) && tokens >= 1, 'a whole number from 1');
  const { context, vocabSize } = model.config;
  const texts = requests.map(({ ids, from = 1 }, index) => {
    check(
      `from of text ${index}`,
      from,
      Number.isInteger(from) && from >= 1 && from <= Math.max(1, ids.length),
      `1 to ${ids.length}`,
    );
    for (let i = 0; i < ids.length; i++) checkId(`text ${index}`, ids[i]!, vocabSize);
    if (ids.length > context) {
      throw new DataError(`generate: text ${index} has ${ids.length} tokens, the model's context is ${context}; shorten it`, {
        ...{
          code: 'ERR_CONTEXT',
          op: 'scoreTokens',
          argument: 'ids',
          expected: `at most ${context}`,
          actual: String(ids.length),
        },
      });
    }
    return { index, ids, from };
  });
  const scores: Float32Array[] = texts.map(({ ids, from }) => new Float32Array(Math.max(0, ids.length - from)));
  const order = texts
    .filter(({ ids, from }) => ids.length > from)
    .sort((a, b) => a.ids.length - b.ids.length || a.index - b.index);
  for (let first = 0, last = 0; first < order.length; first = last) {
    signal?.throwIfAborted();
    last = first + 1;
    while (last < order.length && (last + 1 - first) * order[last]!.ids.length <= tokens) last++;
    const batch = order.slice(first, last);
    const losses = await lossesOf(model, batch);
    const t = batch.at(-1)!.ids.length - 1;
    for (const [row, { index, ids, from }] of batch.entries()) {
      for (let i = from; i < ids.length; i++) scores[index]![i - from] = -losses[row * t + i - 1]!;
    }
  }
  return scores;
}

/** Cross-entropy [B T] of texts in rows, the longest last, filled up on the right, where nothing sees it. */
async function lossesOf(model: LanguageModel, batch: readonly { ids: ArrayLike<number>; from: number }[]): Promise<Float32Array> {
  const t = batch.at(-1)!.ids.length - 1;
  const shape = [batch.length, t];
  const [ids, targets] = [new Int32Array(batch.length * t), new Int32Array(batch.length * t)];
  const weights = new Float32Array(batch.length * t);
  for (const [row, text] of batch.entries()) {
    for (let i = 0; i + 1 < text.ids.length; i++) {
      ids[row * t + i] = text.ids[i]!;
      targets[row * t + i] = text.ids[i + 1]!;
      weights[row * t + i] = i + 1 >= text.from ? 1 : 0;
    }
  }
  const loss = scope(() =>
    noGrad(() => {
      const positions = Int32Array.from(ids, (_, i) => i % t);
      const h = model.hidden({ ids: tensor(ids, shape), positions: tensor(positions, shape) });
      return linearCrossEntropy(reshape(h, [-1, model.config.width]), model.head, tensor(targets), {
        ...{ weights: tensor(weights), cap: model.config.finalCap },
      }).loss;
    }),
  );
  return readAs(loss, 'f32').finally(() => loss.dispose());
}
