import { appendFile, mkdtemp, readdir, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Script } from 'node:vm';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { FileError } from '../../src/tensor/errors.ts';
import { parseRun } from '../../src/train/config.ts';
import type { TrainEvent } from '../../src/train/events.ts';
import { bytes, count, duration, significant } from '../../src/train/format.ts';
import { MetricsWriter, readMetrics } from '../../src/train/metrics.ts';
import { script } from '../../src/train/page.ts';
import { record } from '../../src/train/record.ts';
import { readRun, renderReport, runFigures, writeReport } from '../../src/train/report.ts';
import { syntheticEvents, trio } from './synthetic.ts';

let folder: string;
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'limbeck-report-'));
});
afterEach(() => rm(folder, { recursive: true, force: true }));

const runs = trio.map((run) => ({ name: run.name, events: syntheticEvents(run), config: { seed: 0 } }));

describe('metrics.jsonl', () => {
  const events = syntheticEvents({ ...trio[0]!, steps: 12 });

  async function write(list: readonly TrainEvent[], resumedStep?: number): Promise<void> {
    const metrics = await MetricsWriter.open(folder, resumedStep);
    for (const event of list) await metrics.write(event);
    await metrics.close();
  }

  test('holds every event, with its time', async () => {
    await write(events);
    const read = await readMetrics(join(folder, 'metrics.jsonl'));
    expect(read.map(({ time: _, ...event }) => event)).toEqual(events);
    expect(read.every((event) => Math.abs(event.time - Date.now()) < 60_000)).toBe(true);
  });

  test('on resume, later steps and an unfinished line go', async () => {
    await write(events);
    await appendFile(join(folder, 'metrics.jsonl'), '{"type":"st');
    const fresh = events.filter((event) => 'step' in event && Number(event.step) > 7);
    await write(fresh, 7);
    const read = await readMetrics(join(folder, 'metrics.jsonl'));
    expect(read.map(({ time: _, ...event }) => event)).toEqual(events);
  });

  test('a fresh run in a used folder keeps the old file beside', async () => {
    await write(events);
    await write(events.slice(0, 2));
    expect(await readMetrics(join(folder, 'metrics.jsonl'))).toHaveLength(2);
    expect(await readMetrics(join(folder, 'metrics.jsonl.old'))).toHaveLength(events.length);
  });

  test('a resume without a file starts one', async () => {
    await write(events.slice(0, 3), 5);
    expect(await readMetrics(join(folder, 'metrics.jsonl'))).toHaveLength(3);
  });

  test('a folder that cannot be made is a FileError', async () => {
    await write([]);
    await expect(MetricsWriter.open(join(folder, 'metrics.jsonl'))).rejects.toBeInstanceOf(FileError);
  });
});

