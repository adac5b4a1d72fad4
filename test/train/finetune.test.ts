// Chapter 7 of "Build a Large Language Model (From Scratch)" at small scale: a model that has read about the countries of the world learns
// to answer questions about them.
import { mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { factbookProse, factbookRows } from '../../examples/factbook.ts';
import { openSafetensors } from '../../src/io/safetensors.ts';
import { latestCheckpoint } from '../../src/models/folder.ts';
import { createModel, loadModel, loadWeights, modelConfig } from '../../src/models/model.ts';
import { plan } from '../../src/plan/plan.ts';
import { scope } from '../../src/tensor/scope.ts';
import { noGrad } from '../../src/tensor/tape.ts';
import { readAs } from '../../src/tensor/tensor.ts';
import { loadChatTemplate } from '../../src/tokenizer/chat.ts';
import { chatStyles } from '../../src/tokenizer/styles.ts';
import { loadTokenizer } from '../../src/tokenizer/tokenizer.ts';
import { upload } from '../../src/train/batch.ts';
import type { RunInput } from '../../src/train/config.ts';
import { parseRun } from '../../src/train/config.ts';
import type { DoneEvent, EvaluateEvent, SampleEvent, StepEvent, TrainEvent } from '../../src/train/events.ts';
import { finetune, instructionLoss, noiseSizes } from '../../src/train/finetune.ts';
import { pretrain } from '../../src/train/pretrain.ts';
import { record } from '../../src/train/record.ts';
import type { Response } from '../../src/train/responses.ts';

let folder: string;
const small = { width: 48, heads: 2, kvHeads: 2, headSize: 24, hidden: 96, context: 160 } as const;

async function collect(events: AsyncIterable<TrainEvent>): Promise<TrainEvent[]> {
  const all: TrainEvent[] = [];
  for await (const event of events) all.push(event);
  return all;
}
const of = <T extends TrainEvent['type']>(events: readonly TrainEvent[], type: T) =>
  events.filter((e): e is Extract<TrainEvent, { type: T }> => e.type === type);

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'limbeck-finetune-'));
  await writeFile(
    join(folder, 'prose.jsonl'),
    factbookProse()
      .map((text) => JSON.stringify({ text: text.slice(0, 600) }))
      .join('\n'),
  );
  await writeFile(join(folder, 'rows.json'), JSON.stringify(factbookRows()));
  await collect(
    pretrain({
      kind: 'pretrain',
      output: join(folder, 'base'),
      data: { jsonl: join(folder, 'prose.jsonl'), validation: 0.05 },
      tokenizer: { train: { vocabSize: 600 } },
      model: { preset: 'gpt2-nano', ...small },
      batch: { sequences: 4, length: 128 },
      steps: 30,
      optimizer: { learningRate: 5e-3 },
    }),
  );
});
afterAll(() => rm(folder, { recursive: true, force: true }));

function run(output: string, changes: object = {}): RunInput {
  return {
    kind: 'finetune',
    output: join(folder, output),
    model: join(folder, 'base'),
    data: { train: join(folder, 'rows.json'), validation: { documents: 40 } },
    template: 'alpaca',
    batch: { sequences: 4, length: 160 },
    steps: 12,
    optimizer: { learningRate: 5e-3 },
    evaluate: { every: 6 },
    checkpoint: { every: 4, keep: 2 },
    responses: { samples: 1, examples: 3, tokens: 12 },
    ...changes,
  } as RunInput;
}

async function weights(output: string): Promise<Map<string, unknown>> {
  const file = await openSafetensors(join((await latestCheckpoint(join(folder, output)))!, 'model.safetensors'));
  const all = new Map<string, unknown>();
  for (const name of file.tensors.keys()) all.set(name, await file.read(name));
  await file.close();
  return all;
}
const losses = (events: readonly TrainEvent[]) => of(events, 'step').map((e: StepEvent) => e.loss);
const scores = (events: readonly TrainEvent[]) => of(events, 'evaluate').map((e: EvaluateEvent) => e.loss);

