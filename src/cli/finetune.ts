// limbeck finetune RUN

import { trainCommand } from './train.ts';

const examples = `
# a run file says everything: model, conversations, template, mask, length
limbeck finetune chat.ts
# the smallest one, as JSON
{ "kind": "finetune", "output": "runs/chat", "model": "models/base", "template": "alpaca",
  "data": { "train": "instructions.json" }, "epochs": 2 }
# learn from the whole text instead of the answers alone
limbeck finetune chat.ts --set mask=all --set output=runs/whole
# what it answers to the held-out instructions
head runs/chat/responses.jsonl
`.trim();

export const finetune = trainCommand(
  'finetune',
  'Finetune a model on instructions and conversations.',
  examples,
  async () => (await import('../train/finetune.ts')).finetune,
);
