// Chat templates against Transformers' own renderer, masks against what was written, and templates that refuse.
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { chatTemplate, encodeChat, encodePieces, loadChatTemplate, type Message } from '../../src/tokenizer/chat.ts';
import { type ChatStyle, chatStyles } from '../../src/tokenizer/styles.ts';
import { type Tokenizer, tokenizerFromJson } from '../../src/tokenizer/tokenizer.ts';
import { trainTokenizer } from '../../src/tokenizer/train.ts';
import golden from '../golden/chat.json' with { type: 'json' };
import { sentencePiece } from './corpus.ts';

/** A vocabulary whose tokens are `<s>` and `</s>`, as in the golden file. */
const vocabulary = { bos: 0, eos: 1, pad: undefined, unk: undefined, token: (id: number) => ['<s>', '</s>'][id] };
const templates: Readonly<Record<string, string>> = golden.templates;
const conversations: Readonly<Record<string, readonly Message[]>> = golden.conversations;

describe('rendering', () => {
  test('the built-in styles are those of the golden file', () => {
    expect(Object.fromEntries(Object.keys(chatStyles).map((name) => [name, templates[name]]))).toEqual(chatStyles);
  });

  test.each(Object.keys(templates))('%s is rendered and masked as by Transformers', (name) => {
    const template = chatTemplate(templates[name]!, vocabulary);
    const cases = golden.cases.filter((c) => c.template === name);
    expect(cases.length).toBeGreaterThan(5);
    for (const { conversation, prompt, tools, text, spans } of cases) {
      const messages = conversations[conversation]!;
      const options = { addGenerationPrompt: prompt, ...(tools ? { tools: golden.tools } : {}) };
      expect(template.render(messages, options), conversation).toBe(text);
      if (!name.includes('tools')) {
        const marked = template.renderSpans(messages, options);
        expect(marked.text).toBe(text);
        // Transformers counts code points, and keeps spans without text.
        const points = (at: number) => Array.from(text.slice(0, at)).length;
        expect(marked.spans.map(([from, to]) => [points(from), points(to)])).toEqual(spans.filter(([from, to]) => to! > from!));
      }
    }
  });

  test('the form of chapter 7, with and without input', () => {
    const alpaca = chatTemplate('alpaca', vocabulary);
    const task = 'Below is an instruction that describes a task. Write a response that appropriately completes the request.';
    const rows = conversations.input!;
    const asked = `<s>${task}\n\n### Instruction:\nSort.\n\n### Input:\n3 1 2\n\n### Response:\n`;
    expect(alpaca.render(rows)).toBe(`${asked}1 2 3</s>`);
    expect(alpaca.render(rows.slice(0, 1), { addGenerationPrompt: true })).toBe(asked);
  });

  test.each([
    ['alpaca', '</s>'],
    ['chatml', '<|im_end|>'],
    ['gemma', '<end_of_turn>'],
    ['llama3', '<|eot_id|>'],
    ['mistral', '</s>'],
    ['phi3', '<|end|>'],
    ['plain', '</s>'],
  ] as const)('%s: where a turn ends, and what comes before a question', (style, end) => {
    const template = chatTemplate(style, vocabulary);
    expect(template.turnEnd).toBe(end);
    const before = conversations['two turns']!;
    for (const earlier of [[], before]) {
      const asked = template.render([...earlier, { role: 'user', content: 'Why?' }], { addGenerationPrompt: true });
      expect(asked.startsWith(template.preQuery(earlier))).toBe(true);
      expect(asked.slice(template.preQuery(earlier).length)).toMatch(/^Why\?/);
    }
  });

  test('GPT-2 begins nothing: its begin token is its end token', () => {
    const same = { ...vocabulary, bos: 1 };
    for (const style of Object.keys(chatStyles) as ChatStyle[]) {
      expect(chatTemplate(style, same).render(conversations.question!).startsWith('</s>')).toBe(false);
      expect(chatTemplate(style, vocabulary).render(conversations.question!).startsWith('<s>')).toBe(true);
    }
  });
});

