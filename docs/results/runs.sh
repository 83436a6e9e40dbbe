#!/usr/bin/env bash
# Makes the runs of docs/results.md and takes each comparison in as it ends, those that say most first.
# Finished runs are kept and interrupted ones go on: start it again at any time.
#   bash docs/results/runs.sh KERNEL PROSE OUT
# KERNEL, PROSE: the folders of documents that docs/results.md says how to get. OUT: where runs are kept.
set -euo pipefail
kernel=$(realpath -e "$1")
prose=$(realpath -e "$2")
out=$(mkdir -p "$3" && realpath "$3")
cd "$(dirname "$0")/../.."
cargo build --release --example compare --example score
export RAYON_NUM_THREADS=1

shape=(--vocab 2048 --layers 8 --context 256 --batch 8 --prompt 8)
compare() { target/release/examples/compare "${shape[@]}" "$@"; }

# CORPUS FOLDER SHARE: tokens are made once, with a share held out; one step of one run leaves them in its
# folder.
tokens() {
    [ -e "$out/$1/tokens/table.md" ] ||
        compare --data "$2" --valid "$3" --steps 1 --seeds 1 --methods standard --out "$out/$1/tokens"
}

# CORPUS NAME STEPS VALIDATIONS RATE SEEDS ARGUMENTS…: a folder for each learning rate, to which methods and seeds
# are added.
train() {
    local tokens=$out/$1/tokens name=$1/$2-$5
    compare --tokens "$tokens/train.bin" "$tokens/valid.bin" --steps "$3" --validations "$4" \
        --lr "$5" --seeds "$6" --out "$out/$name" "${@:7}"
    python3 docs/results/make.py --add "$name" "$out/$name"
}

# CORPUS NAME FILE: the losses of its held-out documents.
documents() {
    python3 docs/results/documents.py target/release/examples/score "$out/$1/tokens/valid.bin" \
        "docs/results/runs/$1/$3.json" "$out/$1/$2"-*/runs/*
}

tokens kernel "$kernel" 0.01
at() { train kernel lr 300 6 "$@"; }

# Rates by one seed, until the best has a worse one to each side.
for rate in 6e-3 12e-3 24e-3 48e-3 96e-3 192e-3; do at "$rate" 1 --methods standard; done
for rate in 3e-3 6e-3 12e-3 24e-3 1.5e-3; do at "$rate" 1 --methods fused-kv fused-kv-lite; done
for rate in 12e-3 24e-3 48e-3; do at "$rate" 1 --methods gqa cla yoco; done
at 96e-3 1 --methods gqa
for rate in 3e-3 6e-3 12e-3 24e-3; do
    at "$rate" 1 --methods fused-kv-lite:n=1 --plans docs/results/controls.json
done

# More seeds at the best, and at neighbouring rates.
for seeds in 2 3; do
    at 96e-3 "$seeds" --methods standard
    at 3e-3 "$seeds" --methods fused-kv fused-kv-lite
    at 48e-3 "$seeds" --methods gqa
    at 24e-3 "$seeds" --methods cla yoco
    at 12e-3 "$seeds" --methods fused-kv-lite:n=1 --plans docs/results/controls.json
done
at 6e-3 3 --methods fused-kv
at 12e-3 3 --methods fused-kv-lite

# Five where methods are compared, and at neighbouring rates that were as good.
at 3e-3 5 --methods fused-kv fused-kv-lite
at 48e-3 5 --methods standard gqa
at 24e-3 5 --methods standard gqa cla yoco
at 12e-3 5 --methods standard

documents kernel lr documents

# The second corpus, every method at the rate that was its best on the first.
tokens prose "$prose" 0.03
for seeds in 1 3 5; do
    train prose lr 300 6 48e-3 "$seeds" --methods standard gqa
    train prose lr 300 6 3e-3 "$seeds" --methods fused-kv fused-kv-lite
    train prose lr 300 6 24e-3 "$seeds" --methods cla yoco
done
documents prose lr documents

# Ten times as long.
train kernel long 3000 10 6e-3 1 --methods standard fused-kv gqa
for rate in 12e-3 24e-3; do train kernel long 3000 10 "$rate" 1 --methods standard gqa; done
for rate in 3e-3 1.5e-3; do train kernel long 3000 10 "$rate" 1 --methods fused-kv; done
# More seeds at the better of the rates.
for seeds in 2 3; do
    train kernel long 3000 10 12e-3 "$seeds" --methods standard
    train kernel long 3000 10 3e-3 "$seeds" --methods fused-kv
    train kernel long 3000 10 12e-3 "$seeds" --methods gqa
done
documents kernel long documents-long
