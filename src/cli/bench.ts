// limbeck bench: the benchmarks of a source checkout

import { spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { DeviceError } from '../tensor/errors.ts';
import { command, commonArguments, Exit } from './command.ts';

export const bench = command({
  meta: { name: 'bench', description: 'Time every op: GFLOP/s or GB/s, and the share of what this machine can do.' },
  args: {
    filter: { type: 'string', description: 'Only ops whose name contains this.', valueHint: 'text' },
    rounds: { type: 'string', description: 'Timed rounds, of which the median is shown. Default 7.', valueHint: 'n' },
    threads: { type: 'string', description: 'Threads. Default: the cores of the machine.', valueHint: 'n' },
    save: { type: 'boolean', description: 'Append to bench/results.csv.' },
    ...commonArguments,
  },
  examples: `
limbeck bench
limbeck bench --filter attention --json
`.trim(),
  async run({ rawArgs }) {
    const root = fileURLToPath(new URL('../..', import.meta.url));
    const script = join(root, 'bench', 'ops.ts');
    if (!existsSync(script)) {
      throw new DeviceError(
        `bench: ${script} is missing: benchmarks come with a source checkout of limbeck, not with the package`,
        {
          code: 'ERR_BENCH_MISSING',
          op: 'bench',
          argument: script,
        },
      );
    }
    const child = spawn(
      process.execPath,
      ['--import', 'jiti/register', script, ...rawArgs.filter((argument) => argument !== '--debug')],
      { stdio: 'inherit', cwd: root },
    );
    const code = await new Promise<number>((resolve, reject) => {
      child.on('error', reject);
      child.on('exit', (status, signal) => resolve(status ?? (signal === 'SIGINT' ? 130 : 1)));
    });
    if (code !== 0) throw new Exit(code);
  },
});