describe('finetuning', () => {
  let events: TrainEvent[];
  beforeAll(async () => {
    const settings = run('whole');
    events = await collect(record(parseRun(settings), finetune(settings)));
  });

  test('scores first, learns, answers, saves', () => {
    const kinds = events.map((e) => e.type).filter((type) => type !== 'warning');
    expect(kinds.slice(0, 3)).toEqual(['start', 'evaluate', 'sample']);
    expect(kinds.slice(-3)).toEqual(['checkpoint', 'responses', 'done']);
    expect(of(events, 'start')[0]).toMatchObject({ kind: 'finetune', steps: 12 });
    const held = scores(events);
    expect(held).toHaveLength(3);
    expect(held.at(-1)).toBeLessThan(held[0]! - 0.3);
    expect((events.at(-1) as DoneEvent).reason).toBe('finished');
  });

  test('answers to held-out instructions stand beside their references', async () => {
    const lines = (await readFile(join(folder, 'whole/responses.jsonl'), 'utf8')).trim().split('\n');
    const answers = lines.map((line) => JSON.parse(line) as Response);
    expect(answers).toHaveLength(3);
    const rows = factbookRows();
    for (const { messages, reference, response, finish } of answers) {
      expect(rows.map((row) => row.output)).toContain(reference);
      expect(messages.map((m) => m.role)).toEqual(['user']);
      expect(response).toBeTypeOf('string');
      expect(['stop', 'length']).toContain(finish);
    }
    const samples = of(events, 'sample') as SampleEvent[];
    expect(samples.map(({ step }) => step)).toEqual([0, 6, 12]);
    expect(samples.at(-1)).toMatchObject({ text: answers[0]!.response, reference: answers[0]!.reference });
    expect(await readFile(join(folder, 'whole/report.html'), 'utf8')).toContain('reference: ');
  });

  test('a checkpoint knows its template, and is a model to finetune or load', async () => {
    const checkpoint = (await latestCheckpoint(join(folder, 'whole')))!;
    const tokenizer = await loadTokenizer(checkpoint);
    expect((await loadChatTemplate(checkpoint, tokenizer))!.source).toBe(chatStyles.alpaca);
    const again = await collect(finetune(run('again', { model: join(folder, 'whole'), template: 'model', steps: 1 })));
    expect(scores(again)[0]).toBeCloseTo(scores(events).at(-1)!, 5);
  });

  test('stopped and gone on: the same bits', async () => {
    const controller = new AbortController();
    const settings = run('parts', { neftune: 5 });
    const one = await collect(finetune(run('noise', { neftune: 5 })));
    const before: TrainEvent[] = [];
    for await (const event of finetune(settings, { signal: controller.signal })) {
      before.push(event);
      if (event.type === 'step' && event.step === 5) controller.abort();
    }
    expect(before.at(-1)).toMatchObject({ type: 'done', reason: 'aborted' });
    expect(await readdir(join(folder, 'parts'))).not.toContain('responses.jsonl');
    const after = await collect(finetune(settings));
    expect(of(after, 'start')[0]!.resumedFrom).toBeDefined();
    expect([...losses(before), ...losses(after)]).toEqual(losses(one));
    expect(await weights('parts')).toEqual(await weights('noise'));
    expect(losses(one)).not.toEqual(losses(events));
  });

  test('with other noise, batch or data a checkpoint is not gone on from', async () => {
    for (const [argument, changes] of [
      ['neftune', { neftune: 1 }],
      ['batch', { batch: { sequences: 2, length: 160 } }],
      ['mask', { mask: 'all' }],
      ['mask', { promptWeight: 0.5 }],
      ['template', { template: 'chatml' }],
    ] as const) {
      const again = collect(finetune(run('whole', { ...changes, steps: 20 })));
      await expect(again, argument).rejects.toMatchObject({ code: 'ERR_RESUME', argument });
    }
    const rows = [{ instruction: 'Another', output: 'row' }];
    await writeFile(join(folder, 'other.json'), JSON.stringify([...rows, ...rows, ...rows]));
    const other = run('whole', { data: { train: join(folder, 'other.json') }, steps: 20 });
    await expect(collect(finetune(other))).rejects.toMatchObject({ code: 'ERR_RESUME' });
  });
});

