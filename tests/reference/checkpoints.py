"""Checkpoint directories of every plan, written with NumPy alone, and their logits.

    python3 tests/reference/checkpoints.py          rewrite tests/golden/checkpoints/
    python3 tests/reference/checkpoints.py --check  compute the logits again from what is there

The decoder is that of reference.py; its f64 arithmetic runs on the weights as they are stored.
"""
import json
import shutil
import struct
import sys

import numpy as np

import reference

ROOT = reference.GOLDEN / "checkpoints"


def to_bytes(x, dtype):
    """Little-endian bytes of a tensor; bf16 rounds to nearest, ties to even."""
    x = x.astype("<f4")
    if dtype == "F32":
        return x.tobytes()
    if dtype == "F16":
        return x.astype("<f2").tobytes()
    bits = x.view("<u4").astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


def from_bytes(raw, dtype, shape):
    if dtype == "BF16":
        x = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    else:
        x = np.frombuffer(raw, {"F32": "<f4", "F16": "<f2"}[dtype])
    return x.astype(np.float64).reshape(shape)


def write_safetensors(path, tensors, dtype):
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, (shape, raw) in sorted(tensors.items()):
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def read_safetensors(path):
    raw = path.read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + n])
    header.pop("__metadata__", None)
    out = {}
    for name, t in header.items():
        start, end = t["data_offsets"]
        out[name] = from_bytes(raw[8 + n + start : 8 + n + end], t["dtype"], t["shape"])
    return out


def cases():
    """(name, config, plan, dtype, number of files)"""
    base = dict(
        vocab_size=13, hidden_size=8, intermediate_size=10, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, rms_norm_eps=1e-6, tie_word_embeddings=True,
        max_position_embeddings=16, rope_theta=10000.0,
    )
    untied = base | dict(tie_word_embeddings=False, rope_theta=1e6)
    n = {"storage_layers": 2}
    yield "standard", untied, {"method": "standard"}, "BF16", 1
    yield "standard_shards", base, {"method": "standard"}, "F32", 3
    yield "fused_kv", base, {"method": "fused_kv", **n}, "F32", 1
    yield "fused_kv_shards", untied, {"method": "fused_kv", "storage_layers": 3}, "BF16", 2
    yield "fused_kv_lite", untied, {"method": "fused_kv_lite", **n}, "F16", 1
    yield "fused_kv_lite_learnable", base, {"method": "fused_kv_lite_learnable", **n}, "F32", 1
    yield "fused_kv_lite_reversed", base, {"method": "fused_kv_lite_reversed", **n}, "BF16", 1
    yield "yoco", untied, {"method": "yoco", **n}, "F16", 1
    yield "yoco_plus_plus", base, {"method": "yoco_plus_plus", "storage_layers": 3}, "F32", 1
    yield "cla", base, {"method": "cla", "factor": 2}, "BF16", 1
    yield "dense_fusion", untied, {"method": "dense_fusion", "storage_layers": 3}, "F32", 1
    yield "custom", base, {"method": "custom", "layers": [
        {"store": {}},
        {"store": {"residual": 0}},
        {"reuse": {"key": {"blend": {"sources": [1, 0], "weights": "per_channel"}}, "value": {"as_is": 0}}},
        {"reuse": {"key": {"as_is": 1}, "value": {"blend": {"sources": [0, 1], "weights": "per_layer"}}}},
    ]}, "F32", 1
    yield "apart", base, {"method": "custom", "layers": [
        {"store": {}},
        {"key": "own", "value": {"as_is": 0}},
        {"key": {"blend": {"sources": [2, 0], "weights": "per_channel"}}, "value": {"own": {"residual": 0}}},
        {"reuse": {"key": {"as_is": 2}, "value": {"blend": {"sources": [0, 2], "weights": "per_layer"}}}},
    ]}, "F32", 1


def config_json(config, plan, dtype, new_style):
    """As transformers 5 writes it, or (rope_theta on its own) version 4."""
    standard = plan["method"] == "standard"
    c = dict(config)
    theta = c.pop("rope_theta")
    c["rope_parameters" if new_style else "rope_theta"] = {"rope_theta": theta, "rope_type": "default"} if new_style else theta
    c |= {
        "architectures": ["Qwen3ForCausalLM" if standard else "FusedKvForCausalLM"],
        "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02,
        "model_type": "qwen3" if standard else "fusedkv", "use_sliding_window": False, "sliding_window": None,
        "dtype" if new_style else "torch_dtype": {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[dtype],
        "eos_token_id": 3, "an_unknown_key": {"of": ["any", "kind"]},
    }
    if new_style:
        c["layer_types"] = ["full_attention"] * config["num_hidden_layers"]
    if not standard:
        c["kv_plan"] = plan
    return c


def write(name, config, plan, dtype, files, new_style, tokens):
    tensors = {}

    def weight(name, shape):
        raw = to_bytes(reference.parameter(name, shape), dtype)
        tensors[name] = (list(shape), raw)
        return from_bytes(raw, dtype, shape)

    out = reference.logits(config, plan, tokens, weight)
    directory = ROOT / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    names = sorted(tensors)
    if files == 1:
        write_safetensors(directory / "model.safetensors", tensors, dtype)
    else:
        where = {}
        for i in range(files):
            file = f"model-{i + 1:05}-of-{files:05}.safetensors"
            part = {n: tensors[n] for n in names[i::files]}
            where |= dict.fromkeys(part, file)
            write_safetensors(directory / file, part, dtype)
        total = sum(len(raw) for _, raw in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    text = json.dumps(config_json(config, plan, dtype, new_style), indent=1)
    (directory / "config.json").write_text(text + "\n")
    (directory / "generation_config.json").write_text('{"eos_token_id": [3, 5]}\n')
    case = {"tokens": tokens, "logits": [[float(f"{v:.9g}") for v in t] for t in out]}
    (directory / "logits.json").write_text(json.dumps(case, separators=(",", ":")) + "\n")


def main():
    for i, (name, config, plan, dtype, files) in enumerate(cases()):
        tokens = [(7 * t * t + 5 * t + i) % config["vocab_size"] for t in range(9)]
        if "--check" not in sys.argv[1:]:
            write(name, config, plan, dtype, files, i % 2 == 0, tokens)
            continue
        stored = {}
        for path in sorted((ROOT / name).glob("*.safetensors")):
            stored |= read_safetensors(path)
        out = reference.logits(config, plan, tokens, lambda n, shape: stored[n].reshape(shape))
        old = np.array(json.loads((ROOT / name / "logits.json").read_text())["logits"])
        print(f"{name}: largest difference {np.abs(old - out).max():.1e}")
        assert np.allclose(old, out, rtol=1e-8, atol=1e-8), name


if __name__ == "__main__":
    main()
