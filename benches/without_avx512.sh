#!/usr/bin/env bash
# Runs a bench as on a processor without AVX-512: a copy of the project is built with crates whose question
# to the processor is always answered with no.
#   bash benches/without_avx512.sh FOLDER ARGUMENTS_OF_CARGO_BENCH…
#   bash benches/without_avx512.sh target/avx2 --bench inference -- --prompts 512,4096
set -euo pipefail
folder=$(mkdir -p "$1" && realpath "$1")
shift
cd "$(dirname "$0")/.."

rm -rf "$folder/project" "$folder/crates"
mkdir -p "$folder/project" "$folder/crates"
git ls-files -z --cached --others --exclude-standard | tar --create --null --files-from=- |
    tar --extract --directory "$folder/project"
echo '[patch.crates-io]' >> "$folder/project/Cargo.toml"
# Those that choose instructions: our kernels' pulp, the matrix products' gemm, Flex's macerator.
cargo metadata --format-version 1 --filter-platform x86_64-unknown-linux-gnu | python3 -c '
import json, sys
for package in json.load(sys.stdin)["packages"]:
    if package["name"] in ("pulp", "gemm-common", "macerator"):
        print(package["name"], package["manifest_path"].removesuffix("/Cargo.toml"))
' | while read -r name source; do
    cp -r "$source" "$folder/crates/$name"
    grep -rlE 'std(::arch)?::is_x86_feature_detected!\(\$' "$folder/crates/$name/src" | xargs sed -i -E \
        's/::std(::arch)?::is_x86_feature_detected!\(\$(\w+)\)/(::std::arch::is_x86_feature_detected!($\2) \&\& !const { let name: \&[u8] = $\2.as_bytes(); name.len() > 5 \&\& name[3] == b'"'5'"' \&\& name[4] == b'"'1'"' })/'
    echo "$name = { path = \"$folder/crates/$name\" }" >> "$folder/project/Cargo.toml"
done
cd "$folder/project"
CARGO_TARGET_DIR="$folder/target" cargo bench "$@"
