// limbeck teach RUN: the teacher of a distillation run reads its data once

import type { ArgsDef } from 'citty';
import { bytes, count } from '../train/format.ts';
import {
  allValues,
  command,
  commonArguments,
  Exit,
  exitCode,
  numberOption,
  parseOverrides,
  runArguments,
  UsageError,
} from './command.ts';
import { interruptible } from './interrupt.ts';

const teachArguments = {
  ...runArguments,
  'top-k': { type: 'string', description: 'Tokens that are kept of each distribution. Default 64.', valueHint: 'k' },
  out: { type: 'string', alias: 'o', description: 'Folder to write. Default: the run’s teacher.cache.', valueHint: 'folder' },
  ...commonArguments,
} as const satisfies ArgsDef;

export const teach = command({
  meta: { name: 'teach', description: 'Cache what a teacher finds likely in the data of a distillation run.' },
  args: teachArguments,
  examples: `
# once, with the teacher in memory; a call that was stopped goes on
limbeck teach student.ts --out runs/taught
# then as many students as wanted, without it
limbeck distill student.ts --set teacher.cache=runs/taught
`.trim(),
  async run({ args, rawArgs }) {
    if (args.run === undefined) throw new UsageError('which run? Give the path of a run file');
    const topK = numberOption('top-k', args['top-k'], 1, true);
    const { loadRun } = await import('../train/config.ts');
    const { cacheTeacher } = await import('../distill/teach.ts');
    const { resolve } = await import('node:path');
    const out = args.out === undefined ? {} : { 'teacher.cache': resolve(args.out) };
    const run = await loadRun(args.run, { ...parseOverrides(allValues(rawArgs, teachArguments, 'set')), ...out });
    if (run.kind !== 'distill') throw new UsageError(`${args.run}: kind is "${run.kind}"; only a distillation run has a teacher`);
    const live = process.stderr.isTTY === true && !args.json;
    const made = await interruptible(
      async (signal) => {
        try {
          return await cacheTeacher(run, {
            ...(topK === undefined ? {} : { topK }),
            signal,
            onProgress({ tokens, total }) {
              if (args.json) process.stdout.write(`${JSON.stringify({ type: 'progress', tokens, total })}\n`);
              else if (live) process.stderr.write(`\r${count(tokens)} of ${count(total)} tokens\x1b[K`);
            },
          });
        } catch (error) {
          if (error === signal.reason) throw new Exit(exitCode.interrupted);
          throw error;
        } finally {
          if (live) process.stderr.write('\r\x1b[K');
        }
      },
      (signal) => process.stderr.write(`${signal}: stopping; the next call goes on after the last file that is complete\n`),
    );
    process.stdout.write(
      args.json
        ? `${JSON.stringify({ type: 'teach', ...made })}\n`
        : `${made.folder}: ${count(made.tokens)} tokens in ${bytes(made.bytes)}\n`,
    );
  },
});
