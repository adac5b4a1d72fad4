// llama.cpp's side of bench:generate, through node-llama-cpp of test/peers; the same protocol as generate_limbeck.mjs. Its file is written
// by generate_peer.py.

import { execFileSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath, pathToFileURL } from 'node:url';

let sequence;

async function answerOf({ cmd, folder, threads, tokens }) {
  if (cmd === 'init') {
    const require = createRequire(new URL('../../test/peers/package.json', import.meta.url));
    const { getLlama } = await import(pathToFileURL(require.resolve('node-llama-cpp')).href);
    const path = join(folder, 'model.gguf');
    if (!existsSync(path)) {
      const script = fileURLToPath(new URL('generate_peer.py', import.meta.url));
      execFileSync(process.env.LIMBECK_PEER_PYTHON ?? 'python3', [script, 'gguf', folder, path], { stdio: ['ignore', 2, 2] });
    }
    const llama = await getLlama({ gpu: false, build: 'never', maxThreads: threads, logLevel: 'error' });
    const model = await llama.loadModel({ modelPath: path });
    const context = await model.createContext({ contextSize: 512, threads, sequences: 1 });
    sequence = context.getSequence();
    return { ready: true };
  }
  await sequence.clearHistory();
  const ids = Array.from({ length: 16 }, (_, i) => (i * 31) % 49_152);
  const from = performance.now();
  let count = 0;
  for await (const _ of sequence.evaluate(ids, { temperature: 0, yieldEogToken: true })) if (++count === tokens) break;
  if (count !== tokens) throw new Error(`${count} tokens came`);
  return { seconds: (performance.now() - from) / 1000 };
}

for await (const line of createInterface(process.stdin)) {
  const message = JSON.parse(line);
  if (message.cmd === 'exit') process.exit(0);
  const result = await answerOf(message).catch((error) => ({ error: error.message }));
  process.stdout.write(`${JSON.stringify(result)}\n`);
}
