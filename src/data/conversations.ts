// Instruction data in the forms that people keep it in, as conversations. A row that cannot be used is counted and reported with file,
// line and field, and left out, unless asked otherwise.

import { DataError } from '../tensor/errors.ts';
import type { Message } from '../tokenizer/chat.ts';
import { type Fields, listField, ownField, RowError, textField } from './fields.ts';
import { type DataRecord, records } from './records.ts';
import type { Malformed } from './source.ts';

/**
 * `alpaca`: instruction, input, output. `sharegpt`: conversations of from, value. `messages`: messages of role, content. `prompt`: prompt,
 * completion.
 */
export type ConversationFormat = 'alpaca' | 'sharegpt' | 'messages' | 'prompt';

/** A conversation with at least one answer, the last message being one. */
export interface Conversation {
  readonly messages: readonly Message[];
  /** Descriptions of tools that came with it. */
  readonly tools?: readonly unknown[];
  readonly file: string;
  /** Line where it begins, from 1; in a Parquet file the number of the row. */
  readonly line: number;
}

export interface ConversationOptions {
  /** Default: told by the fields of each row. */
  readonly format?: ConversationFormat;
  /** Stop at the first row that cannot be used. Default false: it is reported and left out. */
  readonly strict?: boolean;
}

/**
 * Reads conversations from JSON Lines, JSON or Parquet.
 * Reading throws DataError `ERR_MALFORMED` naming file, line and field when `strict`; see {@link records} for the others.
 */
export async function* conversations(
  paths: string | readonly string[],
  options: ConversationOptions,
  onMalformed: (record: Malformed) => void,
): AsyncGenerator<Conversation> {
  const report = (record: Malformed): void => {
    if (options.strict === true) throw malformedError(record);
    onMalformed(record);
  };
  for await (const record of records(paths, report)) {
    const conversation = conversationOf(record, options.format, report);
    if (conversation !== undefined) yield conversation;
  }
}

/** @internal The conversation of a record, or undefined where it cannot be used, which is reported. */
export function conversationOf(
  record: DataRecord,
  format: ConversationFormat | undefined,
  report: (record: Malformed) => void,
): Conversation | undefined {
  const { file, line } = record;
  try {
    return { ...parseRow(record, format), file, line };
  } catch (error) {
    if (!(error instanceof RowError)) throw error;
    report({ file, line, reason: error.message, field: error.field });
    return undefined;
  }
}

export function malformedError({ file, line, reason, field }: Malformed): DataError {
  return new DataError(`data: ${file}, line ${line}: ${reason}`, {
    code: 'ERR_MALFORMED',
    op: 'data',
    argument: `${file}:${line}${field === undefined ? '' : `:${field}`}`,
    actual: reason,
  });
}

/** The fields that tell a format. */
const marks: readonly (readonly [field: string, format: ConversationFormat])[] = [
  ['messages', 'messages'],
  ['conversations', 'sharegpt'],
  ['instruction', 'alpaca'],
  ['prompt', 'prompt'],
];

function parseRow({ value }: DataRecord, named: ConversationFormat | undefined): Pick<Conversation, 'messages' | 'tools'> {
  const format = named ?? marks.find(([field]) => Object.hasOwn(value, field))?.[1];
  switch (format) {
    case undefined:
      throw new RowError('', `none of the fields ${marks.map(([field]) => `"${field}"`).join(', ')} is there`);
    case 'alpaca':
      return { messages: alpaca(value) };
    case 'prompt':
      return { messages: [turn('user', textField(value, 'prompt')), turn('assistant', answer(value, 'completion'))] };
    case 'messages':
      return withTools(
        value,
        checked(list(value, 'messages'), 'messages', 'content', (m, at) => role(m, at, 'role')),
      );
    case 'sharegpt':
      return withTools(value, sharegpt(value));
    default:
      return format satisfies never;
  }
}

