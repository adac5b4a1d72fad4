// Rotary position embedding. B batch, T tokens, H heads, D head size.
import { op } from '../tensor/op.ts';
import type { Tensor } from '../tensor/tensor.ts';

const table = op({ forward: 'rope_table(positions[*]:i32, d, base) -> table[* d]:f32' });
const rotate = op({
  forward: 'rope(x[b t h d], table[b t d]:f32, direction) -> y[b t h d]',
  backward: 'rope_backward(dy[b t h d], table[b t d]:f32, direction) -> dx[b t h d]+',
});

export interface RopeOptions {
  /** D, even. */
  readonly headSize: number;
  /** Wavelength of the slowest pair, in tokens over 2π. Default 10,000. */
  readonly base?: number;
}

/**
 * Cosines, then sines, of position · base^(-2i/D) for i < D/2: what {@link rope} turns by. Angles are float64. Make it once per batch.
 * @param positions [B T], i32: places within the document
 * @returns [B T D]
 * @throws ShapeError when headSize is odd.
 */
export function ropeTable(positions: Tensor, { headSize, base = 10_000 }: RopeOptions): Tensor {
  return table(positions, headSize, base)[0]!;
}

/**
 * Turns dims i and i + D/2 of each head by the angles of its token (the half-split layout of Gemma, Llama and NeoX).
 * Su et al., "RoFormer" (arXiv 2104.09864).
 * @param x [B T H D]
 * @param angles [B T D] from {@link ropeTable}
 * @returns [B T H D]
 * @throws ShapeError when a shape does not fit.
 */
export function rope(x: Tensor, angles: Tensor): Tensor {
  return rotate(x, angles, 1)[0]!;
}
