// A provider from what one writes on a command line or in a run file.

import { ConfigError } from '../../tensor/errors.ts';
import type { Provider } from '../provider.ts';
import { ollamaProvider } from './ollama.ts';
import { type OpenAIOptions, openaiProvider } from './openai.ts';

export interface ProviderSpec {
  /**
   * Where the model is: `http://...` or `https://...` for a server of OpenAI's protocol, `ollama:NAME` for a model of an Ollama server, a
   * path that ends in `.gguf`, or the folder of one of our models.
   */
  readonly provider: string;
  /** The model's name on a server. */
  readonly model?: string;
  /** Key of a server. Default: the environment's LIMBECK_API_KEY. */
  readonly key?: string;
  readonly dialect?: OpenAIOptions['dialect'];
  /** Calls at work at once. */
  readonly concurrency?: number;
  /** Most tokens of a prompt and its answer, of a .gguf file. Default 2048, or what the model was trained for if that is less. */
  readonly context?: number;
  /** Threads of a model in this process. Default: of ours all cores, of a .gguf file all but one. */
  readonly threads?: number;
  /** Chat template of a local model: the name of a style, or Jinja source. Default: the model's own. */
  readonly template?: string;
  /** Keep keys and values of a local model's folder between calls: see {@link LocalOptions}. Default false. */
  readonly reuse?: boolean;
}

/** Opens a provider. @throws ConfigError, FormatError */
export async function openProvider(spec: ProviderSpec): Promise<Provider> {
  const { provider, model, concurrency, context, dialect, reuse, template, threads } = spec;
  const key = spec.key ?? process.env.LIMBECK_API_KEY;
  const common = { ...(concurrency === undefined ? {} : { concurrency }), ...(key === undefined ? {} : { key }) };
  if (/^https?:\/\//.test(provider)) {
    if (model === undefined) {
      throw new ConfigError(`provider: which model of ${provider}? Give its name as \`model\``, {
        code: 'ERR_CONFIG',
        op: 'openProvider',
        argument: 'model',
      });
    }
    return openaiProvider({ url: provider, model, ...common, ...(dialect === undefined ? {} : { dialect }) });
  }
  if (provider.startsWith('ollama:')) return ollamaProvider({ model: provider.slice('ollama:'.length), ...common });
  if (provider.endsWith('.gguf')) {
    const { openLlamaProvider } = await import('./llama.ts');
    return openLlamaProvider({
      file: provider,
      ...(concurrency === undefined ? {} : { sequences: concurrency }),
      ...(context === undefined ? {} : { context }),
      ...(threads === undefined ? {} : { threads }),
      ...(template === undefined ? {} : { template }),
    });
  }
  const { openLocalProvider } = await import('./local.ts');
  return openLocalProvider(provider, {
    ...(concurrency === undefined ? {} : { batch: concurrency }),
    ...(threads === undefined ? {} : { threads }),
    ...(template === undefined ? {} : { template }),
    ...(model === undefined ? {} : { name: model }),
    ...(reuse === undefined ? {} : { reuse }),
  });
}
