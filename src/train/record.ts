// Keeps what a run tells: metrics.jsonl, TensorBoard files, run.json and report.html in its output folder.

import { join } from 'node:path';
import { writeAtomic } from '../io/atomic.ts';
import type { RunConfig } from './config.ts';
import type { TrainEvent } from './events.ts';
import { MetricsWriter } from './metrics.ts';
import { readRun, reportFile, runFile, writeReport } from './report.ts';
import { TensorBoardWriter } from './tensorboard.ts';

/**
 * Passes the events of a run on and writes them down on the way:
 * `for await (const event of record(run, pretrain(run))) ...`. @throws FileError when the output folder cannot be written
 */
export async function* record(run: RunConfig, events: AsyncIterable<TrainEvent>): AsyncGenerator<TrainEvent, void, undefined> {
  let metrics: MetricsWriter | undefined;
  let board: TensorBoardWriter | undefined;
  let reportAfter = 0;
  try {
    for await (const event of events) {
      if (event.type === 'start') {
        const resumed = event.resumedFrom?.step;
        metrics = await MetricsWriter.open(run.output, resumed);
        if (run.log.tensorboard) board = await TensorBoardWriter.open(run.output, resumed);
        await writeAtomic(join(run.output, runFile), (file) => file.writeFile(`${JSON.stringify(run, null, 2)}\n`));
      }
      if (metrics) {
        const recorded = await metrics.write(event);
        await board?.write(event, recorded.time);
        const from = performance.now();
        if (run.log.report && (event.type === 'done' || (event.type === 'evaluate' && from >= reportAfter))) {
          await writeReport(join(run.output, reportFile), [await readRun(run.output)]);
          // Long runs have long reports: they get at most a twentieth of the time.
          reportAfter = performance.now() + 20 * (performance.now() - from);
        }
      }
      yield event;
    }
  } finally {
    await metrics?.close();
    await board?.close();
  }
}
