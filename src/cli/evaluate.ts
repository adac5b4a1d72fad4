// limbeck evaluate CHECKPOINT: loss and perplexity on a text, and how close a student is to its teacher

import { evaluationText } from '../train/progress.ts';
import { command, commonArguments, Exit, exitCode, numberOption, UsageError } from './command.ts';
import { interruptible } from './interrupt.ts';
import { deviceOption, samplingArguments } from './sampling.ts';

export const evaluate = command({
  meta: { name: 'evaluate', description: 'Score a checkpoint on text: loss, perplexity, and closeness to a teacher.' },
  args: {
    checkpoint: {
      type: 'positional',
      required: true,
      description: 'Checkpoint folder, or the output folder of a run.',
      valueHint: 'folder',
    },
    text: { type: 'string', description: 'Plain text: a file, a folder or a glob.', valueHint: 'path' },
    jsonl: { type: 'string', description: 'JSON Lines: a file, a folder or a glob.', valueHint: 'path' },
    tokens: { type: 'string', description: 'A file of token ids.', valueHint: 'path' },
    field: { type: 'string', description: 'Field of a JSON line that holds the text. Default "text".', valueHint: 'name' },
    teacher: { type: 'string', description: 'Checkpoint to compare with: adds KL and top-1 agreement.', valueHint: 'folder' },
    length: { type: 'string', description: 'Tokens in a sequence. Default 256.', valueHint: 'n' },
    sequences: { type: 'string', description: 'Sequences in a batch. Default 8.', valueHint: 'n' },
    batches: { type: 'string', description: 'Batches to score. Default: all the text.', valueHint: 'n' },
    device: samplingArguments.device,
    threads: { type: 'string', description: 'Threads. Default: the cores of the machine.', valueHint: 'n' },
    ...commonArguments,
  },
  examples: `
limbeck evaluate runs/student --text held-out.txt
# how close is the student to its teacher?
limbeck evaluate runs/student --teacher runs/teacher --jsonl held-out.jsonl --field body
`.trim(),
  async run({ args }) {
    const sources = (['text', 'jsonl', 'tokens'] as const).filter((name) => args[name] !== undefined);
    if (sources.length !== 1) throw new UsageError('evaluate on what? Give one of --text, --jsonl and --tokens');
    const source = sources[0]!;
    const count = (name: 'length' | 'sequences' | 'batches' | 'threads', least = 1) => {
      const value = numberOption(name, args[name], least, true);
      return value === undefined ? {} : { [name]: value };
    };
    const device = deviceOption(args.device);
    const options = {
      checkpoint: args.checkpoint,
      data: { [source]: args[source], ...(args.field === undefined ? {} : { field: args.field }) },
      ...(args.teacher === undefined ? {} : { teacher: args.teacher }),
      ...count('length', 2),
      ...count('sequences'),
      ...count('batches'),
      ...count('threads'),
      ...(device === undefined ? {} : { device }),
    };
    const module = await import('../evaluate/evaluate.ts');
    const result = await interruptible(
      async (signal) => {
        try {
          return await module.evaluate({ ...options, signal });
        } catch (error) {
          if (error === signal.reason) throw new Exit(exitCode.interrupted);
          throw error;
        }
      },
      (signal) => process.stderr.write(`${signal}: stopping\n`),
    );
    process.stdout.write(
      args.json ? `${JSON.stringify({ type: 'evaluate', ...result })}\n` : `${evaluationText(result)}, ${result.tokens} tokens\n`,
    );
  },
});