describe('templates without generation tags', () => {
  const untagged = (source: string) => source.replaceAll(/\{%-? (end)?generation %\}|\{%-? ?(end)?generation ?-?%\}/g, '');

  test.each(['chatml', 'llama3', 'phi3', 'gemma', 'alpaca'] as const)('%s: the same spans as with them', (style) => {
    const tagged = chatTemplate(style, vocabulary);
    const plain = chatTemplate(untagged(chatStyles[style]), vocabulary);
    expect(plain.source).not.toContain('generation %');
    for (const [title, messages] of Object.entries(conversations)) {
      if (title === 'empty') continue;
      expect(plain.renderSpans(messages), title).toEqual(tagged.renderSpans(messages));
    }
  });

  test('one that rewrites what came before is refused, not guessed', () => {
    const source = `{%- for m in messages %}{{ m.role }}: {{ m.content if loop.last or m.role != 'assistant' else '...' }}
{% endfor %}`;
    const template = chatTemplate(source, vocabulary);
    expect(() => template.renderSpans(conversations['two turns']!)).toThrow(
      expect.objectContaining({ code: 'ERR_TEMPLATE_MASK', message: expect.stringContaining('messages[2]') }),
    );
    expect(template.renderSpans(conversations['one turn']!).spans).toHaveLength(1);
  });
});

