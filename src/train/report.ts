// report.html: one file that needs nothing from outside, with the curves, the table, the samples and the settings of one or more runs.

import { readFile } from 'node:fs/promises';
import { createRequire } from 'node:module';
import { availableParallelism, cpus } from 'node:os';
import { join } from 'node:path';
import { writeAtomic } from '../io/atomic.ts';
import { FileError } from '../tensor/errors.ts';
import { machineMemory } from '../tensor/machine.ts';
import { packageVersion } from '../tensor/version.ts';
import type { RunConfig } from './config.ts';
import type { Evaluation, SampleEvent, StartEvent, StepEvent, TrainEvent } from './events.ts';
import { bytes, count, duration, significant } from './format.ts';
import { metricsFile, type RecordedEvent, readMetrics } from './metrics.ts';
import { encode, pageHtml, script, style } from './page.ts';

/** A run as a report shows it. */
export interface ReportRun {
  /** Name in tables and legends. */
  readonly name: string;
  /** Its events, in order. */
  readonly events: readonly (TrainEvent | RecordedEvent)[];
  /** Its settings, shown folded. */
  readonly config?: RunConfig | Record<string, unknown>;
}

/** What a report says beside the runs. */
export interface ReportOptions {
  /** Default: the name of the run, or "limbeck report" for several. */
  readonly title?: string;
  /** A sentence or two above the table. Default: what the figures say of a distilled run beside its twin from scratch. */
  readonly summary?: string;
  /** Facts about the machine. Default: processor, cores, memory, Node and limbeck versions of this one. */
  readonly machine?: Readonly<Record<string, string>>;
  /** Milliseconds since 1970; default now. */
  readonly time?: number;
}

/** Figures of a run, from its events. Absent: unknown. */
export interface RunFigures {
  readonly parameters?: number;
  readonly steps: number;
  readonly tokens: number;
  readonly evaluation?: Evaluation;
  /** Median of the steps. */
  readonly tokensPerSecond?: number;
  /** Most bytes of tensors at once. */
  readonly peakMemory?: number;
  /** Seconds of training steps. */
  readonly seconds: number;
}

/** Name of a run's own report and of its settings inside the output folder. */
export const reportFile = 'report.html';
export const runFile = 'run.json';

/** Reads a run back from its output folder. @throws FileError if there are no events */
export async function readRun(folder: string): Promise<ReportRun> {
  const events = await readMetrics(join(folder, metricsFile));
  if (events.length === 0) {
    throw new FileError(`report: ${folder} holds no run: ${metricsFile} is missing or empty; give the output folder of a run`, {
      code: 'ERR_READ',
      op: 'report',
      argument: folder,
    });
  }
  const config = await readFile(join(folder, runFile), 'utf8').then(
    (text) => JSON.parse(text) as RunConfig,
    () => undefined,
  );
  const start = events.findLast((event): event is StartEvent & RecordedEvent => event.type === 'start');
  return { name: start?.name ?? folder, events, ...(config ? { config } : {}) };
}

/** Writes a report of `runs` to `path`. @throws FileError */
export async function writeReport(path: string, runs: readonly ReportRun[], options: ReportOptions = {}): Promise<void> {
  const html = await renderReport(runs, options);
  await writeAtomic(path, (file) => file.writeFile(html));
}

/** The report as a string. */
export async function renderReport(runs: readonly ReportRun[], options: ReportOptions = {}): Promise<string> {
  const named = distinctNames(runs);
  const figures = named.map((run) => runFigures(run.events));
  const title = options.title ?? (named.length === 1 ? named[0]!.name : 'limbeck report');
  const summary = options.summary ?? comparison(named, figures);
  const data = { runs: named.map((run) => ({ name: run.name, ...curves(run.events) })) };
  const plot = await asset('uPlot.iife.min.js');
  const plotStyle = await asset('uPlot.min.css');
  return pageHtml({
    title,
    style: plotStyle + style,
    time: options.time,
    summary,
    main: `${table(named, figures)}
<section id="curves" aria-label="Curves"><div id="controls"></div><div id="charts"></div><noscript>Curves need JavaScript.</noscript></section>
${samples(named)}
${warnings(named)}
${settings(named)}
${machine(options.machine ?? thisMachine())}`,
    scripts: `<script type="application/json" id="data">${json(data)}</script>
<script>${plot}</script>
<script>${script}</script>`,
  });
}

/** Sums a run up. */
export function runFigures(events: readonly TrainEvent[]): RunFigures {
  const start = events.findLast((event) => event.type === 'start');
  const steps = events.filter((event): event is StepEvent => event.type === 'step');
  const last = steps.at(-1);
  const evaluation = events.findLast((event) => event.type === 'evaluate');
  const speeds = steps.map((step) => step.tokensPerSecond).sort((a, b) => a - b);
  return {
    ...(start ? { parameters: start.parameters } : {}),
    steps: last?.step ?? 0,
    tokens: last?.tokens ?? 0,
    ...(evaluation ? { evaluation } : {}),
    ...(speeds.length ? { tokensPerSecond: speeds[speeds.length >> 1]! } : {}),
    ...(steps.length ? { peakMemory: steps.reduce((most, step) => Math.max(most, step.memory.peak), 0) } : {}),
    seconds: steps.reduce((sum, step) => sum + step.seconds, 0),
  };
}

