// Generation on a GPU: prompts by chunks, recorded steps in rings, and what is drawn, against the same texts scored whole.
import { afterAll, expect, test } from 'vitest';
import { generateTokens, type TokenRequest } from '../../src/models/generate.ts';
import { createModel, modelConfig } from '../../src/models/model.ts';
import { scoreTokens } from '../../src/models/score.ts';
import { shutdown } from '../../src/tensor/engine.ts';

afterAll(shutdown);

const config = modelConfig('gemma2-nano', {
  ...{ vocabSize: 300, width: 64, layers: 2, heads: 4, kvHeads: 2, headSize: 64, hidden: 96, window: 8, queryScalar: 64 },
  // A head of its own: a tied one mostly repeats the last token.
  ...{ initStd: 0.3, context: 64, tied: false },
});

test('texts of a batch are what the model says of them, in every run', async () => {
  const model = createModel(config, { seed: 7, trainable: false });
  const prompts = [13, 1, 5].map((n, row) => Array.from({ length: n }, (_, i) => (i * i * 5 + row * 17 + 1) % 290));
  const requests: TokenRequest[] = [
    { ids: prompts[0]!, tokens: 4, temperature: 0 },
    { ids: prompts[1]!, tokens: 14, temperature: 0.7, topP: 0.9, seed: 3, topLogProbs: 5 },
    { ids: prompts[2]!, tokens: 6, temperature: 1, topK: 20, repetitionPenalty: 1.2, seed: 4 },
  ];
  const run = async () => {
    const all = requests.map(() => ({ ids: [] as number[], logProbs: [] as number[] }));
    for await (const event of generateTokens(model, requests, { batch: 2, chunk: 6 })) {
      if (event.type === 'end') continue;
      all[event.index]!.ids.push(event.id);
      all[event.index]!.logProbs.push(event.logProb);
      if (event.index === 1) {
        expect(event.top).toHaveLength(5);
        expect(event.top![0]!.logProb).toBeGreaterThanOrEqual(event.logProb);
      }
    }
    return all;
  };
  const texts = await run();
  expect(texts.map(({ ids }) => ids.length)).toEqual([4, 14, 6]);
  expect(await run()).toEqual(texts);
  const whole = await scoreTokens(
    model,
    texts.map(({ ids }, i) => ({ ids: [...prompts[i]!, ...ids], from: prompts[i]!.length })),
  );
  for (const [i, { logProbs }] of texts.entries()) {
    // Logits of a few units, in bf16.
    for (const [j, p] of logProbs.entries()) expect(Math.abs(p - whole[i]![j]!), `text ${i}, token ${j}`).toBeLessThan(0.15);
  }
  model.dispose();
});
