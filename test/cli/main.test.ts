import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { parseOverrides, UsageError } from '../../src/cli/command.ts';
import { MetricsWriter } from '../../src/train/metrics.ts';
import { syntheticEvents, trio } from '../train/synthetic.ts';
import { limbeck, limbeckHere, root } from './process.ts';

let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'limbeck-cli-'));
});
afterAll(() => rm(folder, { recursive: true, force: true }));

const run = {
  kind: 'pretrain',
  output: 'out',
  tokenizer: 'tokenizer.json',
  data: { text: 'corpus.txt' },
  model: 'gemma2-nano',
  steps: 5,
};

describe('help teaches', () => {
  test('the commands', async () => {
    const { code, out } = await limbeckHere(['--help']);
    expect(code).toBe(0);
    for (const name of ['pretrain', 'distill', 'evaluate', 'generate', 'export', 'report', 'doctor', 'bench'])
      expect(out).toContain(`  ${name} `);
    expect(out).toContain('Examples\n  # can this machine train?\n  limbeck doctor');
  });

  test('a command, its options and examples', async () => {
    const { code, out } = await limbeckHere(['pretrain', '--help']);
    expect(code).toBe(0);
    expect(out).toContain('Usage  limbeck pretrain [run] [options]');
    expect(out).toContain('--set <field=value>');
    expect(out).toContain('limbeck pretrain teacher.ts --set optimizer.learningRate=1e-3');
  });

  test('a stage of synth, and its fields without a run', async () => {
    const outer = await limbeckHere(['synth', '--help']);
    expect([outer.code, outer.out]).toEqual([0, expect.stringContaining('Usage  limbeck synth <command> [options]')]);
    const inner = await limbeckHere(['synth', 'magpie', '--help']);
    expect(inner.out).toContain('Usage  limbeck synth magpie [run] [options]');
    const schema = await limbeckHere(['synth', 'magpie', '--schema']);
    expect([schema.code, JSON.parse(schema.out)]).toEqual([0, expect.objectContaining({ type: 'object' })]);
  });

  test('the version', async () => {
    const { version } = JSON.parse(await readFile(join(root, 'package.json'), 'utf8'));
    expect(await limbeck(['--version'])).toEqual({ code: 0, out: `${version}\n`, err: '' });
  });
});

describe('a wrong command line exits with 2 and says why', () => {
  test.each([
    [['pretran'], 'unknown command "pretran"; did you mean pretrain?'],
    [['pretrain'], 'which run?'],
    [['pretrain', 'a.json', 'b.json'], 'unexpected argument "b.json"'],
    [['pretrain', 'a.json', '--dryrun'], 'unknown option --dryrun; did you mean --dry-run?'],
    [['pretrain', 'a.json', '--set'], 'option --set needs a value'],
    [['pretrain', 'a.json', '--set', 'seed'], '--set seed: write field=value'],
    [['generate'], 'CHECKPOINT'],
    [['generate', 'x', '--prompt', 'a', '--tokens', 'many'], '--tokens is "many"; it must be a whole number of at least 1'],
    [['export', 'x'], 'Give --to: '],
    [['export', 'x', '--to', 'pickle'], '--to is "pickle"; there are '],
    [['export', 'x', '--to', 'safetensors', '--type', 'q1'], '--type is "q1"; safetensors has f32, bf16'],
    [['generate', 'x', '--prompt', 'a', '--top-p', '3'], '--top-p is "3"; it must be a number from 0 to 1'],
    [['serve', 'x', '--port', '99999'], '--port is "99999"; it must be a whole number from 0 to 65535'],
    [['synth', 'magpie'], 'which run?'],
    [['evaluate', 'x'], 'Give one of --text, --jsonl and --tokens'],
  ])('%j', async (args, text) => {
    const { code, out, err } = await limbeckHere(args);
    expect([code, out]).toEqual([2, '']);
    expect(err).toContain('error ERR_USAGE: ');
    expect(err).toContain(text);
    expect(err).not.toContain('    at ');
  });
});

