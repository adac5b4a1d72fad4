"""Whether Transformers loads what limbeck saves, with the same logits. Prints the largest difference for each architecture.

    npx jiti test/golden/save_architectures.ts OUT && python test/golden/check_saved.py OUT
"""

import pathlib
import sys

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

GOLDEN = pathlib.Path(__file__).parent / "architectures"


@torch.no_grad()
def main(out):
    worst = 0.0
    for folder in sorted(pathlib.Path(out).iterdir()):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        wrong = {key: value for key, value in info.items() if value}
        assert not wrong, (folder.name, wrong)
        expected = load_file(GOLDEN / folder.name.split(".")[0] / "expected.safetensors")
        logits = model.eval()(expected["ids"].long()).logits
        difference = (logits - expected["logits"]).abs().max().item()
        worst = max(worst, difference)
        print(f"{folder.name:16} {type(model).__name__:24} {len(list(folder.glob('*.safetensors')))} file(s), differs by {difference:.1e}")
    assert worst < 1e-5, worst


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    main(sys.argv[1])
