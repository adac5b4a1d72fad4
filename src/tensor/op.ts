// An op: a forward signature, and a backward signature that is also its rule on the tape.
import { LimbeckError } from './errors.ts';
import { type Argument, type Kernel, kernel, launch, type Request } from './kernel.ts';
import type { TensorDefinition } from './native.ts';
import { letGo, type Recipe, restore, save } from './saved.ts';
import { type Gradients, isRecording, record } from './tape.ts';
import { addUse, adopt, releaseUse, type Tensor, unscoped } from './tensor.ts';

export interface OpSpec {
  readonly forward: string;
  /**
   * Names are looked up among the forward's inputs, outputs and scalars, and as `d` + output; its outputs are `d` + input.
   * What is named here is what the tape keeps alive.
   */
  readonly backward?: string;
  /**
   * A loss head: its first output is a total whose gradient is 1, and outputs named `d` + input are made in the same pass, when a
   * tape wants them.
   */
  readonly head?: boolean;
  /** Default of {@link CallOptions.cheap}. */
  readonly cheap?: boolean;
  /**
   * Outputs of the backward kernel that may take the place of an input that nobody needs afterwards, as in `{ dgate: 'gate' }`: the kernel
   * reads an element before it writes it. Such an output does not accumulate.
   */
  readonly inPlace?: Readonly<Record<string, string>>;
}

/** Options of one call, after its arguments. */
export interface CallOptions {
  /** For each output, whether it is wanted, or the tensor to overwrite. Default: all, except the gradients of a loss head. */
  readonly outputs?: readonly (boolean | Tensor)[];
  /** A tape makes the first output again in the backward pass instead of keeping it: for what takes one pass over memory. Same bits. */
  readonly cheap?: boolean;
}

/** Calls the op: tensors and numbers in the order of the signature, undefined for an absent optional tensor, then options. */
export type Op = (...args: (Argument | CallOptions)[]) => Tensor[];

type Source = { from: 'input' | 'output' | 'gradient'; index: number };

interface BackwardPlan {
  readonly kernel: Kernel;
  readonly sources: readonly Source[];
  /** For each output of the backward kernel, the forward argument it is the gradient of. */
  readonly targets: readonly number[];
  readonly aliases: readonly { readonly argument: number; readonly output: number }[];
  /** For each output of the backward kernel, the forward argument whose place it may take. */
  readonly places: readonly (number | undefined)[];
  readonly savedInputs: readonly number[];
  readonly savedOutputs: readonly number[];
}

/**
 * Declares an op.
 * @throws LimbeckError `ERR_SIGNATURE` at the first call, when a backward name is unknown.
 */
export function op(spec: OpSpec): Op {
  const forward = kernel(spec.forward);
  const backward = spec.backward === undefined ? undefined : kernel(spec.backward);
  let plan: BackwardPlan | undefined;

  return (...given) => {
    const info = forward.info();
    const last = given[info.arguments.length];
    const options: CallOptions = typeof last === 'object' && !('handle' in last) ? last : {};
    const args = (given.length > info.arguments.length && last === options ? given.slice(0, -1) : given) as Argument[];
    if (args.length !== info.arguments.length) {
      throw new LimbeckError(`${info.op}: ${args.length} arguments given, the op is ${spec.forward}`, {
        code: 'ERR_ARGUMENTS',
        op: info.op,
      });
    }
    const tracked = isRecording() && args.some((a) => typeof a === 'object' && a.tracked);
    const heads = spec.head === true ? headGradients(info.outputs, info.arguments, args, tracked) : undefined;
    const requests = info.outputs.map((output, i): Request => {
      const head = heads?.[i];
      if (head !== undefined) return head;
      const wanted = options.outputs?.[i] ?? true;
      if (typeof wanted === 'object') return { into: wanted, accumulate: false };
      return wanted && !(heads !== undefined && isGradientName(output.name, info.arguments)) ? 'new' : 'skip';
    });
    const outputs = launch(forward, args, requests, adopt, true);
    if (tracked) {
      if (heads !== undefined) {
        recordHead(info.op, args, info.arguments, info.outputs, outputs, requests);
      } else if (backward !== undefined) {
        plan ??= makePlan(forward, backward, spec.inPlace ?? {});
        const cheap = options.cheap ?? spec.cheap ?? false;
        recordCall(info.op, plan, args, outputs, cheap);
        if (cheap) outputs[0]!.recipe = recipeOf(forward, args);
      } else {
        throw new LimbeckError(`${info.op}: no gradient is defined; call it inside noGrad() if none is wanted`, {
          code: 'ERR_NO_GRADIENT',
          op: info.op,
        });
      }
    }
    // A skipped output is a hole that callers do not look at.
    return outputs as Tensor[];
  };
}

