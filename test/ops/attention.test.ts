import { expect, test } from 'vitest';
import { type AttentionOptions, attention, attentionStep } from '../../src/ops/attention.ts';
import { copy, copy_ } from '../../src/ops/elementwise.ts';
import { dot } from '../../src/ops/reduce.ts';
import { reshape, rows } from '../../src/ops/reshape.ts';
import { ConfigError, DataError, ShapeError } from '../../src/tensor/errors.ts';
import { scope } from '../../src/tensor/scope.ts';
import { valueAndGrad } from '../../src/tensor/tape.ts';
import { parameter, type Tensor, tensor, zeros } from '../../src/tensor/tensor.ts';
import { testDevice } from '../device.ts';
import { type Array64, array, bf16Bits, checkOp, fromBf16, type Input, randomNumbers } from './check.ts';

// The definition, a query at a time.
function attend(q: Array64, k: Array64, v: Array64, starts?: Array64, options: AttentionOptions = {}): Array64 {
  const [b = 0, t = 0, h = 0, d = 0] = q.shape;
  const [, s = 0, g = 0] = k.shape;
  const { scale = d ** -0.5, cap, window } = options;
  const y = array(q.shape, { length: q.data.length });
  y.data.fill(0);
  for (let batch = 0; batch < b; batch++) {
    for (let i = 0; i < t; i++) {
      const position = s - t + i;
      const first = Math.max(starts?.data[batch * t + i] ?? 0, window ? position - window + 1 : 0);
      for (let head = 0; head < h; head++) {
        const query = ((batch * t + i) * h + head) * d;
        const key = (j: number): number => ((batch * s + j) * g + Math.floor(head / (h / g))) * d;
        const scores: number[] = [];
        for (let j = first; j <= position; j++) {
          let score = 0;
          for (let e = 0; e < d; e++) score += q.data[query + e]! * k.data[key(j) + e]!;
          scores.push(cap ? cap * Math.tanh((score * scale) / cap) : score * scale);
        }
        const top = Math.max(...scores);
        const weights = scores.map((x) => Math.exp(x - top));
        const sum = weights.reduce((x, w) => x + w, 0);
        for (const [j, w] of weights.entries()) {
          for (let e = 0; e < d; e++) y.data[query + e]! += (w / sum) * v.data[key(first + j) + e]!;
        }
      }
    }
  }
  return y;
}

const inputs = (b: number, t: number, s: number, h: number, g: number, d: number): Input[] => [
  { shape: [b, t, h, d] },
  { shape: [b, s, g, d] },
  { shape: [b, s, g, d] },
];
const square = (b: number, t: number, h: number, g: number, d: number): Input[] => inputs(b, t, t, h, g, d);

const options: Record<string, AttentionOptions> = {
  'attention, causal': {},
  'attention, window 1': { window: 1 },
  'attention, window 7, soft cap': { window: 7, cap: 2 },
  'attention, Gemma 2': { window: 20, cap: 50, scale: 0.2 },
  'attention, a cap too large to do without a maximum': { cap: 70 },
};
// Only bf16 is computed in on a GPU; sums are float32.
const onGpu = { compute: ['bf16'], bf16Tolerance: 0.01, bf16GradientTolerance: 0.03 } as const;

for (const [name, option] of Object.entries(options)) {
  checkOp({
    ...onGpu,
    name,
    run: (q, k, v) => attention(q!, k!, v!, option),
    reference: (q, k, v) => attend(q!, k!, v!, undefined, option),
    // No tokens, one, groups of 1, 2 and 3, heads of odd sizes, one past a block, several pairs.
    cases: [
      square(1, 0, 2, 1, 4),
      square(1, 1, 1, 1, 1),
      square(2, 3, 2, 1, 3),
      square(1, 31, 3, 3, 8),
      square(2, 65, 6, 2, 17),
      square(9, 26, 4, 2, 5),
    ],
    // A window of 1 has dq = dk = 0: a difference of equals, exact to float32 only beside its terms.
    gradientTolerance: option.window === 1 ? 4e-5 : 8e-6,
  });
}

