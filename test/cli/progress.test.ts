import { stripVTControlCharacters } from 'node:util';
import { afterEach, expect, test, vi } from 'vitest';
import type { TrainEvent } from '../../src/train/events.ts';
import { createProgress, sparkline, wantsColor } from '../../src/train/progress.ts';
import { syntheticEvents } from '../train/synthetic.ts';

afterEach(() => vi.unstubAllEnvs());

const events = syntheticEvents({ name: 'tiny', kind: 'distill', parameters: 1234, steps: 100, floor: 4 });

/** A terminal that understands what progress uses: cursor up, return, erase below. */
function terminal(columns?: number) {
  const lines: string[] = [''];
  let written = '';
  let row = 0;
  return {
    isTTY: columns !== undefined,
    ...(columns === undefined ? {} : { columns }),
    write(text: string) {
      written += text;
      // biome-ignore lint/suspicious/noControlCharactersInRegex: escape sequences begin with a control character
      for (const [part] of text.matchAll(/\x1b\[\d*[A-Za-z]|\r|\n|[^\x1b\r\n]+/g)) {
        const up = /\[(\d+)A$/.exec(part);
        if (up) row -= Number(up[1]);
        else if (part === '\n') lines[++row] ??= '';
        else if (part === '\r') continue;
        else if (part.endsWith('[J')) lines.splice(row, lines.length, '');
        else if (!part.startsWith('\x1b')) lines[row] += part;
      }
    },
    lines: () => lines,
    written: () => written,
  };
}

test('without a terminal: plain lines, about one for each tenth of the run', () => {
  const out = terminal();
  const progress = createProgress(out, { now: () => 0 });
  for (const event of events) progress.show(event);
  const text = out.written();
  expect(text).toBe(stripVTControlCharacters(text));
  const steps = text.split('\n').filter((line) => /^step \d+\/100/.test(line));
  expect(steps.map((line) => Number(/\d+/.exec(line)![0]))).toEqual([1, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100]);
  expect(steps[0]).toMatch(/^step 1\/100 {2}loss \d\.\d{3} {2}[\d.]+ [MBk] tokens\/s {2}.* left {2}.* peak$/);
  expect(text).toContain('distil tiny: 1,234 parameters, 100 steps, 205 k tokens, cpu with 2 threads');
  expect(text).toMatch(/finished at step 100: .* validation loss \d\.\d{4}, perplexity .*, KL .*, agreement \d+\.\d %/);
});

test('without a terminal: slow runs say something every half minute', () => {
  const out = terminal();
  let clock = 0;
  const progress = createProgress(out, { now: () => clock });
  for (const event of events) {
    if (event.type === 'step') clock += 16_000;
    progress.show(event);
  }
  expect(out.written().match(/^step \d+\/100/gm)!.length).toBeGreaterThanOrEqual(50);
});

test.each([40, 80, 200])('on a terminal of %i columns: two lines that redraw themselves and never wrap', (columns) => {
  const out = terminal(columns);
  let clock = 0;
  const now = () => {
    clock += 1000;
    return clock;
  };
  const progress = createProgress(out, { color: true, now });
  const steps = events.filter((event) => event.type === 'start' || event.type === 'step');
  for (const event of steps) {
    progress.show(event);
    if (event.type === 'step') for (const line of out.lines().slice(2)) expect([...line].length).toBeLessThan(columns);
  }
  const [, , bar, spark, rest] = out.lines();
  expect(bar).toMatch(/^━+ 100 % {2}step 100\/100/);
  expect(spark).toMatch(/^loss [▁▂▃▄▅▆▇█]+$/);
  expect(rest).toBe('');
  progress.clear();
  expect(out.lines().slice(2)).toEqual(['']);
});

test('a terminal redraws at most about twelve times a second', () => {
  const out = terminal(100);
  let clock = 0;
  const now = () => {
    clock += 1;
    return clock;
  };
  const progress = createProgress(out, { color: false, now });
  for (const event of events) if (event.type === 'start' || event.type === 'step') progress.show(event);
  expect(out.written().match(/step \d+\/100/g)!.length).toBeLessThan(4);
});

test('a loss that is not finite, and texts with line breaks', () => {
  const out = terminal();
  const progress = createProgress(out);
  const step = events.find((event) => event.type === 'step')!;
  progress.show({ ...step, kl: 0.5, loss: Number.NaN, tokensPerSecond: 1234, etaSeconds: Number.POSITIVE_INFINITY });
  progress.show({ type: 'sample', step: 1, prompt: 'a\nb', text: 'c\n\nd' });
  progress.show({ type: 'warning', code: 'WARN_X', message: 'three lines were skipped' } as TrainEvent);
  expect(out.written()).toBe(
    'step 1/1  loss NaN  KL 0.500  1,234 tokens/s  – left  62.7 KiB peak\n' +
      '  a ⏎ bc ⏎ d\nwarning WARN_X: three lines were skipped\n',
  );
});

test('NO_COLOR and FORCE_COLOR are respected', () => {
  vi.stubEnv('FORCE_COLOR', '');
  vi.stubEnv('TERM', 'xterm');
  vi.stubEnv('NO_COLOR', '');
  expect([wantsColor({ write() {}, isTTY: true }), wantsColor({ write() {} })]).toEqual([true, false]);
  vi.stubEnv('TERM', 'dumb');
  expect(wantsColor({ write() {}, isTTY: true })).toBe(false);
  vi.stubEnv('FORCE_COLOR', '1');
  expect(wantsColor({ write() {} })).toBe(true);
  vi.stubEnv('NO_COLOR', '1');
  expect(wantsColor({ write() {}, isTTY: true })).toBe(false);
});

test('sparkline', () => {
  expect(sparkline([1, 2, 3, 4, 5, 6, 7, 8], 20)).toBe('▁▂▃▄▅▆▇█');
  expect(sparkline([1, 1, 9, 9], 2)).toBe('▁█');
  expect([sparkline([1], 9), sparkline([], 9), sparkline([3, 3], 9)]).toEqual(['', '', '▁▁']);
});
