// Options of commands that let a model write.

import type { ArgsDef } from 'citty';
import type { GenerateOptions, TextOptions } from '../models/completion.ts';
import type { Device } from '../tensor/engine.ts';
import { allValues, numberOption, UsageError } from './command.ts';

export const samplingArguments = {
  tokens: { type: 'string', alias: 'n', description: 'Most new tokens. Default 128.', valueHint: 'n' },
  temperature: { type: 'string', alias: 't', description: '0 takes the likeliest token. Default 0.8.', valueHint: 'x' },
  'top-k': { type: 'string', description: 'Draw from the k likeliest tokens only.', valueHint: 'k' },
  'top-p': {
    type: 'string',
    description: 'Draw from the likeliest tokens that hold this share of the probability.',
    valueHint: 'p',
  },
  'min-p': {
    type: 'string',
    description: 'Draw from tokens that are at least this share as likely as the likeliest.',
    valueHint: 'p',
  },
  'repetition-penalty': { type: 'string', description: 'Above 1: tokens that were there are less likely.', valueHint: 'x' },
  'logit-bias': {
    type: 'string',
    description: 'Add to the logit of a token id, as often as wanted; -Infinity rules it out.',
    valueHint: 'id=x',
  },
  stop: { type: 'string', description: 'End before this text, as often as wanted.', valueHint: 'text' },
  seed: { type: 'string', description: 'Same seed, same text. Default 0.', valueHint: 'n' },
  dtype: { type: 'string', description: 'How weights are kept: f32, or bf16 in half the memory and time.', valueHint: 'dtype' },
  weights: { type: 'string', description: 'Matrices of few bits: fp8, q8 or q4.', valueHint: 'format' },
  device: { type: 'string', description: 'Where to compute: cpu or cuda. Default cpu.', valueHint: 'device' },
  threads: { type: 'string', description: 'Threads. Default: the cores of the machine.', valueHint: 'n' },
} as const satisfies ArgsDef;

type Arguments = { readonly [K in keyof typeof samplingArguments]?: string | undefined };

/** What was asked for; the rest comes from the model's folder. @throws UsageError */
export function samplingOptions(args: Arguments, rawArgs: readonly string[]): Omit<TextOptions, 'cache' | 'signal'> {
  const all = (name: string): string[] => allValues(rawArgs, samplingArguments, name);
  const bias = all('logit-bias').map((pair) => {
    const [, id, value] = /^(\d+)=(.+)$/.exec(pair) ?? [];
    if (id === undefined || Number.isNaN(Number(value)))
      throw new UsageError(`--logit-bias ${pair}: write id=number, as in 42=-1.5`);
    return [Number(id), Number(value)] as const;
  });
  return defined({
    tokens: numberOption('tokens', args.tokens, 1, true),
    temperature: numberOption('temperature', args.temperature, 0),
    topK: numberOption('top-k', args['top-k'], 1, true),
    topP: numberOption('top-p', args['top-p'], 0, false, 1),
    minP: numberOption('min-p', args['min-p'], 0, false, 1),
    repetitionPenalty: numberOption('repetition-penalty', args['repetition-penalty'], 0),
    seed: numberOption('seed', args.seed, 0, true),
    logitBias: bias.length === 0 ? undefined : new Map(bias),
    stop: args.stop === undefined ? undefined : all('stop'),
  });
}

/** How to load the model. @throws UsageError */
export function loadingOptions(args: Arguments): Pick<GenerateOptions, 'dtype' | 'weights' | 'device' | 'threads'> {
  const { dtype, weights } = args;
  if (dtype !== undefined && dtype !== 'f32' && dtype !== 'bf16')
    throw new UsageError(`--dtype is "${dtype}"; it must be f32 or bf16`);
  if (weights !== undefined && weights !== 'fp8' && weights !== 'q8' && weights !== 'q4')
    throw new UsageError(`--weights is "${weights}"; it must be fp8, q8 or q4`);
  return defined({ dtype, weights, device: deviceOption(args.device), threads: numberOption('threads', args.threads, 1, true) });
}

/** @throws UsageError */
export function deviceOption(device: string | undefined): Device | undefined {
  if (device === undefined || device === 'cpu' || device === 'cuda') return device;
  throw new UsageError(`--device is "${device}"; it must be cpu or cuda`);
}

/** Without the fields that are undefined. */
function defined<T extends object>(fields: T): { [K in keyof T]?: Exclude<T[K], undefined> } {
  return Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== undefined)) as never;
}
