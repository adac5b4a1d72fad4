// The loss heads from TypeScript: published and torch-made values, gradients through the tape, options, errors.
import { readFileSync } from 'node:fs';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { type Divergence, divergenceKinds } from '../../src/ops/divergence.ts';
import { add, cast } from '../../src/ops/elementwise.ts';
import { type DistillOptions, linearCrossEntropy, linearDistill } from '../../src/ops/loss.ts';
import { init, memory, shutdown } from '../../src/tensor/engine.ts';
import { ConfigError, ShapeError } from '../../src/tensor/errors.ts';
import { scope } from '../../src/tensor/scope.ts';
import { noGrad, valueAndGrad } from '../../src/tensor/tape.ts';
import { parameter, type Tensor, tensor } from '../../src/tensor/tensor.ts';
import { testDevice } from '../device.ts';
import { bf16Bits, fromBf16, randomNumbers } from './check.ts';

let before = 0;
beforeEach(() => {
  before = memory().tensors;
});
afterEach(() => {
  expect(memory().tensors).toBe(before);
});

const close = (actual: ArrayLike<number>, expected: ArrayLike<number>, tolerance: number, what = ''): void => {
  expect(actual.length, what).toBe(expected.length);
  for (let i = 0; i < expected.length; i++) {
    if (!(Math.abs(actual[i]! - expected[i]!) <= tolerance))
      expect.fail(`${what}: element ${i} is ${actual[i]}, expected ${expected[i]}`);
  }
};
const matrix = (rows: readonly (readonly number[])[]): Tensor =>
  tensor(Float32Array.from(rows.flat()), [rows.length, rows[0]!.length]);
const ints = (values: readonly number[], shape = [values.length]): Tensor => tensor(Int32Array.from(values), shape);
const normals = (count: number, seed: number, scale = 1): Float32Array => {
  const random = randomNumbers(seed);
  return Float32Array.from(
    { length: count },
    () => scale * Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random()),
  );
};

/** With x = logits and w = identity, the gradient of x is that of the logits. `head` returns the total and the value of each row. */
async function ofLogits(logits: readonly (readonly number[])[], head: (x: Tensor, w: Tensor) => { total: Tensor; rows: Tensor }) {
  const v = logits[0]!.length;
  const x = parameter(matrix(logits));
  const w = matrix(Array.from({ length: v }, (_, i) => Array.from({ length: v }, (_, j) => (i === j ? 1 : 0))));
  const { total, rows } = scope(() => noGrad(() => head(x, w)));
  const differentiated = valueAndGrad(() => head(x, w).total);
  const read = {
    total: await total.item(),
    rows: [...(await rows.read())],
    gradient: [...(await x.grad!.read())],
    totalWithGradient: await differentiated.item(),
  };
  for (const t of [total, rows, differentiated, x, w]) t.dispose();
  return read;
}

const ones = (n: number): Tensor => tensor(new Float32Array(n).fill(1));
const z = [1, 2, -1, 0.5];
const teacher = [0.5, 1.5, 0, -1];

