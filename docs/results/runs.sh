#!/usr/bin/env bash
# Makes the runs of docs/results.md and takes each comparison in as it ends, those that say most first.
# Finished runs are kept and interrupted ones go on: start it again at any time.
#   bash docs/results/runs.sh KERNEL OUT
# KERNEL: the folder of documents that docs/results.md says how to get. OUT: where runs are kept.
set -euo pipefail
kernel=$(realpath "$1") out=$(mkdir -p "$2" && realpath "$2")
cd "$(dirname "$0")/../.."
cargo build --release --example compare --example score
export RAYON_NUM_THREADS=1

shape=(--vocab 2048 --layers 8 --context 256 --batch 8 --prompt 8)
compare() { target/release/examples/compare "${shape[@]}" "$@"; }

# Tokens are made once: one step of one run leaves them in its folder.
if [ ! -e "$out/tokens/table.md" ]; then
    compare --data "$kernel" --valid 0.01 --steps 1 --seeds 1 --methods standard --out "$out/tokens"
fi

# RATE SEEDS ARGUMENTS…: a folder for each learning rate, to which methods and seeds are added.
at() {
    local rate=$1 seeds=$2
    compare --tokens "$out/tokens/train.bin" "$out/tokens/valid.bin" --steps 300 --validations 6 \
        --lr "$rate" --seeds "$seeds" --out "$out/lr-$rate" "${@:3}"
    python3 docs/results/make.py --add "kernel/lr-$rate" "$out/lr-$rate"
}

# Rates by one seed, until the best has a worse one to each side.
for rate in 6e-3 12e-3 24e-3 48e-3 96e-3 192e-3; do at "$rate" 1 --methods standard; done
for rate in 3e-3 6e-3 12e-3 24e-3 1.5e-3; do at "$rate" 1 --methods fused-kv fused-kv-lite; done
for rate in 12e-3 24e-3 48e-3; do at "$rate" 1 --methods gqa cla yoco; done
at 96e-3 1 --methods gqa
for rate in 6e-3 12e-3 24e-3; do
    at "$rate" 1 --methods fused-kv-lite:n=1 --plans docs/results/controls.json
done

# More seeds at the best.
for seeds in 2 3; do
    at 96e-3 "$seeds" --methods standard
    at 3e-3 "$seeds" --methods fused-kv fused-kv-lite
    at 48e-3 "$seeds" --methods gqa
    at 24e-3 "$seeds" --methods cla yoco
    at 12e-3 "$seeds" --methods fused-kv-lite:n=1 --plans docs/results/controls.json
done

python3 docs/results/documents.py target/release/examples/score "$out/tokens/valid.bin" \
    docs/results/runs/kernel/documents.json "$out"/lr-*/runs/*
