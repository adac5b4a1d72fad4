// A process that runs a pipeline and may be killed at any moment: `node worker.ts FOLDER RECORDS [instruct]`.
import { setTimeout as sleep } from 'node:timers/promises';
import { pairsText } from '../../src/synth/instruct/format.ts';
import { passageStage } from '../../src/synth/instruct/passages.ts';
import { documentStage, renderStage } from '../../src/synth/instruct/render.ts';
import { synthesizeInstructions } from '../../src/synth/instruct/synthesize.ts';
import { numbers, type Pipeline, pipeline, recordsOf, runPipeline } from '../../src/synth/pipeline.ts';
import { trainTokenizer } from '../../src/tokenizer/train.ts';
import { scripted } from './scripted.ts';

const [folder, records, kind] = process.argv.slice(2);

/** Two stages of records of which some are dropped, and one that sees all. */
function plain(count: number): Pipeline<unknown> {
  return pipeline(numbers(count))
    .through({
      kind: 'record',
      name: 'write',
      settings: {},
      concurrency: 8,
      async run(n, { index, seed }) {
        await sleep(seed(1) % 7);
        if (seed() % 5 === 0) return { dropped: 'fifth' };
        return { value: { id: n, seed: seed(), text: 'é€😀\n'.repeat(1 + (index % 40)) } };
      },
    })
    .through({
      kind: 'record',
      name: 'count',
      settings: {},
      concurrency: 3,
      async run(record, { seed }) {
        await sleep(seed(1) % 3);
        return { value: { ...record, length: record.text.length } };
      },
    })
    .through({
      kind: 'gather',
      name: 'long',
      settings: {},
      async run(all, output) {
        for await (const record of all()) {
          if (record.length > 20) await output.keep(record);
          else await output.drop(record, 'short');
        }
      },
    });
}

/** Texts cut into passages, three rounds of pairs, and documents; the synthesizer takes its time and is not always good. */
async function instruct(count: number): Promise<Pipeline<unknown>> {
  const tokenizer = await trainTokenizer(['Text about rivers and towns. <QUE> What? <ANS> 5 </END> <CON> </CON>'.repeat(20)], {
    vocabSize: 320,
  });
  const texts = recordsOf(
    Array.from({ length: count }, (_, i) => ({ id: `t${i}`, text: `Text ${i} tells é of rivers. `.repeat(2) })),
  );
  const provider = scripted({
    concurrency: 8,
    async complete(prompt, { seed = 0 }) {
      await sleep(seed % 20);
      if (seed % 5 === 0) return '<QUE> What? </END> <QUE> cut';
      const pairs = Array.from({ length: 1 + (seed % 3) }, (_, i) => ({
        question: `What is ${i} of ${seed}?`,
        answer: prompt
          .slice(-30)
          .trim()
          .replaceAll(/<[^>]*>/g, ''),
      }));
      return pairsText(pairs);
    },
  });
  const passages = pipeline(texts).through(passageStage({ tokenizer, tokens: 20 }));
  return synthesizeInstructions(passages, { provider, tokenizer, rounds: 3, context: 300, maxTokens: 60 })
    .through(renderStage())
    .through(documentStage());
}

const chain = kind === 'instruct' ? await instruct(Number(records)) : plain(Number(records));
for await (const event of runPipeline(chain, { output: folder!, seed: 5 })) {
  if (event.type === 'stage') process.stdout.write(`${event.stage} ${event.state} ${event.done}\n`);
}
