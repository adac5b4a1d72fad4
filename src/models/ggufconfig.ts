// The metadata of a GGUF file that tells of a model's architecture, to and from our config.

import type { GgufHeader, GgufMetadata, GgufValue } from '../io/gguf-header.ts';
import { ConfigError, FormatError } from '../tensor/errors.ts';
import { type LayerKind, layerKind } from './config.ts';
import { checkDecoder, type DecoderConfig, rotarySize } from './decoder.ts';
import { checkGpt2, type Gpt2Config } from './gpt2.ts';
import type { ModelConfig } from './registry.ts';

type Architecture = DecoderConfig['architecture'];

/** What llama.cpp takes for granted of an architecture. */
interface Rules {
  /** Our names of it, the first where a file does not tell them apart. */
  readonly ours: readonly Architecture[];
  /** What each layer sees where there is a window, repeated. */
  readonly pattern: readonly LayerKind[];
  /** Whether rows of queries and keys are reordered. */
  readonly pairs: boolean;
  readonly fixed: Pick<DecoderConfig, 'activation' | 'normOffset' | 'postNorms' | 'queryKeyNorm' | 'scaledEmbedding' | 'rotary'>;
  /** Base of local layers. */
  readonly localRopeBase?: number;
  /** Number of layers of a size whose scores are scaled by C / H instead of D. */
  readonly wide?: number;
}

const gemma = { activation: 'gelu', normOffset: 1, scaledEmbedding: true, rotary: [true] } as const;
const llama = {
  activation: 'silu',
  normOffset: 0,
  scaledEmbedding: false,
  postNorms: false,
  queryKeyNorm: false,
  rotary: [true],
} as const;

const rules: Readonly<Record<string, Rules>> = {
  gemma: { ours: ['gemma'], pattern: ['global'], pairs: false, fixed: { ...gemma, postNorms: false, queryKeyNorm: false } },
  gemma2: {
    ours: ['gemma2'],
    pattern: ['local', 'global'],
    pairs: false,
    fixed: { ...gemma, postNorms: true, queryKeyNorm: false },
    wide: 46,
  },
  gemma3: {
    ours: ['gemma3_text'],
    pattern: ['local', 'local', 'local', 'local', 'local', 'global'],
    pairs: false,
    fixed: { ...gemma, postNorms: true, queryKeyNorm: true },
    localRopeBase: 10_000,
    wide: 62,
  },
  llama: { ours: ['llama', 'mistral'], pattern: ['local'], pairs: true, fixed: llama },
  phi3: { ours: ['phi3'], pattern: ['local'], pairs: false, fixed: llama },
  qwen2: { ours: ['qwen2'], pattern: ['global'], pairs: false, fixed: llama },
  qwen3: { ours: ['qwen3'], pattern: ['global'], pairs: false, fixed: { ...llama, queryKeyNorm: true } },
  smollm3: { ours: ['smollm3'], pattern: ['global'], pairs: true, fixed: { ...llama, rotary: [true, true, true, false] } },
};

function rulesFor(c: Pick<DecoderConfig, 'architecture'>): readonly [string, Rules] {
  return Object.entries(rules).find(([, { ours }]) => ours.includes(c.architecture))!;
}

function unsupported(field: string, expected: string, actual: unknown): ConfigError {
  const shown = typeof actual === 'object' ? JSON.stringify(actual) : String(actual);
  return new ConfigError(`exportGguf: ${field} is ${shown}; a GGUF file of this architecture can only tell of ${expected}`, {
    code: 'ERR_CONFIG',
    op: 'exportGguf',
    argument: field,
    expected,
    actual: shown,
  });
}

/** Whether llama.cpp has the rows of queries and keys in another order. */
export const splitPairs = (c: DecoderConfig): boolean => rulesFor(c)[1].pairs;

/** What llama.cpp divides scores by the square root of. */
const scalarOf = ({ wide }: Rules, c: Pick<DecoderConfig, 'layers' | 'width' | 'heads' | 'headSize'>): number =>
  c.layers === wide ? c.width / c.heads : c.headSize;

/** What queries are multiplied by, so that llama.cpp's own scale gives our scores. */
export const queryFactor = (c: DecoderConfig): number => Math.sqrt(scalarOf(rulesFor(c)[1], c) / c.queryScalar);

// Where a model has no cap and llama.cpp knows no model without: scores are changed by less than float32 tells.
const NO_CAP = 1e6;

export interface About {
  readonly architecture: string;
  readonly metadata: readonly (readonly [string, GgufValue])[];
  readonly notes: readonly string[];
}

/** @throws ConfigError naming what a GGUF file cannot tell of. */
export function metadataOf(c: ModelConfig): About {
  return c.architecture === 'gpt2' ? gpt2Metadata(c) : decoderMetadata(c);
}

