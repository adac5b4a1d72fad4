// Worker threads: engines of their own, and an end at any moment. Each case is a process, since what would go wrong is its death.
import { spawnSync } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { afterAll, expect, test } from 'vitest';

const folder = mkdtempSync(join(tmpdir(), 'limbeck-workers-'));
afterAll(() => rmSync(folder, { recursive: true }));
const module = (name: string) => JSON.stringify(pathToFileURL(join(import.meta.dirname, '../../dist', name)).href);

// `long()` enqueues some seconds of work and returns at once.
const prelude = `
import { isMainThread, parentPort, Worker, workerData } from 'node:worker_threads';
import { memory } from ${module('tensor/engine.js')};
import { tensor, zeros } from ${module('tensor/tensor.js')};
import { gelu } from ${module('ops/activation.js')};
import { mul } from ${module('ops/elementwise.js')};
const start = (data) => new Worker(new URL(import.meta.url), { workerData: data });
const heard = (worker, event) => new Promise((resolve) => worker.once(event, resolve));
const long = (times = 2000) => {
  const x = zeros([2048, 1024]);
  for (let i = 0; i < times; i++) gelu(x).dispose();
};
`;

let count = 0;
function run(body: string) {
  const file = join(folder, `case${count++}.mjs`);
  writeFileSync(file, prelude + body);
  const began = Date.now();
  const { status, signal, stdout, stderr } = spawnSync(process.execPath, [file], { encoding: 'utf8', timeout: 60_000 });
  return { status, signal, stdout: stdout.trim(), stderr, ms: Date.now() - began };
}

test('two workers and the main thread compute side by side, each with tensors of its own', () => {
  const result = run(`
const product = async (k) => [...(await mul(tensor([k, 2]), tensor([3, k])).read()), memory().tensors];
if (isMainThread) {
  const workers = [start(1), start(10)];
  const answers = workers.map((w) => heard(w, 'message'));
  console.log(JSON.stringify([await product(100), ...(await Promise.all(answers))]));
} else {
  parentPort.postMessage(await product(workerData));
}`);
  expect(result).toMatchObject({ status: 0, signal: null, stderr: '' });
  expect(JSON.parse(result.stdout)).toEqual([
    [300, 200, 3],
    [3, 2, 3],
    [30, 20, 3],
  ]);
});

test('a worker that is terminated in the middle of its work ends soon and harms nobody', () => {
  const result = run(`
if (isMainThread) {
  const worker = start(0);
  await heard(worker, 'message');
  const began = Date.now();
  await worker.terminate();
  const took = Date.now() - began;
  console.log(JSON.stringify({ took, product: [...(await mul(tensor([3]), tensor([4])).read())] }));
} else {
  long();
  const result = zeros([4]).read(); // pending when the end comes
  parentPort.postMessage('working');
  await result;
}`);
  expect(result).toMatchObject({ status: 0, signal: null, stderr: '' });
  const { took, product } = JSON.parse(result.stdout) as { took: number; product: number[] };
  expect(product).toEqual([12]);
  expect(took).toBeLessThan(3000);
});

test('workers that come and go leave nothing running', () => {
  const result = run(`
if (isMainThread) {
  for (let i = 0; i < 8; i++) {
    const worker = start(i);
    if (i % 2) { await heard(worker, 'message'); await worker.terminate(); }
    else await heard(worker, 'exit');
  }
  console.log('done');
} else {
  long();
  parentPort.postMessage('working');
  process.exit(0);
}`);
  expect(result).toMatchObject({ status: 0, signal: null, stdout: 'done', stderr: '' });
});

test('process.exit in the middle of the work ends the process at once, with its code', () => {
  const result = run(`
long();
zeros([4]).read();
setTimeout(() => process.exit(7), 20);`);
  expect(result).toMatchObject({ status: 7, signal: null, stderr: '' });
});

test('a process waits for its reads, and only for them', () => {
  const result = run(`
long(100);
zeros([1]).read().then(() => console.log('read'));`);
  expect(result).toMatchObject({ status: 0, signal: null, stdout: 'read', stderr: '' });
  const idle = run("tensor([1]); console.log('idle');");
  expect(idle).toMatchObject({ status: 0, stdout: 'idle' });
});
