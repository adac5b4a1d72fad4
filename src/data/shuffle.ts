// Shuffling of streams that are too long to be indexed.

import { ConfigError } from '../tensor/errors.ts';
import { checkSeed, randomBlock } from '../tensor/random.ts';

// A stream number of the seed that nothing else uses.
const shuffleStream = 0x5f1e;

/**
 * Gives the items of a stream in another order, the same for the same seed: each item that comes in takes the place of a random one
 * of a buffer. An item comes at most `size` places early; how late is a matter of chance.
 * @param size items held. @throws ConfigError
 */
export async function* shuffled<T>(
  items: AsyncIterable<T> | Iterable<T>,
  { size, seed = 0 }: { readonly size: number; readonly seed?: number },
): AsyncGenerator<T> {
  checkSeed(seed);
  if (!Number.isInteger(size) || size < 1) {
    throw new ConfigError(`shuffled: size is ${size}; it should be a positive integer`, {
      code: 'ERR_CONFIG',
      op: 'shuffled',
      argument: 'size',
      expected: 'a positive integer',
      actual: String(size),
    });
  }
  const buffer: T[] = [];
  const block = new Uint32Array(4);
  let draws = 0;
  const draw = (below: number) => Math.floor((randomBlock(seed, shuffleStream, draws++, block)[0]! / 2 ** 32) * below);
  for await (const item of items) {
    if (buffer.length < size) {
      buffer.push(item);
      continue;
    }
    const at = draw(size);
    yield buffer[at]!;
    buffer[at] = item;
  }
  while (buffer.length > 0) {
    const at = draw(buffer.length);
    yield buffer[at]!;
    buffer[at] = buffer.at(-1)!;
    buffer.pop();
  }
}
