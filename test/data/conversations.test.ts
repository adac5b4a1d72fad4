// Instruction data in its four forms and three kinds of file; rows that cannot be used are named by file, line and field.
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { parquetWriteFile } from 'hyparquet-writer';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { type Conversation, type ConversationOptions, conversations } from '../../src/data/conversations.ts';
import { entryLines } from '../../src/data/records.ts';
import type { Malformed } from '../../src/data/source.ts';
import { LimbeckError } from '../../src/tensor/errors.ts';

let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'limbeck-conversations-'));
});
afterAll(() => rm(folder, { recursive: true }));

async function read(path: string, options: ConversationOptions = {}): Promise<{ rows: Conversation[]; malformed: Malformed[] }> {
  const malformed: Malformed[] = [];
  const rows: Conversation[] = [];
  for await (const row of conversations(path, options, (record) => malformed.push(record))) rows.push(row);
  return { rows, malformed };
}

async function readRows(rows: readonly unknown[], options: ConversationOptions = {}) {
  const path = join(folder, 'rows.jsonl');
  await writeFile(path, rows.map((row) => (typeof row === 'string' ? row : JSON.stringify(row))).join('\n'));
  return read(path, options);
}

const user = (content: string) => ({ role: 'user', content });
const assistant = (content: string) => ({ role: 'assistant', content });

describe('formats', () => {
  test.each([
    ['alpaca', { instruction: 'Name it.', input: '', output: 'Oslo' }, [user('Name it.'), assistant('Oslo')]],
    [
      'alpaca with input',
      { instruction: 'Sort.', input: '2 1', output: '1 2' },
      [{ ...user('Sort.\n\n2 1'), instruction: 'Sort.', input: '2 1' }, assistant('1 2')],
    ],
    [
      'alpaca with a system text and another name for the answer',
      { system: 'Be brief.', instruction: 'Name it.', input: null, response: 'Oslo' },
      [{ role: 'system', content: 'Be brief.' }, user('Name it.'), assistant('Oslo')],
    ],
    ['prompt', { prompt: 'Oslo is in', completion: ' Norway' }, [user('Oslo is in'), assistant(' Norway')]],
    [
      'sharegpt',
      {
        conversations: [
          { from: 'system', value: 'Be brief.' },
          { from: 'human', value: 'Hi' },
          { from: 'gpt', value: 'Hello' },
          { from: 'human', value: 'never answered' },
        ],
      },
      [{ role: 'system', content: 'Be brief.' }, user('Hi'), assistant('Hello')],
    ],
    [
      'messages under the name of sharegpt',
      { conversations: [user('Hi'), assistant('Hello')] },
      [user('Hi'), assistant('Hello')],
    ],
    ['messages as JSON', { messages: JSON.stringify([user('Hi'), assistant('Hello')]) }, [user('Hi'), assistant('Hello')]],
    [
      'messages that call a tool',
      {
        messages: [
          user('Time?'),
          { role: 'assistant', content: null, tool_calls: [{ name: 'now' }] },
          { role: 'tool', content: '9' },
          assistant('Nine'),
        ],
      },
      [
        user('Time?'),
        { role: 'assistant', content: '', tool_calls: [{ name: 'now' }] },
        { role: 'tool', content: '9' },
        assistant('Nine'),
      ],
    ],
  ])('%s', async (_, row, messages) => {
    const { rows, malformed } = await readRows([row]);
    expect(malformed).toEqual([]);
    expect(rows).toEqual([{ messages, file: join(folder, 'rows.jsonl'), line: 1 }]);
  });

  test('a named format reads nothing else', async () => {
    const row = { messages: [user('Hi'), assistant('Hello')], prompt: 'a', completion: 'b' };
    expect((await readRows([row], { format: 'prompt' })).rows[0]!.messages).toEqual([user('a'), assistant('b')]);
    const { malformed } = await readRows([row], { format: 'alpaca' });
    expect(malformed).toMatchObject([{ line: 1, field: 'instruction', reason: 'field "instruction" is missing' }]);
  });
});

