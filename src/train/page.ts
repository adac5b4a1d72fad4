// What the reports have in common: the frame of the page, its style, and a script for curves. The script draws with uPlot, which the page carries, and asks nothing of any server.

/** A page that asks nothing of any server. */
export interface Page {
  readonly title: string;
  /** Inline CSS. */
  readonly style: string;
  /** Milliseconds since 1970; default now. */
  readonly time?: number | undefined;
  /** A sentence below the title, or nothing. */
  readonly summary?: string | undefined;
  /** HTML of the sections. */
  readonly main: string;
  /** HTML behind them. */
  readonly scripts?: string;
}

/** The HTML of a page. */
export function pageHtml({ title, style, time = Date.now(), summary, main, scripts = '' }: Page): string {
  return `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>${encode(title)}</title>
<style>${style}</style>
</head>
<body>
<header>
<h1>${encode(title)}</h1>
<p class="meta">${new Date(time).toISOString().slice(0, 16).replace('T', ' ')} UTC</p>
${summary ? `<p class="summary">${encode(summary)}</p>` : ''}
</header>
<main>
${main}
</main>
${scripts}
</body>
</html>
`;
}

/** Text as HTML. */
export function encode(text: string): string {
  return text.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('>', '&gt;').replaceAll('"', '&quot;');
}

