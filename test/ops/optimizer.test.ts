import { readFileSync } from 'node:fs';
import { expect, test } from 'vitest';
import { type AdamWOptions, type AdamWState, adamw_ } from '../../src/ops/optimizer.ts';
import { squaredNorm } from '../../src/ops/reduce.ts';
import { memory } from '../../src/tensor/engine.ts';
import { ConfigError, ShapeError } from '../../src/tensor/errors.ts';
import { eachTensor, scope } from '../../src/tensor/scope.ts';
import { readAs, tensor, write } from '../../src/tensor/tensor.ts';
import { bf16Bits, fromBf16, randomNumbers } from './check.ts';

interface Golden {
  start: number[][];
  gradients: number[][][];
  cases: {
    clip: number | null;
    lr: number;
    betas: [number, number];
    eps: number;
    weight_decay: number;
    float64: { norm: number; parameters: number[][] }[];
  }[];
}
const golden = JSON.parse(readFileSync(new URL('../golden/adamw.json', import.meta.url), 'utf8')) as Golden;

/** Parameters of the golden file in one buffer, each at a multiple of 64. */
function flat(parts: readonly number[][]): Float32Array {
  const all = new Float32Array(64 * parts.length);
  parts.forEach((part, i) => {
    all.set(part, 64 * i);
  });
  return all;
}

function stateOf(p: Float32Array, decay: Uint8Array) {
  const n = p.length;
  return {
    p: tensor(p),
    g: tensor(new Float32Array(n)),
    m: tensor(new Float32Array(n)),
    v: tensor(new Float32Array(n)),
    decay: tensor(decay),
  };
}

function dispose(state: AdamWState): void {
  eachTensor(state, (t) => t.dispose());
}

const step = (state: AdamWState, options: AdamWOptions): void => scope(() => adamw_(state, squaredNorm(state.g), options));

test.each([0, 1])('adamw_ follows torch.optim.AdamW with clip_grad_norm_, case %i', async (index) => {
  const before = memory().tensors;
  const c = golden.cases[index]!;
  const state = stateOf(flat(golden.start), new Uint8Array(golden.start.length).fill(1));
  for (const [i, expected] of c.float64.entries()) {
    write(state.g, flat(golden.gradients[i]!));
    step(state, {
      lr: c.lr,
      beta1: c.betas[0],
      beta2: c.betas[1],
      eps: c.eps,
      weightDecay: c.weight_decay,
      step: i + 1,
      ...(c.clip === null ? {} : { clip: c.clip }),
    });
    const p = await state.p.read();
    const wanted = flat(expected.parameters);
    wanted.forEach((e, k) => {
      if (!(Math.abs(p[k]! - e) <= 1e-6 * (1 + Math.abs(e)))) expect.fail(`step ${i + 1}, element ${k}: ${p[k]}, expected ${e}`);
    });
  }
  dispose(state);
  expect(memory().tensors).toBe(before);
});

// Sizes that end inside a vector, inside a block, and after a chunk of 16384.
test.each([1, 17, 64, 65, 16_384 + 75])('adamw_ of %i parameters, decay on every other block', async (n) => {
  const random = randomNumbers(n);
  const draw = (): Float32Array => Float32Array.from({ length: n }, () => 2 * random() - 1);
  const decay = Uint8Array.from({ length: Math.ceil(n / 64) }, (_, i) => i % 2);
  const start = draw();
  const state = stateOf(start, decay);
  const p = Float64Array.from(start);
  const m = new Float64Array(n);
  const v = new Float64Array(n);
  const [lr, beta1, beta2, eps, weightDecay, clip] = [0.01, 0.9, 0.95, 1e-8, 0.3, 0.5];
  for (let t = 1; t <= 3; t++) {
    const g = draw();
    write(state.g, g);
    step(state, { lr, weightDecay, clip, step: t });
    const ratio = Math.min(1, clip / (Math.hypot(...g) + 1e-6));
    for (let i = 0; i < n; i++) {
      const d = g[i]! * ratio;
      m[i] = beta1 * m[i]! + (1 - beta1) * d;
      v[i] = beta2 * v[i]! + (1 - beta2) * d * d;
      const kept = decay[i >> 6] === 1 ? 1 - lr * weightDecay : 1;
      p[i] = p[i]! * kept - (lr * (m[i]! / (1 - beta1 ** t))) / (Math.sqrt(v[i]! / (1 - beta2 ** t)) + eps);
    }
  }
  const actual = await readAs(state.p, 'f32');
  const worst = actual.reduce((w, x, i) => Math.max(w, Math.abs(x - p[i]!)), 0);
  expect(worst).toBeLessThan(1e-6);
  dispose(state);
});

