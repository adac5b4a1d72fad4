"""Writes test/golden/architectures: a tiny random checkpoint of each architecture, as Transformers saves it, and what it computes.

Each folder has config.json, the weights (in the file's own dtype, so that float32 arithmetic on them is exact to repeat), and
expected.safetensors: ids [1 T], logits [1 T V] in float32, and `greedy`, the 64 likeliest tokens after the ids.

    python test/golden/make_architectures.py [NAME ...]
"""

import json
import pathlib
import shutil
import sys

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

HERE = pathlib.Path(__file__).parent / "architectures"
VOCABULARY, LENGTH, NEW = 96, 40, 64

small = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)
longrope = dict(type="longrope", short_factor=[1.0, 1.1, 1.5], long_factor=[1.0, 3.0, 12.0])
cases = {
    "gemma": dict(model_type="gemma", **small | dict(head_dim=12)),
    "gemma2": dict(model_type="gemma2", **small, head_dim=12, sliding_window=8, query_pre_attn_scalar=10, attn_logit_softcapping=3.0,
                   final_logit_softcapping=6.0),
    # Five local layers and a global one, as in the published sizes; its rotary scaling holds for the global one only.
    "gemma3": dict(model_type="gemma3_text", **small | dict(num_hidden_layers=7, intermediate_size=36), head_dim=8, sliding_window=8,
                   query_pre_attn_scalar=10,
                   rope_parameters=dict(full_attention=dict(rope_type="linear", factor=4.0, rope_theta=1e6),
                                        sliding_attention=dict(rope_type="default", rope_theta=1e4))),
    "llama2": dict(model_type="llama", **small | dict(num_key_value_heads=4), rms_norm_eps=1e-5),
    "llama3": dict(model_type="llama", **small, tie_word_embeddings=True, attention_bias=True,
                   rope_parameters=dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                        original_max_position_embeddings=32)),
    "mistral": dict(model_type="mistral", **small, head_dim=12, sliding_window=8),
    "qwen2": dict(model_type="qwen2", **small | dict(num_hidden_layers=3), use_sliding_window=True, sliding_window=8, max_window_layers=1,
                  rope_parameters=dict(rope_type="default", rope_theta=1e6)),
    "qwen3": dict(model_type="qwen3", **small, head_dim=12, tie_word_embeddings=True,
                  rope_parameters=dict(rope_type="default", rope_theta=1e6)),
    "phi3": dict(model_type="phi3", **small, sliding_window=9),
    # Phi-4-mini's heads, turned in part, and LongRoPE: by the factors of long texts, and by those of short ones.
    "phi3long": dict(model_type="phi3", **small, partial_rotary_factor=0.75, original_max_position_embeddings=32, rope_scaling=longrope),
    "phi3short": dict(model_type="phi3", **small | dict(num_hidden_layers=1), original_max_position_embeddings=128,
                      rope_scaling=longrope | dict(short_factor=[1.0, 1.1, 1.5, 2.5], long_factor=[1.0, 1.5, 4.0, 12.0])),
    "smollm3": dict(model_type="smollm3", **small | dict(num_hidden_layers=4), no_rope_layer_interval=2),
    "gpt2": dict(model_type="gpt2", vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_inner=52, n_positions=128, bos_token_id=1,
                 eos_token_id=2),
}
dtypes = {"llama2": torch.float16, "gpt2": torch.float32}

# What must make a difference, or the fixture would prove nothing of it: changed settings, and whether it is seen in the first logits.
changes = {
    "gemma2": [dict(sliding_window=100), dict(attn_logit_softcapping=None), dict(final_logit_softcapping=None), dict(query_pre_attn_scalar=12)],
    "gemma3": [dict(sliding_window=100), dict(query_pre_attn_scalar=8), dict(rope_parameters=dict(
        full_attention=dict(rope_type="default", rope_theta=1e6), sliding_attention=dict(rope_type="default", rope_theta=1e4))),
        dict(rope_parameters=dict(full_attention=dict(rope_type="linear", factor=4.0, rope_theta=1e6),
                                  sliding_attention=dict(rope_type="default", rope_theta=1e6)))],
    "llama3": [dict(rope_parameters=dict(rope_type="default", rope_theta=5e5))],
    "mistral": [dict(sliding_window=None)],
    "qwen2": [dict(sliding_window=100), dict(layer_types=["sliding_attention"] * 3)],
    "phi3": [dict(sliding_window=None)],
    "phi3long": [dict(original_max_position_embeddings=128)],
    "smollm3": [dict(no_rope_layers=[1, 1, 1, 1])],
}


def load(folder, **changed):
    config = AutoConfig.from_pretrained(folder)
    for key, value in changed.items():
        setattr(config, key, value)
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def make(name, settings, seed):
    """Whether the greedy choices are clear and various enough with this seed."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    for parameter_name, p in model.named_parameters():
        # Norms and biases away from where they begin, so that a mistake with them shows.
        if p.dim() > 1:
            p.normal_(0, 0.15 if "embed" in parameter_name or "wte" in parameter_name else 0.3)
        else:
            p.add_(torch.randn_like(p) * 0.3)
    dtype = dtypes.get(name, torch.bfloat16)
    model.to(dtype)
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    # One of them in several files.
    model.save_pretrained(folder, **({"max_shard_size": "30KB"} if name == "qwen2" else {}))
    (folder / "generation_config.json").unlink(missing_ok=True)

    model = load(folder)
    ids = torch.randint(3, VOCABULARY, (1, LENGTH))
    logits = model(ids).logits
    greedy = model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)[:, LENGTH:]
    # The choices that were made, and by how much: a tie would make the test one of rounding.
    everything = model(torch.cat([ids, greedy], 1)).logits[0, LENGTH - 1 : -1]
    best = everything.topk(2).values
    if (everything.argmax(-1) != greedy[0]).any():
        return False
    margin = (best[:, 0] - best[:, 1]).min().item()
    distinct = len(set(greedy[0].tolist()))
    if margin < 2e-3 or distinct < 12:
        return False
    for changed in changes.get(name, []):
        moved = (load(folder, **changed)(ids).logits - logits).abs().max().item()
        assert moved > 1e-2, (name, changed, moved)
    save_file(dict(ids=ids.int(), logits=logits.contiguous(), greedy=greedy.int().contiguous()), folder / "expected.safetensors")
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{name:8} seed {seed:2} {size / 1024:4.0f} KB, logits' deviation {logits.std():.2f}, least margin {margin:.4f}, {distinct} tokens")
    return True


if __name__ == "__main__":
    # Some of them, by name, or all.
    names = sys.argv[1:] or list(cases)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    HERE.mkdir(exist_ok=True)
    for name in names:
        if not any(make(name, dict(cases[name]), seed) for seed in range(60)):
            raise SystemExit(f"{name}: no seed gives clear choices")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    (HERE / "versions.json").write_text(json.dumps(versions) + "\n")
