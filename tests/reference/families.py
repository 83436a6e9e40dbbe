"""Small random models of every family, as transformers writes them, and their logits.

    python tests/reference/families.py            rewrite tests/golden/families/
    python tests/reference/families.py --check    make them again and compare with what is there
    python tests/reference/families.py --out DIR --seed 3 [--cases llama gemma2_hub ...]
        larger ones of random shapes (heads, widths, windows, tied or not, dtypes, shards) elsewhere

Needs torch, transformers and safetensors. Every case is a directory: config.json and tensors as
transformers' `save_pretrained` leaves them, and expected.safetensors: `tokens` [n] (I64) and
`logits` [n, vocab] (F32), which transformers computes from that directory in f32 with eager
attention, the whole sequence at once. A case named `..._hub` has its config.json rewritten to the
keys that files on the hub have (`rope_theta` and `rope_scaling` of their own, no `layer_types`,
keys at their default left out); transformers reads it to the same logits, or the script stops.

No parameter has a value that would hide it: norm weights and biases are random too. `matters` of
a case are changes of its configuration that must move the logits by more than 3e-4 of their scale:
proof that the case can fail.
"""
import argparse
import json
import shutil
import sys
import tempfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent / "golden" / "families"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}


@dataclass
class Shape:
    """What the cases are built from; the defaults are those of the cases in the repository."""

    hidden: int = 32
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    ffn: int = 20
    layers: int = 4
    vocab: int = 40
    window: int = 10
    original: int = 32  # what RoPE was trained on, for the types that scale
    length: int = 56
    tied: bool = False
    dtype: str = "BF16"
    shards: int = 1

    @staticmethod
    def random(r):
        heads = int(r.choice([2, 4, 6, 8]))
        window = int(r.integers(3, 40))
        original = int(r.choice([16, 32, 48, 64]))
        return Shape(
            heads=heads,
            kv_heads=int(r.choice([k for k in range(1, heads + 1) if heads % k == 0])),
            head_dim=int(r.choice([8, 16, 24, 32])),
            hidden=heads * int(r.choice([8, 12, 16, 20])),
            ffn=int(r.integers(40, 200)),
            layers=int(r.integers(4, 10)),
            vocab=int(r.integers(60, 300)),
            window=window,
            original=original,
            length=max(3 * window, original) + int(r.integers(10, 80)),
            tied=bool(r.integers(2)),
            dtype=str(r.choice(list(DTYPES))),
            shards=int(r.integers(1, 4)),
        )


@dataclass
class Case:
    name: str
    model_type: str
    config: object  # Shape -> the keys of the family's configuration
    shape: dict = field(default_factory=dict)  # of the case in the repository, where not Shape's own
    matters: tuple = ()  # changes of config.json, each of which must change the logits
    hub: object = None  # how config.json is rewritten
    extra: object = None  # tensors to add that transformers does not read


def rope(kind, theta=10000.0, **keys):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **keys}}


def longrope(s, factors_apart):
    """Factors of phi3's longrope for half of each head, and the context they stretch."""
    pairs = s.head_dim // 4
    short = [round(1.0 + 0.1 * i, 3) for i in range(pairs)]
    long = [round(1.5 + factors_apart * i, 3) for i in range(pairs)]
    return rope("longrope", short_factor=short, long_factor=long, partial_rotary_factor=0.5)


def alternating(s, pattern):
    """Sliding layers, every `pattern`-th full, and the last one full."""
    kinds = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(s.layers)]
    return {"layer_types": kinds[:-1] + ["full_attention"], "sliding_window": s.window}


def gemma4(s, **keys):
    pattern = alternating(s, 3)
    return pattern | {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
        },
        "global_head_dim": 2 * s.head_dim,
        "vocab_size_per_layer_input": s.vocab,
        "hidden_size_per_layer_input": 8,
        "final_logit_softcapping": 6.0,
    } | keys


def flat_rope(drop=(), type_key="rope_type"):
    """config.json as version 4 of transformers and earlier wrote it."""

    def rewrite(c):
        p = dict(c.pop("rope_parameters"))
        c["rope_theta"] = p.pop("rope_theta")
        if "partial_rotary_factor" in p:
            c["partial_rotary_factor"] = p.pop("partial_rotary_factor")
        kind = p.pop("rope_type")
        c["rope_scaling"] = None if kind == "default" else {type_key: kind, **p}
        return before(c, drop)

    return rewrite


