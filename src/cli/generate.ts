// limbeck generate CHECKPOINT: text, token by token

import { command, commonArguments, Exit, exitCode, numberOption, UsageError } from './command.ts';
import { interruptible } from './interrupt.ts';

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
    tokens: { type: 'string', alias: 'n', description: 'Most new tokens. Default 128.', valueHint: 'n' },
    temperature: { type: 'string', alias: 't', description: '0 takes the likeliest token. Default 0.8.', valueHint: 'x' },
    'top-k': { type: 'string', description: 'Draw from the k likeliest tokens only.', valueHint: 'k' },
    'top-p': {
      type: 'string',
      description: 'Draw from the likeliest tokens that hold this share of the probability.',
      valueHint: 'p',
    },
    seed: { type: 'string', description: 'Same seed, same text. Default 0.', valueHint: 'n' },
    threads: { type: 'string', description: 'Threads. Default: the cores of the machine.', valueHint: 'n' },
    ...commonArguments,
  },
  examples: `
limbeck generate runs/student --prompt "Fellow citizens of the Senate"
# the likeliest continuation, from standard input
echo -n "My fellow Americans, the state of" | limbeck generate runs/student --temperature 0 --tokens 32
`.trim(),
  async run({ args }) {
    const prompt = args.prompt ?? (process.stdin.isTTY ? undefined : await readAll(process.stdin));
    if (prompt === undefined) throw new UsageError('continue what? Give --prompt, or a text on standard input');
    const topP = numberOption('top-p', args['top-p'], 0);
    const topK = numberOption('top-k', args['top-k'], 1, true);
    const threads = numberOption('threads', args.threads, 1, true);
    const options = {
      checkpoint: args.checkpoint,
      prompt,
      tokens: numberOption('tokens', args.tokens, 1, true) ?? 128,
      temperature: numberOption('temperature', args.temperature, 0) ?? 0.8,
      seed: numberOption('seed', args.seed, 0, true) ?? 0,
      ...(topK === undefined ? {} : { topK }),
      ...(topP === undefined ? {} : { topP }),
      ...(threads === undefined ? {} : { threads }),
    };
    const module = await import('../models/generate.ts');
    let stopped = false;
    if (!args.json) process.stdout.write(prompt);
    await interruptible(
      async (signal) => {
        try {
          for await (const text of module.generate({ ...options, signal })) {
            process.stdout.write(args.json ? `${JSON.stringify({ type: 'text', text })}\n` : text);
          }
        } catch (error) {
          if (error !== signal.reason) throw error;
        }
        stopped = signal.aborted;
      },
      () => {},
    );
    if (!args.json) process.stdout.write('\n');
    if (stopped) throw new Exit(exitCode.interrupted);
  },
});

async function readAll(stream: AsyncIterable<Buffer | string>): Promise<string> {
  const parts: Buffer[] = [];
  for await (const part of stream) parts.push(Buffer.from(part));
  return Buffer.concat(parts).toString('utf8');
}
