#!/bin/sh
# Build the tests of libtrtxpy with its sources and run them on the mock: plainly, under AddressSanitizer (leaks of ours
# included) and UndefinedBehaviorSanitizer, and under ThreadSanitizer with the extension modules instrumented too.
#   run.sh [-m plain|asan|tsan|all] [-k] [NAME...]     NAME: test_requests, say; -k keeps going after a failure
# PYTHON: the environment's interpreter, .venv's by default. CC and OUT choose the compiler and the build folder.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
modes=all
keep=0
while getopts m:k option; do
    case $option in
    m) modes=$OPTARG ;;
    k) keep=1 ;;
    *) exit 2 ;;
    esac
done
shift $((OPTIND - 1))
[ "$modes" = all ] && modes="plain asan tsan"
cc=${CC:-gcc}
python=${PYTHON:-$root/.venv/bin/python}
out=${OUT:-$(mktemp -d)}
[ -n "${OUT:-}" ] || trap 'rm -rf "$out"' EXIT
jobs=$(nproc 2>/dev/null || echo 2)
bare=
if command -v setarch >/dev/null && setarch "$(uname -m)" -R true 2>/dev/null; then bare="setarch $(uname -m) -R"; fi
"$python" "$here/make_models.py" "$out/models"

capi=$root/capi
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' "$root/pyproject.toml")
flags="-std=c11 -g -Wall -Wextra -Wpedantic -Werror -pthread -DTRTXPY_BUILDING -DTRTXPY_VERSION=\\\"$version\\\""
flags="$flags -I$capi/include -I$capi/src -I$capi/library"

# An environment of its own whose extension modules are instrumented, but for what handles Python's objects: Python's lock,
# which ThreadSanitizer does not see, orders that. Everything else is this checkout's.
instrumented() {
    copy=$out/instrumented
    mkdir -p "$copy"
    (cd "$root" && tar -cf - --exclude='*.so' --exclude=__pycache__ trtx_py mock_backend capi scripts pyproject.toml) | tar -xf - -C "$copy"
    headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
    for folder in src mock python python_mock; do
        mkdir -p "$copy/objects/$folder"
        sanitizer="-fsanitize=thread"
        case $folder in python*) sanitizer= ;; esac
        for source in "$capi/$folder"/*.c; do echo "$source"; done | xargs -P "$jobs" -I{} sh -c "$cc -std=c11 -g -O1 -fPIC \
            -fvisibility=hidden -pthread $sanitizer -I$capi/src -I$capi/mock -I$capi/python -I$capi/python_mock -isystem $headers \
            -c {} -o $copy/objects/$folder/\$(basename {} .c).o" || exit 1
    done
    $cc -shared -pthread -fsanitize=thread "$copy"/objects/src/*.o "$copy"/objects/python/*.o -o "$copy/trtx_py/_native$suffix" -ldl -lm
    $cc -shared -pthread -fsanitize=thread "$copy"/objects/mock/*.o "$copy"/objects/python_mock/*.o \
        -o "$copy/mock_backend/_native$suffix" -ldl -lm
    "$python" -m venv --without-pip "$out/venv"
    site=$("$out/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    printf '%s\n%s\n' "$copy" "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" >"$site/instrumented.pth"
    echo "$out/venv"
}

failures=0
for mode in $modes; do
    environment=$(dirname "$(dirname "$python")")
    run=
    case $mode in
    plain) extra="-O2" ;;
    asan) extra="-O1 -fno-omit-frame-pointer -fsanitize=address,undefined" ;;
    tsan)
        extra="-O1 -fsanitize=thread"
        environment=$(instrumented)
        run=$bare
        ;;
    *) echo "unknown mode $mode" >&2; exit 2 ;;
    esac
    mkdir -p "$out/$mode"
    for source in "$capi"/library/*.c; do echo "$source"; done | xargs -P "$jobs" -I{} sh -c \
        "$cc $flags $extra -c {} -o $out/$mode/\$(basename {} .c).o" || exit 1
    for test in "$here"/test_*.c; do
        name=$(basename "$test" .c)
        if [ $# -gt 0 ]; then
            case " $* " in *" $name "*) ;; *) continue ;; esac
        fi
        objects=$(ls "$out/$mode"/*.o)
        case $name in
        test_host*) continue ;; # run-host.sh: on every interpreter
        test_handles) # needs no Python
            objects=$(echo "$objects" | grep -v -E '/(host|python_start)[^/]*\.o$')
            objects="$objects $here/no_host.c"
            ;;
        esac
        # shellcheck disable=SC2086
        eval "$cc $flags $extra $test $(echo $objects) -o $out/$mode/$name.test -ldl" || exit 1
        printf '%-5s %s: ' "$mode" "$name"
        # shellcheck disable=SC2086
        if ! env -i PATH="$PATH" TRTXPY_PYTHON="$environment" TRTXPY_TEST_MODELS="$out/models" \
            ASAN_OPTIONS="detect_leaks=1" LSAN_OPTIONS="suppressions=$here/leaks.supp:print_suppressions=0" \
            UBSAN_OPTIONS="print_stacktrace=1:halt_on_error=1" \
            TSAN_OPTIONS="halt_on_error=1:second_deadlock_stack=1" \
            timeout 1800 $run "$out/$mode/$name.test"; then
            echo "$mode $name FAILED"
            failures=$((failures + 1))
            [ "$keep" = 1 ] || exit 1
        fi
    done
done
[ "$failures" = 0 ] || { echo "$failures failed"; exit 1; }
