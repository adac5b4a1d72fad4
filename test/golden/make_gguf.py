"""Writes gguf/types.gguf: metadata of every kind, and the same weights in every type that limbeck reads, quantised by llama.cpp's own
library; and gguf/types.safetensors: the values that the `gguf` package reads back from them.

    LIMBECK_PEER_PYTHON test/golden/make_gguf.py

Needs Python with gguf 0.19, numpy and safetensors, and test/peers installed (its node-llama-cpp brings libggml).
"""

import ctypes
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize
from gguf.constants import GGUFValueType
from safetensors.numpy import save_file

HERE = Path(__file__).parent
LIBRARY = HERE.parent / "peers/node_modules/@node-llama-cpp/linux-x64/bins/linux-x64/libggml-base.so"
TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
ROWS, COLUMNS = 3, 512


def weights():
    """Normal numbers; a row that is small, has a large one, zeros in blocks, and one sign only in others."""
    w = np.random.default_rng(7).normal(0, 0.04, (ROWS, COLUMNS)).astype(np.float32)
    w[1] *= 1e-3
    w[1, 300] = 1.5
    w[2, :64] = 0
    w[2, 64:128] = np.abs(w[2, 64:128])
    w[2, 128:160] = -np.abs(w[2, 128:160])
    w[2, 256:] = 0.01
    return w


def quantize(w, kind):
    ggml = ctypes.CDLL(str(LIBRARY))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p] + [ctypes.c_int64] * 3 + [ctypes.c_void_p]
    to = np.zeros(w.nbytes + 1024, dtype=np.uint8)
    size = ggml.ggml_quantize_chunk(int(kind), w.ctypes.data, to.ctypes.data, 0, w.shape[0], w.shape[1], None)
    return to[:size].reshape(w.shape[0], -1)


def main():
    path = HERE / "gguf/types.gguf"
    path.parent.mkdir(exist_ok=True)
    writer = GGUFWriter(path, "test")
    writer.add_uint8("test.u8", 255)
    writer.add_int8("test.i8", -128)
    writer.add_uint16("test.u16", 65535)
    writer.add_int16("test.i16", -32768)
    writer.add_uint32("test.u32", 2**32 - 1)
    writer.add_int32("test.i32", -(2**31))
    writer.add_float32("test.f32", 1 / 3)
    writer.add_float64("test.f64", 1 / 3)
    writer.add_uint64("test.u64", 2**64 - 1)
    writer.add_int64("test.i64", -(2**63))
    writer.add_bool("test.bool", True)
    writer.add_string("test.string", "quotes \" and ü 😀")
    writer.add_array("test.strings", ["", "▁a", "\n"])
    writer.add_array("test.i32s", [1, -2, 3])
    writer.add_array("test.f32s", [0.5, -1.25])
    writer.add_array("test.bools", [True, False])
    writer.add_key_value("test.u16s", [1, 2, 65535], GGUFValueType.ARRAY, GGUFValueType.UINT16)
    w = weights()
    for name in TYPES:
        kind = GGMLQuantizationType[name]
        data = w if name == "F32" else w.astype(np.float16) if name == "F16" else quantize(w, kind)
        writer.add_tensor(name, data, raw_dtype=None if name in ("F32", "F16") else kind)
    writer.add_tensor("one", np.float32([2.5]))
    writer.add_tensor("deep", np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = {t.name: dequantize(t.data, t.tensor_type).reshape(t.shape[::-1].tolist()) for t in GGUFReader(path).tensors}
    save_file({name: np.ascontiguousarray(v, dtype=np.float32) for name, v in read.items()}, path.with_suffix(".safetensors"))
    for name in TYPES:
        print(name, read[name].shape, "rms error", float(np.sqrt(np.mean((read[name] - w) ** 2))))


if __name__ == "__main__":
    main()
