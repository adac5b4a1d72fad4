// What to do about a run that found no room.
import { memory } from '../tensor/engine.ts';
import { OutOfMemoryError } from '../tensor/errors.ts';
import type { RunConfig } from '../train/config.ts';
import { bytes } from '../train/format.ts';
import { plan } from './plan.ts';

/** The same error, with what the run takes and which changes would make it fit in the engine's memory. */
export async function withAdvice(error: OutOfMemoryError, run: RunConfig): Promise<OutOfMemoryError> {
  const { memory: need, advice } = await plan(run, { room: memory().limit });
  const ways = advice.map(({ change, total, fits }) => `  ${bytes(total)}${fits ? ' (fits)' : ''}: ${change}`);
  const lines = [
    error.message,
    `The run takes ${bytes(need.total)} of tensors. What would save memory:`,
    ...(ways.length > 0 ? ways : ['  a smaller model']),
    'Checkpoints that were saved stay good.',
  ];
  return new OutOfMemoryError(lines.join('\n'), {
    code: error.code,
    cause: error,
    ...(error.op === undefined ? {} : { op: error.op }),
    ...(error.expected === undefined ? {} : { expected: error.expected }),
    ...(error.actual === undefined ? {} : { actual: error.actual }),
  });
}
