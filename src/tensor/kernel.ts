// A kernel by its signature, and the one place that calls kernels.
import { dtypes } from './dtype.ts';
import { engineNumber, io, native, outputSlots, typed } from './engine.ts';
import type { OpDefinition } from './native.ts';
import { handleOf, type Tensor } from './tensor.ts';

export interface Kernel {
  readonly text: string;
  /** Parsed by the native core at first use. */
  info(): OpDefinition;
}

/** Declares a kernel; nothing native happens before it is called. */
export function kernel(text: string): Kernel {
  let info: OpDefinition | undefined;
  let definedIn = -1;
  return {
    text,
    info() {
      if (info === undefined || definedIn !== engineNumber) {
        try {
          info = native().define(text);
          definedIn = engineNumber;
        } catch (error) {
          throw typed(error);
        }
      }
      return info;
    },
  };
}

/** What is to happen with an output: a new tensor, nothing, or a place that exists. */
export type Request = 'new' | 'skip' | { readonly into: Tensor; readonly accumulate: boolean };

/** An argument: a tensor, a number, or nothing for an optional tensor. */
export type Argument = Tensor | number | undefined;

/**
 * Checks, allocates and enqueues one call. Outputs come in the order of the signature; undefined where skipped.
 * @param wrap makes a Tensor of a new handle: `adopt` for the current scope, `unscoped` for gradients.
 * @param checked whether arguments must be held by the user; a tape calls with what only it holds.
 */
export function launch(
  kernel: Kernel,
  args: readonly Argument[],
  requests: readonly Request[],
  wrap: (handle: number, dtype: (typeof dtypes)[number], shape: readonly number[]) => Tensor,
  checked = false,
): (Tensor | undefined)[] {
  const info = kernel.info();
  let at = 0;
  for (const a of args) {
    io[at++] = a === undefined ? 0 : typeof a === 'number' ? a : checked ? handleOf(a, info.op) : a.handle;
  }
  for (const r of requests) {
    io[at++] = r === 'new' ? -1 : r === 'skip' ? 0 : r.into.handle;
    io[at++] = typeof r === 'object' && r.accumulate ? 1 : 0;
  }
  try {
    native().call(info.id);
  } catch (error) {
    throw typed(error);
  }
  const handles = requests.map((r, i) => {
    if (typeof r === 'object') return r.into;
    if (r === 'skip') return undefined;
    const from = i * outputSlots;
    return {
      handle: io[from]!,
      dtype: dtypes[io[from + 1]!]!,
      shape: Array.from(io.subarray(from + 3, from + 3 + io[from + 2]!)),
    };
  });
  return handles.map((h) => (h === undefined || 'held' in h ? h : wrap(h.handle, h.dtype, h.shape)));
}
