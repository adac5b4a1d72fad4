// The decoder's architectures as data: what each has, and its config.json in Transformers, in and out.
import type { RopeScaling } from '../ops/rotary.ts';
import type { LayerKind } from './config.ts';
import { layerKind } from './config.ts';
import type { DecoderConfig } from './decoder.ts';
import type { Fields } from './fields.ts';

type Architecture = DecoderConfig['architecture'];

/** An architecture. Defaults are those of its class in Transformers, for fields that a config.json leaves out. */
interface Family {
  /** Its class with an output head. */
  readonly model: string;
  /** What all its models have in common. */
  readonly always: Pick<DecoderConfig, 'activation' | 'normOffset' | 'postNorms' | 'queryKeyNorm' | 'scaledEmbedding'>;
  /**
   * Which layers look back only so far: `none`, `all` (where there is a window), `types` (as `layer_types` says), or `switch` (the same, where
   * `use_sliding_window` is true).
   */
  readonly windows: 'none' | 'all' | 'types' | 'switch';
  /** Without `layer_types`: what layer i sees. */
  readonly kind?: (i: number, f: Fields) => LayerKind;
  /** Biases of attention: `none`, of queries, keys and values always, or of all four as `attention_bias` says. */
  readonly biases: 'none' | 'qkv' | 'option';
  /** Whether the file may set the query scalar and the caps. */
  readonly scores?: true;
  readonly activations: { readonly field: 'hidden_act' | 'hidden_activation'; readonly names: readonly [string, ...string[]] };
  /** Whether heads may be turned in part, and by LongRoPE. */
  readonly long?: true;
  /** Null: width / heads. */
  readonly headSize: number | null;
  readonly window: number | null;
  readonly caps?: { readonly attention: number; readonly final: number };
  readonly ropeBase: number;
  readonly localRopeBase: number | null;
  readonly normEps: number;
  readonly context: number;
  readonly tied: boolean;
}

const llama = {
  always: { activation: 'silu', normOffset: 0, postNorms: false, queryKeyNorm: false, scaledEmbedding: false },
  activations: { field: 'hidden_act', names: ['silu', 'swish'] },
  headSize: null,
  window: null,
  ropeBase: 10_000,
  localRopeBase: null,
  normEps: 1e-6,
  tied: false,
} as const;

const gemma = {
  ...llama,
  always: { activation: 'gelu', normOffset: 1, postNorms: true, queryKeyNorm: false, scaledEmbedding: true },
  biases: 'option',
  activations: { field: 'hidden_activation', names: ['gelu_pytorch_tanh', 'gelu_new'] },
  headSize: 256,
  tied: true,
} as const;

const fromLayer = (i: number, f: Fields): LayerKind => (i >= f.number('max_window_layers', 28) ? 'local' : 'global');

