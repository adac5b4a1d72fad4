"""FlexAttention and torch.compile at the shapes of bench/gpu.ts, one JSON object a line: {op, shape, ms, name}.

Medians of CUDA events, random data, everything compiled and warm."""
import json
import statistics
import sys

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 else 10
T = 8192
torch.manual_seed(0)


def random(*shape, std=1.0):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * std


def median_ms(f):
    for _ in range(3):
        f()
    times = []
    for _ in range(ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        f()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def say(op, shape, ms, name):
    print(json.dumps({"op": op, "shape": shape, "ms": ms, "name": f"{name} {torch.__version__}"}), flush=True)


def attention(h, g, d, window):
    q, k, v = (random(1, n, T, d).requires_grad_() for n in (h, g, g))
    dy = random(1, h, T, d)

    def score(s, b, head, i, j):
        return 50.0 * torch.tanh(s / 50.0)

    def seen(b, head, i, j):
        return (i >= j) if window is None else ((i >= j) & (i - j < window))

    mask = create_block_mask(seen, None, None, T, T, device="cuda")
    flex = torch.compile(flex_attention)
    run = lambda: flex(q, k, v, score_mod=score, block_mask=mask, enable_gqa=True)
    shape = f"1x{T} h{h}/{g} d{d} window {'none' if window is None else window} cap 50"
    say("attention", shape, median_ms(run), "FlexAttention, torch")
    y = run()
    say("attention_backward", shape, median_ms(lambda: torch.autograd.grad(y, (q, k, v), dy, retain_graph=True)), "FlexAttention, torch")


def capped(x, w):
    return 30.0 * torch.tanh((x @ w.t()).float() / 30.0)


def chunked(loss, n, chunk=1024):
    """Sums loss(from, to) over chunks of tokens whose logits are made again in the backward pass."""
    total = 0.0
    for i in range(0, n, chunk):
        total = total + torch.utils.checkpoint.checkpoint(loss, i, min(n, i + chunk), use_reentrant=False)
    return total / n


def heads(c, e, v):
    x, w = random(T, c).requires_grad_(), random(v, c, std=c**-0.5).requires_grad_()
    tx, tw = random(T, e), random(v, e, std=e**-0.5)
    targets = torch.arange(T, device="cuda") * 7919 % v

    def cross_entropy(i, j):
        return torch.nn.functional.cross_entropy(capped(x[i:j], w), targets[i:j], reduction="sum")

    def distill(i, j):
        p = torch.log_softmax(capped(tx[i:j], tw), -1).detach()
        return torch.nn.functional.kl_div(torch.log_softmax(capped(x[i:j], w), -1), p, reduction="sum", log_target=True)

    for op, loss, shape in (
        ("linear_cross_entropy", cross_entropy, f"{T}x{c}, vocabulary {v}"),
        ("linear_distill", distill, f"{T}x{c}, vocabulary {v}, teacher {e}"),
    ):
        compiled = torch.compile(loss)

        def step():
            x.grad = w.grad = None
            chunked(compiled, T).backward()

        say(op, shape, median_ms(step), "torch.compile, torch")


for h, g, d in ((8, 4, 256), (16, 8, 256), (32, 16, 128)):
    for window in (None, 4096):
        attention(h, g, d, window)
heads(2304, 4608, 256000)