describe('published values, without T²', () => {
  test.each<[Divergence, number, number, number[]]>([
    [{ kind: 'forward_kl' }, 1, 0.13149077, [0.00432818, 0.0117652, -0.10302052, 0.08692714]],
    [{ kind: 'reverse_kl' }, 1, 0.10996714, [-0.02028499, -0.05514033, -0.04826012, 0.12368544]],
    [{ kind: 'jsd', beta: 0.1 }, 1, 0.01128463, [0.00004198, 0.00011411, -0.00802974, 0.00787365]],
    [{ kind: 'jsd' }, 1, 0.02815585, [-0.00231421, -0.00629069, -0.01551601, 0.02412091]],
    [{ kind: 'jsd', beta: 0.9 }, 1, 0.00985832, [-0.00159318, -0.0043307, -0.00451719, 0.01044106]],
    [{ kind: 'jsd', beta: 0 }, 1, 0.13149077, [0.00432818, 0.0117652, -0.10302052, 0.08692714]],
    [{ kind: 'jsd', beta: 1 }, 1, 0.10996714, [-0.02028499, -0.05514033, -0.04826012, 0.12368544]],
    [{ kind: 'skew_forward_kl' }, 1, 0.09732796, [-0.00231321, -0.00628795, -0.06308447, 0.07168562]],
    [{ kind: 'skew_reverse_kl' }, 1, 0.08858454, [-0.01238011, -0.03365262, -0.04235141, 0.08838414]],
    [{ kind: 'alpha_beta' }, 1, 0.14534379, [-0.01656645, -0.0463426, -0.07708403, 0.13999308]],
    [{ kind: 'alpha_beta', alpha: 1, beta: 0 }, 1, 0.13149077, [0.00432818, 0.0117652, -0.10302052, 0.08692714]],
    [{ kind: 'total_variation' }, 1, 0.10302052, [0.00680319, 0.01849299, -0.02942252, 0.00412634]],
    [{ kind: 'adaptive' }, 1, 0.11119617, [-0.01887955, -0.05131994, -0.05138701, 0.1215865]],
    [{ kind: 'forward_kl' }, 2, 0.06205433, [0.00352958, 0.00581929, -0.05138527, 0.0420364]],
    [{ kind: 'reverse_kl' }, 2, 0.05705998, [-0.00393927, -0.00649475, -0.03779705, 0.04823107]],
    [{ kind: 'jsd' }, 2, 0.01462899, [-0.00011426, -0.00018839, -0.01067612, 0.01097877]],
    [{ kind: 'skew_forward_kl' }, 2, 0.04881898, [0.00142672, 0.00235226, -0.03816173, 0.03438275]],
    [{ kind: 'skew_reverse_kl' }, 2, 0.04649218, [-0.00205202, -0.00338321, -0.03192276, 0.03735799]],
    [{ kind: 'alpha_beta' }, 2, 0.07005533, [-0.00198661, -0.00360321, -0.04982857, 0.05541839]],
  ])('%j at T = %d', async (divergence, temperature, value, gradient) => {
    const got = await ofLogits([z], (x, w) => {
      const out = linearDistill(x, w, {
        teacher: { logits: matrix([teacher]) },
        divergence,
        temperature,
        squaredTemperature: false,
      });
      return { total: out.total, rows: out.kl };
    });
    close([got.total, got.rows[0]!, got.totalWithGradient], [value, value, value], 4e-7);
    // A GPU's exponentials and logarithms are good to two units of the last place.
    close(got.gradient, gradient, testDevice === 'cuda' ? 4e-7 : 1e-7);
  });

  test('a soft cap', async () => {
    const got = await ofLogits([[12, 25, -8, 3]], (x, w) => {
      const out = linearDistill(x, w, { teacher: { logits: matrix([teacher]) }, cap: 30 });
      return { total: out.total, rows: out.kl };
    });
    close(got.rows, [5.56651529], 2e-6);
    close(got.gradient, [-0.18803905, 0.21497814, -0.12431223, -0.04857439], 6e-7);
  });

  test.each([
    ['bucket', 0.00091094, [0.00432818, 0.0117652, -0.00293584, -0.01315754]],
    ['truncate', 0.62472772, [-0.03657305, -0.09941586, 0.02480785, 0.11118107]],
    ['renormalize', 0, [0, 0, 0, 0]],
  ] as const)('two kept tokens, %s', async (tail, value, gradient) => {
    const got = await ofLogits([z], (x, w) => {
      const logProbs = matrix([[Math.log(0.59769483), 0, Math.log(0.21987964)]]);
      const out = linearDistill(x, w, { teacher: { ids: ints([1, -1, 0], [1, 3]), logProbs, tail } });
      return { total: out.total, rows: out.kl };
    });
    close(got.rows, [value], 2e-7);
    close(got.gradient, gradient, 1e-7);
  });
});

