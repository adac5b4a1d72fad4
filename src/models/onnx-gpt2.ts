// GPT-2 as an ONNX graph, with its keys and values as inputs and outputs.
import type { OnnxGraph } from '../io/onnx.ts';
import type { Gpt2Config } from './gpt2.ts';
import { activation, type GraphWeights, graphOf } from './onnx-parts.ts';

/** The forward pass, with the inputs and outputs of {@link graphOf}. */
export function gpt2Graph(c: Gpt2Config, weights: GraphWeights): OnnxGraph {
  const g = graphOf(c, weights);
  const { linear, parameter } = g;
  const { width: C, hidden: F, heads: H } = c;
  const norm = (at: string, x: string, name: string): string => {
    const mean = (y: string): string => g.node(at, 'ReduceMean', [y, g.ints(-1)], { keepdims: 1 });
    const centred = g.node(at, 'Sub', [x, mean(x)]);
    const variance = mean(g.node(at, 'Pow', [centred, g.scalar(2)]));
    const unit = g.node(at, 'Div', [centred, g.node(at, 'Sqrt', [g.node(at, 'Add', [variance, g.scalar(c.normEps)])])]);
    const scaled = g.node(at, 'Mul', [unit, parameter(at, `${name}.weight`, [C])]);
    return g.node(at, 'Add', [scaled, parameter(at, `${name}.bias`, [C])]);
  };
  const table = parameter('embed', 'transformer.wte.weight', [c.vocabSize, C]);
  const places = parameter('embed', 'transformer.wpe.weight', [c.context, C]);
  const look = (rows: string, ids: string): string => g.node('embed', 'Gather', [rows, ids], { axis: 0 });
  let x = g.node('embed', 'Add', [look(table, 'input_ids'), look(places, 'position_ids')]);
  for (let i = 0; i < c.layers; i++) {
    const name = `transformer.h.${i}`;
    const add = (at: string, y: string): void => {
      x = g.node(at, 'Add', [x, y]);
    };
    const [a, f] = [`layers.${i}/attention`, `layers.${i}/feed_forward`];
    const h = norm(a, x, `${name}.ln_1`);
    const [q, k, v] = ['q', 'k', 'v'].map((one) => g.split(a, linear(a, h, `${name}.attn.${one}_proj`, C, C, true), H));
    add(a, linear(a, g.attend(a, i, q!, k!, v!, c.headSize ** -0.5), `${name}.attn.c_proj`, C, C, true));
    const up = linear(f, norm(f, x, `${name}.ln_2`), `${name}.mlp.c_fc`, F, C, true);
    add(f, linear(f, activation(g, f, up, 'gelu'), `${name}.mlp.c_proj`, C, F, true));
  }
  const head = c.tied ? table : parameter('head', 'lm_head.weight', [c.vocabSize, C]);
  return g.finish(norm('head', x, 'transformer.ln_f'), head);
}
