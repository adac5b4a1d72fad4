// Chat templates: conversations to the text that a model was trained on, and which parts of it the assistant wrote.

import { readdir, readFile } from 'node:fs/promises';
import { createRequire } from 'node:module';
import { basename, join } from 'node:path';
import { checkText } from '../tensor/argument.ts';
import { ConfigError, DataError, FileError, FormatError } from '../tensor/errors.ts';
import { type AddedTokens, encodeEscaped, escapeSpecial } from './escape.ts';
import { joinIds } from './ids.ts';
import { chatStyles } from './styles.ts';
import type { Tokenizer } from './tokenizer.ts';

/** One turn of a conversation. Templates may read further fields (`tool_calls`, `name`, ...). */
export interface Message {
  /** `system`, `user`, `assistant`, or what else the template knows. */
  readonly role: string;
  readonly content: string;
  readonly [field: string]: unknown;
}

export interface RenderOptions {
  /** End with the beginning of an assistant's turn, for the model to go on. Default false. */
  readonly addGenerationPrompt?: boolean;
  /** Descriptions of tools, for templates that show them. */
  readonly tools?: readonly unknown[];
  /** Further variables of the template, such as `enable_thinking`. */
  readonly variables?: Readonly<Record<string, unknown>>;
}

export interface EncodeChatOptions extends RenderOptions {
  /**
   * Whether the text of a special token inside a message stands for the token. Default false: `<|im_end|>` that someone typed ends no turn.
   */
  readonly special?: boolean;
}

/** A rendered conversation. */
export interface RenderedChat {
  readonly text: string;
  /** Parts of `text` that the assistant wrote, end-of-turn text included: [from, to), rising. */
  readonly spans: readonly (readonly [from: number, to: number])[];
}

/** An encoded conversation. */
export interface EncodedChat {
  readonly ids: Int32Array;
  /** [T] 1 where the assistant wrote the token, 0 elsewhere. */
  readonly mask: Uint8Array;
}

/** A chat template, bound to the special tokens of a tokenizer. Immutable. */
export interface ChatTemplate {
  /** Name of a style, or where the template was found. */
  readonly name: string;
  /** The Jinja source. */
  readonly source: string;
  /** What ends a turn of the assistant, such as `<|im_end|>`; empty where the template writes nothing behind the text. */
  readonly turnEnd: string;
  /** The text of a conversation. @throws DataError `ERR_TEMPLATE` with the template's own message when it refuses */
  render(messages: readonly Message[], options?: RenderOptions): string;
  /**
   * The text and which parts of it the assistant wrote: between the template's `generation` tags, or, for a template without, what
   * each assistant message adds to the text before it.
   * @throws DataError `ERR_TEMPLATE`; `ERR_TEMPLATE_MASK` when a template without tags changes earlier text
   */
  renderSpans(messages: readonly Message[], options?: RenderOptions): RenderedChat;
  /** The text up to where the next user message would begin: what Magpie (arXiv:2406.08464) lets a model continue. */
  preQuery(before?: readonly Message[], options?: RenderOptions): string;
}

type Vocabulary = Pick<Tokenizer, 'bos' | 'eos' | 'pad' | 'unk' | 'token'>;

// Noncharacters of Unicode: no text that is meant to be read holds them.
const open = '\ufdd0';
const close = '\ufdd1';
const placeholder = '\ufdd2';

const usesTags = /\{%[-+]?\s*generation\s*[-+]?%\}/;

/**
 * A chat template from Jinja source, or from the name of a built-in style (`alpaca`, `chatml`, `gemma`, `llama3`, `mistral`, `phi3`,
 * `plain`).
 * @throws ConfigError for an unknown style; FormatError `ERR_TEMPLATE` for source that is no Jinja
 */
