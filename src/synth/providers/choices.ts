// Holding a text to given choices, token by token.

import { ConfigError } from '../../tensor/errors.ts';

/**
 * Which ids may follow those generated so far, so that the text is one of the choices and then ends.
 * @param encoded the ids of each choice
 * @param size ids that there are
 * @param ends ids that end a text
 */
export function choiceMask(
  encoded: readonly ArrayLike<number>[],
  size: number,
  ends: readonly number[],
): (generated: readonly number[]) => Uint8Array {
  if (encoded.length === 0 || encoded.some((ids) => ids.length === 0)) {
    throw new ConfigError('choices: none of them may be empty', { code: 'ERR_CONFIG', op: 'generate', argument: 'choices' });
  }
  return (generated) => {
    const mask = new Uint8Array(size);
    for (const ids of encoded) {
      if (generated.length > ids.length || generated.some((id, i) => ids[i] !== id)) continue;
      for (const id of generated.length === ids.length ? ends : [ids[generated.length]!]) mask[id] = 1;
    }
    return mask;
  };
}
