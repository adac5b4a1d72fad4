import fc from 'fast-check';
import { expect, test } from 'vitest';
import {
  adjust,
  candidatesOf,
  chance,
  checkSampling,
  draw,
  headSize,
  type Sampling,
  type SamplingOptions,
  topOf,
} from '../../src/models/sampling.ts';

/** Penalties aside, the steps of Transformers' warpers over the sorted vocabulary: what may be drawn, and how likely. */
function distribution(row: Float32Array, s: Sampling): Map<number, number> {
  let order = [...row.keys()].sort((a, b) => row[b]! - row[a]! || a - b);
  const weight = (id: number): number => Math.exp((row[id]! - row[order[0]!]!) / s.temperature);
  order = order.slice(0, s.topK);
  const all = order.reduce((sum, id) => sum + weight(id), 0);
  let before = 0;
  const kept = order.filter((id, i) => {
    const inside = i === 0 || s.topP === 1 || before < s.topP * all;
    before += weight(id);
    return inside && weight(id) >= s.minP;
  });
  const mass = kept.reduce((sum, id) => sum + weight(id), 0);
  return new Map(kept.map((id) => [id, weight(id) / mass]));
}

const rows = fc
  .tuple(fc.integer({ min: 1, max: 900 }), fc.integer(), fc.constantFrom(0.01, 1, 8))
  .map(([size, seed, scale]) => Float32Array.from({ length: size }, (_, i) => (chance(Math.abs(seed), i) - 0.5) * scale));
const options = fc.record({
  temperature: fc.constantFrom(0.3, 1, 3),
  topK: fc.constantFrom(undefined, 1, 3, 80, 2000),
  topP: fc.constantFrom(1, 0.95, 0.3),
  minP: fc.constantFrom(0, 0.05, 0.9),
});
const defined = (o: object): SamplingOptions => Object.fromEntries(Object.entries(o).filter(([, v]) => v !== undefined));

test('every token is drawn for its share of the chances, however many candidates are at hand', () => {
  fc.assert(
    fc.property(rows, options, fc.constantFrom(1, headSize, 300), (row, given, more) => {
      const s = checkSampling(defined(given), row.length);
      const want = distribution(row, s);
      const known = topOf(row, Math.max(more, candidatesOf(s, row.length)), s.temperature);
      // Chances in steps: a token of share p owns an interval of length p, so it is hit p n times, give or take one.
      const n = 200;
      const hits = new Map<number, number>();
      for (let i = 0; i < n; i++) {
        const u = (i + 0.5) / n;
        const id = draw(known, s, u) ?? draw(known, s, u, row)!;
        hits.set(id, (hits.get(id) ?? 0) + 1);
      }
      for (const id of hits.keys()) expect(want.has(id)).toBe(true);
      expect(Math.max(...[...want].map(([id, p]) => Math.abs((hits.get(id) ?? 0) - p * n)))).toBeLessThan(1.01);
    }),
    { numRuns: 70, seed: 11 },
  );
});

test('the largest of a row, with ties and infinities', () => {
  fc.assert(
    fc.property(
      fc.array(fc.constantFrom(-1, 0, 0.5, 2, Number.NEGATIVE_INFINITY), { minLength: 1, maxLength: 60 }),
      fc.integer({ min: 1, max: 70 }),
      (values, k) => {
        const row = Float32Array.from(values);
        const order = [...row.keys()].sort((a, b) => (row[a] === row[b] ? a - b : row[b]! > row[a]! ? 1 : -1));
        expect([...(topOf(row, k, 1).ids as Int32Array)]).toEqual(order.slice(0, k));
      },
    ),
    { numRuns: 200, seed: 3 },
  );
});

test('penalty, bias and mask', () => {
  const s = checkSampling({ repetitionPenalty: 2, logitBias: { 1: 5, 3: Number.NEGATIVE_INFINITY } }, 5);
  const row = Float32Array.of(4, -4, 1, 9, 2);
  adjust(row, s, [0, 1, 1], Uint8Array.of(1, 1, 0, 1, 1));
  expect([...row]).toEqual([2, -3, Number.NEGATIVE_INFINITY, Number.NEGATIVE_INFINITY, 2]);
  expect(draw(topOf(row, 2, 0), { ...s, temperature: 0 }, 0)).toBe(0);
  const mapped = checkSampling({ logitBias: new Map([[4, 1]]) }, 5);
  expect(mapped.logitBias).toEqual([[4, 1]]);
});

test('what nothing can be drawn from is refused', () => {
  const s = checkSampling({}, 3);
  expect(() => adjust(new Float32Array(3), s, [], new Uint8Array(3))).toThrow(/rules out every token/);
  expect(() => adjust(new Float32Array(3), s, [], new Uint8Array(2))).toThrow(/a mask of 2 entries, expected 3/);
  expect(() => draw(topOf(Float32Array.of(1, Number.NaN, 2), 3, 1), s, 0.5)).toThrow(/not finite/);
});

test.each([
  ['temperature', { temperature: -1 }],
  ['temperature', { temperature: Number.NaN }],
  ['topK', { topK: 0 }],
  ['topP', { topP: 1.5 }],
  ['minP', { minP: -0.1 }],
  ['repetitionPenalty', { repetitionPenalty: 0 }],
  ['seed', { seed: 0.5 }],
  ['logitBias', { logitBias: { 9: 1 } }],
  ['logitBias[2]', { logitBias: { 2: Number.POSITIVE_INFINITY } }],
] as const)('%s out of range is named: %o', (argument, options) => {
  expect(() => checkSampling(options, 9)).toThrow(expect.objectContaining({ argument }));
});