export const families: Readonly<Record<Architecture, Family>> = {
  gemma: {
    ...gemma,
    model: 'GemmaForCausalLM',
    always: { ...gemma.always, postNorms: false },
    // Its first files say "gelu" and mean the tanh form.
    activations: { field: 'hidden_act', names: ['gelu_pytorch_tanh', 'gelu', 'gelu_new'] },
    windows: 'none',
    context: 8192,
  },
  gemma2: {
    ...gemma,
    model: 'Gemma2ForCausalLM',
    windows: 'types',
    kind: (i) => (i % 2 === 0 ? 'local' : 'global'),
    scores: true,
    caps: { attention: 50, final: 30 },
    window: 4096,
    context: 8192,
  },
  gemma3_text: {
    ...gemma,
    model: 'Gemma3ForCausalLM',
    always: { ...gemma.always, queryKeyNorm: true },
    windows: 'types',
    kind: (i, f) => ((i + 1) % f.number('sliding_window_pattern', 6) === 0 ? 'global' : 'local'),
    scores: true,
    window: 4096,
    ropeBase: 1_000_000,
    localRopeBase: 10_000,
    context: 131_072,
  },
  llama: { ...llama, model: 'LlamaForCausalLM', windows: 'none', biases: 'option', context: 2048 },
  mistral: { ...llama, model: 'MistralForCausalLM', windows: 'all', biases: 'none', window: 4096, context: 131_072 },
  qwen2: {
    ...llama,
    model: 'Qwen2ForCausalLM',
    windows: 'switch',
    kind: fromLayer,
    biases: 'qkv',
    window: 4096,
    context: 32_768,
  },
  qwen3: {
    ...llama,
    model: 'Qwen3ForCausalLM',
    always: { ...llama.always, queryKeyNorm: true },
    windows: 'switch',
    kind: fromLayer,
    biases: 'option',
    headSize: 128,
    window: 4096,
    context: 32_768,
  },
  phi3: { ...llama, model: 'Phi3ForCausalLM', windows: 'all', biases: 'none', long: true, normEps: 1e-5, context: 4096 },
  smollm3: {
    ...llama,
    model: 'SmolLM3ForCausalLM',
    windows: 'switch',
    kind: (i, f) => (rotaryOf('smollm3', f, i + 1)[i] ? 'global' : 'local'),
    biases: 'option',
    ropeBase: 2_000_000,
    context: 32_768,
    tied: true,
  },
};

/** The config of a config.json of one of the {@link families}. @throws FormatError naming a field that is missing, wrong or not supported */
export function readDecoder(architecture: Architecture, f: Fields): DecoderConfig {
  const family = families[architecture];
  f.only(family.activations.field, ...family.activations.names);
  f.only('mlp_bias', false);
  f.only('use_bidirectional_attention', false);
  if (family.biases === 'none') f.only('attention_bias', false);
  const layers = f.layers('num_hidden_layers');
  const heads = f.number('num_attention_heads');
  const width = f.number('hidden_size');
  const headSize = f.number('head_dim', family.headSize ?? width / heads);
  const biased = family.biases === 'option' && f.flag('attention_bias', false);
  return {
    architecture,
    ...family.always,
    vocabSize: f.number('vocab_size'),
    width,
    layers,
    heads,
    kvHeads: f.number('num_key_value_heads', heads),
    headSize,
    hidden: f.number('intermediate_size'),
    ...windowsOf(family, f, layers),
    tied: f.flag('tie_word_embeddings', family.tied),
    bias: { qkv: biased || family.biases === 'qkv', output: biased },
    attentionCap: family.scores ? f.optional('attn_logit_softcapping', family.caps?.attention) : null,
    finalCap: family.scores ? f.optional('final_logit_softcapping', family.caps?.final) : null,
    queryScalar: family.scores ? f.number('query_pre_attn_scalar', 256) : headSize,
    ...rotationOf(family, f),
    rotary: period(rotaryOf(architecture, f, layers)),
    normEps: f.number('rms_norm_eps', family.normEps),
    initStd: f.number('initializer_range', 0.02),
    context: f.number('max_position_embeddings', family.context),
  };
}

function windowsOf(family: Family, f: Fields, layers: number): Pick<DecoderConfig, 'window' | 'layerPattern'> {
  const global = { window: null, layerPattern: ['global'] } as const;
  if (family.windows === 'none' || (family.windows === 'switch' && !f.flag('use_sliding_window', false))) {
    return global;
  }
  const window = f.optional('sliding_window', family.window);
  if (window === null) return global;
  if (family.windows === 'all') return { window, layerPattern: ['local'] };
  const types = f.values.layer_types;
  if (types === undefined || types === null) {
    return { window, layerPattern: period(Array.from({ length: layers }, (_, i) => family.kind!(i, f))) };
  }
  const known: Readonly<Record<string, LayerKind>> = { sliding_attention: 'local', full_attention: 'global' };
  if (!Array.isArray(types) || types.length !== layers || !types.every((type) => Object.hasOwn(known, type))) {
    f.refuse('layer_types', `${layers} of "sliding_attention" and "full_attention"`);
  }
  return { window, layerPattern: period((types as string[]).map((type) => known[type]!)) };
}

