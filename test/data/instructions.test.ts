// Conversations to batches: the collator of chapter 7, masks, truncation, packing, order and resume.
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { bestFitDecreasing } from '../../src/data/bestfit.ts';
import { exampleOf } from '../../src/data/examples.ts';
import { type InstructionOptions, openInstructions } from '../../src/data/instructions.ts';
import { type Batch, layOut } from '../../src/data/pack.ts';
import { chatTemplate, type Message } from '../../src/tokenizer/chat.ts';
import type { Tokenizer } from '../../src/tokenizer/tokenizer.ts';
import { trainTokenizer } from '../../src/tokenizer/train.ts';

let folder: string;
let tokenizer: Tokenizer;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'limbeck-instructions-'));
  tokenizer = await trainTokenizer(['the people of this country shall keep a Union that is free'], {
    vocabSize: 300,
    specialTokens: ['<pad>', '<eos>', '<bos>', '<|im_start|>', '<|im_end|>'],
  });
});
afterAll(() => rm(folder, { recursive: true }));

const words = 'the people of this country shall keep a Union that is free'.split(' ');
const say = (n: number, from = 0) => Array.from({ length: n }, (_, i) => words[(from + i * i) % words.length]).join(' ');

async function open(rows: readonly unknown[], changes: Partial<InstructionOptions> = {}) {
  const train = join(folder, `rows-${rows.length}.jsonl`);
  await writeFile(train, rows.map((row) => JSON.stringify(row)).join('\n'));
  const template = chatTemplate('chatml', tokenizer);
  return openInstructions({ train, template, tokenizer, length: 64, batch: 4, ...changes });
}
const many = Array.from({ length: 23 }, (_, i) => ({ prompt: say(1 + (i % 7), i), completion: say(1 + (i % 5), i + 1) }));

test("chapter 7's collator: pads to the longest, keeps the first end token, nothing beyond counts", () => {
  const end = 50256;
  const spans = [
    [0, 1, 2, 3, 4],
    [5, 6],
    [7, 8, 9],
  ].map((ids) => [{ ids: Int32Array.from(ids), next: end }]);
  const batch = layOut(spans, { length: 5, batch: 3, pad: end });
  expect([...batch.ids]).toEqual([0, 1, 2, 3, 4, 5, 6, end, end, end, 7, 8, 9, end, end]);
  expect([...batch.targets]).toEqual([1, 2, 3, 4, end, 6, end, -100, -100, -100, 8, 9, end, -100, -100]);
  expect(batch.predicted).toBe(10);
});

describe('masks', () => {
  const messages: Message[] = [
    { role: 'user', content: 'keep the Union' },
    { role: 'assistant', content: 'free' },
    { role: 'user', content: 'of this' },
    { role: 'assistant', content: 'people' },
  ];
  const example = (mask: InstructionOptions['mask'], promptWeight: number) =>
    exampleOf(
      { messages, file: 'x', line: 1 },
      { template: chatTemplate('chatml', tokenizer), tokenizer, mask: mask!, promptWeight, length: 512, overflow: 'drop' },
    )!;
  /** The text of the targets of a weight. */
  const counted = ({ ids, next, weights }: ReturnType<typeof example>, weight: number) =>
    tokenizer.decode([...ids.subarray(1), next].filter((_, i) => weights![i] === weight));

  test('all, the last answer, every answer', () => {
    expect(counted(example('completion', 0), 1)).toBe('people<|im_end|>');
    expect(counted(example('assistant-turns', 0), 1)).toBe('free<|im_end|>people<|im_end|>');
    const whole = chatTemplate('chatml', tokenizer).render(messages);
    expect(`<bos>${counted(example('all', 0), 1)}\n`).toBe(whole);
  });

  test('the prompt counts what it is told to', () => {
    expect(counted(example('assistant-turns', 0.25), 0.25)).toContain('keep the Union');
    expect(counted(example('assistant-turns', 0.25), 1)).toBe('free<|im_end|>people<|im_end|>');
    const batch = layOut([[example('assistant-turns', 0.25)]], { length: 512, batch: 1 });
    const sum = (array: Float32Array) => array.reduce((a, b) => a + b, 0);
    expect(batch.predicted).toBeCloseTo(sum(batch.weights), 4);
    expect(new Set(batch.weights)).toEqual(new Set([0, 0.25, 1]));
    batch.targets.forEach((target, i) => {
      expect(target === -100).toBe(batch.weights[i] === 0);
    });
  });
});

