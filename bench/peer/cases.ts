// What is compared: three shapes, one student, one teacher, and weights that both sides load.

import { mkdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { writeSafetensors } from '../../src/io/safetensors.ts';

export interface Shape {
  readonly vocabulary: number;
  readonly batch: number;
  readonly length: number;
  readonly window: number;
  /** Optimizer steps a turn, so that the fastest takes a second or more. */
  readonly steps: number;
  /** How many times faster than eager and than torch.compile limbeck means to be. */
  readonly goals: Record<Task, readonly [number, number]>;
}

export type Task = 'train' | 'distill';

export const shapes: readonly Shape[] = [
  { vocabulary: 8192, batch: 8, length: 256, window: 128, steps: 3, goals: { train: [2, 1.5], distill: [1.7, 1.45] } },
  { vocabulary: 32_000, batch: 4, length: 512, window: 256, steps: 2, goals: { train: [2.3, 1.6], distill: [2.2, 1.6] } },
  { vocabulary: 8192, batch: 2, length: 2048, window: 512, steps: 1, goals: { train: [5, 2.6], distill: [5, 2.6] } },
];

export const optimizer = { learningRate: 1e-4, betas: [0.9, 0.95], eps: 1e-8, weightDecay: 0.1 } as const;

const sizes = {
  student: { hidden_size: 256, num_hidden_layers: 6, num_attention_heads: 4, num_key_value_heads: 2, intermediate_size: 1024 },
  teacher: { hidden_size: 512, num_hidden_layers: 8, num_attention_heads: 8, num_key_value_heads: 4, intermediate_size: 2048 },
} as const;

export type Role = keyof typeof sizes;

/** A config.json of Transformers. */
function configOf(role: Role, { vocabulary, length, window }: Shape) {
  const size = sizes[role];
  return {
    ...size,
    architectures: ['Gemma2ForCausalLM'],
    model_type: 'gemma2',
    vocab_size: vocabulary,
    head_dim: 64,
    query_pre_attn_scalar: 64,
    sliding_window: window,
    max_position_embeddings: length,
    layer_types: Array.from({ length: size.num_hidden_layers }, (_, i) => (i % 2 === 0 ? 'sliding_attention' : 'full_attention')),
    attn_logit_softcapping: 50,
    final_logit_softcapping: 30,
    rope_parameters: { rope_type: 'default', rope_theta: 10_000 },
    rms_norm_eps: 1e-6,
    initializer_range: 0.02,
    hidden_activation: 'gelu_pytorch_tanh',
    attention_bias: false,
    attention_dropout: 0,
    tie_word_embeddings: true,
    bos_token_id: 2,
    eos_token_id: 1,
    // A padding id would silence the gradient of one embedding row.
    pad_token_id: null,
  };
}

/** Writes config.json and model.safetensors with random weights: the same for every side, so that losses can be compared. */
export async function writeModel(folder: string, role: Role, shape: Shape): Promise<string> {
  const config = configOf(role, shape);
  const { hidden_size: width, intermediate_size: hidden, head_dim: size } = config;
  const heads = config.num_attention_heads * size;
  const kvHeads = config.num_key_value_heads * size;
  const tensors: [string, number[]][] = [['model.embed_tokens.weight', [shape.vocabulary, width]]];
  for (let i = 0; i < config.num_hidden_layers; i++) {
    const add = (name: string, ...dims: number[]) => tensors.push([`model.layers.${i}.${name}.weight`, dims]);
    add('self_attn.q_proj', heads, width);
    add('self_attn.k_proj', kvHeads, width);
    add('self_attn.v_proj', kvHeads, width);
    add('self_attn.o_proj', width, heads);
    add('mlp.gate_proj', hidden, width);
    add('mlp.up_proj', hidden, width);
    add('mlp.down_proj', width, hidden);
    for (const norm of ['input', 'post_attention', 'pre_feedforward', 'post_feedforward']) add(`${norm}_layernorm`, width);
  }
  tensors.push(['model.norm.weight', [width]]);

  const random = generator(role === 'student' ? 1 : 2);
  const fill = (dims: number[]) => () => {
    const data = new Float32Array(dims.reduce((a, b) => a * b, 1));
    // Uniform with the standard deviation of Gemma's initial weights; norms near their 0.
    const bound = dims.length > 1 ? 0.02 * Math.sqrt(3) : 0.05;
    for (let i = 0; i < data.length; i++) data[i] = bound * (2 * random() - 1);
    return data;
  };
  const path = join(folder, role);
  await mkdir(path, { recursive: true });
  await writeFile(join(path, 'config.json'), JSON.stringify(config));
  await writeSafetensors(
    join(path, 'model.safetensors'),
    tensors.map(([name, dims]) => ({ name, dtype: 'F32', shape: dims, data: fill(dims) })),
    { format: 'pt' },
  );
  return path;
}

/** Token ids [B][T], all but the special ones. */
export function randomIds({ vocabulary, batch, length }: Shape): number[][] {
  const random = generator(3);
  const row = () => Array.from({ length }, () => 3 + Math.floor(random() * (vocabulary - 3)));
  return Array.from({ length: batch }, row);
}

/** Numbers from 0 to below 1: xorshift32, which is plenty for weights of a benchmark. */
function generator(seed: number): () => number {
  let state = Math.imul(seed, 2654435761) | 1;
  return () => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return (state >>> 0) / 2 ** 32;
  };
}
