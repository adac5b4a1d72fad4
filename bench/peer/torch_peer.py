"""The peer of bench:peer: PyTorch + Transformers, one process per case, driven by JSON lines.

    {"cmd": "versions"}                                         -> {"torch": ..., "transformers": ..., "numpy": ..., "blas": ...}
    {"cmd": "init", "mode": "eager" | "compile", "task": "train" | "distill", "student": FOLDER, "teacher": FOLDER,
     "ids": [B][T], "threads": n, "learningRate": x, "betas": [x, x], "eps": x, "weightDecay": x}  -> {"ready": true}
    {"cmd": "run", "steps": n}                                  -> {"seconds": s, "loss": of the last step, "peak_rss_bytes": b}
    {"cmd": "reset_peak"}                                       -> {"reset": true | false}
    {"cmd": "gemm", "library": "torch" | "numpy", "m", "n", "k", "layout": "nt" | "nn" | "tn",
     "threads": n, "seconds": to measure}                       -> {"seconds": of one product, "runs": n}
    {"cmd": "exit"}

Between commands the process waits for input and does nothing.
Needs Python with torch 2.13 and transformers 5.18.
"""

import json
import os
import sys
import time

# Libraries may print; the answers keep the real stdout to themselves.
ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def answer(value):
    ANSWERS.write(json.dumps(value) + "\n")
    ANSWERS.flush()


def peak_rss_bytes():
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024


def reset_peak():
    """From now on VmHWM counts anew, so that the memory of compiling and warming up is not held against the peer."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        return True
    except OSError:
        return False


def versions():
    import numpy
    import torch
    import transformers

    blas = numpy.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "blas": f"{blas['name']} {blas['version']}",
        "mkl": torch.backends.mkl.is_available(),
    }


def load(folder, attention="eager"):
    import torch
    from transformers import Gemma2ForCausalLM

    return Gemma2ForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32)


def init(message):
    """Returns step(): one optimizer step, and the loss before it."""
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(message["threads"])
    torch.manual_seed(0)
    # Eager attention is the only one with soft-caps and a backward on the CPU.
    student = load(message["student"]).train()
    ids = torch.tensor(message["ids"])
    parameters = list(student.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": message["weightDecay"]},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=message["learningRate"],
        betas=tuple(message["betas"]),
        eps=message["eps"],
        fused=True,
    )

    if message["task"] == "train":

        def loss_of(ids):
            return student(input_ids=ids, labels=ids, use_cache=False).loss

    else:
        # Where no gradient is needed and everything is compiled, FlexAttention works on the CPU too, and is faster.
        attention = "flex_attention" if message["mode"] == "compile" else "eager"
        teacher = load(message["teacher"], attention).eval().requires_grad_(False)

        def loss_of(ids):
            with torch.no_grad():
                target = F.log_softmax(teacher(input_ids=ids, use_cache=False).logits, dim=-1)
            log_q = F.log_softmax(student(input_ids=ids, use_cache=False).logits, dim=-1)
            return F.kl_div(log_q.flatten(0, 1), target.flatten(0, 1), reduction="batchmean", log_target=True)

    if message["mode"] == "compile":
        loss_of = torch.compile(loss_of)

    def step():
        loss = loss_of(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def run(step, steps):
    start = time.perf_counter()
    for _ in range(steps):
        loss = step()
    value = loss.item()
    return {"seconds": time.perf_counter() - start, "loss": value, "peak_rss_bytes": peak_rss_bytes()}


def gemm(message):
    """Seconds of one product C[m n] = A B with A[m k], B[k n], each stored so that the layout's transposes are free views."""
    m, n, k, layout = (message[key] for key in ("m", "n", "k", "layout"))
    a_shape = (k, m) if layout[0] == "t" else (m, k)
    b_shape = (n, k) if layout[1] == "t" else (k, n)
    if message["library"] == "torch":
        import torch

        torch.set_num_threads(message["threads"])
        a, b, out = torch.randn(a_shape), torch.randn(b_shape), torch.empty(m, n)
        a, b = a.t() if layout[0] == "t" else a, b.t() if layout[1] == "t" else b
        product = lambda: torch.mm(a, b, out=out)
    else:
        import numpy

        random = numpy.random.default_rng(0)
        a, b = (random.standard_normal(shape, dtype=numpy.float32) for shape in (a_shape, b_shape))
        out = numpy.empty((m, n), numpy.float32)
        a, b = a.T if layout[0] == "t" else a, b.T if layout[1] == "t" else b
        product = lambda: numpy.matmul(a, b, out=out)

    product()
    times = []
    end = time.perf_counter() + message["seconds"]
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        product()
        times.append(time.perf_counter() - start)
    return {"seconds": sorted(times)[len(times) // 2], "runs": len(times)}


def main():
    step = None
    for line in sys.stdin:
        message = json.loads(line)
        try:
            match message["cmd"]:
                case "versions":
                    answer(versions())
                case "init":
                    step = init(message)
                    answer({"ready": True})
                case "run":
                    answer(run(step, message["steps"]))
                case "reset_peak":
                    answer({"reset": reset_peak()})
                case "gemm":
                    answer(gemm(message))
                case "exit":
                    return
        except Exception as error:
            answer({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