interface Golden {
  readonly student: number[][];
  readonly teacher: number[][];
  readonly labels: number[];
  readonly cases: readonly {
    readonly kind: string;
    readonly beta?: number;
    readonly alpha?: number;
    readonly k?: number;
    readonly temperature: number;
    readonly studentCap: number | null;
    readonly teacherCap: number | null;
    readonly loss: number[];
    readonly gradient: number[][];
  }[];
}

describe('values and gradients made by torch in float64', () => {
  const sets = JSON.parse(readFileSync(new URL('../golden/distillation.json', import.meta.url), 'utf8')) as Golden[];
  const logSoftmax = (u: readonly number[], cap: number | null, temperature: number): number[] => {
    const s = u.map((x) => (cap === null ? x : cap * Math.tanh(x / cap)) / temperature);
    const top = Math.max(...s);
    const lse = top + Math.log(s.reduce((a, x) => a + Math.exp(x - top), 0));
    return s.map((x) => x - lse);
  };

  test.each(
    sets.flatMap((set, i) =>
      set.cases.map((c) => [`${c.kind} ${c.beta ?? ''} set ${i}, T ${c.temperature}, cap ${c.studentCap}`, set, c] as const),
    ),
  )('%s', async (_name, set, c) => {
    const { temperature, studentCap: cap, teacherCap } = c;
    const weights = ones(set.labels.length);
    const targets = ints(set.labels);
    const got = await ofLogits(set.student, (x, w) => {
      if (c.kind === 'cross_entropy') {
        // The file's cross-entropy is at the temperature; this op's is at 1.
        const scaled = cap === null ? null : cap / temperature;
        const out = linearCrossEntropy(x, scaledIdentity(w, 1 / temperature), targets, { weights, cap: scaled });
        return { total: out.total, rows: out.loss };
      }
      const shared = { temperature, cap, weights, squaredTemperature: false };
      if (c.kind === 'forward_kl_top4') {
        const kept = set.teacher.map((u) => {
          const logp = logSoftmax(u, teacherCap, temperature);
          const ids = logp.map((_, j) => j).sort((a, b) => logp[b]! - logp[a]!);
          return ids.slice(0, c.k).map((id) => ({ id, logp: logp[id]! }));
        });
        const shape = [kept.length, c.k!];
        const ids = ints(
          kept.flat().map((t) => t.id),
          shape,
        );
        const logProbs = tensor(
          Float32Array.from(kept.flat(), (t) => t.logp),
          shape,
        );
        const out = linearDistill(x, w, { teacher: { ids, logProbs }, ...shared });
        return { total: out.total, rows: out.kl };
      }
      const { kind, alpha, beta } = c;
      const divergence = {
        kind,
        ...(alpha === undefined ? {} : { alpha }),
        ...(beta === undefined ? {} : { beta }),
      } as Divergence;
      const out = linearDistill(x, w, { teacher: { logits: matrix(set.teacher), cap: teacherCap }, divergence, ...shared });
      return { total: out.total, rows: out.kl };
    });
    weights.dispose();
    targets.dispose();
    // Logits near 100 are known to 4e-6 in float32.
    const size = Math.max(...set.student.flat().map(Math.abs), ...set.teacher.flat().map(Math.abs));
    const tolerance = Math.max(5e-7, 2e-7 * size) * Math.max(1, ...c.loss.map(Math.abs));
    close(got.rows, c.loss, tolerance, 'loss');
    close(got.gradient, c.gradient.flat(), tolerance, 'gradient');
    close([got.total], [c.loss.reduce((a, b) => a + b)], 3 * tolerance, 'total');
  });

  function scaledIdentity(w: Tensor, by: number): Tensor {
    if (by === 1) return w;
    const v = w.shape[0]!;
    return matrix(Array.from({ length: v }, (_, i) => Array.from({ length: v }, (_, j) => (i === j ? by : 0))));
  }
});