describe('with an adapter', () => {
  const adapter = { rank: 4, alpha: 8, dropout: 0.1, ratio: 4 };
  const settings = { adapter, evaluate: { every: 6 }, responses: { samples: 0, examples: 0 } };
  const bytes = async (output: string): Promise<Buffer> =>
    readFile(join((await latestCheckpoint(join(folder, output)))!, 'adapter_model.safetensors'));

  test.each([{}, { base: 'q8' }, { adapter: { ...adapter, kind: 'dora' }, base: 'q4', recompute: true }])(
    'learns beside a frozen base: %j',
    async (changes) => {
      const events = await collect(finetune(run(`adapter-${Object.values(changes).length}`, { ...settings, ...changes })));
      expect(of(events, 'start')[0]!.parameters).toBeLessThan(20_000);
      expect(scores(events).at(-1)).toBeLessThan(scores(events)[0]! - 0.05);
    },
  );

  test('stopped and gone on: the same bits', async () => {
    const all = { ...settings, adapter: { ...adapter, init: 'olora' } };
    const controller = new AbortController();
    const one = await collect(finetune(run('adapter-whole', all)));
    const before: TrainEvent[] = [];
    for await (const event of finetune(run('adapter-parts', all), { signal: controller.signal })) {
      before.push(event);
      if (event.type === 'step' && event.step === 5) controller.abort();
    }
    const after = await collect(finetune(run('adapter-parts', all)));
    expect([...losses(before), ...losses(after)]).toEqual(losses(one));
    expect((await bytes('adapter-parts')).equals(await bytes('adapter-whole'))).toBe(true);
    const other = run('adapter-whole', { ...all, adapter: { ...adapter, rank: 2 }, steps: 20 });
    await expect(collect(finetune(other))).rejects.toMatchObject({ code: 'ERR_RESUME' });

    // Its checkpoint is a model for whoever loads it: the base that it names, with the adapter.
    const { model, tokenizer } = await loadModel((await latestCheckpoint(join(folder, 'adapter-whole')))!);
    expect(tokenizer.vocabSize).toBe(600);
    model.dispose();
    const again = await collect(finetune(run('adapter-again', { ...settings, model: join(folder, 'adapter-whole'), steps: 1 })));
    expect(scores(again)[0]).toBeCloseTo(scores(one).at(-1)!, 3);
  });

  test('a second adapter is trained on the first, loads with it, and goes on', async () => {
    const first = await collect(finetune(run('first', { ...settings, steps: 2 })));
    const second = run('second', { ...settings, model: join(folder, 'first'), steps: 2 });
    const events = await collect(finetune(second));
    expect(scores(events)[0]).toBeCloseTo(scores(first).at(-1)!, 3);
    const more = await collect(finetune({ ...second, steps: 3 }));
    expect(more[0]).toMatchObject({ type: 'start', resumedFrom: { step: 2 } });
    const whole = await loadModel((await latestCheckpoint(join(folder, 'second')))!);
    whole.model.dispose();
    const rounded = run('rounded', { ...settings, model: join(folder, 'first'), base: 'q4', steps: 1 });
    await expect(collect(finetune(rounded))).rejects.toMatchObject({ code: 'ERR_CONFIG', argument: 'base' });
    // Adapters that name each other lead to no model.
    const config = join((await latestCheckpoint(join(folder, 'first')))!, 'adapter_config.json');
    const text = await readFile(config, 'utf8');
    const circle = { ...JSON.parse(text), base_model_name_or_path: (await latestCheckpoint(join(folder, 'second')))! };
    await writeFile(config, JSON.stringify(circle));
    await expect(loadModel((await latestCheckpoint(join(folder, 'second')))!)).rejects.toMatchObject({ code: 'ERR_CHECKPOINT' });
    await writeFile(config, text);
  });

  test('a base of few bits without one is refused', () => {
    expect(() => parseRun(run('refused', { base: 'q4' }))).toThrow(/without an adapter/);
  });
});