function distinctNames(runs: readonly ReportRun[]): readonly ReportRun[] {
  const seen = new Map<string, number>();
  return runs.map((run) => {
    const times = (seen.get(run.name) ?? 0) + 1;
    seen.set(run.name, times);
    return times === 1 ? run : { ...run, name: `${run.name} ${times}` };
  });
}

/** A distilled run beside one of the same size and tokens that was trained on text: who learned more. */
function comparison(runs: readonly ReportRun[], figures: readonly RunFigures[]): string | undefined {
  const kind = (i: number) => runs[i]!.events.find((event) => event.type === 'start')?.kind;
  const distilled = figures.findIndex((f, i) => kind(i) === 'distill' && f.evaluation !== undefined);
  if (distilled < 0) return undefined;
  const a = figures[distilled]!;
  const scratch = figures.findIndex(
    (f, i) => kind(i) === 'pretrain' && f.parameters === a.parameters && f.tokens === a.tokens && f.evaluation !== undefined,
  );
  if (scratch < 0) return undefined;
  const b = figures[scratch]!;
  const gain = b.evaluation!.loss - a.evaluation!.loss;
  const names = [runs[distilled]!.name, runs[scratch]!.name];
  return (
    `After the same ${count(a.tokens)} tokens, ${names[0]} has a validation loss of ${a.evaluation!.loss.toFixed(3)} and ${names[1]} of ` +
    `${b.evaluation!.loss.toFixed(3)}: ${Math.abs(gain).toFixed(3)} nats ${gain >= 0 ? 'lower' : 'higher'}, a perplexity of ` +
    `${significant(a.evaluation!.perplexity)} against ${significant(b.evaluation!.perplexity)}.`
  );
}

function table(runs: readonly ReportRun[], figures: readonly RunFigures[]): string {
  const columns: readonly [string, (f: RunFigures) => string | undefined][] = [
    ['parameters', (f) => maybe(f.parameters, count)],
    ['tokens', (f) => count(f.tokens)],
    ['validation loss', (f) => maybe(f.evaluation?.loss, (loss) => loss.toFixed(4))],
    ['perplexity', (f) => maybe(f.evaluation?.perplexity, significant)],
    ['KL to teacher', (f) => maybe(f.evaluation?.kl, (kl) => kl.toFixed(4))],
    ['agreement', (f) => maybe(f.evaluation?.agreement, (share) => `${(100 * share).toFixed(1)} %`)],

    ['tokens/s', (f) => maybe(f.tokensPerSecond, count)],
    ['peak memory', (f) => maybe(f.peakMemory, bytes)],
    ['training time', (f) => duration(f.seconds)],
  ];
  const shown = columns.filter(([, show]) => figures.some((f) => show(f)));
  const rows = runs.map(
    (run, i) =>
      `<tr><th scope="row"><i class="swatch" data-run="${i}"></i>${encode(run.name)}</th>${shown
        .map(([name, show]) => `<td data-label="${name}">${show(figures[i]!) ?? '–'}</td>`)
        .join('')}</tr>`,
  );
  return `<section aria-label="Runs"><table class="runs"><thead><tr><th scope="col">run</th>${shown
    .map(([name]) => `<th scope="col">${name}</th>`)
    .join('')}</tr></thead><tbody>${rows.join('')}</tbody></table></section>`;
}

function samples(runs: readonly ReportRun[]): string {
  const of = (run: ReportRun) => run.events.filter((event): event is SampleEvent => event.type === 'sample');
  const prompts = [...new Set(runs.flatMap((run) => of(run).map((sample) => sample.prompt)))];
  if (prompts.length === 0) return '';
  const body = ({ prompt, text, reference }: SampleEvent) =>
    `<p class="text"><b>${encode(prompt)}</b>${encode(text)}</p>` +
    (reference === undefined ? '' : `<p class="step">reference: ${encode(reference)}</p>`);
  const cards = prompts.map((prompt) => {
    const each = runs.map((run, i) => {
      const all = of(run).filter((sample) => sample.prompt === prompt);
      const last = all.at(-1);
      if (!last) return '';
      const earlier = all.slice(0, -1).reverse();
      const more = earlier.length
        ? `<details><summary>${earlier.length} earlier</summary>${earlier
            .map((sample) => `<p class="step">step ${sample.step}</p>${body(sample)}`)
            .join('')}</details>`
        : '';
      return `<article><h3><i class="swatch" data-run="${i}"></i>${encode(run.name)}<span class="step">step ${last.step}</span></h3>${body(last)}${more}</article>`;
    });
    return `<div class="cards">${each.join('')}</div>`;
  });
  return `<section><h2>Samples</h2>${cards.join('')}</section>`;
}

