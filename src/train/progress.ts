// What a person sees of a run: on a terminal two lines that redraw themselves, elsewhere a plain line now and then.

import { stripVTControlCharacters, styleText } from 'node:util';
import type { Evaluation, StartEvent, StepEvent, TrainEvent } from './events.ts';
import { bytes, count, duration, significant } from './format.ts';

/** Where progress goes; a subset of a tty.WriteStream. */
export interface ProgressStream {
  write(text: string): unknown;
  readonly isTTY?: boolean;
  readonly columns?: number;
}

export interface ProgressOptions {
  /** Default: on a terminal, unless NO_COLOR is set. */
  readonly color?: boolean;
  /** Milliseconds; for tests. */
  readonly now?: () => number;
}

/** Shows events on a stream. */
export interface Progress {
  /** Shows one event. */
  show(event: TrainEvent): void;
  /** On a terminal, a passing line about what goes on before the first event. */
  wait(text: string): void;
  /** A line of its own among the events. */
  note(text: string): void;
  /** Takes the redrawn lines away, so that other output can follow. */
  clear(): void;
}

type Style = Parameters<typeof styleText>[0];

const redrawEvery = 80; // ms
const lineEvery = 30_000; // ms, where nothing can be redrawn
const historySize = 400;

/** True if colours are wanted on `stream` (https://no-color.org). */
export function wantsColor(stream: ProgressStream): boolean {
  const { NO_COLOR, FORCE_COLOR, TERM } = process.env;
  if (NO_COLOR) return false;
  if (FORCE_COLOR) return FORCE_COLOR !== '0';
  return stream.isTTY === true && TERM !== 'dumb';
}

