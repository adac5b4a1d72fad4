import fc from 'fast-check';
import { expect, test } from 'vitest';
import { exampleText, markerIn, markers, pairsText, parsePairs } from '../../../src/synth/instruct/format.ts';

const brackets = { begin: '<s>', end: '</s>' };

test('the published format', () => {
  const pairs = [
    { question: 'Who?', answer: 'He.' },
    { question: 'Where?\nOptions:\n- here\n- there', answer: 'here' },
  ];
  expect(exampleText({ context: 'A text.', pairs }, brackets)).toBe(
    '<s> <CON> A text. </CON>\n\n<QUE> Who? <ANS> He. </END>\n\n<QUE> Where?\nOptions:\n- here\n- there <ANS> here </END></s>',
  );
  expect(exampleText({ context: '', pairs: [pairs[0]!] }, brackets)).toBe('<s><QUE> Who? <ANS> He. </END></s>');
});

test('each piece that is no pair is told, with its kind', () => {
  const output = [
    '<QUE> One? <ANS> 1 </END>',
    '<QUE> No answer </END>',
    'Lost <QUE> Two? <ANS> 2 </END>',
    '<QUE> one? <ANS> again </END>',
    '<QUE> <ANS> nothing asked </END>',
    '<QUE> Nothing said? <ANS> </END>',
    '<QUE> Three? <ANS> 3 <ANS> 4 </END>',
    '<QUE> Four? <QUE> Five? <ANS> 5 </END>',
    '<QUE> Six? <ANS> 6 </END>',
    '<QUE> Cut off? <ANS> se',
  ].join('\n\n');
  const { pairs, malformed } = parsePairs(output);
  expect(pairs).toEqual([
    { question: 'One?', answer: '1' },
    { question: 'Six?', answer: '6' },
  ]);
  expect(malformed.map(({ defect }) => defect)).toEqual([
    'no-answer-mark',
    'no-question-mark',
    'duplicate',
    'empty-question',
    'empty-answer',
    'stray-mark',
    'stray-mark',
    'unfinished',
  ]);
  expect(parsePairs('')).toEqual({ pairs: [], malformed: [] });
  expect(parsePairs('  \n')).toEqual({ pairs: [], malformed: [] });
});

test('pairs come back as they were written', () => {
  const text = fc
    .string({ unit: 'grapheme', minLength: 1 })
    .map((s) => s.trim())
    .filter((s) => s !== '' && markerIn(s) === undefined);
  fc.assert(
    fc.property(
      fc.uniqueArray(fc.record({ question: text, answer: text }), { selector: ({ question }) => question.toLowerCase() }),
      (pairs) => {
        expect(parsePairs(pairsText(pairs))).toEqual({ pairs, malformed: [] });
      },
    ),
  );
});

test('whatever a model writes is either a pair or told', () => {
  const noise = fc
    .array(fc.oneof(fc.constantFrom(...markers), fc.constantFrom(' ', '\n\n', 'a', 'B', 'é')))
    .map((parts) => parts.join(''));
  fc.assert(
    fc.property(noise, (output) => {
      const { pairs, malformed } = parsePairs(output);
      const pieces = output.split('</END>');
      const rest = pieces.pop()!.trim() === '' ? 0 : 1;
      expect(pairs.length + malformed.length).toBe(pieces.length + rest);
      for (const { question, answer } of pairs) {
        expect(question).not.toBe('');
        expect(answer).not.toBe('');
        expect(markerIn(question + answer)).toBeUndefined();
      }
    }),
  );
});