test.each([Number.NaN, Number.POSITIVE_INFINITY])('a gradient with %d updates nothing', async (bad) => {
  const state = stateOf(Float32Array.of(1, 2, 3), Uint8Array.of(1));
  write(state.g, [0.1, 0.2, 0.3]);
  step(state, { lr: 0.1, step: 1 });
  const before = await Promise.all([state.p.read(), state.m.read(), state.v.read()]);
  write(state.g, [0.1, bad, 0.3]);
  step(state, { lr: 0.1, step: 2 });
  expect(await Promise.all([state.p.read(), state.m.read(), state.v.read()])).toEqual(before);
  dispose(state);
});

test.each([
  ['lr', { lr: Number.NaN, step: 1 }],
  ['lr', { lr: -1, step: 1 }],
  ['beta1', { lr: 1, beta1: 1, step: 1 }],
  ['beta2', { lr: 1, beta2: -0.1, step: 1 }],
  ['eps', { lr: 1, eps: -1, step: 1 }],
  ['weightDecay', { lr: 1, weightDecay: Number.NaN, step: 1 }],
  ['clip', { lr: 1, clip: 0, step: 1 }],
  ['step', { lr: 1, step: 0 }],
])('a wrong %s is refused by name', (argument, options) => {
  const state = stateOf(Float32Array.of(1), Uint8Array.of(1));
  try {
    step(state, options);
    expect.unreachable();
  } catch (error) {
    expect(error).toBeInstanceOf(ConfigError);
    expect(error).toMatchObject({ argument });
  }
  dispose(state);
});

test('a decay mask of another length is refused', async () => {
  const state = stateOf(new Float32Array(65), Uint8Array.of(1));
  step(state, { lr: 0.1, step: 1 });
  await expect(state.p.read()).rejects.toThrow(/decay has 1 entries, but 65 parameters are 2 blocks of 64/);
  dispose(state);
  const short = stateOf(new Float32Array(65), Uint8Array.of(1, 1));
  expect(() => step({ ...short, m: short.decay }, { lr: 0.1, step: 1 })).toThrow();
  expect(() => scope(() => step({ ...short, m: tensor([1]) }, { lr: 0.1, step: 1 }))).toThrow(ShapeError);
  dispose(short);
});

// Moments in 8 bits, in blocks of 256 that share a scale: the same numbers here and in the kernel.
const first = {
  pack: (x: number, most: number) => (x < 0 ? -1 : 1) * Math.floor(Math.sqrt(Math.abs(x) / (most || 1)) * 127 + 0.5),
  unpack: (code: number, most: number) => Math.sign(code) * (code / 127) ** 2 * most,
};
const second = {
  pack: (x: number, most: number) => (x > 0 ? Math.max(1, Math.floor(Math.sqrt(Math.sqrt(x / most)) * 255 + 0.5)) : 0),
  unpack: (code: number, most: number) => (code / 255) ** 4 * most,
};

const eight = (n: number) => ({ codes: tensor(new Uint8Array(n)), scales: tensor(new Float32Array(Math.ceil(n / 256))) });

