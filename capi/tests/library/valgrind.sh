#!/bin/sh
# test_cycles under Valgrind: no memory of libtrtxpy's that is lost, no access that is wrong, in a record with a frame of its.
#   valgrind.sh [CYCLES [BRIEF]]      4 by default, about 10 s for the start and 5 s for each; then 1000 brief ones
# Python keeps objects until the process ends and hides others in its arenas; its records, which have no frame of ours, are
# counted and not judged. PYTHON, CC and OUT as in run.sh. Ends with 1 on a finding; skips where there is no valgrind.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
command -v valgrind >/dev/null || { echo "valgrind SKIPPED: it is not here (Debian, Ubuntu: apt-get install valgrind)"; exit 0; }
cc=${CC:-gcc}
python=${PYTHON:-$root/.venv/bin/python}
out=${OUT:-$(mktemp -d)}
[ -n "${OUT:-}" ] || trap 'rm -rf "$out"' EXIT
capi=$root/capi
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' "$root/pyproject.toml")
flags="-std=c11 -g -O1 -fno-omit-frame-pointer -Wall -Wextra -Werror -pthread -I$capi/include -I$capi/src -I$capi/library"
mkdir -p "$out"
"$python" "$here/make_models.py" "$out/models"
# A library of its own, as installed: its frames are told from the test's by the file
# shellcheck disable=SC2086
$cc $flags -fPIC -DTRTXPY_BUILDING "-DTRTXPY_VERSION=\"$version\"" -shared -Wl,-soname,libtrtxpy.so,-z,nodelete \
    -Wl,--version-script="$capi/library/trtxpy.map" "$capi"/library/*.c -o "$out/libtrtxpy.so" -ldl
# shellcheck disable=SC2086
$cc $flags "$here/test_cycles.c" -o "$out/test_cycles" "-L$out" -ltrtxpy "-Wl,-rpath,$out"

# examine VARIABLE=VALUE...: the test with these in its environment
examine() {
    env -i PATH="$PATH" TRTXPY_PYTHON="$(dirname "$(dirname "$python")")" TRTXPY_TEST_MODELS="$out/models" "$@" \
        timeout 1800 valgrind --leak-check=full --show-leak-kinds=definite --errors-for-leak-kinds=definite --num-callers=60 \
        --suppressions="$here/valgrind.supp" --xml=yes --xml-file="$out/valgrind.xml" "$out/test_cycles" || {
        echo "valgrind FAILED: the test itself failed"
        exit 1
    }
    judge "$out/valgrind.xml"
}

judge() {
    "$python" - "$1" <<'PY'
import sys
import xml.etree.ElementTree

ours, others = [], 0
for record in xml.etree.ElementTree.parse(sys.argv[1]).getroot().iter("error"):
    frames = [(frame.findtext("obj") or "", frame) for stack in record.iter("stack") for frame in stack]
    if any(path.endswith("/libtrtxpy.so") for path, _ in frames):
        ours.append((record, frames))
    else:
        others += 1
for record, frames in ours:
    print(record.findtext("kind"), record.findtext("what") or record.findtext("xwhat/text"))
    for path, frame in frames[:12]:
        print(f"    {frame.findtext('fn')} ({frame.findtext('file') or path}:{frame.findtext('line') or '?'})")
print(f"valgrind: {len(ours)} records of libtrtxpy's, {others} of others'")
sys.exit(bool(ours))
PY
}

examine TRTXPY_TEST_CYCLES="${1:-4}"
examine TRTXPY_TEST_CYCLES="${2:-1000}" TRTXPY_TEST_BRIEF=1
