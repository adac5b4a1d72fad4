// limbeck distill RUN

import { trainCommand } from './train.ts';

const examples = `
# a student that learns from the distribution of a teacher
limbeck distill student.ts
# the smallest run, as JSON
{ "kind": "distill", "output": "runs/student", "data": { "text": "corpus/*.txt" },
  "teacher": { "checkpoint": "runs/teacher" }, "model": "gemma2-nano", "steps": 500 }
# another divergence, mixed with the text itself
limbeck distill student.ts --set distill.divergence.kind=reverse_kl --set distill.hardWeight=0.1
# events for another program
limbeck distill student.ts --json | jq 'select(.type == "evaluate") | .kl'
`.trim();

export const distill = trainCommand(
  'distill',
  'Train a student on the distribution of a teacher.',
  examples,
  async () => (await import('../distill/distill.ts')).distill,
);
