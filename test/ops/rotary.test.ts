import { expect, test } from 'vitest';
import { type RopeScaling, rope, ropeFrequencies, ropeTable } from '../../src/ops/rotary.ts';
import { ShapeError } from '../../src/tensor/errors.ts';
import { scope } from '../../src/tensor/scope.ts';
import { tensor, zeros } from '../../src/tensor/tensor.ts';
import { type Array64, array, checkOp } from './check.ts';

const table64 = (positions: Array64, d: number, base: number): Array64 => {
  const half = d / 2;
  return array(
    [...positions.shape, d],
    Array.from(positions.data).flatMap((p) => {
      const angles = Array.from({ length: half }, (_, i) => p * base ** ((-2 * i) / d));
      return [...angles.map(Math.cos), ...angles.map(Math.sin)];
    }),
  );
};

const turn = (x: Array64, angles: Array64): Array64 => {
  const [b = 0, t = 0, h = 0, d = 0] = x.shape;
  const half = d / 2;
  const y = array(x.shape, x.data);
  for (let token = 0; token < b * t; token++) {
    for (let head = 0; head < h; head++) {
      for (let i = 0; i < half; i++) {
        const at = (token * h + head) * d + i;
        const [cos, sin] = [angles.data[token * d + i]!, angles.data[token * d + half + i]!];
        y.data[at] = x.data[at]! * cos - x.data[at + half]! * sin;
        y.data[at + half] = x.data[at + half]! * cos + x.data[at]! * sin;
      }
    }
  }
  return y;
};

const shapes = [
  [1, 0, 2, 4],
  [1, 1, 1, 2],
  [2, 3, 1, 6],
  [2, 5, 3, 34],
  [1, 9, 4, 64],
  [2, 70, 3, 66],
];

checkOp({
  name: 'rope_table',
  run: (positions) => ropeTable(positions!, { headSize: 10, base: 1000 }),
  reference: (positions) => table64(positions!, 10, 1000),
  cases: [[0], [1], [2, 3], [3, 67]].map((shape) => [{ shape, dtype: 'i32', below: 100_000 }]),
  gradient: false,
  tolerance: 6e-8, // float32's own
});

// Written as Transformers' sources have it, by wavelengths; pairs of all three kinds occur.
const scaled64 = (positions: Array64, d: number, base: number, scaling: Exclude<RopeScaling, { kind: 'longrope' }>): Array64 => {
  const frequency = (i: number): number => {
    const f = base ** ((-2 * i) / d);
    if (scaling.kind === 'linear') return f / scaling.factor;
    const { factor, lowFrequency: low, highFrequency: high, context } = scaling;
    const wavelength = (2 * Math.PI) / f;
    if (wavelength < context / high) return f;
    if (wavelength > context / low) return f / factor;
    const smooth = (context / wavelength - low) / (high - low);
    return ((1 - smooth) * f) / factor + smooth * f;
  };
  const angles = Array.from(positions.data).flatMap((p) => {
    const row = Array.from({ length: d / 2 }, (_, i) => p * frequency(i));
    return [...row.map(Math.cos), ...row.map(Math.sin)];
  });
  return array([...positions.shape, d], angles);
};

const scalings: Exclude<RopeScaling, { kind: 'longrope' }>[] = [
  { kind: 'linear', factor: 8 },
  { kind: 'llama3', factor: 8, lowFrequency: 1, highFrequency: 4, context: 64 },
];
for (const scaling of scalings) {
  checkOp({
    name: `rope_table, ${scaling.kind}`,
    run: (positions) => ropeTable(positions!, { headSize: 18, base: 1000, scaling }),
    reference: (positions) => scaled64(positions!, 18, 1000, scaling),
    cases: [[0], [1], [2, 3], [3, 67]].map((shape) => [{ shape, dtype: 'i32', below: 100_000 }]),
    gradient: false,
    tolerance: 6e-8,
  });
}

const longrope = {
  kind: 'longrope',
  context: 64,
  magnitude: 1.25,
  short: [1, 1, 1.5, 2, 2.5],
  long: [1, 2, 4, 8, 16],
} as const;
for (const length of [64, 65]) {
  const factors = length > 64 ? longrope.long : longrope.short;
  checkOp({
    name: `rope_angles, ${length} tokens`,
    run: (positions) => ropeTable(positions!, { headSize: 10, base: 1000, scaling: longrope, length }),
    reference: (positions) => {
      const angles = Array.from(positions!.data).flatMap((p) => {
        const own = factors.map((factor, i) => p * Math.fround(1000 ** (-i / 5) / factor));
        return [...own.map(Math.cos), ...own.map(Math.sin)].map((x) => x * 1.25);
      });
      return array([...positions!.shape, 10], angles);
    },
    cases: [[0], [1], [2, 3], [3, 67]].map((shape) => [{ shape, dtype: 'i32', below: 100_000 }]),
    gradient: false,
    tolerance: 8e-8,
  });
}

checkOp({
  name: 'rope',
  run: (x, positions) => rope(x!, ropeTable(positions!, { headSize: x!.shape[3]! })),
  reference: (x, positions) => turn(x!, table64(positions!, x!.shape[3]!, 10_000)),
  cases: shapes.map((shape) => [{ shape }, { shape: shape.slice(0, 2), dtype: 'i32', below: 50 }]),
});

test('position 0 turns nothing; scores depend on distance only', async () => {
  const x = Float32Array.from({ length: 64 }, (_, i) => Math.sin(i * 1.7));
  const at = async (position: number): Promise<Float32Array> => {
    const y = scope(() => rope(tensor(x, [1, 1, 1, 64]), ropeTable(tensor(Int32Array.of(position), [1, 1]), { headSize: 64 })));
    const read = await y.read();
    y.dispose();
    return read as Float32Array;
  };
  const [zero, p3, p10, p103, p110] = await Promise.all([0, 3, 10, 103, 110].map(at));
  expect(zero).toEqual(x);
  const dot = (a: Float32Array, b: Float32Array): number => a.reduce((s, v, i) => s + v * b[i]!, 0);
  expect(dot(p3!, p10!)).toBeCloseTo(dot(p103!, p110!), 4);
});

test.each([null, ...scalings])('the frequencies for other programs are those of the table: %j', async (scaling) => {
  const table = scope(() => ropeTable(tensor(Int32Array.of(1)), { headSize: 18, base: 1000, scaling }));
  const data = (await table.read()) as Float32Array;
  ropeFrequencies({ headSize: 18, base: 1000, scaling }).forEach((f, i) => {
    expect(data[i]).toBeCloseTo(Math.cos(f), 6);
    expect(data[9 + i]).toBeCloseTo(Math.sin(f), 6);
  });
  table.dispose();
});

test('an odd head size is refused', async () => {
  const table = scope(() => ropeTable(tensor(Int32Array.of(1, 2)), { headSize: 5 }));
  await expect(table.read()).rejects.toThrow(/head size is 5/);
  const y = scope(() => rope(zeros([1, 2, 1, 5]), zeros([1, 2, 5])));
  await expect(y.read()).rejects.toThrow(ShapeError);
  expect(() => scope(() => rope(zeros([1, 2, 1, 6]), zeros([1, 2, 4])))).toThrow(/table has shape \[1 2 4\], expected \[1 2 6\]/);
  table.dispose();
  y.dispose();
});
