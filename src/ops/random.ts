import { op } from '../tensor/op.ts';
import type { Tensor } from '../tensor/tensor.ts';

const normal = op({ forward: 'random_normal(y[*]&, seed, stream, std) -> ' });

/**
 * Fills a tensor with normal numbers of mean 0, in place. Element i depends on (seed, stream, i) alone, so the same arguments give
 * the same bits, whatever the thread count.
 * @param stream tells apart tensors of one seed.
 * @param std standard deviation.
 */
export function randomNormal_(y: Tensor, seed: number, stream: number, std: number): void {
  normal(y, seed, stream, std);
}