describe('cross-entropy', () => {
  const [n, c, v] = [6, 5, 37];
  const make = () => ({
    x: tensor(normals(n * c, 1), [2, 3, c]),
    w: tensor(normals(v * c, 2), [v, c]),
    targets: ints([3, 36, 0, 11, 3, 20], [2, 3]),
  });

  test('hidden states of any dims; the default is a mean; parts and gradients agree with weights', async () => {
    const { x, w, targets } = make();
    const mean = scope(() => linearCrossEntropy(x, w, targets, { cap: 30, accuracy: true }));
    expect(mean.loss.shape).toEqual([2, 3]);
    expect(mean.correct!.shape).toEqual([2, 3]);
    const loss = [...(await mean.loss.read())];
    expect(await mean.total.item()).toBeCloseTo(loss.reduce((a, b) => a + b) / n, 6);
    const weights = tensor([0, 1, 0.5, 0, 2, 1], [2, 3]);
    const weighted = scope(() => linearCrossEntropy(x, w, targets, { cap: 30, weights, zLoss: 0.01 }));
    const parts = await weighted.loss.read();
    const lse = await weighted.lse.read();
    expect(parts[0]).toBe(0);
    expect(parts[4]).toBeCloseTo(loss[4]!, 5);
    const factors = [...(await weights.read())];
    const expected = factors.reduce((sum, f, i) => sum + f * (parts[i]! + 0.01 * lse[i]! ** 2), 0);
    expect(await weighted.total.item()).toBeCloseTo(expected, 5);
    for (const t of [...Object.values(mean), ...Object.values(weighted), x, w, targets, weights]) (t as Tensor).dispose();
  });

  test('gradients accumulate over micro-batches, two heads in one sum, and frozen inputs', async () => {
    const { x, w, targets } = make();
    const plain = (a: Tensor, b: Tensor): Tensor => linearCrossEntropy(a, b, targets).total;
    const soft = (a: Tensor, b: Tensor): Tensor => linearCrossEntropy(a, b, targets, { cap: 30 }).total;
    const alone = await gradientsOf(plain, [x, w]);
    const both = await gradientsOf((a, b) => add(plain(a, b), soft(a, b)), [x, w]);
    const capped = await gradientsOf(soft, [x, w]);
    for (const k of [0, 1]) {
      close(
        both[k]!,
        alone[k]!.map((g, i) => g + capped[k]![i]!),
        1e-6,
      );
    }
    const twice = await gradientsOf(plain, [x, w], 2);
    close(
      twice[1]!,
      alone[1]!.map((g) => 2 * g),
      1e-6,
    );
    const onlyHead = await gradientsOf((b) => plain(x, b), [w]);
    expect(onlyHead[0]).toEqual(alone[1]);
    for (const t of [x, w, targets]) t.dispose();
  });

  test('bf16 heads', async () => {
    const { x, w, targets } = make();
    const bits = new Uint16Array(new Uint32Array((await w.read()).buffer).map((b) => b >>> 16));
    const narrow = tensor(bits, [v, c]);
    const wide = tensor(Float32Array.from(new Float32Array(Uint32Array.from(bits, (b) => b << 16).buffer)), [v, c]);
    const of = async (head: Tensor) => gradientsOf((a) => linearCrossEntropy(a, head, targets, { cap: 30 }).total, [x]);
    expect(await of(narrow)).toEqual(await of(wide));
    for (const t of [x, w, narrow, wide, targets]) t.dispose();
  });

  test('a bad target is named by token and position when the loss is read', async () => {
    const { x, w, targets: right } = make();
    const targets = ints([3, 36, 0, 37, 3, 20], [2, 3]);
    const out = scope(() => linearCrossEntropy(x, w, targets));
    await expect(out.total.read()).rejects.toMatchObject({
      name: 'DataError',
      code: 'ERR_TOKEN_RANGE',
      op: 'linear_cross_entropy',
      argument: 'targets',
    });
    for (const t of [...Object.values(out), x, w, targets, right]) (t as Tensor).dispose();
  });

  test('misuse', () => {
    const { x, w, targets } = make();
    const other = tensor(new Float32Array(v * 4), [v, 4]);
    expect(() => linearCrossEntropy(x, other, targets)).toThrow(ShapeError);
    expect(() => linearCrossEntropy(x, w, targets, { cap: 0 })).toThrow(ConfigError);
    expect(() => linearCrossEntropy(x, w, targets, { zLoss: Number.NaN })).toThrow(ConfigError);
    for (const t of [x, w, targets, other]) t.dispose();
  });
});

