// limbeck generate CHECKPOINT: text, token by token

import { command, commonArguments, Exit, exitCode, numberOption, UsageError } from './command.ts';
import { interruptible } from './interrupt.ts';
import { loadingOptions, samplingArguments, samplingOptions } from './sampling.ts';

export const generate = command({
  meta: { name: 'generate', description: 'Let a checkpoint continue a text.' },
  args: {
    checkpoint: {
      type: 'positional',
      required: true,
      description: 'Checkpoint folder, or the output folder of a run.',
      valueHint: 'folder',
    },
    prompt: {
      type: 'string',
      alias: 'p',
      description: 'Beginning of the text. Default: what comes in on standard input.',
      valueHint: 'text',
    },
    ...samplingArguments,
    'log-probs': {
      type: 'string',
      description: 'With --json: the n likeliest tokens at each place, with log-probabilities.',
      valueHint: 'n',
    },
    ...commonArguments,
  },
  examples: `
limbeck generate runs/student --prompt "Fellow citizens of the Senate"
# the likeliest continuation, from standard input
echo -n "My fellow Americans, the state of" | limbeck generate runs/student --temperature 0 --tokens 32
# one sentence, token by token with what else might have come
limbeck generate runs/student --prompt "The budget" --min-p 0.1 --stop "." --json --log-probs 3
`.trim(),
  async run({ args, rawArgs }) {
    const prompt = args.prompt ?? (process.stdin.isTTY ? undefined : await readAll(process.stdin));
    if (prompt === undefined) throw new UsageError('continue what? Give --prompt, or a text on standard input');
    const topLogProbs = numberOption('log-probs', args['log-probs'], 0, true);
    const options = { ...samplingOptions(args, rawArgs), ...(topLogProbs === undefined ? {} : { topLogProbs }) };
    const loading = loadingOptions(args);
    const { loadGenerator, streamText } = await import('../models/completion.ts');
    const { model, tokenizer, defaults } = await loadGenerator({ checkpoint: args.checkpoint, ...loading });
    const print = (event: object): void => void process.stdout.write(`${JSON.stringify(event)}\n`);
    try {
      const finish = await interruptible(
        async (signal) => {
          if (!args.json) process.stdout.write(prompt);
          for await (const piece of streamText(model, tokenizer, prompt, { ...defaults, ...options, signal })) {
            if (!args.json) process.stdout.write(piece.text);
            else if (piece.text !== '' || piece.tokens.length > 0)
              print({ type: 'text', text: piece.text, tokens: piece.tokens });
            if (piece.finish !== undefined) return piece.finish;
          }
          return 'aborted';
        },
        () => {},
      );
      if (args.json) print({ type: 'end', finish });
      else process.stdout.write('\n');
      if (finish === 'aborted') throw new Exit(exitCode.interrupted);
    } finally {
      model.dispose();
    }
  },
});

async function readAll(stream: AsyncIterable<Buffer | string>): Promise<string> {
  const parts: Buffer[] = [];
  for await (const part of stream) parts.push(Buffer.from(part));
  return Buffer.concat(parts).toString('utf8');
}
