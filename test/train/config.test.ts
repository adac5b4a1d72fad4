import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { ConfigError } from '../../src/tensor/errors.ts';
import {
  defineRun,
  loadRun,
  parseRun,
  plannedSteps,
  type RunConfig,
  runFields,
  runJsonSchema,
  tokensPerStep,
} from '../../src/train/config.ts';

const pretrain = defineRun({
  kind: 'pretrain',
  output: 'out',
  tokenizer: 'tokenizer.json',
  data: { text: 'corpus/*.txt' },
  model: 'tiny',
  steps: 5,
});
const distill = { ...pretrain, kind: 'distill', teacher: { checkpoint: 'teacher' } };

function refusal(input: unknown): ConfigError {
  try {
    parseRun(input);
  } catch (error) {
    expect(error).toBeInstanceOf(ConfigError);
    return error as ConfigError;
  }
  throw new Error('was accepted');
}

const finetune = { kind: 'finetune', output: 'run', model: 'model', data: { train: 'rows.json' }, epochs: 2 };

describe('defaults', () => {
  test('every field has its documented default', () => {
    expect(parseRun(pretrain, { base: '/base' })).toEqual({
      kind: 'pretrain',
      name: 'run',
      output: '/base/out',
      seed: 0,
      device: 'cpu',
      tokenizer: '/base/tokenizer.json',
      data: { text: '/base/corpus/*.txt', field: 'text', validation: 0.01, isolate: true, strict: false },
      model: 'tiny',
      batch: { sequences: 8, length: 256, accumulate: 1 },
      steps: 5,
      optimizer: {
        learningRate: 1e-3,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weightDecay: 0.1,
        moments: 'f32',
        master: true,
        clip: 1,
      },
      schedule: { kind: 'cosine', warmupSteps: 0, finalFraction: 0.1, decayFraction: 0.2 },
      evaluate: { every: 200, first: false },
      checkpoint: { every: 500, keep: 3 },
      log: { every: 1, tensorboard: true, report: true },
      recompute: false,
      resume: 'auto',
    });
  });

  test('distillation', () => {
    const run = parseRun(distill, { base: '/base' });
    if (run.kind !== 'distill') throw new Error(run.kind);
    expect(run.teacher.checkpoint).toBe('/base/teacher');
    expect(run.distill).toEqual({ divergence: { kind: 'forward_kl' }, temperature: 1, squaredTemperature: true, hardWeight: 0 });
  });

  test('finetuning', () => {
    const run = parseRun(finetune, { base: '/base' });
    if (run.kind !== 'finetune') throw new Error(run.kind);
    expect(run).toMatchObject({
      model: '/base/model',
      template: 'model',
      mask: 'completion',
      promptWeight: 0,
      neftune: 0,
      data: { train: '/base/rows.json', validation: 0.1, strict: false, pack: true, overflow: 'truncate' },
      optimizer: { learningRate: 5e-5, weightDecay: 0.1 },
      evaluate: { every: 200, first: true },
      responses: { samples: 3, examples: 100, tokens: 256, temperature: 0 },
    });
    const own = parseRun({ ...finetune, template: 'own.jinja', data: { train: ['a'], validation: ['b'] } }, { base: '/base' });
    expect(own).toMatchObject({ template: '/base/own.jinja', data: { train: ['/base/a'], validation: ['/base/b'] } });
  });

  test('a parsed run parses to itself', () => {
    for (const input of [pretrain, distill, finetune]) {
      const run = parseRun(input, { base: '/base' });
      expect(parseRun(run, { base: '/elsewhere' })).toEqual(run);
    }
  });

  test('steps follow from tokens, rounded up', () => {
    const { steps: _, ...rest } = pretrain;
    const run = parseRun({ ...rest, tokens: 1001, batch: { sequences: 2, length: 50, accumulate: 5 } });
    expect([tokensPerStep(run), plannedSteps(run)]).toEqual([500, 3]);
  });
});

