// config.json as Transformers writes it, to and from our own.
import type { Tokenizer } from '../tokenizer/tokenizer.ts';
import { configFields, type ModelConfig } from './registry.ts';

/** Fields that Transformers refuses as whole numbers: it wants a cap of 30.0. */
const floats = [
  'attn_logit_softcapping',
  'final_logit_softcapping',
  'rope_theta',
  'rope_local_base_freq',
  'factor',
  'low_freq_factor',
  'high_freq_factor',
  'rms_norm_eps',
  'layer_norm_epsilon',
  'initializer_range',
  'attention_dropout',
] as const;

/**
 * The text of a config.json.
 * @param more further fields
 */
export function transformersText(
  config: ModelConfig,
  tokenizer?: Pick<Tokenizer, 'bos' | 'eos' | 'pad'>,
  more: Readonly<Record<string, unknown>> = {},
): string {
  const json = {
    ...configFields(config),
    torch_dtype: 'float32',
    bos_token_id: tokenizer?.bos ?? null,
    eos_token_id: tokenizer?.eos ?? null,
    pad_token_id: tokenizer?.pad ?? null,
    ...more,
  };
  const whole = new RegExp(`("(?:${floats.join('|')})": \\d+)(?=[,\\n])`, 'g');
  return `${JSON.stringify(json, null, 2).replace(whole, '$1.0')}\n`;
}
