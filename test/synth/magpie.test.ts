import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { type MagpieOptions, magpie } from '../../src/synth/magpie/magpie.ts';
import { repeats, sanitize } from '../../src/synth/magpie/sanitize.ts';
import { type PreQueryFamily, preQueryFamilies, preQueryFromTemplate, preQueryOf } from '../../src/synth/magpie/templates.ts';
import { type PipelineEvent, readManifest, readRecords, runPipeline } from '../../src/synth/pipeline.ts';
import type { InstructionRecord } from '../../src/synth/record.ts';
import { fromJson, objectsIn, tag } from '../../src/synth/tag.ts';
import { chatTemplate } from '../../src/tokenizer/chat.ts';
import { scripted } from './scripted.ts';

let folder: string;
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'limbeck-magpie-'));
});
afterEach(() => rm(folder, { recursive: true, force: true }));

const vocabulary = (bos: string, eos = '') => ({
  bos: bos === '' ? undefined : 0,
  eos: eos === '' ? undefined : 1,
  pad: undefined,
  unk: undefined,
  token: (id: number) => [bos, eos][id],
});

async function drain(chain: Parameters<typeof runPipeline>[0], seed = 0): Promise<PipelineEvent[]> {
  const events: PipelineEvent[] = [];
  for await (const event of runPipeline(chain, { output: folder, seed })) events.push(event);
  return events;
}
async function recordsIn(file: string): Promise<InstructionRecord[]> {
  const all: InstructionRecord[] = [];
  for await (const record of readRecords<InstructionRecord>(join(folder, file))) all.push(record);
  return all;
}

describe('templates', () => {
  // The strings of the published configurations, by model.
  test.each([
    [
      'Meta-Llama-3-8B-Instruct',
      '<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n',
      [128009, 128001, 128006, 128007],
    ],
    ['Llama-3.3-70B-Instruct', '<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n', [128009, 128001, 128006, 128007]],
    ['Qwen/Qwen2-7B-Instruct', '<|im_start|>user\n', [151643, 151644, 151645]],
    ['Qwen1.5-7B-Chat', '<|im_start|>user\n', [151643, 151644, 151645]],
    [
      'Qwen/Qwen2.5-Coder-7B-Instruct',
      '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n<|im_start|>user\n',
      [151643, 151644, 151645],
    ],
    ['google/gemma-2-9b-it', '<bos><start_of_turn>user\n\n', [1, 2, 107]],
    ['google/gemma-1.1-7b-it', '<bos><start_of_turn>user\n', [1, 2, 106, 107]],
    ['microsoft/Phi-3-mini-128k-instruct', '<s> <|user|>\n', [2, 1, 0, 32000, 32001, 32006, 32007, 32010]],
    ['microsoft/Phi-3.5-mini-instruct', '<s> <|user|>\n', [2, 1, 0, 32000, 32001, 32006, 32007, 32010]],
    ['microsoft/Phi-3-small-128k-instruct', '<|endoftext|><|user|>\n', [100257, 100262, 100263, 100261, 100266]],
    ['mistralai/Mistral-7B-Instruct-v0.3', '<s> [INST] ', [1, 2, 3, 4]],
    ['meta-llama/Llama-2-7b-chat-hf', '<s> [INST] ', [2, 1, 0]],
    ['01-ai/Yi-1.5-34B-Chat', '<|startoftext|><|im_start|>user\n', [1, 2, 7]],
    [
      'lmsys/vicuna-7b-v1.5',
      "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions.\n\nUSER: ",
      [2, 1, 0],
    ],
    ['NousResearch/Nous-Hermes-llama-2-7b', '### Instruction:\n\n', [2, 1, 0]],
    ['deepseek-ai/DeepSeek-Coder-V2-Lite-Instruct', '<｜begin▁of▁sentence｜>User: ', [100000, 100001, 100008, 100006, 100007]],
  ])('%s', (model, text, stopIds) => {
    expect(preQueryOf(model)).toMatchObject({ text, stopIds });
  });

  test('a family by its name; an unknown model is refused', () => {
    for (const name of Object.keys(preQueryFamilies))
      expect(preQueryOf(name).text).toBe(preQueryFamilies[name as PreQueryFamily].text);
    expect(() => preQueryOf('some-model')).toThrow(expect.objectContaining({ code: 'ERR_CONFIG', argument: 'template' }));
  });

  test.each([
    ['chatml', '', 'qwen2', '<|im_end|>'],
    ['llama3', '<|begin_of_text|>', 'llama3', '<|eot_id|>'],
    ['gemma', '<bos>', 'gemma', '<end_of_turn>'],
  ] as const)('the generic rule gives what the registry has: %s', (style, bos, family, stop) => {
    const generic = preQueryFromTemplate(chatTemplate(style, vocabulary(bos)));
    expect(generic.text).toBe(preQueryFamilies[family].text);
    expect(generic.stop).toContain(stop);
  });

  test('the generic rule on published templates with begin tokens, default systems and no turn ends', () => {
    const qwen = `{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}{%- else %}{{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}{%- endif %}{%- for message in messages %}{%- if message.role != 'system' %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}`;
    expect(preQueryFromTemplate(chatTemplate(qwen, vocabulary(''))).text).toBe(preQueryFamilies['qwen2.5'].text);
    const deepseek = `{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n\\n' }}{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}{% elif message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}`;
    const found = preQueryFromTemplate(chatTemplate(deepseek, vocabulary('<｜begin▁of▁sentence｜>', '<｜end▁of▁sentence｜>')));
    expect(found.text).toBe(preQueryFamilies['deepseek-coder'].text);
    expect(found.stop).toEqual(expect.arrayContaining(['Assistant:', '<｜end▁of▁sentence｜>']));
    expect(found.after!([{ role: 'system', content: 'S' }])).toBe('<｜begin▁of▁sentence｜>S\n\nUser: ');
  });
});

