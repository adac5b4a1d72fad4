import { type ChildProcess, spawn } from 'node:child_process';
import { appendFile, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import fc from 'fast-check';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { lockFolder } from '../../src/io/lock.ts';
import { openJournal } from '../../src/synth/journal.ts';
import {
  digest,
  jsonlRecords,
  numbers,
  type Pipeline,
  type PipelineEvent,
  pipeline,
  type RecordStage,
  readManifest,
  readRecords,
  runPipeline,
} from '../../src/synth/pipeline.ts';

let folder: string;
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'limbeck-synth-'));
});
afterEach(() => rm(folder, { recursive: true, force: true }));

async function all(chain: Pipeline<unknown>, options: { seed?: number; signal?: AbortSignal } = {}): Promise<PipelineEvent[]> {
  const events: PipelineEvent[] = [];
  for await (const event of runPipeline(chain, { output: folder, ...options })) events.push(event);
  return events;
}
const states = (events: readonly PipelineEvent[]) =>
  events.flatMap((event) => (event.type === 'stage' ? [`${event.stage} ${event.state} ${event.done}`] : []));
async function list<T>(records: AsyncIterable<T>): Promise<T[]> {
  const out: T[] = [];
  for await (const record of records) out.push(record);
  return out;
}
const text = (name: string) => readFile(join(folder, name), 'utf8');

type Numbered = { n: number; seed: number };
const numbered = (changes: Partial<RecordStage<number, Numbered>> = {}): RecordStage<number, Numbered> => ({
  kind: 'record',
  name: 'number',
  settings: {},
  run: (n, { seed }) => ({ value: { n, seed: seed() } }),
  ...changes,
});

