// Magpie (arXiv:2406.08464): an aligned model that is shown only what comes before a user's text writes the user's text itself, and is
// then asked to answer it.

import { ConfigError } from '../../tensor/errors.ts';
import type { ChatTemplate } from '../../tokenizer/chat.ts';
import { numbers, type Pipeline, pipeline, type RecordStage } from '../pipeline.ts';
import { type ChatMessage, checkAbilities, type Provider, type Sampling, unable } from '../provider.ts';
import type { InstructionRecord } from '../record.ts';
import { hasHeader, repeats, type SanitizeOptions, sanitize } from './sanitize.ts';
import { type PreQuery, preQueryFromTemplate, preQueryOf } from './templates.ts';

/** Instructions are drawn warm by default, one of each list for each record. */
export interface InstructionSampling extends Omit<Sampling, 'temperature' | 'topP' | 'seed' | 'choices' | 'logProbabilities'> {
  /** Default 1. */
  readonly temperature?: number | readonly number[];
  /** Default 1. */
  readonly topP?: number | readonly number[];
}

/** A system prompt that steers what is asked: one, several with equal chances, or named ones with chances of their own. */
export type Steering =
  | string
  | readonly string[]
  | Readonly<Record<string, string | { readonly prompt: string; readonly weight: number }>>;

export interface MagpieOptions {
  /** Writes instructions; must take raw prompts. */
  readonly provider: Provider;
  /** Answers them. Default: the same. */
  readonly responder?: Provider;
  /** How many instructions are drawn; refused ones are not drawn again. */
  readonly count: number;
  /** The model's chat template, or the name of a family or model of the registry. Default: the provider's template where it has one, else by the model's name. */
  readonly template?: ChatTemplate | PreQuery | string;
  readonly instruction?: InstructionSampling;
  /** Default: the likeliest tokens, at most 2048. */
  readonly response?: Sampling;
  readonly system?: Steering;
  /** Keep the system prompt for the answer too, and in the record. Default false: it only steers what is asked. */
  readonly keepSystem?: boolean;
  /** Pairs of a question and an answer. Default 1. */
  readonly turns?: number;
  /** Instructions of one line only. Default false. */
  readonly singleLine?: boolean;
  readonly sanitize?: SanitizeOptions;
  /** Begins the ids of records. Default `magpie`. */
  readonly prefix?: string;
}

// What steers a user's further turns, unless a system prompt is given.
const followUpPrompt =
  'You are a helpful assistant in a conversation of several turns. The user asks a question, and then related follow-up questions that build on the answers.';

/** The stages of Magpie: `instruct`, `respond`, and for each further turn `ask-n`, `respond-n`. @throws ConfigError, ProviderError */
export function magpie(options: MagpieOptions): Pipeline<InstructionRecord> {
  const { provider, responder = provider, count, turns = 1 } = options;
  check('count', count, Number.isInteger(count) && count >= 1, 'a whole number from 1');
  check('turns', turns, Number.isInteger(turns) && turns >= 1, 'a whole number from 1');
  if (!provider.can.complete) {
    throw unable(provider.name, 'continue a raw prompt', 'Magpie needs a backend that takes prompts as they stand');
  }
  if (!responder.can.chat) throw unable(responder.name, 'answer a conversation', 'give another responder');
  let chain: Pipeline<InstructionRecord> = pipeline(numbers(count)).through(instruct(options)).through(respond(options, 1));
  for (let turn = 2; turn <= turns; turn++) chain = chain.through(followUp(options, turn)).through(respond(options, turn));
  return chain;
}

/** Draws one instruction for each number. */
function instruct(options: MagpieOptions): RecordStage<number, InstructionRecord> {
  const { provider, singleLine = false, prefix = 'magpie' } = options;
  const preQuery = preQueryFor(options);
  const systems = steering(options.system);
  if (systems !== undefined && preQuery.after === undefined) {
    throw new ConfigError(
      `magpie: the registry's ${preQuery.name} has no place for a system prompt; give the model's chat template as \`template\``,
      { code: 'ERR_CONFIG', op: 'magpie', argument: 'system' },
    );
  }
  const { temperature = 1, topP = 1, ...rest } = options.instruction ?? {};
  const grid = [temperature].flat().flatMap((t) => [topP].flat().map((p) => ({ temperature: t, topP: p })));
  check('instruction.temperature', temperature, grid.length > 0, 'one or more numbers');
  const stops = stopping(provider, preQuery, rest, singleLine);
  checkAbilities(provider.name, provider.can, { ...rest, ...stops });
  return {
    kind: 'record',
    name: 'instruct',
    settings: [
      provider.name,
      preQuery.text,
      stops,
      grid,
      rest,
      systems,
      options.sanitize,
      singleLine,
      prefix,
      options.keepSystem,
    ],
    concurrency: provider.concurrency,
    async run(n, { seed, signal }) {
      const cell = grid[seed(1) % grid.length]!;
      const system = systems === undefined ? undefined : chosen(systems, seed(2) / 2 ** 31);
      const prompt = system === undefined ? preQuery.text : preQuery.after!([{ role: 'system', content: system.prompt }]);
      const reply = await provider.complete(prompt, { maxTokens: 1024, ...rest, ...cell, ...stops, seed: seed(), signal });
      const text = written(reply.text, reply.finish, { ...options.sanitize, headers: preQuery.stop });
      if ('dropped' in text) return text;
      const messages: ChatMessage[] = [{ role: 'user', content: text.text }];
      if (system !== undefined && options.keepSystem) messages.unshift({ role: 'system', content: system.prompt });
      return {
        value: {
          id: `${prefix}-${String(n).padStart(6, '0')}`,
          messages,
          ...(system?.key === undefined ? {} : { systemKey: system.key }),
          origin: { model: provider.model, ...cell, seed: seed(), rules: text.rules },
        },
      };
    },
  };
}