def before(c, drop):
    c["torch_dtype"] = c.pop("dtype")
    if c.get("head_dim") != c["hidden_size"] // c["num_attention_heads"]:
        drop = [key for key in drop if key != "head_dim"]
    for key in ("layer_types", *drop):
        c.pop(key, None)
    return c


def phi3_hub(c):
    c = flat_rope(["head_dim"], "type")(c)
    if c["rope_scaling"]:
        c["rope_scaling"].pop("original_max_position_embeddings", None)
    return c


def gemma2_hub(c):
    c = flat_rope(["attention_bias", "use_bidirectional_attention"])(c)
    c.pop("rope_scaling")
    c["hidden_act"] = c["hidden_activation"]
    return c


def gemma3_hub(c):
    p = c.pop("rope_parameters")
    c["rope_theta"] = p["full_attention"].pop("rope_theta")
    c["rope_local_base_freq"] = p["sliding_attention"]["rope_theta"]
    c["rope_scaling"] = p["full_attention"]
    pattern = c["layer_types"].index("full_attention") + 1
    c.pop("_sliding_window_pattern", None)
    return before(c, ["use_bidirectional_attention"]) | {"sliding_window_pattern": pattern}


def gemma4_hub(c):
    full = next(iter(c.pop("per_layer_config").values()))
    c["global_head_dim"] = full.get("head_dim", c.get("head_dim"))
    c["num_global_key_value_heads"] = full.get("num_key_value_heads")
    return c


def shared_keys_and_values(model, r):
    """K and V of layers that read another layer's, as the files of Gemma 4 carry them."""
    out = {}
    for i, layer in enumerate(model.model.layers):
        a = layer.self_attn
        if a.is_kv_shared_layer:
            kv = model.config.per_layer_config[i].num_key_value_heads
            shapes = {"k_proj": (kv * a.head_dim, model.config.hidden_size), "k_norm": (a.head_dim,)}
            shapes["v_proj"] = shapes["k_proj"]
            for name, shape in shapes.items():
                out[f"model.layers.{i}.self_attn.{name}.weight"] = torch.tensor(r.normal(size=shape)).float()
    return out


