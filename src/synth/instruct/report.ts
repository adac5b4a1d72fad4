// report.html of synthesized pairs: texts and what was written about them, as conversations.

import { join } from 'node:path';
import { FileError } from '../../tensor/errors.ts';
import { count } from '../../train/format.ts';
import { readManifest, readRecords, type StageSummary } from '../pipeline.ts';
import type { ChatMessage } from '../provider.ts';
import type { InstructionRecord } from '../record.ts';
import { writeDatasetReport } from '../report.ts';
import type { Survey } from '../survey.ts';
import { type InstructionChain, type SynthesisReport, synthesisReport } from './synthesize.ts';

/** The last stage of a pipeline's output that holds chains: the last round of a synthesizer. */
export function lastRound(stages: readonly StageSummary[]): StageSummary | undefined {
  return stages.findLast(({ stage }) => /^round-\d+$/.test(stage));
}

/**
 * Writes the report of a synthesizer's output folder: what it made of how many texts, and some texts with their pairs.
 * @throws FileError `ERR_READ` for a folder without a finished round
 */
export async function reportInstructions(
  output: string,
  path = join(output, 'report.html'),
  title = 'Instruction synthesis',
): Promise<{ readonly survey: Survey; readonly report: SynthesisReport }> {
  const stages = await readManifest(output);
  const round = lastRound(stages);
  if (round === undefined) {
    throw new FileError(`report: ${output} holds no finished round; give the output folder of limbeck synth instruct`, {
      code: 'ERR_READ',
      op: 'report',
      argument: output,
    });
  }
  const chains = () => readRecords<InstructionChain>(join(output, round.file));
  const report = await synthesisReport(chains());
  const facts = {
    texts: count(report.texts),
    'with pairs': count(report.withPairs),
    'too long to be asked about': count(report.tooLong),
    'answers cut off': count(report.cutOff),
    ...Object.fromEntries(Object.entries(report.malformed).map(([defect, n]) => [`no pair: ${defect}`, count(n)])),
  };
  const upTo = stages.slice(0, stages.indexOf(round) + 1);
  const survey = await writeDatasetReport(path, conversationsOf(chains()), { title, facts, stages: upTo, folder: output });
  return { survey, report };
}

/** Each text with pairs: the text as the system's message, questions and answers as turns. */
async function* conversationsOf(chains: AsyncIterable<InstructionChain>): AsyncGenerator<InstructionRecord> {
  for await (const { texts } of chains) {
    for (const { id, context, pairs } of texts) {
      if (pairs.length === 0) continue;
      const turns = pairs.flatMap(({ question, answer }): ChatMessage[] => [
        { role: 'user', content: question },
        { role: 'assistant', content: answer },
      ]);
      yield { id, messages: [{ role: 'system', content: context }, ...turns] };
    }
  }
}
