// limbeck's side of bench:peer: the same protocol as torch_peer.py, over the public API of the built package.

import { readFileSync, writeFileSync } from 'node:fs';
import { createInterface } from 'node:readline';
import {
  createOptimizer,
  init,
  linearCrossEntropy,
  linearDistill,
  loadWeights,
  noGrad,
  op,
  reshape,
  scope,
  sync,
  tensor,
  valueAndGrad,
} from '../../dist/index.js';

const answer = (value) => process.stdout.write(`${JSON.stringify(value)}\n`);
const peak = () => Number(/^VmHWM:\s+(\d+)/m.exec(readFileSync('/proc/self/status', 'utf8'))[1]) * 1024;

function resetPeak() {
  try {
    writeFileSync('/proc/self/clear_refs', '5');
    return true;
  } catch {
    return false;
  }
}

/** Returns step(): queues one optimizer step and gives its loss, still on the device. */
async function prepare({ task, student: folder, teacher: teacherFolder, ids, learningRate, betas, eps, weightDecay }) {
  const student = await loadWeights(folder, { trainable: true });
  const optimizer = createOptimizer(student.parameters, {
    learningRate,
    beta1: betas[0],
    beta2: betas[1],
    eps,
    weightDecay,
    clip: null,
  });
  const [batch, length] = [ids.length, ids[0].length];
  const input = {
    ids: tensor(Int32Array.from(ids.flat()), [batch, length]),
    positions: tensor(Int32Array.from(ids.flatMap((row) => row.map((_, i) => i))), [batch, length]),
  };
  const rows = (x, width) => reshape(x, [-1, width]);

  let loss;
  if (task === 'train') {
    // The last token of a row has no next one.
    const targets = tensor(Int32Array.from(ids.flatMap((row) => [...row.slice(1), -100])));
    const weights = tensor(
      Float32Array.from(ids.flatMap((row) => row.map((_, i) => +(i + 1 < length) / (batch * (length - 1))))),
    );
    loss = () => {
      const hidden = rows(student.hidden(input), student.config.width);
      return linearCrossEntropy(hidden, student.head, targets, { weights, cap: student.config.finalCap }).total;
    };
  } else {
    const teacher = await loadWeights(teacherFolder);
    const weights = tensor(new Float32Array(batch * length).fill(1 / (batch * length)));
    loss = () => {
      const told = noGrad(() => scope(() => rows(teacher.hidden(input), teacher.config.width)));
      const hidden = rows(student.hidden(input), student.config.width);
      const from = { hidden: told, head: teacher.head, cap: teacher.config.finalCap };
      return linearDistill(hidden, student.head, { weights, cap: student.config.finalCap, teacher: from }).total;
    };
  }
  return () => {
    const value = valueAndGrad(loss);
    optimizer.step(learningRate).dispose();
    return value;
  };
}

async function run(step, steps) {
  const start = performance.now();
  let loss;
  for (let i = 0; i < steps; i++) {
    const value = step();
    loss = await value.item();
    value.dispose();
  }
  await sync();
  return { seconds: (performance.now() - start) / 1000, loss, peak_rss_bytes: peak() };
}

const forward = op({ forward: 'linear(x[* k], w[n k]:float, bias[n]?) -> y[* n]' });
const backward = op({ forward: 'linear_backward(dy[* n], x[* k], w[n k]:float) -> dx[* k], dw[n k]:f32, dbias[n]' });

/** Seconds of one product C[m n] = A[m k] B[k n], as `linear` (nt) or one of its gradients (nn: input, tn: weight) makes it. */
async function gemm({ layout, m, n, k, seconds }) {
  const random = (...shape) =>
    tensor(
      new Float32Array(shape[0] * shape[1]).map(() => Math.random() - 0.5),
      shape,
    );
  const product = {
    nt() {
      const [x, w] = [random(m, k), random(n, k)];
      return { inputs: [x, w], call: () => forward(x, w, undefined) };
    },
    nn() {
      const [dy, x, w] = [random(m, k), random(m, n), random(k, n)];
      return { inputs: [dy, x, w], call: () => backward(dy, x, w, { outputs: [true, false, false] }) };
    },
    tn() {
      const [dy, x, w] = [random(k, m), random(k, n), random(m, n)];
      return { inputs: [dy, x, w], call: () => backward(dy, x, w, { outputs: [false, true, false] }) };
    },
  }[layout]();
  const batch = async (count) => {
    const start = performance.now();
    for (let i = 0; i < count; i++) {
      scope(() => {
        product.call();
      });
    }
    await sync();
    return (performance.now() - start) / 1000 / count;
  };
  await batch(1);
  // Queued in batches of about 10 ms, since the device works through a queue while JavaScript waits.
  const count = Math.max(1, Math.round(0.01 / (await batch(1))));
  const times = [];
  const end = performance.now() + 1000 * seconds;
  while (times.length === 0 || performance.now() < end) times.push(await batch(count));
  for (const t of product.inputs) t.dispose();
  times.sort((a, b) => a - b);
  return { seconds: times[times.length >> 1], runs: times.length * count };
}

let step;
for await (const line of createInterface(process.stdin)) {
  const message = JSON.parse(line);
  try {
    if (message.cmd === 'init') {
      init({ threads: message.threads });
      if (message.task !== 'none') step = await prepare(message);
      answer({ ready: true });
    } else if (message.cmd === 'run') {
      answer(await run(step, message.steps));
    } else if (message.cmd === 'reset_peak') {
      answer({ reset: resetPeak() });
    } else if (message.cmd === 'gemm') {
      answer(await gemm(message));
    } else if (message.cmd === 'exit') {
      process.exit(0);
    }
  } catch (error) {
    answer({ error: `${error.name}: ${error.message}` });
  }
}
