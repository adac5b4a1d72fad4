import { op } from '../tensor/op.ts';
import type { Tensor } from '../tensor/tensor.ts';

const embed = op({
  forward: 'embedding(ids[*]:i32, table[v c]:float, scale) -> y[* c]',
  backward: 'embedding_backward(dy[* c], ids[*]:i32, table[v c]:float, scale) -> dtable[v c]:f32+',
});

export interface EmbeddingOptions {
  /** What each row is multiplied by: √C in Gemma. Default 1. */
  readonly scale?: number;
  /** Make the rows again in the backward pass instead of keeping them. Default false. */
  readonly cheap?: boolean;
}

/**
 * Rows of a table by number. The gradient sums over equal ids in token order, so its bits do not depend on threads.
 * @param ids [*], i32
 * @param table [V C], f32 or bf16
 * @returns [* C]
 * @throws DataError `ERR_TOKEN_RANGE`, at the next read, when an id is not in 0 .. V-1; it names the id and its position.
 */
export function embedding(ids: Tensor, table: Tensor, { scale = 1, cheap = false }: EmbeddingOptions = {}): Tensor {
  return embed(ids, table, scale, { cheap })[0]!;
}
