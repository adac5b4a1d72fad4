// What the benchmarks of kernels run: each op with the operations it must do and the bytes it must move.
import {
  attention,
  attentionStep,
  cast,
  createOptimizer,
  createParameters,
  currentDevice,
  dot,
  embedding,
  empty,
  gatedLinear,
  geglu,
  linear,
  linearCrossEntropy,
  linearDistill,
  linearQuantized,
  matrix,
  noGrad,
  parameter,
  quantizeQ4,
  quantizeQ8,
  randomNormal_,
  rmsNorm,
  rmsNormAdd,
  rope,
  ropeTable,
  scope,
  type Tensor,
  tensor,
  topLogits,
  valueAndGrad,
  zeroGrad,
} from '../src/index.ts';

/** One kernel that is timed. */
export interface Part {
  readonly kernel: string;
  /** Useful floating-point operations; 0 for what only moves bytes. */
  readonly flops: number;
  /** Least bytes to read and write. */
  readonly bytes: number;
}

/** What runs together and is timed kernel by kernel. */
export interface Group {
  readonly shape: string;
  readonly parts: readonly Part[];
  readonly tensors: readonly Tensor[];
  run(): void;
}

let stream = 0;
/** Normal numbers in what the device computes in: f32 on the CPU, bf16 on a GPU. */
export function random(shape: readonly number[], std = 1): Tensor {
  const t = empty(shape);
  randomNormal_(t, 1, stream++, std);
  if (currentDevice() === 'cpu') return t;
  const narrow = cast(t, 'bf16');
  t.dispose();
  return narrow;
}

/** Bytes of one of these. */
const wide = (): number => (currentDevice() === 'cpu' ? 4 : 2);

const ids = (n: number, vocab: number): Tensor =>
  tensor(
    Int32Array.from({ length: n }, (_, i) => (i * 7919) % vocab),
    [n],
  );

/** Forward and backward with a dense gradient from behind. */
function both(
  shape: string,
  trained: readonly Tensor[],
  f: () => Tensor,
  parts: readonly Part[],
  constants: readonly Tensor[] = [],
): Group {
  for (const t of trained) parameter(t);
  const y = noGrad(f);
  const dy = random(y.shape);
  y.dispose();
  return {
    shape,
    parts,
    tensors: [...trained, ...constants, dy],
    run() {
      zeroGrad(trained);
      valueAndGrad(() => dot(f(), dy)).dispose();
    },
  };
}

/** B sequences of T tokens. */
export interface Tokens {
  readonly b: number;
  readonly t: number;
}

export function linearGroup({ b, t }: Tokens, k: number, n: number): Group {
  const rows = b * t;
  const [x, w] = [random([rows, k]), random([n, k], k ** -0.5)];
  const flops = 2 * rows * k * n;
  const bytes = wide() * (rows * k + k * n + rows * n);
  return both(`${rows}x${k} -> ${n}`, [x, w], () => linear(x, w), [
    { kernel: 'linear', flops, bytes },
    { kernel: 'linear_backward', flops: 2 * flops, bytes: 2 * bytes },
  ]);
}

export function gatedGroup({ b, t }: Tokens, f: number, n: number): Group {
  const rows = b * t;
  const [gate, up, w] = [random([rows, f]), random([rows, f]), random([n, f], f ** -0.5)];
  const flops = 2 * rows * f * n;
  const bytes = wide() * (2 * rows * f + f * n + rows * n);
  return both(`${rows}x${f} -> ${n}`, [gate, up, w], () => gatedLinear(gate, up, w, { activation: 'gelu' }), [
    { kernel: 'gated_linear', flops, bytes },
    { kernel: 'gated_linear_backward', flops: 2 * flops, bytes: 2 * bytes },
  ]);
}

export function attentionGroup({ b, t }: Tokens, h: number, g: number, d: number, window: number | null): Group {
  const [q, k, v] = [random([b, t, h, d]), random([b, t, g, d]), random([b, t, g, d])];
  let pairs = 0;
  for (let i = 0; i < t; i++) pairs += Math.min(i + 1, window ?? t);
  const useful = b * h * pairs * d;
  const bytes = wide() * b * t * d * (2 * h + 2 * g);
  return both(
    `${b}x${t} h${h}/${g} d${d} window ${window ?? 'none'} cap 50`,
    [q, k, v],
    () => attention(q, k, v, { cap: 50, window }),
    [
      { kernel: 'attention', flops: 4 * useful, bytes },
      { kernel: 'attention_backward', flops: 10 * useful, bytes: 2 * bytes },
    ],
  );
}

/** A token of each of B texts, with keys and values of T tokens in full rings: all of them are read once. */
export function stepGroup({ b, t }: Tokens, h: number, g: number, d: number): Group {
  const [q, key, value] = [random([b, 1, h, d]), random([b, 1, g, d]), random([b, 1, g, d])];
  const ring = { key: random([b, t, g, d]), value: random([b, t, g, d]) };
  const rows = ids(b, b);
  const positions = tensor(new Int32Array(b).fill(t), [b, 1]);
  return {
    shape: `${b} of ${t} h${h}/${g} d${d} cap 50`,
    parts: [{ kernel: 'attention_step', flops: 0, bytes: wide() * 2 * b * t * g * d }],
    tensors: [q, key, value, ring.key, ring.value, rows, positions],
    run() {
      scope(() => void attentionStep(q, { key, value }, ring, { cap: 50, rows, positions }));
    },
  };
}