test.each([1, 255, 257, 16_384 + 75])('adamw_ with moments of 8 bits, %i parameters', async (n) => {
  const random = randomNumbers(n);
  const draw = (): Float32Array => Float32Array.from({ length: n }, () => (2 * random() - 1) * 10 ** (-3 * random()));
  const start = draw();
  const state = {
    p: tensor(start),
    g: tensor(new Float32Array(n)),
    m: eight(n),
    v: eight(n),
    decay: tensor(new Uint8Array(Math.ceil(n / 64)).fill(1)),
  };
  const p = Float64Array.from(start);
  let m = new Float64Array(n);
  let v = new Float64Array(n);
  const [lr, beta1, beta2, eps, weightDecay] = [0.01, 0.9, 0.95, 1e-8, 0.1];
  const stored = (x: Float64Array, code: typeof first) =>
    Float64Array.from(x, (_, i) => {
      const block = x.subarray(i - (i % 256), i - (i % 256) + 256);
      const most = block.reduce((a, b) => Math.max(a, Math.abs(b)), 0);
      return code.unpack(code.pack(x[i]!, most), most);
    });
  for (let t = 1; t <= 3; t++) {
    const g = draw();
    write(state.g, g);
    step(state, { lr, weightDecay, step: t });
    m = m.map((x, i) => x + (1 - beta1) * (g[i]! - x));
    v = v.map((x, i) => beta2 * x + (1 - beta2) * g[i]! ** 2);
    for (let i = 0; i < n; i++) {
      const update = m[i]! / (1 - beta1 ** t) / (Math.sqrt(v[i]! / (1 - beta2 ** t)) + eps);
      p[i] = p[i]! * (1 - lr * weightDecay) - lr * update;
    }
    [m, v] = [stored(m, first), stored(v, second)];
  }
  const actual = await readAs(state.p, 'f32');
  // A code may round the other way where float32 and float64 stand on two sides of a half: one step of it is 1.6 % of an update.
  const off = actual.map((x, i) => Math.abs(x - p[i]!));
  expect(off.filter((d) => d > 2e-6).length).toBeLessThanOrEqual(n / 1000 + 1);
  expect(Math.max(...off)).toBeLessThan(0.1 * lr);
  dispose(state);
});

test('adamw_ keeps a bf16 copy of what it wrote', async () => {
  const state = { ...stateOf(Float32Array.of(1, -2.7, Math.PI), Uint8Array.of(0)), copy: tensor(new Uint16Array(3)) };
  write(state.g, [0.1, -0.2, 0.3]);
  step(state, { lr: 0.01, step: 1 });
  const p = await readAs(state.p, 'f32');
  expect([...(await state.copy.read())]).toEqual(Array.from(p, bf16Bits));
  dispose(state);
});

test('bf16 parameters without a float32 master move by the right amount on average', async () => {
  const n = 4096;
  const start = new Uint16Array(n).fill(bf16Bits(1));
  const zeros = () => tensor(new Float32Array(n));
  const state = { p: tensor(start), g: zeros(), m: zeros(), v: zeros(), decay: tensor(new Uint8Array(n / 64)) };
  write(state.g, new Float32Array(n).fill(1));
  // Steps of 1e-4 at 1, where neighbours in bf16 are 0.0039 (below) apart: to the nearest, nothing would ever change.
  const steps = 100;
  for (let t = 1; t <= steps; t++) step(state, { lr: 1e-4, weightDecay: 0, step: t, seed: 7 });
  const p = Array.from((await state.p.read()) as Uint16Array, fromBf16);
  const mean = p.reduce((a, b) => a + b, 0) / n;
  // Each element is a sum of independent roundings: standard error of the mean below 2e-4.
  expect(Math.abs(mean - (1 - steps * 1e-4))).toBeLessThan(6e-4);
  expect(new Set(p).size).toBeGreaterThan(2);
  dispose(state);
});
