// The tape: what was called, and how each call's gradient is made. First order only.
import type { DType } from './dtype.ts';
import { typed } from './engine.ts';
import { LimbeckError, ShapeError } from './errors.ts';
import { kernel, launch } from './kernel.ts';
import { scope } from './scope.ts';
import { addUse, releaseUse, type Tensor, unscoped, unscopedLike } from './tensor.ts';

/** One recorded call. */
export interface TapeNode {
  /** The op's name, for errors. */
  readonly op: string;
  readonly outputs: readonly Tensor[];
  /** Adds to the gradients of the inputs. Called once, last call first, when an output has a gradient. */
  backward(gradients: Gradients): void;
  /** Lets go of what the backward needed. Called once, also when the backward was not. */
  release(): void;
}

let recording: TapeNode[] | undefined;

/** Whether calls are being recorded now. */
export function isRecording(): boolean {
  return recording !== undefined;
}

/** Records a call whose outputs then have gradients. */
export function record(node: TapeNode): void {
  for (const t of node.outputs) t.tracked = true;
  recording!.push(node);
}

function withTape<T>(tape: TapeNode[] | undefined, f: () => T): T {
  const outer = recording;
  recording = tape;
  try {
    return f();
  } finally {
    recording = outer;
  }
}

/** Runs `f` without recording: for teachers, evaluation, and anything that needs no gradient. */
export function noGrad<T>(f: () => T): T {
  return withTape(undefined, f);
}

/**
 * The gradients on their way back. An entry is a tensor, or `unit`: the 1 that starts at the loss, which needs no tensor until
 * an op asks for it.
 */
export class Gradients {
  private readonly entries = new Map<Tensor, Tensor | 'unit'>();

  has(t: Tensor): boolean {
    return this.entries.has(t);
  }

  isUnit(t: Tensor): boolean {
    return this.entries.get(t) === 'unit';
  }

  seed(t: Tensor): void {
    this.entries.set(t, 'unit');
  }

  /** The gradient of `t` as a tensor, or undefined when nothing reached it. */
  get(t: Tensor): Tensor | undefined {
    const entry = this.entries.get(t);
    if (entry !== 'unit') return entry;
    const one = ones(t);
    this.entries.set(t, one);
    return one;
  }

  /**
   * Where a kernel may add the gradient of `t`: the sink of a parameter, or a gradient that nobody else shares.
   * Undefined: make a new tensor and {@link put} it.
   */
  target(t: Tensor): { tensor: Tensor; accumulate: boolean } | undefined {
    if (t.sink !== undefined) return { tensor: t.sink.tensor(), accumulate: t.sink.written };
    const entry = this.entries.get(t);
    if (entry === undefined) return undefined;
    const own = this.get(t)!;
    if (own.uses === 1 && !own.shared) return { tensor: own, accumulate: true };
    // Shared with another entry, by an alias or a view: take a copy before adding to it.
    const mine = addUse(unscopedLike(t, own.dtype));
    addInto(own, mine, false);
    this.drop(t);
    this.entries.set(t, mine);
    return { tensor: mine, accumulate: true };
  }

  /** A kernel wrote into what {@link target} gave. */
  wrote(t: Tensor): void {
    if (t.sink !== undefined) t.sink.written = true;
  }

  /** A new gradient of `t`, which may be shared with another entry. */
  put(t: Tensor, gradient: Tensor | 'unit'): void {
    const target = t.sink !== undefined || this.entries.has(t) ? this.target(t) : undefined;
    if (target === undefined) {
      this.entries.set(t, gradient === 'unit' ? gradient : as(gradientDType(t), gradient));
      return;
    }
    const from = gradient === 'unit' ? ones(t) : as(target.tensor.dtype, gradient);
    addInto(from, target.tensor, target.accumulate);
    releaseUse(from);
    this.wrote(t);
  }

  /** Passes the gradient of `from` on to `to`, without a copy. */
  alias(from: Tensor, to: Tensor): void {
    const entry = this.entries.get(from);
    if (entry !== undefined) this.put(to, entry);
  }

  drop(t: Tensor): void {
    const entry = this.entries.get(t);
    if (entry !== undefined && entry !== 'unit') releaseUse(entry);
    this.entries.delete(t);
  }

  clear(): void {
    for (const t of [...this.entries.keys()]) this.drop(t);
  }
}

const copy = kernel('copy(x[*]) -> y[*]+');
const toF32 = kernel('to_f32(x[*]:float) -> y[*]:f32');
const toBf16 = kernel('to_bf16(x[*]:float) -> y[*]:bf16');
const fill = kernel('fill(x[*]:float&, value) -> ');