function makePlan(forward: Kernel, backward: Kernel, inPlace: Readonly<Record<string, string>>): BackwardPlan {
  const f = forward.info();
  const b = backward.info();
  const input = (name: string): number => f.arguments.findIndex((a) => a.name === name);
  const output = (name: string): number => f.outputs.findIndex((o) => o.name === name);
  const unknown = (name: string): never => {
    throw new LimbeckError(`${b.op}: unknown name '${name}' in '${backward.text}'; the forward is '${forward.text}'`, {
      code: 'ERR_SIGNATURE',
      op: b.op,
    });
  };
  const sources = b.arguments.map(({ name }): Source => {
    if (input(name) >= 0) return { from: 'input', index: input(name) };
    if (output(name) >= 0) return { from: 'output', index: output(name) };
    if (name.startsWith('d') && output(name.slice(1)) >= 0) return { from: 'gradient', index: output(name.slice(1)) };
    return unknown(name);
  });
  const targetOf = (name: string): number =>
    name.startsWith('d') && input(name.slice(1)) >= 0 ? input(name.slice(1)) : unknown(name);
  const used = (from: Source['from']): number[] => [
    ...new Set(sources.filter((s) => s.from === from && !(from === 'input' && f.arguments[s.index]!.scalar)).map((s) => s.index)),
  ];
  return {
    kernel: backward,
    sources,
    targets: b.outputs.map((o) => targetOf(o.name)),
    aliases: b.aliases.map((a) => ({ argument: targetOf(a.name), output: output(a.of.slice(1)) })),
    places: b.outputs.map(({ name }) => (inPlace[name] === undefined ? undefined : input(inPlace[name]))),
    savedInputs: used('input'),
    savedOutputs: used('output'),
  };
}

function recordCall(
  name: string,
  plan: BackwardPlan,
  args: readonly Argument[],
  outputs: readonly (Tensor | undefined)[],
  cheap: boolean,
): void {
  const saved: Tensor[] = [];
  // To make the output again takes all inputs. Those that a gradient flows to are kept by their own call; the others are kept here.
  if (cheap) for (const a of args) if (typeof a === 'object' && !a.tracked) saved.push(save(a));
  for (const i of plan.savedInputs) if (typeof args[i] === 'object') saved.push(save(args[i] as Tensor));
  for (const i of plan.savedOutputs) if (outputs[i] !== undefined) saved.push(save(outputs[i]));
  record({
    op: name,
    outputs: outputs.filter((t) => t !== undefined),
    backward(gradients) {
      const wanted = plan.targets.map((i) =>
        typeof args[i] === 'object' && (args[i] as Tensor).tracked ? (args[i] as Tensor) : undefined,
      );
      if (wanted.some((t) => t !== undefined)) callBackward(plan, args, outputs, wanted, gradients);
      for (const alias of plan.aliases) {
        const to = args[alias.argument];
        if (typeof to === 'object' && to.tracked) gradients.alias(outputs[alias.output]!, to);
      }
    },
    release() {
      for (const t of saved) letGo(t);
    },
  });
}

/** How to make the first output of a call again. */
function recipeOf(forward: Kernel, args: readonly Argument[]): Recipe {
  return {
    inputs: args.filter((a) => typeof a === 'object'),
    make() {
      const given = args.map((a) => (typeof a === 'object' ? restore(a) : a));
      const requests = forward.info().outputs.map((_, i): Request => (i === 0 ? 'new' : 'skip'));
      return addUse(launch(forward, given, requests, unscoped)[0]!);
    },
    made: undefined,
    users: 0,
  };
}