const lengths = [13, 1, 1, 23, 2];
const startsOf = (t: number): number[] => {
  const starts = lengths.flatMap((n, i) => new Array<number>(n).fill(lengths.slice(0, i).reduce((x, y) => x + y, 0)));
  return Array.from({ length: t }, (_, i) => starts[i] ?? starts.length);
};
for (const window of [null, 5]) {
  checkOp({
    ...onGpu,
    name: `attention, packed documents, window ${window}`,
    run: (q, k, v, starts) => attention(q!, k!, v!, { window, cap: 50, starts: starts! }),
    reference: (q, k, v, starts) => attend(q!, k!, v!, starts, { window, cap: 50 }),
    cases: [1, 14, 67].map((t) => [
      ...square(2, t, 4, 2, 6),
      { shape: [2, t], dtype: 'i32', data: [...startsOf(t), ...new Array<number>(t).fill(0)] },
    ]),
    gradientTolerance: 8e-6,
  });
}

// Every head size that has GPU kernels of its own, with every mask: lengths past a tile of keys and past one of rows.
for (const d of [64, 80, 96, 128, 256]) {
  for (const [name, option] of Object.entries({ ...options, 'attention, no cap, window 7': { window: 7 } })) {
    checkOp({
      ...onGpu,
      name: `${name}, heads of ${d}`,
      run: (q, k, v) => attention(q!, k!, v!, option),
      reference: (q, k, v) => attend(q!, k!, v!, undefined, option),
      cases: [name === 'attention, Gemma 2' ? square(1, 67, 4, 2, d) : square(1, 37, 3, 1, d)],
      // Of scores of many terms.
      tolerance: 4e-6,
      gradientTolerance: option.window === 1 ? 2e-4 : 2e-5,
    });
  }
  for (const option of [{ cap: 50 }, { window: 5 }])
    checkOp({
      ...onGpu,
      name: `attention, packed documents, ${JSON.stringify(option)}, heads of ${d}`,
      run: (q, k, v, starts) => attention(q!, k!, v!, { ...option, starts: starts! }),
      reference: (q, k, v, starts) => attend(q!, k!, v!, starts, option),
      cases: [[...square(1, 41, 2, 1, d), { shape: [1, 41], dtype: 'i32', data: startsOf(41) }]],
      tolerance: 4e-6,
      gradientTolerance: 2e-5,
    });
  checkOp({
    ...onGpu,
    name: `attention of the last queries, heads of ${d}`,
    run: (q, k, v) => attention(q!, k!, v!, { cap: 50 }),
    reference: (q, k, v) => attend(q!, k!, v!, undefined, { cap: 50 }),
    cases: [inputs(1, 1, 530, 2, 1, d), inputs(1, 3, 66, 2, 1, d)],
    tolerance: 4e-6,
    gradient: false,
  });
}

for (const window of [null, 9]) {
  checkOp({
    ...onGpu,
    name: `attention of the last queries, window ${window}`,
    run: (q, k, v) => attention(q!, k!, v!, { window, cap: 50 }),
    reference: (q, k, v) => attend(q!, k!, v!, undefined, { window, cap: 50 }),
    cases: [inputs(2, 1, 1, 2, 1, 4), inputs(1, 1, 600, 4, 2, 10), inputs(2, 1, 33, 3, 1, 64), inputs(2, 5, 70, 6, 2, 16)],
    gradient: false,
  });
}

for (const scale of [-0.3, 0]) {
  checkOp({
    ...onGpu,
    name: `attention, scale ${scale}`,
    run: (q, k, v) => attention(q!, k!, v!, { scale }),
    reference: (q, k, v) => attend(q!, k!, v!, undefined, { scale }),
    cases: [square(1, 37, 2, 1, 17)],
    gradientTolerance: 8e-6,
  });
}

const dtype = testDevice === 'cpu' ? 'f32' : 'bf16';
const heads = (data: readonly number[], shape: readonly number[]): Tensor =>
  tensor(dtype === 'f32' ? data : Uint16Array.from(data, bf16Bits), shape);