describe('encoding', () => {
  let tokenizer: Tokenizer;
  let characters: Tokenizer;
  beforeAll(async () => {
    const trained = await trainTokenizer(['Where is Oslo? In Norway, says the answer: in Norway.'], {
      vocabSize: 320,
      specialTokens: ['<pad>', '<eos>', '<bos>', '<|im_start|>', '<|im_end|>'],
    });
    tokenizer = trained;
    const folder = await mkdtemp(join(tmpdir(), 'limbeck-chat-'));
    await trained.save(join(folder, 'tokenizer.json'));
    const { readFile } = await import('node:fs/promises');
    const plain = await trainTokenizer(['Where is Oslo? In Norway, says the answer: in Norway.'], { vocabSize: 300 });
    await plain.save(join(folder, 'small.json'));
    characters = tokenizerFromJson(sentencePiece(await readFile(join(folder, 'small.json'), 'utf8')));
    await rm(folder, { recursive: true });
  });
  const written = (t: Tokenizer, ids: Int32Array, mask: Uint8Array) => t.decode(ids.filter((_, i) => mask[i] === 1));

  test('the begin token comes once, and the mask covers the answers and their ends', () => {
    const chat = chatTemplate('chatml', tokenizer);
    const { ids, mask } = encodeChat(chat, tokenizer, conversations['two turns']!);
    expect([...ids].filter((id) => id === tokenizer.bos)).toHaveLength(1);
    expect(ids[0]).toBe(tokenizer.bos);
    expect(tokenizer.decode(ids)).toBe(chat.render(conversations['two turns']!));
    expect(written(tokenizer, ids, mask)).toBe(' Hi! <|im_end|>Two\n<|im_end|>');
  });

  test('what the model is trained to continue is what it will be given', () => {
    for (const t of [tokenizer, characters]) {
      for (const style of Object.keys(chatStyles) as ChatStyle[]) {
        const chat = chatTemplate(style, t);
        const messages = conversations['one turn']!;
        const asked = encodeChat(chat, t, messages.slice(0, 1), { addGenerationPrompt: true });
        const { ids, mask } = encodeChat(chat, t, messages);
        expect([...ids.subarray(0, asked.ids.length)], style).toEqual([...asked.ids]);
        expect([...mask].indexOf(1)).toBe(asked.ids.length);
      }
    }
  });

  test('a text whose end is no token of the vocabulary is closed by the end token', () => {
    const bare = chatTemplate('phi3', tokenizer);
    const { ids, mask } = encodeChat(bare, tokenizer, conversations['one turn']!);
    expect(ids.at(-1)).toBe(tokenizer.eos);
    expect(mask.at(-1)).toBe(1);
    expect(written(tokenizer, ids, mask)).toBe('In Norway.<|end|><eos>');
    const closed = encodeChat(chatTemplate('alpaca', tokenizer), tokenizer, conversations['one turn']!);
    expect([...closed.ids].filter((id) => id === tokenizer.eos)).toHaveLength(1);
    const question = encodeChat(bare, tokenizer, conversations.question!);
    expect([question.ids.includes(tokenizer.eos!), question.mask.includes(1)]).toEqual([false, false]);
  });

  describe('special tokens that people write', () => {
    const specials = ['<eos>', '<bos>', '<|im_start|>', '<|im_end|>'];
    /** Whole ones, parts of them, and what templates trim. */
    const hostile = fc
      .array(
        fc.oneof(
          fc.constantFrom(...specials),
          fc.tuple(fc.constantFrom(...specials), fc.nat(12), fc.nat(12)).map(([text, from, to]) => text.slice(from, to)),
          fc.constantFrom('<', '>', '|', ' ', '\n', 'a'),
        ),
        { maxLength: 6 },
      )
      .map((parts) => parts.join(''));
    // Phi-3's tokens take white space along, which only the library can do.
    let generic: Tokenizer;
    beforeAll(() => {
      const json = JSON.parse(tokenizer.file.text) as { added_tokens: { rstrip: boolean }[] };
      for (const token of json.added_tokens) token.rstrip = true;
      generic = tokenizerFromJson(JSON.stringify(json));
      expect([generic.engine, tokenizer.engine, characters.engine]).toEqual(['generic', 'native', 'native']);
    });
    const reserved = (t: Tokenizer, ids: Int32Array) => [...ids].filter((id) => t.file.added.some((token) => token.id === id));

    test('are text, in every style and tokenizer, and masks are of the answers', () => {
      fc.assert(
        fc.property(hostile, hostile, hostile, (system, question, answer) => {
          const say = (a: string, b: string, c: string): Message[] => [
            { role: 'system', content: a },
            { role: 'user', content: b, instruction: b, input: b },
            { role: 'assistant', content: c },
          ];
          for (const style of Object.keys(chatStyles) as ChatStyle[]) {
            for (const t of [tokenizer, characters, generic]) {
              const chat = chatTemplate(style, t);
              const { ids, mask } = encodeChat(chat, t, say(system, question, answer));
              const tame = encodeChat(chat, t, say('a', 'b', 'c'));
              expect(reserved(t, ids)).toEqual(reserved(t, tame.ids));
              expect(
                reserved(
                  t,
                  ids.filter((_, i) => mask[i] === 1),
                ),
              ).toEqual(
                reserved(
                  t,
                  tame.ids.filter((_, i) => tame.mask[i] === 1),
                ),
              );
              if (t !== tokenizer) continue;
              const text = chat.render(say(system, question, answer));
              const closed = (whole: string): string => whole.replace(/\s*(<eos>)?$/, '');
              expect(closed(t.decode(ids))).toBe(closed(text));
              expect(written(t, ids, mask)).toContain(answer);
            }
          }
        }),
        { numRuns: 60 },
      );
    });

    test('texts without them are encoded as a whole, as ever', () => {
      const chat = chatTemplate('chatml', tokenizer);
      for (const content of ['a < b', 'x <b>bold</b> [1]', '</think>', 'end|', 'i <3 u']) {
        const messages = [{ role: 'user', content }];
        const { ids } = encodeChat(chat, tokenizer, messages, { addGenerationPrompt: true });
        expect([...ids]).toEqual([...tokenizer.encode(chat.render(messages, { addGenerationPrompt: true }))]);
      }
    });

    test('stand for the token where the caller says so', () => {
      const messages = [{ role: 'user', content: 'a<|im_end|>b' }];
      const count = (special: boolean) =>
        [...encodeChat(chatTemplate('chatml', tokenizer), tokenizer, messages, { special }).ids].filter(
          (id) => id === tokenizer.id('<|im_end|>'),
        ).length;
      expect([count(false), count(true)]).toEqual([1, 2]);
    });

    test('nor are they made of two messages, or of what a template writes around a tool', () => {
      const plain = chatTemplate('plain', tokenizer);
      const split = encodeChat(plain, tokenizer, [
        { role: 'user', content: '<|im_' },
        { role: 'user', content: 'end|>' },
      ]);
      expect(reserved(tokenizer, split.ids)).toEqual([tokenizer.bos]);
      const shown = chatTemplate(
        '{% for tool in tools %}<{{ tool.name }}bos>{{ tool | tojson }}{% endfor %}{{ eos_token }}',
        tokenizer,
      );
      const tools = [
        { name: 'bos', note: '<bos>' },
        { name: '|im_end|', '<eos>': 1 },
      ];
      const { ids } = encodeChat(shown, tokenizer, [], { tools, addGenerationPrompt: true });
      expect(reserved(tokenizer, ids)).toEqual([tokenizer.eos]);
      expect(tokenizer.decode(ids)).toBe(shown.render([], { tools }));
    });
  });

  test('pieces keep their ids where a token lies across a cut', () => {
    for (const t of [tokenizer, characters]) {
      const { ids, ends } = encodePieces(t, ['Where is Os', '', 'lo? In Nor', 'way']);
      expect(ends).toHaveLength(4);
      expect(t.decode(ids.subarray(0, ends[0]))).toBe('Where is Os');
      expect(ids.length).toBe(ends.at(-1));
    }
    expect(tokenizer.decode(encodePieces(tokenizer, ['Where is Os', 'lo? In Nor', 'way']).ids)).toBe('Where is Oslo? In Norway');
  });
});

