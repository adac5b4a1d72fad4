"""Writes dtypes.safetensors with the reference implementation, one tensor of each dtype that limbeck reads.

    LIMBECK_PEER_PYTHON test/golden/make_safetensors.py [FILE]     makes the fixture (or FILE)
    LIMBECK_PEER_PYTHON test/golden/make_safetensors.py --check FILE     exits 0 if FILE holds exactly these tensors

Needs Python with torch 2.13 and safetensors.
"""

import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

FLOATS = [0.0, -0.0, 1.0, -2.5, 1 / 3, 65504.0, 6e-8, float("inf"), float("-inf"), float("nan")]
METADATA = {"format": "pt", "note": 'quotes " and ü'}
TENSORS = {
    "f64": torch.tensor(FLOATS, dtype=torch.float64),
    "f32": torch.tensor(FLOATS, dtype=torch.float32).reshape(2, 5),
    "f16": torch.tensor(FLOATS, dtype=torch.float16),
    "bf16": torch.tensor(FLOATS, dtype=torch.bfloat16),
    "i64": torch.tensor([-(2**63), 2**53 + 1, 7]),
    "i32": torch.tensor([[-(2**31)], [2**31 - 1]], dtype=torch.int32),
    "i16": torch.tensor([-32768, 32767], dtype=torch.int16),
    "i8": torch.tensor([-128, 127], dtype=torch.int8),
    "u8": torch.arange(3, dtype=torch.uint8),
    "bool": torch.tensor([True, False, True]),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "10": torch.ones(1),
    'na"me \\ é': torch.ones(2),
}


def check(path):
    with safe_open(path, "pt") as file:
        assert file.metadata() == METADATA, file.metadata()
        assert set(file.keys()) == set(TENSORS), file.keys()
        for name, tensor in TENSORS.items():
            got = file.get_tensor(name)
            assert got.dtype == tensor.dtype and got.shape == tensor.shape, (name, got)
            assert got.contiguous().view(torch.uint8).tolist() == tensor.contiguous().view(torch.uint8).tolist() if got.ndim else got == tensor, name


if __name__ == "__main__":
    if sys.argv[1:2] == ["--check"]:
        check(sys.argv[2])
    else:
        path = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("dtypes.safetensors")
        save_file(TENSORS, path, metadata=METADATA)
        check(path)
