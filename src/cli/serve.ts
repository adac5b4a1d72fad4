// limbeck serve MODEL: a server of OpenAI's protocol

import { command, commonArguments, numberOption } from './command.ts';
import { interruptible } from './interrupt.ts';
import { modelArguments, modelSpec } from './synth.ts';

export const serve = command({
  meta: { name: 'serve', description: "Serve a model to clients of OpenAI's protocol." },
  args: {
    model: {
      type: 'positional',
      required: true,
      description: 'Folder of a model or a run, a .gguf file, or what else --provider takes in limbeck synth.',
      valueHint: 'model',
    },
    port: { type: 'string', alias: 'p', description: 'Port; 0 takes any free one. Default 8080.', valueHint: 'n' },
    host: { type: 'string', description: 'Address to listen at. Default 127.0.0.1, this machine only.', valueHint: 'address' },
    'client-key': { type: 'string', description: 'Key that clients must send. Default: none.', valueHint: 'text' },
    name: modelArguments['model-name'],
    template: modelArguments.template,
    concurrency: modelArguments.concurrency,
    threads: modelArguments.threads,
    ...commonArguments,
  },
  examples: `
limbeck serve runs/chat --port 8080
curl http://127.0.0.1:8080/v1/completions -H 'content-type: application/json' -d '{"prompt": "Fellow citizens", "max_tokens": 32}'
# a model without a chat template answers conversations in a style of ours
limbeck serve runs/student --template chatml
`.trim(),
  async run({ args }) {
    const { openProvider } = await import('../synth/providers/open.ts');
    const module = await import('../synth/serve.ts');
    const port = numberOption('port', args.port, 0, true, 65535);
    // A client sends the whole conversation with every turn.
    const provider = await openProvider({ ...modelSpec(args.model, { ...args, 'model-name': args.name }), reuse: true });
    try {
      const serving = await module.serve(provider, {
        ...(port === undefined ? {} : { port }),
        ...(args.host === undefined ? {} : { host: args.host }),
        ...(args['client-key'] === undefined ? {} : { key: args['client-key'] }),
        onRequest: ({ path, status, milliseconds }) => {
          if (args.json) process.stdout.write(`${JSON.stringify({ type: 'request', path, status, milliseconds })}\n`);
        },
      });
      try {
        process.stdout.write(
          args.json
            ? `${JSON.stringify({ type: 'serve', url: serving.url, model: provider.model })}\n`
            : `${provider.model} at ${serving.url}; Ctrl-C stops\n`,
        );
        await interruptible(
          (signal) => new Promise<void>((resolve) => signal.addEventListener('abort', () => resolve(), { once: true })),
          (signal) => process.stderr.write(`${signal}: closing\n`),
        );
      } finally {
        await serving.close();
      }
    } finally {
      await provider.dispose();
    }
  },
});
