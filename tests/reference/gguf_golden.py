"""GGUF files, written with the Python package `gguf`, and what they must become.

    python3 tests/reference/gguf_golden.py          rewrite tests/golden/gguf/
    python3 tests/reference/gguf_golden.py --check  compare with what is there

Needs `pip install gguf numpy`. `formats.gguf` has a tensor of random blocks of every number format,
`formats.safetensors` what `gguf.dequantize` makes of them. For each architecture, `NAME.gguf` is a tiny
model whose tensors `gguf.get_tensor_name_map` has named and whose q and k are permuted as llama.cpp's
converter does; `NAME.safetensors` and `NAME.json` are the tensors and keys it has in Hugging Face's
files. `tokens.json` has texts and their ids, by the plain algorithms below.
"""
import json
import re
import struct
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Q

import reference

ROOT = reference.GOLDEN / "gguf"
RULES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"]
# Where a block has its scales, which must be finite: any other byte may be anything.
SCALES = {"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q4_K": [0, 2],
          "Q5_K": [0, 2], "Q6_K": [208]}


def safetensors(tensors):
    """The bytes of a safetensors file of f32 tensors."""
    header, data = {}, b""
    for name, x in sorted(tensors.items()):
        raw = np.ascontiguousarray(x, "<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": list(x.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def finish(writer, path):
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def formats(path):
    rng = np.random.default_rng(0)
    writer, expected = gguf.GGUFWriter(None, "none"), {}
    for rule in RULES:
        kind = Q[rule]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        rows, blocks = (3, 2) if block < 256 else (2, 1)
        if rule == "F32":
            raw = rng.normal(size=(rows, 5)).astype("<f4").view(np.uint8)
        elif rule in ("F16", "BF16"):
            raw = gguf.quants.quantize(rng.normal(size=(rows, 6)).astype("<f4"), kind).view(np.uint8)
        else:
            raw = rng.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
            for at in SCALES[rule]:
                scale = rng.normal(size=(rows, blocks, 1)).astype("<f2")
                raw[..., at : at + 2] = scale.view(np.uint8)
            raw = raw.reshape(rows, blocks * size)
        expected[rule] = gguf.dequantize(raw, kind)
        writer.add_tensor(rule, raw, raw_dtype=kind)
    # A value of every type, and arrays.
    for name, value, kind in [
        ("u8", 200, "UINT8"), ("i8", -100, "INT8"), ("u16", 60000, "UINT16"), ("i16", -30000, "INT16"),
        ("u32", 4000000000, "UINT32"), ("i32", -2000000000, "INT32"), ("f32", 0.5, "FLOAT32"),
        ("bool", True, "BOOL"), ("text", "é", "STRING"), ("u64", 1 << 60, "UINT64"),
        ("i64", -(1 << 60), "INT64"), ("f64", 0.1, "FLOAT64"),
    ]:
        writer.add_key_value(f"value.{name}", value, gguf.GGUFValueType[kind])
    writer.add_array("value.numbers", [1, -2, 3])
    writer.add_array("value.texts", ["a", "", "é"])
    finish(writer, path)
    return expected


def heads_permuted(x, heads):
    """Rows j and j + d/2 of a head side by side, as llama.cpp's converter has it."""
    return x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


SIZES = dict(
    vocab_size=6, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=4, max_position_embeddings=64, rms_norm_eps=0.0009765625,
    rope_theta=10000.0,
)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=32.0, beta_slow=1.0)
LONG = dict(rope_type="longrope", long_factor=[2.0, 4.0], short_factor=[1.0, 1.5])


def theta(value, **more):
    return {"rope_theta": value, "rope_type": "default"} | more


def models():
    """(file, GGUF's architecture, Hugging Face's configuration)"""
    tied, untied = dict(tie_word_embeddings=True), dict(tie_word_embeddings=False)
    yield "llama", "llama", SIZES | untied | dict(
        model_type="llama", vocab_size=64, hidden_size=32, intermediate_size=32, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, attention_bias=False, mlp_bias=False, bos_token_id=0, eos_token_id=1,
        rope_parameters=theta(1e4))
    yield "llama_biases", "llama", SIZES | tied | dict(
        model_type="llama", attention_bias=True, mlp_bias=True, head_dim=16, rope_theta=500000.0,
        rope_parameters=theta(500000.0, **LLAMA3))
    yield "mistral", "llama", SIZES | untied | dict(
        model_type="mistral", sliding_window=16, rope_parameters=theta(1e4, rope_type="linear", factor=2.0))
    yield "qwen2", "qwen2", SIZES | tied | dict(
        model_type="qwen2", use_sliding_window=False, rope_parameters=theta(1e4, **YARN))
    yield "qwen3", "qwen3", SIZES | tied | dict(
        model_type="qwen3", head_dim=6, attention_bias=False, rope_parameters=theta(1e4))
    yield "gemma2", "gemma2", SIZES | tied | dict(
        model_type="gemma2", sliding_window=16, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
        query_pre_attn_scalar=4, hidden_activation="gelu_pytorch_tanh", rope_parameters=theta(1e4),
        layer_types=["sliding_attention", "full_attention"])
    yield "gemma3", "gemma3", SIZES | tied | dict(
        model_type="gemma3_text", vocab_size=48, num_hidden_layers=7, sliding_window=16, query_pre_attn_scalar=4,
        hidden_activation="gelu_pytorch_tanh", rope_theta=1e6, final_logit_softcapping=None,
        layer_types=["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
        rope_parameters={"full_attention": theta(1e6, rope_type="linear", factor=8.0), "sliding_attention": theta(1e4)})
    yield "phi3", "phi3", SIZES | untied | dict(
        model_type="phi3", head_dim=8, hidden_size=16, sliding_window=None, original_max_position_embeddings=16,
        partial_rotary_factor=0.5, rope_parameters=theta(1e4, partial_rotary_factor=0.5, **LONG))
    yield "smollm3", "smollm3", SIZES | tied | dict(
        model_type="smollm3", num_hidden_layers=5, no_rope_layers=[1, 1, 1, 0, 1], no_rope_layer_interval=4,
        attention_bias=False, rope_parameters=theta(1e4))
    yield "olmo2", "olmo2", SIZES | untied | dict(model_type="olmo2", attention_bias=False, rope_parameters=theta(1e4))


def layer_shapes(c):
    """A layer's tensors as the family's class in transformers has them."""
    h, f, d = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q, kv, family = c["num_attention_heads"] * d, c["num_key_value_heads"] * d, c["model_type"]
    out = {"self_attn.o_proj.weight": (h, q), "mlp.down_proj.weight": (h, f)}
    if family == "phi3":
        out |= {"self_attn.qkv_proj.weight": (q + 2 * kv, h), "mlp.gate_up_proj.weight": (2 * f, h)}
    else:
        out |= {"self_attn.q_proj.weight": (q, h), "self_attn.k_proj.weight": (kv, h), "self_attn.v_proj.weight": (kv, h)}
        out |= {"mlp.gate_proj.weight": (f, h), "mlp.up_proj.weight": (f, h)}
    norms = ["post_attention_layernorm"]
    norms += ["input_layernorm"] * (family != "olmo2") + ["post_feedforward_layernorm"] * (family in ("olmo2", "gemma2", "gemma3_text"))
    norms += ["pre_feedforward_layernorm"] * family.startswith("gemma")
    out |= {f"{norm}.weight": (h,) for norm in norms}
    if family in ("qwen3", "gemma3_text"):
        out |= {"self_attn.q_norm.weight": (d,), "self_attn.k_norm.weight": (d,)}
    if family == "olmo2":
        out |= {"self_attn.q_norm.weight": (q,), "self_attn.k_norm.weight": (kv,)}
    if family == "qwen2" or c.get("attention_bias"):
        out |= {f"self_attn.{p}_proj.bias": (n,) for p, n in [("q", q), ("k", kv), ("v", kv)]}
    if c.get("attention_bias"):
        out["self_attn.o_proj.bias"] = (h,)
    if c.get("mlp_bias"):
        out |= {f"mlp.{p}_proj.bias": (n,) for p, n in [("gate", f), ("up", f), ("down", h)]}
    return out


def gguf_name(names, tensor):
    stem, kind = tensor.rsplit(".", 1)
    return f"{names.get_name(stem)}.{kind}"


def llama3_factors(c):
    r, d = c["rope_parameters"], c["head_dim"]
    out = []
    for i in range(d // 2):
        wavelength = 2 * np.pi * r["rope_theta"] ** (2 * i / d)
        ratio = r["original_max_position_embeddings"] / wavelength
        smooth = np.clip((ratio - r["low_freq_factor"]) / (r["high_freq_factor"] - r["low_freq_factor"]), 0, 1)
        out.append(1 / ((1 - smooth) / r["factor"] + smooth))
    return np.array(out, "<f4")


def keys(w, c):
    """The metadata, as llama.cpp's converter writes it."""
    w.add_block_count(c["num_hidden_layers"])
    w.add_context_length(c["max_position_embeddings"])
    w.add_embedding_length(c["hidden_size"])
    w.add_feed_forward_length(c["intermediate_size"])
    w.add_head_count(c["num_attention_heads"])
    w.add_head_count_kv(c["num_key_value_heads"])
    w.add_layer_norm_rms_eps(c["rms_norm_eps"])
    rope = c["rope_parameters"].get("full_attention", c["rope_parameters"])
    w.add_rope_freq_base(rope["rope_theta"])
    if c["head_dim"] * c["num_attention_heads"] != c["hidden_size"]:
        w.add_key_length(c["head_dim"])
        w.add_value_length(c["head_dim"])
    if c.get("sliding_window") and c["model_type"] != "phi3":
        w.add_sliding_window(c["sliding_window"])
    if c["model_type"] == "phi3":
        w.add_sliding_window(0)
        w.add_rope_dimension_count(int(c["head_dim"] * c["partial_rotary_factor"]))
        w.add_rope_scaling_orig_ctx_len(c["original_max_position_embeddings"])
        scale = c["max_position_embeddings"] / c["original_max_position_embeddings"]
        w.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(scale) / np.log(c["original_max_position_embeddings"]))))
    if rope["rope_type"] in ("linear", "yarn"):
        w.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        w.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        w.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        w.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        w.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    if c["model_type"] == "gemma2":
        w.add_attn_logit_softcapping(c["attn_logit_softcapping"])
        w.add_final_logit_softcapping(c["final_logit_softcapping"])


