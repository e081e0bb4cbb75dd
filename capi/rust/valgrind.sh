#!/bin/sh
# The crate's tests under valgrind: no invalid access, and no block that is definitely lost. On the fake library, and on the
# real one: TRTXPY_LIBRARY and TRTXPY_PYTHON, by default this checkout's. valgrind.supp has what is not ours.
#   valgrind.sh [fake|real|all]
# What is meant to leak, mem::forget, is left out.
set -eu
cd "$(dirname "$0")"
which=${1:-all}
root=$(cd ../.. && pwd)
export TRTXPY_LIBRARY="${TRTXPY_LIBRARY:-$root/trtx_py/capi/libtrtxpy.so}"
if [ -z "${TRTXPY_PYTHON:-}" ] && [ -d "$root/.venv" ]; then export TRTXPY_PYTHON="$root/.venv"; fi
command -v valgrind >/dev/null || { echo "error: no valgrind (Debian, Ubuntu: apt-get install valgrind)" >&2; exit 1; }

# The programs of `cargo test`, one a line: KIND NAME PATH. CARGO_TARGET_DIR may be elsewhere.
mkdir -p target
cargo test --quiet --offline --no-run
cargo test --offline --no-run --message-format=json 2>/dev/null |
    sed -n 's/.*"target":{"kind":\["\([a-z]*\)"[^}]*"name":"\([a-z_]*\)".*"executable":"\([^"]*\)".*/\1 \2 \3/p' >target/programs
program() { sed -n "s|^$1 $2 ||p" target/programs; }

check() {
    name=$1
    shift
    echo "--- $name"
    timeout 1800 valgrind --quiet --error-exitcode=9 --leak-check=full --show-leak-kinds=definite \
        --errors-for-leak-kinds=definite --num-callers=30 --suppressions=valgrind.supp "$@"
}

if [ "$which" != real ]; then
    check "unit tests" "$(program lib trtxpy)" --skip half_precision --skip panics_when_dropped
    check "fake library" "$(program test fake)" --skip forgotten
fi
if [ "$which" != fake ]; then
    if [ -f "$TRTXPY_LIBRARY" ]; then
        check "real library" "$(program test real)" --skip forgotten --test-threads=1
    else
        echo "--- real library: skipped, there is no $TRTXPY_LIBRARY"
    fi
fi
echo "valgrind: clean"
