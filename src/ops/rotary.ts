// Rotary position embedding. B batch, T tokens, H heads, D head size.
import { op } from '../tensor/op.ts';
import { type Tensor, tensor } from '../tensor/tensor.ts';

const table = op({ forward: 'rope_table(positions[*]:i32, d, base, factor, low, high, context) -> table[* d]:f32' });
const given = op({ forward: 'rope_angles(positions[*]:i32, frequencies[d]:f32, magnitude) -> table[* d]:f32' });
const rotate = op({
  forward: 'rope(x[b t h d], table[b t d]:f32, direction) -> y[b t h d]',
  backward: 'rope_backward(dy[b t h d], table[b t d]:f32, direction) -> dx[b t h d]+',
});

/** How rotary frequencies of a longer context are made from those of training. */
export type RopeScaling =
  /** All frequencies are divided by `factor`. */
  | { readonly kind: 'linear'; readonly factor: number }
  /**
   * Llama 3.1: wavelengths above `context / lowFrequency` tokens are stretched by `factor`, those below `context / highFrequency` stay,
   * between them the frequencies are interpolated.
   */
  | {
      readonly kind: 'llama3';
      readonly factor: number;
      readonly lowFrequency: number;
      readonly highFrequency: number;
      /** Tokens of the sequences that the model was trained on first. */
      readonly context: number;
    }
  /**
   * LongRoPE (arXiv:2402.13753): each frequency is divided by a factor of its own, of one list for sequences of up to `context` tokens and of
   * another for longer ones.
   */
  | {
      readonly kind: 'longrope';
      /** [D/2] each. */
      readonly short: readonly number[];
      readonly long: readonly number[];
      /** Tokens of the sequences that the model was trained on first. */
      readonly context: number;
      /** What sines and cosines are multiplied by. */
      readonly magnitude: number;
    };

export interface RopeOptions {
  /** D, even. */
  readonly headSize: number;
  /** Wavelength of the slowest pair, in tokens over 2π. Default 10,000. */
  readonly base?: number;
  /** Default null: none. */
  readonly scaling?: RopeScaling | null;
  /** Most tokens that the sequence may come to have: where scaling asks for it. Default 0. */
  readonly length?: number;
}

/**
 * Cosines, then sines, of position · base^(-2i/D) for i < D/2, with scaled frequencies where asked: what {@link rope} turns by. Angles are
 * float64. Make it once per batch.
 * @param positions [B T], i32: places within the document
 * @returns [B T D]
 * @throws ShapeError when headSize is odd.
 */
export function ropeTable(positions: Tensor, options: RopeOptions): Tensor {
  const { headSize, base = 10_000, scaling = null } = options;
  if (scaling?.kind === 'longrope') {
    const frequencies = ropeFrequencies(options);
    return given(positions, tensor(Float32Array.of(...frequencies, ...frequencies)), scaling.magnitude)[0]!;
  }
  // The kernel stretches what turns less than once in a context of 0 tokens, which is everything.
  const { factor, lowFrequency, highFrequency, context } = {
    factor: 1,
    lowFrequency: 1,
    highFrequency: 2,
    context: 0,
    ...scaling,
  };
  return table(positions, headSize, base, factor, lowFrequency, highFrequency, context)[0]!;
}

/** The frequencies [D/2] that {@link ropeTable} turns by, in radians a token: for files of other programs. */
export function ropeFrequencies({ headSize, base = 10_000, scaling = null, length = 0 }: RopeOptions): Float64Array {
  return Float64Array.from({ length: headSize / 2 }, (_, i) => {
    const frequency = base ** ((-2 * i) / headSize);
    if (scaling === null) return frequency;
    if (scaling.kind === 'longrope') return frequency / (length > scaling.context ? scaling.long : scaling.short)[i]!;
    const slow = frequency / scaling.factor;
    if (scaling.kind === 'linear') return slow;
    const { lowFrequency: low, highFrequency: high, context } = scaling;
    const turns = (context * frequency) / (2 * Math.PI);
    const share = Math.min(1, Math.max(0, (turns - low) / (high - low)));
    return (1 - share) * slow + share * frequency;
  });
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
