// `limbeck pretrain` and `limbeck distill`: the same command around two loops.

import type { ArgsDef } from 'citty';
import { ConfigError, OutOfMemoryError } from '../tensor/errors.ts';
import type { RunConfig } from '../train/config.ts';
import type { TrainEvent } from '../train/events.ts';
import {
  allValues,
  type Command,
  command,
  commonArguments,
  Exit,
  exitCode,
  parseOverrides,
  runArguments,
  UsageError,
} from './command.ts';
import { interruptible } from './interrupt.ts';

type Loop = (run: RunConfig, options: { signal: AbortSignal }) => AsyncIterable<TrainEvent>;

const trainArguments = {
  ...runArguments,
  'dry-run': { type: 'boolean', description: 'Check the run, print it with all defaults, and stop.' },
  fields: { type: 'boolean', description: 'List every field of a run file with its meaning and default, and stop.' },
  schema: { type: 'boolean', description: 'Print the JSON Schema of run files, for editors, and stop.' },
  ...commonArguments,
} as const satisfies ArgsDef;

/** Makes the command of a loop. */
export function trainCommand(kind: RunConfig['kind'], description: string, examples: string, load: () => Promise<Loop>): Command {
  return command({
    meta: { name: kind, description },
    args: trainArguments,
    examples,
    async run({ args, rawArgs }) {
      const { loadRun, runFields, runJsonSchema } = await import('../train/config.ts');
      if (args.schema) {
        process.stdout.write(`${JSON.stringify(runJsonSchema(), null, 2)}\n`);
        return;
      }
      if (args.fields) {
        const width = Math.max(...runFields(kind).map(({ field }) => field.length));
        process.stdout.write(
          runFields(kind)
            .map(({ field, about }) => `${field.padEnd(width)}  ${about}\n`)
            .join(''),
        );
        return;
      }
      if (args.run === undefined) throw new UsageError('which run? Give the path of a run file');
      const run = await loadRun(args.run, parseOverrides(allValues(rawArgs, trainArguments, 'set')));
      if (run.kind !== kind) {
        throw new ConfigError(`${args.run}: kind is "${run.kind}"; use \`limbeck ${run.kind} ${args.run}\``, {
          code: 'ERR_CONFIG',
          op: kind,
          argument: 'kind',
          expected: kind,
          actual: run.kind,
        });
      }
      if (args['dry-run']) process.stdout.write(`${JSON.stringify(run, null, 2)}\n`);
      else await train(run, await load(), args.json === true);
    },
  });
}

async function train(run: RunConfig, loop: Loop, json: boolean): Promise<void> {
  const { record } = await import('../train/record.ts');
  const { createProgress } = await import('../train/progress.ts');
  const progress = createProgress(process.stderr);
  if (!json) progress.wait('reading tokenizer and data …');
  const reason = await interruptible(
    async (signal) => {
      let last: TrainEvent | undefined;
      try {
        for await (const event of record(run, loop(run, { signal }))) {
          if (json) process.stdout.write(`${JSON.stringify(event)}\n`);
          else progress.show(event);
          last = event;
        }
      } catch (error) {
        if (error instanceof OutOfMemoryError) throw await (await import('../plan/advice.ts')).withAdvice(error, run);
        if (error !== signal.reason) throw error;
      } finally {
        progress.clear();
      }
      return signal.aborted ? 'aborted' : last?.type === 'done' ? last.reason : 'finished';
    },
    (signal) =>
      progress.note(`${signal}: stopping after this step, and saving; once more stops at once, and saved checkpoints stay`),
  );
  if (reason === 'aborted') throw new Exit(exitCode.interrupted);
  if (!json && run.log.report) progress.note(`report ${run.output}/report.html`);
}