export function chatTemplate(styleOrSource: string, vocabulary: Vocabulary, name?: string): ChatTemplate {
  if (Object.hasOwn(chatStyles, styleOrSource))
    return compile(chatStyles[styleOrSource as keyof typeof chatStyles], vocabulary, styleOrSource);
  if (!styleOrSource.includes('{')) {
    const known = Object.keys(chatStyles).join(', ');
    throw new ConfigError(`chatTemplate: there is no style '${styleOrSource}'; known are ${known}, or give Jinja source`, {
      code: 'ERR_CONFIG',
      op: 'chatTemplate',
      argument: 'style',
      expected: known,
      actual: styleOrSource,
    });
  }
  return compile(styleOrSource, vocabulary, name ?? 'template');
}

/**
 * The chat template of a model folder: chat_template.jinja, or the `chat_template` of tokenizer_config.json, which may be a list of
 * named ones. That of a GGUF file comes with the tokenizer. Undefined where there is none.
 * @param folder also the path of a GGUF file, whose tokenizer `vocabulary` is
 * @param name which of several. Default: `default`.
 * @throws FormatError `ERR_TEMPLATE` for a template that cannot be read, or a name that is not there
 */
export async function loadChatTemplate(
  folder: string,
  vocabulary: Vocabulary & Partial<Pick<Tokenizer, 'file'>>,
  name?: string,
): Promise<ChatTemplate | undefined> {
  checkText('loadChatTemplate', 'folder', folder, 'the path of a model folder or a .gguf file');
  const inFile = folder.endsWith('.gguf');
  const named = inFile ? configured(vocabulary.file?.config.chat_template, folder) : await namedTemplates(folder);
  if (named.size === 0) return undefined;
  const chosen = named.get(name ?? 'default') ?? (name === undefined && named.size === 1 ? [...named.values()][0] : undefined);
  if (chosen === undefined) {
    throw new FormatError(
      `loadChatTemplate: ${folder} has no chat template named '${name ?? 'default'}'; it has ${[...named.keys()].join(', ')}`,
      {
        code: 'ERR_TEMPLATE',
        op: 'loadChatTemplate',
        argument: 'name',
        expected: [...named.keys()].join(', '),
        actual: name ?? 'default',
      },
    );
  }
  return compile(chosen.source, vocabulary, chosen.file);
}

/**
 * Encodes a conversation: special tokens as the template writes them, no other begin token, and none in what the messages and tools say
 * (roles aside). Where a text ends without an end token,
 * the tokenizer's is put behind it, and belongs to the assistant.
 * Each turn of the assistant begins with a token of its own, as it does when the model writes it after the prompt.
 * @param options with `addGenerationPrompt`, nothing is put behind the text.
 */
export function encodeChat(
  template: ChatTemplate,
  tokenizer: Tokenizer,
  messages: readonly Message[],
  options: EncodeChatOptions = {},
): EncodedChat {
  const { special = false, ...given } = options;
  const said = special ? messages : escapeMessages(tokenizer, messages);
  const rendering = special || given.tools === undefined ? given : { ...given, tools: escapeSpecial(tokenizer, given.tools) };
  if (options.addGenerationPrompt === true) {
    const ids = encodeEscaped(tokenizer, template.render(said, rendering));
    return { ids, mask: new Uint8Array(ids.length) };
  }
  const { text, spans } = template.renderSpans(said, rendering);
  const { ids, ends } = encodePieces(tokenizer, pieces(text, spans));
  const mask = new Uint8Array(ids.length);
  for (let s = 0; s < spans.length; s++) mask.fill(1, ends[2 * s], ends[2 * s + 1]);
  const last = spans.at(-1);
  const end = ends[2 * spans.length - 1];
  // A conversation that the user ends has nothing to close.
  if (last === undefined || tokenizer.eos === undefined || text.slice(last[1]).trim() !== '') return { ids, mask };
  if (endsInSpecial(tokenizer, ids.subarray(0, end))) return { ids, mask };
  const closed = { ids: new Int32Array(end! + 1), mask: new Uint8Array(end! + 1) };
  closed.ids.set(ids.subarray(0, end));
  closed.ids[end!] = tokenizer.eos;
  closed.mask.set(mask.subarray(0, end));
  closed.mask[end!] = 1;
  return closed;
}