describe('too long', () => {
  const long = (turns: number, size: number): Message[] =>
    Array.from({ length: 2 * turns }, (_, i) => ({ role: i % 2 ? 'assistant' : 'user', content: say(size, i) }));

  test('the end token is never lost, answers stay whole where they can, and nothing without an answer stays', () => {
    fc.assert(
      fc.property(
        fc.constantFrom('chatml', 'alpaca', 'phi3', 'mistral'),
        fc.integer({ min: 1, max: 4 }),
        fc.integer({ min: 1, max: 12 }),
        fc.integer({ min: 2, max: 200 }),
        fc.constantFrom('completion', 'assistant-turns', 'all'),
        (style, turns, size, length, mask) => {
          const template = chatTemplate(style, tokenizer);
          const settings = { template, tokenizer, mask, promptWeight: 0, overflow: 'truncate' } as const;
          const conversation = { messages: long(turns, size), file: 'x', line: 1 };
          const whole = exampleOf(conversation, { ...settings, length: 1 << 20 })!;
          const cut = exampleOf(conversation, { ...settings, length });
          if (cut === undefined) {
            // Not even the first question, one token of its answer and the end fit.
            const question = template.render(conversation.messages.slice(0, 1), { addGenerationPrompt: true });
            expect(tokenizer.encode(question).length + 2).toBeGreaterThan(length + 1);
            return;
          }
          expect(cut.ids.length).toBeLessThanOrEqual(length);
          expect(cut.truncated).toBe(whole.ids.length > length);
          expect(cut.next).toBe(whole.next);
          expect(cut.weights!.at(-1)).toBe(1);
          expect(cut.weights).toHaveLength(cut.ids.length);
          const kept = cut.ids.findIndex((id, i) => id !== whole.ids[i]);
          expect(kept === -1 || kept === cut.ids.length - 1).toBe(true);
        },
      ),
      { numRuns: 150 },
    );
  });

  test('what was cut and what was left out is told', async () => {
    const rows = [
      { prompt: 'the', completion: 'free' },
      { prompt: 'the', completion: say(60) },
      { prompt: say(60), completion: 'free' },
      { prompt: 'the', completion: ' ' },
    ];
    const { report } = await open(rows, { length: 40 });
    expect(report).toMatchObject({ trainExamples: 2, truncated: 1, dropped: 1, malformedCount: 1 });
    expect(report.malformed).toMatchObject([{ line: 4, field: 'completion' }]);
    const strictly = await open(rows, { length: 40, overflow: 'drop' });
    expect(strictly.report).toMatchObject({ trainExamples: 1, truncated: 0, dropped: 2 });
    await expect(open(rows, { length: 40, strict: true })).rejects.toMatchObject({ code: 'ERR_MALFORMED' });
    await expect(open(rows.slice(2), { length: 40 })).rejects.toThrow(/1 malformed, 1 longer than 40 tokens.*:2: .*empty answer/);
  });

  test('a row that the template refuses is a malformed row', async () => {
    const template = chatTemplate(
      "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}{% for m in messages %}{{ m.role + m.content }}{% endfor %}",
      tokenizer,
    );
    const turns = [
      { role: 'user', content: 'keep' },
      { role: 'assistant', content: 'free' },
    ];
    const { report } = await open([{ messages: turns }, { messages: [{ role: 'system', content: 'x' }, ...turns] }], {
      template,
    });
    expect(report).toMatchObject({ trainExamples: 1, malformedCount: 1 });
    expect(report.malformed).toMatchObject([{ line: 2, reason: expect.stringContaining('no system here') }]);
  });
});

