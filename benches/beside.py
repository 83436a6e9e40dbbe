#!/usr/bin/env python3
"""Run this crate and other programs turn by turn, and print ratios of their medians.

    cargo bench --bench inference --no-run
    python3 benches/beside.py --prompt 2048 \\
        --peer "candle=candle-qwen3-bench prompt={prompt} steps={steps}" \\
        --peer "torch=python bench.py prompt={prompt} steps={steps}"

A peer is any command that prints, as its last line, a JSON object with the numbers `ttft_s` and
`tpot_s`. Needs Python's standard library only.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import tempfile


def ours(methods, prompt, steps):
    """Seconds of each method: {name: {"ttft_s": …, "tpot_s": …}}."""
    with tempfile.TemporaryDirectory() as directory:
        out = pathlib.Path(directory, "inference.json")
        command = ["cargo", "bench", "--bench", "inference", "--", "--methods", ",".join(methods)]
        command += ["--prompts", str(prompt), "--decode", str(steps), "--repeats", "1"]
        subprocess.run([*command, "--vocabularies", "--out", str(out)], check=True, capture_output=True)
        cases = json.loads(out.read_text())["cases"]
    return {f"fusedkv {case['method']}": case for case in cases}


def peer(command):
    """Seconds of another program."""
    run = subprocess.run(command, shell=True, check=True, capture_output=True, text=True)
    return json.loads(run.stdout.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default="standard,fused_kv", help="methods of this crate")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=16, help="tokens to decode")
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    peers = dict(peer.split("=", 1) for peer in args.peer)

    seconds = {}
    for turn in range(args.turns):
        figures = ours(args.methods.split(","), args.prompt, args.steps)
        for name, command in peers.items():
            figures[name] = peer(command.format(prompt=args.prompt, steps=args.steps))
        for name, figure in figures.items():
            seconds.setdefault(name, []).append((figure["ttft_s"], figure["tpot_s"]))
        print(f"turn {turn + 1} of {args.turns}", flush=True)

    medians = {
        name: tuple(statistics.median(column) for column in zip(*turns))
        for name, turns in seconds.items()
    }
    heads = "".join(f" TTFT / {name} | TPOT / {name} |" for name in peers)
    print(f"\nprompt {args.prompt}\n\n| | TTFT s | TPOT ms |{heads}")
    print("|---|---|---|" + "---|---|" * len(peers))
    for name, (ttft, tpot) in medians.items():
        ratios = "".join(
            f" {ttft / medians[other][0]:.2f} | {tpot / medians[other][1]:.2f} |" for other in peers
        )
        print(f"| {name} | {ttft:.3f} | {tpot * 1e3:.1f} |{ratios}")


if __name__ == "__main__":
    main()