/** Messages in which nothing but the role can make a special token of what a template writes. */
export function escapeMessages<M extends Message>(tokenizer: AddedTokens, messages: readonly M[]): M[] {
  return messages.map((message) => ({ ...escapeSpecial(tokenizer, message), role: message.role }));
}

/** The text cut where spans begin and end: 2 n + 1 pieces, some of them perhaps empty. */
function pieces(text: string, spans: RenderedChat['spans']): string[] {
  const cuts = [0, ...spans.flat(), text.length];
  return cuts.slice(1).map((to, i) => text.slice(cuts[i], to));
}

/**
 * Encodes text that comes in pieces. Where the ids of what came before are a beginning of the ids of it all, nothing is lost by the cut;
 * where a token would lie across, the earlier piece keeps its own tokens: those that a model sees when it is asked to go on.
 * @returns the ids, and how many of them there are after each piece.
 */
export function encodePieces(tokenizer: Tokenizer, parts: readonly string[]): { ids: Int32Array; ends: number[] } {
  const done: Int32Array[] = [];
  const ends: number[] = [];
  let settled = 0; // ids in `done`
  let text = ''; // of the pieces that are not in `done`
  let ids: Int32Array = new Int32Array(0);
  for (const part of parts) {
    if (part !== '') {
      const joint = encodeEscaped(tokenizer, text + part);
      if (isPrefix(ids, joint)) {
        text += part;
        ids = joint;
      } else {
        done.push(ids);
        settled += ids.length;
        text = part;
        ids = encodeEscaped(tokenizer, part);
      }
    }
    ends.push(settled + ids.length);
  }
  done.push(ids);
  return { ids: joinIds(done), ends };
}

function isPrefix(short: Int32Array, long: Int32Array): boolean {
  return short.length <= long.length && short.every((id, i) => id === long[i]);
}

function endsInSpecial(tokenizer: Tokenizer, ids: Int32Array): boolean {
  const last = ids.at(-1);
  return last !== undefined && (last === tokenizer.eos || tokenizer.decode([last], { skipSpecial: true }) === '');
}

function compile(source: string, vocabulary: Vocabulary, name: string): ChatTemplate {
  const tagged = usesTags.test(source);
  const run = program(tagged ? marked(source) : source, name);
  const text = (id: number | undefined): string => (id === undefined ? '' : (vocabulary.token(id) ?? ''));
  const tokens = {
    bos_token: text(vocabulary.bos),
    eos_token: text(vocabulary.eos),
    pad_token: text(vocabulary.pad),
    unk_token: text(vocabulary.unk),
  };
  const raw = (messages: readonly Message[], { addGenerationPrompt = false, tools, variables }: RenderOptions): string => {
    checkMessages(messages);
    // As Transformers does: what is not given is none, not undefined.
    const given = { messages, tools: tools ?? null, documents: null, add_generation_prompt: addGenerationPrompt };
    return run({ ...tokens, ...variables, ...given });
  };
  const render: ChatTemplate['render'] = (messages, options = {}) => {
    const out = raw(messages, options);
    return tagged ? out.replaceAll(open, '').replaceAll(close, '') : out;
  };
  const renderSpans: ChatTemplate['renderSpans'] = (messages, options = {}) =>
    tagged ? readMarks(raw(messages, options), name) : comparePrefixes(render, messages, options, name);
  const beforePlaceholder: ChatTemplate['preQuery'] = (before = [], options = {}) => {
    const out = render([...before, { role: 'user', content: placeholder }], { ...options, addGenerationPrompt: false });
    const at = out.lastIndexOf(placeholder);
    if (at >= 0) return out.slice(0, at);
    throw refuse(name, 'ERR_TEMPLATE', 'preQuery', 'it does not show what the user wrote');
  };
  let turnEnd: string | undefined;
  return {
    name,
    source,
    get turnEnd() {
      turnEnd ??= endOfTurn(render);
      return turnEnd;
    },
    render,
    renderSpans,
    preQuery: beforePlaceholder,
  };
}

