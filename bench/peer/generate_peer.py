"""Transformers' side of bench:generate, and the writer of llama.cpp's file.

    generate_peer.py                     answers JSON lines, the protocol of generate_limbeck.mjs
    generate_peer.py gguf FOLDER PATH    writes the weights of FOLDER in F16, with a vocabulary made up

Needs Python with torch 2.13 and transformers 5.18; for the file numpy, safetensors and gguf.
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


def serve():
    import torch
    from transformers import AutoModelForCausalLM

    model = None
    for line in sys.stdin:
        message = json.loads(line)
        try:
            if message["cmd"] == "exit":
                return
            if message["cmd"] == "init":
                torch.set_num_threads(message["threads"])
                model = AutoModelForCausalLM.from_pretrained(message["folder"], dtype=torch.float32).eval()
                answer({"ready": True})
                continue
            batch, tokens = message["batch"], message["tokens"]
            ids = torch.tensor([[(row * 997 + i * 31) % 49152 for i in range(16)] for row in range(batch)])
            start = time.perf_counter()
            with torch.inference_mode():
                out = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=tokens,
                    min_new_tokens=tokens,
                    pad_token_id=0,
                )
            seconds = time.perf_counter() - start
            assert out.shape[1] == 16 + tokens, out.shape
            answer({"seconds": seconds})
        except Exception as error:
            answer({"error": f"{type(error).__name__}: {error}"})


def write_gguf(folder, path):
    import gguf
    import numpy
    from safetensors.numpy import load_file

    with open(os.path.join(folder, "config.json")) as file:
        config = json.load(file)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"t{i}" for i in range(config["vocab_size"])])
    writer.add_token_types([int(gguf.TokenType.NORMAL)] * config["vocab_size"])
    writer.add_token_merges(["t 0"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    # Rotary dims would have to be reordered for the same logits; speed does not depend on it.
    for name, data in load_file(os.path.join(folder, "model.safetensors")).items():
        to = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(to, data.astype(numpy.float16 if data.ndim > 1 else numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["gguf"]:
        write_gguf(*sys.argv[2:4])
    else:
        serve()