CASES = [
    Case("llama", "llama", lambda s: rope("default"), {"dtype": "F32"}, ({"rms_norm_eps": 0.3},)),
    Case("llama_hub", "llama", lambda s: rope("default", 100000.0) | {"rms_norm_eps": 1e-5},
         {"tied": True, "heads": 3, "kv_heads": 1, "hidden": 24, "vocab": 61}, ({"rope_theta": 1e4},),
         flat_rope(["head_dim", "attention_bias", "mlp_bias", "attention_dropout", "pretraining_tp"])),
    Case("llama_heads", "llama", lambda s: rope("default") | {"hidden_act": "gelu"},
         {"head_dim": 12, "kv_heads": 4, "shards": 3}, ({"hidden_act": "silu"},)),
    Case("llama_bias", "llama", lambda s: rope("default") | {"attention_bias": True, "mlp_bias": True},
         {"kv_heads": 1}),
    Case("llama_llama3_hub", "llama",
         lambda s: rope("llama3", 10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                        original_max_position_embeddings=s.original) | {"max_position_embeddings": 8 * s.original},
         {"head_dim": 16, "length": 72, "tied": True}, ({"rope_scaling": None},), flat_rope(["mlp_bias"])),
    Case("llama_linear_hub", "llama", lambda s: rope("linear", factor=4.0), {},
         ({"rope_scaling": None}, {"rope_scaling": {"type": "linear", "factor": 2.0}}), flat_rope(type_key="type")),
    Case("llama_dynamic_hub", "llama",
         lambda s: rope("dynamic", factor=2.0) | {"max_position_embeddings": s.original}, {"length": 72},
         ({"rope_scaling": None},), flat_rope(type_key="type")),
    Case("llama_dynamic_within", "llama",
         lambda s: rope("dynamic", factor=2.0) | {"max_position_embeddings": s.length}),
    Case("llama_yarn", "llama",
         lambda s: rope("yarn", factor=4.0, original_max_position_embeddings=s.original)
         | {"max_position_embeddings": 4 * s.original}, {"head_dim": 16, "length": 72},
         ({"rope_parameters": DEFAULT},)),
    Case("llama_yarn_mscale", "llama",
         lambda s: rope("yarn", 500.0, factor=8.0, original_max_position_embeddings=s.original, beta_fast=4.0,
                        beta_slow=0.5, mscale=1.0, mscale_all_dim=0.4, truncate=False)
         | {"max_position_embeddings": 8 * s.original}, {"head_dim": 16, "length": 72}),
    Case("llama_yarn_attention_factor", "llama",
         lambda s: rope("yarn", factor=4.0, original_max_position_embeddings=s.original, attention_factor=1.3)
         | {"max_position_embeddings": 4 * s.original}, {"head_dim": 16}),
    Case("llama_longrope", "llama",
         lambda s: rope("longrope", factor=4.0, original_max_position_embeddings=s.original,
                        short_factor=[1.0] * (s.head_dim // 2),
                        long_factor=[1.0 + i for i in range(s.head_dim // 2)])
         | {"max_position_embeddings": 4 * s.original}),

    Case("qwen2", "qwen2", lambda s: rope("default", 1e6), {"dtype": "F32"}),
    Case("qwen2_hub", "qwen2", lambda s: rope("default", 1e6) | {"use_sliding_window": False}, {"tied": True}, (),
         lambda c: flat_rope(["head_dim", "attention_bias"])(c) | {"sliding_window": 4, "max_window_layers": 2}),
    Case("qwen2_window_hub", "qwen2",
         lambda s: rope("default") | {"use_sliding_window": True, "sliding_window": s.window, "max_window_layers": s.layers // 2},
         {"layers": 5}, ({"use_sliding_window": False}, {"max_window_layers": 1}, {"sliding_window": 11}),
         flat_rope()),

    Case("qwen3", "qwen3", lambda s: rope("default", 1e6), {"head_dim": 16, "tied": True}),
    Case("qwen3_windows", "qwen3", lambda s: rope("default") | {"use_sliding_window": True} | alternating(s, 2),
         {}, ({"layer_types": ["full_attention"] * 4}, {"sliding_window": 11})),
    Case("qwen3_bias_yarn_hub", "qwen3",
         lambda s: rope("yarn", factor=4.0, original_max_position_embeddings=s.original)
         | {"attention_bias": True, "max_position_embeddings": 4 * s.original}, {"head_dim": 16},
         ({"rope_scaling": None},), flat_rope()),

    Case("mistral_window", "mistral", lambda s: rope("default") | {"sliding_window": s.window}, {},
         ({"sliding_window": None}, {"sliding_window": 11})),
    Case("mistral_hub", "mistral", lambda s: rope("default", 1e6) | {"sliding_window": None},
         {"head_dim": 12}, ({"sliding_window": 10},), flat_rope()),

    Case("smollm3", "smollm3",
         lambda s: rope("default", 5e6) | {"no_rope_layers": [i % 3 % 2 for i in range(s.layers)]},
         {"tied": True}, ({"no_rope_layers": [1, 1, 1, 1]},)),
    Case("smollm3_bias", "smollm3", lambda s: rope("default") | {"attention_bias": True, "mlp_bias": True}),
    Case("smollm3_window_hub", "smollm3",
         lambda s: rope("default") | {"use_sliding_window": True, "sliding_window": s.window, "no_rope_layer_interval": 3},
         {"tied": True}, ({"use_sliding_window": False},), flat_rope(["no_rope_layers", "attention_bias", "mlp_bias"])),

    Case("olmo2", "olmo2", lambda s: rope("default", 5e5)),
    Case("olmo2_hub", "olmo2", lambda s: rope("default", 5e5) | {"rms_norm_eps": 1e-6, "attention_bias": True},
         {"kv_heads": 4}, (), flat_rope()),

    Case("phi3", "phi3", lambda s: rope("default", partial_rotary_factor=0.5), {"tied": True},
         ({"rope_parameters": DEFAULT | {"partial_rotary_factor": 1.0}},)),
    Case("phi3_short_hub", "phi3",
         lambda s: longrope(s, 1.0) | {"max_position_embeddings": 4 * s.length, "original_max_position_embeddings": s.length},
         {"heads": 2, "head_dim": 16}, ({"rope_scaling": None},), phi3_hub),
    Case("phi3_long_hub", "phi3",
         lambda s: longrope(s, 1.0) | {"max_position_embeddings": 4 * s.original, "original_max_position_embeddings": s.original},
         {"heads": 2, "head_dim": 16, "kv_heads": 1}, ({"original_max_position_embeddings": 64},), phi3_hub),
    Case("phi3_window_hub", "phi3", lambda s: rope("default", partial_rotary_factor=0.5) | {"sliding_window": s.window},
         {"kv_heads": 4}, ({"sliding_window": None},), phi3_hub),

    Case("gemma2", "gemma2",
         lambda s: rope("default") | alternating(s, 2)
         | {"query_pre_attn_scalar": 5, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
         {"tied": True},
         ({"query_pre_attn_scalar": 8}, {"attn_logit_softcapping": None}, {"final_logit_softcapping": None},
          {"sliding_window": 11}, {"hidden_activation": "gelu"})),
    Case("gemma2_hub", "gemma2",
         lambda s: rope("default") | {"sliding_window": s.window, "query_pre_attn_scalar": 12,
                                      "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
         {"tied": True, "layers": 5, "head_dim": 12, "kv_heads": 1}, ({"sliding_window": 100},), gemma2_hub),
    Case("gemma2_no_caps", "gemma2",
         lambda s: rope("default") | alternating(s, 2) | {"attention_bias": True, "query_pre_attn_scalar": s.head_dim,
                                       "attn_logit_softcapping": None, "final_logit_softcapping": None}),

    Case("gemma3", "gemma3_text",
         lambda s: alternating(s, 3) | {"query_pre_attn_scalar": 5, "rope_parameters": {
             "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
             "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}}},
         {"tied": True, "layers": 6}, ({"query_pre_attn_scalar": 8}, {"sliding_window": 100})),
    Case("gemma3_hub", "gemma3_text",
         lambda s: {"layer_types": ["sliding_attention" if (i + 1) % 3 else "full_attention" for i in range(s.layers)],
                    "sliding_window": s.window, "query_pre_attn_scalar": s.head_dim, "rope_parameters": {
                        "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
                        "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0}}},
         {"tied": True, "layers": 7, "kv_heads": 1},
         ({"rope_local_base_freq": 1e5}, {"rope_scaling": None}, {"sliding_window_pattern": 2}), gemma3_hub),
    Case("gemma3_caps", "gemma3_text",
         lambda s: {"layer_types": ["full_attention", "sliding_attention", *["full_attention"] * (s.layers - 2)],
                    "sliding_window": s.window, "query_pre_attn_scalar": 8, "attention_bias": True,
                    "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
         {}, ({"final_logit_softcapping": None},)),

    Case("gemma4", "gemma4_text",
         lambda s: gemma4(s, num_kv_shared_layers=s.layers // 2 - 1, use_double_wide_mlp=True),
         {"tied": True, "layers": 8},
         ({"sliding_window": 100}, {"final_logit_softcapping": None})),
    Case("gemma4_hub", "gemma4_text",
         lambda s: gemma4(s, num_kv_shared_layers=min(2, s.layers - 3), use_double_wide_mlp=False),
         {"tied": True, "layers": 6, "kv_heads": 1}, (), gemma4_hub, shared_keys_and_values),
    Case("gemma4_one_kv_hub", "gemma4_text",
         lambda s: gemma4(s, attention_k_eq_v=True, num_global_key_value_heads=1, hidden_size_per_layer_input=0,
                          attention_bias=True),
         {"layers": 4}, (), gemma4_hub),
    Case("gemma4_plain", "gemma4_text",
         lambda s: gemma4(s, num_kv_shared_layers=0, final_logit_softcapping=None, global_head_dim=s.head_dim),
         {"layers": 4}),
]


def fill(model, r):
    """Random values, by sorted name, that no mistake can hide behind."""
    centre = 0.0 if model.config.model_type in ("gemma2", "gemma3_text") else 1.0  # (1 + w) or w
    state = model.state_dict()
    for name in sorted(state):
        p = state[name]
        v = r.normal(size=tuple(p.shape))
        if "norm" in name:
            v = centre + 0.3 * v
            if "q_norm" in name and model.config.model_type == "gemma4_text":
                v *= 1.5 / np.sqrt(p.shape[0])  # nothing else scales the scores
        elif "layer_scalar" in name:
            v = 1.0 + 0.2 * v
        elif "embed" in name or name.endswith("bias"):
            v *= 0.3
        else:
            v *= 1.2 / np.sqrt(p.shape[1])
        p.copy_(torch.tensor(v))


def logits(directory, tokens, dtype=torch.float32, **changes):
    """[n, vocab] of the whole sequence; `changes` of the configuration as config.json would have them."""
    if not changes:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager")
    else:
        with tempfile.TemporaryDirectory() as t:
            c = json.loads((directory / "config.json").read_text()) | changes
            (Path(t) / "config.json").write_text(json.dumps(c))
            for path in directory.glob("model*"):
                shutil.copy(path, t)
            model = AutoModelForCausalLM.from_pretrained(t, dtype=dtype, attn_implementation="eager")
    with torch.no_grad():
        # Hidden states are asked for because Gemma 4 without per-layer inputs fails on another path.
        out = model.eval()(input_ids=tokens[None], use_cache=False, output_hidden_states=True)
    return out.logits[0].to(dtype)


def difference(a, b):
    """Largest difference over the largest magnitude of `b`."""
    return float((a.double() - b.double()).abs().max() / b.abs().max())


def write(case, directory, seed=None):
    """One directory, and what is to be said about it."""
    key = zlib.crc32(case.name.encode())
    r = np.random.default_rng([key] if seed is None else [key, seed])
    s = Shape(**case.shape) if seed is None else Shape.random(r)
    keys = {
        "vocab_size": s.vocab, "hidden_size": s.hidden, "intermediate_size": s.ffn, "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads, "num_key_value_heads": s.kv_heads, "head_dim": s.head_dim,
        "max_position_embeddings": 256, "tie_word_embeddings": s.tied, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
    }
    if case.model_type in ("qwen2", "olmo2", "phi3", "smollm3"):
        # These take hidden / heads and have no key of their own for it.
        keys["hidden_size"] = s.heads * s.head_dim
        del keys["head_dim"]
    config = AutoConfig.for_model(case.model_type, **keys | case.config(s))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        fill(model, r)
    model = model.to(DTYPES[s.dtype])
    shutil.rmtree(directory, ignore_errors=True)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(directory, max_shard_size=5 * 10**9 if s.shards == 1 else int(1.1 * size / s.shards))
    (directory / "generation_config.json").unlink(missing_ok=True)
    if case.extra and s.shards == 1:
        tensors = load_file(directory / "model.safetensors")
        tensors |= {k: v.to(DTYPES[s.dtype]) for k, v in case.extra(model, r).items()}
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    tokens = torch.tensor(r.integers(s.vocab, size=s.length))
    out = logits(directory, tokens)
    if case.hub:
        path = directory / "config.json"
        path.write_text(json.dumps(case.hub(json.loads(path.read_text())), indent=2) + "\n")
        assert torch.equal(out, logits(directory, tokens)), f"{case.name}: config.json rewritten is another model"
    save_file({"tokens": tokens, "logits": out.contiguous()}, directory / "expected.safetensors")
    assert out.isfinite().all()
    for change in case.matters if seed is None else ():
        moved = difference(logits(directory, tokens, **change), out)
        assert moved > 3e-4, f"{case.name}: {change} moves the logits by {moved:.1e} only"
    noise = difference(logits(directory, tokens, torch.float64), out)
    return f"{s.length} tokens, |logits| up to {out.abs().max():.1f}, rounding {noise:.0e} of it"


def compare(made, kept):
    """Stops at the first difference between two directories of one case."""
    for path in sorted(made.iterdir()):
        other = kept / path.name
        assert other.exists(), f"{other} is missing"
        if path.suffix == ".json":
            a, b = (json.loads(p.read_text()) for p in (path, other))
            versions = {c.pop("transformers_version", None) for c in (a, b)}
            if len(versions) == 1:
                assert a == b, f"{other} differs"
        else:
            a, b = load_file(path), load_file(other)
            assert a.keys() == b.keys(), f"{other}: other tensors"
            for name in a:
                same = difference(a[name], b[name]) < 1e-5 if name == "logits" else torch.equal(a[name], b[name])
                assert same, f"{other}: {name} differs"
    spare = {p.name for p in kept.iterdir()} - {p.name for p in made.iterdir()}
    assert not spare, f"{kept}: nothing makes {spare}"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check", action="store_true")
    p.add_argument("--out", type=Path)
    p.add_argument("--seed", type=int, default=0, help="of the shapes and values under --out")
    p.add_argument("--cases", nargs="*", default=[c.name for c in CASES])
    a = p.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    unknown = set(a.cases) - {c.name for c in CASES}
    if unknown:
        sys.exit(f"no case is called {', '.join(sorted(unknown))}")
    for case in (c for c in CASES if c.name in a.cases):
        if a.check:
            with tempfile.TemporaryDirectory() as t:
                said = write(case, Path(t) / case.name)
                compare(Path(t) / case.name, ROOT / case.name)
        elif a.out:
            said = write(case, a.out / f"{case.name}-{a.seed}", a.seed)
        else:
            said = write(case, ROOT / case.name)
        print(f"{case.name}: {said}", flush=True)


if __name__ == "__main__":
    main()