describe('what counts', () => {
  test('the prompt is learned when the mask says so, and then the answers less', async () => {
    const answersOnly = await collect(finetune(run('answers', { steps: 20 })));
    const everything = await collect(finetune(run('everything', { steps: 20, mask: 'all' })));
    // The prompt repeats itself in every row: its tokens are soon known, and take the mean down.
    expect(scores(everything).at(-1)).toBeLessThan(scores(answersOnly).at(-1)!);
    expect(of(everything, 'evaluate')[0]!.tokens).toBeGreaterThan(3 * of(answersOnly, 'evaluate')[0]!.tokens);
    const weighted = await collect(finetune(run('weighted', { steps: 1, promptWeight: 0.1 })));
    const [few, some, all] = [answersOnly, weighted, everything].map((e) => of(e, 'evaluate')[0]!);
    expect(some!.tokens).toBeCloseTo(few!.tokens + 0.1 * (all!.tokens - few!.tokens), 1);
    expect(some!.loss).toBeCloseTo((few!.loss * 0.9 * few!.tokens + all!.loss * 0.1 * all!.tokens) / some!.tokens, 4);
  });

  test('packed, padded, in one batch or in parts: the same first step', async () => {
    const rows = factbookRows().slice(0, 8);
    await writeFile(join(folder, 'eight.json'), JSON.stringify(rows));
    const data = { train: join(folder, 'eight.json'), validation: join(folder, 'eight.json') };
    const first = async (output: string, changes: object, dataChanges = {}) => {
      const settings = run(output, {
        steps: 1,
        data: { ...data, ...dataChanges },
        responses: { samples: 0, examples: 0 },
        ...changes,
      });
      const [step] = of(await collect(finetune(settings)), 'step');
      return { loss: step!.loss, norm: step!.gradientNorm };
    };
    const padded = await first('padded', { batch: { sequences: 8, length: 160 } }, { pack: false });
    const parts = await first('split', { batch: { sequences: 2, length: 160, accumulate: 4 } }, { pack: false });
    const packed = await first('packed', { batch: { sequences: 8, length: 160 } });
    for (const other of [parts, packed]) {
      expect(other.loss).toBeCloseTo(padded.loss, 4);
      expect(other.norm).toBeCloseTo(padded.norm, 3);
    }
  });

  test('noise: as large as α / √(L C) for each example, none without α, drawn by the seed', async () => {
    const model = createModel(modelConfig('gpt2-nano', { ...small, vocabSize: 64 }), { seed: 1 });
    const batch = {
      rows: 1,
      length: 8,
      ids: Int32Array.of(1, 2, 3, 4, 5, 6, 7, 8),
      targets: Int32Array.of(2, 3, 4, 5, 6, 7, 8, 9),
      weights: new Float32Array(8).fill(1),
      positions: Int32Array.of(0, 1, 2, 0, 1, 2, 3, 4),
      starts: Int32Array.of(0, 0, 0, 3, 3, 3, 3, 3),
      tokens: 8,
      predicted: 8,
    };
    const size = (length: number) => Math.fround(5 / Math.sqrt(length * 48));
    expect([...noiseSizes(batch, 5, 48)]).toEqual([3, 3, 3, 5, 5, 5, 5, 5].map(size));
    const loss = async (neftune: number, index: number, seed = 1) => {
      const total = scope(() =>
        noGrad(() => instructionLoss(model, upload(batch, 1), { index, batch }, { neftune, seed, recompute: false }).total),
      );
      const [value] = await readAs(total, 'f32');
      total.dispose();
      return value!;
    };
    const quiet = await loss(0, 0);
    expect(await loss(0, 7, 3)).toBe(quiet);
    const [one, same, later, other] = [await loss(5, 0), await loss(5, 0), await loss(5, 1), await loss(5, 0, 2)];
    expect(same).toBe(one);
    expect(new Set([quiet, one, later, other]).size).toBe(4);
    model.dispose();
  });
});

test('a plan knows what finetuning takes', async () => {
  const { parameters, memory, step } = await plan(run('planned', { batch: { sequences: 2, length: 128 } }));
  const model = await loadWeights((await latestCheckpoint(join(folder, 'base')))!);
  expect(parameters.student).toBe(model.parameters.count);
  expect(memory.total).toBeGreaterThan(16 * model.parameters.count);
  expect(step.tokens).toBe(256);
  model.dispose();
});

