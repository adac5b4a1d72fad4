// report.html of a data set: one file that asks nothing of any server, with counts, lengths, tags, distances, samples, and what each
// stage refused.

import { join } from 'node:path';
import { writeAtomic } from '../io/atomic.ts';
import { DataError, FileError } from '../tensor/errors.ts';
import { count, significant } from '../train/format.ts';
import { encode, pageHtml, style } from '../train/page.ts';
import { readManifest, readRecords, type StageSummary } from './pipeline.ts';
import { type InstructionRecord, instructionOf } from './record.ts';
import { type Histogram, type Spread, type Survey, surveyor } from './survey.ts';

export interface DatasetReportOptions {
  /** Default: `Data set`. */
  readonly title?: string;
  /** Further figures. Default: none. */
  readonly facts?: Readonly<Record<string, string>>;
  /** Stages with what they dropped, in order. Default: none. */
  readonly stages?: readonly StageSummary[];
  /** Folder of the stages' files, to show some of what was dropped. */
  readonly folder?: string;
  /** Milliseconds since 1970; default now. */
  readonly time?: number;
}

/** Reads a data set once, counts it, and writes the report. @throws FileError; DataError `ERR_MALFORMED` for records that are no conversations */
export async function writeDatasetReport(
  path: string,
  records: AsyncIterable<InstructionRecord> | Iterable<InstructionRecord>,
  options: DatasetReportOptions = {},
): Promise<Survey> {
  const counter = surveyor();
  let number = 0;
  for await (const record of records) {
    number++;
    if (!Array.isArray(record?.messages)) {
      throw new DataError(
        `report: record ${number} has no messages; a report is of conversations, as magpie, tag, filter and judge write them`,
        { code: 'ERR_MALFORMED', op: 'report', argument: 'messages', actual: String(number) },
      );
    }
    counter.add(record);
  }
  const survey = counter.done();
  const html = await renderDatasetReport(survey, options);
  await writeAtomic(path, (file) => file.writeFile(html));
  return survey;
}

/** The report of the last stage in a pipeline's output folder. @throws FileError for a folder without a finished stage */
export async function reportOutput(output: string, path = join(output, 'report.html'), title?: string): Promise<Survey> {
  const stages = await readManifest(output);
  const last = stages.at(-1);
  if (last === undefined) {
    throw new FileError(
      `report: ${output} holds no finished stage: manifest.json is missing or damaged; give the output folder of limbeck synth`,
      {
        code: 'ERR_READ',
        op: 'report',
        argument: output,
      },
    );
  }
  const records = readRecords<InstructionRecord>(join(output, last.file));
  return writeDatasetReport(path, records, { stages, folder: output, ...(title === undefined ? {} : { title }) });
}

/** The report as a string. */
export async function renderDatasetReport(survey: Survey, options: DatasetReportOptions = {}): Promise<string> {
  const title = options.title ?? 'Data set';
  const sections = [
    figures(survey, options.facts),
    lengthSection(survey),
    tagSection(survey),
    survey.distance ? histogramSection('Distance to the nearest other instruction', survey.distance, (v) => String(v)) : '',
    survey.reward ? histogramSection("Judge's score", survey.reward, (v) => String(v)) : '',
    await stageSection(options),
    sampleSection(survey.samples),
  ];
  return pageHtml({
    title,
    style: style + barStyle,
    time: options.time,
    main: sections.filter((section) => section !== '').join('\n'),
  });
}

const barStyle = `
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: 3px 12px; align-items: center; font-size: 13.5px; font-variant-numeric: tabular-nums; }
.bars span { color: var(--soft); text-align: right; } .bars i { display: block; height: 12px; border-radius: 3px; background: var(--run0); min-width: 1px; }
.role { color: var(--soft); font-size: 12.5px; margin: 10px 0 2px; }
`;

function figures({ records, turns, instruction, response }: Survey, more: DatasetReportOptions['facts'] = {}): string {
  const facts: [string, string][] = [
    ['records', count(records)],
    [
      'answers in a record',
      Object.entries(turns)
        .map(([n, times]) => `${n} (${count(times)})`)
        .join(', ') || '–',
    ],
    ['characters of an instruction', significant(instruction.mean)],
    ['characters of an answer', significant(response.mean)],
    ...Object.entries(more),
  ];
  return `<section aria-label="Figures"><h2>Figures</h2><dl>${facts
    .map(([name, value]) => `<div><dt>${encode(name)}</dt><dd>${encode(value)}</dd></div>`)
    .join('')}</dl></section>`;
}

