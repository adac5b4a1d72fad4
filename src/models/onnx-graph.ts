// The decoder as an ONNX graph, with its keys and values as inputs and outputs.
//   B batch, T tokens, C width, H query heads, G key/value heads, D head size, V vocabulary
import type { OnnxGraph } from '../io/onnx.ts';
import { type RopeOptions, ropeFrequencies } from '../ops/rotary.ts';
import { layerKind } from './config.ts';
import { type DecoderConfig, rotarySize } from './decoder.ts';
import { activation, type GraphWeights, type GraphWriter, graphOf } from './onnx-parts.ts';

/** The forward pass, with the inputs and outputs of {@link graphOf}. */
export function decoderGraph(c: DecoderConfig, weights: GraphWeights): OnnxGraph {
  const g = graphOf(c, weights);
  const { linear, parameter } = g;
  const { heads: H, kvHeads: G, headSize: D } = c;
  const norm = (at: string, x: string, name: string, size = c.width): string => {
    const square = g.node(at, 'Pow', [x, g.scalar(2)]);
    const mean = g.node(at, 'ReduceMean', [square, g.ints(-1)], { keepdims: 1 });
    const root = g.node(at, 'Sqrt', [g.node(at, 'Add', [mean, g.scalar(c.normEps)])]);
    return g.node(at, 'Mul', [g.node(at, 'Div', [x, root]), parameter(at, `${name}.weight`, [size], { plus: c.normOffset })]);
  };
  const positions = rotations(g, c);

  const attention = (at: string, x: string, layer: number): string => {
    const self = `model.layers.${layer}.self_attn`;
    const turn = positions(layer);
    const project = (name: string, count: number): string =>
      g.split(at, linear(at, x, `${self}.${name}_proj`, count * D, c.width, c.bias.qkv), count);
    const turned = (name: string, count: number): string => {
      const y = project(name, count);
      return turn(at, c.queryKeyNorm ? norm(at, y, `${self}.${name}_norm`, D) : y);
    };
    const [q, k, v] = [turned('q', H), turned('k', G), project('v', G)];
    const mixed = g.attend(at, layer, q, k, v, c.queryScalar ** -0.5, c.attentionCap);
    return linear(at, mixed, `${self}.o_proj`, c.width, H * D, c.bias.output);
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
  const head = c.tied ? table : parameter('head', 'lm_head.weight', [c.vocabSize, c.width]);
  return g.finish(norm('head', x, 'model.norm'), head);
}

/** Turns heads [B T * D] of a layer by the angles of their positions. */
function rotations(g: GraphWriter, c: DecoderConfig) {
  const size = rotarySize(c);
  const angles = new Map<string, readonly [cos: string, sin: string]>();
  const stored = (name: string, options: RopeOptions): string =>
    g.constant(name, { type: 'float', shape: [size / 2], data: Float32Array.from(ropeFrequencies(options)) });
  const make = (name: string, options: RopeOptions): readonly [string, string] => {
    const { scaling = null } = options;
    const positions = g.node(name, 'Cast', ['position_ids'], { to: 1 });
    const of = (frequencies: string): string =>
      g.node(name, 'Mul', [g.node(name, 'Unsqueeze', [positions, g.ints(2, 3)]), frequencies]);
    if (scaling?.kind !== 'longrope') {
      const angle = of(stored(name, options));
      return [g.node(name, 'Cos', [angle]), g.node(name, 'Sin', [angle])];
    }
    const total = g.node(name, 'Squeeze', [g.node(name, 'Shape', ['attention_mask'], { start: 1, end: 2 })]);
    const isLong = g.node(name, 'Greater', [total, g.whole(scaling.context)]);
    const lists = [scaling.context + 1, 0].map((length, i) => stored(`${name} ${i}`, { ...options, length }));
    const angle = of(g.node(name, 'Where', [isLong, ...lists]));
    const scaled = (op: string): string => g.node(name, 'Mul', [g.node(name, op, [angle]), g.scalar(scaling.magnitude)]);
    return [scaled('Cos'), scaled('Sin')];
  };
  return (layer: number): ((at: string, y: string) => string) => {
    if (!c.rotary[layer % c.rotary.length]) return (_, y) => y;
    const local = c.localRopeBase !== null && layerKind(c, layer) === 'local';
    const name = local ? 'local_rotary' : 'rotary';
    const options = local
      ? { headSize: size, base: c.localRopeBase! }
      : { headSize: size, base: c.ropeBase, scaling: c.ropeScaling };
    const [cos, sin] = angles.get(name) ?? make(name, options);
    angles.set(name, [cos, sin]);
    return (at, y) => {
      const rest = c.headSize - size;
      const [a, b, ...still] =
        rest === 0
          ? g.several(at, 'Split', [y], 2, { axis: -1, num_outputs: 2 })
          : g.several(at, 'Split', [y, g.ints(size / 2, size / 2, rest)], 3, { axis: -1 });
      const times = (u: string, v: string): string => g.node(at, 'Mul', [u, v]);
      const first = g.node(at, 'Sub', [times(a!, cos), times(b!, sin)]);
      const second = g.node(at, 'Add', [times(b!, cos), times(a!, sin)]);
      return g.node(at, 'Concat', [first, second, ...still], { axis: -1 });
    };
  };
}
