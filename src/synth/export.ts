// Records as data sets in the usual forms, as JSON Lines or Parquet. Memory does not grow with their number.

import { mkdir, mkdtemp, open, rename, rm } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import type { SchemaElement } from 'hyparquet';
import { writeAtomic, writeError } from '../io/atomic.ts';
import { ConfigError } from '../tensor/errors.ts';
import { lineWriter } from './journal.ts';
import { type InstructionRecord, instructionOf, responseOf } from './record.ts';

/** `sharegpt`: conversations of from, value, with all that is known; `alpaca`: instruction, input, output; `messages`: role, content. */
export type RecordFormat = 'sharegpt' | 'alpaca' | 'messages';

/** A record in a form. Of several turns, Alpaca's has the first question and the last answer. */
export function formatRecord(record: InstructionRecord, format: RecordFormat): Record<string, unknown> {
  const { id, messages, tags, nearest, reward, origin } = record;
  switch (format) {
    case 'messages':
      return { id, messages };
    case 'alpaca': {
      const system = messages[0]?.role === 'system' ? messages[0].content : '';
      return { id, system, instruction: instructionOf(record), input: '', output: responseOf(record) };
    }
    case 'sharegpt': {
      const from = { system: 'system', user: 'human', assistant: 'gpt' } as const;
      return {
        conversation_id: id,
        instruction: instructionOf(record),
        response: responseOf(record),
        conversations: messages.map(({ role, content }) => ({ from: from[role], value: content })),
        gen_input_configs:
          origin === undefined
            ? null
            : { temperature: origin.temperature, top_p: origin.topP, input_generator: origin.model, seed: origin.seed },
        difficulty: tags?.difficulty ?? null,
        input_quality: tags?.quality ?? null,
        task_category: tags?.category ?? null,
        safety: tags?.safety ?? null,
        language: tags?.language ?? null,
        instruct_reward: reward ?? null,
        min_neighbor_distance: nearest?.distance ?? null,
        repeat_count: nearest?.repeats ?? null,
        min_similar_conversation_id: nearest?.cluster ?? null,
      };
    }
    default:
      return format satisfies never;
  }
}

/** Writes records to a file: `.jsonl` or `.parquet` says which kind. @throws ConfigError for another ending; FileError `ERR_WRITE` */
export async function exportRecords(
  path: string,
  records: AsyncIterable<InstructionRecord> | Iterable<InstructionRecord>,
  format: RecordFormat = 'messages',
): Promise<{ readonly records: number }> {
  if (path.endsWith('.parquet')) return { records: await writeParquet(path, records, format) };
  if (!path.endsWith('.jsonl')) {
    throw new ConfigError(`synth: ${path} ends in neither .jsonl nor .parquet`, {
      code: 'ERR_CONFIG',
      op: 'exportRecords',
      argument: 'path',
      expected: '.jsonl or .parquet',
      actual: path,
    });
  }
  let written = 0;
  await writeAtomic(path, async (file) => {
    const lines = lineWriter(file);
    for await (const record of records) await lines.write(JSON.stringify(formatRecord(record, format)));
    await lines.end();
    written = lines.lines;
  });
  return { records: written };
}

const rowGroup = 10_000;

async function writeParquet(
  path: string,
  records: AsyncIterable<InstructionRecord> | Iterable<InstructionRecord>,
  format: RecordFormat,
): Promise<number> {
  const { ParquetWriter, fileWriter } = await import('hyparquet-writer');
  // The package writes to a path of its own; only a whole file takes the place of an old one.
  const folder = await place(path).catch((error: unknown) => {
    throw writeError(path, error);
  });
  const partial = join(folder, 'data.parquet');
  try {
    const writer = new ParquetWriter({ writer: fileWriter(partial), schema: schemaOf(format) });
    let rows: Record<string, unknown>[] = [];
    let written = 0;
    const flush = async (): Promise<void> => {
      if (rows.length === 0) return;
      const taken = rows;
      rows = [];
      written += taken.length;
      await writer.write({
        columnData: columnsOf(format).map(({ name }) => ({ name, data: taken.map((row) => row[name] ?? null) })),
        rowGroupSize: rowGroup,
      });
    };
    for await (const record of records) {
      rows.push(formatRecord(record, format));
      if (rows.length >= rowGroup) await flush();
    }
    await flush();
    await writer.finish();
    const file = await open(partial, 'r');
    await file.sync().finally(() => file.close());
    await rename(partial, path);
    return written;
  } catch (error) {
    throw writeError(path, error);
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}

/** A new folder beside a path. */
async function place(path: string): Promise<string> {
  await mkdir(dirname(path), { recursive: true });
  return mkdtemp(join(dirname(path), '.limbeck-parquet-'));
}

type Kind = 'text' | 'number' | readonly string[]; // a list of objects with these texts
const columnsOf = (format: RecordFormat): readonly { readonly name: string; readonly kind: Kind }[] => {
  const of = (kind: Kind, names: readonly string[]) => names.map((name) => ({ name, kind }));
  if (format === 'messages') return [...of('text', ['id']), ...of(['role', 'content'], ['messages'])];
  if (format === 'alpaca') return of('text', ['id', 'system', 'instruction', 'input', 'output']);
  return [
    ...of('text', ['conversation_id', 'instruction', 'response']),
    ...of(['from', 'value'], ['conversations']),
    ...of('text', ['difficulty', 'input_quality', 'task_category', 'safety', 'language', 'min_similar_conversation_id']),
    ...of('number', ['instruct_reward', 'min_neighbor_distance', 'repeat_count']),
  ];
};

function schemaOf(format: RecordFormat): SchemaElement[] {
  const columns = columnsOf(format);
  const optional = 'OPTIONAL' as const;
  const text = { type: 'BYTE_ARRAY', converted_type: 'UTF8', repetition_type: optional } as const;
  return [
    { name: 'root', num_children: columns.length },
    ...columns.flatMap(({ name, kind }): SchemaElement[] => {
      if (kind === 'text') return [{ name, ...text }];
      if (kind === 'number') return [{ name, type: 'DOUBLE', repetition_type: optional } as const];
      return [
        { name, repetition_type: optional, num_children: 1, converted_type: 'LIST' } as const,
        { name: 'list', repetition_type: 'REPEATED', num_children: 1 } as const,
        { name: 'element', repetition_type: optional, num_children: kind.length } as const,
        ...kind.map((field) => ({ name: field, ...text })),
      ];
    }),
  ];
}