describe('sanitizer', () => {
  test.each([
    ['  Why is the sky blue?\n', 'Why is the sky blue?', []],
    [
      'Why is the sky blue? Please explain to a child.\nUse three sentences.',
      'Why is the sky blue? Please explain to a child.\nUse three sentences.',
      [],
    ],
    ['Why is it so?assistant\n\nBecause it is.', 'Why is it so?assistant\n\nBecause it is.', []],
    ['Why is the sky blue?\nassistant\n\nBecause of light.', 'Why is the sky blue?', ['header']],
    ['Why is the sky blue?<|im_end|>\n<|im_start|>assistant\nBecause', 'Why is the sky blue?', ['header']],
    ['Why is the sky blue?\n\nAssistant: Because of light.', 'Why is the sky blue?', ['header']],
    ['User: Why is the sky blue?', 'Why is the sky blue?', ['label']],
    ['1. Why is the sky blue?', 'Why is the sky blue?', ['label']],
    ['**Question:** Why is the sky blue?', 'Why is the sky blue?', ['label']],
    ['**Task**: Describe the sky.', 'Describe the sky.', ['label']],
    ['## Prompt\nDescribe the sky.', 'Describe the sky.', ['label']],
    ['Question 3: Why is the sky blue?', 'Why is the sky blue?', ['label']],
    ['Q2. Why is the sky blue?', 'Why is the sky blue?', ['label']],
    ['Context is king. Why?', 'Context is king. Why?', []],
    ['Instructions for use of a kettle, please', 'Instructions for use of a kettle, please', []],
    ['"Why is the sky blue?"', 'Why is the sky blue?', ['quotes']],
    ['"Why?" she said. "Because."', '"Why?" she said. "Because."', []],
    ['<b>Why is the sky blue?</b>', 'Why is the sky blue?', ['markup']],
    ['**Why is the sky blue?**', 'Why is the sky blue?', ['markup']],
    ['Why is the sky blue?\nAnswer: because of light.', 'Why is the sky blue?', ['answer']],
    ['What is 2 + 2?\n**Solution:**\n4', 'What is 2 + 2?', ['answer']],
    ['What is 2 + 2?\n## Step 1: add them up', 'What is 2 + 2?', ['answer']],
    ['Explain what "Answer: 4" means in this text', 'Explain what "Answer: 4" means in this text', []],
    ['1. Boil water\n2. Add tea\nWhat comes next?', '1. Boil water\n2. Add tea\nWhat comes next?', []],
    ['Sort: b, a, c and tell me why', 'Sort: b, a, c and tell me why', []],
  ])('%j', (raw, text, rules) => {
    expect(sanitize(raw)).toEqual({ text, rules });
  });

  test.each([
    ['', 'empty'],
    ['<|im_end|>', 'empty'],
    ['12345678910', 'no-letters'],
    ['Hi', 'short'],
    [Array.from({ length: 3000 }, (_, i) => `word${i}`).join(' '), 'long'],
    ['Answer the following questions:', 'colon'],
    ['What is a lone surrogate \ud800 doing here?', 'surrogate'],
    [`Tell me ${'again and '.repeat(20)}`, 'repeats'],
  ])('refused: %.40s', (raw, refused) => {
    expect(sanitize(raw)).toMatchObject({ refused });
  });

  test('rules can be left out, headers added', () => {
    expect(sanitize('1. Why is the sky blue?', { without: ['label'] })).toMatchObject({ text: '1. Why is the sky blue?' });
    expect(sanitize('Why is it? [END] no', { headers: ['[END]'] })).toMatchObject({ text: 'Why is it?' });
  });

  test('what repeats and what does not', () => {
    expect(repeats('no '.repeat(30))).toBe(true);
    expect(repeats(`${'word other thing else '.repeat(3)}and so it goes on in its own way`)).toBe(false);
    expect(repeats('-'.repeat(200))).toBe(false);
    expect(repeats(Array.from({ length: 200 }, (_, i) => `word${i}`).join(' '))).toBe(false);
    expect(repeats(Array.from({ length: 200 }, (_, i) => `a b c d ${i % 3}`).join(' '))).toBe(true);
  });

  test('any text: mended once is mended for good, and is what a user may write', () => {
    const piece = fc.oneof(
      fc.string({ unit: 'grapheme', maxLength: 12 }),
      fc.constantFrom(
        '1. ',
        'Question: ',
        '**',
        '"',
        '\n',
        'Answer: ',
        'assistant\n',
        '<|im_end|>',
        '- ',
        '?',
        'User: ',
        'the sky is blue',
      ),
    );
    fc.assert(
      fc.property(fc.array(piece, { maxLength: 12 }), (pieces) => {
        const result = sanitize(pieces.join(''));
        if ('refused' in result) return;
        expect(result.text.length).toBeGreaterThanOrEqual(8);
        expect(result.text).toBe(result.text.trim());
        expect(result.text).not.toMatch(/<\|im_end\|>|:$/);
        expect(result.text.endsWith(':')).toBe(false);
      }),
      { numRuns: 300 },
    );
  });
});

