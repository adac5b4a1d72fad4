// config.json of Transformers, to and from our own.
import { FormatError } from '../tensor/errors.ts';
import type { Tokenizer } from '../tokenizer/tokenizer.ts';
import { layerKind } from './config.ts';
import { checkDecoder, type DecoderConfig } from './decoder.ts';

/** What Transformers reads. */
export function toTransformers(c: DecoderConfig, tokenizer?: Tokenizer): Record<string, unknown> {
  return {
    architectures: ['Gemma2ForCausalLM'],
    model_type: 'gemma2',
    vocab_size: c.vocabSize,
    hidden_size: c.width,
    num_hidden_layers: c.layers,
    num_attention_heads: c.heads,
    num_key_value_heads: c.kvHeads,
    head_dim: c.headSize,
    intermediate_size: c.hidden,
    sliding_window: c.window,
    layer_types: Array.from({ length: c.layers }, (_, i) =>
      layerKind(c, i) === 'local' ? 'sliding_attention' : 'full_attention',
    ),
    attn_logit_softcapping: c.attentionCap,
    final_logit_softcapping: c.finalCap,
    query_pre_attn_scalar: c.queryScalar,
    rope_theta: c.ropeBase,
    rope_parameters: { rope_type: 'default', rope_theta: c.ropeBase },
    rms_norm_eps: c.normEps,
    initializer_range: c.initStd,
    max_position_embeddings: c.context,
    hidden_activation: 'gelu_pytorch_tanh',
    attention_bias: false,
    attention_dropout: 0,
    tie_word_embeddings: true,
    torch_dtype: 'float32',
    bos_token_id: tokenizer?.bos ?? null,
    eos_token_id: tokenizer?.eos ?? null,
    pad_token_id: tokenizer?.pad ?? null,
  };
}

/**
 * {@link toTransformers} as the text of a config.json, where a float keeps its point: Transformers refuses a cap of 30, it wants 30.0.
 * @param more fields for other readers
 */
export function transformersText(c: DecoderConfig, tokenizer?: Tokenizer, more: Readonly<Record<string, unknown>> = {}): string {
  const text = JSON.stringify({ ...toTransformers(c, tokenizer), ...more }, null, 2);
  const whole =
    /("(?:attn_logit_softcapping|final_logit_softcapping|rope_theta|rms_norm_eps|initializer_range|attention_dropout)": \d+)(?=[,\n])/g;
  return `${text.replace(whole, '$1.0')}\n`;
}

/**
 * Reads a config.json.
 * @param where the file, for errors
 * @throws FormatError for another architecture, a missing field, or an option that this model does not have.
 */
export function fromTransformers(json: unknown, where: string): DecoderConfig {
  const refuse = (field: string, expected: string, actual: unknown): never => {
    throw new FormatError(`${where}: ${field} is ${JSON.stringify(actual)}, expected ${expected}`, {
      code: 'ERR_CHECKPOINT',
      op: 'loadModel',
      argument: field,
      expected,
      actual: String(JSON.stringify(actual)),
    });
  };
  if (typeof json !== 'object' || json === null || Array.isArray(json)) refuse('the file', 'an object', json);
  const j = json as Record<string, unknown>;
  const number = (field: string, fallback?: number): number => {
    const value = j[field] ?? fallback;
    return typeof value === 'number' && Number.isFinite(value) ? value : refuse(field, 'a number', j[field]);
  };
  const cap = (field: string): number | null => (j[field] === null || j[field] === undefined ? null : number(field));
  if (j.model_type !== 'gemma2') refuse('model_type', '"gemma2"', j.model_type);
  if (j.attention_bias === true) refuse('attention_bias', 'false', true);
  if (j.tie_word_embeddings === false) refuse('tie_word_embeddings', 'true', false);
  const activation = j.hidden_activation ?? 'gelu_pytorch_tanh';
  if (activation !== 'gelu_pytorch_tanh') refuse('hidden_activation', '"gelu_pytorch_tanh"', activation);
  const layers = number('num_hidden_layers');
  const types = j.layer_types;
  if (Array.isArray(types)) {
    const wrong = types.findIndex((t, i) => t !== (i % 2 === 0 ? 'sliding_attention' : 'full_attention'));
    if (wrong >= 0 || types.length !== layers)
      refuse('layer_types', 'sliding_attention and full_attention in turn, one a layer', types);
  }
  const rope = (j.rope_parameters ?? {}) as Record<string, unknown>;
  if (rope.rope_type !== undefined && rope.rope_type !== 'default')
    refuse('rope_parameters.rope_type', '"default"', rope.rope_type);
  const config: DecoderConfig = {
    architecture: 'gemma2',
    layerPattern: ['local', 'global'],
    activation: 'gelu',
    normOffset: 1,
    postNorms: true,
    queryKeyNorm: false,
    scaledEmbedding: true,
    tied: true,
    bias: { qkv: false, output: false },
    localRopeBase: null,
    ropeScaling: null,
    rotary: [true],
    vocabSize: number('vocab_size'),
    width: number('hidden_size'),
    layers,
    heads: number('num_attention_heads'),
    kvHeads: number('num_key_value_heads'),
    headSize: number('head_dim'),
    hidden: number('intermediate_size'),
    window: number('sliding_window'),
    attentionCap: cap('attn_logit_softcapping'),
    finalCap: cap('final_logit_softcapping'),
    queryScalar: number('query_pre_attn_scalar'),
    ropeBase: typeof rope.rope_theta === 'number' ? rope.rope_theta : number('rope_theta', 10_000),
    normEps: number('rms_norm_eps', 1e-6),
    initStd: number('initializer_range', 0.02),
    context: number('max_position_embeddings', 8192),
  };
  checkDecoder(config);
  return config;
}
