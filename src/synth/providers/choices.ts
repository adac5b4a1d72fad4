// Holding a text to given choices, token by token.

import { ConfigError } from '../../tensor/errors.ts';
import type { Tokenizer } from '../../tokenizer/tokenizer.ts';

/**
 * Which ids may follow those generated so far, so that the text is one of `choices` and then ends; `end` is the id that ends it.
 * A choice is taken as the tokenizer encodes it.
 */
export function choiceMask(
  choices: readonly string[],
  tokenizer: Tokenizer,
  size: number,
  end: number,
): (generated: readonly number[]) => Uint8Array {
  const encoded = choices.map((choice) => tokenizer.encode(choice, { special: false }));
  if (encoded.length === 0 || encoded.some((ids) => ids.length === 0)) {
    throw new ConfigError('choices: none of them may be empty', { code: 'ERR_CONFIG', op: 'generate', argument: 'choices' });
  }
  return (generated) => {
    const mask = new Uint8Array(size);
    for (const ids of encoded) {
      if (generated.length > ids.length || generated.some((id, i) => ids[i] !== id)) continue;
      mask[generated.length === ids.length ? end : ids[generated.length]!] = 1;
    }
    return mask;
  };
}
