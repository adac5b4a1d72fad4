// Made-up but plausible runs for tests of what shows them.

import type { StartEvent, TrainEvent } from '../../src/train/events.ts';

export interface SyntheticRun {
  readonly name: string;
  readonly kind: StartEvent['kind'];
  readonly parameters: number;
  readonly steps: number;
  /** Validation loss that the run tends to. */
  readonly floor: number;
}

/** Events of a run: a power law with repeatable noise. */
export function syntheticEvents({ name, kind, parameters, steps, floor }: SyntheticRun): TrainEvent[] {
  const distills = kind === 'distill';
  let state = name.length;
  const noise = () => {
    state = (state * 1664525 + 1013904223) % 4294967296;
    return state / 4294967296 - 0.5;
  };
  const loss = (step: number) => floor + (9 - floor) * (1 + step / 8) ** -0.9;
  const tokens = (step: number) => step * 2048;
  const tokensPerSecond = 4e9 / parameters;
  const events: TrainEvent[] = [
    { type: 'start', kind, name, parameters, steps, tokens: tokens(steps), device: 'cpu', threads: 2, output: `runs/${name}` },
  ];
  for (let step = 1; step <= steps; step++) {
    const now = loss(step) + 0.25 * noise();
    events.push({
      type: 'step',
      step,
      tokens: tokens(step),
      loss: distills ? now - floor + 0.3 : now,
      learningRate: 2e-3 * Math.min(1, step / 20) * (0.55 + 0.45 * Math.cos((Math.PI * step) / steps)),
      gradientNorm: 0.8 + 6 / step + 0.3 * noise() + (step % 97 === 0 ? 4 : 0),
      tokensPerSecond: tokensPerSecond * (1 + 0.08 * noise()),
      seconds: 2048 / tokensPerSecond,
      memory: { live: 40 * parameters, peak: 52 * parameters, rss: 70 * parameters },
      etaSeconds: ((steps - step) * 2048) / tokensPerSecond,
      ...(distills ? { kl: now - floor + 0.3, ce: now } : {}),
    });
    if (step % Math.ceil(steps / 12) === 0 || step === steps) {
      const at = loss(step) + 0.02;
      events.push({
        type: 'evaluate',
        step,
        loss: at,
        perplexity: Math.exp(at),
        tokens: 50_000,
        seconds: 1.5,
        ...(name === 'teacher' ? {} : { kl: at - floor + 0.35, agreement: 0.62 - (at - floor) / 20 }),
      });
      events.push({
        type: 'sample',
        step,
        prompt: 'Fellow citizens of the Senate',
        text: ` and House of Representatives: the ${step} <b>measures</b> & the "peace" of our country have been continued with the \
greatest of the people, and in the public service which it is the duty of the Government to secure.`,
      });
      events.push({ type: 'checkpoint', step, path: `runs/${name}/checkpoints/${step}`, seconds: 0.3, bytes: 12 * parameters });
    }
  }
  const last = events.findLast((event) => event.type === 'evaluate');
  events.push({
    type: 'done',
    reason: 'finished',
    step: steps,
    tokens: tokens(steps),
    seconds: tokens(steps) / tokensPerSecond,
    ...(last ? { evaluation: last } : {}),
    checkpoint: `runs/${name}/checkpoints/${steps}`,
  });
  return events;
}

/** The headline experiment: a teacher, and a student trained on text and on the teacher. */
export const trio: readonly SyntheticRun[] = [
  { name: 'teacher', kind: 'pretrain', parameters: 2_900_000, steps: 400, floor: 3.6 },
  { name: 'student from scratch', kind: 'pretrain', parameters: 900_000, steps: 400, floor: 4.05 },
  { name: 'student distilled', kind: 'distill', parameters: 900_000, steps: 400, floor: 3.9 },
];
