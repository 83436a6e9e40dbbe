#!/usr/bin/env python3
"""Run this crate and other programs turn by turn on one model, and print ratios of their medians.

    python3 benches/beside.py --setup target/peers              # once: llama.cpp, PyTorch
    python3 benches/beside.py --peers target/peers --prompts 512,2048
    python3 benches/beside.py --peers target/peers --model DIR --weights model,f16,int8 --cache f16
    python3 benches/beside.py --of docs/benchmarks/beside.json  # the tables of docs/benchmarks.md

Without --model it is a random one of shape S (16 layers of width 768), which the bench writes. Every
program reads the same weights and tokens, and before a time is printed its logits after the prompt are
compared with the crate's, weights as they are in the model. Times are of 2 turns each, the second one
counted, every program in its turn; figures are medians over the turns. Other programs: --peer
NAME=COMMAND, whose last line is a JSON object with `ttft_s` and `tpot_s`; {prompt} and {steps} are
filled in.
"""

import argparse
import array
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
# What llama.cpp calls a format of ours, and how far logits may be off, of their largest.
FORMATS = {"model": ("f32", 2e-3), "f16": ("f16", 1e-2), "int8": ("q8_0", 0.1)}
PACKAGES = ["torch", "transformers>=4.57", "numpy", "gguf", "safetensors"]


