// A process that measures, driven by one JSON object a line; between commands it waits and uses no processor time.

import { type ChildProcessWithoutNullStreams, spawn } from 'node:child_process';
import { createInterface, type Interface } from 'node:readline';
import { fileURLToPath } from 'node:url';

export interface Turn {
  readonly seconds: number;
  readonly loss: number;
  readonly peak_rss_bytes: number;
}

export class Worker {
  readonly name: string;
  private readonly child: ChildProcessWithoutNullStreams;
  private readonly lines: Interface;
  private readonly answers: AsyncIterator<string>;
  private errors = '';
  private failure: Error | undefined;

  constructor(name: string, command: string, args: readonly string[], env: Record<string, string>) {
    this.name = name;
    this.child = spawn(command, args, { env: { ...process.env, ...env } });
    this.child.on('error', (error) => {
      this.failure = error;
      this.lines.close();
    });
    this.child.stdin.on('error', () => {});
    this.child.stderr.on('data', (data) => {
      this.errors = (this.errors + data).slice(-2000);
    });
    this.lines = createInterface(this.child.stdout);
    this.answers = this.lines[Symbol.asyncIterator]();
  }

  /** @throws Error when the process cannot be started, ends, or reports one. */
  async ask<T = unknown>(message: object): Promise<T> {
    this.child.stdin.write(`${JSON.stringify(message)}\n`);
    const { value, done } = await this.answers.next();
    if (done) {
      const code = this.child.exitCode ?? this.child.signalCode;
      throw new Error(this.failure?.message ?? `${this.name} ended (${code}) ${this.errors.trim().split('\n').at(-1) ?? ''}`);
    }
    const answer = JSON.parse(value);
    if (answer.error !== undefined) throw new Error(answer.error);
    return answer;
  }

  /** Ends the process and waits until its memory is free again. */
  async close(): Promise<void> {
    if (this.failure || this.child.exitCode !== null || this.child.signalCode !== null) return;
    const ended = new Promise((resolve) => this.child.once('exit', resolve));
    this.child.stdin.end(`${JSON.stringify({ cmd: 'exit' })}\n`);
    const timer = setTimeout(() => this.child.kill('SIGKILL'), 10_000);
    await ended;
    clearTimeout(timer);
  }
}

export function startTorch(name: string, threads: number): Worker {
  const script = fileURLToPath(new URL('torch_peer.py', import.meta.url));
  const python = process.env.LIMBECK_PEER_PYTHON ?? 'python3';
  return new Worker(name, python, [script], {
    OMP_NUM_THREADS: String(threads),
    MKL_NUM_THREADS: String(threads),
    OPENBLAS_NUM_THREADS: String(threads),
    TRANSFORMERS_VERBOSITY: 'error',
    HF_HUB_OFFLINE: '1',
    TOKENIZERS_PARALLELISM: 'false',
    PYTHONWARNINGS: 'ignore',
  });
}

export function startLimbeck(): Worker {
  const script = fileURLToPath(new URL('limbeck_peer.mjs', import.meta.url));
  return new Worker('limbeck', process.execPath, [script], {});
}