# Byte-level tokens: Ġ is a space, Ċ a new line.
ALPHABET = list("abcdefghijklmnopqrstuvwxyz0123456789.ĠĊ")
MERGES = ["t h", "th e", "Ġ the", "i n", "in g", "Ġ a", "o n", "Ġ c", "Ġc a", "Ġca t"]
CONTROL, USER_DEFINED, UNKNOWN, NORMAL, BYTE = 3, 4, 2, 1, 6
BYTE_TOKENS = [("<|end|>", CONTROL), ("<|stop|>", CONTROL), ("<tool>", USER_DEFINED)]
BYTE_TOKENS += [(t, NORMAL) for t in ALPHABET + [m.replace(" ", "") for m in MERGES]]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}<|end|>{% endfor %}"

# SentencePiece's: ▁ is a space, and files write runs of it as spaces.
PIECES = [("<pad>", CONTROL), ("<eos>", CONTROL), ("<bos>", CONTROL), ("<unk>", UNKNOWN)]
PIECES += [("<0xC3>", BYTE), ("<0xA9>", BYTE), ("<0x0A>", BYTE), ("<turn>", USER_DEFINED), ("  ", USER_DEFINED)]
PIECES += [(t, NORMAL) for t in "th the ▁the in ing ▁a on ▁c ▁ca ▁cat at".split()]
PIECES += [(t, NORMAL) for t in "▁abcdefghiknoprstu."]
TEXTS = ["the cat", " the cat sat on a thing.", "abc  the", "1972", "cat<tool>the", "<turn>the cat<|end|>", "a\nbé"]