describe('what is refused', () => {
  test('a template that throws gives its own message', () => {
    const source = `{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}ok`;
    const template = chatTemplate(source, vocabulary, 'theirs');
    expect(template.render(conversations['one turn']!)).toBe('ok');
    expect(() => template.render(conversations['two turns']!)).toThrow(
      expect.objectContaining({
        name: 'DataError',
        code: 'ERR_TEMPLATE',
        argument: 'theirs',
        message: expect.stringContaining('System role not supported'),
      }),
    );
  });

  test('source that is no Jinja, and a style that does not exist', () => {
    expect(() => chatTemplate('{% for %}', vocabulary)).toThrow(
      expect.objectContaining({ name: 'FormatError', code: 'ERR_TEMPLATE' }),
    );
    expect(() => chatTemplate('{% generation %}x', vocabulary).renderSpans([])).toThrow(
      expect.objectContaining({ code: 'ERR_TEMPLATE_MASK' }),
    );
    expect(() => chatTemplate('alpacca', vocabulary)).toThrow(expect.objectContaining({ code: 'ERR_CONFIG', argument: 'style' }));
  });

  test.each([
    [[{ role: 'user' }], 'messages[0].content'],
    [[{ role: 'user', content: 'a' }, { content: 'b' }], 'messages[1].role'],
    [[{ role: 'user', content: ['a'] }], 'messages[0].content'],
    [[{ role: 'user', content: 'a\ufdd0' }], 'messages[0].content'],
  ])('messages that are none (%#)', (messages, argument) => {
    const template = chatTemplate('chatml', vocabulary);
    expect(() => template.render(messages as unknown as Message[])).toThrow(
      expect.objectContaining({ code: 'ERR_MESSAGE', argument }),
    );
  });
});

describe('a folder', () => {
  let folder: string;
  beforeAll(async () => {
    folder = await mkdtemp(join(tmpdir(), 'limbeck-chat-'));
  });
  afterAll(() => rm(folder, { recursive: true }));
  const config = (value: unknown) => writeFile(join(folder, 'tokenizer_config.json'), JSON.stringify({ chat_template: value }));

  test('has none, one, several, or files of their own', async () => {
    expect(await loadChatTemplate(folder, vocabulary)).toBeUndefined();
    await config(undefined);
    expect(await loadChatTemplate(folder, vocabulary)).toBeUndefined();
    await config('one {{ eos_token }}');
    expect((await loadChatTemplate(folder, vocabulary))!.render([])).toBe('one </s>');
    await config([
      { name: 'default', template: 'first {{ 1 }}' },
      { name: 'tool_use', template: 'second {{ tools }}' },
    ]);
    expect((await loadChatTemplate(folder, vocabulary))!.render([])).toBe('first 1');
    expect((await loadChatTemplate(folder, vocabulary, 'tool_use'))!.source).toContain('second');
    await expect(loadChatTemplate(folder, vocabulary, 'rag')).rejects.toMatchObject({ code: 'ERR_TEMPLATE', argument: 'name' });
    await writeFile(join(folder, 'chat_template.jinja'), 'file {{ 2 }}');
    await mkdir(join(folder, 'additional_chat_templates'));
    await writeFile(join(folder, 'additional_chat_templates/rag.jinja'), 'rag {{ 3 }}');
    expect((await loadChatTemplate(folder, vocabulary))!.render([])).toBe('file 2');
    expect((await loadChatTemplate(folder, vocabulary, 'rag'))!.render([])).toBe('rag 3');
    await rm(join(folder, 'chat_template.jinja'));
  });

  test('whose entry is of another kind is refused', async () => {
    for (const value of [3, [{ name: 'default' }], [null]]) {
      await config(value);
      await expect(loadChatTemplate(folder, vocabulary)).rejects.toMatchObject({ name: 'FormatError', code: 'ERR_TEMPLATE' });
    }
    await writeFile(join(folder, 'tokenizer_config.json'), '{');
    await expect(loadChatTemplate(folder, vocabulary)).rejects.toMatchObject({ name: 'FormatError', code: 'ERR_TEMPLATE' });
  });
});
