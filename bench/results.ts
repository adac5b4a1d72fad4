// bench/results.csv: one line a measurement, appended, so that the history of a machine stays readable.

import { execFileSync } from 'node:child_process';
import { appendFileSync, existsSync, writeFileSync } from 'node:fs';
import { cpus } from 'node:os';
import { fileURLToPath } from 'node:url';

/** One measurement. */
export interface Result {
  /** Which benchmark: `peer`, `gemm`, `ops`, ... */
  readonly bench: string;
  readonly op: string;
  readonly shape: string;
  readonly dtype: string;
  readonly threads: number;
  readonly median: number;
  readonly p20: number;
  readonly p80: number;
  readonly unit: string;
  /** Whose measurement it is; absent: limbeck's. */
  readonly peer?: string;
  /** How many times faster than this limbeck is. */
  readonly ratio?: number;
  readonly peakMib?: number;
}

const columns = 'date,commit,machine,bench,op,shape,dtype,threads,median,p20,p80,unit,peer,ratio,peak_mib';
const path = fileURLToPath(new URL('results.csv', import.meta.url));

/** @param machine what was measured. Default: this machine's processor. */
export function appendResults(results: readonly Result[], machine = processorName()): void {
  if (!existsSync(path)) writeFileSync(path, `${columns}\n`);
  const date = new Date().toISOString().slice(0, 19);
  const commit = commitName();
  for (const r of results) {
    const fields = [date, commit, machine, r.bench, r.op, r.shape, r.dtype, r.threads, r.median, r.p20, r.p80, r.unit, r.peer];
    appendFileSync(path, `${[...fields, r.ratio, r.peakMib].map(cell).join(',')}\n`);
  }
}

/** Median and the 20th and 80th percentile. */
export function spread(values: readonly number[]): { median: number; p20: number; p80: number } {
  const sorted = [...values].sort((a, b) => a - b);
  const at = (share: number): number => {
    const place = share * (sorted.length - 1);
    const low = sorted[Math.floor(place)]!;
    return low + (sorted[Math.ceil(place)]! - low) * (place % 1);
  };
  return { median: at(0.5), p20: at(0.2), p80: at(0.8) };
}

function processorName(): string {
  return `${cpus()[0]?.model.replace(/\s+/g, ' ').trim() ?? process.arch} x${cpus().length}`;
}

function commitName(): string {
  try {
    const run = (...args: string[]) =>
      execFileSync('git', args, { cwd: fileURLToPath(new URL('..', import.meta.url)), stdio: 'pipe' });
    const changed = run('status', '--porcelain', '--untracked-files=no', '--', 'src', 'native').length > 0;
    return `${run('rev-parse', '--short', 'HEAD').toString().trim()}${changed ? '+' : ''}`;
  } catch {
    return '';
  }
}

function cell(value: string | number | undefined): string {
  if (value === undefined) return '';
  const text = typeof value === 'number' ? String(Number(value.toPrecision(5))) : value;
  return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}
