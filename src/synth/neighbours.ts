// The nearest other vector of each, exactly: products of matrices in blocks, on the engine that trains.
//   N vectors, D dimensions

import { linear } from '../ops/linear.ts';
import { DataError } from '../tensor/errors.ts';
import { scope } from '../tensor/scope.ts';
import { noGrad } from '../tensor/tape.ts';
import { readAs, tensor } from '../tensor/tensor.ts';

export interface Neighbours {
  /** [N] squared Euclidean distance of the unit vectors to the nearest other one; 4 where there is none. */
  readonly distance: Float32Array;
  /** [N] which one that is, of equals the first; -1 where there is none. */
  readonly nearest: Int32Array;
  /** [N] others nearer than the threshold. */
  readonly repeats: Uint32Array;
  /** [N] the first of those that hang together by such distances. */
  readonly cluster: Uint32Array;
}

export interface NeighbourOptions {
  /** Distance below which two are repeats: 2 − 2 cos. Default 0.05, a cosine above 0.975. */
  readonly threshold?: number;
  /** Rows of a block. Default 512. */
  readonly block?: number;
  readonly signal?: AbortSignal;
}

/**
 * Nearest neighbours among vectors, which are made units first. Time grows with N²; memory is that of the vectors and a block of
 * products.
 * @throws DataError for vectors of different sizes, or with numbers that are not finite
 */
export async function neighbours(vectors: readonly Float32Array[], options: NeighbourOptions = {}): Promise<Neighbours> {
  const { threshold = 0.05, block = 512, signal } = options;
  const n = vectors.length;
  const d = vectors[0]?.length ?? 0;
  const all = new Float32Array(n * d);
  for (const [i, vector] of vectors.entries()) all.set(unit(vector, d, i), i * d);
  const best = new Float32Array(n).fill(Number.NEGATIVE_INFINITY); // largest cosine
  const nearest = new Int32Array(n).fill(-1);
  const repeats = new Uint32Array(n);
  const parent = Uint32Array.from({ length: n }, (_, i) => i);
  const root = (i: number): number => {
    let at = i;
    while (parent[at] !== at) {
      parent[at] = parent[parent[at]!]!;
      at = parent[at]!;
    }
    return at;
  };
  const close = 1 - threshold / 2;
  // Blocks on and right of the diagonal: each pair is looked at once.
  for (let row = 0; row < n; row += block) {
    const rowEnd = Math.min(n, row + block);
    for (let column = row; column < n; column += 16 * block) {
      signal?.throwIfAborted();
      const columnEnd = Math.min(n, column + 16 * block);
      const product = scope(() =>
        noGrad(() =>
          linear(
            tensor(all.subarray(row * d, rowEnd * d), [rowEnd - row, d]),
            tensor(all.subarray(column * d, columnEnd * d), [columnEnd - column, d]),
          ),
        ),
      );
      const cosines = await readAs(product, 'f32').finally(() => product.dispose());
      const width = columnEnd - column;
      for (let i = row; i < rowEnd; i++) {
        const base = (i - row) * width - column;
        let bestHere = best[i]!;
        let at = nearest[i]!;
        for (let j = Math.max(column, i + 1); j < columnEnd; j++) {
          const cosine = cosines[base + j]!;
          if (cosine > bestHere) {
            bestHere = cosine;
            at = j;
          }
          if (cosine > best[j]!) {
            best[j] = cosine;
            nearest[j] = i;
          }
          if (cosine > close) {
            repeats[i]!++;
            repeats[j]!++;
            const [a, b] = [root(i), root(j)];
            // The smaller number is the root, so that a cluster is named by its first.
            if (a < b) parent[b] = a;
            else parent[a] = b;
          }
        }
        best[i] = bestHere;
        nearest[i] = at;
      }
    }
  }
  return {
    distance: best.map((cosine) => (cosine === Number.NEGATIVE_INFINITY ? 4 : rounded(2 - 2 * cosine))),
    nearest,
    repeats,
    cluster: parent.map((_, i) => root(i)),
  };
}

/** What float32 leaves of the distance of equal vectors is nothing. */
const rounded = (distance: number): number => (distance < 1e-6 ? 0 : distance);

/** The vector over its length; zeros stay. @throws DataError */
export function unit(vector: Float32Array, size: number, index: number): Float32Array {
  let squares = 0;
  for (const x of vector) squares += x * x;
  if (vector.length !== size || !Number.isFinite(squares)) {
    throw new DataError(
      `neighbours: vector ${index} has ${vector.length} numbers${Number.isFinite(squares) ? '' : ', not all of them finite'}; expected ${size} finite ones, as the first has`,
      {
        code: 'ERR_VECTOR',
        op: 'neighbours',
        argument: `vectors[${index}]`,
        expected: String(size),
        actual: String(vector.length),
      },
    );
  }
  const length = Math.sqrt(squares);
  return length === 0 ? vector : vector.map((x) => x / length);
}
