// Times groups of kernels, and prints and keeps the figures.
import { type OpTime, profile } from '../src/index.ts';
import type { Group } from './kernels.ts';
import { type Result, spread } from './results.ts';

/** What the device reaches in this run. */
export interface Ceilings {
  /** Operations a second. */
  readonly flops: number;
  /** Bytes a second. */
  readonly bytes: number;
}

export interface MeasureOptions {
  /** Only kernels whose name contains it. */
  readonly filter: string;
  readonly rounds: number;
  readonly json: boolean;
  readonly bench: string;
  readonly dtype: string;
  readonly threads: number;
}

export function printHead(title: string, peak: Ceilings): void {
  process.stdout.write(
    `${title}; ceilings of this run: ${(peak.flops / 1e9).toFixed(0)} GFLOP/s, copy ${(peak.bytes / 1e9).toFixed(1)} GB/s\n\n` +
      `${'kernel'.padEnd(24)}${'shape'.padEnd(46)}${'median ms'.padStart(11)}${'GFLOP/s'.padStart(10)}${'GB/s'.padStart(8)}${'of peak'.padStart(9)}\n`,
  );
}

/** Runs each group once, then for some rounds; each kernel's median is shown. */
export async function measure(
  groups: readonly (() => Group | Group[])[],
  peak: Ceilings,
  options: MeasureOptions,
): Promise<Result[]> {
  const { filter, bench, dtype, threads } = options;
  const results: Result[] = [];
  for (const make of groups) {
    const made = [make()].flat();
    for (const group of made) {
      if (!group.parts.some((p) => p.kernel.includes(filter))) continue;
      group.run(); // first touch of memory, threads that wake up, plans of products
      const rounds: OpTime[][] = [];
      for (let i = 0; i < options.rounds; i++) rounds.push(await profile(() => group.run()));
      for (const part of group.parts) {
        if (!part.kernel.includes(filter)) continue;
        const seconds = rounds.map((times) => {
          const t = times.find((one) => one.op === part.kernel)!;
          return t.seconds / t.count;
        });
        const { median, p20, p80 } = spread(seconds);
        const moves = part.flops === 0;
        const rate = (moves ? part.bytes : part.flops) / median;
        const share = rate / (moves ? peak.bytes : peak.flops);
        const [op, shape] = [part.kernel, group.shape];
        results.push({ bench, op, shape, dtype, threads, median: median * 1000, p20: p20 * 1000, p80: p80 * 1000, unit: 'ms' });
        if (options.json) {
          const row = { op, shape, ms: median * 1000, gflops: moves ? null : rate / 1e9, gbs: moves ? rate / 1e9 : null, share };
          process.stdout.write(`${JSON.stringify(row)}\n`);
        } else {
          process.stdout.write(
            `${op.padEnd(24)}${shape.padEnd(46)}${(median * 1000).toFixed(3).padStart(11)}${(moves ? '' : (rate / 1e9).toFixed(1)).padStart(10)}${(moves ? (rate / 1e9).toFixed(1) : '').padStart(8)}${`${(100 * share).toFixed(0)} %`.padStart(9)}\n`,
          );
        }
      }
    }
    for (const t of new Set(made.flatMap((g) => g.tensors))) t.dispose();
  }
  return results;
}
