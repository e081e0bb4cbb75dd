#!/usr/bin/env bash
# The crate's tests against the library of this checkout, on the mock: test.sh [arguments of cargo test]
# PYTHON: the environment's interpreter, .venv's by default.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
root="$(cd ../.. && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
bash "$root/scripts/build-native" "$python"
TRTXPY_PYTHON="$(dirname "$(dirname "$python")")"
export TRTXPY_PYTHON TRTXPY_LIBRARY="$root/trtx_py/capi/libtrtxpy.so" TRTXPY_REQUIRE_LIBRARY=1
if cargo fmt --version >/dev/null 2>&1; then cargo fmt --check; fi
if cargo clippy --version >/dev/null 2>&1; then cargo clippy --quiet --offline --all-targets -- -D warnings; fi
for features in "" gpu mock,gpu; do
    cargo build --quiet --offline --no-default-features --features "$features"
done
cargo test --offline "$@"
