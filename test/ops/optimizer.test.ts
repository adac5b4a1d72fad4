import { readFileSync } from 'node:fs';
import { expect, test } from 'vitest';
import { type AdamWOptions, type AdamWState, adamw_ } from '../../src/ops/optimizer.ts';
import { squaredNorm } from '../../src/ops/reduce.ts';
import { memory } from '../../src/tensor/engine.ts';
import { ConfigError, ShapeError } from '../../src/tensor/errors.ts';
import { scope } from '../../src/tensor/scope.ts';
import { readAs, tensor, write } from '../../src/tensor/tensor.ts';
import { randomNumbers } from './check.ts';

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

function stateOf(p: Float32Array, decay: Uint8Array): AdamWState {
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
  for (const t of Object.values(state)) t.dispose();
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