const read = async (t: Tensor): Promise<number[]> =>
  Array.from((await t.read()) as Float32Array | Uint16Array, (x) => (t.dtype === 'bf16' ? fromBf16(x) : x));

test('decoding one by one gives what the whole sequence gives', async () => {
  const random = (n: number): number[] => Array.from({ length: n }, (_, i) => Math.sin(i * 12.9898 + n) * 2);
  const [t, h, g, d] = [20, 4, 2, 8];
  const [q, k, v] = [random(t * h * d), random(t * g * d), random(t * g * d)];
  const whole = scope(() =>
    attention(heads(q, [1, t, h, d]), heads(k, [1, t, g, d]), heads(v, [1, t, g, d]), { window: 6, cap: 50 }),
  );
  const expected = await read(whole);
  whole.dispose();
  for (const i of [0, 5, 19]) {
    const one = scope(() =>
      attention(
        heads(q.slice(i * h * d, (i + 1) * h * d), [1, 1, h, d]),
        heads(k.slice(0, (i + 1) * g * d), [1, i + 1, g, d]),
        heads(v.slice(0, (i + 1) * g * d), [1, i + 1, g, d]),
        { window: 6, cap: 50 },
      ),
    );
    for (const [j, x] of (await read(one)).entries()) expect(x).toBeCloseTo(expected[i * h * d + j]!, dtype === 'f32' ? 5 : 1);
    one.dispose();
  }
});

test('attention gives gradients only to what wants them', async () => {
  const shape = [1, 5, 2, 4];
  const fill = (x: number): Tensor =>
    heads(
      Array.from({ length: 40 }, (_, i) => Math.cos(i * x)),
      shape,
    );
  const [q, k, v] = [fill(1), parameter(fill(2)), fill(3)];
  valueAndGrad(() => dot(attention(q, k, v), fill(4))).dispose();
  expect(q.grad).toBeUndefined();
  expect(v.grad).toBeUndefined();
  expect((await read(k.grad!)).some((x) => x !== 0)).toBe(true);
  for (const t of [q, k, v]) t.dispose();
});

test('options out of range are refused with their name', () => {
  scope(() => {
    const x = zeros([1, 2, 1, 4]);
    const refused = (given: AttentionOptions, argument: string): void => {
      let thrown: unknown;
      try {
        attention(x, x, x, given);
      } catch (error) {
        thrown = error;
      }
      expect(thrown).toBeInstanceOf(ConfigError);
      expect(thrown).toMatchObject({ op: 'attention', argument });
    };
    for (const window of [0, -1, 2.5, Number.NaN, Number.POSITIVE_INFINITY]) refused({ window }, 'window');
    for (const cap of [0, -50, Number.NaN, Number.POSITIVE_INFINITY]) refused({ cap }, 'cap');
    for (const scale of [Number.NaN, Number.POSITIVE_INFINITY]) refused({ scale }, 'scale');
    return [];
  });
});

test('shapes that do not fit are refused', () => {
  scope(() => {
    const z = (...shape: number[]): Tensor => zeros(shape);
    expect(() => attention(z(1, 2, 3, 4), z(1, 2, 2, 4), z(1, 2, 2, 4))).toThrow(/3 query heads cannot share 2/);
    expect(() => attention(z(1, 2, 1, 4), z(1, 2, 0, 4), z(1, 2, 0, 4))).toThrow(ShapeError);
    expect(() => attention(z(1, 3, 1, 4), z(1, 2, 1, 4), z(1, 2, 1, 4))).toThrow(/3 queries but only 2 keys/);
    expect(() => attention(z(1, 2, 1, 4), z(1, 2, 1, 8), z(1, 2, 1, 4))).toThrow(ShapeError);
    expect(() => attention(z(2, 4), z(2, 4), z(2, 4))).toThrow(ShapeError);
    const starts = zeros([1, 2], 'i32');
    expect(() => attention(z(1, 2, 1, 4), z(1, 3, 1, 4), z(1, 3, 1, 4), { starts })).toThrow(/documents/);
    expect(() => attention(z(1, 3, 1, 4), z(1, 3, 1, 4), z(1, 3, 1, 4), { starts })).toThrow(ShapeError);
    return [];
  });
});

