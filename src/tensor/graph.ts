// Work that is recorded once and run again as a whole.
import { checkFunction } from './argument.ts';
import { deviceNumber, native, typed } from './engine.ts';
import { DisposedError } from './errors.ts';
import { scope } from './scope.ts';

/** Recorded work. It reads and writes the same tensors each time: put new data into them with `write`. */
export interface Graph<T> {
  /** What the function returned; its tensors hold what the last replay wrote. */
  readonly result: T;
  /** Runs it, in the order of the stream. */
  replay(): void;
  /** Frees the memory that it keeps for itself. The tensors of `result` are freed apart. */
  dispose(): void;
  [Symbol.dispose](): void;
}

/**
 * Records what `f` calls, without running it. A replay costs one call instead of one for each kernel: on a GPU it is a single
 * launch. Numbers (learning rates, seeds) are as they were when it was recorded; tensors are read anew. Tensors that are made inside
 * keep their memory until the graph is disposed of; tensors from outside that are used inside are kept, too.
 * @throws ConfigError `ERR_GRAPH_READ` when `f` reads a value: nothing has run yet.
 */
export function graph<T>(f: () => T): Graph<T> {
  checkFunction('graph', 'f', f);
  const device = deviceNumber();
  const engine = native();
  const calls = <R>(call: () => R): R => {
    try {
      return call();
    } catch (error) {
      throw typed(error);
    }
  };
  calls(() => engine.capture(device));
  let result: T;
  let number: number;
  try {
    result = scope(f);
  } catch (error) {
    engine.drop(device, engine.captured(device));
    throw error;
  }
  number = calls(() => engine.captured(device));
  const dispose = (): void => {
    if (number !== 0) engine.drop(device, number);
    number = 0;
  };
  return {
    result,
    replay() {
      if (number === 0) throw new DisposedError('graph: replay() after dispose()', { code: 'ERR_GRAPH_DISPOSED', op: 'graph' });
      calls(() => engine.replay(device, number));
    },
    dispose,
    [Symbol.dispose]: dispose,
  };
}
