// What the ONNX graphs of all architectures are made of: operators of the standard set only, which every runtime has, and those that know better fuse.
//   B batch, T new tokens, P tokens before, S = P + T, C width, H query heads, G key/value heads, D head size, V vocabulary
import type { OnnxGraph, OnnxNode, OnnxTensor, OnnxType, OnnxValue } from '../io/onnx.ts';
import { type BaseConfig, layerKind } from './config.ts';

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

/** The type of matrices, which are widened to float before they are used, and the values of each parameter, asked once. */
export interface GraphWeights {
  readonly type: 'float' | 'float16';
  data(parameter: GraphParameter): OnnxTensor['data'];
}

/**
 * A graph in the making, with what does not depend on the architecture: input_ids [B T], attention_mask [B S] (0 hides a key, such as left padding),
 * position_ids [B T] and for each layer N past_key_values.N.key and .value [B G P D] in; logits [B T V], present.N.key and .value [B G S D] out.
 * Ids are int64, all else float.
 */
export function graphOf(c: BaseConfig, weights: GraphWeights) {
  const g = graphWriter();
  const { heads: H, kvHeads: G, headSize: D } = c;
  const parameter = (
    at: string,
    name: string,
    shape: readonly number[],
    how: { transposed?: boolean; plus?: number } = {},
  ): string => {
    const { transposed = false, plus = 0 } = how;
    const type = shape.length > 1 ? weights.type : 'float';
    const stored = g.constant(name, {
      type,
      shape: transposed ? [...shape].reverse() : shape,
      data: weights.data({ name, shape, type, transposed, plus }),
    });
    return type === 'float' ? stored : g.node(at, 'Cast', [stored], { to: 1 });
  };
  const linear = (at: string, x: string, name: string, rows: number, cols: number, biased = false): string => {
    const y = g.node(at, 'MatMul', [x, parameter(at, `${name}.weight`, [rows, cols], { transposed: true })]);
    return biased ? g.node(at, 'Add', [y, parameter(at, `${name}.bias`, [rows])]) : y;
  };
  const cap = (at: string, x: string, limit: number): string => g.node(at, 'Mul', [g.node(at, 'Tanh', [x]), g.scalar(limit)]);

  const mask = masks(g, c);
  // Scores of the query heads that share keys are rows of one product; the softmax sees them by head.
  const total = g.node('mask', 'Shape', ['attention_mask'], { start: 1, end: 2 });
  const byHead = g.node('mask', 'Concat', [g.ints(0, H, -1), total], { axis: 0 });
  const byGroup = g.node('mask', 'Concat', [g.ints(0, G, -1), total], { axis: 0 });
  const swap = (at: string, y: string): string => g.node(at, 'Transpose', [y], { perm: [0, 2, 1, 3] });

  return {
    ...g,
    parameter,
    linear,
    /** [B T N * D] as [B T N D]. */
    split: (at: string, y: string, count: number): string => g.node(at, 'Reshape', [y, g.ints(0, 0, count, D)]),
    /**
     * Attention of a layer over these and the past keys [B T G D] and values [B T G D], which it extends.
     * @param q [B T H D]
     * @param limit soft cap of the scores
     * @returns [B T H * D]
     */
    attend(at: string, layer: number, q: string, k: string, v: string, factor: number, limit: number | null = null): string {
      const extended = (kind: 'key' | 'value', y: string): string =>
        g.named(`present.${layer}.${kind}`, at, 'Concat', [`past_key_values.${layer}.${kind}`, swap(at, y)], { axis: 2 });
      // The cap divides what it caps.
      const scaled = g.node(at, 'Mul', [q, g.scalar(factor / (limit ?? 1))]);
      const query = g.node(at, 'Reshape', [swap(at, scaled), g.ints(0, G, -1, D)]);
      const key = extended('key', k);
      const value = extended('value', v);
      const products = g.node(at, 'MatMul', [query, g.node(at, 'Transpose', [key], { perm: [0, 1, 3, 2] })]);
      const capped = limit === null ? products : cap(at, products, limit);
      // A finite number instead of -infinity: a row of padding sees no key at all, and must not become NaN.
      const scores = g.node(at, 'Where', [mask(layer), g.node(at, 'Reshape', [capped, byHead]), g.scalar(-1e30)]);
      const shares = g.node(at, 'Reshape', [g.node(at, 'Softmax', [scores], { axis: -1 }), byGroup]);
      const mixed = g.node(at, 'Reshape', [g.node(at, 'MatMul', [shares, value]), g.ints(0, H, -1, D)]);
      return g.node(at, 'Reshape', [swap(at, mixed), g.ints(0, 0, H * D)]);
    },
    /** The graph, whose logits are hidden states [B T C] times the head [V C]. */
    finish(x: string, head: string): OnnxGraph {
      // Gemm reads the table as it lies, so that a tied one is stored once.
      const flat = g.node('head', 'Gemm', [g.node('head', 'Reshape', [x, g.ints(-1, c.width)]), head], { transB: 1 });
      const logits =
        c.finalCap === null ? flat : cap('head', g.node('head', 'Mul', [flat, g.scalar(1 / c.finalCap)]), c.finalCap);
      const full = g.node('head', 'Concat', [g.node('head', 'Shape', ['input_ids']), g.ints(c.vocabSize)], { axis: 0 });
      g.named('logits', 'head', 'Reshape', [logits, full]);
      return { name: c.architecture, ...values(c), tensors: [...g.tensors.values()], nodes: g.nodes };
    },
  };
}

/** Inputs and outputs, under the names and in the order that transformers.js and optimum give them. */
function values(c: BaseConfig): { inputs: OnnxValue[]; outputs: OnnxValue[] } {
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

export type GraphWriter = ReturnType<typeof graphWriter>;

/** Collects nodes and constants, under names that say where in the model they are. */
function graphWriter() {
  const nodes: OnnxNode[] = [];
  const tensors = new Map<string, OnnxTensor>();
  const constant = (name: string, tensor: Omit<OnnxTensor, 'name'>): string => {
    if (!tensors.has(name)) tensors.set(name, { name, ...tensor });
    return name;
  };
  const several = (
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
    several,
    /** One output. */
    node: (at: string, op: string, inputs: readonly string[], attributes?: OnnxNode['attributes']): string =>
      several(at, op, inputs, 1, attributes)[0]!,
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

/** Which keys each token of a layer sees, bool [B 1 T S]: none after it, none out of the window, none that attention_mask hides. */
function masks(g: GraphWriter, c: BaseConfig) {
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

/** What a feed-forward block bends by. */
export function activation(g: Pick<GraphWriter, 'node' | 'scalar'>, at: string, x: string, kind: 'gelu' | 'silu'): string {
  const times = (a: string, b: string): string => g.node(at, 'Mul', [a, b]);
  if (kind === 'silu') return times(x, g.node(at, 'Sigmoid', [x]));
  // 0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))), in the shape that runtimes look for.
  const cube = g.node(at, 'Pow', [x, g.scalar(3)]);
  const inner = g.node(at, 'Add', [x, times(cube, g.scalar(0.044715))]);
  const tanh = g.node(at, 'Tanh', [times(inner, g.scalar(Math.sqrt(2 / Math.PI)))]);
  return times(times(x, g.node(at, 'Add', [tanh, g.scalar(1)])), g.scalar(0.5));
}
