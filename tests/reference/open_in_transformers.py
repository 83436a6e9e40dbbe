"""Opens directories with transformers and compares its logits with those another program computed.

    python tests/reference/open_in_transformers.py DIR... [--tokens FILE.json --logits FILE.npy] [--within 1e-4]

DIR is a model in the hub's layout. FILE.json holds token ids, one list or one list per row (rows
of one length); FILE.npy the logits, [n, vocab] or [rows, n, vocab] in f32, or [vocab] of the last
position alone. Without the two options each DIR must have `tokens.json` and `logits.npy` of its
own, or `expected.safetensors` as families.py writes it.

transformers computes in f32 with eager attention. A line per directory: the largest difference
over the largest magnitude of transformers' logits, where it is, and what transformers says is
missing from the files or has no place in the model. The exit status is 1 if any is beyond
--within, or if a tensor is missing or one too many.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def given(directory, tokens, logits):
    """[rows, n] token ids and [rows, m, vocab] logits of the last m positions."""
    if tokens is None and (directory / "expected.safetensors").exists():
        t = load_file(directory / "expected.safetensors")
        ids, out = t["tokens"].numpy(), t["logits"].numpy()
    else:
        ids = np.array(json.loads((tokens or directory / "tokens.json").read_text()), dtype=np.int64)
        out = np.load(logits or directory / "logits.npy")
    ids = np.atleast_2d(ids)
    while out.ndim < 3:
        out = out[None]
    if out.shape[0] != ids.shape[0] or out.shape[1] > ids.shape[1]:
        sys.exit(f"{directory}: logits of shape {out.shape} do not belong to tokens of shape {ids.shape}")
    return ids, out


def compare(directory, tokens, logits):
    """The largest difference over the scale, and a line about it."""
    ids, theirs = given(directory, tokens, logits)
    model, told = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    with torch.no_grad():
        # Hidden states are asked for because Gemma 4 without per-layer inputs fails on another path.
        out = model.eval()(input_ids=torch.tensor(ids), use_cache=False, output_hidden_states=True).logits
    ours = out[:, -theirs.shape[1] :].float().numpy()
    if ours.shape != theirs.shape:
        return float("inf"), f"{directory}: shape {theirs.shape}, expected {ours.shape}"
    apart = np.abs(ours.astype(np.float64) - theirs)
    apart[~np.isfinite(theirs)] = np.inf
    where = tuple(int(i) for i in np.unravel_index(apart.argmax(), apart.shape))
    ratio = float(apart.max() / np.abs(ours).max())
    line = f"{directory}: {type(model).__name__}, {ratio:.1e} of {np.abs(ours).max():.3g}, at {where}"
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if told[kind]:
            line += f"; {kind.replace('_', ' ')}: {sorted(map(str, told[kind]))}"
            ratio = float("inf")
    return ratio, line


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("directories", nargs="+", type=Path)
    p.add_argument("--tokens", type=Path)
    p.add_argument("--logits", type=Path)
    p.add_argument("--within", type=float, default=1e-4, help="of the logits' scale (default 1e-4)")
    a = p.parse_args()
    if (a.tokens is None) != (a.logits is None):
        p.error("--tokens and --logits belong together")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    beyond = 0
    for directory in a.directories:
        ratio, line = compare(directory, a.tokens, a.logits)
        print(line, flush=True)
        beyond += not ratio <= a.within
    if beyond:
        sys.exit(f"{beyond} of {len(a.directories)} beyond {a.within:g}")


if __name__ == "__main__":
    main()
