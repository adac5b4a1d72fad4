// GPT-2 (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019): LayerNorm, learned positions, biases.
//   B batch, T tokens, C width, H heads, D head size, F hidden width, V vocabulary, P positions
import { matrix, type Tensors, vector, weight } from '../nn/parameters.ts';
import { gelu } from '../ops/activation.ts';
import { add } from '../ops/elementwise.ts';
import { embedding } from '../ops/embedding.ts';
import { linear } from '../ops/linear.ts';
import { layerNorm } from '../ops/norm.ts';
import { reshape } from '../ops/reshape.ts';
import { scope } from '../tensor/scope.ts';
import { recompute } from '../tensor/tape.ts';
import type { Tensor } from '../tensor/tensor.ts';
import { attend } from './cache.ts';
import { type BaseConfig, checkDimensions, type ForwardOptions, type ModelInput, refusal } from './config.ts';
import type { Fields } from './fields.ts';

export interface Gpt2Config extends BaseConfig {
  readonly architecture: 'gpt2';
  /** Whether the embedding table is the output head too. */
  readonly tied: boolean;
}

/** @throws ConfigError naming the field. */
export function checkGpt2(c: Gpt2Config): void {
  const refuse = refusal('gpt2');
  checkDimensions(c);
  if (c.kvHeads !== c.heads) refuse('kvHeads', `heads (${c.heads}): its heads share no keys`, c.kvHeads);
  if (c.headSize * c.heads !== c.width) refuse('headSize', `width / heads (${c.width / c.heads})`, c.headSize);
  if (c.window !== null || c.layerPattern.includes('local')) refuse('window', 'null: its layers are all global', c.window);
  if (c.finalCap !== null) refuse('finalCap', 'null', c.finalCap);
}

/** The parameters, under the names that Transformers gives them; query, key and value are one matrix in files. */
export function gpt2Spec(c: Gpt2Config) {
  const { width, hidden, initStd: std } = c;
  const norm = (name: string) => ({ gain: vector(`${name}.weight`, width, 1), bias: vector(`${name}.bias`, width, 0) });
  const projection = (name: string, rows: number, cols: number, deviation = std) => ({
    weight: weight(`${name}.weight`, [rows, cols], deviation),
    bias: vector(`${name}.bias`, rows, 0),
  });
  // What is added to the residual stream begins smaller: each layer adds twice.
  const last = std / Math.sqrt(2 * c.layers);
  return {
    embed: matrix('transformer.wte.weight', [c.vocabSize, width], std),
    positions: matrix('transformer.wpe.weight', [c.context, width], std / 2),
    layers: Array.from({ length: c.layers }, (_, i) => {
      const at = `transformer.h.${i}`;
      return {
        attention: {
          norm: norm(`${at}.ln_1`),
          query: projection(`${at}.attn.q_proj`, width, width),
          key: projection(`${at}.attn.k_proj`, width, width),
          value: projection(`${at}.attn.v_proj`, width, width),
          output: projection(`${at}.attn.c_proj`, width, width, last),
        },
        feedForward: {
          norm: norm(`${at}.ln_2`),
          up: projection(`${at}.mlp.c_fc`, hidden, width),
          down: projection(`${at}.mlp.c_proj`, width, hidden, last),
        },
      };
    }),
    norm: norm('transformer.ln_f'),
    head: c.tied ? undefined : matrix('lm_head.weight', [c.vocabSize, width], std),
  };
}

export type Gpt2Parameters = Tensors<ReturnType<typeof gpt2Spec>>;
type LayerParameters = Gpt2Parameters['layers'][number];

/** The hidden states [B T C] after the last norm. @throws DataError, at the next read, for a position beyond the context. */
export function gpt2Hidden(p: Gpt2Parameters, c: Gpt2Config, input: ModelInput, options: ForwardOptions = {}): Tensor {
  const eps = c.normEps;
  let x = scope(() => add(embedding(input.ids, p.embed), embedding(input.positions, p.positions)));
  const next = (y: Tensor): void => {
    x.dispose();
    x = y;
  };
  if (options.embedded !== undefined) next(options.embedded(x));
  for (const [i, layer] of p.layers.entries()) {
    const run = (h: Tensor): Tensor => gpt2Layer(layer, c, i, h, input);
    next(options.recompute === true ? recompute(run, x) : scope(() => run(x)));
  }
  next(layerNorm(x, p.norm.gain, p.norm.bias, { eps }));
  return x;
}

function gpt2Layer(p: LayerParameters, c: Gpt2Config, index: number, x: Tensor, input: ModelInput): Tensor {
  const eps = c.normEps;
  const [b = 1, t = 1] = x.shape;
  const { attention: a, feedForward: f } = p;
  const h = layerNorm(x, a.norm.gain, a.norm.bias, { eps });
  const heads = (w: typeof a.query): Tensor => reshape(linear(h, w.weight, w.bias), [b, t, c.heads, c.headSize]);
  const mixed = attend(input, index, heads(a.query), { key: heads(a.key), value: heads(a.value) }, {});
  const y = add(x, linear(reshape(mixed, [b, t, -1]), a.output.weight, a.output.bias));

  const g = layerNorm(y, f.norm.gain, f.norm.bias, { eps });
  return add(y, linear(gelu(linear(g, f.up.weight, f.up.bias)), f.down.weight, f.down.bias));
}

/** The config of a config.json. @throws FormatError naming a field that is missing, wrong or not supported */
export function readGpt2(f: Fields): Gpt2Config {
  f.only('activation_function', 'gelu_new', 'gelu_pytorch_tanh');
  f.only('scale_attn_weights', true);
  f.only('scale_attn_by_inverse_layer_idx', false);
  f.only('add_cross_attention', false);
  const width = f.number('n_embd', 768);
  const heads = f.number('n_head', 12);
  return {
    architecture: 'gpt2',
    vocabSize: f.number('vocab_size', 50_257),
    width,
    layers: f.layers('n_layer', 12),
    heads,
    kvHeads: heads,
    headSize: width / heads,
    hidden: f.number('n_inner', 4 * width),
    window: null,
    layerPattern: ['global'],
    finalCap: null,
    normEps: f.number('layer_norm_epsilon', 1e-5),
    initStd: f.number('initializer_range', 0.02),
    context: f.number('n_positions', 1024),
    tied: f.flag('tie_word_embeddings', true),
  };
}

/** The fields of a config.json. */
export function writeGpt2(c: Gpt2Config): Record<string, unknown> {
  return {
    architectures: ['GPT2LMHeadModel'],
    model_type: 'gpt2',
    vocab_size: c.vocabSize,
    n_embd: c.width,
    n_layer: c.layers,
    n_head: c.heads,
    n_inner: c.hidden,
    n_positions: c.context,
    n_ctx: c.context,
    activation_function: 'gelu_new',
    layer_norm_epsilon: c.normEps,
    initializer_range: c.initStd,
    attn_pdrop: 0,
    embd_pdrop: 0,
    resid_pdrop: 0,
    tie_word_embeddings: c.tied,
  };
}