describe('a wrong field is named, with its value, what it must be and what was probably meant', () => {
  test.each([
    ['a misspelt field', { optimzer: {} }, 'optimzer', 'optimzer is not a known field; did you mean optimizer?'],
    ['snake case', { optimizer: { learning_rate: 1 } }, 'optimizer.learning_rate', 'did you mean optimizer.learningRate?'],
    ["another tool's name", { lr: 1 }, 'lr', 'did you mean optimizer.learningRate?'],
    ['the right name in the wrong place', { warmupSteps: 1 }, 'warmupSteps', 'did you mean schedule.warmupSteps?'],
    ['a field like no other', { zzz: 1 }, 'zzz', 'known here: kind, name, output'],
    ['a wrong type', { optimizer: { learningRate: 'fast' } }, 'optimizer.learningRate', 'is "fast"; it must be a number'],
    ['a batch beyond all bounds', { batch: { sequences: 2 ** 20, length: 2 ** 20 } }, 'batch', 'fewer than 2^31 tokens'],
    ['a fraction', { batch: { length: 1.5 } }, 'batch.length', 'is 1.5; it must be a whole number'],
    ['too small', { batch: { sequences: 0 } }, 'batch.sequences', 'is 0; it must be a number of at least 1'],
    ['a window of 0', { model: { window: 0 } }, 'model.window', 'is 0; it must be a number of at least 1'],
    ['NaN', { optimizer: { learningRate: Number.NaN } }, 'optimizer.learningRate', 'must be a number'],
    ['a wrong choice', { schedule: { kind: 'cosin' } }, 'schedule.kind', 'Did you mean "cosine"?'],
    ['a wrong kind', { kind: 'pretrian' }, 'kind', 'one of "pretrain", "distill", "finetune". Did you mean "pretrain"?'],
    ['heads that do not divide', { model: { heads: 5, kvHeads: 2 } }, 'model.kvHeads', 'must divide heads (5), 2 does not'],
    ['neither form of a union', { model: 5 }, 'model', 'is 5; it must be a text or an object'],
    ['deep inside a union', { tokenizer: { train: { vocabSize: 10 } } }, 'tokenizer.train.vocabSize', 'at least 260'],
    ['two lengths', { tokens: 5 }, 'steps', 'give exactly one of steps and tokens'],
    ['two sources', { data: { text: 'a', jsonl: 'b' } }, 'data', 'must name exactly one of text, jsonl, tokens and mixture'],
    ['a split of 3', { data: { text: 'a', validation: 3 } }, 'data.validation', 'is 3; it must be a number below 1'],
    ['a field of the other kind', { teacher: { checkpoint: 'x' } }, 'teacher', 'teacher is not a known field'],
  ])('%s', (_, change, argument, text) => {
    const error = refusal({ ...pretrain, ...change });
    expect(error.code).toBe('ERR_CONFIG');
    expect(error.argument).toBe(argument);
    expect(error.message).toContain(text);
    expect(error.message.startsWith('run: ')).toBe(true);
  });

  test.each([
    ['two lengths', { steps: 5 }, 'epochs', 'give exactly one of epochs, steps and tokens'],
    ['text for conversations', { data: { train: 'a', text: 'a' } }, 'data.text', 'data.text is not a known field'],
    ['an unknown mask', { mask: 'completions' }, 'mask', 'Did you mean "completion"?'],
    ['an unknown format', { data: { train: 'a', format: 'alpacca' } }, 'data.format', 'Did you mean "alpaca"?'],
    ['too heavy a prompt', { promptWeight: 2 }, 'promptWeight', 'is 2; it must be a number of at most 1'],
    ['a preset for a folder', { model: { preset: 'gemma2-mini' } }, 'model', 'it must be a text'],
    ['no noise', { neftune: -1 }, 'neftune', 'is -1; it must be a number of at least 0'],
    ['a split of 3', { data: { train: 'a', validation: 3 } }, 'data.validation', 'it must be a number below 1'],
  ])('finetuning: %s', (_, change, argument, text) => {
    const error = refusal({ ...finetune, ...change });
    expect([error.code, error.argument]).toEqual(['ERR_CONFIG', argument]);
    expect(error.message).toContain(text);
  });

  test('missing fields', () => {
    expect(refusal({ ...pretrain, kind: 'distill' }).message).toContain('run: teacher is missing; it must be an object.');
    expect(refusal({ ...pretrain, kind: undefined }).message).toContain(
      'kind is missing; it must be one of "pretrain", "distill", "finetune".',
    );
    expect(refusal({ ...pretrain, data: undefined }).argument).toBe('data');
  });

  test('several at once are all told', () => {
    const error = refusal({ ...pretrain, lr: 1, foo: 2, batch: { length: 'x' } });
    expect(error.message).toContain('3 fields are wrong\n  - ');
  });

  test('not even an object', () => {
    for (const input of [5, null, [], 'x', undefined]) expect(refusal(input).message).toContain('it must be an object');
  });
});

