#!/usr/bin/env bash
# Makes the runs of docs/results.md and takes each comparison in as it ends, those that say most first.
# Finished runs are kept and interrupted ones go on: start it again at any time.
#   bash docs/results/runs.sh KERNEL PROSE OUT
# KERNEL, PROSE: the folders of documents that docs/results.md says how to get. OUT: where runs are kept.
set -euo pipefail
kernel=$(realpath -e "$1") prose=$(realpath -e "$2") out=$(mkdir -p "$3" && realpath "$3")
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

at 3e-3 5 --methods fused-kv fused-kv-lite
at 48e-3 5 --methods standard gqa
at 24e-3 5 --methods standard gqa cla yoco
at 12e-3 5 --methods standard

python3 docs/results/documents.py target/release/examples/score "$out/tokens/valid.bin" \
    docs/results/runs/kernel/documents.json "$out"/lr-*/runs/*

# The second corpus, every method at the rate that was its best on the first.
if [ ! -e "$out/prose/tokens/table.md" ]; then
    compare --data "$prose" --valid 0.03 --steps 1 --seeds 1 --methods standard --out "$out/prose/tokens"
fi
on_prose() {
    local rate=$1 seeds=$2
    compare --tokens "$out/prose/tokens/train.bin" "$out/prose/tokens/valid.bin" --steps 300 --validations 6 \
        --lr "$rate" --seeds "$seeds" --out "$out/prose/lr-$rate" --methods "${@:3}"
    python3 docs/results/make.py --add "prose/lr-$rate" "$out/prose/lr-$rate"
}
for seeds in 1 3 5; do
    on_prose 48e-3 "$seeds" standard gqa
    on_prose 3e-3 "$seeds" fused-kv fused-kv-lite
    on_prose 24e-3 "$seeds" cla yoco
done
python3 docs/results/documents.py target/release/examples/score "$out/prose/tokens/valid.bin" \
    docs/results/runs/prose/documents.json "$out"/prose/lr-*/runs/*

# Ten times as long.
long() {
    local rate=$1 seeds=$2
    compare --tokens "$out/tokens/train.bin" "$out/tokens/valid.bin" --steps 3000 --validations 10 \
        --lr "$rate" --seeds "$seeds" --out "$out/long-$rate" --methods "${@:3}"
    python3 docs/results/make.py --add "kernel/long-$rate" "$out/long-$rate"
}
long 6e-3 1 standard fused-kv gqa
long 24e-3 1 standard gqa
long 3e-3 1 fused-kv