/** Whether each layer turns its queries and keys. */
function rotaryOf(architecture: Architecture, f: Fields, layers: number): readonly boolean[] {
  if (architecture !== 'smollm3') return [true];
  const list = f.values.no_rope_layers;
  const every = f.number('no_rope_layer_interval', 4);
  if (list === undefined || list === null) return Array.from({ length: layers }, (_, i) => (i + 1) % every !== 0);
  if (!Array.isArray(list) || list.length < layers || !list.every((one) => one === 0 || one === 1)) {
    f.refuse('no_rope_layers', `a 0 or 1 for each of ${layers} layers`);
  }
  return (list as number[]).slice(0, layers).map(Boolean);
}

function rotationOf(
  family: Family,
  f: Fields,
): Pick<DecoderConfig, 'ropeBase' | 'localRopeBase' | 'ropeScaling' | 'rotaryShare'> {
  // Newer files have rope_parameters, one for each kind of layer where they differ; older ones rope_theta and rope_scaling.
  const parameters = f.inside('rope_parameters');
  const full = parameters?.inside('full_attention') ?? parameters;
  const local = parameters?.inside('sliding_attention');
  local?.only('rope_type', 'default');
  if (!family.long) for (const where of [f, full, local]) where?.only('partial_rotary_factor', 1);
  const old = f.inside('rope_scaling');
  const share = (full?.values.partial_rotary_factor === undefined ? f : full).number('partial_rotary_factor', 1);
  return {
    ropeBase: full?.values.rope_theta === undefined ? f.number('rope_theta', family.ropeBase) : full.number('rope_theta'),
    localRopeBase:
      family.localRopeBase === null
        ? null
        : (local ?? f).number(local === undefined ? 'rope_local_base_freq' : 'rope_theta', family.localRopeBase),
    ropeScaling: scalingOf(family, old ?? full, f),
    ...(share === 1 ? {} : { rotaryShare: share }),
  };
}

function scalingOf(family: Family, f: Fields | undefined, all: Fields): RopeScaling | null {
  if (f === undefined) return null;
  const context = all.values.max_position_embeddings;
  const name = f.values.rope_type === undefined ? 'type' : 'rope_type';
  const type = f.values[name] ?? 'default';
  if (type === 'default') return null;
  // The first files of Phi-3 call it "su".
  if (family.long && (type === 'longrope' || type === 'su')) return longRope(family, f, all);
  if (type !== 'linear' && type !== 'llama3') return f.refuse(name, '"default", "linear" or "llama3"');
  const factor = f.number('factor');
  if (type === 'linear') return { kind: 'linear', factor };
  return {
    kind: 'llama3',
    factor,
    lowFrequency: f.number('low_freq_factor'),
    highFrequency: f.number('high_freq_factor'),
    context: f.number('original_max_position_embeddings', typeof context === 'number' ? context : undefined),
  };
}

function longRope(family: Family, f: Fields, all: Fields): RopeScaling {
  const list = (field: string): number[] => {
    const value = f.values[field];
    const numbers = Array.isArray(value) && value.every((one) => typeof one === 'number');
    return numbers ? value : f.refuse(field, 'a list of numbers');
  };
  const where = f.values.original_max_position_embeddings === undefined ? all : f;
  const original = where.number('original_max_position_embeddings');
  const factor = f.optional('factor') ?? all.number('max_position_embeddings', family.context) / original;
  return {
    kind: 'longrope',
    short: list('short_factor'),
    long: list('long_factor'),
    context: original,
    magnitude: f.optional('attention_factor') ?? usualMagnitude(factor, original),
  };
}

const usualMagnitude = (factor: number, context: number): number =>
  factor <= 1 ? 1 : Math.sqrt(1 + Math.log(factor) / Math.log(context));

/** The shortest list that, repeated, gives the list. */
function period<T>(list: readonly T[]): readonly T[] {
  for (let n = 1; n < list.length; n++) if (list.every((one, i) => one === list[i % n])) return list.slice(0, n);
  return list;
}

