// Checkpoints: a model folder that Transformers loads, and beside it what an exact resume needs. A checkpoint is complete or absent.
import { mkdir, readdir, readFile, stat } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import type { DatasetState } from '../data/dataset.ts';
import { replaceFolder, writeAtomic } from '../io/atomic.ts';
import { openSafetensors, writeSafetensors } from '../io/safetensors.ts';
import { checkpointFolder, pruneCheckpoints } from '../models/folder.ts';
import { FormatError } from '../tensor/errors.ts';
import { piecesOf, type Tensor, writeAt } from '../tensor/tensor.ts';
import type { RunConfig } from './config.ts';
import type { Evaluations } from './events.ts';
import type { Optimizer } from './optimizer.ts';

/** Where training stood. */
export interface TrainingState {
  readonly format: 1;
  readonly kind: RunConfig['kind'];
  /** Optimizer steps taken. */
  readonly step: number;
  /** Tokens seen. */
  readonly tokens: number;
  /** Updates that the optimizer counted. */
  readonly updates: number;
  /** Where the data goes on. */
  readonly data: DatasetState;
  /** How evaluations went; absent where none counts. */
  readonly evaluations?: Evaluations;
  /** What must not change between the two parts of a run: a digest by field name. */
  readonly pinned: Readonly<Record<string, string>>;
}

const names = { state: 'state.json', optimizer: 'optimizer.safetensors' } as const;

/** The parts of a run that a checkpoint holds. */
export interface Checkpointed {
  readonly optimizer: Optimizer;
  /** Writes what was trained, and what belongs to it, into a folder. */
  save(folder: string): Promise<void>;
}

/** Writes `output`/checkpoints/step-N and removes all but the newest `keep`. @returns its path and size in bytes. */
export async function saveCheckpoint(
  output: string,
  parts: Checkpointed,
  state: TrainingState,
  keep: number,
): Promise<{ path: string; bytes: number }> {
  const path = checkpointFolder(output, state.step);
  await mkdir(dirname(path), { recursive: true });
  await replaceFolder(path, async (into) => {
    await parts.save(into);
    // In pieces: a moment is as large as the model.
    await writeSafetensors(
      join(into, names.optimizer),
      Object.entries(parts.optimizer.state).map(([name, t]) => ({
        name,
        dtype: fileDType(t),
        shape: [...t.shape],
        data: () => piecesOf(t) as AsyncIterable<Float32Array | Uint8Array>,
      })),
      { step: String(state.step) },
    );
    await writeAtomic(join(into, names.state), (file) => file.writeFile(`${JSON.stringify(state, null, 2)}\n`));
  });
  await pruneCheckpoints(output, keep, state.evaluations?.best?.step);
  return { path, bytes: await folderBytes(path) };
}

async function folderBytes(folder: string): Promise<number> {
  let bytes = 0;
  for (const name of await readdir(folder)) bytes += (await stat(join(folder, name))).size;
  return bytes;
}

/** Reads where training stood. @throws FormatError when state.json is missing or damaged. */
export async function readState(checkpoint: string): Promise<TrainingState> {
  const path = join(checkpoint, names.state);
  const refuse = (why: string, cause?: unknown): never => {
    throw new FormatError(`${path}: ${why}; resume from an earlier checkpoint, or set resume to false`, {
      code: 'ERR_CHECKPOINT',
      op: 'resume',
      argument: path,
      cause,
    });
  };
  let state: TrainingState;
  try {
    state = JSON.parse(await readFile(path, 'utf8')) as TrainingState;
  } catch (error) {
    return refuse(`cannot be read: ${(error as Error).message}`, error);
  }
  const counts = [state?.step, state?.tokens, state?.updates];
  if (
    state?.format !== 1 ||
    !counts.every((n) => Number.isSafeInteger(n) && n >= 0) ||
    typeof state.pinned !== 'object' ||
    !state.data
  ) {
    return refuse('is not the state of a training run');
  }
  return state;
}

/** Loads the moments of the optimizer. The weights come with the model. @throws FormatError */
export async function restoreOptimizer(checkpoint: string, optimizer: Optimizer, state: TrainingState): Promise<void> {
  const path = join(checkpoint, names.optimizer);
  const stored = await openSafetensors(path);
  try {
    for (const [name, t] of Object.entries(optimizer.state)) {
      const entry = stored.tensors.get(name);
      if (
        entry === undefined ||
        entry.dtype !== fileDType(t) ||
        entry.shape.length !== 1 ||
        entry.shape[0] !== t.size ||
        stored.metadata.step !== String(state.step)
      ) {
        throw new FormatError(
          `${path}: the moments of step ${state.step} for ${t.size} parameters were expected; the files of this checkpoint do not belong together`,
          {
            code: 'ERR_CHECKPOINT',
            op: 'resume',
            argument: name,
            expected: `[${t.size}]`,
            actual: entry === undefined ? 'nothing' : `[${entry.shape.join(' ')}]`,
          },
        );
      }
      await stored.each(name, (run, from) => writeAt(t, from, run as Float32Array | Uint8Array));
    }
    optimizer.updates = state.updates;
  } finally {
    await stored.close();
  }
}

function fileDType(moment: Tensor): 'F32' | 'U8' {
  return moment.dtype === 'u8' ? 'U8' : 'F32';
}
