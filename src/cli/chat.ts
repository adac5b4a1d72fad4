// limbeck chat CHECKPOINT: a conversation in the terminal

import { createInterface, type Interface } from 'node:readline';
import { styleText } from 'node:util';
import { writeAtomic } from '../io/atomic.ts';
import type { Generator, TextOptions } from '../models/completion.ts';
import { LimbeckError } from '../tensor/errors.ts';
import type { ChatTemplate, Message } from '../tokenizer/chat.ts';
import { wantsColor } from '../train/progress.ts';
import { command, commonArguments, UsageError } from './command.ts';
import { loadingOptions, samplingArguments, samplingOptions } from './sampling.ts';

const commands = `
/reset          begin a new conversation
/system TEXT    tell the model how to behave, from the next answer on; without TEXT, nothing
/save FILE      write the conversation as a line of JSON Lines, ready to finetune on
/help           show this
/exit           leave; so do Ctrl-D, and Ctrl-C twice. Once, it stops the answer
`.trim();

export const chat = command({
  meta: { name: 'chat', description: 'Talk to a checkpoint.' },
  args: {
    checkpoint: {
      type: 'positional',
      required: true,
      description: 'Checkpoint folder, or the output folder of a run.',
      valueHint: 'folder',
    },
    system: { type: 'string', description: 'How the model is to behave: the first message.', valueHint: 'text' },
    template: {
      type: 'string',
      description: 'Style of the conversation: chatml, llama3, gemma, ... Default: the chat template of the model.',
      valueHint: 'style',
    },
    ...samplingArguments,
    tokens: { ...samplingArguments.tokens, description: 'Most new tokens of an answer. Default 512.' },
    ...commonArguments,
  },
  examples: `
limbeck chat models/smollm --system "Answer in one sentence."
# a base model has no template of its own
limbeck chat runs/student --template alpaca --temperature 0.7
# questions from a file, one a line, in one conversation; answers on standard output
limbeck chat models/smollm --temperature 0 < questions.txt
# While talking:
${commands}
`.trim(),
  async run({ args, rawArgs }) {
    const options = samplingOptions(args, rawArgs);
    const loading = loadingOptions(args);
    const { chatTemplate, createPrefixCache, loadChatTemplate, loadGenerator, resolveCheckpoint } = await load();
    const folder = await resolveCheckpoint(args.checkpoint);
    const generator = await loadGenerator({ checkpoint: folder, ...loading });
    // The next turn's prompt begins with the text of this one.
    const cache = createPrefixCache();
    try {
      const { tokenizer, defaults } = generator;
      const template =
        args.template === undefined ? await loadChatTemplate(folder, tokenizer) : chatTemplate(args.template, tokenizer);
      if (template === undefined) {
        throw new UsageError(`${folder} has no chat template; name a style with --template, such as --template chatml`);
      }
      await converse(generator, template, { tokens: 512, ...defaults, ...options, cache }, args.system, args.json === true);
    } finally {
      cache.dispose();
      generator.model.dispose();
    }
  },
});

async function load() {
  const completion = await import('../models/completion.ts');
  const folder = await import('../models/folder.ts');
  const prefix = await import('../models/prefix.ts');
  const chat = await import('../tokenizer/chat.ts');
  return { ...completion, ...folder, ...prefix, ...chat };
}