describe('distillation', () => {
  const [n, c, e, v] = [5, 4, 7, 29];
  const make = () => ({
    x: tensor(normals(n * c, 3), [n, c]),
    w: tensor(normals(v * c, 4), [v, c]),
    hidden: tensor(normals(n * e, 5), [n, e]),
    head: tensor(normals(v * e, 6), [v, e]),
    targets: ints([3, 28, 0, 11, -100]),
    weights: tensor([1, 0.5, 2, 1, 0]),
  });

  test('the T² convention, the hard share, and values of each token', async () => {
    const { x, w, hidden, head, targets, weights } = make();
    const run = async (options: Partial<DistillOptions>) => {
      const out = scope(() =>
        linearDistill(x, w, {
          teacher: { hidden, head, cap: 30 },
          cap: 30,
          temperature: 2,
          targets,
          weights,
          agreement: true,
          ...options,
        }),
      );
      const read = {
        total: await out.total.item(),
        kl: [...(await out.kl.read())],
        ce: [...(await out.ce!.read())],
        agree: [...(await out.agree!.read())],
      };
      for (const t of Object.values(out)) (t as Tensor).dispose();
      return read;
    };
    const factors = await weights.read();
    const dot = (row: number[]): number => row.reduce((sum, value, i) => sum + factors[i]! * value, 0);
    const soft = await run({});
    expect(soft.total).toBeCloseTo(4 * dot(soft.kl), 5);
    expect((await run({ squaredTemperature: false })).total).toBeCloseTo(dot(soft.kl), 5);
    expect((await run({ hardWeight: 0.25 })).total).toBeCloseTo(3 * dot(soft.kl) + 0.25 * dot(soft.ce), 5);
    expect(soft.kl[4]).toBe(0);
    expect(soft.agree.every((a) => a === 0 || a === 1)).toBe(true);
    const plain = scope(() => linearCrossEntropy(x, w, targets, { weights, cap: 30 }));
    close(soft.ce, await plain.loss.read(), 2e-6);
    for (const t of [...Object.values(plain), x, w, hidden, head, targets, weights]) (t as Tensor).dispose();
  });

  test('the teacher as hidden states or as logits gives the same gradients', async () => {
    const { x, w, hidden, head, targets, weights } = make();
    const [h, m] = [await hidden.read(), await head.read()];
    const u = Float32Array.from({ length: n * v }, (_, i) => {
      let s = 0;
      for (let k = 0; k < e; k++) s += h[Math.floor(i / v) * e + k]! * m[(i % v) * e + k]!;
      return s;
    });
    const logits = tensor(u, [n, v]);
    for (const kind of ['forward_kl', 'reverse_kl', 'jsd', 'adaptive'] as const) {
      const of = (t: DistillOptions['teacher']) =>
        gradientsOf(
          (a, b) => linearDistill(a, b, { teacher: t, cap: 30, divergence: { kind }, targets, weights, hardWeight: 0.3 }).total,
          [x, w],
        );
      const [a, b] = [await of({ hidden, head, cap: 20 }), await of({ logits, cap: 20 })];
      close(a[0]!, b[0]!, 2e-6);
      close(a[1]!, b[1]!, 2e-6);
    }
    for (const t of [x, w, hidden, head, targets, weights, logits]) t.dispose();
  });

  test('misuse', () => {
    const { x, w, hidden, head, targets, weights } = make();
    const using = (options: Partial<DistillOptions>) => () => linearDistill(x, w, { teacher: { hidden, head }, ...options });
    expect(using({ temperature: 0 })).toThrow(expect.objectContaining({ name: 'ConfigError', argument: 'temperature' }));
    expect(using({ hardWeight: 0.5 })).toThrow(expect.objectContaining({ name: 'ConfigError', argument: 'targets' }));
    expect(using({ divergence: { kind: 'jsd', beta: 2 } })).toThrow(
      expect.objectContaining({ argument: 'divergence.beta', expected: 'from 0 to 1' }),
    );
    expect(using({ divergence: { kind: 'hinge' } as never })).toThrow(expect.objectContaining({ argument: 'divergence.kind' }));
    const ids = ints(
      Array.from({ length: n }, (_, i) => i),
      [n, 1],
    );
    const logProbs = tensor(new Float32Array(n).fill(-1), [n, 1]);
    expect(using({ teacher: { ids, logProbs }, divergence: { kind: 'reverse_kl' } })).toThrow(
      expect.objectContaining({ argument: 'divergence.kind' }),
    );
    expect(using({ teacher: { logits: hidden } })).toThrow(ShapeError);
    for (const t of [x, w, hidden, head, targets, weights, ids, logProbs]) t.dispose();
  });
});

