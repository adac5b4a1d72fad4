// Loads every checkpoint of architectures/ and saves it again, in one file and in several, for check_saved.py.
import { readdir } from 'node:fs/promises';
import { join } from 'node:path';
import { init, loadWeights, saveModel } from '../../src/index.ts';

const out = process.argv[2];
if (out === undefined) throw new Error('give the folder to write to');
init({ threads: 1 });
const golden = join(import.meta.dirname ?? 'test/golden', 'architectures');
for (const entry of await readdir(golden, { withFileTypes: true })) {
  if (!entry.isDirectory()) continue;
  const model = await loadWeights(join(golden, entry.name));
  await saveModel(join(out, entry.name), model);
  await saveModel(join(out, `${entry.name}.shards`), model, undefined, { shardBytes: 20_000 });
  model.dispose();
}
