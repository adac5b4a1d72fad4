// Loss heads: from hidden states and the vocabulary matrix to a loss and its gradients, without the logits of all tokens.
// C is the width of the hidden states, V the vocabulary, `*` the tokens: any dims.
import { op } from '../tensor/op.ts';
import type { Tensor } from '../tensor/tensor.ts';
import { check, type Divergence, divergenceCode } from './divergence.ts';

const crossEntropy = op({
  head: true,
  forward:
    'linear_cross_entropy(x[* c], w[v c]:float, targets[*]:i32, weights[*]:f32?, cap, zloss) -> ' +
    'total[]:f32, loss[*]:f32, lse[*]:f32, correct[*]:f32, dx[* c]+, dw[v c]:f32+',
});
const distillation = op({
  head: true,
  forward:
    'linear_distill(x[* c], w[v c]:float, targets[*]:i32?, weights[*]:f32?, tx[* e]?, tw[v e]:float?, tlogits[* v]?, tids[* m]:i32?, ' +
    'tlogp[* m]:f32?, divergence, param, param2, temperature, cap, tcap, ce_weight, kd_weight, tail) -> ' +
    'total[]:f32, kd[*]:f32, ce[*]:f32, agree[*]:f32, dx[* c]+, dw[v c]:f32+',
});

export interface CrossEntropyOptions {
  /**
   * [*] What a token's loss counts in the total: 0 leaves it out at no cost, whatever its target; 1 / (number of tokens) makes a
   * mean. Default: the mean of all tokens.
   */
  readonly weights?: Tensor;
  /** Soft cap: logits are cap · tanh(u / cap). Default: none. */
  readonly cap?: number | null;
  /** Adds zLoss · lse² to a token's part of the total, which keeps the logits from drifting (PaLM, arXiv 2204.02311). Default 0. */
  readonly zLoss?: number;
  /** Also say for each token whether its target is the likeliest. Default false. */
  readonly accuracy?: boolean;
}

export interface CrossEntropy {
  /** [] Σ weight · (loss + zLoss · lse²): what valueAndGrad() may return. */
  readonly total: Tensor;
  /** [*] Nats of each token, not weighted; 0 where the weight is 0. */
  readonly loss: Tensor;
  /** [*] Log of the sum of exp(logit); 0 where the weight is 0. */
  readonly lse: Tensor;
  /** [*] 1 where the target is the likeliest token, else 0; with `accuracy` only. */
  readonly correct?: Tensor;
}

/**
 * Cross-entropy of next tokens straight from hidden states: loss = lse − logit[target] with logits = softcap(x wᵀ). The logits are
 * made for a few tokens at a time, and turned into the gradients of x and w in the same pass.
 * A loss head: its total must be what valueAndGrad() returns, alone or in a sum.
 * @param x [* C]
 * @param w [V C], f32 or bf16
 * @param targets [*], i32
 * @throws ShapeError or DTypeError when a tensor does not fit; ConfigError when an option is out of range; at the next read,
 *   DataError `ERR_TOKEN_RANGE` when a token that counts has a target outside the vocabulary.
 */
export function linearCrossEntropy(x: Tensor, w: Tensor, targets: Tensor, options: CrossEntropyOptions = {}): CrossEntropy {
  const { weights, cap = null, zLoss = 0, accuracy = false } = options;
  const c = capOf('linearCrossEntropy', 'cap', cap);
  check('linearCrossEntropy', 'zLoss', zLoss, Number.isFinite(zLoss), 'a finite number');
  const [total, loss, lse, correct] = crossEntropy(x, w, targets, weights, c, zLoss, { outputs: [true, true, true, accuracy] });
  return { total: total!, loss: loss!, lse: lse!, ...(accuracy ? { correct: correct! } : {}) };
}

/**
 * What a student learns from: hidden states with the teacher's own vocabulary matrix, logits, or the probabilities of a few tokens.
 */
export type TeacherOutput =
  | {
      /** [* E] */
      readonly hidden: Tensor;
      /** [V E], f32 or bf16 */
      readonly head: Tensor;
      /** Soft cap of the teacher's logits. Default: none. */
      readonly cap?: number | null;
    }
  | {
      /** [* V]; −∞ rules a token out. */
      readonly logits: Tensor;
      /** Soft cap that is still to be applied to them. Default: none. */
      readonly cap?: number | null;
    }
  | {
      /** [* M], i32: the tokens that were kept; below 0 for an empty place. */
      readonly ids: Tensor;
      /** [* M]: natural logarithms of their probabilities, after cap and temperature. */
      readonly logProbs: Tensor;
      /**
       * What stands for the other tokens. `bucket` (default): one more outcome with all that is left, on both sides. `renormalize`:
       * nothing, both sides are renormalised over the kept tokens. `truncate`: nothing, the loss is −Σ p log q over the kept tokens,
       * which is unbiased for sampled tokens (p = share of the samples; a token may come twice) and over-confident for the likeliest.
       */
      readonly tail?: 'bucket' | 'renormalize' | 'truncate';
    };

