// Where checkpoints lie: `output`/checkpoints/step-N, each a model folder.
import { mkdir, readdir, rename, rm, stat } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { isPartial } from '../io/atomic.ts';
import { FormatError } from '../tensor/errors.ts';

const stepFolder = /^step-(\d{8,})$/;

/** The folder of the checkpoint after `step` optimizer steps. */
export function checkpointFolder(output: string, step: number): string {
  return join(output, 'checkpoints', `step-${String(step).padStart(8, '0')}`);
}

const stepOf = (path: string): number => Number(stepFolder.exec(basename(path))![1]);

/** Folders of the complete checkpoints of an output folder, oldest first. */
export async function checkpointFolders(output: string): Promise<string[]> {
  const folder = join(output, 'checkpoints');
  const names = await readdir(folder).catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT' || error.code === 'ENOTDIR') return [];
    throw error;
  });
  return names
    .filter((name) => stepFolder.test(name))
    .sort((a, b) => stepOf(a) - stepOf(b))
    .map((name) => join(folder, name));
}

/** Removes what a killed process left half-written, and all checkpoints but the newest `keep` and that of step `best`. */
export async function pruneCheckpoints(output: string, keep: number, best?: number): Promise<void> {
  const folder = join(output, 'checkpoints');
  const partial = (await readdir(folder)).filter(isPartial).map((name) => join(folder, name));
  const all = await checkpointFolders(output);
  const spared = best === undefined ? undefined : checkpointFolder(output, best);
  const old = all.slice(0, Math.max(0, all.length - keep)).filter((path) => path !== spared);
  for (const path of [...partial, ...old]) await rm(path, { recursive: true, force: true });
}

/**
 * Moves the checkpoints after `step` to `output`/checkpoints.old, in place of those that lay there: a run that begins at `step` takes another
 * way, and the newest of its checkpoints must be the newest of the folder.
 */
export async function setAside(output: string, step: number): Promise<void> {
  const old = join(output, 'checkpoints.old');
  for (const path of await checkpointFolders(output)) {
    if (stepOf(path) <= step) continue;
    const place = join(old, basename(path));
    await mkdir(old, { recursive: true });
    await rm(place, { recursive: true, force: true });
    await rename(path, place);
  }
}

/** The newest complete checkpoint of an output folder; undefined when there is none. */
export async function latestCheckpoint(output: string): Promise<string | undefined> {
  return (await checkpointFolders(output)).at(-1);
}

/** The folder of a model: `path` itself when it holds one or is a GGUF file, else its newest checkpoint. @throws FormatError */
export async function resolveCheckpoint(path: string): Promise<string> {
  if (path.endsWith('.gguf')) return path;
  for (const name of ['config.json', 'adapter_config.json']) {
    const here = await stat(join(path, name)).catch(() => undefined);
    if (here?.isFile()) return path;
  }
  const newest = await latestCheckpoint(path);
  if (newest !== undefined) return newest;
  throw new FormatError(
    `${path}: neither a model folder (config.json, model.safetensors, tokenizer.json) nor an output folder with checkpoints`,
    {
      code: 'ERR_CHECKPOINT',
      op: 'loadModel',
      argument: path,
    },
  );
}