/** The user's next turn. */
function followUp(options: MagpieOptions, turn: number): RecordStage<InstructionRecord, InstructionRecord> {
  const { provider, singleLine = false } = options;
  const preQuery = preQueryFor(options);
  if (preQuery.after === undefined) {
    throw new ConfigError(
      `magpie: the registry's ${preQuery.name} cannot write a conversation of several turns; give the model's chat template as \`template\``,
      { code: 'ERR_CONFIG', op: 'magpie', argument: 'turns' },
    );
  }
  const { temperature = 1, topP = 1, ...rest } = options.instruction ?? {};
  const cell = { temperature: [temperature].flat()[0]!, topP: [topP].flat()[0]! };
  const stops = stopping(provider, preQuery, rest, singleLine);
  return {
    kind: 'record',
    name: `ask-${turn}`,
    settings: [provider.name, preQuery.text, stops, cell, rest, options.sanitize, singleLine],
    concurrency: provider.concurrency,
    async run(record, { seed, signal }) {
      const steered = record.messages[0]!.role === 'system' ? [] : [{ role: 'system', content: followUpPrompt } as const];
      const prompt = preQuery.after!([...steered, ...record.messages]);
      const reply = await provider.complete(prompt, { maxTokens: 1024, ...rest, ...cell, ...stops, seed: seed(), signal });
      const text = written(reply.text, reply.finish, { least: 2, ...options.sanitize, headers: preQuery.stop });
      if ('dropped' in text) return text;
      return { value: { ...record, messages: [...record.messages, { role: 'user', content: text.text }] } };
    },
  };
}

/** The assistant's answer. */
function respond(options: MagpieOptions, turn: number): RecordStage<InstructionRecord, InstructionRecord> {
  const { responder = options.provider } = options;
  const sampling: Sampling = { temperature: 0, maxTokens: 2048, ...options.response };
  checkAbilities(responder.name, responder.can, sampling);
  return {
    kind: 'record',
    name: turn === 1 ? 'respond' : `respond-${turn}`,
    settings: [responder.name, sampling],
    concurrency: responder.concurrency,
    async run(record, { seed, signal }) {
      const reply = await responder.chat(record.messages, { ...sampling, seed: seed(), signal });
      const content = reply.text.trim();
      if (content === '') return { dropped: 'response-empty' };
      if (reply.finish === 'length') return { dropped: 'response-unfinished', detail: content };
      if (hasHeader(content)) return { dropped: 'response-header', detail: content };
      if (repeats(content)) return { dropped: 'response-repeats', detail: content };
      return { value: { ...record, messages: [...record.messages, { role: 'assistant', content }] } };
    },
  };
}

function written(raw: string, finish: 'stop' | 'length', options: SanitizeOptions) {
  if (finish === 'length') return { dropped: 'instruction-unfinished', detail: raw };
  const result = sanitize(raw, options);
  return 'refused' in result ? { dropped: `instruction-${result.refused}`, detail: raw } : result;
}

function preQueryFor({ provider, template }: MagpieOptions): PreQuery {
  if (template === undefined && provider.template !== undefined) return preQueryFromTemplate(provider.template);
  if (template === undefined || typeof template === 'string') return preQueryOf(template ?? provider.model);
  return 'render' in template ? preQueryFromTemplate(template) : template;
}

function stopping(provider: Provider, preQuery: PreQuery, given: Sampling, singleLine: boolean): Sampling {
  const stopIds = [...preQuery.stopIds, ...(given.stopIds ?? [])];
  return {
    stop: [...preQuery.stop, ...(given.stop ?? []), ...(singleLine ? ['\n'] : [])],
    // Where ids cannot be named, the same tokens as text do.
    ...(stopIds.length > 0 && provider.can.stopIds ? { stopIds } : {}),
  };
}

interface System {
  readonly key?: string;
  readonly prompt: string;
  readonly weight: number;
}

function steering(system: Steering | undefined): readonly System[] | undefined {
  if (system === undefined) return undefined;
  if (typeof system === 'string') return [{ prompt: system, weight: 1 }];
  const list: System[] = Array.isArray(system)
    ? system.map((prompt: string) => ({ prompt, weight: 1 }))
    : Object.entries(system as Record<string, string | { prompt: string; weight: number }>).map(([key, value]) =>
        typeof value === 'string' ? { key, prompt: value, weight: 1 } : { key, ...value },
      );
  // Weights are shares of their sum, whatever it is.
  const good = list.length > 0 && list.every(({ weight }) => weight >= 0) && list.some(({ weight }) => weight > 0);
  check('system', `weights ${list.map(({ weight }) => weight).join(', ')}`, good, 'prompts, one of them with a weight above 0');
  return list;
}

function chosen(systems: readonly System[], u: number): System {
  let left = u * systems.reduce((sum, { weight }) => sum + weight, 0);
  for (const system of systems) {
    left -= system.weight;
    if (left < 0) return system;
  }
  return systems.findLast(({ weight }) => weight > 0)!;
}

function check(argument: string, value: unknown, good: boolean, expected: string): void {
  if (good) return;
  throw new ConfigError(`magpie: ${argument} is ${String(value)}, expected ${expected}`, {
    code: 'ERR_CONFIG',
    op: 'magpie',
    argument,
    expected,
    actual: String(value),
  });
}
