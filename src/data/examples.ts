// From a conversation to what a training step sees of it: ids, and what each counts as a target.

import type { ChatTemplate, EncodedChat } from '../tokenizer/chat.ts';
import { encodeChat } from '../tokenizer/chat.ts';
import type { Tokenizer } from '../tokenizer/tokenizer.ts';
import type { Conversation } from './conversations.ts';
import type { Span } from './pack.ts';

/** Which tokens are learned: `all`, those of the last answer, or those of every answer. */
export type Mask = 'all' | 'completion' | 'assistant-turns';

export interface ExampleOptions {
  readonly template: ChatTemplate;
  readonly tokenizer: Tokenizer;
  readonly mask: Mask;
  /** What the other tokens count, 0 to 1; unused by `all`. */
  readonly promptWeight: number;
  /** Most tokens that a step may see of it. */
  readonly length: number;
  /** A longer one is shortened, or left out. */
  readonly overflow: 'truncate' | 'drop';
}

/** A conversation as ids. */
export interface Example extends Span {
  /** Tokens were cut off. */
  readonly truncated: boolean;
}

/**
 * The example of a conversation; undefined when it is too long and no answer would be left. The last token is a target and not an input.
 * A conversation that is too long keeps as many whole turns as fit; if that is none, the first answer is cut short, and its end token follows.
 */
export function exampleOf(conversation: Conversation, options: ExampleOptions): Example | undefined {
  const { template, tokenizer, mask, promptWeight, length } = options;
  const { messages, tools } = conversation;
  const encoded = encodeChat(template, tokenizer, messages, tools === undefined ? {} : { tools });
  // Behind the last answer there is nothing to learn.
  const used = encoded.mask.lastIndexOf(1) + 1;
  const whole = { ids: encoded.ids.subarray(0, used), mask: encoded.mask.subarray(0, used) };
  const truncated = whole.ids.length > length + 1;
  if (truncated && options.overflow === 'drop') return undefined;
  const chat = truncated ? shortened(whole, length + 1) : whole;
  if (chat === undefined || used === 0) return undefined;
  const counted = new Float32Array(chat.ids.length).fill(mask === 'all' ? 1 : promptWeight);
  if (mask !== 'all') {
    const turns = turnsOf(chat.mask);
    for (const [from, to] of mask === 'completion' ? turns.slice(-1) : turns) counted.fill(1, from, to);
  }
  const inputs = chat.ids.length - 1;
  return { ids: chat.ids.subarray(0, inputs), next: chat.ids[inputs]!, weights: counted.subarray(1), truncated };
}

/** Runs of tokens that the assistant wrote: [from, to). */
function turnsOf(mask: Uint8Array): [number, number][] {
  const turns: [number, number][] = [];
  for (let from = mask.indexOf(1); from >= 0; ) {
    const end = mask.indexOf(0, from);
    const to = end < 0 ? mask.length : end;
    turns.push([from, to]);
    from = mask.indexOf(1, to);
  }
  return turns;
}

/** At most `room` tokens, the last one being what ended the whole. */
function shortened({ ids, mask }: EncodedChat, room: number): EncodedChat | undefined {
  const turns = turnsOf(mask);
  if (turns.length === 0) return undefined;
  const end = ids[turns.at(-1)![1] - 1]!;
  const cut = (to: number): EncodedChat => {
    // A turn inside may end otherwise than the last one.
    const closes = to > 0 && ids[to - 1] === end && mask[to - 1] === 1;
    const size = closes ? to : to + 1;
    const shorter = { ids: new Int32Array(size).fill(end), mask: new Uint8Array(size).fill(1) };
    shorter.ids.set(ids.subarray(0, to));
    shorter.mask.set(mask.subarray(0, to));
    return shorter;
  };
  const kept = turns.findLast(([, to]) => to + (ids[to - 1] === end ? 0 : 1) <= room);
  if (kept !== undefined) return cut(kept[1]);
  // At least one token of the answer and the end.
  return turns[0]![0] + 2 <= room ? cut(room - 1) : undefined;
}
