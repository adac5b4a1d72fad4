// Adapters as GGUF files, which llama.cpp puts beside a model of the same base (`--lora`).
//   N rows of a weight, K columns, R rank

import { writeGguf } from '../io/gguf.ts';
import type { GgufInput, GgufValue } from '../io/gguf-header.ts';
import { type Adapter, moduleOf } from '../nn/lora.ts';
import { ConfigError } from '../tensor/errors.ts';
import { matrixIn } from './adapter.ts';
import { reordered } from './gguf.ts';
import { type Piece, partsOf } from './gguf-parts.ts';
import { metadataOf } from './ggufconfig.ts';
import type { LanguageModel } from './model.ts';

/**
 * Writes a LoRA adapter as a GGUF file for llama.cpp, which adds its change to the {@link exportGguf} of its base, of whatever type. What OLoRA
 * takes away becomes part of it. It replaces `path` only when complete.
 * @param model the base that it was trained beside
 * @throws ConfigError for DoRA, which llama.cpp does not have, and for a base that a GGUF file cannot tell of.
 */
export async function exportGgufAdapter(path: string, model: Pick<LanguageModel, 'config'>, adapter: Adapter): Promise<void> {
  const { weights, options } = adapter;
  if (options.kind === 'dora') {
    throw new ConfigError(
      'exportGgufAdapter: the adapter is of kind dora, which llama.cpp does not have; export the model with it in use: exportGguf',
      { code: 'ERR_CONFIG', op: 'exportGgufAdapter', argument: 'kind', expected: 'lora', actual: 'dora' },
    );
  }
  const about = metadataOf(model.config);
  // llama.cpp multiplies by alpha / R of each tensor, with one alpha for all.
  const rankOf = (name: string): number => {
    const { a, start } = weights.get(moduleOf(name))!;
    return a.shape[0]! * (start === undefined ? 1 : 2);
  };
  const alpha = options.rankStabilized ? options.alpha * Math.sqrt(options.rank) : options.alpha;
  const metadata: (readonly [string, GgufValue])[] = [
    ['general.architecture', { type: 'string', value: about.architecture }],
    ['general.type', { type: 'string', value: 'adapter' }],
    ['adapter.type', { type: 'string', value: 'lora' }],
    ['adapter.lora.alpha', { type: 'f32', value: alpha }],
  ];
  const tensors = partsOf(model.config).flatMap(({ gguf, pieces, shape }): GgufInput[] => {
    const adapted = pieces.filter(({ name }) => weights.has(moduleOf(name)));
    if (adapted.length === 0 || shape.length !== 2) return [];
    const [n = 0, k = 0] = shape;
    const joint = adapted.reduce((sum, { name }) => sum + rankOf(name), 0);
    const tensor = (end: string, shape: readonly number[], data: GgufInput['data']): GgufInput => ({
      name: `${gguf}.${end}`,
      type: 'F32',
      shape,
      data,
    });
    return [
      tensor('lora_a', [joint, k], async function* () {
        for (const { name } of adapted) yield await matrixIn(adapter, moduleOf(name), 'A');
      }),
      tensor('lora_b', [n, joint], async function* () {
        // The parts of a joint matrix each read their own rows of A.
        let column = 0;
        for (const piece of pieces) {
          const own = weights.has(moduleOf(piece.name));
          yield own ? await rowsOf(piece, column, joint) : new Float32Array(piece.rows * joint);
          if (own) column += rankOf(piece.name);
        }
      }),
    ];
  });
  await writeGguf(path, metadata, tensors);

  /** B of a part [rows joint], in its columns, in the order and with the factor of the part's weight. */
  async function rowsOf({ name, rows, heads, factor }: Piece, column: number, joint: number): Promise<Float32Array> {
    const own = await matrixIn(adapter, moduleOf(name), 'B');
    const rank = rankOf(name);
    const b = heads > 0 ? reordered(own, heads, rank, true) : own;
    const all = new Float32Array(rows * joint);
    const by = (factor * joint * weights.get(moduleOf(name))!.scale) / alpha;
    for (let row = 0; row < rows; row++) for (let i = 0; i < rank; i++) all[row * joint + column + i] = b[row * rank + i]! * by;
    return all;
  }
}