function gpt2Metadata(c: Gpt2Config): About {
  const sizes = {
    vocab_size: c.vocabSize,
    context_length: c.context,
    embedding_length: c.width,
    block_count: c.layers,
    feed_forward_length: c.hidden,
    'attention.head_count': c.heads,
  };
  const metadata: [string, GgufValue][] = Object.entries(sizes).map(([key, value]) => [`gpt2.${key}`, { type: 'u32', value }]);
  metadata.push(['gpt2.attention.layer_norm_epsilon', { type: 'f32', value: c.normEps }]);
  return { architecture: 'gpt2', metadata, notes: [] };
}

function decoderMetadata(c: DecoderConfig): About {
  const [arch, rule] = rulesFor(c);
  const windowless = arch === 'llama' || arch === 'phi3';
  for (const field of ['activation', 'normOffset', 'postNorms', 'queryKeyNorm', 'scaledEmbedding'] as const) {
    if (c[field] !== rule.fixed[field]) throw unsupported(field, String(rule.fixed[field]), c[field]);
  }
  for (let i = 0; i < c.layers; i++) {
    const turns = rule.fixed.rotary[i % rule.fixed.rotary.length];
    if (c.rotary[i % c.rotary.length] !== turns) throw unsupported('rotary', JSON.stringify(rule.fixed.rotary), c.rotary);
  }
  const notes: string[] = [];
  const metadata: [string, GgufValue][] = [];
  const put = (key: string, type: 'u32' | 'f32', value: number): void => {
    metadata.push([`${arch}.${key}`, { type, value }]);
  };
  put('vocab_size', 'u32', c.vocabSize);
  put('context_length', 'u32', c.context);
  put('embedding_length', 'u32', c.width);
  put('block_count', 'u32', c.layers);
  put('feed_forward_length', 'u32', c.hidden);
  put('attention.head_count', 'u32', c.heads);
  put('attention.head_count_kv', 'u32', c.kvHeads);
  put('attention.key_length', 'u32', c.headSize);
  put('attention.value_length', 'u32', c.headSize);
  put('attention.layer_norm_rms_epsilon', 'f32', c.normEps);
  put('rope.dimension_count', 'u32', rotarySize(c));
  put('rope.freq_base', 'f32', c.ropeBase);

  const local = Array.from(
    { length: c.layers },
    (_, i) => c.window !== null && c.window < c.context && layerKind(c, i) === 'local',
  );
  const hasLocal = rule.pattern.includes('local');
  if (local.includes(true)) {
    if (local.some((is, i) => is !== (rule.pattern[i % rule.pattern.length] === 'local'))) {
      throw unsupported('layerPattern', JSON.stringify(rule.pattern), c.layerPattern);
    }
    put('attention.sliding_window', 'u32', c.window!);
    if (windowless) {
      notes.push(`llama.cpp does not follow the window of ${c.window}: beyond it its answers differ from this model's`);
    }
  } else if (hasLocal && !windowless) put('attention.sliding_window', 'u32', c.context);

  if (arch === 'gemma2') {
    put('attn_logit_softcapping', 'f32', c.attentionCap ?? NO_CAP);
    put('final_logit_softcapping', 'f32', c.finalCap ?? NO_CAP);
  } else {
    if (c.attentionCap !== null) throw unsupported('attentionCap', 'null', c.attentionCap);
    if (c.finalCap !== null && arch !== 'gemma3') throw unsupported('finalCap', 'null', c.finalCap);
    if (c.finalCap !== null) put('final_logit_softcapping', 'f32', c.finalCap);
  }
  const localBase = rule.localRopeBase ?? null;
  if (local.includes(true) && (c.localRopeBase ?? c.ropeBase) !== (localBase ?? c.ropeBase)) {
    throw unsupported('localRopeBase', String(localBase), c.localRopeBase);
  }
  if ((c.rotaryShare ?? 1) !== 1 && arch !== 'phi3') throw unsupported('rotaryShare', '1', c.rotaryShare);
  if (c.ropeScaling?.kind === 'linear') {
    metadata.push([`${arch}.rope.scaling.type`, { type: 'string', value: 'linear' }]);
    put('rope.scaling.factor', 'f32', c.ropeScaling.factor);
  } else if (c.ropeScaling?.kind === 'longrope' && arch === 'phi3') {
    const { context, magnitude } = c.ropeScaling;
    put('rope.scaling.original_context_length', 'u32', context);
    put('rope.scaling.attn_factor', 'f32', magnitude);
    notes.push(
      `llama.cpp turns by LongRoPE's factors of long texts all texts where it is given a context above ${context}, and by those of short ones else`,
    );
  } else if (c.ropeScaling !== null && (arch !== 'llama' || c.ropeScaling.kind !== 'llama3'))
    throw unsupported('ropeScaling', arch === 'phi3' ? 'longrope, linear or null' : 'linear or null', c.ropeScaling);
  if ((arch === 'qwen2' || arch === 'phi3') && c.heads * c.headSize !== c.width)
    throw unsupported('headSize', `width / heads (${c.width / c.heads})`, c.headSize);
  if (c.bias.qkv && arch !== 'llama' && arch !== 'qwen2') throw unsupported('bias.qkv', 'false', true);
  if (!c.bias.qkv && arch === 'qwen2') throw unsupported('bias.qkv', 'true', false);
  if (c.bias.output && arch !== 'llama') throw unsupported('bias.output', 'false', true);
  if (!c.tied && (arch === 'gemma' || arch === 'gemma2')) throw unsupported('tied', 'true', false);
  return { architecture: arch, metadata, notes };
}

