// Small models of ours: one that has learned to chat, by a few questions, their answers and the frames of turns; one that writes questions and
// answers about texts.
import { join } from 'node:path';
import { texts } from '../../src/data/source.ts';
import { writeTokenFile } from '../../src/data/tokens.ts';
import { resolveCheckpoint } from '../../src/models/folder.ts';
import { exampleText } from '../../src/synth/instruct/format.ts';
import { trainTokenizer } from '../../src/tokenizer/train.ts';
import { parseRun } from '../../src/train/config.ts';
import { pretrain } from '../../src/train/pretrain.ts';

const places = ['Avalon', 'Borduria', 'Cimmeria', 'Freedonia', 'Genovia', 'Laputa', 'Narnia', 'Ruritania', 'Sylvania', 'Zenda'];
const things = [
  ['capital', 'The capital of % is the town of %.'],
  ['weather', 'The weather in % is mild, as it is all year round.'],
  ['food', 'People in % eat bread, cheese and apples.'],
  ['language', 'In % people speak a language of their own.'],
] as const;

/** Trains one in `folder` (some seconds) and returns the folder of the model; the chat template is ChatML. */
export function trainTinyChat(folder: string, steps = 160): Promise<string> {
  const documents = places.flatMap((place) =>
    things.map(
      ([thing, answer]) =>
        `<|im_start|>user\nWhat is the ${thing} of ${place}?<|im_end|>\n<|im_start|>assistant\n${answer.replaceAll('%', place)}<|im_end|>\n`,
    ),
  );
  return train(folder, documents, ['<|endoftext|>', '<|im_start|>', '<|im_end|>'], steps);
}

/** A text about a place, two sentences of those that {@link trainTinySynthesizer} has learned to ask about. */
export function tinyText(place: string, first: number, second: number): string {
  return [first, second].map((i) => things[i % things.length]![1].replaceAll('%', place)).join(' ');
}

/** Trains an instruction synthesizer in `folder` (some seconds) and returns the folder of the model. */
export function trainTinySynthesizer(folder: string, steps = 160): Promise<string> {
  const pair = (place: string, i: number) => {
    const [thing, answer] = things[i % things.length]!;
    return { question: `What is the ${thing} of ${place}?`, answer: answer.replaceAll('%', place) };
  };
  const documents = places.flatMap((place) =>
    things.map((_, i) =>
      exampleText({ context: tinyText(place, i, i + 1), pairs: [pair(place, i), pair(place, i + 1)] }, { begin: '', end: '' }),
    ),
  );
  return train(folder, documents, ['<|endoftext|>'], steps);
}

async function train(folder: string, documents: readonly string[], specialTokens: string[], steps: number): Promise<string> {
  const tokenizer = await trainTokenizer(texts(documents), { vocabSize: 400, specialTokens });
  await tokenizer.save(join(folder, 'tokenizer'));
  // As ids: in plain text the frames of turns would be text.
  const ids = documents.map((text) => tokenizer.encode(text, { eos: tokenizer.eos !== undefined }));
  const tokens = join(folder, 'chat.tokens');
  await writeTokenFile(tokens, ids, { vocabSize: tokenizer.vocabSize, fingerprint: tokenizer.fingerprint });
  const output = join(folder, 'run');
  const run = parseRun({
    kind: 'pretrain',
    output,
    data: { tokens, validation: { documents: 1 } },
    tokenizer: join(folder, 'tokenizer/tokenizer.json'),
    model: {
      preset: 'gemma2-nano',
      width: 64,
      layers: 2,
      heads: 2,
      kvHeads: 1,
      headSize: 32,
      hidden: 128,
      window: 64,
      context: 512,
    },
    batch: { sequences: 8, length: 64 },
    steps,
    optimizer: { learningRate: 6e-3 },
    evaluate: { every: steps },
    checkpoint: { every: steps },
    log: { tensorboard: false, report: false },
  });
  for await (const _ of pretrain(run as never)) void 0;
  return resolveCheckpoint(output);
}
