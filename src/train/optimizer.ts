// AdamW over all parameters of a model at once.
import type { Parameters, SpecTree } from '../nn/parameters.ts';
import { fill_ } from '../ops/elementwise.ts';
import { adamw_ } from '../ops/optimizer.ts';
import { squaredNorm } from '../ops/reduce.ts';
import { LimbeckError } from '../tensor/errors.ts';
import { keep, scope } from '../tensor/scope.ts';
import { zeroGrad } from '../tensor/tape.ts';
import { empty, type Tensor, tensor } from '../tensor/tensor.ts';
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
  const { values: p, gradients: g, list } = parameters;
  if (g === undefined)
    throw new LimbeckError('optimizer: the parameters are frozen; create or load the model as trainable', { code: 'ERR_FROZEN' });
  const moment = (): Tensor => {
    const t = keep(empty(p.shape));
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
        for (const { tensor: t } of list) if (t.sink?.written === false) fill_(t.sink.tensor, 0);
        const norm = squaredNorm(g);
        this.updates++;
        adamw_({ p, g, m, v, decay }, norm, {
          lr: learningRate,
          beta1,
          beta2,
          eps,
          weightDecay,
          clip: clip ?? Number.POSITIVE_INFINITY,
          step: this.updates,
        });
        zeroGrad(list.map((one) => one.tensor));
        return norm;
      });
    },
    dispose() {
      for (const t of [m, v, decay]) t.dispose();
    },
  };
}
