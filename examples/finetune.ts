// Chapter 7 of "Build a Large Language Model (From Scratch)" at a size that trains in minutes: a small model reads about the countries of the
// world, then learns to answer questions about them: from the answers alone, from the whole text, and with an adapter of low rank.
//
//   npx jiti examples/finetune.ts [folder] [steps of pretraining] [epochs of finetuning]

import { mkdir, readFile, writeFile } from 'node:fs/promises';
import { defineRun, finetune, parseRun, pretrain, record } from '../src/index.ts'; // 'limbeck' in a program of yours
import { factbookProse, factbookRows } from './factbook.ts';

const [folder = 'runs/chapter7', steps = '300', epochs = '2'] = process.argv.slice(2);

// Texts to read, and 1123 rows of { instruction, input, output }.
await mkdir(folder, { recursive: true });
await writeFile(
  `${folder}/prose.jsonl`,
  factbookProse()
    .map((text) => JSON.stringify({ text }))
    .join('\n'),
);
await writeFile(`${folder}/instructions.json`, JSON.stringify(factbookRows(), null, 2));

const base = defineRun({
  kind: 'pretrain',
  name: 'base',
  output: `${folder}/base`,
  data: { jsonl: `${folder}/prose.jsonl`, validation: 0.05 },
  tokenizer: { train: { vocabSize: 2048 } },
  model: 'gpt2-micro',
  steps: Number(steps),
  optimizer: { learningRate: 3e-3 },
});
console.log('reading about the countries of the world');
for await (const event of record(parseRun(base), pretrain(base))) {
  if (event.type === 'evaluate') console.log(`  validation loss ${event.loss.toFixed(3)}`);
}

const lora = { rank: 16, alpha: 16 };
const ways = [
  { name: 'answers only', mask: 'completion', learningRate: 1e-3 },
  { name: 'whole text', mask: 'all', learningRate: 1e-3 },
  { name: 'LoRA', mask: 'completion', learningRate: 3e-3, adapter: lora },
] as const;
for (const { name, mask, learningRate, ...adapter } of ways) {
  const run = defineRun({
    kind: 'finetune',
    name,
    output: `${folder}/${name.replaceAll(' ', '-')}`,
    model: `${folder}/base`,
    data: { train: `${folder}/instructions.json`, validation: 0.1 },
    template: 'alpaca',
    mask,
    batch: { sequences: 4, length: 256 },
    epochs: Number(epochs),
    optimizer: { learningRate },
    ...adapter,
    responses: { samples: 0, examples: 5, tokens: 32 },
  });
  console.log(`learning to answer: ${run.name}`);
  for await (const event of record(parseRun(run), finetune(run))) {
    if (event.type === 'evaluate') console.log(`  step ${event.step}: validation loss ${event.loss.toFixed(3)}`);
  }
  for (const line of (await readFile(`${run.output}/responses.jsonl`, 'utf8')).trim().split('\n')) {
    const { messages, reference, response } = JSON.parse(line);
    console.log(`  ${messages[0].content.replaceAll('\n', ' ')}\n    model:     ${response}\n    reference: ${reference}`);
  }
}
