"""Every method's forward pass in plain NumPy, written apart from the crate, as its reference.

    python3 tests/reference/reference.py          rewrite tests/golden/*.json
    python3 tests/reference/reference.py --check  compare with what is there

f64, no cache, blends materialised: K = sum_s a_s * K_s, V = sum_s b_s * V_s. Layers count from 0.

Parameters follow from their checkpoint names. For the tensor `name`: seed = FNV-1a 64 of the name;
element i (row-major; Linear weights [out, in]) = splitmix64 of seed + (i + 1) * golden gamma, as
v in [-1, 1). Norm weights are 1 + 0.3 v, fusion and residual weights 0.5 + 0.5 v, embeddings v,
Linear weights v * sqrt(3 / in).
"""
import json
import sys
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
MASK = (1 << 64) - 1


def uniform(name, shape):
    """Values in [-1, 1) that depend on the name and the position only."""
    seed = 0xCBF29CE484222325
    for byte in name.encode():
        seed = ((seed ^ byte) * 0x100000001B3) & MASK
    out = []
    for i in range(int(np.prod(shape))):
        z = (seed + (i + 1) * 0x9E3779B97F4A7C15) & MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        z ^= z >> 31
        out.append(2.0 * ((z >> 11) / 2.0**53) - 1.0)
    return np.array(out).reshape(shape)


def parameter(name, shape):
    """The tensor a checkpoint calls `name`."""
    v = uniform(name, shape)
    if "norm" in name:
        return 1.0 + 0.3 * v
    if "kv_fusion" in name or "kv_residual" in name:
        return 0.5 + 0.5 * v
    if "_proj" in name or name.startswith("lm_head"):
        return v * np.sqrt(3.0 / shape[1])
    return v