function warnings(runs: readonly ReportRun[]): string {
  const items = runs.flatMap((run) =>
    run.events.flatMap((event) =>
      event.type === 'warning'
        ? [`<li>${encode(run.name)}: ${encode(event.message)} <code>${encode(event.code)}</code></li>`]
        : [],
    ),
  );
  return items.length ? `<section><h2>Warnings</h2><ul>${items.join('')}</ul></section>` : '';
}

function settings(runs: readonly ReportRun[]): string {
  const blocks = runs.flatMap((run, i) =>
    run.config
      ? [
          `<details><summary><i class="swatch" data-run="${i}"></i>${encode(run.name)}</summary><pre>${encode(JSON.stringify(run.config, null, 2))}</pre></details>`,
        ]
      : [],
  );
  return blocks.length ? `<section><h2>Configuration</h2>${blocks.join('')}</section>` : '';
}

function machine(facts: Readonly<Record<string, string>>): string {
  const items = Object.entries(facts).map(([name, value]) => `<div><dt>${encode(name)}</dt><dd>${encode(value)}</dd></div>`);
  return `<section><h2>Machine</h2><dl>${items.join('')}</dl></section>`;
}

function thisMachine(): Record<string, string> {
  return {
    processor: cpus()[0]?.model.trim() || 'unknown',
    cores: String(availableParallelism()),
    memory: bytes(machineMemory()),
    platform: `${process.platform}-${process.arch}`,
    node: process.version,
    limbeck: packageVersion(),
  };
}

/** Columns for the page: x as steps, tokens and seconds, y by name; thinned to what a screen can show. */
function curves(events: readonly TrainEvent[]) {
  const steps = events.filter((event): event is StepEvent => event.type === 'step');
  const distills = events.some((event) => event.type === 'start' && event.kind === 'distill');
  const elapsed = new Map<number, number>([[0, 0]]);
  let seconds = 0;
  for (const step of steps) {
    seconds += step.seconds;
    elapsed.set(step.step, seconds);
  }
  const tokens = new Map<number, number>([[0, 0], ...steps.map((step): [number, number] => [step.step, step.tokens])]);
  const train = [
    // A student minimises a divergence: its own cross-entropy, where known, is what compares with other runs.
    ['loss', (step: StepEvent) => (distills ? step.ce : step.loss)],
    ['kl', (step: StepEvent) => step.kl],
    ['learningRate', (step: StepEvent) => step.learningRate],
    ['tokensPerSecond', (step: StepEvent) => step.tokensPerSecond],
    ['gradientNorm', (step: StepEvent) => step.gradientNorm],
  ] as const;
  const lines: Record<string, Line> = {};
  for (const [name, value] of train) {
    const points = thin(steps.flatMap((step) => (typeof value(step) === 'number' ? [{ step, y: value(step)! }] : [])));
    if (points.length) {
      lines[name] = {
        step: points.map((point) => point.step.step),
        tokens: points.map((point) => point.step.tokens),
        seconds: points.map((point) => elapsed.get(point.step.step)!),
        y: points.map((point) => point.y),
      };
    }
  }
  const evaluations = events.filter((event) => event.type === 'evaluate');
  const validation: Record<string, Line> = {};
  for (const name of ['loss', 'kl', 'agreement'] as const) {
    const points = evaluations.filter((event) => typeof event[name] === 'number');
    if (points.length) {
      validation[name] = {
        step: points.map((event) => event.step),
        tokens: points.map((event) => tokens.get(event.step) ?? 0),
        seconds: points.map((event) => elapsed.get(event.step) ?? 0),
        y: points.map((event) => event[name]!),
      };
    }
  }
  return { train: lines, validation };
}

interface Line {
  readonly step: readonly number[];
  readonly tokens: readonly number[];
  readonly seconds: readonly number[];
  readonly y: readonly number[];
}

/** At most about 2000 points: the lowest and the highest of each stretch, so that spikes stay visible. */
function thin<T extends { readonly y: number }>(points: readonly T[]): readonly T[] {
  const stretch = Math.ceil(points.length / 1000);
  if (stretch <= 2) return points;
  const out: T[] = [];
  for (let at = 0; at < points.length; at += stretch) {
    let low = at;
    let high = at;
    for (let i = at; i < Math.min(at + stretch, points.length); i++) {
      if (points[i]!.y < points[low]!.y) low = i;
      if (points[i]!.y > points[high]!.y) high = i;
    }
    out.push(points[Math.min(low, high)]!);
    if (low !== high) out.push(points[Math.max(low, high)]!);
  }
  return out;
}

function maybe(value: number | undefined | null, show: (value: number) => string): string | undefined {
  return typeof value === 'number' ? show(value) : undefined;
}

async function asset(name: string): Promise<string> {
  return readFile(createRequire(import.meta.url).resolve(`uplot/dist/${name}`), 'utf8');
}

/** JSON inside a script element: no text in it may end the element. Six digits are plenty for a screen. */
function json(value: unknown): string {
  const text = JSON.stringify(value, (_, v) => (typeof v === 'number' && !Number.isInteger(v) ? Number(v.toPrecision(6)) : v));
  return text.replaceAll('<', '\\u003c');
}