function addInto(from: Tensor, into: Tensor, accumulate: boolean): void {
  launch(copy, [from], [{ into, accumulate }], unscoped);
}

/** Gradients of parameters are f32, and so is everything on the CPU; elsewhere a gradient has the dtype of what it belongs to. */
function gradientDType(t: Tensor): DType {
  return t.sink !== undefined || t.device === 'cpu' ? 'f32' : t.dtype;
}

/** A use of `gradient` in a dtype. */
function as(dtype: DType, gradient: Tensor): Tensor {
  if (gradient.dtype === dtype) return addUse(gradient);
  return addUse(launch(dtype === 'f32' ? toF32 : toBf16, [gradient], ['new'], unscoped)[0]!);
}

function ones(t: Tensor): Tensor {
  const one = addUse(unscopedLike(t, gradientDType(t)));
  launch(fill, [one, 1], [], unscoped);
  return one;
}

/** Records what `f` calls; `walk` or `drop` must follow. */
function recordCalls<T>(f: () => T): { value: T; nodes: TapeNode[] } {
  const nodes: TapeNode[] = [];
  try {
    return { value: withTape(nodes, f), nodes };
  } catch (error) {
    for (const node of nodes) node.release();
    throw error;
  }
}

function walk(nodes: TapeNode[], gradients: Gradients): void {
  withTape(undefined, () => {
    for (let node = nodes.pop(); node !== undefined; node = nodes.pop()) {
      try {
        if (node.outputs.some((t) => gradients.has(t))) node.backward(gradients);
      } catch (error) {
        for (const rest of nodes) rest.release();
        throw error;
      } finally {
        for (const t of node.outputs) gradients.drop(t);
        node.release();
      }
    }
  });
}

/**
 * Runs `f`, which returns a loss of one element, and adds the gradient of that loss to every {@link parameter} it came from.
 * Tensors saved for the backward pass are freed on the way. Parameter gradients stay until {@link zeroGrad}, so that calling it
 * for several micro-batches accumulates.
 * @returns the loss, still on the device.
 */
export function valueAndGrad(f: () => Tensor): Tensor {
  if (recording !== undefined) {
    throw new LimbeckError('valueAndGrad: already inside valueAndGrad; gradients of gradients are not supported', {
      code: 'ERR_NESTED_GRAD',
    });
  }
  return scope(() => {
    const { value: loss, nodes } = recordCalls(f);
    const gradients = new Gradients();
    try {
      if (loss.size !== 1) {
        throw new ShapeError(
          `valueAndGrad: the function returned shape [${loss.shape.join(' ')}], expected one element; use sum() or mean()`,
          {
            code: 'ERR_SHAPE',
            op: 'valueAndGrad',
          },
        );
      }
      gradients.seed(loss);
    } catch (error) {
      for (const node of nodes) node.release();
      throw error;
    }
    try {
      walk(nodes, gradients);
    } catch (error) {
      throw typed(error);
    } finally {
      gradients.clear();
    }
    return loss;
  });
}

/** Forgets the gradients of parameters and frees their memory: the next gradient is written instead of added. */
export function zeroGrad(parameters: Iterable<Tensor>): void {
  for (const t of parameters) t.sink?.drop();
}

/**
 * Activation checkpointing: keeps only the inputs of `f`, and runs it again in the backward pass. Same bits, less memory, one
 * more forward pass. `f` must depend on nothing but the inputs and parameters.
 * @param inputs tensors through which gradients flow into `f`.
 */
export function recompute(f: (...inputs: Tensor[]) => Tensor, ...inputs: Tensor[]): Tensor {
  if (recording === undefined) return scope(() => f(...inputs));
  const output = noGrad(() => scope(() => f(...inputs)));
  for (const t of inputs) addUse(t);
  record({
    op: 'recompute',
    outputs: [output],
    backward(gradients) {
      // The tape kept the inputs themselves: their scope may have ended, and nothing has to make them again.
      const kept = [...new Set(inputs)].map((t) => ({ t, held: t.held, recipe: t.recipe }));
      for (const { t } of kept) {
        t.held = true;
        t.recipe = undefined;
      }
      try {
        scope(() => {
          const { value, nodes } = recordCalls(() => scope(() => f(...inputs)));
          gradients.alias(output, value);
          walk(nodes, gradients);
        });
      } finally {
        for (const { t, held, recipe } of kept) {
          t.held = held;
          t.recipe = recipe;
        }
      }
    },
    release() {
      for (const t of inputs) releaseUse(t);
    },
  });
  return output;
}
