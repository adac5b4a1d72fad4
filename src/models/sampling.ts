// Which token comes next. Work over a whole vocabulary is done by `topLogits`; what it leaves open is settled here, without sorting it.
import { ConfigError, DataError } from '../tensor/errors.ts';
import { checkSeed, randomBlock } from '../tensor/random.ts';

/** How a token is drawn. The steps come in this order: penalty, bias, allowed tokens, temperature, top-k, top-p, min-p. */
export interface SamplingOptions {
  /** 0 takes the likeliest token. Default 0.8. */
  readonly temperature?: number;
  /** Draw from the k likeliest tokens only. Default: all. */
  readonly topK?: number;
  /** Then from the likeliest that together hold this share of the probability (Holtzman et al., arXiv 1904.09751). Default 1. */
  readonly topP?: number;
  /** Then from those at least this share as likely as the likeliest (Nguyen et al., arXiv 2407.01082). Default 0. */
  readonly minP?: number;
  /**
   * Divides positive logits of tokens that the prompt or the text so far holds, and multiplies negative ones (Keskar et al.,
   * arXiv 1909.05858). Default 1: none.
   */
  readonly repetitionPenalty?: number;
  /** What is added to the logits of some ids; −Infinity rules one out. */
  readonly logitBias?: ReadonlyMap<number, number> | Readonly<Record<number, number>>;
  /**
   * Which ids may come next, by the ids that were generated so far: a mask with an entry for each id, 0 where it is ruled out;
   * undefined allows all.
   */
  readonly allow?: (generated: readonly number[]) => Uint8Array | undefined;
  /** Same seed, same text, whatever else is in its batch. Default 0. */
  readonly seed?: number;
}

/** {@link SamplingOptions} with defaults, checked. */
export interface Sampling {
  readonly temperature: number;
  readonly topK: number;
  readonly topP: number;
  readonly minP: number;
  readonly repetitionPenalty: number;
  readonly logitBias: readonly (readonly [id: number, bias: number])[];
  readonly allow: SamplingOptions['allow'];
  readonly seed: number;
}

/**
 * Fills in defaults.
 * @param vocabSize ids that may be named
 * @throws ConfigError naming an option that is out of range.
 */
export function checkSampling(options: SamplingOptions, vocabSize: number): Sampling {
  const { temperature = 0.8, topK = vocabSize, topP = 1, minP = 0, repetitionPenalty = 1, logitBias, allow, seed = 0 } = options;
  check('temperature', temperature, temperature >= 0 && Number.isFinite(temperature), '0 or more');
  check('topK', topK, Number.isInteger(topK) && topK >= 1, 'a whole number from 1');
  check('topP', topP, topP > 0 && topP <= 1, 'above 0, at most 1');
  check('minP', minP, minP >= 0 && minP <= 1, 'from 0 to 1');
  check('repetitionPenalty', repetitionPenalty, repetitionPenalty > 0 && Number.isFinite(repetitionPenalty), 'above 0');
  const pairs =
    logitBias instanceof Map ? [...logitBias] : Object.entries(logitBias ?? {}).map(([id, b]) => [Number(id), b] as const);
  for (const [id, bias] of pairs) {
    checkId('logitBias', id, vocabSize);
    check(`logitBias[${id}]`, bias, bias < Number.POSITIVE_INFINITY, 'a number, or -Infinity');
  }
  return { temperature, topK, topP, minP, repetitionPenalty, logitBias: pairs, allow, seed: checkSeed(seed) };
}

/** @throws ConfigError unless `good`. */
export function check(argument: string, value: unknown, good: boolean, expected: string): void {
  if (good) return;
  const actual = String(value);
  throw new ConfigError(`generate: ${argument} is ${actual}, expected ${expected}`, {
    ...{ code: 'ERR_CONFIG', op: 'generate', argument, expected, actual },
  });
}