/** A product of B tokens with weights of 8 and of 4 bits, as in a step of generation: the codes are read once. */
export function quantizedGroups(b: number, k: number, n: number): Group[] {
  const x = random([b, k]);
  return ([quantizeQ8, quantizeQ4] as const).map((quantize): Group => {
    const w = scope(() => quantize(random([n, k], k ** -0.5)));
    return {
      shape: `${b}x${k} -> ${n}`,
      parts: [{ kernel: `linear_${w.format}`, flops: 0, bytes: w.codes.size + 2 * w.scale.size + wide() * b * (k + n) }],
      tensors: [x, w.codes, w.scale],
      run() {
        scope(() => void linearQuantized(x, w));
      },
    };
  });
}

/** The largest logits of B texts. */
export function choiceGroup(b: number, v: number, k: number): Group {
  const logits = random([b, v]);
  const temperatures = tensor(new Float32Array(b).fill(0.8));
  return {
    shape: `${b}x${v}, ${k} largest`,
    parts: [{ kernel: 'top_logits', flops: 0, bytes: wide() * b * v }],
    tensors: [logits, temperatures],
    run() {
      scope(() => void topLogits(logits, temperatures, k));
    },
  };
}

export function movers({ b, t }: Tokens, c: number, h: number, d: number, f: number, v: number): Group[] {
  const rows = b * t;
  const size = wide() * rows * c;
  const token = ids(rows, v);
  const table = random([v, c]);
  const groups: Group[] = [];
  {
    const [x, w] = [random([rows, c]), random([c])];
    groups.push(
      both(`${rows}x${c}`, [x, w], () => rmsNorm(x, w, { offset: 1 }), [
        { kernel: 'rms_norm', flops: 0, bytes: 2 * size },
        { kernel: 'rms_norm_backward', flops: 0, bytes: 3 * size },
      ]),
    );
  }
  {
    const [x, w, residual] = [random([rows, c]), random([c]), random([rows, c])];
    groups.push(
      both(`${rows}x${c}`, [x, w, residual], () => rmsNormAdd(x, w, residual, { offset: 1 }), [
        { kernel: 'rms_norm_add', flops: 0, bytes: 3 * size },
        { kernel: 'rms_norm_add_backward', flops: 0, bytes: 3 * size },
      ]),
    );
  }
  groups.push(
    both(
      `${rows} of ${v}x${c}`,
      [table],
      () => embedding(token, table, { scale: 16 }),
      [
        { kernel: 'embedding', flops: 0, bytes: 2 * size },
        { kernel: 'embedding_backward', flops: 0, bytes: size + 4 * v * c },
      ],
      [token],
    ),
  );
  {
    const x = random([b, t, h, d]);
    const positions = tensor(
      Int32Array.from({ length: rows }, (_, i) => i % t),
      [b, t],
    );
    const angles = ropeTable(positions, { headSize: d });
    groups.push(
      both(
        `${b}x${t}x${h}x${d}`,
        [x],
        () => rope(x, angles),
        [
          { kernel: 'rope', flops: 0, bytes: 2 * wide() * rows * h * d },
          { kernel: 'rope_backward', flops: 0, bytes: 2 * wide() * rows * h * d },
        ],
        [positions, angles],
      ),
    );
  }
  {
    const [gate, up] = [random([rows, f]), random([rows, f])];
    groups.push(
      both(`${rows}x${f}`, [gate, up], () => geglu(gate, up), [
        { kernel: 'geglu', flops: 0, bytes: 3 * wide() * rows * f },
        { kernel: 'geglu_backward', flops: 0, bytes: 5 * wide() * rows * f },
      ]),
    );
  }
  return groups;
}

export function lossGroups(rows: number, c: number, e: number, v: number): Group[] {
  const [x, w, tx, tw] = [random([rows, c]), random([v, c], c ** -0.5), random([rows, e]), random([v, e], e ** -0.5)];
  const targets = ids(rows, v);
  const learned = [parameter(x), parameter(w)];
  const one = (kernel: string, products: number, f: () => Tensor): Group => ({
    shape: `${rows}x${c}, vocabulary ${v}${kernel.includes('distill') ? `, teacher ${e}` : ''}`,
    parts: [{ kernel, flops: products, bytes: 0 }],
    tensors: [x, w, tx, tw, targets],
    run() {
      zeroGrad(learned);
      valueAndGrad(f).dispose();
    },
  });
  return [
    one('linear_cross_entropy', 6 * rows * c * v, () => linearCrossEntropy(x, w, targets, { cap: 30 }).total),
    one(
      'linear_distill',
      6 * rows * c * v + 2 * rows * e * v,
      () => linearDistill(x, w, { cap: 30, teacher: { hidden: tx, head: tw, cap: 30 } }).total,
    ),
  ];
}

export function optimizerGroup(n: number, moments: 'f32' | '8bit' = 'f32'): Group {
  const parameters = createParameters({ w: matrix('w', [n], 0.02) }, { seed: 1 });
  const optimizer = createOptimizer(parameters, {
    learningRate: 1e-3,
    beta1: 0.9,
    beta2: 0.95,
    eps: 1e-8,
    weightDecay: 0.1,
    clip: 1,
    moments,
  });
  return {
    shape: `${n}`,
    parts: [
      { kernel: 'squared_norm', flops: 0, bytes: 4 * n },
      moments === 'f32' ? { kernel: 'adamw', flops: 0, bytes: 28 * n } : { kernel: 'adamw_8bit', flops: 0, bytes: 16 * n },
    ],
    tensors: [],
    run() {
      optimizer.step(1e-3).dispose();
    },
  };
}
