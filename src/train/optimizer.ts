// AdamW over all parameters of a model at once.
import { block, type Parameters, type SpecTree } from '../nn/parameters.ts';
import { fill_ } from '../ops/elementwise.ts';
import { adamw_ } from '../ops/optimizer.ts';
import { squaredNorm } from '../ops/reduce.ts';
import { LimbeckError } from '../tensor/errors.ts';
import { keep, scope } from '../tensor/scope.ts';
import { zeroGrad } from '../tensor/tape.ts';
import { empty, type Tensor, tensor, viewOf } from '../tensor/tensor.ts';
import type { RunConfig } from './config.ts';

export interface Optimizer {
  /** First and second moments, laid out like the parameters. */
  readonly m: Tensor;
  readonly v: Tensor;
  /** Updates made so far. */
  updates: number;
  /**
   * One update from the gradients, which are forgotten afterwards. A gradient that is not finite changes nothing.
   * @returns the squared norm of the gradient before clipping [], f64; the caller frees it.
   */
  step(learningRate: number): Tensor;
  dispose(): void;
}

export function createOptimizer(parameters: Parameters<SpecTree>, options: RunConfig['optimizer']): Optimizer {
  const { values, groups, list } = parameters;
  if (groups.length === 0)
    throw new LimbeckError('optimizer: the parameters are frozen; create or load the model as trainable', { code: 'ERR_FROZEN' });
  const moment = (): Tensor => {
    const t = keep(empty(values.shape));
    fill_(t, 0);
    return t;
  };
  const m = moment();
  const v = moment();
  const decay = keep(tensor(parameters.decay));
  const { beta1, beta2, eps, weightDecay, clip } = options;
  return {
    m,
    v,
    updates: 0,
    step(learningRate) {
      return scope(() => {
        let norm: Tensor | undefined;
        for (const group of groups) norm = squaredNorm(group.gradient(), norm);
        this.updates++;
        for (const { offset, size, gradient } of groups) {
          const part = (t: Tensor): Tensor => viewOf(t, [size], offset);
          const state = {
            p: part(values),
            g: gradient(),
            m: part(m),
            v: part(v),
            decay: viewOf(decay, [size / block], offset / block),
          };
          adamw_(state, norm!, {
            lr: learningRate,
            beta1,
            beta2,
            eps,
            weightDecay,
            clip: clip ?? Number.POSITIVE_INFINITY,
            step: this.updates,
          });
        }
        zeroGrad(list.map((one) => one.tensor));
        return norm!;
      });
    },
    dispose() {
      for (const t of [m, v, decay]) t.dispose();
    },
  };
}
