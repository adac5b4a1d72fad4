// A process that runs a pipeline and may be killed at any moment: `node worker.ts FOLDER RECORDS`.
import { setTimeout as sleep } from 'node:timers/promises';
import { numbers, pipeline, runPipeline } from '../../src/synth/pipeline.ts';

const [folder, records] = process.argv.slice(2);

const chain = pipeline(numbers(Number(records)))
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

for await (const event of runPipeline(chain, { output: folder!, seed: 5 })) {
  if (event.type === 'stage') process.stdout.write(`${event.stage} ${event.state} ${event.done}\n`);
}