export interface DistillOptions {
  /** Where the targets come from. */
  readonly teacher: TeacherOutput;
  /** Default forward KL, the only one for a teacher of ids and log-probabilities. */
  readonly divergence?: Divergence;
  /** T: both sides' capped logits are divided by it before the softmax. Default 1. */
  readonly temperature?: number;
  /**
   * Multiply the divergence by T² in the total, so that its gradient keeps its size when T grows (Hinton et al., arXiv 1503.02531).
   * Default true. The values of each token are never multiplied.
   */
  readonly squaredTemperature?: boolean;
  /** Soft cap of the student's logits. Default: none. */
  readonly cap?: number | null;
  /** [*], i32: the next tokens of the text. Needed for a hardWeight above 0; if given, their cross-entropy is returned. */
  readonly targets?: Tensor;
  /** Share w of the text itself: (1 − w) divergence + w cross-entropy (at temperature 1). Default 0. */
  readonly hardWeight?: number;
  /** [*] What a token counts in the total; 0 leaves it out at no cost. Default: the mean of all tokens. */
  readonly weights?: Tensor;
  /** Also say for each token whether student and teacher have the same likeliest token. Default false. */
  readonly agreement?: boolean;
}

export interface Distillation {
  /** [] Σ weight · ((1 − w) T² divergence + w cross-entropy): what valueAndGrad() may return. */
  readonly total: Tensor;
  /** [*] The divergence of each token in nats, without weight and T²; 0 where the weight is 0. */
  readonly kl: Tensor;
  /** [*] Cross-entropy of each token in nats, not weighted; 0 where the weight is 0; with `targets` only. */
  readonly ce?: Tensor;
  /** [*] 1 where student and teacher agree on the likeliest token, else 0; with `agreement` only. */
  readonly agree?: Tensor;
}

const name = 'linearDistill';
const tails = { bucket: 0, renormalize: 1, truncate: 2 } as const;

/**
 * Distillation straight from hidden states: the divergence of the student's softmax(softcap(x wᵀ) / T) from the teacher's, token by
 * token, optionally mixed with the cross-entropy of the text. The logits of both are made for a few tokens at a time, and turned
 * into the gradients of x and w in the same pass. A loss head: its total must be what valueAndGrad() returns, alone or in a sum.
 * @param x [* C], the student's hidden states
 * @param w [V C], f32 or bf16, the student's vocabulary matrix
 * @throws ShapeError or DTypeError when a tensor does not fit; ConfigError when an option is out of range; at the next read,
 *   DataError when a token that counts has a target or a teacher's id outside the vocabulary (`ERR_TOKEN_RANGE`), an id twice
 *   (`ERR_TEACHER_TOKENS`), or teacher's probabilities that sum to more than 1 (`ERR_TEACHER_MASS`).
 */
export function linearDistill(x: Tensor, w: Tensor, options: DistillOptions): Distillation {
  const {
    teacher,
    divergence = { kind: 'forward_kl' },
    temperature = 1,
    squaredTemperature = true,
    targets,
    hardWeight = 0,
    agreement = false,
  } = options;
  const [code, param, param2] = divergenceCode(name, divergence);
  check(name, 'temperature', temperature, temperature > 0 && temperature < Number.POSITIVE_INFINITY, 'above 0');
  check(name, 'hardWeight', hardWeight, hardWeight >= 0 && hardWeight <= 1, 'from 0 to 1');
  check(
    name,
    'targets',
    'undefined',
    hardWeight === 0 || targets !== undefined,
    'the next tokens, because hardWeight is above 0',
  );
  const cap = capOf(name, 'cap', options.cap ?? null);
  const sparse = 'ids' in teacher ? teacher : undefined;
  const tail = sparse?.tail ?? 'bucket';
  check(name, 'teacher.tail', tail, tail in tails, `one of ${Object.keys(tails).join(', ')}`);
  check(
    name,
    'divergence.kind',
    divergence.kind,
    sparse === undefined || code === 0,
    'forward_kl, because the teacher gives ids and logProbs',
  );
  const [hidden, head] = 'hidden' in teacher ? [teacher.hidden, teacher.head] : [];
  const logits = 'logits' in teacher ? teacher.logits : undefined;
  const teacherCap = 'ids' in teacher ? 0 : capOf(name, 'teacher.cap', teacher.cap ?? null);

  // The kernel multiplies the divergence by T².
  const soft = (1 - hardWeight) / (squaredTemperature ? 1 : temperature * temperature);
  const given = [x, w, targets, options.weights, hidden, head, logits, sparse?.ids, sparse?.logProbs] as const;
  const [total, kl, ce, agree] = distillation(
    ...given,
    ...[code, param, param2, temperature, cap, teacherCap, hardWeight, soft, tails[tail]],
    { outputs: [true, true, targets !== undefined, agreement] },
  );
  return { total: total!, kl: kl!, ...(targets === undefined ? {} : { ce: ce! }), ...(agreement ? { agree: agree! } : {}) };
}

/** The kernels' form of a cap: 0 is none. */
function capOf(op: string, argument: string, cap: number | null): number {
  if (cap === null) return 0;
  check(op, argument, cap, cap > 0 && cap < Number.POSITIVE_INFINITY, 'a positive number, or null for none');
  return cap;
}