function callBackward(
  plan: BackwardPlan,
  args: readonly Argument[],
  outputs: readonly (Tensor | undefined)[],
  wanted: readonly (Tensor | undefined)[],
  gradients: Gradients,
): void {
  const info = plan.kernel.info();
  const given = plan.sources.map((s): Argument => {
    const argument = args[s.index];
    if (s.from === 'input') return typeof argument === 'object' ? restore(argument) : argument;
    const t = outputs[s.index];
    return t === undefined || s.from === 'output' ? t : gradients.get(t);
  });
  const seen = new Set<Tensor>();
  const requests = wanted.map((t, i): Request => {
    if (t === undefined) return 'skip';
    const place = plan.places[i] === undefined ? undefined : args[plan.places[i]];
    if (typeof place === 'object' && isLast(place)) return { into: place, accumulate: false };
    // The same tensor given twice (mul(x, x)): the second gradient is added by put().
    if (!info.outputs[i]!.accumulates || !fitsSink(t, info.outputs[i]!) || seen.has(t)) return 'new';
    seen.add(t);
    const target = gradients.target(t);
    return target === undefined ? 'new' : { into: target.tensor, accumulate: target.accumulate };
  });
  const made = launch(plan.kernel, given, requests, unscoped);
  made.forEach((gradient, i) => {
    const t = wanted[i];
    if (gradient === undefined || t === undefined) return;
    if (typeof requests[i] === 'object' && plan.places[i] === undefined) {
      gradients.wrote(t);
      return;
    }
    addUse(gradient);
    gradients.put(t, gradient);
    releaseUse(gradient);
  });
}

/** Whether a saved tensor is only needed by the call that is going back now, so that its memory may be written. */
function isLast(t: Tensor): boolean {
  return t.uses === 1 && !t.held && !t.shared && t.recipe === undefined;
}

interface Named {
  readonly name: string;
}

function isGradientName(name: string, args: readonly Named[]): boolean {
  return name.startsWith('d') && args.some((a) => a.name === name.slice(1));
}

/** What a loss head is asked to do with the gradients it can make: outputs `d` + input of tracked inputs. */
function headGradients(
  outputs: readonly TensorDefinition[],
  names: readonly Named[],
  args: readonly Argument[],
  tracked: boolean,
): (Request | undefined)[] {
  return outputs.map((output) => {
    const input = args[names.findIndex((a) => output.name === `d${a.name}`)];
    if (!tracked || typeof input !== 'object' || !input.tracked) return undefined;
    if (input.sink === undefined || !fitsSink(input, output)) return 'new';
    return { into: input.sink.tensor(), accumulate: input.sink.written };
  });
}

/** Gradients of parameters are f32: one that is made in bf16 is converted on its way to them. */
function fitsSink(t: Tensor, output: TensorDefinition): boolean {
  return t.sink === undefined || t.dtype === 'f32' || output.f32;
}

function recordHead(
  name: string,
  args: readonly Argument[],
  names: readonly Named[],
  outputNames: readonly Named[],
  outputs: (Tensor | undefined)[],
  requests: readonly Request[],
): void {
  const made: { of: Tensor; gradient: Tensor }[] = [];
  outputNames.forEach((output, i) => {
    const input = args[names.findIndex((a) => output.name === `d${a.name}`)];
    const gradient = outputs[i];
    if (typeof input !== 'object' || gradient === undefined) return;
    if (input.sink !== undefined && typeof requests[i] === 'object') input.sink.written = true;
    else made.push({ of: input, gradient: addUse(gradient) });
  });
  const total = outputs[0]!;
  record({
    op: name,
    outputs: [total],
    backward(gradients) {
      if (!gradients.isUnit(total)) {
        throw new LimbeckError(
          `${name}: the total of a loss head must be what valueAndGrad() returns, alone or in a sum with others; scale it through its weights`,
          { code: 'ERR_LOSS_HEAD', op: name },
        );
      }
      for (const { of, gradient } of made) gradients.put(of, gradient);
    },
    release() {
      for (const { gradient } of made) releaseUse(gradient);
    },
  });
}