/** @throws DataError unless it is an id of the vocabulary. */
export function checkId(argument: string, id: number, vocabSize: number): void {
  if (Number.isInteger(id) && id >= 0 && id < vocabSize) return;
  const expected = `0 to ${vocabSize - 1}`;
  throw new DataError(`generate: ${argument} has token id ${id}, expected ${expected}`, {
    ...{ code: 'ERR_TOKEN_RANGE', op: 'generate', argument, expected, actual: String(id) },
  });
}

/** The likeliest tokens of one distribution over `size` tokens, and what its probabilities need. */
export interface Top {
  readonly size: number;
  /** Logits, the largest first. */
  readonly values: ArrayLike<number>;
  readonly ids: ArrayLike<number>;
  /** With m the largest logit: Σ e^(z − m) over all. */
  readonly sum: number;
  /** Σ e^((z − m) / temperature) over all. */
  readonly tempered: number;
}

/** Candidates that are worth having at hand: nearly always enough for top-p, min-p and the draw itself. */
export const headSize = 64;

/** How many of the largest logits settle most draws. */
export function candidatesOf({ temperature, topK }: Sampling, vocabSize: number): number {
  if (temperature === 0) return 1;
  return Math.min(vocabSize, topK < vocabSize && topK <= 1024 ? Math.max(topK, headSize) : headSize);
}

/** {@link Top} of a row of logits: what `topLogits` does, here. */
export function topOf(row: Float32Array, k: number, temperature: number): Top {
  const [values, ids] = largest(row, Math.min(k, row.length));
  const m = values[0]!;
  let sum = 0;
  let tempered = 0;
  for (let i = 0; i < row.length; i++) sum += Math.exp(row[i]! - m);
  if (temperature === 1 || temperature === 0) tempered = sum;
  else for (let i = 0; i < row.length; i++) tempered += Math.exp((row[i]! - m) / temperature);
  return { size: row.length, values, ids, sum, tempered };
}

/** The k largest of a row, the largest first, of equals the smaller id first: a heap with the worst at its root. */
function largest(row: Float32Array, k: number): readonly [values: Float64Array, ids: Int32Array] {
  const ids = new Int32Array(k);
  const worse = (a: number, b: number): boolean => row[a]! < row[b]! || (row[a]! === row[b]! && a > b);
  const sink = (from: number, end: number): void => {
    const id = ids[from]!;
    let at = from;
    for (let child = 2 * at + 1; child < end; child = 2 * at + 1) {
      if (child + 1 < end && worse(ids[child + 1]!, ids[child]!)) child++;
      if (!worse(ids[child]!, id)) break;
      ids[at] = ids[child]!;
      at = child;
    }
    ids[at] = id;
  };
  for (let i = 0; i < k; i++) ids[i] = i;
  for (let i = (k >> 1) - 1; i >= 0; i--) sink(i, k);
  for (let i = k; i < row.length; i++) {
    if (!(row[i]! > row[ids[0]!]!)) continue;
    ids[0] = i;
    sink(0, k);
  }
  for (let end = k - 1; end > 0; end--) {
    const last = ids[end]!;
    ids[end] = ids[0]!;
    ids[0] = last;
    sink(0, end);
  }
  return [Float64Array.from(ids, (id) => row[id]!), ids];
}

/** Whether logits change before the draw, so that the row itself is needed. */
export function isAdjusted(s: Sampling, mask: Uint8Array | undefined): boolean {
  return s.repetitionPenalty !== 1 || s.logitBias.length > 0 || mask !== undefined;
}

/**
 * Penalty, bias and mask, in place.
 * @param seen ids of the prompt and of the text so far
 * @throws DataError when nothing is allowed, or the mask does not have as many entries as there are tokens.
 */
