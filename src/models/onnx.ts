// The folder that transformers.js loads: a model as ONNX, its configuration and tokenizer.
import { readdir, readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { writeAll, writeAtomic } from '../io/atomic.ts';
import { toHalf } from '../io/half.ts';
import { type OnnxGraph, type OnnxTensor, writeOnnx } from '../io/onnx.ts';
import type { Parameters, SpecTree } from '../nn/parameters.ts';
import { cast } from '../ops/elementwise.ts';
import { transpose } from '../ops/view.ts';
import { checkModel } from '../tensor/argument.ts';
import { ConfigError } from '../tensor/errors.ts';
import { keep, scope } from '../tensor/scope.ts';
import { noGrad } from '../tensor/tape.ts';
import { readAs, viewOf } from '../tensor/tensor.ts';
import { packageVersion } from '../tensor/version.ts';
import { withoutGenerationTags } from '../tokenizer/chat.ts';
import type { Tokenizer } from '../tokenizer/tokenizer.ts';
import type { LanguageModel } from './model.ts';
import { gpt2Graph } from './onnx-gpt2.ts';
import { decoderGraph } from './onnx-graph.ts';
import { type GraphParameter, type graphOf, opset } from './onnx-parts.ts';
import { transformersText } from './transformers.ts';
import { savedValues } from './weights.ts';

export interface OnnxExportOptions {
  /** Of the matrices; they are computed with in float32 either way. Default `f32`. */
  readonly type?: 'f32' | 'f16';
  /** Weights in a file of their own: `true`, `false`, or only where one file would exceed 2 GiB. Default `auto`. */
  readonly external?: boolean | 'auto';
  /** Jinja source of the chat template. Default: what tokenizer_config.json says. */
  readonly chatTemplate?: string | undefined;
  /** Fields of generation_config.json beside the tokens that begin, end and pad a text. Default none. */
  readonly generation?: Readonly<Record<string, unknown>> | undefined;
  /** Stops the export; files that are not complete are removed. */
  readonly signal?: AbortSignal;
  /** Told of the bytes of weights written so far, and of all. */
  readonly onProgress?: (progress: { readonly done: number; readonly total: number }) => void;
}

// The names that transformers.js looks for, and its word for each type.
const variants = {
  f32: { file: 'model.onnx', dtype: 'fp32', type: 'float' },
  f16: { file: 'model_fp16.onnx', dtype: 'fp16', type: 'float16' },
} as const;

// Values of a weight in memory at a time.
const RUN = 1 << 22;

/**
 * Writes a folder that transformers.js and ONNX Runtime load: onnx/model.onnx (f16: onnx/model_fp16.onnx), config.json,
 * generation_config.json and the tokenizer. Each file replaces an old one only when complete. Keys and values are inputs and outputs, as
 * {@link graphOf} tells. The change of an adapter in use is added to the weights.
 * @throws ConfigError for weights of 8 or 4 bits and for a value that f16 cannot hold; FileError `ERR_WRITE`; the reason of `signal`.
 */
export async function exportOnnx(
  folder: string,
  model: LanguageModel,
  tokenizer?: Tokenizer,
  options: OnnxExportOptions = {},
): Promise<void> {
  checkModel('exportOnnx', model);
  const { file, dtype, type } = variants[options.type ?? 'f32'];
  const graph = modelGraph(model, type, options);
  const onnx = join(folder, 'onnx');
  await writeOnnx(join(onnx, file), graph, {
    opset,
    producer: { name: 'limbeck', version: packageVersion() },
    external: options.external ?? 'auto',
  });
  // transformers.js fetches a file of weights only where it is told of one.
  const external = (await readdir(onnx)).flatMap((name) =>
    name.endsWith('.onnx_data') ? [[name.slice(0, -'_data'.length), 1]] : [],
  );
  const hints = { dtype, use_external_data_format: Object.fromEntries(external) };
  const config = transformersText(model.config, tokenizer, { 'transformers.js_config': hints });
  await writeText(join(folder, 'config.json'), config);
  const ids = { bos_token_id: tokenizer?.bos, eos_token_id: tokenizer?.eos, pad_token_id: tokenizer?.pad };
  await writeText(join(folder, 'generation_config.json'), jsonText({ ...ids, ...options.generation }));
  if (tokenizer === undefined) return;
  await tokenizer.save(folder);
  // Where every version of transformers.js looks for it, and without tags that none knows.
  const path = join(folder, 'tokenizer_config.json');
  const saved = JSON.parse(await readFile(path, 'utf8')) as Record<string, unknown>;
  const template = options.chatTemplate ?? saved.chat_template;
  if (typeof template === 'string') await writeText(path, jsonText({ ...saved, chat_template: withoutGenerationTags(template) }));
}

const jsonText = (value: object): string => `${JSON.stringify(value, null, 2)}\n`;

const writeText = (path: string, text: string): Promise<void> => writeAtomic(path, (file) => writeAll(file, Buffer.from(text)));

function modelGraph(model: LanguageModel, type: 'float' | 'float16', { signal, onProgress }: OnnxExportOptions): OnnxGraph {
  const { config } = model;
  const { parameters } = model;
  const stored = new Set(parameters.list.map(({ name }) => name));
  let done = 0;
  const data = (parameter: GraphParameter): OnnxTensor['data'] => {
    if (!stored.has(parameter.name)) {
      throw new ConfigError(
        `exportOnnx: '${parameter.name}' is kept in 8 or 4 bits; load the model with whole weights to export it`,
        {
          code: 'ERR_CONFIG',
          op: 'exportOnnx',
          argument: parameter.name,
        },
      );
    }
    return async function* () {
      for await (const values of valuesOf(parameters, parameter)) {
        signal?.throwIfAborted();
        yield values;
        done += values.byteLength;
        onProgress?.({ done, total });
      }
    };
  };
  const weights = { type, data };
  const graph = config.architecture === 'gpt2' ? gpt2Graph(config, weights) : decoderGraph(config, weights);
  const total = graph.tensors.reduce(
    (n, { data, shape, type }) => (typeof data === 'function' ? n + shape.reduce((a, b) => a * b, type === 'float' ? 4 : 2) : n),
    0,
  );
  return graph;
}

/** The values of a parameter as the graph takes them, some at a time. */
async function* valuesOf(parameters: Parameters<SpecTree>, { name, shape, type, transposed, plus }: GraphParameter) {
  const source = savedValues(parameters, name)!;
  const turned = transposed ? keep(scope(() => noGrad(() => transpose(viewOf(source, shape))))) : undefined;
  const all = turned ?? source;
  try {
    for (let from = 0; from < all.size; from += RUN) {
      const run = keep(
        scope(() => {
          const part = viewOf(all, [Math.min(RUN, all.size - from)], from);
          return part.dtype === 'f32' ? part : cast(part, 'f32');
        }),
      );
      const values = await readAs(run, 'f32').finally(() => run.dispose());
      if (plus !== 0) for (let i = 0; i < values.length; i++) values[i]! += plus;
      yield type === 'float16' ? halves(values, name) : values;
    }
  } finally {
    turned?.dispose();
    source.dispose();
  }
}

function halves(values: Float32Array, name: string): Uint16Array {
  const wide = values.find((value) => Math.abs(value) >= 65_520);
  if (wide === undefined) return Uint16Array.from(new Int32Array(values.buffer, values.byteOffset, values.length), toHalf);
  throw new ConfigError(`exportOnnx: '${name}' has a value of ${wide}, which f16 cannot hold; export it as f32`, {
    code: 'ERR_CONFIG',
    op: 'exportOnnx',
    argument: name,
    expected: 'magnitudes below 65520',
    actual: String(wide),
  });
}
