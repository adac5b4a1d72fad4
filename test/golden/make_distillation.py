"""Makes distillation.json: distillation losses and their gradients from float64 autograd.

Inputs: student and teacher logits [3 x 11] before any cap, one set of ordinary size and one of large numbers. Each case:
cap both (cap tanh(u / cap)), divide by the temperature, softmax to q (student) and p (teacher). "loss" is one number per row, without
the T squared factor; "gradient" is the derivative of the sum of rows by the student's logits before the cap.

    forward_kl KL(p|q), reverse_kl KL(q|p), jsd b KL(p|m) + (1-b) KL(q|m) with m = b p + (1-b) q,
    skew_forward_kl KL(p | a p + (1-a) q), skew_reverse_kl KL(q | (1-a) p + a q), cross_entropy -log q[label],
    forward_kl_top4: the teacher's 4 likeliest tokens and one bucket for the rest of both.

Needs Python with torch 2.13.
"""

import json
import math
from pathlib import Path

import torch

ROWS, VOCABULARY = 3, 11
LABELS = torch.tensor([4, 0, 10])


def kl(a, b):
    """KL(a|b) from log-probabilities; a term with a = 0 is 0."""
    return (a.exp() * (a - b)).sum(-1)


def mix(a, weight, b):
    """log(weight e^a + (1 - weight) e^b)"""
    return torch.logaddexp(a + math.log(weight), b + math.log1p(-weight))


def jsd(q, p, beta):
    m = mix(p, beta, q)
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def log_rest(logp, ids):
    """log of the probability of all tokens but `ids`, without cancellation."""
    return logp.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)


def top(q, p, k):
    ids = p.topk(k).indices
    with_rest = lambda x: torch.cat([x.gather(-1, ids), log_rest(x, ids)], -1)
    return kl(with_rest(p), with_rest(q))


LOSSES = {
    "forward_kl": ({}, lambda q, p: kl(p, q)),
    "reverse_kl": ({}, lambda q, p: kl(q, p)),
    "jsd_0.1": ({"beta": 0.1}, lambda q, p: jsd(q, p, 0.1)),
    "jsd_0.5": ({"beta": 0.5}, lambda q, p: jsd(q, p, 0.5)),
    "jsd_0.9": ({"beta": 0.9}, lambda q, p: jsd(q, p, 0.9)),
    "skew_forward_kl": ({"alpha": 0.1}, lambda q, p: kl(p, mix(p, 0.1, q))),
    "skew_reverse_kl": ({"alpha": 0.1}, lambda q, p: kl(q, mix(q, 0.1, p))),
    "cross_entropy": ({}, lambda q, p: -q.gather(-1, LABELS[:, None])[:, 0]),
    "forward_kl_top4": ({"k": 4}, lambda q, p: top(q, p, 4)),
}


def capped(u, cap):
    return u if cap is None else cap * torch.tanh(u / cap)


def rounded(t):
    if isinstance(t, list):
        return [rounded(x) for x in t]
    return float(f"{t:.12g}")


def check():
    """The published vector: z = [1, 2, -1, 0.5], teacher [0.5, 1.5, 0, -1]."""
    q, p = (torch.tensor(z, dtype=torch.float64).log_softmax(-1)[None] for z in ([1, 2, -1, 0.5], [0.5, 1.5, 0, -1]))
    for got, want in (
        (kl(p, q), 0.13149077),
        (kl(q, p), 0.10996714),
        (jsd(q, p, 0.1), 0.01128463),
        (jsd(q, p, 0.9), 0.00985832),
        (kl(p, mix(p, 0.1, q)), 0.09732796),
        (kl(q, mix(q, 0.1, p)), 0.08858454),
        (top(q, p, 2), 0.00091094),
    ):
        assert abs(got.item() - want) < 1e-8, (got, want)


def main():
    check()
    torch.manual_seed(4)
    sets = []
    for size, caps in ((2.0, (3.0, 5.0)), (40.0, (30.0, 50.0))):
        student, teacher = (torch.randn(ROWS, VOCABULARY, dtype=torch.float64).mul(size).float().double() for _ in range(2))
        cases = []
        for name, (options, loss) in LOSSES.items():
            for temperature in (1.0, 2.0):
                for student_cap, teacher_cap in ((None, None), caps):
                    u = student.clone().requires_grad_()
                    q = (capped(u, student_cap) / temperature).log_softmax(-1)
                    p = (capped(teacher, teacher_cap) / temperature).log_softmax(-1)
                    rows = loss(q, p)
                    (gradient,) = torch.autograd.grad(rows.sum(), u)
                    assert rows.isfinite().all() and gradient.isfinite().all(), name
                    cases.append(
                        {
                            "kind": name.split("_0.")[0],
                            **options,
                            "temperature": temperature,
                            "studentCap": student_cap,
                            "teacherCap": teacher_cap,
                            "loss": rounded(rows.tolist()),
                            "gradient": rounded(gradient.tolist()),
                        }
                    )
        sets.append({"student": student.tolist(), "teacher": teacher.tolist(), "labels": LABELS.tolist(), "cases": cases})
    path = Path(__file__).with_name("distillation.json")
    path.write_text(json.dumps(sets) + "\n")
    print(f"{sum(len(s['cases']) for s in sets)} cases, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