type Llama3 = Extract<NonNullable<DecoderConfig['ropeScaling']>, { kind: 'llama3' }>;

/** What rotary frequencies are divided by, in the tensors that llama.cpp reads them from. */
export const ropeTensors = {
  frequencies: 'rope_freqs.weight',
  long: 'rope_factors_long.weight',
  short: 'rope_factors_short.weight',
} as const;

/** One for each of D/2 frequencies: those of Llama 3, or of LongRoPE's long and short texts. */
export type RopeFactors = { readonly [K in keyof typeof ropeTensors]?: Float32Array };

export function ropeFactors(c: ModelConfig): RopeFactors {
  const scaling = 'ropeScaling' in c ? c.ropeScaling : null;
  if (scaling?.kind === 'longrope') return { long: Float32Array.from(scaling.long), short: Float32Array.from(scaling.short) };
  return scaling?.kind === 'llama3' && 'ropeBase' in c ? { frequencies: factorsOf(scaling, c.ropeBase, c.headSize) } : {};
}

function factorsOf({ factor, lowFrequency, highFrequency, context }: Llama3, base: number, headSize: number): Float32Array {
  return Float32Array.from({ length: headSize / 2 }, (_, i) => {
    const turns = context / (2 * Math.PI * base ** ((2 * i) / headSize));
    if (turns < lowFrequency) return factor;
    if (turns > highFrequency) return 1;
    const share = (turns - lowFrequency) / (highFrequency - lowFrequency);
    return 1 / ((1 - share) / factor + share);
  });
}