describe('how long', () => {
  test('epochs become steps', async () => {
    const rows = factbookRows().slice(0, 10);
    await writeFile(join(folder, 'ten.json'), JSON.stringify(rows));
    const data = { train: join(folder, 'ten.json'), validation: { documents: 2 }, pack: false };
    const quick = {
      steps: undefined,
      epochs: 2,
      batch: { sequences: 3, length: 160 },
      data,
      responses: { samples: 0, examples: 0 },
    };
    const events = await collect(finetune(run('epochs', quick)));
    // 8 rows twice, 3 a step
    expect(of(events, 'step')).toHaveLength(6);
    expect(of(events, 'responses')).toHaveLength(0);
  });

  test('patience: stops when the loss rises, keeps the best checkpoint, and knows it after a resume', async () => {
    const rows = factbookRows().slice(0, 30);
    await writeFile(join(folder, 'thirty.json'), JSON.stringify(rows));
    const settings = run('patient', {
      data: { train: join(folder, 'thirty.json'), validation: { documents: 15 } },
      steps: 400,
      evaluate: { every: 2, patience: 2 },
      checkpoint: { every: 1000, keep: 1 },
      optimizer: { learningRate: 0.02 },
      responses: { samples: 0, examples: 0 },
    });
    const events = await collect(finetune(settings));
    const done = events.at(-1) as DoneEvent;
    expect(done.reason).toBe('stopped');
    expect(done.step).toBeLessThan(400);
    expect(done.step).toBe(done.best!.step + 4);
    expect(done.best!.loss).toBe(Math.min(...scores(events).slice(1)));
    const { model } = await loadModel(done.best!.checkpoint);
    model.dispose();
    const again = await collect(finetune(settings));
    expect(of(again, 'step')).toHaveLength(0);
    expect(again.at(-1)).toMatchObject({ reason: 'stopped', best: { step: done.best!.step } });
  });
});

describe('what is refused or told', () => {
  test.each([
    ['a model without a template', { template: 'model' }, 'template', 'has no chat template'],
    ['an unknown style', { template: 'alpacca' }, 'style', 'known are alpaca'],
    ['a template file that is not there', { template: 'none.jinja' }, 'template', 'cannot be read'],
    ['rows longer than the context', { batch: { length: 512 } }, 'batch.length', 'at most 160'],
    ['a model that is not there', { model: 'nowhere' }, undefined, 'neither a model folder'],
  ])('%s', async (_, changes, argument, text) => {
    const error = await collect(finetune(run('refused', changes))).catch((e: unknown) => e);
    expect(error).toMatchObject({ message: expect.stringContaining(text), ...(argument === undefined ? {} : { argument }) });
  });

  test('a single row that can be used among others', async () => {
    const rows = [{ instruction: 'a' }, { instruction: 'Say it.', output: 'It.' }];
    await writeFile(join(folder, 'single.jsonl'), rows.map((row) => JSON.stringify(row)).join('\n'));
    const data = { train: join(folder, 'single.jsonl') };
    const told = /1 conversations that can be used \(1 cannot; the first is .*single.jsonl:1: field "output" is missing\)/;
    await expect(collect(finetune(run('single', { data })))).rejects.toThrow(told);
  });

  test('rows that were cut, left out or malformed', async () => {
    const rows: object[] = [...factbookRows().slice(0, 6), { instruction: 'a', output: '' }];
    rows.push({ instruction: 'Go on.', output: 'and on '.repeat(200) }, { instruction: 'and on '.repeat(200), output: 'Stop.' });
    await writeFile(join(folder, 'odd.jsonl'), rows.map((row) => JSON.stringify(row)).join('\n'));
    const data = { train: join(folder, 'odd.jsonl'), validation: { documents: 1 } };
    const events = await collect(finetune(run('odd', { data, steps: 1, responses: { samples: 0, examples: 0 } })));
    const told = Object.fromEntries(of(events, 'warning').map(({ code, count }) => [code, count]));
    expect(told).toEqual({ WARN_MALFORMED: 1, WARN_TRUNCATED: 1, WARN_DROPPED: 1 });
    const strict = run('strict', { data: { ...data, strict: true } });
    await expect(collect(finetune(strict))).rejects.toMatchObject({
      code: 'ERR_MALFORMED',
      message: expect.stringContaining('line 7'),
    });
  });
});
