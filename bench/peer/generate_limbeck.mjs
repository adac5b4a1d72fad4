// limbeck's side of bench:generate: {"cmd": "init", "folder", "threads", "dtype"} loads the model, or makes it where config.json is alone;
// {"cmd": "run", "batch", "tokens"} continues prompts of 16 tokens greedily and tells the seconds.

import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { createModel, generateTokens, init, loadConfig, loadWeights, saveModel } from '../../dist/index.js';

let model;

async function answerOf({ cmd, folder, threads, dtype, batch, tokens }) {
  if (cmd === 'init') {
    init({ threads });
    if (!existsSync(join(folder, 'model.safetensors'))) {
      const made = createModel(await loadConfig(folder), { seed: 1, trainable: false });
      await saveModel(folder, made);
      made.dispose();
    }
    model = await loadWeights(folder, { dtype });
    return { ready: true };
  }
  const requests = Array.from({ length: batch }, (_, row) => ({
    ids: Array.from({ length: 16 }, (_, i) => (row * 997 + i * 31) % 49_152),
    ...{ temperature: 0, tokens },
  }));
  const from = performance.now();
  let count = 0;
  for await (const { type } of generateTokens(model, requests, { batch })) if (type === 'token') count++;
  if (count !== batch * tokens) throw new Error(`${count} tokens came`);
  return { seconds: (performance.now() - from) / 1000 };
}

for await (const line of createInterface(process.stdin)) {
  const message = JSON.parse(line);
  if (message.cmd === 'exit') break;
  const result = await answerOf(message).catch((error) => ({ error: error.message }));
  process.stdout.write(`${JSON.stringify(result)}\n`);
}
model?.dispose();
