// What a model answers to held-out instructions: some at each evaluation, for people to read; more at the end, in a file.

import { join } from 'node:path';
import type { Conversation } from '../data/conversations.ts';
import { writeAtomic } from '../io/atomic.ts';
import { completions } from '../models/completion.ts';
import type { FinishReason } from '../models/generate.ts';
import type { LanguageModel } from '../models/model.ts';
import { type ChatTemplate, encodeChat, type Message } from '../tokenizer/chat.ts';
import type { Tokenizer } from '../tokenizer/tokenizer.ts';
import type { FinetuneConfig } from './config.ts';
import type { ResponsesEvent, SampleEvent } from './events.ts';

/** Name of the file of answers inside a run's output folder. */
export const responsesFile = 'responses.jsonl';

/** A line of responses.jsonl. */
export interface Response {
  /** The conversation up to the answer. */
  readonly messages: readonly Message[];
  /** The answer in the data. */
  readonly reference: string;
  /** The answer of the model. */
  readonly response: string;
  /** Why it ends there: `stop` at the end of a turn, `length` after as many tokens as were asked for. */
  readonly finish: FinishReason;
}

/** Who answers what. */
export interface Answerer {
  readonly model: LanguageModel;
  readonly tokenizer: Tokenizer;
  readonly template: ChatTemplate;
  readonly heldOut: readonly Conversation[];
  readonly run: Pick<FinetuneConfig, 'responses' | 'output' | 'seed' | 'batch'>;
}

/** Answers to the first `count` held-out instructions that leave room for one, in order. */
async function answer({ model, tokenizer, template, heldOut, run }: Answerer, count: number): Promise<Response[]> {
  const asked = heldOut.flatMap(({ messages, tools }) => {
    const before = messages.slice(0, -1);
    const options = { addGenerationPrompt: true, ...(tools === undefined ? {} : { tools }) };
    const { ids } = encodeChat(template, tokenizer, before, options);
    return ids.length < model.config.context ? [{ before, ids, reference: messages.at(-1)!.content }] : [];
  });
  const chosen = asked.slice(0, count);
  const { tokens, temperature } = run.responses;
  const responses: Response[] = [];
  const options = {
    tokens,
    temperature,
    seed: run.seed,
    batch: Math.min(8, run.batch.sequences),
    ...(template.turnEnd === '' ? {} : { stop: template.turnEnd, stopIds: turnEndId(template, tokenizer) }),
  };
  const prompts = chosen.map(({ ids }) => ids);
  for await (const { index, text, finish } of completions(model, tokenizer, prompts, options)) {
    const { before, reference } = chosen[index]!;
    responses[index] = { messages: before, reference, response: text.trim(), finish };
  }
  return responses;
}

/** The token that ends a turn, where it is one. */
function turnEndId({ turnEnd }: ChatTemplate, tokenizer: Tokenizer): number[] {
  const ids = tokenizer.encode(turnEnd);
  return ids.length === 1 ? [ids[0]!] : [];
}

/** Answers to a few held-out instructions as events. */
export async function* sampleResponses(answerer: Answerer, step: number): AsyncGenerator<SampleEvent> {
  for (const { messages, reference, response } of await answer(answerer, answerer.run.responses.samples)) {
    yield { type: 'sample', step, prompt: `${messages.at(-1)!.content}\n`, text: response, reference };
  }
}

/** Writes the answers to held-out instructions into the output folder. */
export async function* writeResponses(answerer: Answerer, step: number): AsyncGenerator<ResponsesEvent> {
  const { responses: settings, output } = answerer.run;
  if (settings.examples === 0) return;
  const responses = await answer(answerer, settings.examples);
  const path = join(output, responsesFile);
  await writeAtomic(path, (file) => file.writeFile(responses.map((response) => `${JSON.stringify(response)}\n`).join('')));
  yield { type: 'responses', step, path, count: responses.length };
}
