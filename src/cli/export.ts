// limbeck export CHECKPOINT --to FORMAT: the files that other programs read

import { basename, resolve } from 'node:path';
import type { GgufType } from '../models/gguf.ts';
import type { LoadedModel } from '../models/model.ts';
import type { Adapter } from '../nn/lora.ts';
import { bytes } from '../train/format.ts';
import { command, commonArguments, Exit, exitCode, UsageError } from './command.ts';
import { interruptible } from './interrupt.ts';

/** What an exporter is told beside the model. */
export interface ExportSettings {
  /** Where the model was loaded from. */
  readonly folder: string;
  /** Folder of the adapter that is in use in the model, where `--adapter` names one. */
  readonly adapter: string | undefined;
  /** One of the exporter's `types`. */
  readonly type: string;
  readonly signal: AbortSignal;
  readonly onProgress: (progress: { readonly done: number; readonly total: number }) => void;
}

/** One way out: what `--to` names. */
export interface Exporter {
  /** Who reads it, for the help. */
  readonly description: string;
  /** Values of `--type`, the default first. */
  readonly types: readonly string[];
  /** Of the default name of the output: an ending for a file, or what a folder is called. */
  readonly suffix: string;
  /** Writes the model to `out`; returns what the user should know about it. */
  write(out: string, loaded: LoadedModel, settings: ExportSettings): Promise<readonly string[]>;
}

// Each loads its code when it is wanted.
const exporters: Readonly<Record<string, Exporter>> = {
  gguf: {
    description: 'a file for llama.cpp and Ollama',
    types: ['f16', 'bf16', 'f32', 'q8_0', 'q6_k', 'q5_k_m', 'q4_k_m'],
    suffix: '.gguf',
    async write(out, { model, tokenizer }, { folder, type, signal, onProgress }) {
      const { exportGguf } = await import('../models/gguf.ts');
      const { loadChatTemplate } = await import('../tokenizer/chat.ts');
      const template = await loadChatTemplate(folder, tokenizer);
      const name = basename(out, '.gguf');
      return exportGguf(out, model, tokenizer, {
        type: type as GgufType,
        chatTemplate: template?.source,
        name,
        signal,
        onProgress,
      });
    },
  },
  'gguf-adapter': {
    description: 'an adapter alone, for llama.cpp beside its base (--lora)',
    types: ['f32'],
    suffix: '-adapter.gguf',
    async write(out, { model }, { folder, adapter: given }) {
      const { loadAdapter } = await import('../models/adapter.ts');
      const { exportGgufAdapter } = await import('../models/gguf-adapter.ts');
      const adapter = await loadAdapter(given ?? folder, model);
      await exportGgufAdapter(out, model, adapter).finally(() => adapter.dispose());
      return [];
    },
  },
  safetensors: {
    description: 'a folder for Transformers and vLLM',
    types: ['f32', 'bf16'],
    suffix: '-safetensors',
    async write(out, { model, tokenizer, files }, { type }) {
      const { saveModel } = await import('../models/model.ts');
      await saveModel(out, model, tokenizer, { dtype: type as 'f32' | 'bf16', files });
      return [];
    },
  },
  onnx: {
    description: 'a folder for transformers.js and ONNX Runtime',
    types: ['f32', 'f16'],
    suffix: '-onnx',
    async write(out, { model, tokenizer, files }, { folder, type, signal, onProgress }) {
      const { exportOnnx } = await import('../models/onnx.ts');
      const { loadChatTemplate } = await import('../tokenizer/chat.ts');
      const template = await loadChatTemplate(folder, tokenizer);
      const generation = JSON.parse(files['generation_config.json'] ?? '{}') as Record<string, unknown>;
      const told = { chatTemplate: template?.source, generation };
      await exportOnnx(out, model, tokenizer, { type: type as 'f32' | 'f16', ...told, signal, onProgress });
      return [];
    },
  },
};

const formats = Object.entries(exporters);

