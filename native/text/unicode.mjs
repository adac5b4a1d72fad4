// Writes unicode_ranges.h beside itself: node native/text/unicode.mjs. Run it with the Node whose Unicode version is wanted;
// the file is committed, so that a text has the same tokens whatever Node runs.
import { writeFileSync } from 'node:fs';

const classes = [/\p{L}/u, /\p{N}/u, /\p{White_Space}/u];
const lines = [];
let last = 0;
for (let c = 0; c < 0x110000; c++) {
  const surrogate = c >= 0xd800 && c < 0xe000;
  const kind = surrogate ? 0 : classes.findIndex((r) => r.test(String.fromCodePoint(c))) + 1;
  if (kind !== last) lines.push(`0x${c.toString(16)}${kind}`);
  last = kind;
}
const rows = [];
for (let i = 0; i < lines.length; i += 14) rows.push(`${lines.slice(i, i + 14).join(', ')},`);
const head = `// Unicode ${process.versions.unicode}, made by unicode.mjs: first code point of a range * 16 + its class.\n`;
writeFileSync(new URL('unicode_ranges.h', import.meta.url), `${head}${rows.join('\n')}\n`);
