// How pairs are written into pretraining text. `{context}`, `{question}`, `{answer}`, `{steps}`, `{option}`, `{label}` and `{number}`
// stand for what is filled in. A model should meet many forms of the same task, or it learns the form.

/** A question and its answer. */
export interface PairTemplate {
  readonly question: string;
  /** Between the two. */
  readonly gap: string;
  readonly answer: string;
  /** Between pairs. */
  readonly between: string;
}

/** A list of choices behind a question. */
export interface OptionTemplate {
  readonly lead: string;
  readonly option: string;
  readonly between: string;
  /** What tells the choices apart; marks that are all alike leave the answer in words. */
  readonly labels: 'A' | 'a' | '1' | '-' | '*';
}

/** Two speakers. `lead` comes before the first turn. */
export interface DialogTemplate {
  readonly lead: string;
  readonly question: string;
  readonly answer: string;
  readonly between: string;
}

/** All questions, then all answers. */
export interface NumberedTemplate {
  readonly questions: string;
  readonly question: string;
  readonly answers: string;
  readonly answer: string;
}

/** Pairs as worked examples, and one more to be solved like them. */
export interface ShownTemplate {
  readonly lead: string;
  readonly question: string;
  readonly gap: string;
  readonly answer: string;
  readonly test: string;
}

/** A conversation, and what is said next. */
export interface NextTurnTemplate extends DialogTemplate {
  /** Before the last turn. */
  readonly next: string;
}

export interface TemplateBank {
  /** Share of documents, 0 to 1, in which the text is framed; elsewhere it stands alone. */
  readonly framed: number;
  readonly frames: readonly string[];
  /** Share of documents that say what follows the text. */
  readonly led: number;
  readonly leads: readonly string[];
  /** The same where the text comes behind the pairs. */
  readonly trailers: readonly string[];
  readonly pairs: readonly PairTemplate[];
  readonly steps: readonly Pick<PairTemplate, 'question' | 'answer'>[];
  readonly options: readonly OptionTemplate[];
  readonly dialogs: readonly DialogTemplate[];
  readonly numbered: readonly NumberedTemplate[];
  readonly shown: readonly ShownTemplate[];
  readonly nextTurns: readonly NextTurnTemplate[];
  /** Between the texts of a few-shot document. */
  readonly joins: readonly string[];
}

const pair = (question: string, gap: string, answer: string, between = '\n\n'): PairTemplate => ({
  question,
  gap,
  answer,
  between,
});
const option = (lead: string, form: string, labels: OptionTemplate['labels'], between = '\n'): OptionTemplate => ({
  lead,
  option: form,
  labels,
  between,
});
const dialog = (lead: string, asks: string, says: string, between = '\n'): DialogTemplate => ({
  lead,
  question: asks === '' ? '{question}' : `${asks} {question}`,
  answer: says === '' ? '{answer}' : `${says} {answer}`,
  between,
});