export function adjust(row: Float32Array, s: Sampling, seen: readonly number[], mask: Uint8Array | undefined): void {
  if (s.repetitionPenalty !== 1) {
    for (const id of new Set(seen)) row[id] = row[id]! > 0 ? row[id]! / s.repetitionPenalty : row[id]! * s.repetitionPenalty;
  }
  for (const [id, bias] of s.logitBias) row[id]! += bias;
  if (mask === undefined) return;
  check('allow', `a mask of ${mask.length} entries`, mask.length === row.length, `${row.length}, one for each id`);
  let any = false;
  for (let i = 0; i < row.length; i++) {
    if (mask[i] === 0) row[i] = Number.NEGATIVE_INFINITY;
    else any = true;
  }
  if (any) return;
  throw new DataError('generate: allow rules out every token; let it allow the end token where the text may end', {
    ...{ code: 'ERR_NO_TOKEN', op: 'generate', argument: 'allow' },
  });
}

/** The number in [0, 1) that decides draw `index` of a seed. */
export function chance(seed: number, index: number): number {
  const [a = 0, b = 0] = randomBlock(seed, 0, index);
  return ((a >>> 5) * 2 ** 26 + (b >>> 6)) * 2 ** -53;
}

/**
 * The token of a draw; undefined when the largest logits do not settle it: give the row.
 * @param u in [0, 1)
 * @throws DataError when the logits are not numbers.
 */
export function draw(top: Top, s: Sampling, u: number, row?: Float32Array): number | undefined {
  if (!Number.isFinite(top.sum) || !Number.isFinite(top.tempered)) {
    throw new DataError('generate: the logits are not finite; the weights of the model may be damaged', {
      ...{ code: 'ERR_NOT_FINITE', op: 'generate' },
    });
  }
  if (s.temperature === 0) return top.ids[0]!;
  const weight = (z: number): number => Math.exp((z - top.values[0]!) / s.temperature);
  if (s.topK >= top.size && s.topP === 1 && s.minP === 0) return drawAny(top, weight, u * top.tempered, row);
  for (let t = top; ; ) {
    const kept = keptOf(t, s, weight);
    if (kept !== undefined) return drawFirst(t, weight, u * kept.mass, kept.count);
    if (row === undefined) return undefined;
    t = topOf(row, 8 * t.ids.length, s.temperature);
  }
}

/** Of all tokens: the largest first, then the others by id. */
function drawAny(top: Top, weight: (z: number) => number, target: number, row?: Float32Array): number | undefined {
  const count = Math.min(headSize, top.ids.length, top.size);
  let left = target;
  let id = top.ids[0]!; // where rounding leaves a rest, the last that can be drawn
  const take = (candidate: number, z: number): void => {
    const w = weight(z);
    if (w > 0 && left >= 0) id = candidate;
    left -= w;
  };
  for (let i = 0; i < count && left >= 0; i++) take(top.ids[i]!, top.values[i]!);
  if (left < 0 || count === top.size) return id;
  if (row === undefined) return undefined;
  const head = new Set(Array.from({ length: count }, (_, i) => top.ids[i]!));
  for (let i = 0; i < row.length && left >= 0; i++) if (!head.has(i)) take(i, row[i]!);
  return id;
}

function drawFirst(top: Top, weight: (z: number) => number, target: number, count: number): number {
  let left = target;
  for (let i = 0; i < count; i++) {
    left -= weight(top.values[i]!);
    if (left < 0) return top.ids[i]!;
  }
  return top.ids[count - 1]!;
}

/** How many of the largest top-k, top-p and min-p leave, and their mass; undefined when there would be more of them than are known. */
function keptOf(top: Top, s: Sampling, weight: (z: number) => number): { count: number; mass: number } | undefined {
  const known = Math.min(top.ids.length, top.size);
  const k = Math.min(s.topK, top.size);
  let base = top.tempered;
  if (k < top.size) {
    if (k > known) return undefined;
    base = 0;
    for (let i = 0; i < k; i++) base += weight(top.values[i]!);
  }
  const enough = s.topP === 1 ? Number.POSITIVE_INFINITY : s.topP * base;
  let mass = 0;
  for (let count = 0; count < known && count < k; count++) {
    const w = weight(top.values[count]!);
    if (count > 0 && (mass >= enough || w < s.minP || w === 0)) return { count, mass };
    mass += w;
  }
  return known >= k || mass >= enough ? { count: Math.min(known, k), mass } : undefined;
}
