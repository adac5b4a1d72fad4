// Measures the promises of docs/synthesis.md: jiti bench/synth.ts [throughput | dedupe | million | kills [count]]
import { spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import { mkdtemp, readdir, readFile, rm } from 'node:fs/promises';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { filter } from '../src/synth/filter.ts';
import { neighbours } from '../src/synth/neighbours.ts';
import { pipeline, type RecordSource, readManifest, readRecords, runPipeline } from '../src/synth/pipeline.ts';
import { openaiProvider } from '../src/synth/providers/openai.ts';
import { difficulties, type InstructionRecord, qualities } from '../src/synth/record.ts';
import { reportOutput } from '../src/synth/report.ts';
import { philox } from '../src/tensor/random.ts';

/** Calls at 64 at a time against a server of another process that takes 50 ms for each. */
async function throughput(): Promise<void> {
  const [latency, concurrency, calls] = [50, 64, 6400];
  const child = spawn(process.execPath, ['--import', 'jiti/register', import.meta.filename, 'server', String(latency)], {
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  try {
    const url = await new Promise<string>((resolve) => child.stdout.once('data', (data) => resolve(String(data).trim())));
    const provider = openaiProvider({ url, model: 'm', concurrency });
    const many = (n: number) => Promise.all(Array.from({ length: n }, () => provider.complete('x')));
    await many(10 * concurrency);
    const began = performance.now();
    await many(calls);
    const seconds = (performance.now() - began) / 1000;
    const ideal = (concurrency * 1000) / latency;
    console.log(
      `throughput  ${(calls / seconds).toFixed(0)} calls/s of ${ideal}: ${((100 * calls) / seconds / ideal).toFixed(1)} %`,
    );
    await provider.dispose();
  } finally {
    child.kill();
  }
}

function server(latency: number): void {
  const body = JSON.stringify({
    choices: [{ index: 0, text: 'a', finish_reason: 'stop' }],
    usage: { prompt_tokens: 1, completion_tokens: 1 },
  });
  const listening = createServer((request, response) => {
    request.resume();
    request.on('end', () => setTimeout(() => response.end(body), latency));
  });
  listening.listen(0, '127.0.0.1', () => console.log(`http://127.0.0.1:${(listening.address() as AddressInfo).port}/v1`));
}

async function dedupe(): Promise<void> {
  const [n, d] = [10_000, 384];
  const block = new Uint32Array(4);
  const vectors = Array.from({ length: n }, (_, i) =>
    Float32Array.from({ length: d }, (_, k) => {
      block.set([k, i, 0, 0]);
      return philox(block, 1, 1)[0]! / 2 ** 31 - 1;
    }),
  );
  for (let i = 5; i < n; i += 5) vectors[i] = vectors[i - 1]!;
  const began = performance.now();
  const { cluster } = await neighbours(vectors);
  const seconds = (performance.now() - began) / 1000;
  console.log(`dedupe      ${n} vectors of ${d}: ${seconds.toFixed(2)} s, ${new Set(cluster).size} clusters`);
}

async function million(): Promise<void> {
  const count = 1_000_000;
  const source: RecordSource<InstructionRecord> = {
    settings: { made: count },
    count,
    async *records() {
      for (let i = 0; i < count; i++) {
        yield {
          id: `made-${i}`,
          messages: [
            { role: 'user', content: `What is the number ${i} good for, and who found out?` },
            { role: 'assistant', content: 'It is a number like the others. '.repeat(1 + (i % 9)) },
          ],
          tags: { quality: qualities[i % 5]!, difficulty: difficulties[(i >> 3) % 5]! },
        };
      }
    },
  };
  const folder = await mkdtemp(join(tmpdir(), 'limbeck-million-'));
  try {
    let peak = 0;
    const watch = setInterval(() => {
      peak = Math.max(peak, process.memoryUsage.rss());
    }, 50);
    const began = performance.now();
    for await (const _ of runPipeline(pipeline(source).through(filter({ quality: 'average', longest: 300_000 })), {
      output: folder,
    }))
      void 0;
    const filtered = (performance.now() - began) / 1000;
    await reportOutput(folder);
    const reported = (performance.now() - began) / 1000 - filtered;
    clearInterval(watch);
    const [stage] = await readManifest(folder);
    let kept = 0;
    for await (const _ of readRecords(join(folder, stage!.file))) kept++;
    console.log(
      `million     filtered in ${filtered.toFixed(1)} s to ${kept}, reported in ${reported.toFixed(1)} s, peak memory of the process ${(peak / 2 ** 20).toFixed(0)} MiB`,
    );
  } finally {
    await rm(folder, { recursive: true });
  }
}

/** Kills a run at random moments until it is done; its files must be those of an undisturbed one. */
async function kills(count: number, kind: 'plain' | 'instruct', records: number): Promise<void> {
  const worker = join(import.meta.dirname, '../test/synth/worker.ts');
  const start = (folder: string) => {
    const args = ['--import', 'jiti/register', worker, folder, String(records), kind];
    return spawn(process.execPath, args, { stdio: ['ignore', 'pipe', 'inherit'] });
  };
  const digest = async (folder: string) => {
    const hash = createHash('sha256');
    for (const name of (await readdir(folder)).sort()) hash.update(name).update(await readFile(join(folder, name)));
    return hash.digest('hex');
  };
  const folders = [await mkdtemp(join(tmpdir(), 'limbeck-whole-')), await mkdtemp(join(tmpdir(), 'limbeck-killed-'))] as const;
  try {
    await new Promise((resolve) => start(folders[0]).on('close', resolve));
    let killed = 0;
    let ended = false;
    for (let round = 0; round < count; round++) {
      const child = start(folders[1]);
      const closed = new Promise((resolve) => child.on('close', resolve));
      const ready = new Promise((resolve) => child.stdout!.once('data', resolve));
      await Promise.race([ready, closed]);
      await Promise.race([new Promise((resolve) => setTimeout(resolve, Math.random() * 120)), closed]);
      if (child.exitCode === null && child.kill('SIGKILL')) killed++;
      else ended = true;
      await closed;
    }
    await new Promise((resolve) => start(folders[1]).on('close', resolve));
    const same = (await digest(folders[0])) === (await digest(folders[1]));
    console.log(
      `kills       ${kind}: ${killed} of ${count} rounds killed${ended ? ', the others ended by themselves' : ''}: ${same ? 'equal to the byte' : 'DIFFERENT'}`,
    );
    if (!same) process.exitCode = 1;
  } finally {
    for (const folder of folders) await rm(folder, { recursive: true });
  }
}

const [what, number] = process.argv.slice(2);
if (what === 'server') server(Number(number));
else {
  if (what === undefined || what === 'throughput') await throughput();
  if (what === undefined || what === 'dedupe') await dedupe();
  if (what === undefined || what === 'million') await million();
  if (what === undefined || what === 'kills') {
    await kills(Number(number ?? 50), 'plain', 3000);
    await kills(Number(number ?? 50), 'instruct', 600);
  }
}