def setup(directory):
    """An environment with PyTorch, and llama.cpp built for this processor."""
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    pip = [str(directory / "bin/pip"), "install", "-q"]
    index = ["--extra-index-url", "https://download.pytorch.org/whl/cpu"]
    subprocess.run([*pip, *index, *PACKAGES], check=True)
    native = os.environ | {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAMA_CURL=OFF"}
    llama = ["--no-binary", "llama-cpp-python", "llama-cpp-python"]
    subprocess.run([*pip, *llama], check=True, env=native)


def last_json(command, **options):
    run = subprocess.run(command, capture_output=True, text=True, **options)
    if run.returncode != 0:
        sys.exit(f"{command} failed:\n{run.stderr[-2000:]}")
    return json.loads(run.stdout.strip().splitlines()[-1])


def ours(args, prompt, extra, directory):
    """The crate's bench: {name: figures}, logits in `directory`."""
    out = directory / "inference.json"
    command = ["cargo", "bench", "--bench", "inference", "--", "--methods", args.methods]
    command += ["--weights", args.weights, "--cache", args.cache]
    command += ["--prompts", str(prompt), "--decode", str(args.steps)]
    command += ["--repeats", "1", "--vocabularies", "--out", str(out), *extra]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        sys.exit(run.stderr[-2000:])
    return {f"fusedkv {case['method']}": case for case in json.loads(out.read_text())["cases"]}


def floats(path):
    numbers = array.array("f")
    numbers.frombytes(pathlib.Path(path).read_bytes())
    return numbers


def off(found, expected):
    """The largest difference, of the largest magnitude."""
    scale = max(abs(x) for x in expected)
    return max(abs(x - y) for x, y in zip(found, expected, strict=True)) / scale


def processor():
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    told = dict(line.split(":", 1) for line in lines if ":" in line)
    told = {key.strip(): value.strip() for key, value in told.items()}
    flags = told.get("flags", told.get("Features", "")).split()
    known = [flag for flag in flags if flag in ("avx2", "fma", "f16c", "asimd") or "avx512" in flag]
    return f"{told.get('model name', platform.machine())}, {os.cpu_count()} threads: {' '.join(known)}"


def commands(args, directory):
    """Peers by name: a function from a prompt to a command, the file of its logits, how far they may be."""
    peers = {}
    if args.peers:
        python = str(args.peers / "bin/python")
        for weights in args.weights.split(","):
            if weights not in FORMATS:
                continue
            kind, tolerance = FORMATS[weights]
            file, logits = directory / f"{kind}.gguf", directory / f"{kind}.f32"
            make = [python, HERE / "peers/gguf_of.py", args.model, file, kind]
            subprocess.run(make, check=True, capture_output=True)
            command = [python, HERE / "peers/llama.py", file]
            peers[f"llama.cpp {kind}"] = (command, logits, tolerance)
        command = [python, HERE / "peers/pytorch.py", args.model]
        peers["PyTorch"] = (command, directory / "torch.f32", FORMATS["model"][1])
    return peers


def measure(args, prompt, peers, directory):
    """{name: [(ttft, tpot) of every turn]}, and how far logits are off."""
    seconds, agreement = {}, {}
    for turn in range(args.turns):
        extra = ["--model", str(args.model), "--logits", str(directory)]
        figures = ours(args, prompt, extra, directory)
        plain = [name for name in figures if " weights" not in name]
        if not plain:
            sys.exit("--weights has to have `model`, which other programs' logits are compared with")
        reference = floats(directory / f"{plain[0].removeprefix('fusedkv ')}.f32")
        for name, (command, logits, tolerance) in peers.items():
            figures[name] = last_json([*command, str(prompt), str(args.steps), logits])
            agreement[name] = off(floats(logits), reference)
            if not agreement[name] <= tolerance:
                sys.exit(f"{name} computes something else: logits are off by {agreement[name]:.1e}")
        for name, command in args.peer.items():
            command = command.format(prompt=prompt, steps=args.steps)
            figures[name] = last_json(command, shell=True)
        for name, figure in figures.items():
            seconds.setdefault(name, []).append((figure["ttft_s"], figure["tpot_s"]))
        print(f"prompt {prompt}: turn {turn + 1} of {args.turns}", file=sys.stderr, flush=True)
    return seconds, agreement


def of_the_format(name):
    """llama.cpp with the weights that a case of ours has, if it is run with them."""
    weights = name.split(" weights")[0].split()[-1] if " weights" in name else "model"
    return f"llama.cpp {FORMATS[weights][0]}" if weights in FORMATS else None


def table(prompt, seconds, agreement):
    """Medians of the turns; ours beside the llama.cpp of the same weights, all beside each other program."""
    medians = {
        name: [statistics.median(column) for column in zip(*turns)]
        for name, turns in seconds.items()
    }
    others = [name for name in medians if not name.startswith(("fusedkv", "llama.cpp"))]
    if any(name.startswith("llama.cpp") for name in medians):
        others.insert(0, "llama.cpp")
    heads = "".join(f" TTFT / {name} | TPOT / {name} |" for name in others)
    lines = [f"| prompt {prompt} | TTFT s | TPOT ms | logits off |{heads}"]
    lines.append("|---|---|---|---|" + "---|---|" * len(others))
    for name, (ttft, tpot) in medians.items():
        ratios = ""
        for other in others:
            if other == "llama.cpp":
                other = of_the_format(name) if name.startswith("fusedkv") else other
            of = medians.get(other)
            ratios += f" {ttft / of[0]:.2f} | {tpot / of[1]:.2f} |" if of else "  |  |"
        agrees = f"{agreement[name]:.0e}" if name in agreement else ""
        lines.append(f"| {name} | {ttft:.3f} | {tpot * 1e3:.1f} | {agrees} |{ratios}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setup", type=pathlib.Path, metavar="DIR", help="make the peers there")
    parser.add_argument("--peers", type=pathlib.Path, metavar="DIR", help="where --setup made them")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--model", type=pathlib.Path, metavar="DIR", help="a Llama or Qwen3 model")
    parser.add_argument("--methods", default="standard,fused_kv", help="methods of this crate")
    parser.add_argument("--weights", default="model", help="formats: model, f16, bf16, int8, int4")
    parser.add_argument("--cache", default="model", help="formats of caches, llama.cpp's is f16")
    parser.add_argument("--prompts", default="512,2048", help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=16, help="tokens to decode")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, help="where to write every turn's figures")
    parser.add_argument("--of", type=pathlib.Path, metavar="FILE", help="print again what --out wrote")
    args = parser.parse_args()
    if args.of:
        results = json.loads(args.of.read_text())
        print(f"{results['date']}, {results['processor']}\n")
        for prompt, found in results["prompts"].items():
            print(table(prompt, found["seconds"], found["logits_off"]), end="\n\n")
        return
    args.peer = dict(peer.split("=", 1) for peer in args.peer)
    if args.setup:
        return setup(args.setup)
    today = datetime.date.today().isoformat()
    with tempfile.TemporaryDirectory() as directory:
        directory = pathlib.Path(directory)
        if args.model is None:
            args.model = directory / "model"
            ours(args, 8, ["--save", str(args.model)], directory)
        peers = commands(args, directory)
        results = {"date": today, "processor": processor(), "prompts": {}}
        print(f"{today}, {results['processor']}\n", flush=True)
        for prompt in args.prompts.split(","):
            seconds, agreement = measure(args, int(prompt), peers, directory)
            results["prompts"][prompt] = {"seconds": seconds, "logits_off": agreement}
            print(table(prompt, seconds, agreement), end="\n\n", flush=True)
        if args.out:
            args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