/** Inline CSS of the report. */
export const style = `
:root {
  --paper: #fcfcfb; --card: #ffffff; --ink: #1d1d1b; --soft: #6b6a65; --line: #e4e2dc; --grid: #eeece7; --tint: #f4f3ef;
  --run0: #2a66c8; --run1: #d4561c; --run2: #11805b; --run3: #8446d8; --run4: #a57c00; --run5: #bf2f74; --run6: #0b7f94; --run7: #6d6a64;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #161615; --card: #1e1e1c; --ink: #eceae4; --soft: #a09d95; --line: #34332f; --grid: #2a2926; --tint: #262522;
    --run0: #74a7ff; --run1: #ff9461; --run2: #45c99b; --run3: #bd98ff; --run4: #e3bf45; --run5: #ff83b8; --run6: #4fc6da; --run7: #b3afa6;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: clamp(16px, 4vw, 44px); max-width: 1240px; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
}
h1 { margin: 0; font-size: clamp(24px, 4vw, 34px); font-weight: 650; letter-spacing: -0.02em; line-height: 1.15; }
h2 { margin: 44px 0 14px; font-size: 17px; font-weight: 650; }
h3 { display: flex; align-items: center; margin: 0 0 8px; font-size: 14px; font-weight: 600; }
.meta { margin: 6px 0 0; color: var(--soft); font-size: 13px; }
.summary { margin: 18px 0 0; max-width: 72ch; font-size: 17px; line-height: 1.5; }
.swatch { display: inline-block; flex: none; width: 10px; height: 10px; margin-right: 9px; border-radius: 3px; background: var(--soft); }
table.runs { width: 100%; margin-top: 28px; border-collapse: collapse; font-variant-numeric: tabular-nums; }
.runs th, .runs td { padding: 9px 12px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
.runs thead th { color: var(--soft); font-size: 12.5px; font-weight: 500; white-space: normal; vertical-align: bottom; }
.runs th:first-child { text-align: left; padding-left: 0; font-weight: 600; }
.runs td:last-child, .runs th:last-child { padding-right: 0; }
#controls { display: flex; flex-wrap: wrap; gap: 10px 22px; align-items: center; margin: 34px 0 14px; font-size: 13.5px; }
#controls button { font: inherit; color: inherit; cursor: pointer; border: 1px solid var(--line); background: var(--card); }
.chips { display: flex; flex-wrap: wrap; gap: 8px; flex: 1 1 auto; }
.chips button { display: flex; align-items: center; padding: 5px 13px 5px 11px; border-radius: 99px; }
.chips button[aria-pressed="false"] { opacity: 0.42; text-decoration: line-through; }
.segments { display: flex; }
.segments button { padding: 5px 12px; margin-left: -1px; }
.segments button:first-child { border-radius: 8px 0 0 8px; }
.segments button:last-child { border-radius: 0 8px 8px 0; }
.segments button[aria-pressed="true"] { background: var(--ink) !important; color: var(--paper) !important; }
#controls label { display: flex; align-items: center; gap: 9px; color: var(--soft); }
#controls input[type="range"] { width: 110px; accent-color: var(--run0); }
#charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 16px; }
.chart { position: relative; min-width: 0; padding: 14px 14px 8px; background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.chart.wide, .chart:last-child:nth-child(even) { grid-column: 1 / -1; }
.chart h3 { display: block; margin: 0 2px; }
.chart p { margin: 0 2px 8px; color: var(--soft); font-size: 12.5px; }
.tip {
  position: absolute; z-index: 5; display: none; pointer-events: none; padding: 8px 11px; border-radius: 8px; border: 1px solid var(--line);
  background: var(--card); box-shadow: 0 6px 22px rgb(0 0 0 / 0.16); font-size: 12.5px; line-height: 1.5; white-space: nowrap; font-variant-numeric: tabular-nums;
}
.tip div { display: flex; align-items: center; } .tip b { margin-left: auto; padding-left: 16px; font-weight: 600; }
.tip .swatch { width: 8px; height: 8px; margin-right: 7px; } .tip .x { color: var(--soft); }
.u-select { background: color-mix(in srgb, var(--run0) 14%, transparent); }
.u-cursor-x, .u-cursor-y { border-color: var(--soft) !important; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 290px), 1fr)); gap: 14px; margin-bottom: 14px; }
article { min-width: 0; padding: 14px 16px; background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.step { color: var(--soft); font-size: 12.5px; font-weight: 400; } h3 .step { margin-left: auto; padding-left: 10px; }
.text { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 14.5px/1.6 Georgia, "Times New Roman", "DejaVu Serif", serif; }
p.step { margin: 12px 0 2px; }
details { margin-top: 10px; } summary { cursor: pointer; color: var(--soft); font-size: 13.5px; }
pre { overflow: auto; padding: 14px 16px; border-radius: 10px; background: var(--tint); font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 200px), 1fr)); gap: 14px 26px; margin: 0; }
dt { color: var(--soft); font-size: 12.5px; } dd { margin: 0; overflow-wrap: anywhere; }
code { color: var(--soft); font-size: 12.5px; }
@media (max-width: 980px) {
  .runs thead { display: none; }
  .runs tr { display: grid; grid-template-columns: repeat(auto-fill, minmax(125px, 1fr)); gap: 10px 16px; padding: 14px 0; border-bottom: 1px solid var(--line); }
  .runs th, .runs td { padding: 0 !important; border: 0; text-align: left; }
  .runs th { grid-column: 1 / -1; }
  .runs td::before { content: attr(data-label); display: block; color: var(--soft); font-size: 12px; }
  .chart { margin: 0 -6px; padding: 12px 8px 6px; }
}
@media print { #controls { display: none; } .chart, article { break-inside: avoid; } }
`;