/** Puts marks where the assistant's text begins and ends; `if` in place of `generation` keeps what the tags do to white space. */
function marked(source: string): string {
  return source.replace(
    /\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}/g,
    (_, left: string, end: string | undefined, right: string) =>
      `{%${left} if true %}${end === undefined ? open : close}{% endif ${right}%}`,
  );
}

/** Tags that mark what the assistant writes mean nothing outside of training, and other readers stumble over them. */
export function withoutGenerationTags(source: string): string {
  return source.replace(/\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}/g, (_, left, end, right) =>
    end ? `{%${left} endif ${right}%}` : `{%${left} if true ${right}%}`,
  );
}

function program(source: string, name: string): (variables: Record<string, unknown>) => string {
  // Loaded at first use: most programs never need it.
  const { Template } = createRequire(import.meta.url)('@huggingface/jinja') as typeof import('@huggingface/jinja');
  let template: InstanceType<typeof Template>;
  try {
    template = new Template(source);
  } catch (error) {
    throw new FormatError(`chatTemplate: ${name} is no valid Jinja: ${(error as Error).message}`, {
      code: 'ERR_TEMPLATE',
      op: 'chatTemplate',
      argument: name,
      cause: error,
    });
  }
  return (variables) => {
    try {
      return template.render(variables);
    } catch (error) {
      throw refuse(name, 'ERR_TEMPLATE', 'render', (error as Error).message, error);
    }
  };
}

function checkMessages(messages: readonly Message[]): void {
  for (const [i, message] of messages.entries()) {
    for (const field of ['role', 'content'] as const) {
      const value: unknown = message[field];
      // A message that only calls tools has no content.
      if (typeof value === 'string' || (field === 'content' && (value ?? null) === null && message.tool_calls !== undefined)) {
        const mark = typeof value === 'string' && (value.includes(open) || value.includes(close));
        if (!mark) continue;
      }
      throw new DataError(`render: messages[${i}].${field} is ${show(value)}; it should be a text without noncharacters`, {
        code: 'ERR_MESSAGE',
        op: 'render',
        argument: `messages[${i}].${field}`,
        expected: 'a text',
        actual: show(value),
      });
    }
  }
}

function readMarks(out: string, name: string): RenderedChat {
  let text = '';
  const spans: [number, number][] = [];
  let from: number | undefined;
  const unpaired = () => refuse(name, 'ERR_TEMPLATE_MASK', 'renderSpans', 'its generation tags do not come in pairs');
  for (const piece of out.split(/([\ufdd0\ufdd1])/)) {
    if (piece !== open && piece !== close) {
      text += piece;
      continue;
    }
    if ((piece === open) !== (from === undefined)) throw unpaired();
    if (from !== undefined && text.length > from) spans.push([from, text.length]);
    from = piece === open ? text.length : undefined;
  }
  if (from !== undefined) throw unpaired();
  return { text, spans };
}

/** What each message of the assistant adds to the text of the messages before it. */
function comparePrefixes(
  render: ChatTemplate['render'],
  messages: readonly Message[],
  options: RenderOptions,
  name: string,
): RenderedChat {
  const text = render(messages, options);
  const spans: [number, number][] = [];
  for (const [i, message] of messages.entries()) {
    if (message.role !== 'assistant') continue;
    const before = i === 0 ? '' : render(messages.slice(0, i), { ...options, addGenerationPrompt: true });
    const after =
      i === messages.length - 1 && !options.addGenerationPrompt
        ? text
        : render(messages.slice(0, i + 1), { ...options, addGenerationPrompt: false });
    if (!text.startsWith(before) || !text.startsWith(after) || !after.startsWith(before)) {
      throw refuse(
        name,
        'ERR_TEMPLATE_MASK',
        'renderSpans',
        `the text up to messages[${i}] is not the beginning of the text of all ${messages.length} messages, so the assistant's part cannot be told apart; mark it with {% generation %} tags, give conversations one answer each, or use a built-in style`,
      );
    }
    spans.push([before.length, withoutGap(after, before.length, message.content)]);
  }
  return { text, spans: spans.filter(([from, to]) => to > from) };
}