function alpaca(value: DataRecord['value']): Message[] {
  const instruction = textField(value, 'instruction');
  if (instruction.trim() === '') throw new RowError('instruction', 'field "instruction" is empty');
  const input = (value.input ?? null) === null ? '' : textField(value, 'input');
  const output = answer(value, !Object.hasOwn(value, 'output') && Object.hasOwn(value, 'response') ? 'response' : 'output');
  const system = (value.system ?? '') === '' ? [] : [turn('system', textField(value, 'system'))];
  // Templates with a section for the input find it by itself; for the others it follows the instruction.
  const asked = input === '' ? turn('user', instruction) : { ...turn('user', `${instruction}\n\n${input}`), instruction, input };
  return [...system, asked, turn('assistant', output)];
}

/** Who ShareGPT's speakers are. */
const speakers: Readonly<Record<string, string>> = {
  human: 'user',
  user: 'user',
  gpt: 'assistant',
  chatgpt: 'assistant',
  assistant: 'assistant',
  model: 'assistant',
  bot: 'assistant',
  system: 'system',
  tool: 'tool',
  function: 'tool',
  observation: 'tool',
};

function sharegpt(value: DataRecord['value']): Message[] {
  const turns = list(value, 'conversations');
  // Some files have messages under this name.
  const style = turns.some((m) => Object.hasOwn(m, 'from')) || !turns.some((m) => Object.hasOwn(m, 'role'));
  if (!style) return checked(turns, 'conversations', 'content', (m, at) => role(m, at, 'role'));
  const given = (value.system ?? '') === '' ? [] : [turn('system', textField(value, 'system'))];
  return [
    ...given,
    ...checked(turns, 'conversations', 'value', (m, at) => {
      const from = role(m, at, 'from');
      const known = Object.hasOwn(speakers, from) ? speakers[from] : undefined;
      if (known === undefined)
        throw new RowError(`${at}.from`, `${at}.from is "${from}"; known are ${Object.keys(speakers).join(', ')}`);
      return known;
    }),
  ];
}

function withTools(value: DataRecord['value'], messages: Message[]): Pick<Conversation, 'messages' | 'tools'> {
  return Array.isArray(value.tools) && value.tools.length > 0 ? { messages, tools: value.tools } : { messages };
}

/** Turns of a list, in an order that a conversation can have, up to the last answer. */
function checked(turns: readonly Fields[], name: string, content: string, roleOf: (m: Fields, at: string) => string): Message[] {
  const messages: Message[] = turns.map((m, i) => {
    const at = `${name}[${i}]`;
    const role = roleOf(m, at);
    const calls = role === 'assistant' && Array.isArray(m.tool_calls) && m.tool_calls.length > 0;
    if (calls && (m[content] ?? null) === null) return { ...m, role, content: '' };
    const said = textField(m, content, at);
    if (role === 'assistant' && said.trim() === '' && !calls)
      throw new RowError(`${at}.${content}`, `${at}.${content} is an empty answer`);
    return content === 'content' ? { ...m, role, content: said } : { role, content: said };
  });
  const first = messages.findIndex((m) => m.role !== 'system');
  if (first >= 0 && messages[first]!.role !== 'user') {
    throw new RowError(
      `${name}[${first}]`,
      `${name}[${first}] is by the ${messages[first]!.role}; a conversation begins with the user`,
    );
  }
  const last = messages.findLastIndex((m) => m.role === 'assistant');
  if (last < 0) throw new RowError(name, `field "${name}" has no answer of the assistant`);
  return messages.slice(0, last + 1);
}

function turn(role: string, content: string): Message {
  return { role, content };
}

function answer(value: Fields, field: string): string {
  const found = textField(value, field);
  if (found.trim() === '') throw new RowError(field, `field "${field}" is an empty answer`);
  return found;
}

function role(m: Fields, at: string, field: string): string {
  const found = textField(m, field, at);
  if (found === '') throw new RowError(`${at}.${field}`, `field "${at}.${field}" is empty`);
  return found;
}

function list(value: Fields, field: string): readonly Fields[] {
  if (ownField(value, field) === undefined) throw new RowError(field, `field "${field}" is missing`);
  return listField(value, field, 'of messages');
}
