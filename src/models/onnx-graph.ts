// A decoder as an ONNX graph, with its keys and values as inputs and outputs, in operators of the standard set only: every runtime has them,
// and those that know better fuse them.
//   B batch, T new tokens, P tokens before, S = P + T, C width, H query heads, G key/value heads, D head size, V vocabulary
import type { OnnxGraph, OnnxNode, OnnxTensor, OnnxType, OnnxValue } from '../io/onnx.ts';
import { ropeFrequencies } from '../ops/rotary.ts';
import { layerKind } from './config.ts';
import type { DecoderConfig } from './decoder.ts';

/** The operator set that the nodes are of. */
export const opset = 18;

/** A parameter of the model and how the graph takes it. */
export interface GraphParameter {
  readonly name: string;
  /** As the model has it. */
  readonly shape: readonly number[];
  readonly type: 'float' | 'float16';
  /** Whether rows become columns, as `MatMul` wants them. */
  readonly transposed: boolean;
  /** Added to each value. */
  readonly plus: number;
}

/**
 * The forward pass: input_ids [B T], attention_mask [B S] (0 hides a key, such as left padding), position_ids [B T] and for each layer N
 * past_key_values.N.key and .value [B G P D] in; logits [B T V], present.N.key and .value [B G S D] out. Ids are int64, all else float.
 * @param type of the matrices; they are widened to float before they are used
 * @param data of each parameter, asked once
 */
export function decoderGraph(
  c: DecoderConfig,
  type: 'float' | 'float16',
  data: (parameter: GraphParameter) => OnnxTensor['data'],
): OnnxGraph {
  const g = graphWriter();
  const { heads: H, kvHeads: G, headSize: D } = c;
  const parameter = (
    at: string,
    name: string,
    shape: readonly number[],
    how: { transposed?: boolean; plus?: number } = {},
  ): string => {
    const { transposed = false, plus = 0 } = how;
    const as = shape.length > 1 ? type : 'float';
    const stored = g.constant(name, {
      type: as,
      shape: transposed ? [...shape].reverse() : shape,
      data: data({ name, shape, type: as, transposed, plus }),
    });
    return as === 'float' ? stored : g.node(at, 'Cast', [stored], { to: 1 });
  };
  const norm = (at: string, x: string, name: string, size = c.width): string => {
    const square = g.node(at, 'Pow', [x, g.scalar(2)]);
    const mean = g.node(at, 'ReduceMean', [square, g.ints(-1)], { keepdims: 1 });
    const root = g.node(at, 'Sqrt', [g.node(at, 'Add', [mean, g.scalar(c.normEps)])]);
    return g.node(at, 'Mul', [g.node(at, 'Div', [x, root]), parameter(at, `${name}.weight`, [size], { plus: c.normOffset })]);
  };
  const linear = (at: string, x: string, name: string, rows: number, cols: number, biased = false): string => {
    const y = g.node(at, 'MatMul', [x, parameter(at, `${name}.weight`, [rows, cols], { transposed: true })]);
    return biased ? g.node(at, 'Add', [y, parameter(at, `${name}.bias`, [rows])]) : y;
  };
  const cap = (at: string, x: string, limit: number): string => g.node(at, 'Mul', [g.node(at, 'Tanh', [x]), g.scalar(limit)]);

  const positions = rotations(g, c);
  const mask = masks(g, c);
  // Scores of the query heads that share keys are rows of one product; the softmax sees them by head.
  const total = g.node('mask', 'Shape', ['attention_mask'], { start: 1, end: 2 });
  const byHead = g.node('mask', 'Concat', [g.ints(0, H, -1), total], { axis: 0 });
  const byGroup = g.node('mask', 'Concat', [g.ints(0, G, -1), total], { axis: 0 });

  const attention = (at: string, x: string, layer: number): string => {
    const self = `model.layers.${layer}.self_attn`;
    const turn = positions(layer);
    const project = (name: string, count: number): string =>
      g.node(at, 'Reshape', [linear(at, x, `${self}.${name}_proj`, count * D, c.width, c.bias.qkv), g.ints(0, 0, count, D)]);
    const turned = (name: string, count: number): string => {
      const y = project(name, count);
      return turn(at, c.queryKeyNorm ? norm(at, y, `${self}.${name}_norm`, D) : y);
    };
    const swap = (y: string): string => g.node(at, 'Transpose', [y], { perm: [0, 2, 1, 3] });
    const extended = (kind: 'key' | 'value', y: string): string =>
      g.named(`present.${layer}.${kind}`, at, 'Concat', [`past_key_values.${layer}.${kind}`, swap(y)], { axis: 2 });

    // The cap divides what it caps.
    const scale = g.scalar(c.queryScalar ** -0.5 / (c.attentionCap ?? 1));
    const query = g.node(at, 'Reshape', [swap(g.node(at, 'Mul', [turned('q', H), scale])), g.ints(0, G, -1, D)]);
    const key = extended('key', turned('k', G));
    const value = extended('value', project('v', G));
    const products = g.node(at, 'MatMul', [query, g.node(at, 'Transpose', [key], { perm: [0, 1, 3, 2] })]);
    const capped = c.attentionCap === null ? products : cap(at, products, c.attentionCap);
    // A finite number instead of -infinity: a row of padding sees no key at all, and must not become NaN.
    const scores = g.node(at, 'Where', [mask(layer), g.node(at, 'Reshape', [capped, byHead]), g.scalar(-1e30)]);
    const shares = g.node(at, 'Reshape', [g.node(at, 'Softmax', [scores], { axis: -1 }), byGroup]);
    const mixed = g.node(at, 'Reshape', [g.node(at, 'MatMul', [shares, value]), g.ints(0, H, -1, D)]);
    return linear(at, g.node(at, 'Reshape', [swap(mixed), g.ints(0, 0, H * D)]), `${self}.o_proj`, c.width, H * D, c.bias.output);
  };
  const feedForward = (at: string, x: string, layer: number): string => {
    const mlp = `model.layers.${layer}.mlp`;
    const gate = activation(g, at, linear(at, x, `${mlp}.gate_proj`, c.hidden, c.width), c.activation);
    const up = linear(at, x, `${mlp}.up_proj`, c.hidden, c.width);
    return linear(at, g.node(at, 'Mul', [gate, up]), `${mlp}.down_proj`, c.width, c.hidden);
  };

  const table = parameter('embed', 'model.embed_tokens.weight', [c.vocabSize, c.width]);
  let x = g.node('embed', 'Gather', [table, 'input_ids'], { axis: 0 });
  if (c.scaledEmbedding) x = g.node('embed', 'Mul', [x, g.scalar(Math.sqrt(c.width))]);
  for (let i = 0; i < c.layers; i++) {
    const at = `layers.${i}`;
    const name = `model.layers.${i}`;
    const branch = (where: string, before: string, after: string | undefined, inner: typeof attention): void => {
      const y = inner(where, norm(where, x, `${name}.${before}`), i);
      x = g.node(where, 'Add', [x, after === undefined ? y : norm(where, y, `${name}.${after}`)]);
    };
    if (c.postNorms) {
      branch(`${at}/attention`, 'input_layernorm', 'post_attention_layernorm', attention);
      branch(`${at}/feed_forward`, 'pre_feedforward_layernorm', 'post_feedforward_layernorm', feedForward);
    } else {
      branch(`${at}/attention`, 'input_layernorm', undefined, attention);
      branch(`${at}/feed_forward`, 'post_attention_layernorm', undefined, feedForward);
    }
  }
  const rows = g.node('head', 'Reshape', [norm('head', x, 'model.norm'), g.ints(-1, c.width)]);
  const head = c.tied ? table : parameter('head', 'lm_head.weight', [c.vocabSize, c.width]);
  // Gemm reads the table as it lies, so that a tied one is stored once.
  const flat = g.node('head', 'Gemm', [rows, head], { transB: 1 });
  const logits = c.finalCap === null ? flat : cap('head', g.node('head', 'Mul', [flat, g.scalar(1 / c.finalCap)]), c.finalCap);
  const tokens = g.node('head', 'Shape', ['input_ids']);
  const full = g.node('head', 'Concat', [tokens, g.ints(c.vocabSize)], { axis: 0 });
  g.named('logits', 'head', 'Reshape', [logits, full]);

  return { name: c.architecture, ...values(c), tensors: [...g.tensors.values()], nodes: g.nodes };
}

