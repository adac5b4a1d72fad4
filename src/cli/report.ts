// limbeck report FOLDER... : curves of several runs over each other

import { command, commonArguments } from './command.ts';

export const report = command({
  meta: { name: 'report', description: 'Write one HTML report of several runs.' },
  args: {
    folders: { type: 'positional', description: 'Output folders of runs.', valueHint: 'folder...' },
    out: { type: 'string', alias: 'o', default: 'report.html', description: 'File to write.', valueHint: 'file' },
    title: { type: 'string', description: 'Heading of the report.', valueHint: 'text' },
    ...commonArguments,
  },
  variadic: true,
  examples: `
# a teacher, and a student trained on text and on the teacher
limbeck report runs/teacher runs/scratch runs/distilled --out comparison.html
`.trim(),
  async run({ args }) {
    const { readRun, writeReport } = await import('../train/report.ts');
    const runs = await Promise.all(args._.map(readRun));
    await writeReport(args.out, runs, args.title === undefined ? {} : { title: args.title });
    process.stdout.write(
      args.json ? `${JSON.stringify({ type: 'report', path: args.out, runs: runs.map((run) => run.name) })}\n` : `${args.out}\n`,
    );
  },
});