describe('files', () => {
  const rows = [
    { instruction: 'a "quoted, [text]" \\', input: '', output: 'one' },
    { instruction: 'ü😀\n', input: 'x', output: 'two' },
    { instruction: 'c', input: '', output: 'three' },
  ];

  test('JSON, JSON Lines and Parquet give the same, whatever their name', async () => {
    const lines = (await readRows(rows)).rows.map(({ messages }) => messages);
    expect(lines).toHaveLength(3);
    await writeFile(join(folder, 'rows.json'), `\ufeff ${JSON.stringify(rows, null, 2)}\n`);
    await writeFile(join(folder, 'list.txt'), JSON.stringify(rows));
    parquetWriteFile({
      filename: join(folder, 'rows.parquet'),
      columnData: (['instruction', 'input', 'output'] as const).map((name) => ({ name, data: rows.map((r) => r[name]) })),
    });
    for (const file of ['rows.json', 'list.txt', 'rows.parquet']) {
      const { rows: found, malformed } = await read(join(folder, file));
      expect(malformed).toEqual([]);
      expect(found.map(({ messages }) => messages)).toEqual(lines);
    }
    expect((await read(join(folder, 'rows.json'))).rows.map(({ line }) => line)).toEqual([2, 7, 12]);
    expect((await read(join(folder, 'rows.parquet'))).rows.map(({ line }) => line)).toEqual([1, 2, 3]);
  });

  test('Parquet keeps lists of messages', async () => {
    const messages = [
      [user('Hi'), assistant('Hello')],
      [user('Why?'), assistant('So.')],
    ];
    parquetWriteFile({
      filename: join(folder, 'nested.parquet'),
      schema: [
        { name: 'root', num_children: 1 },
        { name: 'messages', repetition_type: 'OPTIONAL', num_children: 1, converted_type: 'LIST' },
        { name: 'list', repetition_type: 'REPEATED', num_children: 1 },
        { name: 'element', repetition_type: 'OPTIONAL', num_children: 2 },
        { name: 'role', type: 'BYTE_ARRAY', repetition_type: 'OPTIONAL', converted_type: 'UTF8' },
        { name: 'content', type: 'BYTE_ARRAY', repetition_type: 'OPTIONAL', converted_type: 'UTF8' },
      ],
      columnData: [{ name: 'messages', data: messages }],
    });
    const { rows: found, malformed } = await read(join(folder, 'nested.parquet'));
    expect(malformed).toEqual([]);
    expect(found.map((row) => row.messages)).toEqual(messages);
  });

  test('damaged files are refused by name', async () => {
    await writeFile(join(folder, 'bad.json'), '[{"instruction": "a"');
    await expect(read(join(folder, 'bad.json'))).rejects.toMatchObject({ name: 'FormatError', code: 'ERR_JSON' });
    await writeFile(join(folder, 'bad.parquet'), 'PAR1 and nothing else PAR1');
    await expect(read(join(folder, 'bad.parquet'))).rejects.toMatchObject({ name: 'FormatError', code: 'ERR_PARQUET' });
    await writeFile(join(folder, 'latin.json'), Buffer.from([0x5b, 0x22, 0xe9, 0x22, 0x5d]));
    await expect(read(join(folder, 'latin.json'))).rejects.toMatchObject({
      code: 'ERR_UTF8',
      message: expect.not.stringContaining('onInvalid'),
    });
    await expect(read(join(folder, 'absent.json'))).rejects.toMatchObject({ name: 'FileError', code: 'ERR_READ' });
  });

  test('a Parquet file whose schema says that a list has less than no children is refused, and read in no circles', async () => {
    const bytes = await readFile(join(folder, 'nested.parquet'));
    // The name of the group below a list, then the field of its children, 1 as Thrift writes it; -1 in its place.
    const at = bytes.indexOf(Buffer.from('list\x15\x02', 'latin1'));
    expect(at).toBeGreaterThan(0);
    bytes[at + 5] = 1;
    const path = join(folder, 'circle.parquet');
    await writeFile(path, bytes);
    await expect(read(path)).rejects.toMatchObject({ name: 'FormatError', code: 'ERR_PARQUET' });
  });

  test('a Parquet file with flipped bytes gives rows or a FormatError', async () => {
    const path = join(folder, 'flipped.parquet');
    const good = await readFile(join(folder, 'rows.parquet'));
    await fc.assert(
      fc.asyncProperty(
        fc.array(fc.tuple(fc.nat(good.length - 1), fc.nat(255)), { minLength: 1, maxLength: 3 }),
        async (flips) => {
          const bad = Buffer.from(good);
          for (const [at, byte] of flips) bad[at] = byte;
          await writeFile(path, bad);
          await read(path).catch((error: unknown) => {
            if (!LimbeckError.is(error)) throw error;
          });
        },
      ),
      { numRuns: 200 },
    );
  });

  test('lines of list entries are counted as the text has them', () => {
    fc.assert(
      fc.property(
        fc.array(fc.record({ a: fc.string(), b: fc.array(fc.string()) }), { maxLength: 5 }),
        fc.constantFrom(0, 1, 2),
        (list, indent) => {
          const text = JSON.stringify(list, null, indent);
          const expected = list.map((_, i) => {
            const before = JSON.stringify(list.slice(0, i), null, indent);
            return i === 0 ? (indent ? 2 : 1) : before.split('\n').length;
          });
          expect(entryLines(text)).toEqual(expected);
        },
      ),
    );
    expect(entryLines('[]')).toEqual([]);
    expect(entryLines('[1,\n\n"a,\\"]["\n,[2,3]]')).toEqual([1, 3, 4]);
  });
});

