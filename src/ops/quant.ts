// Weights of few bits, for models that are read and not trained. They pass gradients on to what they are multiplied with.

import { ShapeError } from '../tensor/errors.ts';
import { op } from '../tensor/op.ts';
import type { Tensor } from '../tensor/tensor.ts';
import type { LowRank } from './lora.ts';

const quantizeFp8Op = op({ forward: 'quantize_fp8(w[n k]:float) -> q[n k]:u8, scale[n]:f32' });
const dequantizeFp8Op = op({ forward: 'dequantize_fp8(q[n k]:u8, scale[n]:f32) -> w[n k]:f32' });
const linearFp8Op = op({
  forward: 'linear_fp8(x[* k], q[n k]:u8, scale[n]:f32, bias[n]?) -> y[* n]',
  backward: 'linear_fp8_backward(dy[* n], q[n k]:u8, scale[n]:f32) -> dx[* k]+',
});

/** Formats whose elements share a scale with their neighbours in a row; twin of native/core/blocks.h. */
export const blockFormats = { q8: { bits: 8, block: 32 }, q4: { bits: 4, block: 64 } } as const;

const blockOps = Object.fromEntries(
  (['q8', 'q4'] as const).map((format) => [
    format,
    {
      quantize: op({ forward: `quantize_${format}(w[n k]:float, c, b) -> q[n c]:u8, scale[n b]:bf16` }),
      dequantize: op({ forward: `dequantize_${format}(q[n c]:u8, scale[n b]:bf16, k) -> w[n k]:f32` }),
      linear: op({
        forward: `linear_${format}(x[* k], q[n c]:u8, scale[n b]:bf16, bias[n]?, k) -> y[* n]`,
        backward: `linear_${format}_backward(dy[* n], q[n c]:u8, scale[n b]:bf16, k) -> dx[* k]+`,
      }),
    },
  ]),
) as Record<BlockFormat, Record<'quantize' | 'dequantize' | 'linear', ReturnType<typeof op>>>;

export type BlockFormat = keyof typeof blockFormats;

/** What a frozen matrix may be kept in. */
export type QuantizedFormat = 'fp8' | BlockFormat;

/** A weight [N K] in fp8 (e4m3: largest 448, three bits of fraction). */
export interface Fp8Weight {
  readonly format: 'fp8';
  readonly shape: readonly [number, number];
  /** [N K], u8. */
  readonly codes: Tensor;
  /** [N], f32: row i is scale[i] times the numbers that its codes stand for. */
  readonly scale: Tensor;
}

/** A weight [N K] in blocks of a row that share a scale: 8.5 bits an element (`q8`) or 4.25 (`q4`). */
export interface BlockWeight {
  readonly format: BlockFormat;
  readonly shape: readonly [number, number];
  /** Rows filled up to whole blocks, u8: [N, ⌈K / 32⌉ · 32], or [N, ⌈K / 64⌉ · 32], two elements a byte. */
  readonly codes: Tensor;
  /** One a block [N, ⌈K / 32⌉] or [N, ⌈K / 64⌉], bf16. */
  readonly scale: Tensor;
}

/** A weight of few bits, which cannot be trained. */
export type QuantizedWeight = Fp8Weight | BlockWeight;

/** A frozen weight with a correction of low rank beside it, which is trained. */
export interface AdaptedWeight {
  readonly base: Tensor | QuantizedWeight;
  readonly lowRank: LowRank;
}

/** A matrix that `linear` multiplies with. */
export type Weight = Tensor | QuantizedWeight | AdaptedWeight;

/** Whether a weight is one of few bits. */
export const isQuantized = (w: Weight): w is QuantizedWeight => 'codes' in w;

/** Whether a weight has a {@link LowRank} beside it. */
export const isAdapted = (w: Weight): w is AdaptedWeight => 'lowRank' in w;

/** Dims of the codes and of the scales of a weight [N K]. */
export function quantizedShapes(format: QuantizedFormat, n: number, k: number): { codes: [number, number]; scale: number[] } {
  if (format === 'fp8') return { codes: [n, k], scale: [n] };
  const { bits, block } = blockFormats[format];
  const blocks = Math.ceil(k / block);
  return { codes: [n, (blocks * block * bits) / 8], scale: [n, blocks] };
}

/**
 * Rounds a weight to fp8, each row scaled so that its largest magnitude becomes 448. An element is off by at most 1/16 of itself, or
 * by 1/2^18 of the largest of its row where that is more.
 * @param w [N K], f32 or bf16
 */
