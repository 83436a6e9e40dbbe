"""Adapters as PEFT writes them beside small models of several families, and the logits of both.

    python tests/reference/adapters.py            rewrite tests/golden/adapters/
    python tests/reference/adapters.py --check    make them again and compare with what is there
    python tests/reference/adapters.py --open BASE ADAPTER --ids IDS.json --logits FILE.safetensors
        the adapters of a directory in PEFT, beside the model of another: its logits against those
        that `score --adapter ADAPTER --ids IDS.json --logits FILE.safetensors` wrote

Needs torch, transformers, peft and safetensors. Every case is a directory of `adapter_config.json`
and `adapter_model.safetensors` as `save_pretrained` leaves them, whose base is one of
tests/golden/families/ (`families.py`), and `expected.safetensors`: `tokens` [n] (I64) and `logits`
[n, vocab] (F32), which PEFT computes in f32 with eager attention. Both matrices of every adapter are
random, and must move the logits by more than a hundredth of their scale.
"""
import argparse
import json
import shutil
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

REPOSITORY = Path(__file__).resolve().parent.parent.parent
FAMILIES = Path("tests/golden/families")
ROOT = REPOSITORY / "tests" / "golden" / "adapters"
WITHIN = 1e-4

CASES = {
    "llama": ("llama", dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])),
    "qwen2_all": ("qwen2", dict(r=3, lora_alpha=5, target_modules="all-linear")),
    "gemma3_rslora": (
        "gemma3",
        dict(r=5, lora_alpha=3, use_rslora=True, target_modules=["self_attn.o_proj", "down_proj"]),
    ),
}


def base_of(family):
    return AutoModelForCausalLM.from_pretrained(
        REPOSITORY / FAMILIES / family, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens[None], use_cache=False).logits[0].float().contiguous()


def write(name, directory):
    family, settings = CASES[name]
    r = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    base = base_of(family)
    tokens = load_file(REPOSITORY / FAMILIES / family / "expected.safetensors")["tokens"]
    before = logits(base, tokens)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=r) * 0.3)
    after = logits(model, tokens)
    moved = float((after - before).abs().max() / before.abs().max())
    assert moved > 1e-2, f"{name}: the adapters move the logits by {moved:.1e} only"
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    (directory / "README.md").unlink(missing_ok=True)
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = str(FAMILIES / family)
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file({"tokens": tokens, "logits": after}, directory / "expected.safetensors")
    return f"{name}: rank {settings['r']}, moves the logits by {moved:.2f} of their scale"


def check(name):
    with tempfile.TemporaryDirectory() as made:
        made = Path(made)
        write(name, made)
        for path in sorted(made.iterdir()):
            kept = ROOT / name / path.name
            assert kept.exists(), f"{kept} is missing"
            if path.suffix == ".json":
                a, b = json.loads(path.read_text()), json.loads(kept.read_text())
                # Later versions have more settings.
                same = all(a.get(key) == value for key, value in b.items() if key != "peft_version")
                assert same, f"{kept} differs"
                continue
            a, b = load_file(path), load_file(kept)
            assert a.keys() == b.keys(), f"{kept} has other tensors"
            for key in a:
                apart = float((a[key].double() - b[key].double()).abs().max())
                assert apart < 1e-4, f"{kept}: {key} is off by {apart:.1e}"
    return f"{name}: the same"


def open_in_peft(base, adapter, ids, theirs):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    tokens = torch.tensor(json.loads(ids.read_text()))
    alone = logits(model.eval(), tokens)
    ours = logits(PeftModel.from_pretrained(model, adapter).eval(), tokens)
    theirs = load_file(theirs)["logits"]
    scale = float(ours.abs().max())
    apart = float((ours - theirs).abs().max()) / scale
    moved = float((ours - alone).abs().max()) / scale
    print(f"{adapter}: {apart:.1e} of {scale:.3g}; the adapters move the logits by {moved:.1e} of it")
    if not np.isfinite(apart) or apart > WITHIN:
        sys.exit(f"expected at most {WITHIN}")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check", action="store_true")
    p.add_argument("--open", nargs=2, type=Path, metavar=("BASE", "ADAPTER"))
    p.add_argument("--ids", type=Path)
    p.add_argument("--logits", type=Path)
    a = p.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if a.open:
        if not (a.ids and a.logits):
            p.error("--open needs --ids and --logits")
        return open_in_peft(*a.open, a.ids, a.logits)
    for name in CASES:
        if a.check:
            print(check(name))
        else:
            shutil.rmtree(ROOT / name, ignore_errors=True)
            print(write(name, ROOT / name))


if __name__ == "__main__":
    main()
