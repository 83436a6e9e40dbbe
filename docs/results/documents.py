#!/usr/bin/env python3
"""Losses of every held-out document by trained models, for the intervals of docs/results.md.

    python3 docs/results/documents.py SCORE VALID FILE RUN…

SCORE is the example `score` as built, VALID the held-out tokens (`valid.bin` of a comparison), RUN the
folder of a finished run with its model. Sums in nats are added to FILE, by learning rate, method and
seed; what is there is kept. Needs NumPy.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from make import rate_name, write

CONTEXT = 256
# The tokenizer's end of a document, which stands behind each.
END = 0


def main():
    program, valid, out, *runs = sys.argv[1:]
    out = Path(out)
    tokens = np.fromfile(valid, dtype="<u2").astype(np.int64)
    # The targets of whole windows, and the document that each is of: an end belongs to what it ends.
    targets = tokens[1 : (len(tokens) - 1) // CONTEXT * CONTEXT + 1]
    ends = np.cumsum(tokens == END)[: len(targets)]
    counts = np.bincount(ends)
    kept = json.loads(out.read_text()) if out.exists() else {"targets": counts.tolist(), "runs": {}}
    if kept["targets"] != counts.tolist():
        raise SystemExit(f"{out} is of other documents")
    with tempfile.TemporaryDirectory() as folder:
        ids = Path(folder, "ids.json")
        ids.write_text(json.dumps(tokens[: len(targets)].tolist()))
        for run in map(Path, runs):
            result = json.loads((run / "result.json").read_text())
            config = result["config"]
            name = f"{rate_name(config['learning_rate'])}/{result['method']}/{config['seed']}"
            if name in kept["runs"]:
                continue
            logits = Path(folder, "logits.safetensors")
            command = [program, "--model", run / "model", "--ids", ids]
            command += ["--context", str(CONTEXT), "--logits", logits]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            losses = nll(logits, targets)
            if abs(losses.mean() - result["valid_loss"]) > 2e-3:
                raise SystemExit(f"{run}: a mean of {losses.mean()}, trained to {result['valid_loss']}")
            sums = np.bincount(ends, weights=losses)
            kept["runs"][name] = [round(x, 3) for x in sums.tolist()]
            print(name, losses.mean(), result["valid_loss"], flush=True)
    kept["runs"] = dict(sorted(kept["runs"].items()))
    write(out, json.dumps(kept, indent=0) + "\n")


def nll(path, targets):
    """Negative log-likelihoods of the targets, of the logits in a file."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    shape = json.loads(raw[8:start])["logits"]["shape"]
    logits = np.frombuffer(raw, "<f4", offset=start).reshape(shape)
    if shape[0] != len(targets):
        raise SystemExit(f"{shape[0]} rows of logits for {len(targets)} targets")
    most = logits.max(1)
    norm = most + np.log(np.exp(logits - most[:, None]).sum(1, dtype=np.float64))
    return norm - logits[np.arange(len(targets)), targets]


if __name__ == "__main__":
    main()
