// What an aligned model sees before a user's text, by family (Magpie, arXiv:2406.08464, and its configurations). A begin token is part
// of the string, so nothing may put another before it.

import { ConfigError } from '../../tensor/errors.ts';
import type { ChatTemplate, Message } from '../../tokenizer/chat.ts';

/** How a family is made to write a user's text. */
export interface PreQuery {
  readonly name: string;
  /** Prompt that the model continues with a user's text. */
  readonly text: string;
  /** Texts that end it: special tokens as text, and headers that a model writes as plain text. */
  readonly stop: readonly string[];
  /** Ids of the family's tokenizer that end it. */
  readonly stopIds: readonly number[];
  /** The prompt after `messages`: a system prompt, or turns that came before. Absent: the family takes none without its template. */
  readonly after?: (messages: readonly Message[]) => string;
}

interface Family extends Omit<PreQuery, 'name' | 'after'> {
  readonly models: RegExp;
}

const chatml = ['<|im_end|>', '<|im_start|>', '<|endoftext|>'];
const llama2Ids = [2, 1, 0];
const phi3Stops = ['<|end|>', '<|assistant|>', '<|user|>', '<|system|>', '<|endoftext|>'];
const bos = '<｜begin▁of▁sentence｜>';
const vicuna =
  "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions.";

/** The families by name; `models` matches the names of their models on the hub and in servers. */
export const preQueryFamilies = {
  llama3: {
    models: /llama-?3(?!\d)/i,
    text: '<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n',
    stop: ['<|eot_id|>', '<|end_of_text|>', '<|start_header_id|>', '<|end_header_id|>'],
    stopIds: [128009, 128001, 128006, 128007],
  },
  'qwen2.5': {
    models: /qwen-?2\.5/i,
    text: '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n<|im_start|>user\n',
    stop: chatml,
    stopIds: [151643, 151644, 151645],
  },
  qwen2: {
    models: /qwen-?(?:2(?!\.)|1\.5)/i,
    text: '<|im_start|>user\n',
    stop: chatml,
    stopIds: [151643, 151644, 151645],
  },
  // Two line breaks, where the chat template has one: with one, the model begins its text with the other.
  gemma2: {
    models: /gemma-?2/i,
    text: '<bos><start_of_turn>user\n\n',
    stop: ['<end_of_turn>', '<start_of_turn>', '<eos>'],
    stopIds: [1, 2, 107],
  },
  gemma: {
    models: /gemma-?(?:1\.1|7b)/i,
    text: '<bos><start_of_turn>user\n',
    stop: ['<end_of_turn>', '<start_of_turn>', '<eos>'],
    stopIds: [1, 2, 106, 107],
  },
  'phi3-small': {
    models: /phi-?3-small/i,
    text: '<|endoftext|><|user|>\n',
    stop: phi3Stops,
    stopIds: [100257, 100262, 100263, 100261, 100266],
  },
  phi3: {
    models: /phi-?3/i,
    text: '<s> <|user|>\n',
    stop: phi3Stops,
    stopIds: [2, 1, 0, 32000, 32001, 32006, 32007, 32010],
  },
  mistral: {
    models: /mistral/i,
    text: '<s> [INST] ',
    stop: ['</s>', '[INST]', '[/INST]'],
    stopIds: [1, 2, 3, 4],
  },
  hermes: {
    models: /hermes-llama-?2/i,
    text: '### Instruction:\n\n',
    stop: ['</s>', '### Response:', '### Instruction:'],
    stopIds: llama2Ids,
  },
  llama2: {
    models: /llama-?2(?!\d)/i,
    text: '<s> [INST] ',
    stop: ['</s>', '[INST]', '[/INST]'],
    stopIds: llama2Ids,
  },
  yi: {
    models: /\byi-?1\.5/i,
    text: '<|startoftext|><|im_start|>user\n',
    stop: chatml,
    stopIds: [1, 2, 7],
  },
  vicuna: {
    models: /vicuna/i,
    text: `${vicuna}\n\nUSER: `,
    stop: ['</s>', 'ASSISTANT:', 'USER:'],
    stopIds: llama2Ids,
  },
  'deepseek-coder': {
    models: /deepseek-coder/i,
    text: `${bos}User: `,
    stop: ['<｜end▁of▁sentence｜>', '\n\nAssistant:', '\n\nUser:'],
    stopIds: [100000, 100001, 100008, 100006, 100007],
  },
} as const satisfies Record<string, Family>;

export type PreQueryFamily = keyof typeof preQueryFamilies;

/** The pre-query of a family, or of the family that a model's name belongs to. @throws ConfigError `ERR_CONFIG` */
export function preQueryOf(familyOrModel: string): PreQuery {
  const known = Object.entries(preQueryFamilies) as [PreQueryFamily, Family][];
  const found = known.find(([name]) => name === familyOrModel) ?? known.find(([, { models }]) => models.test(familyOrModel));
  if (found !== undefined) {
    const [name, { text, stop, stopIds }] = found;
    return { name, text, stop, stopIds };
  }
  const names = Object.keys(preQueryFamilies).join(', ');
  throw new ConfigError(
    `magpie: no pre-query template is known for '${familyOrModel}'; known families are ${names}. Give the model's chat template instead`,
    { code: 'ERR_CONFIG', op: 'magpie', argument: 'template', expected: names, actual: familyOrModel },
  );
}

/**
 * The pre-query of any model with a chat template: the template's text up to where the user's begins. It ends where the template
 * goes on behind a user's text.
 * @throws DataError `ERR_TEMPLATE` when the template hides the user's text
 */
export function preQueryFromTemplate(template: ChatTemplate): PreQuery {
  const mark = '\u{1f9ea}x';
  const whole = template.render([{ role: 'user', content: mark }], { addGenerationPrompt: true });
  const behind = whole.slice(whole.indexOf(mark) + mark.length);
  const stops = new Set([
    template.turnEnd,
    ...(behind.match(/<\|?[^<>|\s]+\|?>|\[\/?[A-Z]+\]|#+ ?\w+:|\b[A-Z][a-zA-Z]+:/g) ?? []),
  ]);
  return {
    name: template.name,
    text: template.preQuery(),
    stop: [...stops].filter((text) => text.trim() !== ''),
    stopIds: [],
    after: (messages) => template.preQuery(messages),
  };
}
