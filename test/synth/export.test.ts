import { mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { asyncBufferFromFile, parquetReadObjects } from 'hyparquet';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { conversations } from '../../src/data/conversations.ts';
import { exportRecords, formatRecord, type RecordFormat } from '../../src/synth/export.ts';
import { filter } from '../../src/synth/filter.ts';
import { pipeline, recordsOf, runPipeline } from '../../src/synth/pipeline.ts';
import type { InstructionRecord } from '../../src/synth/record.ts';
import { reportOutput, writeDatasetReport } from '../../src/synth/report.ts';
import { surveyor } from '../../src/synth/survey.ts';

let folder: string;
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'limbeck-export-'));
});
afterEach(() => rm(folder, { recursive: true, force: true }));

const records: InstructionRecord[] = Array.from({ length: 25 }, (_, i) => ({
  id: `r${i}`,
  messages: [
    ...(i % 3 === 0 ? [{ role: 'system' as const, content: 'Be kind.' }] : []),
    { role: 'user', content: `Question ${i}: é€😀 <b>?` },
    { role: 'assistant', content: `Answer ${i}\nin two lines` },
    ...(i % 2 === 0
      ? [
          { role: 'user' as const, content: 'And?' },
          { role: 'assistant' as const, content: `More ${i}` },
        ]
      : []),
  ],
  ...(i % 4 === 0
    ? {
        tags: { quality: 'good' as const, difficulty: null, category: 'Math' as const },
        reward: i,
        nearest: { distance: i / 100, id: 'r1', repeats: 0, cluster: `r${i}` },
        origin: { model: 'm', temperature: 1, topP: 1, seed: i, rules: ['label'] },
      }
    : {}),
}));

describe('data sets', () => {
  test.each<RecordFormat>(['messages', 'sharegpt', 'alpaca'])(
    '%s: the same from JSON Lines and from Parquet, and read as instruction data',
    async (format) => {
      const lines = join(folder, 'a.jsonl');
      const parquet = join(folder, 'a.parquet');
      expect(await exportRecords(lines, records, format)).toEqual({ records: 25 });
      expect(await exportRecords(parquet, records, format)).toEqual({ records: 25 });
      expect((await readdir(folder)).sort()).toEqual(['a.jsonl', 'a.parquet']);
      const fromLines = (await readFile(lines, 'utf8'))
        .trim()
        .split('\n')
        .map((line) => JSON.parse(line) as Record<string, unknown>);
      const fromParquet = await parquetReadObjects({ file: await asyncBufferFromFile(parquet) });
      for (const [i, row] of fromParquet.entries()) expect(fromLines[i]).toMatchObject(row);
      for (const path of [lines, parquet]) {
        let i = 0;
        for await (const { messages } of conversations(path, { strict: true }, () => {})) {
          const expected = records[i++]!.messages.map(({ role, content }) => ({ role, content }));
          if (format !== 'alpaca') expect(messages.map(({ role, content }) => ({ role, content }))).toEqual(expected);
          else expect(messages.at(-1)!.content).toBe(expected.at(-1)!.content);
        }
        expect(i).toBe(25);
      }
    },
  );

  test('no record, an unknown ending, a folder that is not there', async () => {
    expect(await exportRecords(join(folder, 'none.parquet'), [], 'messages')).toEqual({ records: 0 });
    expect(await parquetReadObjects({ file: await asyncBufferFromFile(join(folder, 'none.parquet')) })).toEqual([]);
    await expect(exportRecords(join(folder, 'a.csv'), records)).rejects.toMatchObject({ code: 'ERR_CONFIG' });
    for (const name of ['x/y.parquet', 'x/z.jsonl']) {
      expect(await exportRecords(join(folder, name), records)).toEqual({ records: 25 });
      const below = exportRecords(join(folder, name, 'file.parquet'), records);
      await expect(below).rejects.toMatchObject({ name: 'FileError', code: 'ERR_WRITE' });
    }
    expect((await readdir(join(folder, 'x'))).sort()).toEqual(['y.parquet', 'z.jsonl']);
  });

  test('the fields of the published form', () => {
    expect(formatRecord(records[4]!, 'sharegpt')).toMatchObject({
      conversation_id: 'r4',
      conversations: [{ from: 'human' }, { from: 'gpt' }, { from: 'human' }, { from: 'gpt' }],
      gen_input_configs: { temperature: 1, top_p: 1, input_generator: 'm', seed: 4 },
      input_quality: 'good',
      difficulty: null,
      instruct_reward: 4,
      min_neighbor_distance: 0.04,
    });
  });
});