describe('the stages', () => {
  const asked: { prompt: string; options: Record<string, unknown> }[] = [];
  // A model that writes what a seed says, good and bad.
  const written = (seed: number): { text: string; finish?: 'stop' | 'length' } => {
    const cases = [
      { text: `What is the number ${seed}?` },
      { text: `Question: Tell me about ${seed}.\nAnswer: no` },
      { text: '' },
      { text: `An endless tale of ${seed}`, finish: 'length' as const },
      { text: `Say it: ${'on and '.repeat(30)}` },
      { text: `Write the following ${seed}:` },
    ];
    return cases[seed % cases.length]!;
  };
  const provider = (concurrency = 4) =>
    scripted({
      concurrency,
      async complete(prompt, options) {
        asked.push({ prompt, options: options as Record<string, unknown> });
        await new Promise((resolve) => setTimeout(resolve, options.seed! % 5));
        return written(options.seed!);
      },
      chat: (messages, options) => {
        const kind = options.seed! % 8;
        const text = `An answer to "${messages.at(-1)!.content}" in ${messages.length}`;
        if (kind === 0) return '  ';
        if (kind === 1) return { text, finish: 'length' };
        return kind === 2 ? `${text}\nUser: and then?` : text;
      },
    });
  const options = (changes: Partial<MagpieOptions> = {}): MagpieOptions => ({
    provider: provider(),
    count: 60,
    template: 'llama3',
    ...changes,
  });
  beforeEach(() => {
    asked.length = 0;
  });

  test('from nothing to conversations; every case is counted', async () => {
    await drain(magpie(options({ instruction: { temperature: [1, 1.2], topP: [0.9, 1], maxTokens: 99, bias: { 2: -1e4 } } })));
    const [instruct, respond] = await readManifest(folder);
    expect(instruct!.input).toBe(60);
    expect(Object.keys(instruct!.dropped)).toEqual([
      'instruction-colon',
      'instruction-empty',
      'instruction-repeats',
      'instruction-unfinished',
    ]);
    expect(Object.keys(respond!.dropped)).toEqual(['response-empty', 'response-header', 'response-unfinished']);
    const sum = (dropped: Readonly<Record<string, number>>) => Object.values(dropped).reduce((a, b) => a + b, 0);
    expect(instruct!.records + sum(instruct!.dropped)).toBe(60);
    const records = await recordsIn('02-respond.jsonl');
    expect(records).toHaveLength(respond!.records);
    for (const { id, messages, origin } of records) {
      expect(id).toMatch(/^magpie-\d{6}$/);
      expect(messages).toHaveLength(2);
      expect(messages[1]!.content).toContain(messages[0]!.content);
      expect([1, 1.2]).toContain(origin!.temperature);
      expect([0.9, 1]).toContain(origin!.topP);
    }
    expect(new Set(records.map(({ origin }) => `${origin!.temperature} ${origin!.topP}`)).size).toBe(4);
    expect(records.some(({ origin }) => origin!.rules.includes('answer'))).toBe(true);
    for (const { prompt, options: o } of asked) {
      expect(prompt).toBe(preQueryFamilies.llama3.text);
      expect(o).toMatchObject({ maxTokens: 99, bias: { 2: -1e4 }, stopIds: [128009, 128001, 128006, 128007] });
      expect(o.stop).toContain('<|eot_id|>');
    }
  });

  test('the same bytes at any concurrency, others with another seed', async () => {
    const texts: string[] = [];
    for (const [concurrency, seed] of [
      [1, 0],
      [32, 0],
      [32, 1],
    ] as const) {
      await drain(magpie(options({ provider: provider(concurrency) })), seed);
      texts.push(await readFile(join(folder, '02-respond.jsonl'), 'utf8'));
      await rm(folder, { recursive: true });
    }
    expect(texts[1]).toBe(texts[0]);
    expect(texts[2]).not.toBe(texts[0]);
  });

  test('a system prompt steers: weights need not add up to one', async () => {
    const template = chatTemplate('chatml', vocabulary(''));
    const system = {
      maths: { prompt: 'Mathematics.', weight: 3 },
      cooking: { prompt: 'Cooking.', weight: 1 },
      never: { prompt: 'N', weight: 0 },
    };
    await drain(magpie(options({ template, system, count: 200, keepSystem: true })));
    const prompts = asked.map(({ prompt }) => /system\n(\w+)/.exec(prompt)![1]);
    const maths = prompts.filter((p) => p === 'Mathematics').length;
    expect(maths).toBeGreaterThan(120);
    expect(maths).toBeLessThan(180);
    expect(prompts).not.toContain('N');
    const records = await recordsIn('02-respond.jsonl');
    for (const { systemKey, messages } of records) {
      expect(messages[0]).toEqual({ role: 'system', content: systemKey === 'maths' ? 'Mathematics.' : 'Cooking.' });
    }
  });

  test('several turns, each seeing those before', async () => {
    const template = chatTemplate('chatml', vocabulary(''));
    await drain(magpie(options({ template, turns: 3, count: 200 })));
    const records = await recordsIn('06-respond-3.jsonl');
    expect(records.length).toBeGreaterThan(0);
    for (const { messages } of records) {
      expect(messages.map((message) => message.role)).toEqual(['user', 'assistant', 'user', 'assistant', 'user', 'assistant']);
      expect(messages[5]!.content).toContain('in 5');
    }
    expect(asked.at(-1)!.prompt).toMatch(/related follow-up[\s\S]*<\|im_start\|>user\n$/);
  });

  test('a single line', async () => {
    await drain(magpie(options({ singleLine: true, count: 2 })));
    expect(asked[0]!.options.stop).toContain('\n');
  });

  test('what cannot be is refused before anything runs', () => {
    const refuse = (changes: Partial<MagpieOptions>) => () => magpie(options(changes));
    expect(refuse({ count: 0 })).toThrow('count');
    expect(refuse({ template: 'nothing-known' })).toThrow('pre-query');
    expect(refuse({ system: 'x' })).toThrow('chat template');
    expect(refuse({ turns: 2 })).toThrow('chat template');
    expect(refuse({ template: chatTemplate('chatml', vocabulary('')), system: [] })).toThrow('weight');
    expect(refuse({ provider: scripted({ can: { complete: false } }) })).toThrow('raw prompt');
    expect(refuse({ provider: scripted({ can: { bias: false } }), instruction: { firstBias: { 1: 1 } } })).toThrow('bias');
  });
});

