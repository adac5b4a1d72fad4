// What tells one model's files from another's, so that stages are run again when a model has changed under its name.

import { createHash, type Hash } from 'node:crypto';
import { open, readdir, stat } from 'node:fs/promises';
import { basename, join } from 'node:path';

// Bytes of a file that is read whole; of a larger one, so many samples of so many bytes.
const wholeBytes = 1 << 20;
const samples = 64;
const sampleBytes = 1 << 14;

/**
 * Eight hex digits of a model's files (weights and JSON) and of what else decides its texts. Of large files samples count that are spread over them:
 * training changes weights everywhere, and many GiB are told apart in a moment.
 * @param path the folder of a model, or one file
 */
export async function fingerprint(path: string, ...more: readonly (string | undefined)[]): Promise<string> {
  const isFolder = (await stat(path)).isDirectory();
  const names = isFolder ? (await readdir(path)).filter((name) => /\.(safetensors|json)$/.test(name)).sort() : [''];
  const hash = createHash('sha256').update(JSON.stringify(more));
  for (const name of names) await addFile(hash, join(path, name));
  return hash.digest('hex').slice(0, 8);
}

async function addFile(hash: Hash, path: string): Promise<void> {
  const file = await open(path);
  try {
    const { size } = await file.stat();
    hash.update(JSON.stringify([basename(path), size]));
    const [count, length] = size <= wholeBytes ? [1, size] : [samples, sampleBytes];
    const buffer = Buffer.alloc(length);
    for (let i = 0; i < count; i++) {
      // The first lies at the start, the last at the end.
      const from = count === 1 ? 0 : Math.floor((i * (size - length)) / (count - 1));
      const { bytesRead } = await file.read(buffer, 0, length, from);
      hash.update(buffer.subarray(0, bytesRead));
    }
  } finally {
    await file.close();
  }
}
