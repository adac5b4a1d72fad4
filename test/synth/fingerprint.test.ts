import { mkdir, mkdtemp, rm, utimes, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { fingerprint } from '../../src/synth/providers/fingerprint.ts';

let folder: string;
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'limbeck-print-'));
});
afterEach(() => rm(folder, { recursive: true, force: true }));

test('a copy has the same, other weights, settings or templates another', async () => {
  const [one, two] = [join(folder, 'one'), join(folder, 'two')];
  const weights = Buffer.alloc(5000, 3);
  const write = async (to: string, bytes: Buffer) => {
    await mkdir(to, { recursive: true });
    await writeFile(join(to, 'model.safetensors'), bytes);
    await writeFile(join(to, 'config.json'), '{}');
  };
  await write(one, weights);
  await write(two, weights);
  await writeFile(join(two, 'notes.txt'), 'not of the model');
  await utimes(join(two, 'config.json'), 1, 1);
  const first = await fingerprint(one, 'template');
  expect(first).toMatch(/^[0-9a-f]{8}$/);
  expect(await fingerprint(two, 'template')).toBe(first);
  expect(await fingerprint(two)).not.toBe(first);
  weights[4321] = 4;
  await writeFile(join(two, 'model.safetensors'), weights);
  expect(await fingerprint(two, 'template')).not.toBe(first);
  await write(two, Buffer.alloc(5000, 3));
  await writeFile(join(two, 'config.json'), '{"a":1}');
  expect(await fingerprint(two, 'template')).not.toBe(first);
});

test('of a large file samples count, the first and the last bytes among them', async () => {
  const path = join(folder, 'large.gguf');
  const bytes = Buffer.alloc(8 << 20, 1);
  const seen = new Set<string>();
  for (const at of [undefined, 0, bytes.length - 1]) {
    if (at !== undefined) bytes[at]! ^= 5;
    await writeFile(path, bytes);
    seen.add(await fingerprint(path));
  }
  // What training does: every weight a little.
  for (let i = 0; i < bytes.length; i += 4) bytes[i]! ^= 1;
  await writeFile(path, bytes);
  seen.add(await fingerprint(path));
  expect(seen.size).toBe(4);
});
