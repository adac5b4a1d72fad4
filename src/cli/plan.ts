// limbeck plan RUN

import { styleText } from 'node:util';
import type { ArgsDef } from 'citty';
import type { Plan } from '../plan/plan.ts';
import { bytes, count, duration } from '../train/format.ts';
import { wantsColor } from '../train/progress.ts';
import { allValues, command, commonArguments, parseOverrides, runArguments, UsageError } from './command.ts';

const planArguments = {
  ...runArguments,
  device: {
    type: 'string',
    description:
      'cpu, cuda, or a GPU that need not be here: h100, h200, a100-80gb, a100-40gb, l40s, rtx-4090, rtx-3090. Default: the run’s.',
    valueHint: 'name',
  },
  teacher: { type: 'string', description: 'A preset to plan with while the teacher does not exist yet.', valueHint: 'preset' },
  ...commonArguments,
} as const satisfies ArgsDef;

export const plan = command({
  meta: { name: 'plan', description: 'Say what a run takes, and what would make it fit, before anything is allocated.' },
  args: planArguments,
  examples: `
# memory, and seconds a step at the roofline, on the run's own device
limbeck plan student.ts
# would it fit on an H100, with a teacher that is not trained yet?
limbeck plan student.ts --device h100 --teacher gemma2-27b
# and with longer sequences?
limbeck plan student.ts --device h100 --set batch.length=8192
`.trim(),
  async run({ args, rawArgs }) {
    if (args.run === undefined) throw new UsageError('which run? Give the path of a run file');
    const { loadRun } = await import('../train/config.ts');
    const { plan: makePlan } = await import('../plan/plan.ts');
    const run = await loadRun(args.run, parseOverrides(allValues(rawArgs, planArguments, 'set')));
    const made = await makePlan(run, {
      ...(args.device === undefined ? {} : { device: args.device }),
      ...(args.teacher === undefined ? {} : { teacher: args.teacher }),
    });
    process.stdout.write(args.json ? `${JSON.stringify(made)}\n` : render(made));
  },
});

const BAR = 30;

function render(p: Plan): string {
  const color = wantsColor(process.stdout);
  const paint = (style: Parameters<typeof styleText>[0], text: string): string => (color ? styleText(style, text) : text);
  const room = p.device.memory;
  const bar = (size: number): string => '█'.repeat(Math.min(BAR, Math.round((size / Math.max(room, p.memory.total)) * BAR)));
  const parts = [
    ...(p.parameters.teacher === undefined
      ? []
      : [[`teacher, ${count(p.parameters.teacher)} parameters`, p.memory.teacher] as const]),
    [`student, ${count(p.parameters.student)} parameters`, p.memory.student] as const,
    ['optimizer', p.memory.optimizer] as const,
    ['activations and gradients', p.memory.activations] as const,
    ['loss head', p.memory.loss] as const,
    ['together', p.memory.total] as const,
  ];
  const width = Math.max(...parts.map(([name]) => name.length));
  const lines = parts.map(([name, size]) => `  ${name.padEnd(width)}  ${bytes(size).padStart(9)}  ${paint('cyan', bar(size))}`);
  const verdict = p.fits
    ? paint('green', `fits in the ${bytes(room)} of ${p.device.name}`)
    : paint('red', `does not fit in the ${bytes(room)} of ${p.device.name}`);
  const slow = p.step.ops.slice(0, 5).map(({ op, seconds }) => `${op} ${Math.round((100 * seconds) / p.step.seconds)} %`);
  const time = `${count(p.step.tokens)} tokens a step in ${seconds(p.step.seconds)} or more: at most ${count(p.step.tokensPerSecond)} tokens/s (${slow.join(', ')})`;
  const advice = p.advice.map(
    (a) =>
      `  ${a.fits ? paint('green', '✓') : paint('gray', '·')} ${bytes(a.total).padStart(9)}, ${seconds(a.seconds)} a step: ${a.change}`,
  );
  return `${paint('bold', 'Memory of tensors')}\n${lines.join('\n')}\n  ${verdict}\n\n${paint('bold', 'Time')}\n  ${time}\n${
    advice.length === 0 ? '' : `\n${paint('bold', 'What would save memory')}\n${advice.join('\n')}\n`
  }`;
}

function seconds(value: number): string {
  return value < 1 ? `${(value * 1000).toPrecision(3)} ms` : duration(value);
}
