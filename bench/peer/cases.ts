// What is compared: three shapes, one student, one teacher, and weights that both sides load.

import { mkdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { writeSafetensors } from '../../src/io/safetensors.ts';
import { modelConfig } from '../../src/models/model.ts';
import { modelSpec } from '../../src/models/registry.ts';
import { transformersText } from '../../src/models/transformers.ts';
import { specsOf } from '../../src/nn/parameters.ts';

export interface Shape {
  readonly vocabulary: number;
  readonly batch: number;
  readonly length: number;
  readonly window: number;
  /** Optimizer steps a turn, so that the fastest takes a second or more. */
  readonly steps: number;
  /** How many times faster than eager and than torch.compile limbeck means to be. */
  readonly goals: Record<Task, readonly [number, number]>;
}

export type Task = 'train' | 'distill';

export const shapes: readonly Shape[] = [
  { vocabulary: 8192, batch: 8, length: 256, window: 128, steps: 3, goals: { train: [2, 1.5], distill: [1.7, 1.45] } },
  { vocabulary: 32_000, batch: 4, length: 512, window: 256, steps: 2, goals: { train: [2.3, 1.6], distill: [2.2, 1.6] } },
  { vocabulary: 8192, batch: 2, length: 2048, window: 512, steps: 1, goals: { train: [5, 2.6], distill: [5, 2.6] } },
];

export const optimizer = { learningRate: 1e-4, betas: [0.9, 0.95], eps: 1e-8, weightDecay: 0.1 } as const;

const presets = { student: 'gemma2-mini', teacher: 'gemma2-small' } as const;

export type Role = keyof typeof presets;

/** Writes a model folder with random weights: the same for every side, so that losses can be compared. */
export async function writeModel(folder: string, role: Role, { vocabulary, length, window }: Shape): Promise<string> {
  const config = modelConfig(presets[role], { vocabSize: vocabulary, window, context: length });
  const random = generator(role === 'student' ? 1 : 2);
  const fill = (count: number, std: number): Float32Array => {
    // Uniform, with the standard deviation of Gemma's initial weights.
    const bound = std * Math.sqrt(3);
    return new Float32Array(count).map(() => bound * (2 * random() - 1));
  };
  const path = join(folder, role);
  await mkdir(path, { recursive: true });
  await writeFile(join(path, 'config.json'), transformersText(config));
  await writeSafetensors(
    join(path, 'model.safetensors'),
    // Norms are not left at their 0, where a mistake with them would not show in the loss.
    specsOf(modelSpec(config)).map(({ name, shape, std }) => ({
      name,
      dtype: 'F32',
      shape,
      data: () =>
        fill(
          shape.reduce((a, b) => a * b, 1),
          std || 0.03,
        ),
    })),
    { format: 'pt' },
  );
  return path;
}

/** Token ids [B][T], all but the special ones. */
export function randomIds({ vocabulary, batch, length }: Shape): number[][] {
  const random = generator(3);
  const row = () => Array.from({ length }, () => 3 + Math.floor(random() * (vocabulary - 3)));
  return Array.from({ length: batch }, row);
}

/** Numbers from 0 to below 1: xorshift32, which is plenty for weights of a benchmark. */
function generator(seed: number): () => number {
  let state = Math.imul(seed, 2654435761) | 1;
  return () => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return (state >>> 0) / 2 ** 32;
  };
}
