// What models of all architectures share: dimensions, what goes in, how a layer looks back.
import { ConfigError } from '../tensor/errors.ts';
import type { Tensor } from '../tensor/tensor.ts';
import type { CacheRows } from './cache.ts';

/** Dimensions that loops, caches and plans ask for. */
export interface BaseConfig {
  /** Transformers' `model_type`. */
  readonly architecture: string;
  /** Rows of the embedding table, and of the output head. */
  readonly vocabSize: number;
  readonly width: number;
  readonly layers: number;
  readonly heads: number;
  /** Each serves `heads / kvHeads` query heads. */
  readonly kvHeads: number;
  readonly headSize: number;
  /** Width inside the feed-forward block, of each of its branches where it has two. */
  readonly hidden: number;
  /** Keys that a local layer sees, the token itself included; null where all layers are global. */
  readonly window: number | null;
  /** What each layer sees, repeated over the layers: `local` the last `window` keys, `global` all before it. */
  readonly layerPattern: readonly LayerKind[];
  /** Soft cap of logits; null for none. */
  readonly finalCap: number | null;
  /** Added to the mean square, or the variance, inside norms. */
  readonly normEps: number;
  /** Standard deviation of the initial weights. */
  readonly initStd: number;
  /** Most tokens of a sequence. */
  readonly context: number;
}

export type LayerKind = 'local' | 'global';

/** What layer `i` sees. */
export function layerKind({ layerPattern }: Pick<BaseConfig, 'layerPattern'>, i: number): LayerKind {
  return layerPattern[i % layerPattern.length]!;
}

/** Keys that layer `i` sees, itself included; null for all. */
export function layerWindow(c: Pick<BaseConfig, 'layerPattern' | 'window'>, i: number): number | null {
  return layerKind(c, i) === 'local' ? c.window : null;
}

/** What a model reads. */
export interface ModelInput {
  /** Token ids [B T], i32. */
  readonly ids: Tensor;
  /** Place of each token in its document [B T], i32. */
  readonly positions: Tensor;
  /** Index in the row of the first token of each token's document [B T], i32; absent: each row is one document. */
  readonly starts?: Tensor | undefined;
  /** Keys and values of the tokens before, for generation: {@link cacheRows}. */
  readonly cache?: CacheRows | undefined;
}

export interface ForwardOptions {
  /** Keep only each layer's input and compute the layer again in the backward pass. Default false. */
  readonly recompute?: boolean;
  /** Changes the embeddings [B T C] before the first layer: noise, for one. Default: they stay as they are. */
  readonly embedded?: (x: Tensor) => Tensor;
}

/** Makes and throws the error of a field of an architecture's config. */
export function refusal(architecture: string): (field: string, expected: string, actual: unknown) => never {
  return (field, expected, actual) => {
    const shown = typeof actual === 'object' ? JSON.stringify(actual) : String(actual);
    throw new ConfigError(`${architecture}: ${field} is ${shown}, expected ${expected}`, {
      code: 'ERR_CONFIG',
      op: architecture,
      argument: field,
      expected,
      actual: shown,
    });
  };
}

/** @throws ConfigError for dimensions that no model has. */
export function checkDimensions(c: BaseConfig): void {
  const refuse = refusal(c.architecture);
  for (const field of ['vocabSize', 'width', 'layers', 'heads', 'kvHeads', 'headSize', 'hidden', 'context'] as const) {
    if (!Number.isInteger(c[field]) || c[field] < 1) refuse(field, 'a whole number of 1 or more', c[field]);
  }
  if (c.heads % c.kvHeads !== 0) refuse('kvHeads', `a divisor of heads (${c.heads})`, c.kvHeads);
  if (c.layerPattern.length === 0 || !c.layerPattern.every((kind) => kind === 'local' || kind === 'global')) {
    refuse('layerPattern', `a list of 'local' and 'global'`, c.layerPattern);
  }
  if ((c.window !== null || c.layerPattern.includes('local')) && !(Number.isInteger(c.window) && c.window! >= 1)) {
    refuse('window', 'a whole number of 1 or more, or null where all layers are global', c.window);
  }
  if (c.finalCap !== null && !(c.finalCap > 0 && Number.isFinite(c.finalCap))) {
    refuse('finalCap', 'a positive number or null', c.finalCap);
  }
  if (!(c.normEps > 0 && Number.isFinite(c.normEps))) refuse('normEps', 'a positive number', c.normEps);
}