def rms_norm(x, w, eps):
    """x / sqrt(mean(x^2) + eps) * w over the last axis."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w


def rope(x, theta):
    """Rotates channel j with channel j + d/2 by position * theta^(-2j/d); x is [heads, seq, d]."""
    _, seq, d = x.shape
    out = np.empty_like(x)
    for t in range(seq):
        for j in range(d // 2):
            angle = t * theta ** (-2.0 * j / d)
            a, b = x[:, t, j], x[:, t, j + d // 2]
            out[:, t, j] = a * np.cos(angle) - b * np.sin(angle)
            out[:, t, j + d // 2] = b * np.cos(angle) + a * np.sin(angle)
    return out


def plan_layers(plan, n_layers):
    """Per layer where its key and its value come from: ("own", residual) or (sources, kind), kind being
    None (as it is), "per_channel" or "per_layer"."""
    def source(spec):
        if spec == "own":
            return "own", None
        if "own" in spec:
            return "own", spec["own"]["residual"]
        if "as_is" in spec:
            return [spec["as_is"]], None
        return spec["blend"]["sources"], spec["blend"]["weights"]

    def stores(residual):
        return dict.fromkeys(("key", "value"), ("own", residual))

    def custom(layer):
        if "store" in layer:
            return stores(layer["store"].get("residual"))
        parts = layer.get("reuse", layer)
        return {part: source(parts[part]) for part in ("key", "value")}

    def reuse(key, value):
        return {"key": key, "value": value}

    method = plan["method"]
    if method == "custom":
        return [custom(layer) for layer in plan["layers"]]
    if method == "standard":
        return [stores(None)] * n_layers
    if method == "cla":
        c = plan["factor"]
        return [
            stores(None) if i % c == 0 else reuse(([i - i % c], None), ([i - i % c], None))
            for i in range(n_layers)
        ]
    n = plan["storage_layers"]
    top = n - 1
    everything = list(range(n))
    upper = {
        "fused_kv": (([0, top], "per_channel"), ([0, top], "per_channel")),
        "fused_kv_lite": (([top], None), ([0], None)),
        "fused_kv_lite_learnable": (([top], "per_channel"), ([0], "per_channel")),
        "fused_kv_lite_reversed": (([0], None), ([top], None)),
        "yoco": (([top], None), ([top], None)),
        "yoco_plus_plus": (([top], None), ([top], None)),
        "dense_fusion": ((everything, "per_layer"), (everything, "per_layer")),
    }[method]
    lower = [stores(0 if method == "yoco_plus_plus" and i > 0 else None) for i in range(n)]
    return lower + [reuse(*upper)] * (n_layers - n)


def fusion_weights(weight, name, mix, kv_heads, channels, is_key):
    """One weight per source, [kv_heads, head_dim] or a number."""
    sources, kind = mix
    if kind is None:
        return [1.0] * len(sources)
    if kind == "per_layer":
        return list(weight(name, (len(sources), 1, 1))[:, 0, 0])
    width = channels // 2 if is_key else channels
    w = weight(name, (len(sources), kv_heads, width))
    if is_key:  # both channels of a rotated pair share a weight
        w = np.concatenate([w, w], -1)
    return list(w[:, :, None, :])


def logits(c, plan, tokens, weight=parameter):
    """[seq] token ids to [seq, vocab] logits; `weight` gives tensors by name and shape."""
    h, d = c["hidden_size"], c["head_dim"]
    heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
    eps = c["rms_norm_eps"]
    embedding = weight("model.embed_tokens.weight", (c["vocab_size"], h))
    x = embedding[tokens]
    seq = len(tokens)
    stored = {"key": {}, "value": {}}

    def norm(x, name):
        return rms_norm(x, weight(name, (x.shape[-1],)), eps)

    def project(x, name, n):
        return (x @ weight(name, (n * d, h)).T).reshape(seq, n, d).transpose(1, 0, 2)

    for i, layer in enumerate(plan_layers(plan, c["num_hidden_layers"])):
        prefix = f"model.layers.{i}."
        attn = prefix + "self_attn."
        y = norm(x, prefix + "input_layernorm.weight")
        q = project(y, attn + "q_proj.weight", heads)
        q = rope(norm(q, attn + "q_norm.weight"), c["rope_theta"])
        kv = {}
        for part, (sources, kind) in layer.items():
            if sources == "own" or i in sources:
                own = project(y, f"{attn}{part[0]}_proj.weight", kv_heads)
                if part == "key":
                    own = rope(norm(own, attn + "k_norm.weight"), c["rope_theta"])
                if sources == "own" and kind is not None:
                    own = own + weight(f"{attn}kv_residual.{part}_weight", (1,)) * stored[part][kind]
                stored[part][i] = own
            if sources == "own":
                kv[part] = stored[part][i]
            else:
                name = f"{attn}kv_fusion.{part}_weight"
                w = fusion_weights(weight, name, (sources, kind), kv_heads, d, part == "key")
                kv[part] = sum(a * stored[part][s] for a, s in zip(w, sources))
        k, v = kv["key"], kv["value"]
        out = np.zeros((seq, heads, d))
        for head in range(heads):
            group = head // (heads // kv_heads)
            for t in range(seq):
                score = k[group, : t + 1] @ q[head, t] / np.sqrt(d)
                p = np.exp(score - score.max())
                out[t, head] = (p / p.sum()) @ v[group, : t + 1]
        x = x + out.reshape(seq, heads * d) @ weight(attn + "o_proj.weight", (h, heads * d)).T
        y = norm(x, prefix + "post_attention_layernorm.weight")
        f = c["intermediate_size"]
        gate = y @ weight(prefix + "mlp.gate_proj.weight", (f, h)).T
        up = y @ weight(prefix + "mlp.up_proj.weight", (f, h)).T
        x = x + (gate / (1.0 + np.exp(-gate)) * up) @ weight(prefix + "mlp.down_proj.weight", (h, f)).T
    x = norm(x, "model.norm.weight")
    head = embedding if c["tie_word_embeddings"] else weight("lm_head.weight", (c["vocab_size"], h))
    return x @ head.T


def cases():
    base = dict(
        vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, rope_theta=10000.0, rms_norm_eps=1e-6,
        tie_word_embeddings=True, max_position_embeddings=16,
    )
    halves = ["fused_kv", "fused_kv_lite", "fused_kv_lite_learnable", "fused_kv_lite_reversed",
              "yoco", "yoco_plus_plus", "dense_fusion"]
    yield "standard", base, {"method": "standard"}
    yield "cla", base, {"method": "cla", "factor": 2}
    for method in halves:
        yield method, base, {"method": method, "storage_layers": 3}
    def per_channel(*sources):
        return {"blend": {"sources": list(sources), "weights": "per_channel"}}

    yield "custom", base, {"method": "custom", "layers": [
        {"store": {}},
        {"store": {"residual": 0}},
        {"reuse": {"key": per_channel(0, 1), "value": {"as_is": 0}}},
        {"store": {}},
        {"reuse": {"key": {"as_is": 3}, "value": {"blend": {"sources": [0, 1, 3], "weights": "per_layer"}}}},
        {"reuse": {"key": per_channel(1, 3), "value": per_channel(0, 3, 1)}},
    ]}
    # Keys and values apart, a layer's own among what it blends.
    yield "apart", base, {"method": "custom", "layers": [
        {"store": {}},
        {"key": "own", "value": {"as_is": 0}},
        {"key": {"own": {"residual": 1}}, "value": "own"},
        {"key": per_channel(0, 3), "value": {"blend": {"sources": [3, 0, 2], "weights": "per_layer"}}},
        {"key": {"as_is": 3}, "value": {"own": {"residual": 2}}},
        {"reuse": {"key": per_channel(2, 1), "value": {"as_is": 4}}},
    ]}
    untied = base | dict(tie_word_embeddings=False, num_key_value_heads=4, rope_theta=1e6)
    yield "fused_kv_untied_mha", untied, {"method": "fused_kv", "storage_layers": 2}
    one = base | dict(num_key_value_heads=1, head_dim=8)
    yield "fused_kv_one_kv_head", one, {"method": "fused_kv", "storage_layers": 3}


def main():
    check = "--check" in sys.argv[1:]
    GOLDEN.mkdir(exist_ok=True)
    for name, config, plan in cases():
        tokens = [[(7 * t * t + 5 * t + 11 * row) % config["vocab_size"] for t in range(9)] for row in range(2)]
        out = [logits(config, plan, row) for row in tokens]
        case = {
            "config": config, "kv_plan": plan, "tokens": tokens,
            "logits": [[[float(f"{v:.9g}") for v in t] for t in row] for row in out],
        }
        text = json.dumps(case, separators=(",", ":")) + "\n"
        path = GOLDEN / f"{name}.json"
        if check:
            old = np.array(json.loads(path.read_text())["logits"])
            print(f"{name}: largest difference {np.abs(old - np.array(case['logits'])).max():.1e}")
            assert np.allclose(old, case["logits"], rtol=1e-8, atol=1e-8), name
        else:
            path.write_text(text)


if __name__ == "__main__":
    main()
