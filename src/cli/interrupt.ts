// Ctrl-C: once asks the work to stop where it can be taken up again, twice ends the process at once.

import { exitCode } from './command.ts';

/** Runs `work` with a signal that the first SIGINT or SIGTERM aborts; `told` says so to the user. */
export async function interruptible<T>(work: (signal: AbortSignal) => Promise<T>, told: (signal: string) => void): Promise<T> {
  const controller = new AbortController();
  const stop = (signal: NodeJS.Signals) => {
    // Files are written beside and renamed, so that nothing already saved can be lost here.
    if (controller.signal.aborted) process.exit(exitCode.interrupted);
    controller.abort(new DOMException(`stopped by ${signal}`, 'AbortError'));
    told(signal);
  };
  process.on('SIGINT', stop);
  process.on('SIGTERM', stop);
  try {
    return await work(controller.signal);
  } finally {
    process.off('SIGINT', stop);
    process.off('SIGTERM', stop);
  }
}