describe('run files', () => {
  let folder: string;
  beforeAll(async () => {
    folder = await mkdtemp(join(tmpdir(), 'limbeck-config-'));
  });
  afterAll(() => rm(folder, { recursive: true }));

  async function file(name: string, text: string): Promise<string> {
    const path = join(folder, name);
    await mkdir(join(path, '..'), { recursive: true });
    await writeFile(path, text);
    return path;
  }

  test('JSON, with paths relative to the file and a $schema', async () => {
    const run = await loadRun(await file('deep/run.json', JSON.stringify({ $schema: './x.json', ...pretrain, output: '../o' })));
    expect(run.output).toBe(join(folder, 'o'));
    expect(run.data).toHaveProperty('text', join(folder, 'deep/corpus/*.txt'));
  });

  test('TypeScript, importing another TypeScript file', async () => {
    await file('base.ts', `export const base = ${JSON.stringify(pretrain)} as const;\nexport type Unused = { a: 1 };`);
    const path = await file(
      'run.ts',
      "import { base } from './base.ts';\nconst seed: number = 7;\nexport default { ...base, seed };",
    );
    expect((await loadRun(path)).seed).toBe(7);
  });

  test('JavaScript, with a function that returns the run under the name run', async () => {
    const path = await file('run.mjs', `export const run = async () => (${JSON.stringify({ ...pretrain, seed: 9 })});`);
    expect((await loadRun(path)).seed).toBe(9);
  });

  test('overrides reach any depth and turn a preset name into an object', async () => {
    const path = await file('over.json', JSON.stringify(pretrain));
    const run = await loadRun(path, { 'optimizer.learningRate': 2e-3, 'model.width': 64, seed: 3 });
    expect([run.optimizer.learningRate, run.seed, run.model]).toEqual([2e-3, 3, { preset: 'tiny', width: 64 }]);
    await expect(loadRun(path, { 'optimizer.lr': 1 })).rejects.toMatchObject({ argument: 'optimizer.lr' });
    await expect(loadRun(path, { '': 1 })).rejects.toMatchObject({ code: 'ERR_CONFIG' });
  });

  test('what cannot be read', async () => {
    const bad = await file('bad.json', '{\n  "kind": "pretrain"\n  "seed": 1\n}');
    await expect(loadRun(bad)).rejects.toMatchObject({
      code: 'ERR_CONFIG_FILE',
      message: expect.stringContaining('bad.json:3:3'),
    });
    const missing = join(folder, 'nope.ts');
    await expect(loadRun(missing)).rejects.toMatchObject({ message: expect.stringContaining('there is no such run file') });
    const empty = await file('empty.ts', 'export const other = 1;');
    await expect(loadRun(empty)).rejects.toMatchObject({ message: expect.stringContaining('exports no run'), actual: 'other' });
    const broken = await file('broken.ts', "import './missing.ts';\nexport default {};");
    await expect(loadRun(broken)).rejects.toMatchObject({ message: expect.stringContaining('cannot be read') });
    await expect(loadRun(await file('notes.txt', 'hello'))).rejects.toThrow(/notes.txt: is no run file; give a .json, .ts/);
    await expect(loadRun(folder)).rejects.toBeInstanceOf(ConfigError);
  });
});

test('docs/run-files.md lists every field', async () => {
  const table = (rows: readonly { field: string; about: string }[]) =>
    ['| field | |', '|---|---|', ...rows.map(({ field, about }) => `| \`${field}\` | ${about.replaceAll('|', '\\|')} |`)].join(
      '\n',
    );
  const both = runFields('pretrain').filter(({ field }) => field !== 'kind' && !field.startsWith('tokenizer'));
  const names = new Set(both.map(({ field }) => field));
  const only = (kind: RunConfig['kind']) => runFields(kind).filter(({ field }) => !names.has(field));
  for (const kind of ['pretrain', 'distill', 'finetune'] as const)
    for (const { field, about } of runFields(kind)) expect(about, field).not.toBe('');
  // Of a field that other runs have too, what is different here.
  const same = new Set(both.map(({ field, about }) => `${field} ${about}`));
  const onlyHere = runFields('finetune').filter(({ field, about }) => !same.has(`${field} ${about}`));
  const page = `# Run files

A run is a JSON file, or a TypeScript or JavaScript module that exports one as \`default\` or \`run\`:

\`\`\`ts
import { defineRun } from 'limbeck';

export default defineRun({
  kind: 'pretrain',
  output: 'runs/teacher',
  data: { text: 'corpus/*.txt' },
  tokenizer: { train: { vocabSize: 4096 } },
  model: 'gemma2-micro',
  steps: 1000,
});
\`\`\`

Paths are relative to the run file. \`limbeck pretrain run.ts --set optimizer.learningRate=1e-3\` changes a field, \`--dry-run\` prints the
run with every default, and \`--schema\` prints a JSON Schema: name it in \`"$schema"\`, and editors complete and check JSON files.

## Every run

${table(both)}

## \`kind: 'pretrain'\`

${table(only('pretrain'))}

## \`kind: 'distill'\`

${table(only('distill'))}

## \`kind: 'finetune'\`

Conversations instead of text: \`data\` has fields of its own, \`model\` is a folder. [finetuning.md](finetuning.md) explains them.

${table(onlyHere)}
`;
  // After a change of the schema: npx vitest run test/train/config.test.ts -u
  await expect(page).toMatchFileSnapshot('../../docs/run-files.md');
});

test('the JSON Schema describes every field', () => {
  const schema = runJsonSchema() as { oneOf: { properties: Record<string, { description?: string }> }[] };
  expect(schema.oneOf).toHaveLength(3);
  for (const kind of schema.oneOf) {
    for (const [name, field] of Object.entries(kind.properties)) {
      expect(field.description, name).toBeTruthy();
    }
  }
});