describe('the report', () => {
  test('counts what is there', () => {
    const counter = surveyor({ samples: 5 });
    for (const record of records) counter.add(record);
    const survey = counter.done();
    expect(survey).toMatchObject({
      records: 25,
      turns: { 1: 12, 2: 13 },
      tags: { quality: { good: 7, none: 18 }, category: { Math: 7, none: 18 } },
      reward: { count: 7, mean: 12, least: 0, most: 24 },
      distance: { count: 7, most: 0.24 },
      rules: { label: 7 },
    });
    expect(survey.tags).not.toHaveProperty('difficulty');
    expect(survey.samples).toHaveLength(5);
    expect(survey.instruction.histogram.counts.reduce((a, b) => a + b, 0)).toBe(25);
    expect(surveyor().done()).toMatchObject({ records: 0, instruction: { count: 0, mean: 0 } });
  });

  test('samples have equal chances', () => {
    const shown = new Map<string, number>();
    for (let seed = 0; seed < 400; seed++) {
      const counter = surveyor({ samples: 5, seed });
      for (const record of records) counter.add(record);
      for (const { id } of counter.done().samples) shown.set(id, (shown.get(id) ?? 0) + 1);
    }
    // 80 expected, standard deviation 8.
    for (const { id } of records) expect(Math.abs((shown.get(id) ?? 0) - 80)).toBeLessThan(40);
  });

  test('is one file without a foreign address, and no text of a record is markup', async () => {
    const path = join(folder, 'report.html');
    const odd = {
      id: '<script>alert(1)</script>',
      messages: [{ role: '<script>' as 'user', content: '</p><script>x</script> \ud800' }],
    };
    await writeDatasetReport(path, [...records, odd], { title: 'A & B', time: 0 });
    const html = await readFile(path, 'utf8');
    expect(html).toContain('<title>A &amp; B</title>');
    expect(html).not.toContain('<script');
    expect(html).not.toMatch(/(?:src|href)=|https?:\/\//);
    expect(html.match(/<section/g)!.length).toBe(html.match(/<\/section>/g)!.length);
  });

  test('records that are no conversations are refused, and no file is left', async () => {
    const path = join(folder, 'none.html');
    const documents = [...records, { text: 'of limbeck synth instruct' } as never];
    await expect(writeDatasetReport(path, documents)).rejects.toMatchObject({
      ...{ name: 'DataError', code: 'ERR_MALFORMED' },
      message: expect.stringContaining(`record ${documents.length} has no messages`),
    });
    await expect(readFile(path)).rejects.toMatchObject({ code: 'ENOENT' });
  });

  test('of a pipeline: what each stage refused, with one of each', async () => {
    for await (const _ of runPipeline(pipeline(recordsOf(records)).through(filter({ quality: 'good' })), { output: folder }))
      void 0;
    expect(await reportOutput(folder)).toMatchObject({ records: 7 });
    const html = await readFile(join(folder, 'report.html'), 'utf8');
    expect(html).toContain('quality 18');
    expect(html).toContain('Question 1: é€😀 &lt;b&gt;?');
    await writeFile(join(folder, 'manifest.json'), '{');
    await expect(reportOutput(folder)).rejects.toMatchObject({ name: 'FileError', code: 'ERR_READ' });
  });
});