test('any row is a conversation or a malformed row', async () => {
  const names = ['messages', 'conversations', 'instruction', 'input', 'output', 'prompt', 'completion', 'tools', 'system'];
  const leaf = fc.constantFrom<unknown>(null, 3, true, '', ' ', 'x', '[', '[{}]', [], {}, [[]]);
  const role = fc.oneof({ weight: 8, arbitrary: fc.constantFrom<unknown>('user', 'assistant', 'human', 'gpt', 'system') }, leaf);
  const said = fc.oneof({ weight: 8, arbitrary: fc.string() as fc.Arbitrary<unknown> }, leaf);
  const turn = fc.oneof(
    fc.record({ role, content: said, tool_calls: leaf }, { requiredKeys: ['content'] }),
    fc.record({ from: role, value: said }, { requiredKeys: [] }),
    leaf,
  );
  const row = fc.dictionary(fc.constantFrom(...names), fc.oneof(said, fc.array(turn, { maxLength: 4 }), leaf), { maxKeys: 4 });
  const rows = fc.sample(row, { numRuns: 2000, seed: 1 });
  const { rows: found, malformed } = await readRows(rows);
  expect(found.length + malformed.length).toBe(2000);
  expect(found.length).toBeGreaterThan(10);
  for (const { messages } of found) {
    expect(messages.at(-1)!.role).toBe('assistant');
    expect(messages.find((m) => m.role !== 'system')!.role).toBe('user');
    expect(messages.every((m) => typeof m.content === 'string')).toBe(true);
  }
  for (const { line, reason } of malformed) expect([line >= 1, reason !== '']).toEqual([true, true]);
});

describe('rows that cannot be used', () => {
  const good = { instruction: 'a', input: '', output: 'b' };
  test.each([
    ['not JSON', '{"instruction": ', undefined, 'not JSON'],
    ['not an object', '[1]', undefined, 'not an object'],
    ['no known field', { question: 'a' }, '', 'none of the fields'],
    ['a missing field', { instruction: 'a', input: '' }, 'output', 'field "output" is missing'],
    ['a field of another kind', { instruction: 'a', output: 3 }, 'output', 'not a text'],
    ['an empty instruction', { instruction: ' ', output: 'b' }, 'instruction', 'is empty'],
    ['an empty completion', { prompt: 'a', completion: ' \n' }, 'completion', 'an empty answer'],
    ['an empty answer inside', { messages: [user('a'), assistant('')] }, 'messages[1].content', 'an empty answer'],
    ['no messages', { messages: [] }, 'messages', 'not a list of messages'],
    ['messages that are none', { messages: ['hi'] }, 'messages[0]', 'not an object'],
    ['a message without role', { messages: [{ content: 'a' }, assistant('b')] }, 'messages[0].role', 'is missing'],
    ['the wrong role first', { messages: [assistant('b'), user('a'), assistant('b')] }, 'messages[0]', 'begins with the user'],
    [
      'the wrong role after the system',
      {
        conversations: [
          { from: 'system', value: 's' },
          { from: 'gpt', value: 'b' },
        ],
      },
      'conversations[1]',
      'begins with the user',
    ],
    ['an unknown speaker', { conversations: [{ from: 'alien', value: 's' }] }, 'conversations[0].from', 'known are'],
    ['no answer', { messages: [user('a')] }, 'messages', 'has no answer'],
  ])('%s', async (_, row, field, reason) => {
    const { rows, malformed } = await readRows([good, '', row, good]);
    expect(rows.map(({ line }) => line)).toEqual([1, 4]);
    expect(malformed).toEqual([
      {
        file: join(folder, 'rows.jsonl'),
        line: 3,
        reason: expect.stringContaining(reason),
        ...(field === undefined ? {} : { field }),
      },
    ]);
    await expect(readRows([good, '', row], { strict: true })).rejects.toMatchObject({
      name: 'DataError',
      code: 'ERR_MALFORMED',
      argument: `${join(folder, 'rows.jsonl')}:3${field === undefined ? '' : `:${field}`}`,
    });
  });
});