def byte_ids(text):
    """GPT-2's cut after digits by themselves; then the first of MERGES that applies, again and again."""
    ids = {token: i for i, (token, _) in enumerate(BYTE_TOKENS)}
    ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(MERGES)}
    out = []
    for part in re.split(r"(<\|end\|>|<\|stop\|>|<tool>)", text):
        if part in ids and part.startswith("<"):
            out.append(ids[part])
            continue
        for cut in re.split(r"([0-9])", part):
            for word in re.findall(r" ?[^\W\d]+| ?\d+| ?[^\s\w]+|\s+(?!\S)|\s+", cut):
                pieces = [{" ": "Ġ", "\n": "Ċ"}.get(c, c) for c in word]
                while len(pieces) > 1:
                    pairs = list(zip(pieces, pieces[1:]))
                    best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
                    if best not in ranks:
                        break
                    at = pairs.index(best)
                    pieces[at : at + 2] = ["".join(best)]
                out += [ids[p] for p in pieces if p in ids]
    return out


def piece_ids(text):
    """SentencePiece: the pair that makes the best token, the first of equals, again and again."""
    ids = {token.replace(" ", "▁"): i for i, (token, _) in enumerate(PIECES)}
    out = [ids["<bos>"]]
    for part in re.split(r"(<turn>|<bos>|<eos>|<unk>|<pad>)", text):
        if part in ids and part.startswith("<"):
            out.append(ids[part])
            continue
        pieces = list(part.replace(" ", "▁"))
        while True:
            pairs = [(ids["".join(p)], at) for at, p in enumerate(zip(pieces, pieces[1:])) if "".join(p) in ids]
            if not pairs:
                break
            _, at = min(pairs)
            pieces[at : at + 2] = ["".join(pieces[at : at + 2])]
        for piece in pieces:
            if piece in ids:
                out.append(ids[piece])
            else:
                tokens = [f"<0x{byte:02X}>" for byte in piece.encode()]
                known = all(token in ids for token in tokens)
                out += [ids[token] for token in tokens] if known else [ids["<unk>"]]
    # What is not known counts once, however long.
    return [i for at, i in enumerate(out) if i != ids["<unk>"] or at == 0 or out[at - 1] != i]


