#!/usr/bin/env bash
# Runs a bench, or the tests, as on a processor without AVX-512: a copy of the project is built with crates whose
# question to the processor is always answered with no.
#   bash benches/without_avx512.sh FOLDER ARGUMENTS_OF_CARGO…
#   bash benches/without_avx512.sh target/avx2 bench --bench inference -- --prompts 512,4096
#   bash benches/without_avx512.sh target/avx2 test --release
# FOLDER keeps the copy, what is built, and what a bench writes, in bench/.
set -euo pipefail
folder=$(mkdir -p "$1" && realpath "$1")
shift
cd "$(dirname "$0")/.."

copy=$folder/without_avx512
rm -rf "$copy"
mkdir -p "$copy/crates" "$folder/bench"
git ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d '' file; do [ ! -e "$file" ] || printf '%s\0' "$file"; done |
    tar --create --null --files-from=- | tar --extract --directory "$copy"
echo '[patch.crates-io]' >> "$copy/Cargo.toml"
# Those that choose instructions: our kernels' pulp, the matrix products' gemm and rten-simd, Flex's macerator.
python3 - "$copy" << 'PYTHON'
import json, os, pathlib, re, shutil, subprocess, sys

copy = pathlib.Path(sys.argv[1])
metadata = ["cargo", "metadata", "--locked", "--format-version", "1", "--filter-platform", "x86_64-unknown-linux-gnu"]
packages = json.loads(subprocess.run(metadata, check=True, stdout=subprocess.PIPE).stdout)["packages"]
of_any = (
    r"::std(?:::arch)?::is_x86_feature_detected!\((\$\w+)\)",
    r"(::std::arch::is_x86_feature_detected!(\1) && !const { \1.len() > 5 && \1.as_bytes()[3] == b'5' })",
)
of_avx512 = (r"if crate::is_avx512_supported\(\)", r"if false")
for name, (question, answer) in {
    "pulp": of_any,
    "gemm-common": of_any,
    "macerator": of_any,
    "rten-simd": of_avx512,
}.items():
    [package] = [package for package in packages if package["name"] == name]
    crate = copy / "crates" / name
    # With the times of its files, by which cargo knows that nothing has changed.
    shutil.copytree(pathlib.Path(package["manifest_path"]).parent, crate)
    patched = 0
    for file in crate.glob("src/**/*.rs"):
        text, n = re.subn(question, answer, file.read_text())
        if n:
            times = file.stat()
            file.write_text(text)
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
            patched += n
    if patched != 1:
        sys.exit(f"{name} asks the processor in {patched} places; expected 1")
    with (copy / "Cargo.toml").open("a") as manifest:
        manifest.write(f'{name} = {{ path = "crates/{name}" }}\n')
PYTHON
cd "$copy"
mkdir -p target
ln -s "$folder/bench" target/bench
FUSEDKV_WITHOUT_AVX512=1 CARGO_TARGET_DIR="$folder/target" cargo "$@"