describe('stages', () => {
  test('the same bytes whatever the concurrency and the order of results', async () => {
    const jittered = (concurrency: number) =>
      pipeline(numbers(40)).through(
        numbered({
          concurrency,
          async run(n, { seed }) {
            await sleep((n * 7919) % 11);
            return n % 9 === 4 ? { dropped: 'nine', detail: `${n}` } : { value: { n, seed: seed() } };
          },
        }),
      );
    await all(jittered(1), { seed: 3 });
    const one = [await text('01-number.jsonl'), await text('01-number.dropped.jsonl')];
    await rm(folder, { recursive: true });
    await all(jittered(16), { seed: 3 });
    expect([await text('01-number.jsonl'), await text('01-number.dropped.jsonl')]).toEqual(one);
    expect(one[0]!.trim().split('\n')).toHaveLength(36);
    expect(JSON.parse(one[1]!.split('\n')[0]!)).toEqual({ reason: 'nine', detail: '4', record: 4 });
    expect((await readManifest(folder))[0]).toMatchObject({ input: 40, records: 36, dropped: { nine: 4 } });
  });

  test('seeds differ between records, stages, draws and runs', async () => {
    const seen = new Set<number>();
    const stage = (name: string): RecordStage<unknown, null> => ({
      kind: 'record',
      name,
      settings: {},
      run(_, { seed }) {
        for (const draw of [0, 1, 2]) seen.add(seed(draw));
        return { value: null };
      },
    });
    for (const seed of [1, 2]) await all(pipeline(numbers(50)).through(stage('a')).through(stage('b')), { seed });
    expect(seen.size).toBe(50 * 2 * 3 * 2);
    for (const seed of seen) expect(Number.isInteger(seed) && seed >= 0 && seed < 2 ** 31).toBe(true);
  });

  test('an unchanged stage is not run again; a changed one is, and all behind it', async () => {
    let runs = 0;
    const chain = (settings: unknown, later: unknown = {}) =>
      pipeline(numbers(5))
        .through(numbered({ settings }))
        .through({
          kind: 'record',
          name: 'later',
          settings: later,
          run(record: Numbered) {
            runs++;
            return { value: record };
          },
        });
    await all(chain({ a: 1, b: 2 }));
    expect(runs).toBe(5);
    expect(states(await all(chain({ b: 2, a: 1 })))).toEqual(['number unchanged 5', 'later unchanged 5']);
    expect(runs).toBe(5);
    expect(states(await all(chain({ a: 1, b: 2 }, 'other')))).toEqual(['number unchanged 5', 'later started 0']);
    expect(states(await all(chain({ a: 2 }, 'other')))).toEqual(['number started 0', 'later started 0']);
    expect(states(await all(chain({ a: 2 }, 'other'), { seed: 1 }))).toEqual(['number started 0', 'later started 0']);
    // A file that somebody has changed is not what the manifest tells of.
    await appendFile(join(folder, '01-number.jsonl'), '{}\n');
    expect(states(await all(chain({ a: 2 }, 'other'), { seed: 1 }))).toEqual(['number started 0', 'later unchanged 5']);
  });

  test('files of stages that are gone go too', async () => {
    await all(
      pipeline(numbers(2))
        .through(numbered())
        .through(numbered({ name: 'second' }) as never),
    );
    await all(pipeline(numbers(2)).through(numbered()));
    expect(await readdir(folder)).toEqual(['01-number.jsonl', 'manifest.json']);
  });

  test('a stage that fails keeps what is finished', async () => {
    let broken = true;
    const ran: number[] = [];
    const chain = pipeline(numbers(10)).through(
      numbered({
        run(n, { seed }) {
          if (n === 6 && broken) throw new Error('down');
          ran.push(n);
          return { value: { n, seed: seed() } };
        },
      }),
    );
    await expect(all(chain)).rejects.toThrow('down');
    broken = false;
    expect(states(await all(chain))).toEqual(['number resumed 6']);
    expect(ran).toEqual([0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
  });

  test('abort, and leaving the loop, stop calls under way and lose nothing', async () => {
    const controller = new AbortController();
    const chain = (stop: (n: number) => void) =>
      pipeline(numbers(8)).through(
        numbered({
          concurrency: 2,
          async run(n, { signal, seed }) {
            stop(n);
            await sleep(n === 5 ? 60_000 : n > 5 ? 150 : 1, undefined, { signal });
            return { value: { n, seed: seed() } };
          },
        }),
      );
    await expect(
      all(
        chain((n) => n === 5 && controller.abort(new Error('enough'))),
        { signal: controller.signal },
      ),
    ).rejects.toThrow();
    const began = performance.now();
    for await (const event of runPipeline(
      chain(() => {}),
      { output: folder },
    )) {
      if (event.type === 'stage') expect(event).toMatchObject({ state: 'resumed', done: expect.any(Number) });
      if (event.type === 'progress') break;
    }
    expect(performance.now() - began).toBeLessThan(10_000);
    await (await lockFolder(folder)).release();
  });

  test('a name that is there twice, or is no name', async () => {
    for (const name of ['number', 'No Name']) {
      await expect(
        all(
          pipeline(numbers(1))
            .through(numbered())
            .through(numbered({ name }) as never),
        ),
      ).rejects.toMatchObject({
        code: 'ERR_CONFIG',
      });
    }
  });
});

describe('records', () => {
  test('lone surrogates, nulls and line separators go through a file', async () => {
    const odd = { text: 'a\ud800b\udc00 \u2028 \u0000 \ufeff', deep: { list: [null, 1e-300] } };
    await all(pipeline(numbers(1)).through(numbered({ run: () => ({ value: odd as never }) })));
    for await (const record of readRecords(join(folder, '01-number.jsonl'))) expect(record).toEqual(odd);
  });

  test('a JSON Lines file: by content, with or without a last line break; a bad line is named', async () => {
    const path = join(folder, 'in.jsonl');
    await writeFile(path, '{"a":1}\n\n{"a":2}');
    const source = await jsonlRecords<{ a: number }>(path);
    expect(await list(source.records())).toEqual([{ a: 1 }, { a: 2 }]);
    await writeFile(join(folder, 'same.jsonl'), '{"a":1}\n\n{"a":2}');
    expect((await jsonlRecords(join(folder, 'same.jsonl'))).settings).toEqual(source.settings);
    await writeFile(path, '{"a":1}\n{"a":\n');
    await expect(list((await jsonlRecords(path)).records())).rejects.toMatchObject({
      code: 'ERR_MALFORMED',
      argument: `${path}:2`,
    });
    await expect(jsonlRecords(join(folder, 'none'))).rejects.toMatchObject({ code: 'ERR_READ' });
  });

  test('digests do not see the order of keys, and see all else', () => {
    fc.assert(
      fc.property(fc.dictionary(fc.string(), fc.jsonValue()), (value) => {
        const turned = Object.fromEntries(Object.entries(value).reverse());
        expect(digest(turned)).toBe(digest(value));
        expect(digest({ ...value, '\u0001new': 1 })).not.toBe(digest(value));
      }),
    );
  });
});

describe('journal', () => {
  test('cut at any byte, it holds the whole lines before, and goes on', async () => {
    const path = join(folder, 'j');
    const lines = ['{"a":"é"}', '{"b":[1,2]}', '{}', `{"long":"${'x'.repeat(300)}"}`];
    const first = await openJournal(path, 'header');
    for (const [i, line] of lines.entries()) await first.append(3 - i, line);
    await first.close();
    const whole = await readFile(path);
    for (let cut = 0; cut <= whole.length; cut++) {
      await writeFile(path, whole.subarray(0, cut));
      const journal = await openJournal(path, 'header');
      const before = whole.subarray(0, cut).toString('latin1').split('\n').length - 2;
      expect(journal.size).toBe(Math.max(0, before));
      for (const [i, line] of lines.entries()) if (!journal.has(3 - i)) await journal.append(3 - i, line);
      expect(await list(journal.inOrder(10))).toEqual([3, 2, 1, 0].map((i) => ({ index: 3 - i, line: lines[i] })));
      await journal.close();
      expect((await readFile(path)).equals(whole)).toBe(true);
    }
  });

  test('of another stage it is thrown away; zeros after a loss of power are cut off', async () => {
    const path = join(folder, 'j');
    const journal = await openJournal(path, 'one');
    await journal.append(0, '{}');
    await journal.close();
    await appendFile(path, Buffer.concat([Buffer.alloc(50), Buffer.from('\n1\t{}\n')]));
    const again = await openJournal(path, 'one');
    expect([again.size, again.has(0), again.has(1)]).toEqual([1, true, false]);
    await again.close();
    const other = await openJournal(path, 'two');
    expect(other.size).toBe(0);
    await other.close();
    expect(await readFile(path, 'utf8')).toBe('two\n');
  });

  test('a random mass of results, in order and complete', async () => {
    await fc.assert(
      fc.asyncProperty(fc.uniqueArray(fc.nat(5000), { maxLength: 60 }), async (indexes) => {
        const path = join(folder, 'mass');
        const journal = await openJournal(path, 'h');
        await Promise.all(indexes.map((index) => journal.append(index, JSON.stringify({ index }))));
        const lines = await list(journal.inOrder(5001));
        expect(lines.map((l) => l.index)).toEqual(indexes.toSorted((a, b) => a - b));
        for (const { index, line } of lines) expect(JSON.parse(line)).toEqual({ index });
        await journal.close();
        await rm(path);
      }),
      { numRuns: 20 },
    );
  });
});

describe('one writer', () => {
  test('the second is refused, and may come when the first is done', async () => {
    const lock = await lockFolder(folder);
    await expect(lockFolder(folder)).rejects.toMatchObject({
      code: 'ERR_LOCKED',
      message: expect.stringContaining(`${process.pid}`),
    });
    await lock.release();
    await (await lockFolder(folder)).release();
    expect(await readdir(folder)).toEqual([]);
  });

  test('the lock of a process that is gone, or whose number was given away, is no lock', async () => {
    const host = (await import('node:os')).hostname();
    await writeFile(join(folder, `.lock-999999999-1-00000000-${host}`), '');
    await writeFile(join(folder, `.lock-${process.pid}-1-00000001-${host}`), '');
    await (await lockFolder(folder)).release();
    await writeFile(join(folder, '.lock-1-1-00000000-another-host'), '');
    await expect(lockFolder(folder)).rejects.toThrow('another-host');
  });
});

test.runIf(process.platform === 'linux')(
  'a disk that fills: what is finished stays, and the run goes on when there is room',
  async () => {
    // A limit on the size of files is a full disk that needs no disk.
    const limited = `trap '' XFSZ; ulimit -f 16; exec "$0" "$@"`;
    const args = [
      '-c',
      limited,
      process.execPath,
      '--import',
      'jiti/register',
      join(import.meta.dirname, 'worker.ts'),
      folder,
      '300',
    ];
    const log = await new Promise<string>((resolve) => {
      // The limit is for our files, not for compiled sources that jiti would keep.
      const env = { ...process.env, JITI_FS_CACHE: 'false' };
      const child = spawn('bash', args, { cwd: join(import.meta.dirname, '../..'), env, stdio: ['ignore', 'ignore', 'pipe'] });
      let out = '';
      child.stderr.setEncoding('utf8').on('data', (t: string) => {
        out += t;
      });
      child.on('close', () => resolve(out));
    });
    expect(log).toContain('ERR_WRITE');
    const kept = (await text('01-write.jsonl.journal')).split('\n');
    expect(kept.at(-1)).toBe(''); // no torn line
    const resumed = await worker(300).done;
    expect(resumed).toMatch(new RegExp(`^write resumed ${kept.length - 2}\n`));
    expect((await readManifest(folder))[0]).toMatchObject({ input: 300 });
  },
);

function worker(records: number, kind = 'plain'): { child: ChildProcess; done: Promise<string> } {
  const args = ['--import', 'jiti/register', join(import.meta.dirname, 'worker.ts'), folder, String(records), kind];
  const child = spawn(process.execPath, args, { cwd: join(import.meta.dirname, '../..'), stdio: ['ignore', 'pipe', 'pipe'] });
  let out = '';
  child.stdout.setEncoding('utf8').on('data', (t: string) => {
    out += t;
  });
  child.stderr.setEncoding('utf8').on('data', (t: string) => {
    out += t;
  });
  return { child, done: new Promise((resolve) => child.on('close', () => resolve(out))) };
}

test.each([
  ['plain', 300, ['01-write.dropped.jsonl', '01-write.jsonl', '02-count.jsonl', '03-long.dropped.jsonl', '03-long.jsonl']],
  [
    'instruct',
    80,
    ['passages', 'chains', 'round-1', 'round-2', 'round-3', 'render', 'documents'].map((name, i) => `0${i + 1}-${name}.jsonl`),
  ],
] as const)(
  'killed again and again, the files are those of an undisturbed run: %s',
  async (kind, records, stages) => {
    const files = [...stages, 'manifest.json'];
    expect(await worker(records, kind).done).toContain(`${stages.at(-1)!.slice(3, -6)} started`);
    expect((await readdir(folder)).toSorted()).toEqual(files);
    const expected = await Promise.all(files.map(text));
    await rm(folder, { recursive: true });
    let killed = 0;
    for (let round = 0; round < 4; round++) {
      const { child, done } = worker(records, kind);
      // Wait for the work to begin, then a moment of its own.
      await new Promise<void>((resolve) => {
        child.stdout!.once('data', () => setTimeout(resolve, 20 + 67 * round));
        child.once('close', () => resolve());
      });
      if (child.kill('SIGKILL')) killed++;
      await done;
    }
    expect(killed).toBeGreaterThan(0);
    expect(await worker(records, kind).done).toContain('unchanged');
    expect(await Promise.all(files.map(text))).toEqual(expected);
    expect((await readdir(folder)).toSorted()).toEqual(files);
  },
  60_000,
);