def vocabulary(w, name):
    if name == "llama":
        w.add_tokenizer_model("gpt2")
        w.add_tokenizer_pre("smollm")
        w.add_token_list([token for token, _ in BYTE_TOKENS])
        w.add_token_types([kind for _, kind in BYTE_TOKENS])
        w.add_token_merges(MERGES)
        w.add_bos_token_id(0)
        w.add_eos_token_id(1)
        w.add_chat_template(TEMPLATE)
    if name == "gemma3":
        w.add_tokenizer_model("llama")
        w.add_tokenizer_pre("default")
        w.add_token_list([token for token, _ in PIECES])
        w.add_token_scores([-1000.0] * len(PIECES))
        w.add_token_types([kind for _, kind in PIECES])
        w.add_bos_token_id(2)
        w.add_eos_token_id(1)
        w.add_unk_token_id(3)
        w.add_pad_token_id(0)
        w.add_add_space_prefix(False)


def model(path, name, arch, c):
    """Writes a model and returns its tensors as Hugging Face has them."""
    w = gguf.GGUFWriter(None, arch)
    keys(w, c)
    vocabulary(w, name)
    names = gguf.get_tensor_name_map(
        next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == arch), c["num_hidden_layers"])
    shapes = {"model.embed_tokens.weight": (c["vocab_size"], c["hidden_size"]), "model.norm.weight": (c["hidden_size"],)}
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    for i in range(c["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{n}": s for n, s in layer_shapes(c).items()}
    kinds = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "F16", "BF16"] if name == "llama" else ["F16"]
    expected = {}
    for number, (tensor, shape) in enumerate(shapes.items()):
        x = reference.uniform(tensor, shape).astype("<f4")
        kind = Q[kinds[number % len(kinds)]] if len(shape) == 2 else Q.F32
        stored = x
        if "norm" in tensor and c["model_type"].startswith("gemma"):
            stored = x + np.float32(1)
            x = stored - np.float32(1)
        elif kind != Q.F32:
            x = gguf.dequantize(gguf.quantize(x, kind), kind)
        expected[tensor] = x
        if arch in ("llama", "smollm3") and (".q_proj." in tensor or ".k_proj." in tensor):
            stored = heads_permuted(stored, c["num_attention_heads" if ".q_proj." in tensor else "num_key_value_heads"])
        w.add_tensor(gguf_name(names, tensor), gguf.quantize(stored, kind), raw_dtype=kind)
    if c["rope_parameters"].get("rope_type") == "llama3":
        w.add_tensor("rope_freqs.weight", llama3_factors(c))
    if c["rope_parameters"].get("rope_type") == "longrope":
        w.add_tensor("rope_factors_long.weight", np.array(LONG["long_factor"], "<f4"))
        w.add_tensor("rope_factors_short.weight", np.array(LONG["short_factor"], "<f4"))
    finish(w, path)
    return expected


def write(root):
    (root / "formats.safetensors").write_bytes(safetensors(formats(root / "formats.gguf")))
    for name, arch, c in models():
        (root / f"{name}.safetensors").write_bytes(safetensors(model(root / f"{name}.gguf", name, arch, c)))
        (root / f"{name}.json").write_text(json.dumps(c, indent=1, sort_keys=True) + "\n")
    tokens = {"texts": TEXTS, "llama": [byte_ids(t) for t in TEXTS], "gemma3": [piece_ids(t) for t in TEXTS]}
    (root / "tokens.json").write_text(json.dumps(tokens, ensure_ascii=False, separators=(",", ":")) + "\n")


def main():
    if "--check" not in sys.argv[1:]:
        ROOT.mkdir(parents=True, exist_ok=True)
        return write(ROOT)
    with tempfile.TemporaryDirectory() as other:
        write(Path(other))
        there = {path.name: path.read_bytes() for path in ROOT.iterdir()}
        made = {path.name: path.read_bytes() for path in Path(other).iterdir()}
        different = sorted(n for n in there.keys() | made.keys() if there.get(n) != made.get(n))
        if different:
            sys.exit(f"different: {', '.join(different)}")
        print(f"{len(made)} files are the same")


if __name__ == "__main__":
    main()