/** Inputs and outputs, under the names and in the order that transformers.js and optimum give them. */
function values(c: DecoderConfig): { inputs: OnnxValue[]; outputs: OnnxValue[] } {
  const [B, T, P, S] = ['batch_size', 'sequence_length', 'past_sequence_length', 'total_sequence_length'];
  const value = (name: string, type: OnnxType, ...shape: (number | string)[]): OnnxValue => ({ name, type, shape });
  const pairs = (prefix: string, length: string): OnnxValue[] =>
    Array.from({ length: 2 * c.layers }, (_, i) =>
      value(`${prefix}.${i >> 1}.${i % 2 === 0 ? 'key' : 'value'}`, 'float', B!, c.kvHeads, length, c.headSize),
    );
  return {
    inputs: [
      value('input_ids', 'int64', B!, T!),
      value('attention_mask', 'int64', B!, S!),
      value('position_ids', 'int64', B!, T!),
      ...pairs('past_key_values', P!),
    ],
    outputs: [value('logits', 'float', B!, T!, c.vocabSize), ...pairs('present', S!)],
  };
}

type GraphWriter = ReturnType<typeof graphWriter>;

/** Collects nodes and constants, under names that say where in the model they are. */
function graphWriter() {
  const nodes: OnnxNode[] = [];
  const tensors = new Map<string, OnnxTensor>();
  const constant = (name: string, tensor: Omit<OnnxTensor, 'name'>): string => {
    if (!tensors.has(name)) tensors.set(name, { name, ...tensor });
    return name;
  };
  const split = (
    at: string,
    op: string,
    inputs: readonly string[],
    count: number,
    attributes?: OnnxNode['attributes'],
  ): string[] => {
    const name = `${at}/${op}_${nodes.length}`;
    const outputs = count === 1 ? [name] : Array.from({ length: count }, (_, i) => `${name}.${i}`);
    nodes.push({ op, name, inputs, outputs, ...(attributes === undefined ? {} : { attributes }) });
    return outputs;
  };
  return {
    nodes,
    tensors,
    constant,
    split,
    /** One output. */
    node: (at: string, op: string, inputs: readonly string[], attributes?: OnnxNode['attributes']): string =>
      split(at, op, inputs, 1, attributes)[0]!,
    /** An output of the graph. */
    named(output: string, at: string, op: string, inputs: readonly string[], attributes?: OnnxNode['attributes']): string {
      nodes.push({ op, name: `${at}/${op}_${nodes.length}`, inputs, outputs: [output], ...(attributes && { attributes }) });
      return output;
    },
    scalar: (value: number): string => constant(`float ${value}`, { type: 'float', shape: [], data: Float32Array.of(value) }),
    whole: (value: number): string =>
      constant(`int ${value}`, { type: 'int64', shape: [], data: BigInt64Array.of(BigInt(value)) }),
    ints: (...list: number[]): string =>
      constant(`ints ${list.join(' ')}`, { type: 'int64', shape: [list.length], data: BigInt64Array.from(list, BigInt) }),
  };
}

