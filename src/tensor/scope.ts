import { LimbeckError } from './errors.ts';
import type { Tensor } from './tensor.ts';

let current: Set<Tensor> | undefined;

const leaks: Map<Tensor, string> | undefined = process.env.LIMBECK_LEAKS === '1' ? new Map() : undefined;
leaks && process.on('exit', reportLeaks);

/** @internal Every new tensor passes here. */
export function track(t: Tensor): void {
  current?.add(t);
  leaks?.set(t, new Error().stack ?? '');
}

/** @internal Every freed tensor passes here. */
export function untrack(t: Tensor): void {
  current?.delete(t);
  leaks?.delete(t);
}

function reportLeaks(): void {
  for (const [t, stack] of leaks!) {
    process.stderr.write(
      `limbeck: a tensor of shape [${t.shape.join(' ')}] was never freed; made${stack.slice('Error'.length)}\n`,
    );
  }
}

/** Calls `f` for each tensor inside plain data (arrays, objects, maps). */
export function eachTensor(value: unknown, f: (t: Tensor) => void): void {
  if (typeof value !== 'object' || value === null) return;
  if ('handle' in value && 'held' in value) {
    f(value as Tensor);
  } else if (Array.isArray(value)) {
    for (const v of value) eachTensor(v, f);
  } else if (value instanceof Map) {
    for (const v of value.values()) eachTensor(v, f);
  } else if (Object.getPrototypeOf(value) === Object.prototype || Object.getPrototypeOf(value) === null) {
    for (const v of Object.values(value)) eachTensor(v, f);
  }
}

/**
 * Runs `f` and frees every tensor made inside, except those in what it returns (also inside arrays, objects and maps); these
 * pass to the scope around. Tensors that a tape still needs stay until it has used them. `f` must not be async.
 */
export function scope<T>(f: () => T): T {
  const outer = current;
  const mine = new Set<Tensor>();
  current = mine;
  try {
    const result = f();
    if (result instanceof Promise) {
      throw new LimbeckError(
        'scope: the function is async; a scope ends when its function returns, so await outside and free with dispose()',
        {
          code: 'ERR_ASYNC_SCOPE',
          op: 'scope',
        },
      );
    }
    eachTensor(result, (t) => {
      if (mine.delete(t)) outer?.add(t);
    });
    return result;
  } finally {
    current = outer;
    for (const t of mine) t.dispose();
  }
}

/** Keeps a tensor beyond every scope: it lives until `dispose()`. */
export function keep<T>(value: T): T {
  eachTensor(value, (t) => current?.delete(t));
  return value;
}
