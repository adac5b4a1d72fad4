// Stages that find repeats: by embedding, and by shared word sequences.

import { type MinHashOptions, minHashIndex } from './minhash.ts';
import { type NeighbourOptions, neighbours, unit } from './neighbours.ts';
import type { GatherStage, RecordStage } from './pipeline.ts';
import { type Provider, unable } from './provider.ts';
import { type InstructionRecord, instructionOf } from './record.ts';

/** Puts the embedding of its instruction on each record. Calls that come together go in one request. */
export function embed(options: {
  readonly provider: Provider;
  readonly batch?: number;
}): RecordStage<InstructionRecord, InstructionRecord> {
  const { provider, batch = 32 } = options;
  if (!provider.can.embed) throw unable(provider.name, 'embed texts', 'give a provider with an embedding model');
  const waiting: { text: string; settle: (vector: Promise<Float32Array>) => void }[] = [];
  const flush = (signal: AbortSignal): void => {
    const taken = waiting.splice(0, batch);
    if (taken.length === 0) return;
    const vectors = provider.embed(
      taken.map(({ text }) => text),
      { signal },
    );
    for (const [i, { settle }] of taken.entries()) settle(vectors.then((all) => all[i]!));
  };
  return {
    kind: 'record',
    name: 'embed',
    settings: [provider.name],
    concurrency: batch * provider.concurrency,
    async run(record, { signal }) {
      const vector = await new Promise<Float32Array>((resolve) => {
        waiting.push({ text: instructionOf(record), settle: resolve });
        if (waiting.length >= batch) flush(signal);
        else setImmediate(() => flush(signal));
      });
      const units = unit(vector, vector.length, 0);
      const bytes = Buffer.from(units.buffer, units.byteOffset, units.byteLength);
      return { value: { ...record, embedding: bytes.toString('base64') } };
    },
  };
}

export interface DedupeOptions extends Omit<NeighbourOptions, 'signal'> {
  /** `first` keeps the first record of each cluster, `all` only says how near the nearest is. Default `first`. */
  readonly keep?: 'first' | 'all';
}

/** Nearest neighbours by the embeddings of {@link embed}, which are taken off again. Vectors are held in memory. */
export function dedupe(options: DedupeOptions = {}): GatherStage<InstructionRecord, InstructionRecord> {
  const { keep = 'first', threshold = 0.05 } = options;
  return {
    kind: 'gather',
    name: 'dedupe',
    settings: [keep, threshold],
    async run(records, output, { signal }) {
      const ids: string[] = [];
      const vectors: Float32Array[] = [];
      for await (const { id, embedding = '' } of records()) {
        ids.push(id);
        const bytes = Buffer.from(embedding, 'base64');
        vectors.push(new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length)));
      }
      const found = await neighbours(vectors, { ...options, signal });
      let i = 0;
      for await (const { embedding: _, ...record } of records()) {
        const [at, first] = [found.nearest[i]!, found.cluster[i]!];
        const nearest = {
          distance: Number(found.distance[i]!.toPrecision(6)),
          id: at < 0 ? ids[i]! : ids[at]!,
          repeats: found.repeats[i]!,
          cluster: ids[first]!,
        };
        if (keep === 'all' || first === i) await output.keep({ ...record, nearest });
        else await output.drop(record, 'repeat', `of ${ids[first]}`);
        i++;
      }
    },
  };
}

/** Drops records whose instruction shares most word sequences with an earlier one. */
export function dedupeText(options: MinHashOptions = {}): GatherStage<InstructionRecord, InstructionRecord> {
  return {
    kind: 'gather',
    name: 'dedupe-text',
    settings: options,
    async run(records, output) {
      const index = minHashIndex(options);
      const ids: string[] = [];
      for await (const record of records()) {
        ids.push(record.id);
        const repeat = index.add(instructionOf(record));
        if (repeat === undefined) await output.keep(record);
        else await output.drop(record, 'repeat-text', `of ${ids[repeat.of]}, ${repeat.similarity.toFixed(2)}`);
      }
    },
  };
}