describe('run files', () => {
  test('a wrong field: code, field and what to do, no stack; as JSON where asked', async () => {
    const path = join(folder, 'wrong.json');
    await writeFile(path, JSON.stringify({ ...run, optimizer: { lr: 1 } }));
    const { code, out, err } = await limbeck(['pretrain', path, '--json']);
    expect(code).toBe(1);
    expect(err).toBe(`error ERR_CONFIG: ${path}: optimizer.lr is not a known field; did you mean optimizer.learningRate?\n`);
    expect(JSON.parse(out)).toMatchObject({ type: 'error', code: 'ERR_CONFIG', argument: 'optimizer.lr' });
    expect((await limbeckHere(['pretrain', path, '--debug'])).err).toContain('    at ');
  });

  test('a run of the other kind names the right command', async () => {
    const path = join(folder, 'other.json');
    await writeFile(path, JSON.stringify(run));
    const { code, err } = await limbeckHere(['distill', path]);
    expect(code).toBe(1);
    expect(err).toContain(`use \`limbeck pretrain ${path}\``);
  });

  test('--dry-run shows all defaults, and what --set changed', async () => {
    const path = join(folder, 'run.ts');
    await writeFile(path, `import { base } from './base.ts';\nexport default { ...base, seed: 1 };\n`);
    await writeFile(join(folder, 'base.ts'), `export const base = ${JSON.stringify(run)} as const;\n`);
    const { code, out } = await limbeckHere([
      'pretrain',
      path,
      '--dry-run',
      '--set',
      'optimizer.learningRate=2e-3',
      '--set',
      'name=second',
    ]);
    expect(code).toBe(0);
    expect(JSON.parse(out)).toMatchObject({
      seed: 1,
      name: 'second',
      optimizer: { learningRate: 2e-3, beta2: 0.95 },
      output: join(folder, 'out'),
    });
  });

  test('--schema prints a JSON Schema', async () => {
    const { code, out } = await limbeckHere(['distill', '--schema']);
    expect([code, JSON.parse(out).oneOf.length]).toEqual([0, 3]);
  });
});

test('overrides are JSON where they parse as such', () => {
  expect(parseOverrides(['a.b=1e-3', 'c=text', 'd=[1,2]', 'e=null', 'f=a=b', 'g='])).toEqual({
    'a.b': 1e-3,
    c: 'text',
    d: [1, 2],
    e: null,
    f: 'a=b',
    g: '',
  });
  expect(() => parseOverrides(['=1'])).toThrow(UsageError);
});

test('report overlays runs', async () => {
  for (const each of trio) {
    const metrics = await MetricsWriter.open(join(folder, each.name));
    for (const event of syntheticEvents({ ...each, steps: 20 })) await metrics.write(event);
    await metrics.close();
  }
  const path = join(folder, 'all.html');
  const result = await limbeckHere(['report', ...trio.map((each) => join(folder, each.name)), '--out', path, '--title', 'All']);
  expect(result).toEqual({ code: 0, out: `${path}\n`, err: '' });
  expect(await readFile(path, 'utf8')).toContain('<title>All</title>');
  expect((await limbeckHere(['report', join(folder, 'nothing')])).err).toContain('holds no run');
});

test('doctor tells the machine, and what is missing and why', async () => {
  const { code, out } = await limbeckHere(['doctor', '--json']);
  const { ok, sections } = JSON.parse(out);
  expect(code).toBe(ok ? 0 : 1);
  expect(Object.keys(sections)).toEqual(['Machine', 'Software', 'Backends', 'To build from source']);
  const backends = Object.fromEntries(sections.Backends.map((finding: { name: string }) => [finding.name, finding]));
  if (ok)
    expect(backends).toMatchObject({
      cpu: { state: 'ok' },
      threads: { state: 'ok' },
      cuda: { state: 'absent', value: expect.any(String) },
    });
  else expect(backends['native core']).toMatchObject({ state: 'missing', value: expect.stringContaining('npm') });
  expect(sections.Software.find((finding: { name: string }) => finding.name === 'zod').value).toMatch(/^\d+\./);
});
