// How far a student's distribution q is from a teacher's p.
import { ConfigError } from '../tensor/errors.ts';

/**
 * A divergence D(p, q) of teacher p and student q, in nats. All are 0 when q = p.
 *
 * | kind | D | defaults | from |
 * |---|---|---|---|
 * | `forward_kl` | KL(p ‖ q): q covers p | | Hinton et al., arXiv 1503.02531 |
 * | `reverse_kl` | KL(q ‖ p): q keeps to modes of p | | Gu et al., MiniLLM, arXiv 2306.08543 |
 * | `jsd` | β KL(p ‖ m) + (1−β) KL(q ‖ m), m = β p + (1−β) q | β 0.5 | Agarwal et al., GKD, arXiv 2306.13649 |
 * | `skew_forward_kl` | KL(p ‖ α p + (1−α) q) | α 0.1 | Ko et al., DistiLLM, arXiv 2402.03898 |
 * | `skew_reverse_kl` | KL(q ‖ (1−α) p + α q) | α 0.1 | the same |
 * | `total_variation` | ½ Σ \|p − q\| | | Wen et al., arXiv 2307.15190 |
 * | `alpha_beta` | Σ (α/(α+β) p^(α+β) + β/(α+β) q^(α+β) − p^α q^β) / (α β) | α 0.2, β 0.7 | Wang et al., ABKD, arXiv 2505.04560 |
 * | `adaptive` | h KL(p ‖ q) + (1−h) KL(q ‖ p), h the share of Σ \|p − q\| in the teacher's likeliest tokens, up to `mass` | mass 0.5 | Wu et al., arXiv 2404.02657 |
 *
 * `jsd` with β = 0 is the forward KL and with β = 1 the reverse KL, as is usual; but its value tends to 0 as β tends to either, so
 * that a learning rate found at one end does not carry over to the inside. `alpha_beta` with (1, 0) is the forward and with (0, 1)
 * the reverse KL, its limits. The weights of `adaptive` are held fixed in its gradient.
 */
export type Divergence =
  | { readonly kind: 'forward_kl' | 'reverse_kl' | 'total_variation' }
  | { readonly kind: 'jsd'; readonly beta?: number }
  | { readonly kind: 'skew_forward_kl' | 'skew_reverse_kl'; readonly alpha?: number }
  | { readonly kind: 'alpha_beta'; readonly alpha?: number; readonly beta?: number }
  | { readonly kind: 'adaptive'; readonly mass?: number };

/** Numbers that the kernels know. */
const codes = {
  forward_kl: 0,
  reverse_kl: 1,
  jsd: 2,
  skew_forward_kl: 3,
  skew_reverse_kl: 4,
  total_variation: 5,
  alpha_beta: 6,
  adaptive: 7,
} as const;

/** The names of all divergences. */
export const divergenceKinds = Object.keys(codes) as readonly Divergence['kind'][];

/**
 * @internal The kernel's number of a divergence, and its one or two parameters.
 * @throws ConfigError when the kind is unknown or a parameter is out of range.
 */
export function divergenceCode(op: string, divergence: Divergence): readonly [code: number, param: number, param2: number] {
  switch (divergence.kind) {
    case 'jsd': {
      const { beta = 0.5 } = divergence;
      check(op, 'divergence.beta', beta, beta >= 0 && beta <= 1, 'from 0 to 1');
      return beta === 0 ? [codes.forward_kl, 0, 0] : beta === 1 ? [codes.reverse_kl, 0, 0] : [codes.jsd, beta, 0];
    }
    case 'skew_forward_kl':
    case 'skew_reverse_kl': {
      const { alpha = 0.1 } = divergence;
      check(op, 'divergence.alpha', alpha, alpha > 0 && alpha < 1, 'between 0 and 1');
      return [codes[divergence.kind], alpha, 0];
    }
    case 'alpha_beta': {
      const { alpha = 0.2, beta = 0.7 } = divergence;
      if (alpha === 1 && beta === 0) return [codes.forward_kl, 0, 0];
      if (alpha === 0 && beta === 1) return [codes.reverse_kl, 0, 0];
      check(op, 'divergence.alpha', alpha, alpha > 0 && alpha < Number.POSITIVE_INFINITY, 'above 0, or 0 with beta 1');
      check(op, 'divergence.beta', beta, beta > 0 && beta < Number.POSITIVE_INFINITY, 'above 0, or 0 with alpha 1');
      return [codes.alpha_beta, alpha, beta];
    }
    case 'adaptive': {
      const { mass = 0.5 } = divergence;
      check(op, 'divergence.mass', mass, mass > 0 && mass < 1, 'between 0 and 1');
      return [codes.adaptive, mass, 0];
    }
    default:
      check(op, 'divergence.kind', divergence.kind, divergence.kind in codes, `one of ${divergenceKinds.join(', ')}`);
      return [codes[divergence.kind], 0, 0];
  }
}

/** @internal Refuses an option unless `ok`. */
export function check(op: string, argument: string, value: unknown, ok: boolean, expected: string): void {
  if (ok) return;
  throw new ConfigError(`${op}: ${argument} is ${value}, expected ${expected}`, {
    code: 'ERR_CONFIG',
    op,
    argument,
    expected,
    actual: String(value),
  });
}