function lengthSection({ instruction, response }: Survey): string {
  const show = (v: number) => count(v);
  return (
    histogramSection('Length of instructions, in characters', instruction, show) +
    histogramSection('Length of answers, in characters', response, show)
  );
}

function tagSection({ tags, rules }: Survey): string {
  const all: [string, Readonly<Record<string, number>>][] = Object.entries(tags);
  if (Object.keys(rules).length > 0) all.push(['mended by rule', rules]);
  return all.map(([name, counts]) => `<section><h2>${encode(name)}</h2>${bars(Object.entries(counts))}</section>`).join('\n');
}

function histogramSection(title: string, spread: Spread, show: (bound: number) => string): string {
  const { bounds, counts }: Histogram = spread.histogram;
  const first = counts.findIndex((n) => n > 0);
  const last = counts.findLastIndex((n) => n > 0);
  const rows = bounds
    .map((bound, i): [string, number] => [
      i + 1 < bounds.length ? `${show(bound)} – ${show(bounds[i + 1]!)}` : `${show(bound)} –`,
      counts[i]!,
    ])
    .slice(Math.max(0, first), last + 1);
  const facts = `mean ${significant(spread.mean)}, least ${significant(spread.least)}, most ${significant(spread.most)}`;
  return `<section><h2>${encode(title)}</h2><p class="meta">${facts}</p>${bars(rows)}</section>`;
}

function bars(rows: readonly (readonly [string, number])[]): string {
  const most = Math.max(1, ...rows.map(([, n]) => n));
  const all = Math.max(
    1,
    rows.reduce((sum, [, n]) => sum + n, 0),
  );
  return `<div class="bars">${rows
    .map(
      ([name, n]) =>
        `<span>${encode(name)}</span><i style="width:${((100 * n) / most).toFixed(2)}%"></i><b>${count(n)} · ${((100 * n) / all).toFixed(1)} %</b>`,
    )
    .join('')}</div>`;
}

async function stageSection({ stages = [], folder }: DatasetReportOptions): Promise<string> {
  if (stages.length === 0) return '';
  const rows = stages.map(
    ({ stage, input, records, dropped }) =>
      `<tr><th scope="row">${encode(stage)}</th><td data-label="in">${count(input)}</td><td data-label="out">${count(records)}</td><td data-label="refused">${encode(
        Object.entries(dropped)
          .map(([reason, n]) => `${reason} ${count(n)}`)
          .join(', ') || '–',
      )}</td></tr>`,
  );
  const examples: string[] = [];
  for (const { stage, droppedFile } of stages) {
    if (folder === undefined || droppedFile === undefined) continue;
    // The first of each reason.
    const shown = new Map<string, string>();
    let seen = 0;
    for await (const { reason, detail, record } of readRecords<Dropped>(join(folder, droppedFile))) {
      if (!shown.has(reason)) shown.set(reason, detail ?? textOf(record));
      if (++seen >= 10_000) break;
    }
    for (const [reason, text] of shown) {
      examples.push(
        `<article><h3>${encode(reason)}<span class="step">${encode(stage)}</span></h3><p class="text">${encode(text.slice(0, 600))}</p></article>`,
      );
    }
  }
  const more =
    examples.length === 0
      ? ''
      : `<details><summary>one of each reason</summary><div class="cards">${examples.join('')}</div></details>`;
  return `<section><h2>Stages</h2><table class="runs"><thead><tr><th scope="col">stage</th><th scope="col">in</th><th scope="col">out</th><th scope="col">refused</th></tr></thead><tbody>${rows.join('')}</tbody></table>${more}</section>`;
}

interface Dropped {
  readonly reason: string;
  readonly detail?: string;
  readonly record: unknown;
}

function textOf(record: unknown): string {
  const messages = (record as Partial<InstructionRecord> | null)?.messages;
  return Array.isArray(messages) ? instructionOf(record as InstructionRecord) : JSON.stringify(record);
}

function sampleSection(samples: readonly InstructionRecord[]): string {
  if (samples.length === 0) return '';
  const cards = samples.map(({ id, messages, tags }) => {
    const marks = Object.values(tags ?? {}).filter((value) => value !== null);
    const turns = messages.map(
      ({ role, content }) => `<p class="role">${encode(role)}</p><p class="text">${encode(content.slice(0, 1500))}</p>`,
    );
    return `<article><h3>${encode(id)}<span class="step">${encode(marks.join(' · '))}</span></h3>${turns.join('')}</article>`;
  });
  return `<section><h2>Samples</h2><div class="cards">${cards.join('')}</div></section>`;
}
