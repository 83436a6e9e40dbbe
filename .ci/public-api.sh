#!/usr/bin/env bash
# Compares the public items that rustdoc lists with docs/public-api.txt; `--renew` writes it anew.
set -euo pipefail
cd "$(dirname "$0")/.."
list() {
    grep -o 'href="[^"]*\.html"' "${CARGO_TARGET_DIR:-target}/doc/fusedkv/all.html" |
        sed -E 's/href="(.*)\.html"/\1/' | grep -E '(^|/)(struct|enum|trait|fn|macro|type|constant)\.' |
        sed -E 's,/,::,g; s/(.*::)?(struct|enum|trait|fn|macro|type|constant)\.(.*)/\1\3 (\2)/' |
        LC_ALL=C sort -u
}
if [ "${1:-}" = --renew ]; then
    list >docs/public-api.txt
elif ! diff -u docs/public-api.txt <(list); then
    echo "The public items differ. If that is meant: bash .ci/public-api.sh --renew after cargo doc" >&2
    echo "with the features train and ndarray, and a line in CHANGELOG.md." >&2
    exit 1
fi
