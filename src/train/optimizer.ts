// AdamW over all parameters of a model at once.

import { block, type Parameters, type SpecTree } from '../nn/parameters.ts';
import { fill_ } from '../ops/elementwise.ts';
import { type AdamWState, adamw_, type Moment8, momentBlock } from '../ops/optimizer.ts';
import { squaredNorm } from '../ops/reduce.ts';
import { checkObject } from '../tensor/argument.ts';
import { LimbeckError } from '../tensor/errors.ts';
import { randomBlock } from '../tensor/random.ts';
import { keep, scope } from '../tensor/scope.ts';
import { zeroGrad } from '../tensor/tape.ts';
import { empty, type Tensor, tensor, viewOf, zeros } from '../tensor/tensor.ts';
import type { RunConfig } from './config.ts';

export interface Optimizer {
  /** What has to be kept for an exact resume, by name: the moments, laid out like the parameters; with 8 bits their scales, too. */
  readonly state: Readonly<Record<string, Tensor>>;
  /** Updates made so far. */
  updates: number;
  /**
   * One update from the gradients, which are forgotten afterwards. A gradient that is not finite changes nothing.
   * @returns the squared norm of the gradient before clipping [], f64; the caller frees it.
   */
  step(learningRate: number): Tensor;
  dispose(): void;
}

/** Options of AdamW, as in a run. */
export type OptimizerOptions = Pick<RunConfig['optimizer'], 'beta1' | 'beta2' | 'eps' | 'weightDecay' | 'clip'> &
  Partial<RunConfig['optimizer']> & {
    /** Of the rounding of bf16 parameters that have no f32 originals. Default 0. */
    readonly seed?: number;
  };

export function createOptimizer(parameters: Parameters<SpecTree>, options: OptimizerOptions): Optimizer {
  checkObject('createOptimizer', 'parameters', parameters, "a model's or an adapter's parameters", 'values', 'groups');
  checkObject(
    'createOptimizer',
    'options',
    options,
    'settings such as { beta1: 0.9, beta2: 0.95, eps: 1e-8, weightDecay: 0.1, clip: 1 }',
  );
  const { values, copies, groups, list } = parameters;
  if (groups.length === 0)
    throw new LimbeckError('optimizer: the parameters are frozen; create or load the model as trainable', { code: 'ERR_FROZEN' });
  const { beta1, beta2, eps, weightDecay, clip, seed, moments = 'f32' } = options;
  const n = values.size;
  const f32 = (size: number): Tensor => {
    const t = empty([size]);
    fill_(t, 0);
    return t;
  };
  // All of them or none: where one finds no room, the scope frees the others.
  const { state, decay } = keep(
    scope((): { state: Record<string, Tensor>; decay: Tensor } => ({
      state:
        moments === 'f32'
          ? { m: f32(n), v: f32(n) }
          : {
              m: zeros([n], 'u8'),
              v: zeros([n], 'u8'),
              'm.scale': f32(Math.ceil(n / momentBlock)),
              'v.scale': f32(Math.ceil(n / momentBlock)),
            },
      decay: tensor(parameters.decay),
    })),
  );
  /** The part of a moment that belongs to a group. */
  const moment = (name: string, offset: number, size: number): Tensor | Moment8 => {
    const part = viewOf(state[name]!, [size], offset);
    const scales = state[`${name}.scale`];
    if (scales === undefined) return part;
    return { codes: part, scales: viewOf(scales, [size / momentBlock], offset / momentBlock) };
  };
  const seeds = seed === undefined ? undefined : groups.map((_, index) => groupSeed(seed, index));
  return {
    state,
    updates: 0,
    step(learningRate) {
      return scope(() => {
        let norm: Tensor | undefined;
        for (const group of groups) norm = squaredNorm(group.gradient(), norm);
        this.updates++;
        const rates = new Map<number, Tensor>();
        for (const { rate } of groups)
          rates.set(rate, rates.get(rate) ?? tensor(Float64Array.of(learningRate * rate, this.updates)));
        for (const [index, { offset, size, rate, gradient }] of groups.entries()) {
          const update: AdamWState = {
            p: viewOf(values, [size], offset),
            g: gradient(),
            m: moment('m', offset, size),
            v: moment('v', offset, size),
            decay: viewOf(decay, [size / block], offset / block),
            copy: copies === undefined ? undefined : viewOf(copies, [size], offset),
          };
          adamw_(update, norm!, {
            rates: rates.get(rate),
            lr: learningRate * rate,
            beta1,
            beta2,
            eps,
            weightDecay,
            clip: clip ?? Number.POSITIVE_INFINITY,
            step: this.updates,
            ...(seeds === undefined ? {} : { seed: seeds[index]! }),
          });
        }
        zeroGrad(list.map((one) => one.tensor));
        return norm!;
      });
    },
    dispose() {
      for (const t of [...Object.values(state), decay]) t.dispose();
    },
  };
}

// Above the numbers of other streams of the seed.
const roundingStream = 2 ** 41;

/** A seed for each group of parameters, in [0, 2^53): what is rounded by chance counts its elements from the group's first. */
function groupSeed(seed: number, index: number): number {
  const [high = 0, low = 0] = randomBlock(seed, roundingStream, index);
  return high * 2 ** 21 + (low >>> 11);
}