/** White space behind the text that ends a turn separates turns; it is not the assistant's. */
function withoutGap(after: string, from: number, content: string): number {
  const at = after.indexOf(content.trim(), from);
  const tail = at < 0 ? '' : after.slice(at + content.trim().length);
  return tail.trim() === '' ? after.length : after.trimEnd().length;
}

function endOfTurn(render: ChatTemplate['render']): string {
  const out = render([
    { role: 'user', content: 'x' },
    { role: 'assistant', content: placeholder },
  ]);
  return out.slice(out.lastIndexOf(placeholder) + 1).trim();
}

interface NamedTemplate {
  readonly source: string;
  readonly file: string;
}

/** The templates of a tokenizer_config.json, or of a file that has its fields. */
function configured(value: unknown, file: string): Map<string, NamedTemplate> {
  const found = new Map<string, NamedTemplate>();
  if (typeof value === 'string') found.set('default', { source: value, file });
  else if (Array.isArray(value)) {
    for (const [i, entry] of value.entries()) {
      const { name, template } = (entry ?? {}) as Record<string, unknown>;
      if (typeof name !== 'string' || typeof template !== 'string') {
        throw new FormatError(`loadChatTemplate: ${file}: chat_template[${i}] should be a name and a template`, {
          code: 'ERR_TEMPLATE',
          op: 'loadChatTemplate',
          argument: `chat_template[${i}]`,
          actual: show(entry),
        });
      }
      found.set(name, { source: template, file: `${file} (${name})` });
    }
  } else if ((value ?? null) !== null) {
    throw new FormatError(`loadChatTemplate: ${file}: chat_template is ${show(value)}; it should be a text or a list`, {
      code: 'ERR_TEMPLATE',
      op: 'loadChatTemplate',
      argument: 'chat_template',
      actual: show(value),
    });
  }
  return found;
}

/** Templates by name, and the file each comes from. */
async function namedTemplates(folder: string): Promise<Map<string, NamedTemplate>> {
  const config = join(folder, 'tokenizer_config.json');
  const text = await optional(config);
  const found = configured(text === undefined ? undefined : parse(text, config).chat_template, config);
  // Files of their own come before what the configuration says, as in Transformers.
  const own = join(folder, 'chat_template.jinja');
  const source = await optional(own);
  if (source !== undefined) found.set('default', { source, file: own });
  const more = join(folder, 'additional_chat_templates');
  for (const file of (await readdir(more).catch(() => [])).filter((name) => name.endsWith('.jinja')).sort()) {
    found.set(basename(file, '.jinja'), { source: (await optional(join(more, file)))!, file: join(more, file) });
  }
  return found;
}

async function optional(path: string): Promise<string | undefined> {
  try {
    return await readFile(path, 'utf8');
  } catch (error) {
    const { code, message } = error as NodeJS.ErrnoException;
    if (code === 'ENOENT' || code === 'ENOTDIR') return undefined;
    throw new FileError(`loadChatTemplate: cannot read ${path}: ${message}`, {
      code: 'ERR_READ',
      op: 'loadChatTemplate',
      argument: path,
      cause: error,
    });
  }
}

function parse(text: string, path: string): Record<string, unknown> {
  try {
    return (JSON.parse(text) ?? {}) as Record<string, unknown>;
  } catch (error) {
    throw new FormatError(`loadChatTemplate: ${path} is not JSON: ${(error as Error).message}`, {
      code: 'ERR_TEMPLATE',
      op: 'loadChatTemplate',
      argument: path,
      cause: error,
    });
  }
}

function refuse(name: string, code: string, op: string, why: string, cause?: unknown): DataError {
  return new DataError(`${op}: the chat template ${name} refuses this conversation: ${why}`, {
    code,
    op,
    argument: name,
    actual: why,
    cause,
  });
}

function show(value: unknown): string {
  const text = JSON.stringify(value) ?? String(value);
  return text.length > 60 ? `${text.slice(0, 57)}...` : text;
}