export function createProgress(stream: ProgressStream, options: ProgressOptions = {}): Progress {
  const color = options.color ?? wantsColor(stream);
  const now = options.now ?? (() => performance.now());
  const paint = (style: Style, text: string) => (color ? styleText(style, text) : text);
  const live = stream.isTTY === true && process.env.TERM !== 'dumb';

  let start: StartEvent | undefined;
  let step: StepEvent | undefined;
  let history: number[] = [];
  let every = 1; // steps averaged into one value of the history
  let drawn = 0;
  let drawnAt = Number.NEGATIVE_INFINITY;
  let linedAt = Number.NEGATIVE_INFINITY;
  let tenth = -1;

  function clear(): void {
    if (drawn > 0) stream.write(`\x1b[${drawn}A\r\x1b[J`);
    drawn = 0;
  }

  function line(text: string): void {
    clear();
    stream.write(`${text}\n`);
    drawnAt = Number.NEGATIVE_INFINITY;
  }

  function figures(e: StepEvent): string[] {
    const total = start?.steps ?? e.step;
    return [
      `step ${e.step}/${total}`,
      `loss ${e.loss.toFixed(3)}`,
      ...(e.kl === undefined || e.kl === e.loss ? [] : [`KL ${e.kl.toFixed(3)}`]),
      `${count(e.tokensPerSecond)} tokens/s`,
      `${duration(e.etaSeconds)} left`,
      `${bytes(e.memory.peak)} peak`,
    ];
  }

  function draw(e: StepEvent): void {
    const columns = Math.max(20, (stream.columns ?? 80) - 1);
    const done = Math.min(1, e.step / (start?.steps ?? e.step));
    const head = `${String(Math.floor(100 * done)).padStart(3)} %  ${figures(e).reduce((text, figure) =>
      text.length + figure.length + 2 + 18 <= columns ? `${text}  ${figure}` : text,
    )}`;
    const width = Math.max(4, Math.min(32, columns - head.length - 2));
    const full = Math.round(width * done);
    const bar = paint('cyan', '━'.repeat(full)) + paint('gray', '─'.repeat(width - full));
    const spark = sparkline(history, Math.min(60, columns - 6));
    const lines = [`${bar} ${head}`, ...(spark ? [`${paint('gray', 'loss ')}${paint('cyan', spark)}`] : [])];
    clear();
    stream.write(`${lines.map((text) => cut(text, columns)).join('\n')}\n`);
    drawn = lines.length;
    drawnAt = now();
  }

  function remember(e: StepEvent): void {
    if (!Number.isFinite(e.loss)) return;
    if (history.length === 0 || (e.step - 1) % every === 0) history.push(e.loss);
    else history[history.length - 1] = (history.at(-1)! + e.loss) / 2;
    if (history.length > historySize) {
      history = history.filter((_, i) => i % 2 === 0);
      every *= 2;
    }
  }

  function show(e: TrainEvent): void {
    switch (e.type) {
      case 'start': {
        start = e;
        const verb = { pretrain: 'pretrain', distill: 'distil', finetune: 'finetune' }[e.kind];
        const teacher = e.teacherParameters === undefined ? '' : ` from a teacher of ${count(e.teacherParameters)}`;
        line(
          `${paint('bold', `${verb} ${e.name}`)}: ${count(e.parameters)} parameters${teacher}, ${e.steps} steps, ` +
            `${count(e.tokens)} tokens, ${e.device} with ${e.threads} ${e.threads === 1 ? 'thread' : 'threads'}`,
        );
        line(paint('gray', `files in ${e.output}`));
        if (e.resumedFrom) line(paint('gray', `goes on after step ${e.resumedFrom.step} (${e.resumedFrom.path})`));
        return;
      }
      case 'step': {
        step = e;
        remember(e);
        if (live) {
          if (now() - drawnAt >= redrawEvery) draw(e);
          return;
        }
        const reached = Math.floor((10 * e.step) / (start?.steps ?? e.step));
        if (reached === tenth && now() - linedAt < lineEvery) return;
        tenth = reached;
        linedAt = now();
        line(figures(e).join('  '));
        return;
      }
      case 'evaluate':
        line(`${paint('green', `step ${e.step}  ${evaluationText(e)}`)}`);
        break;
      case 'sample':
        line(`${paint('gray', `  ${quoteLine(e.prompt)}`)}${quoteLine(e.text)}`);
        break;
      case 'responses':
        line(paint('gray', `step ${e.step}  ${e.count} answers in ${e.path}`));
        break;
      case 'checkpoint':
        line(paint('gray', `step ${e.step}  saved ${e.path} (${bytes(e.bytes)}, ${duration(e.seconds)})`));
        break;
      case 'warning':
        line(`${paint('yellow', `warning ${e.code}`)}: ${e.message}`);
        break;
      case 'done': {
        const verb =
          e.reason === 'finished'
            ? paint(['bold', 'green'], 'finished')
            : paint(['bold', 'yellow'], e.reason === 'stopped' ? 'stopped early' : 'stopped');
        line(
          `${verb} at step ${e.step}: ${count(e.tokens)} tokens in ${duration(e.seconds)}${e.evaluation ? `, ${evaluationText(e.evaluation)}` : ''}`,
        );
        for (const { name, tokens, epochs } of e.sources ?? [])
          line(paint('gray', `${name}: ${count(tokens)} tokens, ${significant(epochs)} epochs`));
        if (e.checkpoint) line(paint('gray', `checkpoint ${e.checkpoint}`));
        if (e.best) line(paint('gray', `best, validation loss ${e.best.loss.toFixed(4)}: ${e.best.checkpoint}`));
        return;
      }
      default:
        e satisfies never;
    }
    if (live && step) draw(step);
  }

  function wait(text: string): void {
    if (!live) return;
    clear();
    stream.write(`${paint('gray', text)}\n`);
    drawn = 1;
  }

  return { show, wait, note: line, clear };
}

/** One line about an evaluation. */
export function evaluationText(e: Evaluation): string {
  return [
    `validation loss ${e.loss.toFixed(4)}`,
    `perplexity ${significant(e.perplexity)}`,
    ...(e.kl === undefined ? [] : [`KL ${e.kl.toFixed(4)}`]),
    ...(e.agreement === undefined ? [] : [`agreement ${(100 * e.agreement).toFixed(1)} %`]),
  ].join(', ');
}

/** Values as a row of eight heights, the newest right; averaged to at most `width` columns. */
export function sparkline(values: readonly number[], width: number): string {
  if (values.length < 2 || width < 2) return '';
  const columns = Math.min(width, values.length);
  const means = Array.from({ length: columns }, (_, i) => {
    const from = Math.floor((i * values.length) / columns);
    const part = values.slice(from, Math.max(from + 1, Math.floor(((i + 1) * values.length) / columns)));
    return part.reduce((sum, value) => sum + value, 0) / part.length;
  });
  const low = Math.min(...means);
  const high = Math.max(...means);
  return means.map((mean) => '▁▂▃▄▅▆▇█'[high > low ? Math.round((7 * (mean - low)) / (high - low)) : 0]).join('');
}

function quoteLine(text: string): string {
  return text.replace(/\s*\n\s*/g, ' ⏎ ');
}

/** Cuts a line with colours to `columns` visible characters. */
function cut(text: string, columns: number): string {
  const plain = stripVTControlCharacters(text);
  return [...plain].length <= columns ? text : [...plain].slice(0, columns).join('');
}
