import { expect, test } from 'vitest';
import { embedding } from '../../src/ops/embedding.ts';
import { sync } from '../../src/tensor/engine.ts';
import { DataError, DTypeError, ShapeError } from '../../src/tensor/errors.ts';
import { scope } from '../../src/tensor/scope.ts';
import { tensor, zeros } from '../../src/tensor/tensor.ts';
import { type Array64, array, checkOp, type Input } from './check.ts';

const rowsOf = (ids: Array64, table: Array64, scale: number): Array64 => {
  const c = table.shape[1]!;
  const y = array([...ids.shape, c], new Float64Array(ids.data.length * c));
  ids.data.forEach((id, i) => {
    y.data.set(
      table.data.subarray(id * c, id * c + c).map((x) => x * scale),
      i * c,
    );
  });
  return y;
};

// Ids that repeat often, never, and not at all; a table of one row.
const cases = (dtype?: 'bf16'): Input[][] =>
  [
    { tokens: [0], v: 3, c: 4 },
    { tokens: [], v: 2, c: 3 },
    { tokens: [5], v: 1, c: 1 },
    { tokens: [2, 7], v: 5, c: 17 },
    { tokens: [3, 11], v: 401, c: 8 },
    { tokens: [2, 150], v: 37, c: 65 },
    // Runs of one id that go over several chunks of a sort, and ids of more than one digit.
    { tokens: [70], v: 1, c: 16 },
    { tokens: [2100], v: 300, c: 8 },
    { tokens: [3, 41], v: 70_000, c: 1 },
  ].map(({ tokens, v, c }) => [
    { shape: tokens, dtype: 'i32', below: v },
    { shape: [v, c], weight: true, ...(dtype && { dtype }) },
  ]);

checkOp({
  name: 'embedding',
  run: (ids, table) => embedding(ids!, table!, { scale: 3 }),
  reference: (ids, table) => rowsOf(ids!, table!, 3),
  cases: cases(),
});

checkOp({
  name: 'embedding, bf16 table',
  run: (ids, table) => embedding(ids!, table!),
  reference: (ids, table) => rowsOf(ids!, table!, 1),
  cases: cases('bf16'),
});

test.each([
  [8, 'token id 8 at position 2 is outside the table of 8 rows'],
  [-1, 'token id -1 at position 2 is outside the table of 8 rows'],
])('token %i of 8 is refused, named with its position', async (id, text) => {
  const ids = tensor(Int32Array.of(0, 7, id, 1));
  const table = zeros([8, 3]);
  const y = embedding(ids, table);
  const error = await y.read().catch((e: unknown) => e);
  expect(error).toBeInstanceOf(DataError);
  expect(error).toMatchObject({
    code: 'ERR_TOKEN_RANGE',
    op: 'embedding',
    argument: 'ids',
    expected: '0 to 7',
    actual: String(id),
  });
  expect((error as Error).message).toContain(text);
  // The engine goes on.
  const fineId = tensor(Int32Array.of(1));
  const fine = embedding(fineId, table);
  expect(await fine.read()).toHaveLength(3);
  for (const t of [ids, table, y, fineId, fine]) t.dispose();
  await sync();
});

test('ids are i32, a table has two dims', () => {
  scope(() => {
    const table = zeros([8, 3]);
    expect(() => embedding(tensor([1, 2]), table)).toThrow(DTypeError);
    expect(() => embedding(tensor(Int32Array.of(1)), tensor([1, 2]))).toThrow(ShapeError);
  });
});