export function quantizeFp8(w: Tensor): Fp8Weight {
  const [codes, scale] = quantizeFp8Op(w);
  return { format: 'fp8', shape: matrixOf(w, 'quantizeFp8'), codes: codes!, scale: scale! };
}

/**
 * Rounds a weight to whole numbers of 8 bits times a scale for each 32 neighbours of a row: an element is off by at most 1/250 of the
 * largest of its block. A NaN or an infinity makes its block NaN.
 * @param w [N K], f32 or bf16
 */
export function quantizeQ8(w: Tensor): BlockWeight {
  return quantizeBlocks('q8', w);
}

/**
 * Rounds a weight to 4 bits: each element becomes the nearest of 16 quantiles of a normal distribution times the largest magnitude
 * among 64 neighbours of a row (NF4: Dettmers et al., "QLoRA", arXiv 2305.14314; scales are bf16 here). A NaN or an infinity makes its
 * block NaN.
 * @param w [N K], f32 or bf16
 */
export function quantizeQ4(w: Tensor): BlockWeight {
  return quantizeBlocks('q4', w);
}

function quantizeBlocks(format: BlockFormat, w: Tensor): BlockWeight {
  const shape = matrixOf(w, `quantize_${format}`);
  const sizes = quantizedShapes(format, ...shape);
  const [codes, scale] = blockOps[format].quantize(w, sizes.codes[1], sizes.scale[1]!);
  return { format, shape, codes: codes!, scale: scale! };
}

/** {@link quantizeFp8}, {@link quantizeQ8} or {@link quantizeQ4} into a weight that exists. */
export function quantize_(into: QuantizedWeight, w: Tensor): void {
  const outputs = { outputs: [into.codes, into.scale] };
  if (into.format === 'fp8') quantizeFp8Op(w, outputs);
  else blockOps[into.format].quantize(w, into.codes.shape[1]!, into.scale.shape[1]!, outputs);
}

/**
 * The numbers that a weight stands for.
 * @returns [N K], f32
 */
export function dequantize(w: QuantizedWeight): Tensor {
  if (w.format === 'fp8') return dequantizeFp8Op(w.codes, w.scale)[0]!;
  checkBlocks(w, 'dequantize');
  return blockOps[w.format].dequantize(w.codes, w.scale, w.shape[1])[0]!;
}

/**
 * x wᵀ + bias with a weight of few bits; sums are float32. With fp8 each token of x is rounded to fp8 too, scaled by its own largest
 * magnitude (arXiv 2209.05433), and the gradient takes that rounding for none. Gradients flow to x alone.
 * @param x [* K]
 * @param w [N K]
 * @param bias [N]; undefined for none
 * @returns [* N]
 * @throws ShapeError when a shape does not fit.
 */
export function linearQuantized(x: Tensor, w: QuantizedWeight, bias?: Tensor): Tensor {
  if (w.format === 'fp8') return linearFp8Op(x, w.codes, w.scale, bias)[0]!;
  const k = checkBlocks(w, `linear_${w.format}`);
  if (x.shape.at(-1) !== k) refuse(`linear_${w.format}`, 'x', x.shape, `[* ${k}]`);
  return blockOps[w.format].linear(x, w.codes, w.scale, bias, k)[0]!;
}

function matrixOf(w: Tensor, op: string): readonly [number, number] {
  if (w.shape.length !== 2) refuse(op, 'w', w.shape, '[n k]');
  return w.shape as readonly [number, number];
}

/** K, once codes and scales are known to hold as much as the kernels read. */
function checkBlocks({ format, shape: [n, k], codes, scale }: BlockWeight, op: string): number {
  const sizes = quantizedShapes(format, n, k);
  if (codes.shape.join(' ') !== sizes.codes.join(' ')) refuse(op, 'codes', codes.shape, `[${sizes.codes.join(' ')}]`);
  if (scale.shape.join(' ') !== sizes.scale.join(' ')) refuse(op, 'scale', scale.shape, `[${sizes.scale.join(' ')}]`);
  return k;
}

function refuse(op: string, argument: string, shape: readonly number[], expected: string): never {
  const actual = `[${shape.join(' ')}]`;
  throw new ShapeError(`${op}: ${argument} has shape ${actual}, expected ${expected}`, {
    code: 'ERR_SHAPE',
    op,
    argument,
    expected,
    actual,
  });
}