/** The fields of a config.json. */
export function writeDecoder(c: DecoderConfig): Record<string, unknown> {
  const family = families[c.architecture];
  const each = <T>(of: (i: number) => T): T[] => Array.from({ length: c.layers }, (_, i) => of(i));
  const kinds = each((i) => layerKind(c, i));
  const firstLocal = kinds.indexOf('local');
  return {
    architectures: [family.model],
    model_type: c.architecture,
    vocab_size: c.vocabSize,
    hidden_size: c.width,
    num_hidden_layers: c.layers,
    num_attention_heads: c.heads,
    num_key_value_heads: c.kvHeads,
    head_dim: c.headSize,
    intermediate_size: c.hidden,
    ...(family.windows === 'none' ? {} : { sliding_window: c.window }),
    ...(family.windows === 'switch'
      ? { use_sliding_window: c.window !== null, max_window_layers: firstLocal < 0 ? c.layers : firstLocal }
      : {}),
    ...(family.windows === 'types' || family.windows === 'switch'
      ? { layer_types: kinds.map((kind) => (kind === 'local' ? 'sliding_attention' : 'full_attention')) }
      : {}),
    ...(c.architecture === 'smollm3' ? { no_rope_layers: each((i) => Number(c.rotary[i % c.rotary.length])) } : {}),
    ...(family.scores
      ? {
          attn_logit_softcapping: c.attentionCap,
          final_logit_softcapping: c.finalCap,
          query_pre_attn_scalar: c.queryScalar,
        }
      : {}),
    ...rotationFields(c),
    rms_norm_eps: c.normEps,
    initializer_range: c.initStd,
    max_position_embeddings: c.context,
    [family.activations.field]: family.activations.names[0],
    ...(family.biases === 'option' ? { attention_bias: c.bias.qkv } : {}),
    attention_dropout: 0,
    tie_word_embeddings: c.tied,
  };
}

function rotationFields(c: DecoderConfig): Record<string, unknown> {
  const { ropeBase, localRopeBase, rotaryShare = 1 } = c;
  const scaling = scalingFields(c);
  const share = rotaryShare === 1 ? {} : { partial_rotary_factor: rotaryShare };
  const full = { rope_type: 'default', ...scaling, ...share, rope_theta: ropeBase };
  return {
    rope_theta: ropeBase,
    ...share,
    ...(localRopeBase === null ? {} : { rope_local_base_freq: localRopeBase }),
    ...oldScalingFields(c, scaling),
    rope_parameters:
      localRopeBase === null
        ? full
        : { full_attention: full, sliding_attention: { rope_type: 'default', rope_theta: localRopeBase } },
  };
}

function scalingFields({ ropeScaling: s }: DecoderConfig): Record<string, unknown> | undefined {
  switch (s?.kind) {
    case undefined:
      return undefined;
    case 'linear':
      return { rope_type: 'linear', factor: s.factor };
    case 'llama3':
      return {
        rope_type: 'llama3',
        factor: s.factor,
        low_freq_factor: s.lowFrequency,
        high_freq_factor: s.highFrequency,
        original_max_position_embeddings: s.context,
      };
    case 'longrope':
      return {
        rope_type: 'longrope',
        short_factor: s.short,
        long_factor: s.long,
        attention_factor: s.magnitude,
        original_max_position_embeddings: s.context,
      };
  }
}

/** As readers of older files want them: those of LongRoPE suffer three fields only, and look for the context elsewhere. */
function oldScalingFields({ ropeScaling: s, context }: DecoderConfig, fields: object | undefined): Record<string, unknown> {
  if (s?.kind !== 'longrope') return fields === undefined ? {} : { rope_scaling: fields };
  const own = s.magnitude === usualMagnitude(context / s.context, s.context) ? {} : { attention_factor: s.magnitude };
  return {
    rope_scaling: { type: 'longrope', short_factor: s.short, long_factor: s.long, ...own },
    original_max_position_embeddings: s.context,
  };
}
