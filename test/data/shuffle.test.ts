import { expect, test } from 'vitest';
import { shuffled } from '../../src/data/shuffle.ts';

const numbers = Array.from({ length: 200 }, (_, i) => i);

async function collect(size: number, seed?: number): Promise<number[]> {
  const found: number[] = [];
  for await (const n of shuffled(numbers, seed === undefined ? { size } : { size, seed })) found.push(n);
  return found;
}

test('every item comes once, in an order that the seed decides', async () => {
  for (const size of [1, 2, 7, 200, 1000]) {
    const order = await collect(size, 3);
    expect(order.toSorted((a, b) => a - b)).toEqual(numbers);
    expect(await collect(size, 3)).toEqual(order);
    for (const [place, item] of order.entries()) expect(item).toBeLessThanOrEqual(place + size);
  }
  expect(await collect(1)).toEqual(numbers);
  expect(await collect(50, 3)).not.toEqual(await collect(50, 4));
  await expect(collect(0)).rejects.toMatchObject({ code: 'ERR_CONFIG', argument: 'size' });
});