export const exportCommand = command({
  meta: { name: 'export', description: 'Write a checkpoint in the format of another program.' },
  args: {
    checkpoint: {
      type: 'positional',
      required: true,
      description: 'Checkpoint folder, or the output folder of a run.',
      valueHint: 'folder',
    },
    to: {
      type: 'string',
      description: `${formats.map(([name, { description }]) => `${name} (${description})`).join(', ')}.`,
      valueHint: 'format',
    },
    type: {
      type: 'string',
      description: `Of the weights. ${formats.map(([name, { types }]) => `${name}: ${types.join(', ')}`).join('; ')}. Default: the first.`,
      valueHint: 'type',
    },
    adapter: {
      type: 'string',
      description: 'Folder of an adapter whose change the weights get. Default: that of the checkpoint, if it is one.',
      valueHint: 'folder',
    },
    out: { type: 'string', alias: 'o', description: 'Where to write. Default: named after the checkpoint.', valueHint: 'path' },
    ...commonArguments,
  },
  examples: `
limbeck export runs/student --to gguf --type q8_0
limbeck export runs/student --to safetensors --out student
limbeck export models/base --adapter runs/lora/checkpoints/step-200 --to gguf
`.trim(),
  async run({ args }) {
    const names = formats.map(([name]) => name).join(', ');
    if (args.to === undefined) throw new UsageError(`export to what? Give --to: ${names}`);
    const exporter = Object.hasOwn(exporters, args.to) ? exporters[args.to] : undefined;
    if (exporter === undefined) throw new UsageError(`--to is "${args.to}"; there are ${names}`);
    const type = args.type ?? exporter.types[0]!;
    if (!exporter.types.includes(type)) {
      throw new UsageError(`--type is "${type}"; ${args.to} has ${exporter.types.join(', ')}`);
    }
    const out = args.out ?? `${basename(resolve(args.checkpoint))}${exporter.suffix}`;
    const { resolveCheckpoint } = await import('../models/folder.ts');
    const { loadModel } = await import('../models/model.ts');
    const started = performance.now();
    const progress = progressLine();
    const notes = await interruptible(
      async (signal) => {
        const folder = await resolveCheckpoint(args.checkpoint);
        // A rounded copy in the place of what a run goes on from, or before its newer checkpoints, would cost work.
        if ([folder, args.checkpoint].some((own) => resolve(own) === resolve(out))) {
          throw new UsageError(`--out is ${out}, where the checkpoint lies; give another path`);
        }
        const loaded = await loadModel(folder);
        let beside: Adapter | undefined;
        try {
          const adapter = args.adapter === undefined ? undefined : await resolveCheckpoint(args.adapter);
          if (adapter !== undefined) {
            const { loadAdapter } = await import('../models/adapter.ts');
            beside = await loadAdapter(adapter, loaded.model);
          }
          return await exporter.write(out, loaded, { folder, adapter, type, signal, onProgress: progress.show });
        } catch (error) {
          if (error === signal.reason) throw new Exit(exitCode.interrupted);
          throw error;
        } finally {
          progress.clear();
          beside?.dispose();
          loaded.model.dispose();
        }
      },
      (signal) => process.stderr.write(`${signal}: stopping\n`),
    );
    const seconds = (performance.now() - started) / 1000;
    if (args.json) {
      process.stdout.write(`${JSON.stringify({ type: 'export', format: args.to, weights: type, out, notes, seconds })}\n`);
      return;
    }
    for (const note of notes) process.stderr.write(`note: ${note}\n`);
    process.stdout.write(`${out}\n`);
  },
});

/** On a terminal, a line that redraws itself. */
function progressLine() {
  const live = process.stderr.isTTY === true && process.env.TERM !== 'dumb';
  let shown = '';
  const draw = (text: string): void => {
    if (text === shown) return;
    process.stderr.write(`\r${text}\x1b[K`);
    shown = text;
  };
  return {
    show({ done, total }: { readonly done: number; readonly total: number }): void {
      if (live) draw(`${Math.floor((100 * done) / Math.max(total, 1))} % of ${bytes(total)}`);
    },
    clear(): void {
      if (shown !== '') draw('');
    },
  };
}
