// The weights of a model folder: model.safetensors, or several files and model.safetensors.index.json, which says what lies where.
import { readdir, readFile, rm, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { FormatError } from '../tensor/errors.ts';
import { writeAll, writeAtomic } from './atomic.ts';
import {
  openSafetensors,
  type Safetensors,
  type SafetensorsEntry,
  type SafetensorsInput,
  sizeOf,
  writeSafetensors,
} from './safetensors.ts';

const single = 'model.safetensors';
const index = 'model.safetensors.index.json';
const shard = /^model-\d{5,}-of-\d{5,}\.safetensors$/;

/** The weights of a folder; `close` them, or declare them with `await using`. */
export interface Weights extends AsyncDisposable, Pick<Safetensors, 'read' | 'each' | 'close'> {
  readonly tensors: ReadonlyMap<string, SafetensorsEntry>;
  /** The file that a tensor lies in. */
  pathOf(name: string): string;
}

/**
 * Opens the weights of a folder, in one file or in several.
 * @throws FormatError for a folder without weights, an index that is wrong, a shard that is missing or lies; FileError `ERR_READ`
 */
export async function openWeights(folder: string): Promise<Weights> {
  const files = new Map<string, Safetensors>();
  const close = async (): Promise<void> => {
    await Promise.all([...files.values()].map((file) => file.close()));
  };
  try {
    if (await exists(join(folder, single))) files.set(join(folder, single), await openSafetensors(join(folder, single)));
    else await openShards(folder, files);
  } catch (error) {
    await close();
    throw error;
  }
  const places = new Map<string, { path: string; file: Safetensors; entry: SafetensorsEntry }>();
  for (const [path, file] of files) for (const [name, entry] of file.tensors) places.set(name, { path, file, entry });
  const at = (name: string) => {
    const place = places.get(name);
    if (place === undefined) throw refuse(folder, name, `its files have no tensor '${name}'`);
    return place;
  };
  return {
    tensors: new Map([...places].map(([name, { entry }]) => [name, entry])),
    pathOf: (name) => at(name).path,
    read: (name) => at(name).file.read(name),
    each: (name, use, part) => at(name).file.each(name, use, part),
    close,
    [Symbol.asyncDispose]: close,
  };
}

async function openShards(folder: string, files: Map<string, Safetensors>): Promise<void> {
  const path = join(folder, index);
  const map = weightMap(path, await readIndex(folder, path));
  for (const name of new Set(map.values())) {
    const file = join(folder, name);
    if (!(await exists(file))) throw refuse(path, name, `the file '${name}' that it names is missing; download the folder again`);
    files.set(file, await openSafetensors(file));
  }
  for (const [tensor, name] of map) {
    if (!files.get(join(folder, name))!.tensors.has(tensor))
      throw refuse(path, tensor, `tensor '${tensor}' is not in '${name}', where it says`);
  }
  for (const [file, { tensors }] of files) {
    for (const tensor of tensors.keys()) {
      if (join(folder, map.get(tensor) ?? '') !== file)
        throw refuse(path, tensor, `'${file}' has a tensor '${tensor}', of which it does not know`);
    }
  }
}

async function readIndex(folder: string, path: string): Promise<string> {
  try {
    return await readFile(path, 'utf8');
  } catch (error) {
    const others = (await readdir(folder).catch(() => [])).filter((name) => /\.(bin|pth?|gguf|h5|msgpack)$/.test(name));
    const hint = others.length === 0 ? '' : `; ${others[0]} is another format: convert it with Transformers' save_pretrained()`;
    throw new FormatError(`${folder}: there are no weights: neither ${single} nor ${index}${hint}`, {
      code: 'ERR_CHECKPOINT',
      op: 'openWeights',
      argument: folder,
      expected: single,
      cause: error,
    });
  }
}

function weightMap(path: string, text: string): Map<string, string> {
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch (error) {
    throw refuse(path, path, `it is not JSON: ${(error as Error).message}`);
  }
  const map = (json as { weight_map?: unknown } | null)?.weight_map;
  if (typeof map !== 'object' || map === null || Array.isArray(map))
    throw refuse(path, 'weight_map', 'its weight_map is not an object');
  const entries = Object.entries(map);
  for (const [tensor, file] of entries) {
    // A name, not a path: an index must not make us read what lies elsewhere.
    if (typeof file !== 'string' || !/^[^/\\]+\.safetensors$/.test(file)) {
      throw refuse(
        path,
        tensor,
        `tensor '${tensor}' is said to be in ${JSON.stringify(file)}, which is not the name of a .safetensors file beside it`,
      );
    }
  }
  if (entries.length === 0) throw refuse(path, 'weight_map', 'its weight_map is empty');
  return new Map(entries as [string, string][]);
}

/**
 * Writes the weights of a folder, in one file, or in several of at most `shardBytes` each (a larger tensor has one of its own).
 * Weights that lay there before are replaced when all are written.
 */
export async function writeWeights(folder: string, tensors: readonly SafetensorsInput[], shardBytes: number): Promise<void> {
  const metadata = { format: 'pt' };
  const groups: SafetensorsInput[][] = [];
  let room = 0;
  let total = 0;
  for (const tensor of tensors) {
    const bytes = sizeOf(tensor);
    total += bytes;
    if (bytes > room || groups.length === 0) {
      groups.push([]);
      room = shardBytes;
    }
    groups.at(-1)!.push(tensor);
    room -= bytes;
  }
  const written = new Set<string>();
  if (groups.length <= 1) {
    await writeSafetensors(join(folder, single), tensors, metadata);
    written.add(single);
  } else {
    const map: Record<string, string> = {};
    for (const [i, group] of groups.entries()) {
      const number = (n: number): string => String(n).padStart(5, '0');
      const name = `model-${number(i + 1)}-of-${number(groups.length)}.safetensors`;
      await writeSafetensors(join(folder, name), group, metadata);
      written.add(name);
      for (const tensor of group) map[tensor.name] = name;
    }
    const text = `${JSON.stringify({ metadata: { total_size: total }, weight_map: map }, null, 2)}\n`;
    await writeAtomic(join(folder, index), (file) => writeAll(file, Buffer.from(text)));
    written.add(index);
  }
  const stale = (await readdir(folder)).filter((name) => name === single || name === index || shard.test(name));
  for (const name of stale) if (!written.has(name)) await rm(join(folder, name));
}

async function exists(path: string): Promise<boolean> {
  return stat(path).then(
    () => true,
    () => false,
  );
}

function refuse(path: string, argument: string, what: string): FormatError {
  return new FormatError(`${path}: ${what}`, { code: 'ERR_CHECKPOINT', op: 'openWeights', argument });
}
