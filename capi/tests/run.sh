#!/bin/sh
# Build every capi/tests/test_*.c with the native sources and run it: plainly, under AddressSanitizer and
# UndefinedBehaviorSanitizer, and under ThreadSanitizer.
#   run.sh [-m plain|asan|tsan|all] [-k] [NAME...]     NAME: test_lane, say; -k keeps going after a failure
# CC and OUT choose the compiler and the build folder.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
capi=$(dirname "$here")
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
out=${OUT:-$(mktemp -d)}
[ -n "${OUT:-}" ] || trap 'rm -rf "$out"' EXIT
jobs=$(nproc 2>/dev/null || echo 2)
export ASAN_OPTIONS=${ASAN_OPTIONS:-detect_leaks=1:abort_on_error=0}
export UBSAN_OPTIONS=${UBSAN_OPTIONS:-print_stacktrace=1:halt_on_error=1}
export TSAN_OPTIONS=${TSAN_OPTIONS:-halt_on_error=1:second_deadlock_stack=1}
# ThreadSanitizer's shadow wants the address layout of older kernels
bare=
if command -v setarch >/dev/null && setarch "$(uname -m)" -R true 2>/dev/null; then bare="setarch $(uname -m) -R"; fi

flags="-std=c11 -g -Wall -Wextra -Wpedantic -Werror -pthread -I$capi/src -I$capi/mock"
sources=$(ls "$capi"/src/*.c "$capi"/mock/*.c | grep -v '/py[^/]*\.c$')
failures=0
for mode in $modes; do
    case $mode in
    plain) extra="-O2" ;;
    asan) extra="-O1 -fno-omit-frame-pointer -fsanitize=address,undefined" ;;
    tsan) extra="-O1 -fno-omit-frame-pointer -fsanitize=thread" ;;
    *) echo "unknown mode $mode" >&2; exit 2 ;;
    esac
    mkdir -p "$out/$mode"
    # shellcheck disable=SC2086
    printf '%s\n' $sources | xargs -P "$jobs" -I{} sh -c \
        "$cc $flags $extra -c {} -o $out/$mode/\$(basename {} .c).o" || exit 1
    objects=$(for source in $sources; do echo "$out/$mode/$(basename "$source" .c).o"; done)
    for test in "$here"/test_*.c; do
        name=$(basename "$test" .c)
        if [ $# -gt 0 ]; then
            case " $* " in *" $name "*) ;; *) continue ;; esac
        fi
        # shellcheck disable=SC2086
        $cc $flags $extra "$test" $objects -o "$out/$mode/$name" -ldl -lm || exit 1
        printf '%-5s %s: ' "$mode" "$name"
        run=
        [ "$mode" = tsan ] && run=$bare
        if ! timeout 1200 $run "$out/$mode/$name"; then
            echo "$mode $name FAILED"
            failures=$((failures + 1))
            [ "$keep" = 1 ] || exit 1
        fi
    done
done
[ "$failures" = 0 ] || { echo "$failures failed"; exit 1; }