/** The config that a file's metadata tells of. @throws FormatError naming the key. */
export function fromMetadata(file: GgufHeader, path: string, factors: RopeFactors): ModelConfig {
  const refuse = (key: string, expected: string, actual: unknown): never => {
    throw new FormatError(`${path}: ${key} is ${String(actual)}, expected ${expected}`, {
      code: 'ERR_CHECKPOINT',
      op: 'loadModel',
      argument: key,
      expected,
      actual: String(actual),
    });
  };
  const { metadata, tensors } = file;
  const architecture = metadata.get('general.architecture')?.value;
  const known = [...Object.keys(rules), 'gpt2'];
  if (typeof architecture !== 'string' || !known.includes(architecture))
    return refuse('general.architecture', known.join(', '), architecture);
  const arch = architecture;
  const splits = numberOf(metadata, 'split.count');
  if (splits !== undefined && splits > 1) refuse('split.count', '1: merge the parts with llama-gguf-split --merge', splits);
  const number = (key: string, fallback?: number): number => {
    const value = numberOf(metadata, `${arch}.${key}`) ?? fallback;
    return value === undefined || !Number.isFinite(value)
      ? refuse(`${arch}.${key}`, 'a number', metadata.get(`${arch}.${key}`)?.value)
      : value;
  };
  if (number('block_count') > tensors.size)
    refuse(`${arch}.block_count`, `at most the number of tensors (${tensors.size})`, number('block_count'));
  if (number('expert_count', 0) > 0)
    refuse(`${arch}.expert_count`, '0: mixtures of experts are not supported', number('expert_count'));

  const vocabSize = tensors.get('token_embd.weight')?.shape[0] ?? refuse('token_embd.weight', 'a tensor', undefined);
  const tied = !tensors.has('output.weight');
  const width = number('embedding_length');
  const layers = number('block_count');
  const heads = number('attention.head_count');
  if (arch === 'gpt2') {
    return checked(checkGpt2, {
      architecture: 'gpt2',
      vocabSize,
      width,
      layers,
      heads,
      kvHeads: number('attention.head_count_kv', heads),
      headSize: width / heads,
      hidden: number('feed_forward_length'),
      window: null,
      layerPattern: ['global'],
      finalCap: null,
      normEps: number('attention.layer_norm_epsilon'),
      initStd: 0.02,
      context: number('context_length'),
      tied,
    });
  }
  const rule = rules[arch]!;
  const headSize = number('attention.key_length', width / heads);
  if (number('attention.value_length', headSize) !== headSize)
    refuse(`${arch}.attention.value_length`, String(headSize), number('attention.value_length'));
  const turned = number('rope.dimension_count', headSize);
  if (turned !== headSize && arch !== 'phi3') refuse(`${arch}.rope.dimension_count`, String(headSize), turned);
  const context = number('context_length');
  const window = number('attention.sliding_window', 0);
  const local = window > 0 && window < context && rule.pattern.includes('local');
  const cap = (key: string, fallback: number): number | null => {
    const value = number(key, fallback);
    return value === 0 || value >= NO_CAP ? null : value;
  };
  const ropeBase = number('rope.freq_base', 10_000);
  const localBase = number('rope.freq_base_swa', rule.localRopeBase ?? ropeBase);
  const dims = { width, layers, heads, headSize };
  return checked(checkDecoder, {
    ...rule.fixed,
    ...dims,
    architecture: local ? rule.ours.at(-1)! : rule.ours[0]!,
    vocabSize,
    kvHeads: number('attention.head_count_kv', heads),
    hidden: number('feed_forward_length'),
    window: local ? window : null,
    layerPattern: local ? rule.pattern : ['global'],
    tied,
    bias: {
      qkv: tensors.has('blk.0.attn_q.bias') || tensors.has('blk.0.attn_qkv.bias'),
      output: tensors.has('blk.0.attn_output.bias'),
    },
    attentionCap: arch === 'gemma2' ? cap('attn_logit_softcapping', 50) : null,
    finalCap: arch === 'gemma2' ? cap('final_logit_softcapping', 30) : cap('final_logit_softcapping', 0),
    queryScalar: scalarOf(rule, dims),
    ropeBase,
    localRopeBase: local && localBase !== ropeBase ? localBase : null,
    ropeScaling: scalingOf(),
    ...(turned === headSize ? {} : { rotaryShare: turned / headSize }),
    normEps: number('attention.layer_norm_rms_epsilon'),
    initStd: 0.02,
    context,
  });

  function checked<C extends ModelConfig>(check: (config: C) => void, config: C): C {
    try {
      check(config);
    } catch (error) {
      throw new FormatError(`${path}: ${(error as Error).message}`, { code: 'ERR_CHECKPOINT', op: 'loadModel', cause: error });
    }
    return config;
  }

  function scalingOf(): DecoderConfig['ropeScaling'] {
    const type = metadata.get(`${arch}.rope.scaling.type`)?.value ?? 'none';
    const { frequencies, long, short } = factors;
    if (long !== undefined || short !== undefined) return longRope(long, short);
    if (frequencies !== undefined) return llama3(frequencies);
    if (type === 'linear') return { kind: 'linear', factor: number('rope.scaling.factor', 1) };
    return type === 'none' ? null : refuse(`${arch}.rope.scaling.type`, 'none or linear', type);
  }

  function longRope(long: Float32Array | undefined, short: Float32Array | undefined): DecoderConfig['ropeScaling'] {
    if (arch !== 'phi3') return refuse(ropeTensors.long, `no such tensor in a file of ${arch}`, 'there');
    const list = (name: string, values: Float32Array | undefined): number[] =>
      values === undefined ? refuse(name, 'a tensor, as the other factors are', values) : Array.from(values, asMeant);
    return {
      kind: 'longrope',
      short: list(ropeTensors.short, short),
      long: list(ropeTensors.long, long),
      context: number('rope.scaling.original_context_length', context),
      magnitude: number('rope.scaling.attn_factor', 1),
    };
  }

  /** The file has only the factors; what Llama 3 made them from is found again by trying. */
  function llama3(found: Float32Array): DecoderConfig['ropeScaling'] {
    const factor = Math.max(...found);
    if (factor === 1) return null;
    for (const original of [8192, 4096, 2048, 1024, 512, 256, 128, 64]) {
      const scaling = { kind: 'llama3', factor, lowFrequency: 1, highFrequency: 4, context: original } as const;
      const made = factorsOf(scaling, ropeBase, headSize);
      if (made.length === found.length && made.every((f, i) => Math.abs(f - found[i]!) < 1e-4 * f)) return scaling;
    }
    return refuse('rope_freqs.weight', 'the frequencies of Llama 3', [...found.subarray(0, 4)]);
  }
}

/** As it was meant: the float32 nearest to 1e-6 is not 1e-6. */
const asMeant = (value: number): number => Number(value.toPrecision(7));

function numberOf(metadata: GgufMetadata, key: string): number | undefined {
  const entry = metadata.get(key);
  if (entry === undefined) return undefined;
  if (entry.type === 'f32') return asMeant(entry.value);
  if (typeof entry.value === 'number') return entry.value;
  return typeof entry.value === 'bigint' ? Number(entry.value) : Number.NaN;
}
