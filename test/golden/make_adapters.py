"""Makes adapters/: three adapters that PEFT wrote for the Gemma 2 of gemma2/, and what it computes with them, in float32.

    lora, rslora, dora         adapter_config.json and adapter_model.safetensors, as save_pretrained writes them
    expected.safetensors       input_ids, and logits by the name of each adapter
    python make_adapters.py check FOLDER    loads the adapter FOLDER of ours with PEFT and compares its logits with FOLDER/logits.safetensors

Each must move the logits, or the fixture would prove nothing. Needs Python with torch 2.13, transformers 5.18 and peft 0.21.
"""

import shutil
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Gemma2ForCausalLM

HERE = Path(__file__).parent
FOLDER = HERE / "adapters"
ADAPTERS = {
    "lora": dict(r=3, lora_alpha=5, target_modules="all-linear"),
    "rslora": dict(r=4, lora_alpha=3, target_modules=["q_proj", "v_proj"], use_rslora=True),
    "dora": dict(r=2, lora_alpha=4, target_modules=["k_proj", "down_proj", "gate_proj"], use_dora=True),
}


def base():
    return Gemma2ForCausalLM.from_pretrained(HERE / "gemma2", attn_implementation="eager", dtype=torch.float32).eval()


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def make():
    ids = load_file(HERE / "gemma2" / "expected.safetensors")["input_ids"]
    before = logits_of(base(), ids)
    expected = {"input_ids": ids.to(torch.int32)}
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        torch.manual_seed(seed)
        model = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", **options)).eval()
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
        model.peft_config["default"].base_model_name_or_path = None  # a path of this machine
        model.save_pretrained(FOLDER / name)
        (FOLDER / name / "README.md").unlink(missing_ok=True)
    save_file(expected, FOLDER / "expected.safetensors")


def check(folder):
    ours = load_file(Path(folder) / "logits.safetensors")
    model = PeftModel.from_pretrained(base(), folder).eval()
    theirs = logits_of(model, ours["input_ids"].long())
    off = (theirs - ours["logits"]).abs().max().item()
    print(f"{folder}: largest difference {off:.2e}, moved by {(theirs - logits_of(base(), ours['input_ids'].long())).abs().max().item():.3f}")
    assert off < 1e-4


if len(sys.argv) == 3 and sys.argv[1] == "check":
    check(sys.argv[2])
else:
    make()