// The tests above have shown f32 to be right, also on a GPU. In bf16 the same numbers give the same values, since logits are f32, and
// the same gradients but for their rounding; so do chunks of a few tokens, and logits that are made twice because memory is short.
describe.skipIf(testDevice === 'cpu')('computed in bf16, and in little memory', () => {
  const [n, c, e, v, m] = [37, 24, 40, 2100, 5];
  const rounded = (count: number, seed: number, scale: number): number[] =>
    [...normals(count, seed, scale)].map((x) => fromBf16(bf16Bits(x)));
  const numbers = {
    x: rounded(n * c, 11, 1),
    w: rounded(v * c, 12, 0.8),
    hidden: rounded(n * e, 13, 1),
    head: rounded(v * e, 14, 0.6),
    targets: Array.from({ length: n }, (_, i) => (i * 523) % v),
    weights: Array.from({ length: n }, (_, i) => (i % 5 === 3 ? 0 : 0.2 + (i % 7) / 5)),
    ids: Array.from({ length: n * m }, (_, i) => (i * 389) % v),
    logProbs: Array.from({ length: n * m }, (_, i) => Math.log(0.3 / (1 + (i % m)))),
  };

  async function measure(
    dtype: 'f32' | 'bf16',
    head: (t: Record<keyof typeof numbers, Tensor>) => { total: Tensor; rows: Tensor },
  ) {
    const float = (values: number[], shape: number[]): Tensor =>
      dtype === 'bf16' ? tensor(Uint16Array.from(values, bf16Bits), shape) : tensor(Float32Array.from(values), shape);
    const t = {
      x: parameter(tensor(Float32Array.from(numbers.x), [n, c])),
      w: parameter(float(numbers.w, [v, c])),
      hidden: float(numbers.hidden, [n, e]),
      head: float(numbers.head, [v, e]),
      targets: ints(numbers.targets),
      weights: tensor(numbers.weights),
      ids: ints(numbers.ids, [n, m]),
      logProbs: tensor(Float32Array.from(numbers.logProbs), [n, m]),
    };
    // Hidden states are made by other ops; here they are f32 numbers that bf16 holds exactly.
    const run = () => head(dtype === 'bf16' ? { ...t, x: cast(t.x, 'bf16') } : t);
    const { total, rows } = scope(() => noGrad(run));
    const differentiated = valueAndGrad(() => run().total);
    const read = async (g: Tensor): Promise<number[]> =>
      g.dtype === 'bf16' ? [...((await g.read()) as Uint16Array)].map(fromBf16) : [...((await g.read()) as Float32Array)];
    const got = {
      values: [await total.item(), await differentiated.item(), ...(await rows.read())],
      gradients: [await read(t.x.grad!), await read(t.w.grad!)],
    };
    for (const used of [total, rows, differentiated, ...Object.values(t)]) used.dispose();
    return got;
  }
  const distilled = (
    teacher: 'dense' | 'sparse',
    options: Partial<DistillOptions>,
    text = true,
  ): Parameters<typeof measure>[1] => {
    return (t) => {
      const from = teacher === 'dense' ? { hidden: t.hidden, head: t.head, cap: 30 } : { ids: t.ids, logProbs: t.logProbs };
      const out = linearDistill(t.x, t.w, {
        teacher: from,
        cap: 30,
        weights: t.weights,
        ...(text ? { targets: t.targets, hardWeight: 0.3 } : {}),
        ...options,
      });
      return { total: out.total, rows: out.kl };
    };
  };
  const heads: Record<string, Parameters<typeof measure>[1]> = {};
  for (const cap of [30, null])
    heads[`cross-entropy, cap ${cap}`] = (t) => {
      const out = linearCrossEntropy(t.x, t.w, t.targets, { cap, weights: t.weights, zLoss: 1e-3 });
      return { total: out.total, rows: out.loss };
    };
  for (const kind of divergenceKinds) heads[kind] = distilled('dense', { divergence: { kind } });
  heads['forward_kl at T = 2'] = distilled('dense', { temperature: 2 });
  heads.sparse = distilled('sparse', {});
  // Without a text, products on Hopper leave logits of 16 bits: steps of 9e-4 with a cap of 30.
  const stepped = (['forward_kl', 'reverse_kl', 'jsd', 'skew_forward_kl'] as const).map((kind) => {
    heads[`${kind} without a text`] = distilled('dense', { divergence: { kind } }, false);
    return `${kind} without a text`;
  });
  heads['forward_kl at T = 2 without a text'] = distilled('dense', { temperature: 2 }, false);
  stepped.push('forward_kl at T = 2 without a text');

  test.each(Object.keys(heads))('%s', async (name) => {
    const restart = (workspaceLimit: number): void => {
      shutdown();
      init({ device: 'cuda', workspaceLimit });
    };
    try {
      const exact = await measure('f32', heads[name]!);
      const agree = (got: typeof exact, dtype: 'f32' | 'bf16', what: string): void => {
        const error = dtype === 'bf16' && stepped.includes(name) ? 1.5e-4 : 4e-6;
        got.values.forEach((value, i) => {
          close([value], [exact.values[i]!], error * (1 + Math.abs(exact.values[i]!)) * (i < 2 ? n : 1), `${what}: value ${i}`);
        });
        got.gradients.forEach((gradient, i) => {
          const size = Math.max(...exact.gradients[i]!.map(Math.abs));
          close(gradient, exact.gradients[i]!, (dtype === 'bf16' ? 2 ** -7 : 1e-5) * size, `${what}: gradient ${i}`);
        });
      };
      agree(await measure('bf16', heads[name]!), 'bf16', 'bf16');
      for (const limit of [1_500_000, 400_000]) {
        restart(limit);
        agree(await measure('f32', heads[name]!), 'f32', `f32 in ${limit} bytes`);
        agree(await measure('bf16', heads[name]!), 'bf16', `bf16 in ${limit} bytes`);
      }
    } finally {
      restart(0);
    }
  });
});

/** The gradients of a loss by copies of tensors. */
async function gradientsOf(loss: (...inputs: Tensor[]) => Tensor, of: readonly Tensor[], times = 1): Promise<number[][]> {
  const inputs = await Promise.all(of.map(async (t) => parameter(tensor(await t.read(), t.shape))));
  for (let k = 0; k < times; k++) valueAndGrad(() => loss(...inputs)).dispose();
  const gradients = await Promise.all(inputs.map(async (t) => [...(await t.grad!.read())]));
  for (const t of inputs) t.dispose();
  return gradients;
}
