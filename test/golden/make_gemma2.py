"""Makes gemma2/: a tiny random Gemma 2 and what Transformers computes with it, in float32.

    config.json, model.safetensors     as save_pretrained writes them
    expected.safetensors               input_ids and logits; loss (mean next-token cross-entropy) and "grad." + name for each parameter;
                                       packed.input_ids, packed.position_ids and packed.logits: two documents in one row
    training.json                      losses and gradient norms of 5 AdamW steps, each on its own batch

Every feature must bite, or the fixture would prove nothing: the script prints, and asserts, how far the logits move without it.
Needs Python with torch 2.13 and transformers 5.18.
"""

import copy
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import Gemma2Config, Gemma2ForCausalLM

FOLDER = Path(__file__).with_name("gemma2")
BATCH, LENGTH = 2, 24
DOCUMENTS = (9, 15)  # packed in one row; the second is longer than the window

CONFIG = dict(
    vocab_size=97,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    query_pre_attn_scalar=9,
    sliding_window=5,
    attn_logit_softcapping=2.0,
    final_logit_softcapping=3.0,
    max_position_embeddings=64,
    tie_word_embeddings=True,
    # A padding id would silence the gradient of its embedding row.
    pad_token_id=None,
    bos_token_id=2,
    eos_token_id=1,
)


def build(**changes):
    model = Gemma2ForCausalLM._from_config(
        Gemma2Config(**{**CONFIG, **changes}), attn_implementation="eager", dtype=torch.float32
    )
    return model.eval()


def randomize(model):
    for name, p in model.named_parameters():
        if "norm" in name:
            p.data.normal_(0, 0.3)
        elif "embed" in name:
            p.data.normal_(0, 0.6)
        else:
            # Scores of about 3 against a cap of 2.
            p.data.normal_(0, (1.5 if "self_attn" in name else 1) * p.shape[1] ** -0.5)


def next_token_loss(logits, ids):
    return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))


def forward(model, ids, **more):
    return model(input_ids=ids, use_cache=False, **more).logits


def check_features(model, ids, logits):
    changes = {
        "a window of the whole sequence": dict(sliding_window=LENGTH),
        "a window of one key more": dict(sliding_window=CONFIG["sliding_window"] + 1),
        "local and global layers exchanged": dict(layer_types=["full_attention", "sliding_attention"] * 2),
        "no attention cap": dict(attn_logit_softcapping=None),
        "no final cap": dict(final_logit_softcapping=None),
        "the query scaled by the head size": dict(query_pre_attn_scalar=CONFIG["head_dim"]),
    }
    for what, change in changes.items():
        other = build(**change)
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            moved = (forward(other, ids) - logits).abs().max().item()
        print(f"{what}: logits move by up to {moved:.3f}")
        assert moved > 0.05, what


def packed(model):
    ids = torch.randint(3, CONFIG["vocab_size"], (1, sum(DOCUMENTS)))
    # Transformers sees the packing in positions that start again, and masks accordingly.
    positions = torch.cat([torch.arange(n) for n in DOCUMENTS])[None]
    with torch.no_grad():
        logits = forward(model, ids, position_ids=positions)
        alone = torch.cat([forward(model, part) for part in ids.split(DOCUMENTS, dim=1)], dim=1)
        one = forward(model, ids)
    print(f"packed against alone: {(logits - alone).abs().max().item():.1e}")
    print(f"packed against one document: {(logits - one).abs().max().item():.3f}")
    assert (logits - alone).abs().max() < 1e-5 and (logits - one).abs().max() > 0.05
    return ids, positions, logits


def train(model, decay):
    optimizer_options = dict(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    clip = 1.0
    model = copy.deepcopy(model)
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if decay == "all" or p.ndim > 1]},
        {"params": [p for p in params if decay != "all" and p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], **optimizer_options)
    batches = torch.randint(3, CONFIG["vocab_size"], (5, BATCH, LENGTH), generator=torch.Generator().manual_seed(7))
    losses, norms = [], []
    for ids in batches:
        optimizer.zero_grad()
        loss = next_token_loss(forward(model, ids), ids)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(params, clip).item())
        optimizer.step()
        losses.append(loss.item())
    print(f"training, weight decay on {decay}: losses {losses}, gradient norms {norms}")
    with torch.no_grad():
        final = next_token_loss(forward(model, batches[0]), batches[0]).item()
    return {
        "decayed": decay,
        "optimizer": {**optimizer_options, "clip_norm": clip},
        "input_ids": batches.tolist(),
        "losses": losses,
        "gradient_norms": norms,
        "first_batch_after": final,
    }


def main():
    torch.manual_seed(20)
    torch.use_deterministic_algorithms(True)
    model = build()
    randomize(model)
    ids = torch.randint(3, CONFIG["vocab_size"], (BATCH, LENGTH))
    logits = forward(model, ids)
    loss = next_token_loss(logits, ids)
    loss.backward()
    check_features(model, ids, logits.detach())
    packed_ids, packed_positions, packed_logits = packed(model)
    expected = {
        "input_ids": ids.int(),
        "logits": logits.detach(),
        "loss": loss.detach(),
        "packed.input_ids": packed_ids.int(),
        "packed.position_ids": packed_positions.int(),
        "packed.logits": packed_logits,
        **{f"grad.{name}": p.grad for name, p in model.named_parameters()},
    }
    smallest = min((p.grad.norm().item(), name) for name, p in model.named_parameters())
    print(f"loss {loss.item():.6f}; smallest gradient norm {smallest[0]:.2e} ({smallest[1]})")
    assert smallest[0] > 1e-3

    model.zero_grad()
    model.save_pretrained(FOLDER)
    (FOLDER / "generation_config.json").unlink(missing_ok=True)
    save_file({name: t.contiguous() for name, t in expected.items()}, FOLDER / "expected.safetensors")
    (FOLDER / "training.json").write_text(json.dumps([train(model, "all"), train(model, "matrices")]) + "\n")
    for path in FOLDER.iterdir():
        path.chmod(0o644)
    print(f"{sum(p.stat().st_size for p in FOLDER.iterdir())} bytes in {FOLDER}")


if __name__ == "__main__":
    main()