describe('packing', () => {
  test('best fit, the longest first, as the plain rule does it', () => {
    fc.assert(
      fc.property(fc.integer({ min: 1, max: 100 }), fc.array(fc.nat(100), { maxLength: 60 }), (room, raw) => {
        const lengths = raw.map((n) => n % (room + 1));
        const rows = bestFitDecreasing(lengths, room);
        expect(rows.flat().sort((a, b) => a - b)).toEqual(lengths.map((_, i) => i));
        const used = rows.map((row) => row.reduce((sum, i) => sum + lengths[i]!, 0));
        expect(used.every((n) => n <= room)).toBe(true);
        // The plain rule, a row at a time: as many rows with as much room left.
        const left: number[] = [];
        for (const n of [...lengths].sort((a, b) => b - a)) {
          const fits = left.filter((l) => l >= n);
          const best = fits.length === 0 ? -1 : left.indexOf(Math.min(...fits));
          if (best < 0) left.push(room - n);
          else left[best]! -= n;
        }
        const sorted = (numbers: number[]) => [...numbers].sort((a, b) => a - b);
        expect(sorted(used.map((n) => room - n))).toEqual(sorted(left));
      }),
    );
  });

  test('examples see themselves only, and every one comes once in an epoch', async () => {
    const { train, report } = await open(many, { batch: 1, length: 160 });
    expect(report.trainRows).toBeLessThan(many.length);
    const seen: string[] = [];
    for (let r = 0; r < report.trainRows; r++) {
      const { ids, starts, positions, targets, length } = await train.next();
      for (let i = 0; i < length; i++) {
        if (starts[i] === i && targets.subarray(i).some((t) => t >= 0) && ids[i] === tokenizer.bos) {
          const end = starts.findIndex((s, j) => j > i && s !== i);
          seen.push(tokenizer.decode(ids.subarray(i, end < 0 ? length : end)));
        }
        expect(positions[i]! + starts[i]!).toBe(positions[i] === 0 && starts[i] === i ? i : i);
      }
    }
    const template = chatTemplate('chatml', tokenizer);
    const texts = many.map(({ prompt, completion }) =>
      template.render([
        { role: 'user', content: prompt },
        { role: 'assistant', content: completion },
      ]),
    );
    expect(seen).toHaveLength(many.length);
    // The last token of an example is a target only.
    for (const text of texts) expect(seen).toContain(text.replace(/<\|im_end\|>\n$/, ''));
    expect(Math.floor(train.epoch)).toBe(1);
  });

  test('padding: a row each, as long as the longest of its batch', async () => {
    const { train, report } = await open(many, { pack: false });
    expect(report.trainRows).toBe(many.length);
    const batch = await train.next();
    const filled = Array.from(
      { length: 4 },
      (_, r) => batch.starts.subarray(r * batch.length, (r + 1) * batch.length).filter((s) => s === 0).length,
    );
    expect(Math.max(...filled)).toBe(batch.length);
    expect(new Set(filled).size).toBeGreaterThan(1);
    expect(batch.length).toBeLessThan(64);
    expect(batch.tokens).toBe(filled.reduce((a, b) => a + b, 0));
  });
});

describe('order', () => {
  const take = async (loader: { next(): Promise<Batch> }, n: number) => {
    const batches: Batch[] = [];
    for (let i = 0; i < n; i++) batches.push(await loader.next());
    return batches;
  };

  test.each([true, false])('the same for the same seed, another each epoch, and exactly resumed (pack %s)', async (pack) => {
    const options = { pack, seed: 3 };
    const whole = await take((await open(many, options)).train, 14);
    expect(await take((await open(many, options)).train, 14)).toEqual(whole);
    expect(await take((await open(many, { ...options, seed: 4 })).train, 14)).not.toEqual(whole);
    for (const at of [0, 3, 9]) {
      const first = await open(many, options);
      await take(first.train, at);
      const state = JSON.parse(JSON.stringify(first.train.state()));
      const second = await open(many, options);
      second.train.restore(state);
      expect(await take(second.train, 14 - at)).toEqual(whole.slice(at));
    }
    const epochs = await open(many, { ...options, batch: 1 });
    const rows = epochs.report.trainRows;
    const [one, two] = [await take(epochs.train, rows), await take(epochs.train, rows)];
    expect(one.map(({ ids }) => ids.join())).not.toEqual(two.map(({ ids }) => ids.join()));
    const count = (batches: Batch[]) => batches.reduce((sum, { tokens }) => sum + tokens, 0);
    expect(count(one)).toBe(count(two));
    expect(count(one)).toBe(epochs.report.trainTokens);
  });

  test('a state of other data or another mask is refused', async () => {
    const state = (await open(many)).train.state();
    const other = [open(many.slice(1)), open(many, { mask: 'all' }), open(many, { pack: false }), open(many, { seed: 1 })];
    for (const opened of other) {
      const { train } = await opened;
      expect(() => train.restore(state)).toThrow(expect.objectContaining({ code: 'ERR_RESUME' }));
    }
  });

  test('held out: a share, a number, or files; the same every time', async () => {
    const { report, heldOut, validation } = await open(many, { validation: { documents: 5 } });
    expect(report).toMatchObject({ trainExamples: 18, validationExamples: 5 });
    expect(heldOut).toHaveLength(5);
    const once: Batch[] = [];
    for await (const batch of validation()) once.push(batch);
    const again: Batch[] = [];
    for await (const batch of validation()) again.push(batch);
    expect(again).toEqual(once);
    expect(once.length).toBeGreaterThan(0);
    const files = await open(many, { validation: join(folder, 'rows-23.jsonl') });
    expect(files.report).toMatchObject({ trainExamples: 23, validationExamples: 23 });
    await expect(open(many, { validation: { documents: 23 } })).rejects.toMatchObject({ code: 'ERR_SPLIT' });
  });
});