test('starts that mark no documents are refused when the result is read', async () => {
  for (const bad of [
    [0, 0, 3, 3],
    [0, 1, 0, 0],
    [-1, 0, 0, 0],
  ]) {
    const x = zeros([1, 4, 1, 4], dtype);
    const starts = tensor(Int32Array.from(bad), [1, 4]);
    const y = attention(x, x, x, { starts });
    await expect(y.read()).rejects.toBeInstanceOf(DataError);
    for (const t of [x, y, starts]) t.dispose();
  }
});

// A step and the rings it leaves: the definition, a row of the batch at a time.
function step(inputs: readonly Array64[], options: AttentionOptions): Array64[] {
  const [q, k, v, keys, values, rows, positions] = inputs as [Array64, Array64, Array64, Array64, Array64, Array64, Array64];
  const [, , h = 0, d = 0] = q.shape;
  const [, places = 0, g = 0] = keys.shape;
  const rings = [keys, values].map((ring) => ({ ...ring, data: ring.data.slice() })) as [Array64, Array64];
  const y = array(q.shape, q.data);
  for (const [i, row] of rows.data.entries()) {
    const position = positions.data[i]!;
    const [size, from] = [g * d, row * places * g * d];
    for (const [j, now] of [k, v].entries()) {
      rings[j]!.data.set(now.data.subarray(i * size, (i + 1) * size), from + (position % places) * size);
    }
    // The order of keys does not matter.
    const seen = Math.min(position + 1, places);
    const [kSeen, vSeen] = rings.map((ring) => array([1, seen, g, d], ring.data.subarray(from, from + seen * size)));
    const query = array([1, 1, h, d], q.data.subarray(i * h * d, (i + 1) * h * d));
    y.data.set(attend(query, kSeen!, vSeen!, undefined, options).data, i * h * d);
  }
  return [y, ...rings];
}

const stepInputs = (g: number, h: number, d: number, places: number, rows: number[], positions: number[], n = 3): Input[] => [
  { shape: [rows.length, 1, h, d] },
  ...[0, 1].map(() => ({ shape: [rows.length, 1, g, d] })),
  ...[0, 1].map(() => ({ shape: [n, places, g, d] })),
  { shape: [rows.length], dtype: 'i32', data: rows },
  { shape: [rows.length, 1], dtype: 'i32', data: positions },
];

// No cap, one that needs no maximum, one that does; a scale that turns the order round.
for (const option of [{}, { cap: 50, scale: 0.3 }, { cap: 70 }, { scale: -0.2 }] satisfies AttentionOptions[]) {
  const row = {
    ...onGpu,
    run: (...[q, k, v, keys, values, rows, positions]: Tensor[]) => {
      const now = { key: k!, value: v! };
      const y = attentionStep(q!, now, { key: keys!, value: values! }, { ...option, rows: rows!, positions: positions! });
      return [y, copy(keys!), copy(values!)];
    },
    reference: (...inputs: Array64[]) => step(inputs, option),
    tolerance: 4e-6,
    gradient: false,
  } as const;
  checkOp({
    ...row,
    name: `attention, a step in a ring, ${JSON.stringify(option)}`,
    // No rows; the smallest; before and after a ring is full; heads past a tile of rows, of odd sizes; parts of keys, some not begun.
    cases: [
      stepInputs(1, 1, 4, 2, [], []),
      stepInputs(1, 1, 1, 1, [0], [0], 1),
      stepInputs(2, 6, 9, 5, [2, 0], [3, 13]),
      stepInputs(1, 9, 17, 40, [1], [33]),
      stepInputs(2, 4, 8, 700, [0, 1, 2], [600, 1699, 99]),
    ],
  });
  for (const d of option.scale === -0.2 ? [] : [64, 80, 96, 128, 256]) {
    checkOp({
      ...row,
      name: `attention, a step in a ring, heads of ${d}, ${JSON.stringify(option)}`,
      cases: [stepInputs(1, 3, d, 150, [0], [137], 1)],
    });
  }
}

