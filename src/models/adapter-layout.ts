// Where adapters of a model's matrices lie in PEFT's files, which know the matrices of Transformers: some of them hold several of ours, one above
// the other.   N rows of a weight, K columns, R rank
import { type LiveAdapter, moduleOf } from '../nn/lora.ts';
import type { Parameters, SpecTree } from '../nn/parameters.ts';
import { fileLayout, type ModelConfig } from './registry.ts';

/** A model as far as files of adapters need it. */
export type Base = { readonly config: ModelConfig; readonly parameters: Parameters<SpecTree> };

/** One of our matrices in one of Transformers'. */
export interface MatrixPart {
  /** Its name without `.weight`. */
  readonly module: string;
  /** Its first row there, and how many it has. */
  readonly from: number;
  readonly rows: number;
}

/** A matrix [N K] as files know it. */
export interface FileMatrix {
  readonly module: string;
  readonly n: number;
  readonly k: number;
  /** Whether Transformers keeps it with input features first. */
  readonly transposed: boolean;
  /** From the first row on. */
  readonly parts: readonly MatrixPart[];
}

/** The matrices of a model that adapters can have, as Transformers has them, in the model's order. */
export function fileMatrices({ config, parameters }: Base): FileMatrix[] {
  const layout = fileLayout(config);
  const found = new Map<string, FileMatrix & { parts: MatrixPart[] }>();
  for (const { name, shape } of parameters.linears) {
    const [rows, k] = shape;
    const { tensor, shape: whole, from, transposed } = layout.place(name) ?? { tensor: name, shape, from: 0, transposed: false };
    const module = moduleOf(tensor);
    const matrix = found.get(module) ?? { module, n: (transposed ? whole[1] : whole[0])!, k, transposed, parts: [] };
    matrix.parts.push({ module: moduleOf(name), from, rows });
    found.set(module, matrix);
  }
  return [...found.values()];
}

/** The matrices of {@link fileMatrices}, and parts of them by their own names, as older files have them. */
export function knownMatrices(model: Base): Map<string, FileMatrix> {
  const all = fileMatrices(model);
  const single = ({ k, transposed }: FileMatrix, { module, rows }: MatrixPart): FileMatrix => ({
    ...{ module, n: rows, k, transposed },
    parts: [{ module, from: 0, rows }],
  });
  const parts = all.flatMap((matrix) => (matrix.parts.length === 1 ? [] : matrix.parts.map((part) => single(matrix, part))));
  return new Map([...all, ...parts].map((matrix) => [matrix.module, matrix]));
}

/** What a file has of an adapter of one of its matrices: the adapters of its parts, each with some rows of A and columns of B. */
export interface FileAdapter {
  readonly matrix: FileMatrix;
  /** Of A [R K] and B [N R] in the file. */
  readonly rank: number;
  readonly scale: number;
  readonly parts: readonly AdapterPart[];
}

export interface AdapterPart extends MatrixPart {
  /** Its first row of A and column of B, and how many it has. */
  readonly at: number;
  readonly rank: number;
  readonly scale: number;
}

/** Where the adapters of a model's matrices go in a file: those of parts side by side, each with rows of A of its own. */
export function adaptersByFile(model: Base, { weights }: LiveAdapter): FileAdapter[] {
  return fileMatrices(model).flatMap((matrix) => {
    let rank = 0;
    const parts = matrix.parts.flatMap((part): AdapterPart[] => {
      const own = weights.get(part.module);
      if (own === undefined) return [];
      const size = own.a.shape[0]! * (own.start === undefined ? 1 : 2);
      rank += size;
      return [{ ...part, at: rank - size, rank: size, scale: own.scale }];
    });
    return parts.length === 0 ? [] : [{ matrix, rank, scale: parts[0]!.scale, parts }];
  });
}

/** B of a file's matrix [N R] from those of its parts [rows rank], which may have other scales. */
export function joinedB({ matrix, rank, scale, parts }: FileAdapter, each: readonly Float32Array[]): Float32Array {
  if (parts.length === 1 && matrix.parts.length === 1) return each[0]!;
  const joined = new Float32Array(matrix.n * rank);
  for (const [i, part] of parts.entries()) {
    const by = part.scale / scale;
    for (let row = 0; row < part.rows; row++)
      for (let j = 0; j < part.rank; j++) joined[(part.from + row) * rank + part.at + j] = by * each[i]![row * part.rank + j]!;
  }
  return joined;
}

/** Rows of a part of B, from those of the file [rows R]: its own columns. */
export function columnsOf(rows: Float32Array, rank: number, { at, rank: own }: Pick<AdapterPart, 'at' | 'rank'>): Float32Array {
  if (own === rank) return rows;
  const count = rows.length / rank;
  const columns = new Float32Array(count * own);
  for (let row = 0; row < count; row++) columns.set(rows.subarray(row * rank + at, row * rank + at + own), row * own);
  return columns;
}