/** The bank that is used unless another is given. */
export const pairTemplates: TemplateBank = {
  framed: 0.5,
  frames: [
    'Read this passage.\n\n{context}',
    'Here is a text to read:\n\n{context}',
    'Text: {context}',
    'Passage:\n{context}',
    'Context: {context}',
    'Reading\n\n{context}',
    'Study the following closely.\n{context}',
    'Source material:\n\n{context}',
    'Consider this excerpt:\n{context}',
    'Excerpt\n-------\n{context}',
    '"""\n{context}\n"""',
    '[Text]\n{context}\n[End of text]',
    'Please go through this before answering anything.\n\n{context}',
    'The article says:\n{context}',
    'Document:\n\n{context}',
    'What follows is the background for the questions below.\n\n{context}',
    'Take a minute to read:\n\n{context}',
    'Given:\n{context}',
    '# Text\n\n{context}',
    '## Background\n{context}',
    'Information: {context}',
    'An extract for comprehension.\n\n{context}',
    'Let us start from this text.\n\n{context}',
    'Notes\n{context}',
    'From the record:\n{context}',
    'Below is everything you need to know.\n\n{context}',
    'Read first, answer later.\n\n{context}',
    'Reference:\n{context}',
    'The following was written on the subject.\n{context}',
    'Material for today\n\n{context}',
    'Input:\n{context}',
    '<text>\n{context}\n</text>',
    'Here is what is known.\n{context}',
    'Look at this paragraph:\n\n{context}',
    'Page 1\n\n{context}',
    'Before the exercise, the text:\n\n{context}',
  ],
  led: 0.5,
  leads: [
    'Questions about the text:',
    'Answer with the help of the text.',
    'Now some questions.',
    'Let us see what was understood.',
    'Exercise',
    'Comprehension check',
    'Using only what was said above:',
    'Tasks on this passage:',
    'Q&A',
    'What can be told from it?',
    'Reply to each question below.',
    'With that in mind:',
    'The following can be answered from the passage.',
    '### Questions',
    'Test yourself.',
    'Questions and answers',
    'Here is what a reader might ask.',
    'From this we can answer:',
    'Review',
    'Give an answer to each of these.',
    'Instructions and replies:',
    'Quiz on the reading',
    'Check the facts.',
    'Let me ask a few things about it.',
    'For each task, the solution follows.',
    'Worked through:',
    'Ask and answer:',
    'Some things worth knowing:',
    'To sum up what matters:',
    'Study questions',
    'Use the information given.',
    'Follow the instructions.',
    '---',
    'Discussion',
    'Points to check',
    'After reading:',
  ],
  trailers: [
    'The text behind these answers:',
    'All of this comes from the following.',
    'Where it is written:',
    'Source:',
    'This is the passage that was asked about.',
    'Now the text itself.',
    'For reference:',
    'The answers can be found here:',
    'Original text',
    'Read more:',
    'Evidence:',
    'It is based on this:',
  ],
  pairs: [
    pair('{question}', '\n', '{answer}'),
    pair('{question}', ' ', '{answer}'),
    pair('{question}', '\n\n', '{answer}'),
    pair('{question}', ' ', '{answer}', '\n'),
    pair('Question: {question}', '\n', 'Answer: {answer}'),
    pair('Question: {question}', '\n', 'Answer: {answer}', '\n'),
    pair('Q: {question}', '\n', 'A: {answer}'),
    pair('Q: {question}', ' ', 'A: {answer}', '\n'),
    pair('Q. {question}', '\n', 'A. {answer}'),
    pair('Question:\n{question}', '\n', 'Answer:\n{answer}'),
    pair('Question:\n{question}', '\n\n', 'Answer:\n{answer}', '\n\n\n'),
    pair('QUESTION: {question}', '\n', 'ANSWER: {answer}'),
    pair('question: {question}', ' ', 'answer: {answer}', '\n'),
    pair('Task: {question}', '\n', 'Solution: {answer}'),
    pair('Task: {question}', '\n', 'Response: {answer}'),
    pair('Instruction: {question}', '\n', 'Response: {answer}'),
    pair('Instruction: {question}', '\n', 'Output: {answer}'),
    pair('### Instruction\n{question}', '\n\n', '### Response\n{answer}'),
    pair('### Question\n{question}', '\n', '### Answer\n{answer}'),
    pair('**{question}**', '\n', '{answer}'),
    pair('**Question:** {question}', '\n', '**Answer:** {answer}'),
    pair('- {question}', '\n  ', '{answer}', '\n'),
    pair('* {question}', ' -> ', '{answer}', '\n'),
    pair('{question}', ' => ', '{answer}', '\n'),
    pair('{question}', '\nThe answer is: ', '{answer}'),
    pair('{question}', '\nAnswer: ', '{answer}'),
    pair('{question}', '\n\nAnswer: ', '{answer}'),
    pair('Please answer: {question}', '\n', '{answer}'),
    pair('Answer this: {question}', '\n', '{answer}'),
    pair('Tell me: {question}', '\n', '{answer}'),
    pair('One may ask: {question}', '\n', 'The text tells: {answer}'),
    pair('Asked: {question}', '\n', 'Answered: {answer}'),
    pair('Prompt: {question}', '\n', 'Reply: {answer}'),
    pair('Problem: {question}', '\n', 'Solution: {answer}'),
    pair('[Q] {question}', '\n', '[A] {answer}', '\n'),
    pair('<question>{question}</question>', '\n', '<answer>{answer}</answer>', '\n'),
    pair('>> {question}', '\n', '{answer}'),
    pair('Reader: {question}', '\n', 'Text: {answer}'),
    pair('Based on the text: {question}', '\n', '{answer}'),
    pair('According to the passage, {question}', '\n', '{answer}'),
    pair('{question} (Answer from the text.)', '\n', '{answer}'),
    pair('In: {question}', '\n', 'Out: {answer}', '\n'),
  ],
  steps: [
    { question: "{question}\nLet's go step by step.", answer: '{steps}\nSo the answer is {answer}' },
    { question: '{question}\nExplain, then answer.', answer: '{steps}\nTherefore: {answer}' },
    { question: '{question}\nShow your reasoning.', answer: '{steps}\nFinal answer: {answer}' },
    { question: 'Think before you answer. {question}', answer: '{steps}\nThat gives {answer}' },
    { question: '{question} Give reasons.', answer: '{answer}\nReasons: {steps}' },
    { question: '{question}\nHow do you know?', answer: '{answer}\nBecause: {steps}' },
    { question: '{question}', answer: '{steps}\nHence {answer}' },
    { question: '{question}', answer: 'Reasoning: {steps}\nAnswer: {answer}' },
    { question: '{question}', answer: "Let's think. {steps}\nThe answer is {answer}" },
    { question: 'Reason through this: {question}', answer: '{steps}\nConclusion: {answer}' },
    { question: '{question}\nWork it out.', answer: 'Working: {steps}\nResult: {answer}' },
    { question: '{question}\nJustify your answer.', answer: '{answer}\nJustification: {steps}' },
  ],
  options: [
    option('Options:', '- {option}', '-'),
    option('Options:', '({label}) {option}', 'A'),
    option('Options:', '{label}. {option}', 'A'),
    option('Choices:', '{label}) {option}', 'A'),
    option('Choose one:', '{label}. {option}', '1'),
    option('Pick the right one.', '[{label}] {option}', '1'),
    option('Which of these?', '({label}) {option}', 'a'),
    option('Possible answers:', '{label}: {option}', 'A'),
    option('', '{label}. {option}', 'A'),
    option('', '({label}) {option}', 'A', ' '),
    option('Select:', '{label} - {option}', 'a'),
    option('Available answers:', '* {option}', '*'),
    option('One of:', '{option}', '-', '; '),
    option('Answer choices', '{label}) {option}', 'a'),
    option('OPTIONS', '{label}. {option}', '1'),
  ],
  dialogs: [
    dialog('', 'User:', 'Assistant:'),
    dialog('', 'Human:', 'Assistant:', '\n\n'),
    dialog('A student asks a teacher about the text.\n', 'Student:', 'Teacher:'),
    dialog('Two people talk about what they have read.\n', 'A:', 'B:'),
    dialog('Interview\n', 'Interviewer:', 'Guest:'),
    dialog('', '-', '-'),
    dialog('A conversation about it:\n', 'Anna:', 'Ben:'),
    dialog('At the library\n', 'Visitor:', 'Librarian:'),
    dialog('', 'Customer:', 'Agent:'),
    dialog('', 'Asker:', 'Answerer:'),
    dialog('Chat log\n', '<reader>', '<expert>'),
    dialog('', 'Q:', 'A:'),
    dialog('', 'Me:', 'Friend:'),
    dialog('The editor checks the facts with the author.\n', 'Editor:', 'Author:'),
    dialog('', 'Person 1:', 'Person 2:', '\n\n'),
    dialog('In class\n', 'Pupil:', 'Tutor:'),
    dialog('', '[user]', '[bot]'),
    dialog('Over the phone\n', 'Caller:', 'Clerk:'),
  ],
  numbered: [
    { questions: 'Questions:', question: '{number}. {question}', answers: 'Answers:', answer: '{number}. {answer}' },
    {
      questions: 'Answer the questions.',
      question: '({number}) {question}',
      answers: 'Solutions',
      answer: '({number}) {answer}',
    },
    { questions: '', question: 'Question {number}: {question}', answers: '', answer: 'Answer {number}: {answer}' },
    { questions: '', question: 'Q{number}: {question}', answers: '', answer: 'A{number}: {answer}' },
    { questions: 'Worksheet', question: '{number}) {question}', answers: 'Key', answer: '{number}) {answer}' },
    { questions: 'Tasks', question: '[{number}] {question}', answers: 'Results', answer: '[{number}] {answer}' },
    { questions: 'To do:', question: '{number} - {question}', answers: 'Done:', answer: '{number} - {answer}' },
    { questions: 'Test', question: 'Item {number}. {question}', answers: 'Marking guide', answer: 'Item {number}. {answer}' },
    { questions: '### Questions', question: '{number}. {question}', answers: '### Answers', answer: '{number}. {answer}' },
    { questions: 'Reply to all of them in order.', question: '{number}: {question}', answers: '', answer: '{number}: {answer}' },
    { questions: 'We ask:', question: '#{number} {question}', answers: 'We find:', answer: '#{number} {answer}' },
    { questions: 'Exam', question: 'No. {number} {question}', answers: 'Model answers', answer: 'No. {number} {answer}' },
  ],
  shown: [
    {
      lead: 'Some are done already.',
      question: 'Q: {question}',
      gap: '\n',
      answer: 'A: {answer}',
      test: 'Do the next one the same way.',
    },
    { lead: 'Examples', question: 'Question: {question}', gap: '\n', answer: 'Answer: {answer}', test: 'Your turn' },
    { lead: 'Here is how it is done.', question: '{question}', gap: '\n', answer: '{answer}', test: 'Now this one:' },
    { lead: 'Learn from these:', question: 'Input: {question}', gap: '\n', answer: 'Output: {answer}', test: 'Then solve:' },
    {
      lead: '',
      question: 'Example question: {question}',
      gap: '\n',
      answer: 'Example answer: {answer}',
      test: 'Question to answer:',
    },
    { lead: 'Solved cases:', question: '- {question}', gap: ' -> ', answer: '{answer}', test: 'Open case:' },
    { lead: 'Follow the pattern.', question: 'Task: {question}', gap: '\n', answer: 'Solution: {answer}', test: 'Next:' },
    { lead: 'The first answers are given.', question: '{question}', gap: ' ', answer: '{answer}', test: 'The last is:' },
    { lead: '### Examples', question: '{question}', gap: '\n', answer: '{answer}', test: '### Test' },
    { lead: 'Demonstrations:', question: 'Instruction: {question}', gap: '\n', answer: 'Response: {answer}', test: 'Query:' },
    { lead: 'As a warm-up:', question: '> {question}', gap: '\n', answer: '{answer}', test: 'And finally:' },
    { lead: 'Known:', question: '{question}', gap: ' = ', answer: '{answer}', test: 'Wanted:' },
  ],
  nextTurns: [
    { ...dialog('Read the conversation and give the next reply.\n', 'User:', 'Assistant:'), next: 'Reply:' },
    { ...dialog('So far they have said:\n', 'A:', 'B:'), next: 'Then A asks, and B says:' },
    { ...dialog('Transcript\n', 'Speaker 1:', 'Speaker 2:'), next: 'The transcript goes on:' },
    { ...dialog('What comes next in this talk?\n', 'Student:', 'Teacher:'), next: 'Next:' },
    { ...dialog('', 'Human:', 'Assistant:'), next: 'Continue.' },
    { ...dialog('History of the chat\n', '[user]', '[bot]'), next: 'New message' },
    { ...dialog('Earlier\n', 'Q:', 'A:'), next: 'Now' },
    { ...dialog('Given the dialogue:\n', '-', '-'), next: 'the next turn is' },
    { ...dialog('Complete the interview.\n', 'Interviewer:', 'Guest:'), next: 'Last question' },
    { ...dialog('A help desk\n', 'Customer:', 'Agent:'), next: 'The customer writes once more:' },
    { ...dialog('', 'Me:', 'Friend:'), next: 'And one more thing.' },
    { ...dialog('Minutes\n', 'Member:', 'Chair:'), next: 'Any other business' },
  ],
  joins: ['\n\n', '\n\n\n', '\n\n---\n\n', '\n\n***\n\n', '\n\n\n\n', '\n'],
};