/** Inline script of the report; reads the element #data. */
export const script = String.raw`
'use strict';
(() => {
  const { runs } = JSON.parse(document.getElementById('data').textContent);
  const kinds = [
    { key: 'loss', title: 'Loss', unit: 'cross-entropy, nats a token', trim: true, wide: true },
    { key: 'kl', title: 'Divergence from the teacher', unit: 'KL, nats a token', trim: true },
    { key: 'agreement', title: 'Agreement with the teacher', unit: 'share of tokens with the same first choice' },
    { key: 'learningRate', title: 'Learning rate', unit: '', exact: true },
    { key: 'tokensPerSecond', title: 'Throughput', unit: 'tokens a second', zero: true },
    { key: 'gradientNorm', title: 'Gradient norm', unit: 'before clipping', trim: true, zero: true },
  ].filter((kind) => runs.some((run) => run.train[kind.key] || run.validation[kind.key]));
  const state = { x: 'tokens', smooth: 0.8, hidden: new Set() };
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const color = (i) => css('--run' + (i % 8));
  const paint = () => document.querySelectorAll('.swatch[data-run]').forEach((s) => { s.style.background = color(+s.dataset.run); });
  const fade = (c, alpha) => c + Math.round(alpha * 255).toString(16).padStart(2, '0');

  const short = (v) => {
    const a = Math.abs(v);
    for (const [size, unit] of [[1e12, 'T'], [1e9, 'B'], [1e6, 'M'], [1e3, 'k']]) if (a >= size) return +(v / size).toPrecision(4) + unit;
    if (a !== 0 && a < 1e-3) return v.toExponential().replace(/(\.\d{2})\d+/, '$1');
    return String(+v.toPrecision(4));
  };
  const clock = (s) => (s < 60 ? short(s) + ' s' : s < 3600 ? +(s / 60).toFixed(2) + ' min' : +(s / 3600).toFixed(2) + ' h');
  const xText = (v) => (state.x === 'seconds' ? clock(v) : short(v));

  // An average that forgets, freed of the zero that it starts from.
  const smooth = (y, weight) => {
    let sum = 0, mass = 0;
    return y.map((v) => { sum = weight * sum + (1 - weight) * v; mass = weight * mass + (1 - weight); return sum / mass; });
  };

  // The first steps fall from a great height; the scale follows the bulk of the curve instead.
  const range = (kind, values) => {
    const y = values.filter(Number.isFinite).sort((a, b) => a - b);
    if (!y.length) return [0, 1];
    let low = y[0], high = y[y.length - 1];
    if (kind.trim && y.length > 20) {
      const most = y[Math.floor(0.96 * (y.length - 1))];
      if (high > most + 0.5 * (most - low)) high = most + 0.12 * (most - low);
    }
    if (kind.zero) low = Math.min(0, low);
    const pad = 0.06 * (high - low || Math.abs(high) || 1);
    return [kind.zero && low === 0 ? 0 : low - pad, high + pad];
  };

  const charts = document.getElementById('charts');
  let plots = [];

  function draw() {
    for (const plot of plots) plot.destroy();
    plots = [];
    charts.textContent = '';
    const ready = [];
    for (const kind of kinds) {
      const tables = [], series = [{}], rows = [], seen = [];
      runs.forEach((run, i) => {
        const train = run.train[kind.key], validation = run.validation[kind.key];
        const shown = !state.hidden.has(i), ink = color(i);
        const weight = kind.exact ? 0 : state.smooth;
        if (train) {
          if (weight) {
            tables.push([train[state.x], train.y]);
            series.push({ show: shown, stroke: fade(ink, 0.2), width: 1, spanGaps: true, points: { show: false } });
            rows.push(null);
          }
          const y = weight ? smooth(train.y, weight) : train.y;
          tables.push([train[state.x], y]);
          series.push({ show: shown, stroke: fade(ink, validation ? 0.75 : 1), width: validation ? 1.5 : 2, spanGaps: true, points: { show: train.y.length < 3 } });
          rows.push({ run: i, name: run.name + (validation ? ', training' : '') });
          if (shown) seen.push(...y);
        }
        if (validation) {
          tables.push([validation[state.x], validation.y]);
          series.push({ show: shown, stroke: ink, width: 2.5, spanGaps: true, points: { show: true, size: 7, width: 2, stroke: ink, fill: css('--card') } });
          rows.push({ run: i, name: run.name + (train ? ', validation' : ''), strong: true });
          if (shown) seen.push(...validation.y);
        }
      });
      if (!tables.length) continue;
      const box = document.createElement('div');
      box.className = kind.wide ? 'chart wide' : 'chart';
      const both = runs.some((run) => run.train[kind.key] && run.validation[kind.key]);
      const heading = document.createElement('h3'), note = document.createElement('p'), tip = document.createElement('div');
      heading.textContent = kind.title;
      note.textContent = [kind.unit, both ? 'lines: training, dots: validation' : ''].filter(Boolean).join(' · ') || ' ';
      tip.className = 'tip';
      box.append(heading, note, tip);
      charts.append(box);
      const yRange = range(kind, seen);
      const axis = { stroke: css('--soft'), font: '12px system-ui, sans-serif', grid: { stroke: css('--grid'), width: 1 }, ticks: { show: false } };
      const size = () => ({ width: box.clientWidth - 28, height: kind.wide ? Math.max(230, Math.min(360, innerWidth * 0.5)) : 220 });
      // A box has its width only when all of them are laid out.
      ready.push(() => {
        const plot = new uPlot({
          ...size(),
          legend: { show: false },
          cursor: { sync: { key: 'limbeck' }, points: { show: false }, y: false, drag: { x: true, y: false } },
          scales: { x: { time: false }, y: { range: (u, low, high) => (u.zoomed && low != null ? uPlot.rangeNum(low, high, 0.08, true) : yRange) } },
          axes: [
            { ...axis, values: (u, ticks) => ticks.map(xText), space: 70, size: 32 },
            { ...axis, values: (u, ticks) => ticks.map(short), size: 54, gap: 6 },
          ],
          series,
          hooks: {
            setSelect: [(u) => { if (u.select.width > 0) u.zoomed = true; }],
            setCursor: [(u) => {
              const { idx, left, top } = u.cursor;
              if (idx == null || left < 0) { tip.style.display = 'none'; return; }
              tip.textContent = '';
              const at = document.createElement('div');
              at.className = 'x';
              at.textContent = (state.x === 'step' ? 'step ' : '') + xText(u.data[0][idx]) + (state.x === 'tokens' ? ' tokens' : '');
              tip.append(at);
              rows.forEach((row, j) => {
                if (!row || !u.series[j + 1].show) return;
                let k = idx;
                while (k > 0 && u.data[j + 1][k] == null) k--;
                const v = u.data[j + 1][k];
                if (v == null) return;
                const line = document.createElement('div'), swatch = document.createElement('i'), b = document.createElement('b');
                swatch.className = 'swatch';
                swatch.style.background = color(row.run);
                b.textContent = short(v);
                line.append(swatch, row.name, b);
                tip.append(line);
              });
              tip.style.display = 'block';
              const x = left + u.bbox.left / devicePixelRatio + 14, room = box.clientWidth - tip.offsetWidth - 8;
              tip.style.left = (x + 14 > room ? Math.max(6, x - tip.offsetWidth - 12) : x + 14) + 'px';
              tip.style.top = Math.max(8, (top > 0 ? top : 0) + 30) + 'px';
            }],
          },
        }, uPlot.join(tables), box);
        plot.over.addEventListener('dblclick', () => { plot.zoomed = false; });
        plot.over.addEventListener('mouseleave', () => { tip.style.display = 'none'; });
        const observer = new ResizeObserver(() => { if (size().width !== plot.width) plot.setSize(size()); });
        observer.observe(box);
        plots.push({ destroy: () => { observer.disconnect(); plot.destroy(); } });
      });
    }
    for (const plot of ready) plot();
  }

  function button(text, pressed, click) {
    const b = document.createElement('button');
    b.type = 'button';
    b.append(text);
    b.setAttribute('aria-pressed', pressed);
    b.addEventListener('click', click);
    return b;
  }

  function controls() {
    const bar = document.getElementById('controls');
    bar.textContent = '';
    if (!kinds.length) return;
    const chips = document.createElement('div');
    chips.className = 'chips';
    if (runs.length > 1) runs.forEach((run, i) => {
      const b = button('', !state.hidden.has(i), () => {
        state.hidden.has(i) ? state.hidden.delete(i) : state.hidden.add(i);
        controls();
        draw();
      });
      const swatch = document.createElement('i');
      swatch.className = 'swatch';
      swatch.dataset.run = i;
      b.append(swatch, run.name);
      chips.append(b);
    });
    const segments = document.createElement('div');
    segments.className = 'segments';
    for (const [key, text] of [['tokens', 'tokens'], ['step', 'steps'], ['seconds', 'time']])
      segments.append(button(text, state.x === key, () => { state.x = key; controls(); draw(); }));
    const label = document.createElement('label'), slider = document.createElement('input');
    Object.assign(slider, { type: 'range', min: 0, max: 0.98, step: 0.01, value: state.smooth });
    slider.addEventListener('input', () => { state.smooth = +slider.value; draw(); });
    label.append('smoothing', slider);
    bar.append(chips, segments, label);
    paint();
  }

  controls();
  paint();
  draw();
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => { paint(); draw(); });
})();
`;