describe('tags', () => {
  const record: InstructionRecord = {
    id: 'a',
    messages: [
      { role: 'user', content: 'Why?' },
      { role: 'assistant', content: 'So.' },
    ],
  };
  const run = async (stage: ReturnType<typeof tag>) => {
    const outcome = await stage.run(record, { index: 0, seed: (draw = 0) => draw, signal: new AbortController().signal });
    return 'value' in outcome ? outcome.value.tags : undefined;
  };

  test('held to the answers where the backend can', async () => {
    const choices: unknown[] = [];
    const provider = scripted({
      chat: (_, options) => {
        choices.push(options.choices!.length);
        return options.choices![1]!;
      },
    });
    expect(await run(tag({ provider, missions: ['quality', 'difficulty', 'category', 'safety', 'language'] }))).toEqual({
      quality: 'poor',
      difficulty: 'easy',
      category: 'Reasoning',
      safety: 'unsafe',
      language: 'ar',
    });
    expect(choices).toEqual([5, 5, 12, 2, 53]);
  });

  test('JSON otherwise: checked, asked again with another seed, null in the end', async () => {
    const seeds: number[] = [];
    const provider = scripted({
      can: { choices: false },
      chat: (messages, options) => {
        const quality = messages[0]!.content.includes('{"quality"');
        if (!quality) return 'I would rather talk about something else. {"difficulty": "impossible"}';
        seeds.push(options.seed!);
        return seeds.length < 3 ? '{"quality": "go' : 'Sure! {"why": {"a": "}"}, "quality": "Good"} Anything else?';
      },
    });
    expect(await run(tag({ provider, missions: ['quality', 'difficulty'] }))).toEqual({ quality: 'good', difficulty: null });
    expect(seeds).toEqual([0, 1, 2]);
  });

  test('objects inside prose', () => {
    expect(fromJson('x {"a": 1} {"q": "Other"}', 'q', ['Others'])).toBe('Others');
    expect([...objectsIn('{"a": "{"} }{ {"b": {"c": 1}} {"d"')]).toEqual([{ a: '{' }, { b: { c: 1 } }]);
    fc.assert(
      fc.property(fc.string(), fc.dictionary(fc.string(), fc.jsonValue()), fc.string(), (before, object, after) => {
        for (const found of objectsIn(before + JSON.stringify(object) + after)) expect(typeof found).toBe('object');
        const plain = before.replaceAll(/[{}"\\]/g, '');
        expect([...objectsIn(plain + JSON.stringify(object) + plain)]).toEqual([JSON.parse(JSON.stringify(object))]);
      }),
    );
  });
});