test.runIf(testDevice === 'cpu')('a step in a ring is the last query of the whole sequence', async () => {
  const [h, g, d] = [6, 2, 9];
  const numbers = randomNumbers(3);
  const random = (shape: number[]): Tensor =>
    tensor(
      Float32Array.from({ length: shape.reduce((a, b) => a * b, 1) }, () => numbers() * 4 - 2),
      shape,
    );
  // Places of the ring, tokens before, cap: inside one part of keys and over several, before and after the ring is full.
  for (const [places, before, cap] of [
    [1, 3, null],
    [5, 2, null],
    [5, 4, 2],
    [5, 13, null],
    [700, 600, 30],
    [700, 1699, null],
  ] as const) {
    const s = before + 1;
    const results = scope(() => {
      const [q, k, v] = [random([1, 1, h, d]), random([1, s, g, d]), random([1, s, g, d])];
      const want = attention(q, k, v, { cap, window: places });
      const ring = { key: zeros([3, places, g, d]), value: zeros([3, places, g, d]) };
      for (let p = Math.max(0, before - places + 1); p < before; p++) {
        const place = places + (p % places);
        for (const [to, from] of [[ring.key, k] as const, [ring.value, v] as const])
          copy_(rows(reshape(to, [3 * places, g, d]), place, place + 1), rows(reshape(from, [s, g, d]), p, p + 1));
      }
      const last = (t: Tensor): Tensor => reshape(rows(reshape(t, [s, g, d]), before, s), [1, 1, g, d]);
      const at = { rows: tensor([1], [1], 'i32'), positions: tensor([before], [1, 1], 'i32') };
      const got = attentionStep(q, { key: last(k), value: last(v) }, ring, { cap, ...at });
      return { got, want, keys: ring.key };
    });
    const [got, want, keys] = await Promise.all([results.got.read(), results.want.read(), results.keys.read()]);
    for (let i = 0; i < got.length; i++) expect(Math.abs(got[i]! - want[i]!)).toBeLessThan(5e-6);
    const size = places * g * d;
    for (const other of [keys.subarray(0, size), keys.subarray(2 * size)]) expect(other.every((x) => x === 0)).toBe(true);
    for (const t of Object.values(results)) t.dispose();
  }
});

test('a step refuses rows and positions that are not there', async () => {
  const step = async (row: number, position: number): Promise<void> => {
    const y = scope(() => {
      const [token, ring] = [zeros([1, 1, 2, 4], dtype), zeros([2, 3, 2, 4], dtype)];
      const at = { rows: tensor([row], [1], 'i32'), positions: tensor([position], [1, 1], 'i32') };
      return attentionStep(token, { key: token, value: token }, { key: ring, value: ring }, at);
    });
    await y.read().finally(() => y.dispose());
  };
  await expect(step(2, 0)).rejects.toThrow(/rows is 2 at 0, the cache has 2 sequences/);
  await expect(step(0, -1)).rejects.toThrow(/positions is -1/);
});

test.skipIf(testDevice !== 'cpu')('a step refuses a sequence that is named twice', async () => {
  const y = scope(() => {
    const [token, ring] = [zeros([3, 1, 2, 4]), zeros([2, 3, 2, 4])];
    const at = { rows: tensor([1, 0, 1], [3], 'i32'), positions: tensor([0, 0, 0], [3, 1], 'i32') };
    return attentionStep(token, { key: token, value: token }, { key: ring, value: ring }, at);
  });
  await expect(y.read().finally(() => y.dispose())).rejects.toMatchObject({
    code: 'ERR_CACHE_ROW',
    message: expect.stringContaining('rows names sequence 1 twice, again at 2'),
  });
});
