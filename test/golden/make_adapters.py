"""Makes adapters/: adapters that PEFT wrote for the Gemma 2 of gemma2/, and for the GPT-2 and the Phi-3 of architectures/, whose joint
matrices (c_attn, qkv_proj, gate_up_proj) are several of ours, and what it computes with them, in float32.

    NAME                       adapter_config.json and adapter_model.safetensors, as save_pretrained writes them
    expected.safetensors       input_ids, and logits by the name of each adapter
    python make_adapters.py check FOLDER [BASE]    loads the adapter FOLDER of ours with PEFT beside BASE (gemma2, gpt2 or phi3; default gemma2)
                                                   and compares its logits with FOLDER/logits.safetensors

Each must move the logits, or the fixture would prove nothing. Needs Python with torch 2.13, transformers 5.18 and peft 0.21.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
FOLDER = HERE / "adapters"
ADAPTERS = {
    "lora": dict(r=3, lora_alpha=5, target_modules="all-linear"),
    "rslora": dict(r=4, lora_alpha=3, target_modules=["q_proj", "v_proj"], use_rslora=True),
    "dora": dict(r=2, lora_alpha=4, target_modules=["k_proj", "down_proj", "gate_proj"], use_dora=True),
    "patterns": dict(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj", "up_proj"],
        rank_pattern={"q_proj": 2, r"layers\.[01]\.mlp\.up_proj": 4},
        alpha_pattern={"model.layers.1.self_attn.q_proj": 9},
    ),
    "gpt2": dict(
        r=3, lora_alpha=5, target_modules="all-linear", rank_pattern={"attn.c_attn": 2}, alpha_pattern={"mlp.c_proj": 7}, fan_in_fan_out=True
    ),
    "gpt2dora": dict(r=2, lora_alpha=3, target_modules=["c_attn", "c_fc"], use_dora=True, fan_in_fan_out=True),
    "phi3": dict(r=4, lora_alpha=3, target_modules=["qkv_proj", "gate_up_proj"], use_rslora=True, alpha_pattern={"^model.layers.0.*": 6}),
}
BASES = {"gemma2": HERE / "gemma2", "gpt2": HERE / "architectures" / "gpt2", "phi3": HERE / "architectures" / "phi3"}


def base_of(name):
    return next((base for base in BASES if name.startswith(base)), "gemma2")


def base(name):
    return AutoModelForCausalLM.from_pretrained(BASES[name], attn_implementation="eager", dtype=torch.float32).eval()


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def make():
    ids = load_file(HERE / "gemma2" / "expected.safetensors")["input_ids"]
    ids = ids % 96  # below all vocabularies
    expected = {"input_ids": ids.to(torch.int32)}
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        torch.manual_seed(seed)
        before = logits_of(base(base_of(name)), ids)
        model = get_peft_model(base(base_of(name)), LoraConfig(task_type="CAUSAL_LM", **options)).eval()
        for key, p in model.named_parameters():
            if "lora_A" in key or "lora_B" in key:
                p.data.normal_(0, 0.25)
            elif "lora_magnitude" in key:
                p.data.mul_(1 + 0.3 * torch.randn_like(p))
        expected[name] = logits_of(model, ids)
        moved = (expected[name] - before).abs().max().item()
        print(f"{name}: logits move by up to {moved:.3f}")
        assert moved > 0.1
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        model.save_pretrained(FOLDER / name)
        config = FOLDER / name / "adapter_config.json"
        saved = json.loads(config.read_text()) | {"base_model_name_or_path": None}  # a path of this machine
        config.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")
        (FOLDER / name / "README.md").unlink(missing_ok=True)
    save_file(expected, FOLDER / "expected.safetensors")


def check(folder, name="gemma2"):
    ours = load_file(Path(folder) / "logits.safetensors")
    model = PeftModel.from_pretrained(base(name), folder).eval()
    theirs = logits_of(model, ours["input_ids"].long())
    off = (theirs - ours["logits"]).abs().max().item()
    print(f"{folder}: largest difference {off:.2e}, moved by {(theirs - logits_of(base(name), ours['input_ids'].long())).abs().max().item():.3f}")
    assert off < 1e-4


if sys.argv[1:2] == ["check"]:
    check(*sys.argv[2:])
else:
    make()