/** Reads lines and answers them until the input ends. */
async function converse(
  generator: Generator,
  template: ChatTemplate,
  options: TextOptions,
  system: string | undefined,
  json: boolean,
): Promise<void> {
  const atTerminal = process.stdin.isTTY === true && process.stdout.isTTY === true && !json;
  const say = (event: { type: string; [field: string]: unknown }, text: string): void => {
    process.stdout.write(json ? `${JSON.stringify(event)}\n` : text);
  };
  const note = (text: string): void => {
    if (json) process.stdout.write(`${JSON.stringify({ type: 'note', text })}\n`);
    else process.stderr.write(`${wantsColor(process.stderr) ? styleText('gray', text) : text}\n`);
  };
  const dialogue = { system: system === undefined ? [] : [turn('system', system)], turns: [] as Message[] };
  const input = createInterface({ input: process.stdin, ...(atTerminal ? { output: process.stdout, prompt: '> ' } : {}) });
  const interrupts = listen(input, () => note('(Ctrl-C again leaves)'));
  if (atTerminal) note(`${template.name}. /help tells what else you can type.`);
  const prompt = (): void => {
    if (atTerminal) input.prompt();
  };
  try {
    prompt();
    for await (const line of input) {
      const [, name, rest = ''] = /^\/(\S*)\s*(.*)$/.exec(line) ?? [];
      if (name === 'exit') break;
      try {
        if (name !== undefined) await obey(name, rest, dialogue, note);
        else if (line.trim() !== '') {
          const signal = interrupts.begin();
          const asked = turn('user', line);
          const answer = await reply(
            generator,
            template,
            [...dialogue.system, ...dialogue.turns, asked],
            { ...options, signal },
            say,
          );
          dialogue.turns.push(asked, turn('assistant', answer));
        }
      } catch (error) {
        // Too long a conversation or a template that refuses: the person may go on.
        if (!atTerminal || !LimbeckError.is(error)) throw error;
        note(`${error.code}: ${error.message}${error.code === 'ERR_CONTEXT' ? ' (/reset begins anew)' : ''}`);
      } finally {
        interrupts.end();
      }
      if (interrupts.left()) break;
      prompt();
    }
  } finally {
    input.close();
    interrupts.dispose();
  }
}

function turn(role: string, content: string): Message {
  return { role, content };
}

async function obey(
  name: string,
  rest: string,
  dialogue: { system: Message[]; turns: Message[] },
  note: (text: string) => void,
): Promise<void> {
  if (name === 'reset') {
    dialogue.turns = [];
    note('A new conversation.');
  } else if (name === 'system') {
    dialogue.system = rest === '' ? [] : [turn('system', rest)];
    note(rest === '' ? 'No system message.' : 'From the next answer on.');
  } else if (name === 'save') {
    if (rest === '') return note('Save where? /save FILE');
    const text = `${JSON.stringify({ messages: [...dialogue.system, ...dialogue.turns] })}\n`;
    await writeAtomic(rest, async (file) => {
      await file.write(text);
    });
    note(`${rest}: ${dialogue.turns.length} turns`);
  } else note(name === 'help' ? commands : `There is no /${name}.\n${commands}`);
}

/** One answer, printed as it comes. */
async function reply(
  { model, tokenizer }: Generator,
  template: ChatTemplate,
  messages: readonly Message[],
  options: TextOptions,
  say: (event: { type: string; [field: string]: unknown }, text: string) => void,
): Promise<string> {
  const { streamText, encodeChat } = await load();
  const { ids } = encodeChat(template, tokenizer, messages, { addGenerationPrompt: true });
  const end = template.turnEnd.trim();
  const endId = end === '' ? undefined : tokenizer.id(end);
  const stops = typeof options.stop === 'string' ? [options.stop] : (options.stop ?? []);
  const ends = {
    stopIds: [...(options.stopIds ?? []), ...(endId === undefined ? [] : [endId])],
    stop: [...stops, ...(end !== '' && endId === undefined ? [end] : [])],
  };
  let answer = '';
  let tokens = 0;
  for await (const piece of streamText(model, tokenizer, ids, { ...options, ...ends })) {
    // A template puts its own white space around an answer.
    const text = answer === '' ? piece.text.trimStart() : piece.text;
    answer += text;
    tokens += piece.tokens.length;
    if (text !== '') say({ type: 'text', text }, text);
    if (piece.finish !== undefined) say({ type: 'end', finish: piece.finish, tokens }, '\n');
  }
  return answer.trimEnd();
}

/** Ctrl-C: during an answer it stops it; otherwise, and the second time, it leaves. */
function listen(input: Interface, warn: () => void) {
  let answer: AbortController | undefined;
  let warned = false;
  let left = false;
  const stop = (): void => {
    if (answer?.signal.aborted === false) {
      answer.abort();
      return;
    }
    if (answer === undefined && !warned) {
      warned = true;
      warn();
      if (process.stdin.isTTY) input.prompt();
      return;
    }
    left = true;
    input.close();
  };
  // In a terminal readline sees the key; without one the system sends the signal.
  input.on('SIGINT', stop);
  process.on('SIGINT', stop);
  return {
    begin(): AbortSignal {
      warned = false;
      answer = new AbortController();
      return answer.signal;
    },
    end(): void {
      answer = undefined;
    },
    left: () => left,
    dispose: () => void process.off('SIGINT', stop),
  };
}