/** Turns heads [B T * D] of a layer by the angles of their positions. */
function rotations(g: GraphWriter, c: DecoderConfig) {
  const half = c.headSize / 2;
  const angles = new Map<string, readonly [cos: string, sin: string]>();
  const make = (name: string, frequencies: Float64Array): readonly [string, string] => {
    const stored = g.constant(name, { type: 'float', shape: [half], data: Float32Array.from(frequencies) });
    const positions = g.node(name, 'Cast', ['position_ids'], { to: 1 });
    const angle = g.node(name, 'Mul', [g.node(name, 'Unsqueeze', [positions, g.ints(2, 3)]), stored]);
    return [g.node(name, 'Cos', [angle]), g.node(name, 'Sin', [angle])];
  };
  return (layer: number): ((at: string, y: string) => string) => {
    if (!c.rotary[layer % c.rotary.length]) return (_, y) => y;
    const local = c.localRopeBase !== null && layerKind(c, layer) === 'local';
    const name = local ? 'local_rotary' : 'rotary';
    const options = local
      ? { headSize: c.headSize, base: c.localRopeBase! }
      : { headSize: c.headSize, base: c.ropeBase, scaling: c.ropeScaling };
    const [cos, sin] = angles.get(name) ?? make(name, ropeFrequencies(options));
    angles.set(name, [cos, sin]);
    return (at, y) => {
      const [a, b] = g.split(at, 'Split', [y], 2, { axis: -1, num_outputs: 2 }) as [string, string];
      const times = (u: string, v: string): string => g.node(at, 'Mul', [u, v]);
      const first = g.node(at, 'Sub', [times(a, cos), times(b, sin)]);
      const second = g.node(at, 'Add', [times(b, cos), times(a, sin)]);
      return g.node(at, 'Concat', [first, second], { axis: -1 });
    };
  };
}

/** Which keys each token of a layer sees, bool [B 1 T S]: none after it, none out of the window, none that attention_mask hides. */
function masks(g: GraphWriter, c: DecoderConfig) {
  const at = 'mask';
  const size = (input: string): string => g.node(at, 'Squeeze', [g.node(at, 'Shape', [input], { start: 1, end: 2 })]);
  const total = size('attention_mask');
  const past = g.node(at, 'Sub', [total, size('input_ids')]);
  const keys = g.node(at, 'Range', [g.whole(0), total, g.whole(1)]);
  const queries = g.node(at, 'Unsqueeze', [g.node(at, 'Range', [past, total, g.whole(1)]), g.ints(1)]);
  const visible = g.node(at, 'Unsqueeze', [g.node(at, 'Cast', ['attention_mask'], { to: 9 }), g.ints(1, 2)]);
  const global = g.node(at, 'And', [g.node(at, 'LessOrEqual', [keys, queries]), visible]);
  let local: string | undefined;
  return (layer: number): string => {
    if (layerKind(c, layer) === 'global') return global;
    const oldest = (): string => g.node(at, 'Sub', [queries, g.whole(c.window!)]);
    local ??= g.node(at, 'And', [global, g.node(at, 'Greater', [keys, oldest()])]);
    return local;
  };
}

function activation(g: GraphWriter, at: string, x: string, kind: DecoderConfig['activation']): string {
  const times = (a: string, b: string): string => g.node(at, 'Mul', [a, b]);
  if (kind === 'silu') return times(x, g.node(at, 'Sigmoid', [x]));
  // 0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))), in the shape that runtimes look for.
  const cube = g.node(at, 'Pow', [x, g.scalar(3)]);
  const inner = g.node(at, 'Add', [x, times(cube, g.scalar(0.044715))]);
  const tanh = g.node(at, 'Tanh', [times(inner, g.scalar(Math.sqrt(2 / Math.PI)))]);
  return times(times(x, g.node(at, 'Add', [tanh, g.scalar(1)])), g.scalar(0.5));
}
