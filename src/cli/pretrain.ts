// limbeck pretrain RUN

import { trainCommand } from './train.ts';

const examples = `
# a run file says everything: data, tokenizer, model, length
limbeck pretrain teacher.ts
# the smallest one, as JSON
{ "kind": "pretrain", "output": "runs/first", "data": { "text": "corpus/*.txt" },
  "tokenizer": { "train": { "vocabSize": 4096 } }, "model": "gemma2-micro", "steps": 500 }
# the same run with another rate and seed, somewhere else
limbeck pretrain teacher.ts --set optimizer.learningRate=1e-3 --set seed=1 --set output=runs/second
# stopped or killed? The same command goes on where the last checkpoint was saved
limbeck pretrain teacher.ts
# what would run?
limbeck pretrain teacher.ts --dry-run
`.trim();

export const pretrain = trainCommand(
  'pretrain',
  'Train a language model on text.',
  examples,
  async () => (await import('../train/pretrain.ts')).pretrain,
);
