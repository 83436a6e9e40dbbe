"""A directory of Hugging Face's layout as a GGUF file, for llama.cpp: Llama's and Qwen3's families.

    python gguf_of.py DIR OUT.gguf f32|f16|q8_0

Norms stay f32. The file has no vocabulary: it is read by token ids. Needs gguf, numpy, safetensors.
"""

import json
import pathlib
import sys

import gguf
import numpy as np
from safetensors.numpy import load_file

BLOCK = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def interleaved(weight, heads):
    """Rows of a head in the order in which llama.cpp rotates those of Llama: pairs are neighbours."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)


def main():
    directory, out, kind = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    config = json.loads((directory / "config.json").read_text())
    family = config["model_type"]
    assert family in ("llama", "qwen3"), f"model_type is {family}, expected llama or qwen3"
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    rope = config.get("rope_parameters") or config
    writer = gguf.GGUFWriter(out, family)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for path in sorted(directory.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            if name in OUTSIDE:
                to = OUTSIDE[name]
            else:
                _, _, layer, rest = name.split(".", 3)
                to = f"blk.{layer}.{BLOCK[rest.removesuffix('.weight')]}.weight"
            tensor = tensor.astype(np.float32)
            if family == "llama" and "attn_q." in to:
                tensor = interleaved(tensor, heads)
            if family == "llama" and "attn_k." in to:
                tensor = interleaved(tensor, kv_heads)
            if tensor.ndim == 1 or kind == "f32":
                writer.add_tensor(to, tensor)
            elif kind == "f16":
                writer.add_tensor(to, tensor.astype(np.float16))
            else:
                quant = gguf.GGMLQuantizationType.Q8_0
                writer.add_tensor(to, gguf.quants.quantize(tensor, quant), raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
