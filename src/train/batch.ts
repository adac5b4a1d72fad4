import type { Batch, Likely } from '../data/pack.ts';
import type { ModelInput } from '../models/config.ts';
import { type Tensor, tensor } from '../tensor/tensor.ts';

/** A batch on the device. B sequences of T tokens, N = B T. */
export interface DeviceBatch {
  readonly input: ModelInput;
  /** Next tokens [N], i32; -100 where there is none. */
  readonly targets: Tensor;
  /** What each token counts [N]. */
  readonly weights: Tensor;
  /** What a cached teacher found likely: ids [N K], i32, and their log-probabilities [N K]. */
  readonly likely?: { readonly ids: Tensor; readonly logProbs: Tensor };
}

/**
 * Uploads a batch into the current scope.
 * @param share what one predicted token counts: 1 / (predicted tokens of the whole step), so that micro-batches of different
 * fillings add up to the mean over all tokens.
 */
export function upload(batch: Batch, share: number): DeviceBatch {
  const shape = [batch.rows, batch.length];
  return {
    input: {
      ids: tensor(batch.ids, shape),
      positions: tensor(batch.positions, shape),
      starts: tensor(batch.starts, shape),
    },
    targets: tensor(batch.targets),
    weights: tensor(batch.weights.map((w) => w * share)),
    ...(batch.likely === undefined ? {} : { likely: uploadLikely(batch.likely) }),
  };
}

function uploadLikely({ topK, ids, logProbs }: Likely): { readonly ids: Tensor; readonly logProbs: Tensor } {
  const shape = [ids.length / topK, topK];
  return { ids: tensor(ids, shape), logProbs: tensor(logProbs, shape) };
}
