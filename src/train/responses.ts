// What a model answers to held-out instructions: some at each evaluation, for people to read; more at the end, in a file.

import { join } from 'node:path';
import type { Conversation } from '../data/conversations.ts';
import { writeAtomic } from '../io/atomic.ts';
import { generateText } from '../models/completion.ts';
import type { LanguageModel } from '../models/model.ts';
import type { ChatTemplate, Message } from '../tokenizer/chat.ts';
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
  const responses: Response[] = [];
  const { tokens, temperature } = run.responses;
  const { turnEnd } = template;
  const begin = tokenizer.bos === undefined ? '' : (tokenizer.token(tokenizer.bos) ?? '');
  for (const { messages, tools } of heldOut) {
    if (responses.length === count) break;
    const before = messages.slice(0, -1);
    const text = template.render(before, { addGenerationPrompt: true, ...(tools === undefined ? {} : { tools }) });
    const prompt = begin !== '' && text.startsWith(begin) ? text.slice(begin.length) : text;
    if (tokenizer.encode(prompt).length + 1 >= model.config.context) continue;
    let said = '';
    for await (const piece of generateText(model, tokenizer, prompt, { tokens, temperature, seed: run.seed })) {
      said += piece;
      if (turnEnd !== '' && said.includes(turnEnd)) break;
    }
    const end = turnEnd === '' ? -1 : said.indexOf(turnEnd);
    const response = (end < 0 ? said : said.slice(0, end)).trim();
    responses.push({ messages: before, reference: messages.at(-1)!.content, response });
  }
  return responses;
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
