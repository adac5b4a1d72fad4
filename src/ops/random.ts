import { op } from '../tensor/op.ts';
import { checkSeed } from '../tensor/random.ts';
import type { Tensor } from '../tensor/tensor.ts';

const noise = op({
  forward: 'add_noise(x[* c], size[*]:f32, seed, stream) -> y[* c]',
  backward: 'add_noise_backward(dy[* c]) -> dx = dy',
});
const normal = op({ forward: 'random_normal(y[*]&, seed, stream, std) -> ' });

/**
 * Fills a tensor with normal numbers of mean 0, in place. Element i depends on (seed, stream, i) alone, so the same arguments give
 * the same bits, whatever the thread count.
 * @param stream tells apart tensors of one seed.
 * @param std standard deviation.
 * @throws ConfigError `ERR_SEED` for a seed or stream that is no integer in [0, 2^53).
 */
export function randomNormal_(y: Tensor, seed: number, stream: number, std: number): void {
  normal(y, checkSeed(seed), checkSeed(stream, 'stream'), std);
}

/**
 * x + size · u, where u is uniform in [-1, 1): element i moves by a number that depends on (seed, stream, i) alone. The gradient of x is
 * that of the result.
 * @param x [* C]
 * @param size [*], f32: how far the elements of a row may move.
 * @param stream tells apart draws of one seed.
 * @returns [* C]
 * @throws ConfigError `ERR_SEED` for a seed or stream that is no integer in [0, 2^53).
 */
export function addNoise(x: Tensor, size: Tensor, seed: number, stream: number): Tensor {
  return noise(x, size, checkSeed(seed), checkSeed(stream, 'stream'))[0]!;
}