describe('report.html', () => {
  test('asks for nothing from outside', async () => {
    const html = await renderReport(runs);
    expect(html).not.toMatch(/(src|href)\s*=|@import|url\(|fetch\(/i);
    expect(html.match(/https?:\/\/[^\s"'<)]*/g)).toEqual(['https://github.com/leeoniya/uPlot']); // the notice of its licence
  });

  test('its script parses, and its data survives texts that end scripts', async () => {
    new Script(script);
    const evil = '</script><script>alert(1)</script>';
    const html = await renderReport([
      { name: evil, events: [...runs[0]!.events, { type: 'sample', step: 1, prompt: evil, text: evil }] },
    ]);
    expect(html.match(/<script/g)).toHaveLength(3);
    const data = JSON.parse(/id="data">(.*?)<\/script>/s.exec(html)![1]!);
    expect(data.runs[0].name).toBe(evil);
  });

  test('has a row for each run and says what distillation brought', async () => {
    const html = await renderReport(runs, { title: 'Three runs' });
    expect(html).toContain('<title>Three runs</title>');
    expect(html.match(/<tr>/g)).toHaveLength(4);
    expect(html).toMatch(
      /After the same 819 k tokens, student distilled has a validation loss of 4\.0\d\d and student from scratch of 4\.2/,
    );
    expect(html).toContain('KL to teacher');
  });

  test('columns that nobody can fill are left out; equal names are told apart; empty runs are no error', async () => {
    const html = await renderReport([
      { name: 'a', events: [] },
      { name: 'a', events: runs[0]!.events },
    ]);
    expect(html).toContain('</i>a 2</th>');
    expect(html).not.toContain('KL to teacher');
  });

  test('long runs are thinned, spikes stay', async () => {
    const events = syntheticEvents({ ...trio[0]!, steps: 20_000 }).map((event) =>
      event.type === 'step' && event.step === 12_345 ? { ...event, gradientNorm: 77 } : event,
    );
    const html = await renderReport([{ name: 'long', events }]);
    const { y } = JSON.parse(/id="data">(.*?)<\/script>/s.exec(html)![1]!).runs[0].train.gradientNorm;
    expect(y.length).toBeLessThanOrEqual(2000);
    expect(y).toContain(77);
    expect(html.length).toBeLessThan(1_000_000);
  });

  test('figures', () => {
    const figures = runFigures(runs[2]!.events);
    expect(figures).toMatchObject({ parameters: 900_000, steps: 400, tokens: 819_200, peakMemory: 46_800_000 });
    expect(figures.evaluation?.kl).toBeGreaterThan(0);
    expect(runFigures([])).toEqual({ steps: 0, tokens: 0, seconds: 0 });
  });

  test('is written whole, and a folder without a run is refused', async () => {
    await writeReport(join(folder, 'deep/report.html'), runs);
    expect(await readdir(join(folder, 'deep'))).toEqual(['report.html']);
    await expect(readRun(folder)).rejects.toMatchObject({ code: 'ERR_READ' });
  });
});

describe('record', () => {
  const run = () =>
    parseRun({ kind: 'pretrain', output: folder, tokenizer: 'x', data: { text: 'x' }, model: 'x', steps: 12, name: 'noted' });
  const stream = async function* (events: readonly TrainEvent[]) {
    yield* events;
  };

  test('passes every event on and leaves metrics, TensorBoard, settings and report', async () => {
    const events = syntheticEvents({ ...trio[0]!, name: 'noted', steps: 12 });
    const passed: TrainEvent[] = [];
    for await (const event of record(run(), stream(events))) passed.push(event);
    expect(passed).toEqual(events);
    const names = (await readdir(folder)).sort();
    expect(names).toEqual([expect.stringMatching(/^events\.out\.tfevents\./), 'metrics.jsonl', 'report.html', 'run.json']);
    const read = await readRun(folder);
    expect([read.name, read.events.length]).toEqual(['noted', events.length]);
    expect(read.config).toEqual(run());
    expect(await readFile(join(folder, 'report.html'), 'utf8')).toContain('Fellow citizens');
  });

  test('breaking off closes the run behind it', async () => {
    let closed = false;
    const source = async function* () {
      try {
        yield* syntheticEvents({ ...trio[0]!, steps: 12 });
      } finally {
        closed = true;
      }
    };
    for await (const event of record(run(), source())) if (event.type === 'step') break;
    expect(closed).toBe(true);
    expect(await readMetrics(join(folder, 'metrics.jsonl'))).toHaveLength(2);
  });
});

test('numbers as people read them', () => {
  expect([0, 999, 9999, 12_345, 1_234_567, 2_614_341_888].map(count)).toEqual([
    '0',
    '999',
    '9,999',
    '12.3 k',
    '1.23 M',
    '2.61 B',
  ]);
  expect([0, 1023, 1536, 3 * 2 ** 30].map(bytes)).toEqual(['0 B', '1023 B', '1.50 KiB', '3.00 GiB']);
  expect([0.84, 9.96, 42, 185, 7620, Number.NaN].map(duration)).toEqual([
    '0.8 s',
    '10 s',
    '42 s',
    '3 min 05 s',
    '2 h 07 min',
    '–',
  ]);
  expect([0, 1.23456, 123.456, 0.00012345, 1e7].map(significant)).toEqual(['0.00', '1.23', '123', '1.23e-4', '1.00e+7']);
});
