// Keys and values that are kept from call to call, so that a prompt which begins as an earlier text did is read from where they part.
import { ConfigError } from '../tensor/errors.ts';
import { createCache, type KeyValueCache, resized, reusable } from './cache.ts';
import { isLong } from './decoder.ts';
import type { LanguageModel } from './model.ts';

/** Remembers the texts of earlier calls. */
export interface PrefixCache {
  /** Tokens of prompts that did not have to be read again, in all calls so far. */
  readonly reused: number;
  /** Forgets all texts, as it must where the model's weights have changed; the memory stays for the next. */
  clear(): void;
  dispose(): void;
  /** @internal Places for the texts of one call. */
  open(model: LanguageModel, texts: number, capacity: number): Places;
}

/** Sequences of a cache, each free or held by a text. */
export interface Places {
  readonly cache: KeyValueCache;
  /**
   * A free place for a prompt whose text may come to `limit` tokens, with as many of its tokens there already as `cache.lengths` says; undefined
   * when none is free.
   */
  take(prompt: Int32Array, limit: number): number | undefined;
  /** Frees a place, whose text was these ids. */
  give(place: number, ids: Int32Array): void;
  /** @param sound whether what was computed can be relied on */
  close(sound: boolean): void;
}

/**
 * A cache for the calls of one model that follow each other: turns of a conversation, prompts with a common beginning. Each prompt takes the
 * place of the text that it goes on from, sharing at least half of it, or of the one that was used longest ago; only the tokens that are not
 * shared are read. Where a local layer has already lost keys that would be
 * needed, because the earlier text went on beyond its window, the prompt is read from the beginning.
 *
 * Greedy texts are those without it; logits may differ in the last bits, as they do between one large step and several.
 * @param options.texts how many are remembered; more where a call works on more at a time. Default 1.
 */
export function createPrefixCache({ texts = 1 }: { readonly texts?: number } = {}): PrefixCache {
  if (!(Number.isInteger(texts) && texts >= 1)) throw refuse(`texts is ${texts}, expected a whole number from 1`);
  let owner: LanguageModel | undefined;
  let cache: KeyValueCache | undefined;
  let ids: Int32Array[] = []; // of each place: those whose keys and values are there
  let used: number[] = []; // when each was last given back
  let calls = 0;
  let reused = 0;
  let open = false;
  const clear = (): void => {
    ids = ids.map(() => new Int32Array(0));
    cache?.lengths.fill(0);
  };
  return {
    get reused() {
      return reused;
    },
    clear() {
      if (open) throw refuse('a call that uses it is under way');
      clear();
    },
    dispose() {
      if (open) throw refuse('a call that uses it is under way');
      cache?.dispose();
      cache = undefined;
      ids = [];
    },
    open(model, wanted, most) {
      if (open) throw refuse('another call uses it; give each its own, or let one end before the next');
      if (owner !== undefined && owner !== model) throw refuse('it belongs to another model');
      owner = model;
      const before = cache;
      const sequences = Math.max(texts, wanted, before?.sequences ?? 0);
      if (before === undefined) cache = createCache(sequences, most);
      else if (sequences > before.sequences || most > before.capacity) {
        // Twice as much as before, so that a conversation is not copied at every turn.
        const room =
          most > before.capacity ? Math.min(Math.max(most, 2 * before.capacity), model.config.context) : before.capacity;
        cache = resized(before, model.config, sequences, room);
        before.dispose();
      }
      const own = cache!;
      ids = Array.from({ length: sequences }, (_, place) => ids[place] ?? new Int32Array(0));
      used = Array.from({ length: sequences }, (_, place) => used[place] ?? 0);
      const free = new Set(ids.keys());
      open = true;
      return {
        cache: own,
        take(prompt, limit) {
          // At least one token is read, for there are no logits otherwise.
          const shared = (place: number): number => commonLength(ids[place]!, prompt.subarray(0, -1));
          const alike = (place: number): boolean => turnedAlike(model, own.limits[place]!, limit);
          const kept = new Map([...free].map((place) => [place, alike(place) ? reusable(own, place, shared(place)) : 0]));
          // Not the better half of another text for the sake of a few tokens that all have.
          const worth = (place: number): number => (2 * kept.get(place)! >= ids[place]!.length ? kept.get(place)! : 0);
          const place = [...free].sort((a, b) => worth(b) - worth(a) || used[a]! - used[b]!)[0];
          if (place === undefined) return undefined;
          free.delete(place);
          own.lengths[place] = kept.get(place)!;
          own.limits[place] = limit;
          reused += own.lengths[place]!;
          return place;
        },
        give(place, text) {
          ids[place] = text.slice(0, own.lengths[place]);
          used[place] = ++calls;
          free.add(place);
        },
        close(sound) {
          open = false;
          if (!sound) clear();
        },
      };
    },
  };
}

/** Places that are forgotten with the call. */
export function temporaryPlaces(texts: number, capacity: number): Places {
  const cache = createCache(texts, capacity);
  const free = Array.from({ length: texts }, (_, place) => place);
  return {
    cache,
    take(_, limit) {
      const place = free.pop();
      if (place === undefined) return undefined;
      cache.lengths[place] = 0;
      cache.limits[place] = limit;
      return place;
    },
    give: (place) => void free.push(place),
    close: () => cache.dispose(),
  };
}

/** Whether keys of a text of one length serve in one of the other. */
function turnedAlike({ config }: LanguageModel, one: number, other: number): boolean {
  return !('ropeScaling' in config) || isLong(config, one) === isLong(config, other);
}

function commonLength(a: Int32Array, b: Int32Array): number {
  const most = Math.min(a.length, b.length);
  for (let i = 0; i < most; i++) if (a[i] !== b[i]) return i;
  return most;
}

function refuse(problem: string): ConfigError {
  return new ConfigError(`createPrefixCache: ${problem}`, { code: 'ERR_CONFIG', op: 'createPrefixCache', argument: 'cache' });
}
