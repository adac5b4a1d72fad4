"""Makes adamw.json: torch.optim.AdamW with clip_grad_norm_ on a few small parameters, in float64 and float32.

Each step: "gradients" as given (before the clip), "norm" of all of them together, then "parameters" after the update. The clip
multiplies by clip / (norm + 1e-6) where that is below 1. Needs Python with torch 2.13.
"""

import json
from pathlib import Path

import torch

SIZES = (1, 5, 17)
STEPS = 6


def run(dtype, start, gradients, clip, options):
    parameters = [torch.nn.Parameter(p.to(dtype, copy=True)) for p in start]
    optimizer = torch.optim.AdamW(parameters, **options)
    steps = []
    for step in gradients:
        for p, g in zip(parameters, step):
            p.grad = g.to(dtype)
        norm = torch.nn.utils.clip_grad_norm_(parameters, torch.inf if clip is None else clip)
        optimizer.step()
        steps.append({"norm": norm.item(), "parameters": [p.tolist() for p in parameters]})
    return steps


def main():
    torch.manual_seed(5)
    start = [torch.randn(n) for n in SIZES]
    # Sizes over six orders of magnitude, so that eps and the clip both matter; one step of zeros.
    gradients = [[torch.randn(n) * scale for n in SIZES] for scale in (1.0, 1e-5, 100.0, 0.0, 0.1, 1e-8)]
    cases = []
    for clip, options in (
        (1.0, dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)),
        (None, dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0)),
    ):
        exact = run(torch.float64, start, gradients, clip, options)
        single = run(torch.float32, start, gradients, clip, options)
        far = max(
            (torch.tensor(a) - torch.tensor(b)).abs().max().item()
            for x, y in zip(exact, single)
            for a, b in zip(x["parameters"], y["parameters"])
        )
        print(f"clip {clip}: float32 is within {far:.1e} of float64")
        cases.append({"clip": clip, **{**options, "betas": list(options["betas"])}, "float64": exact, "float32": single})
    data = {
        "start": [p.tolist() for p in start],
        "gradients": [[g.tolist() for g in step] for step in gradients],
        "cases": cases,
    }
    path = Path(__file__).with_name("adamw.json")
    path.write_text(json.dumps(data) + "\n")
    print(f"{path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
