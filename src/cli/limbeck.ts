// limbeck COMMAND: which command, its help, and the exit code

import { type CommandMeta, runCommand } from 'citty';
import { packageVersion } from '../tensor/version.ts';
import { nearest } from '../train/issues.ts';
import { bench } from './bench.ts';
import { chat } from './chat.ts';
import { type Command, command, exitCode, reportError, UsageError, usage } from './command.ts';
import { distill } from './distill.ts';
import { doctor } from './doctor.ts';
import { evaluate } from './evaluate.ts';
import { exportCommand } from './export.ts';
import { finetune } from './finetune.ts';
import { generate } from './generate.ts';
import { plan } from './plan.ts';
import { pretrain } from './pretrain.ts';
import { report } from './report.ts';
import { serve } from './serve.ts';
import { synth } from './synth.ts';
import { teach } from './teach.ts';

const commands: Readonly<Record<string, Command>> = {
  pretrain,
  teach,
  distill,
  finetune,
  evaluate,
  generate,
  chat,
  serve,
  export: exportCommand,
  synth,
  plan,
  report,
  doctor,
  bench,
};

const root = command({
  meta: { name: 'limbeck', version: packageVersion(), description: 'Pretrain, distil and finetune language models.' },
  subCommands: commands,
  examples: `
# can this machine train?
limbeck doctor
# does it fit, and how long will it take?
limbeck plan student.ts --device h100
# train a teacher, then a student that learns from it
limbeck pretrain teacher.ts
limbeck distill student.ts
# look at both, and let the student write
limbeck report runs/teacher runs/student
limbeck generate runs/student --prompt "Fellow citizens"
# talk to a model from a Hugging Face folder
limbeck chat models/smollm
`.trim(),
});

/** Runs a command line, says what went wrong, and returns the exit code. */
export async function limbeck(rawArgs: readonly string[]): Promise<number> {
  try {
    return await dispatch(rawArgs);
  } catch (error) {
    return reportError(error, { debug: rawArgs.includes('--debug'), json: rawArgs.includes('--json') });
  }
}

async function dispatch(rawArgs: readonly string[]): Promise<number> {
  const [name, ...rest] = rawArgs;
  if (name === undefined || name === '--help' || name === '-h' || name === 'help') {
    const topic = name === 'help' && rest[0] !== undefined ? commands[rest[0]] : undefined;
    process.stdout.write(topic ? usage(topic, 'limbeck') : usage(root));
    return name === undefined ? exitCode.usage : exitCode.ok;
  }
  if (name === '--version' || name === '-v') {
    process.stdout.write(`${packageVersion()}\n`);
    return exitCode.ok;
  }
  const chosen = Object.hasOwn(commands, name) ? commands[name] : undefined;
  if (!chosen) {
    const meant = nearest(name, Object.keys(commands));
    throw new UsageError(
      `unknown command "${name}"${meant ? `; did you mean ${meant}?` : `; there are ${Object.keys(commands).join(', ')}`}`,
    );
  }
  const inner = (chosen.subCommands ?? {}) as Readonly<Record<string, Command>>;
  if (Object.keys(inner).length > 0) return dispatchInner(chosen, inner, rest);
  return start(chosen, rest, 'limbeck');
}

/** `limbeck NAME STAGE`: a command that is several. */
async function dispatchInner(
  outer: Command,
  inner: Readonly<Record<string, Command>>,
  rawArgs: readonly string[],
): Promise<number> {
  const [name, ...rest] = rawArgs;
  if (name === undefined || name === '--help' || name === '-h') {
    process.stdout.write(usage(outer, 'limbeck'));
    return name === undefined ? exitCode.usage : exitCode.ok;
  }
  const chosen = Object.hasOwn(inner, name) ? inner[name] : undefined;
  if (chosen) return start(chosen, rest, `limbeck ${(outer.meta as CommandMeta).name}`);
  const meant = nearest(name, Object.keys(inner));
  throw new UsageError(
    `unknown command "${name}"${meant ? `; did you mean ${meant}?` : `; there are ${Object.keys(inner).join(', ')}`}`,
  );
}

async function start(chosen: Command, rest: readonly string[], parent: string): Promise<number> {
  const end = rest.indexOf('--');
  if ((end < 0 ? rest : rest.slice(0, end)).some((argument) => argument === '--help' || argument === '-h')) {
    process.stdout.write(usage(chosen, parent));
    return exitCode.ok;
  }
  await runCommand(chosen, { rawArgs: [...rest] });
  return exitCode.ok;
}
