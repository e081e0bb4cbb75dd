#!/bin/sh
# Test capi/library/host*.c and python_start.c with every CPython from 3.10 on that has a shared libpython here.
#   run-host.sh [-m plain|asan|valgrind|all] [-p 3.11] [CASE...]     plain and asan by default; PYTHONS: other interpreters
# Every case is a process of its own with an environment of its own.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
capi=$(dirname "$(dirname "$here")")
modes="plain asan" only=
while getopts m:p: option; do
    case $option in
    m) modes=$OPTARG ;;
    p) only=$OPTARG ;;
    *) exit 2 ;;
    esac
done
shift $((OPTIND - 1))
cases=" $* "
[ "$modes" = all ] && modes="plain asan valgrind"
cc=${CC:-gcc}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
trap 'exit 130' INT TERM
# Python frees at its end what it can; leaks are not looked for
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
failures=0 passed=0

# expect STATUS OUTPUT-PATTERN COMMAND...: in an empty environment but for the sanitizers' options
expect() {
    wanted=$1 pattern=$2
    shift 2
    status=0
    said=$(timeout 120 env -i ASAN_OPTIONS="$ASAN_OPTIONS" UBSAN_OPTIONS="$UBSAN_OPTIONS" \
        TRTXPY_SHOW="${TRTXPY_SHOW:-}" "$@" 2>&1) || status=$?
    [ -z "${TRTXPY_SHOW:-}" ] || echo "$said"
    if [ "$status" = "$wanted" ] && { printf '%s' "$said" | tr '\n' '|'; echo; } | grep -qE -- "$pattern"; then
        passed=$((passed + 1))
    else
        failures=$((failures + 1))
        echo "$mode $version: FAILED (status $status, wanted $wanted; output wanted: $pattern): $*"
        printf '%s\n' "$said" | tail -20 | cut -c1-1500
    fi
}
# wants CASE: is it asked for?
wants() { [ "$cases" = "  " ] || case $cases in *" $1 "*) ;; *) return 1 ;; esac; }

script() { # PATH: an executable from standard input
    mkdir -p "$(dirname "$1")"
    { echo '#!/bin/sh'; cat; } >"$1"
    chmod +x "$1"
}

build() {
    case $mode in
    plain | valgrind) extra="-O2" ;;
    asan) extra="-O1 -fno-omit-frame-pointer -fsanitize=address,undefined" ;;
    esac
    flags="-std=c11 -g -Wall -Wextra -Werror -pthread -fPIC -I$capi/include -I$capi/library $extra"
    mkdir -p "$out/$mode/brief"
    # shellcheck disable=SC2086
    {
        for source in host host_ask host_find host_import python_start error; do
            $cc $flags -Wpedantic -DTRTXPY_ASK_TIMEOUT_S=60 -DTRTXPY_EXIT_PATIENCE_S=60 \
                -c "$capi/library/$source.c" -o "$out/$mode/$source.o"
            # what a case waits for till the end
            $cc $flags -Wpedantic -DTRTXPY_ASK_TIMEOUT_S=4 -DTRTXPY_EXIT_PATIENCE_S=4 \
                -c "$capi/library/$source.c" -o "$out/$mode/brief/$source.o"
        done
        $cc $flags "$here/test_host.c" "$out/$mode"/*.o -o "$out/$mode/test_host" -ldl -lm
        $cc $flags "$here/test_host.c" "$out/$mode"/brief/*.o -o "$out/$mode/test_host_brief" -ldl -lm
        $cc $flags -shared "$here/test_host_inside.c" "$out/$mode"/*.o -Wl,-z,nodelete -o "$out/$mode/libtrtxpy.so" -ldl
        # a program that finds the library where a package has it
        $cc $flags "$here/test_host.c" -L"$out/$mode" -ltrtxpy -o "$out/$mode/test_host_shared" -ldl -lm
    }
}

one_version() { # with $python, $version, $venv, $test
    own="$run $test"
    # shellcheck disable=SC2086
    {
        wants own && expect 0 "^$" TRTXPY_PYTHON="$venv" $own own "$venv"
        wants stop && expect 0 '^python finalised.stopped$' TRTXPY_PYTHON="$venv" $own stop
        wants exit && expect 0 '^before the end.python finalised$' TRTXPY_PYTHON="$venv" $own exit
        wants threads && expect 0 '^$' TRTXPY_PYTHON="$venv" $own threads
        wants fork && expect 0 '^before the end$' TRTXPY_PYTHON="$venv" $own fork
        [ "$mode" != valgrind ] || return 0
        wants own && expect 0 '^$' TRTXPY_PYTHON="$venv" PYTHONPATH=/trtxpy-poison PYTHONHOME=/nowhere PYTHONUTF8=0 \
            PYTHONVERBOSE=1 LC_ALL=C.UTF-8 $own own "$venv" C.UTF-8
        wants own && expect 0 '^$' TRTXPY_PYTHON="$venv/bin/python3" env --ignore-signal=CHLD $own own "$venv"
        wants own && expect 0 '^$' TRTXPY_PYTHON="$venv" sh -c '"$@" <&- >&- 2>&-' - $own own "$venv"
        wants exit && expect 0 '^before the end.python finalised$' TRTXPY_PYTHON="$venv" $own exit_other
        wants exit && expect 7 "^$" TRTXPY_PYTHON="$venv" timeout 30 $own exit_callback
        wants exit && expect 7 "^$" TRTXPY_PYTHON="$venv" timeout 30 $own exit_inside
        wants retry && expect 0 '^$' $own retry "$venv"
        wants fork && expect 0 '^$' TRTXPY_PYTHON="$venv" $own fork_start
        wants hint && {
            expect 0 '' $own hint "$venv" "$venv/bin/python"
            expect 0 '' TRTXPY_PYTHON=/nowhere VIRTUAL_ENV=/nowhere $own hint "$venv" "$venv"
            expect 0 '' VIRTUAL_ENV="$venv" PATH=/nowhere $own hint "$venv"
            expect 0 '' VIRTUAL_ENV=/nowhere PATH="/nowhere:$venv/bin" $own hint "$venv"
            expect 0 '' TRTXPY_PYTHON=python3 PATH="$venv/bin" $own hint "$venv"
            expect 0 '' TRTXPY_PYTHON=bin/python sh -c 'cd "$1" && shift && exec "$@"' - "$venv" $own hint "$venv"
            expect 0 '' TRTXPY_PYTHON= VIRTUAL_ENV= PATH="$venv/bin" $own hint "$venv"
            # in a package: of an environment, of a checkout; and one that Python does not have on its path
            shared="env LD_LIBRARY_PATH=$folder/installed/lib/python$version/site-packages/trtx_py/capi $run $test_shared"
            expect 0 '' $shared hint "$folder/installed"
            shared="env LD_LIBRARY_PATH=$folder/checkout/trtx_py/capi $run $test_shared"
            expect 0 '' $shared hint "$folder/checkout/.venv"
            expect 0 '' TRTXPY_PYTHON="$folder/bare" $shared hint "$folder/bare"
        }
        wants missing && {
            expect 0 '' $own install "$folder/bare" "/bin/cp -r '$here/host_package/trtx_py' '$site_bare/'"
            rm -rf "$site_bare/trtx_py"
            expect 0 '' PATH="$folder/bare/bin:/bin:/usr/bin" $own refused - "python3 on PATH" "No module named 'trtx_py'"
            mkdir -p "$site_bare/trtx_py/capi"
            printf 'raise RuntimeError("no luck: \303\244")\n' >"$site_bare/trtx_py/__init__.py"
            expect 0 '' $own refused "$folder/bare" "RuntimeError: no luck: ä"
            echo 'raise SystemExit(3)' >"$site_bare/trtx_py/__init__.py"
            expect 0 '' $own refused "$folder/bare" "SystemExit: 3"
            rm -r "$site_bare/trtx_py"
        }
        wants linked && {
            expect 0 'python finalised' TRTXPY_PYTHON="$venv" $own linked "$libpython" "$venv"
            expect 0 'python finalised' VIRTUAL_ENV="$other" PATH="$venv/bin" $own linked "$libpython" "$venv"
            # no environment of its version, so its own installation
            expect 0 'python finalised' PATH=/nowhere LD_LIBRARY_PATH="$folder/alone/trtx_py/capi" \
                $run $test_shared linked "$libpython" "$prefix"
            expect 0 '^$' TRTXPY_PYTHON="$venv" $own ended "$libpython"
            expect 0 'before the end' $own plugin "$libpython" "$here/host_package"
        }
        wants inside && for how in held free; do
            expect 0 '^main ends.before the end.python is gone$' PYTHONPATH="$here/host_package" $preload \
                "$venv/bin/python3" "$here/test_host_inside.py" "$out/$mode/libtrtxpy.so" $how
        done
        wants inside && expect 0 '^$' $preload \
            "$folder/bare/bin/python3" "$here/test_host_inside.py" "$out/$mode/libtrtxpy.so" missing
        return 0
    }
}

# What does not depend on the version.
once() { # with $venv
    own="$run $test" brief="$run $out/$mode/test_host_brief" fakes=$out/fakes
    # shellcheck disable=SC2086
    wants exit && {
        begin=$(date +%s)
        expect 0 '^$' TRTXPY_PYTHON="$venv" $brief exit_hang
        expect 0 '^$' TRTXPY_PYTHON="$venv" $brief exit_python_thread
        [ $(($(date +%s) - begin)) -lt 50 ] || { echo "exit takes too long"; failures=$((failures + 1)); }
    }
    # shellcheck disable=SC2086
    wants refused && {
        expect 0 '' $own refused /nowhere "the argument" /nowhere "No such file"
        expect 0 '' TRTXPY_PYTHON=/nowhere VIRTUAL_ENV="$venv" $own refused - "TRTXPY_PYTHON: /nowhere"
        expect 0 '' PATH=/nowhere VIRTUAL_ENV=/nowhere2 $own refused - "no Python was found" "VIRTUAL_ENV: /nowhere2" \
            "python3 on PATH" "Set TRTXPY_PYTHON"
        expect 0 '' $own refused "$here" "no Python in the folder" "bin/python3"
        expect 0 '' $own refused nosuchpython "no program of that name on PATH"
        expect 0 '' $own refused "$here/run-host.sh.txt" "No such file"
        expect 0 '' $own refused "$here/test_host.c" "cannot run" "Permission denied"
        expect 0 '' $own refused /bin/false "exited with 1"
        : >"$fakes/libpython3.11.so"
        expect 0 '' $own refused "$fakes/libpython3.11.so" "cannot be loaded" "file too short"
        expect 0 '' $own refused "$out/$mode/libtrtxpy.so" "no CPython"
        for old in ${OLD_PYTHONS:-$HOME/.pyenv/versions/2.7.*/bin/python $HOME/.pyenv/versions/3.[89].*/bin/python}; do
            [ -x "$old" ] && expect 0 '' $own refused "$old" "needs CPython 3.10 or newer" "is Python "
        done
        for old in "$HOME"/.pyenv/versions/3.[79].*/lib/libpython3.[79]*.so.1.0; do
            [ -e "$old" ] && expect 0 '' $own refused "$old" "needs CPython 3.10 or newer"
        done
        script "$fakes/static/bin/python3" <<'S'
echo a shim says something
printf 'trtxpy:%s\n' version=3.12.99 implementation=cpython executable=/x/bin/python3 base=/x LIBDIR=/x/lib \
    INSTSONAME=libpython3.12.a LDLIBRARY=libpython3.12.a MULTIARCH=m LIBPL=/x/config end=1
S
        expect 0 '' $own refused "$fakes/static" "/x/bin/python3 (Python 3.12.99)" "libpython3.12.so.1.0" "/x/lib/m" \
            "apt install libpython3.12;" "--enable-shared pyenv install 3.12.99"
        script "$fakes/mismatch/bin/python3" <<S
printf 'trtxpy:%s\n' version=${minor}.99 implementation=cpython executable=/x/bin/python3 base=/x \
    LIBDIR=$(dirname "$libpython") end=1
S
        expect 0 '' $own refused "$fakes/mismatch" "not $minor.99" "without a shared libpython"
        script "$fakes/pypy" <<'S'
printf 'trtxpy:%s\n' version=3.10.1 implementation=pypy end=1
S
        expect 0 '' $own refused "$fakes/pypy" "pypy 3.10.1; trtx_py needs CPython"
        script "$fakes/slow" <<'S'
sleep 60 & sleep 60
S
        expect 0 '' $brief refused "$fakes/slow" "did not say within"
        script "$fakes/killed" <<'S'
kill -9 $$
S
        expect 0 '' $own refused "$fakes/killed" "ended by signal 9"
        script "$fakes/loud" <<'S'
yes nonsense | head -c 100000; exit 4
S
        expect 0 '' $own refused "$fakes/loud" "no Python that can be asked"
    }
    # shellcheck disable=SC2086
    wants broken && {
        mkdir -p "$fakes/broken/lib/python$minor"
        cp "$libpython" "$fakes/broken/lib/"
        : >"$fakes/broken/lib/python$minor/os.py"
        expect 0 '' $own broken "$fakes/broken" "$venv"
    }
    return 0
}

# Configuration by name, by a stand-in for 3.14 around 3.13.
by_name() {
    place=$out/by_name
    include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    [ -e "$include/Python.h" ] || return 0
    "$python" -m venv --without-pip "$place"
    echo "$here/host_package" >"$place/lib/python$version/site-packages/fake.pth"
    mkdir -p "$place/lib/python3.14"
    : >"$place/lib/python3.14/os.py"
    ln -sf python3 "$place/bin/python3.14"
    $cc -O1 -shared -fPIC -I"$include" "$here/fake_python314.c" -o "$place/lib/libpython3.14.so" \
        -Wl,-rpath,"$(dirname "$libpython")" "$libpython"
    # shellcheck disable=SC2086
    expect 0 '^$' TRTXPY_PYTHON="$place/lib/libpython3.14.so" $run $test own "$place"
}

# PYTHONS, or whatever is here
if [ -z "${PYTHONS:-}" ]; then
    PYTHONS=$(for folder in "$HOME"/.pyenv/versions/3.1[0-9].*/bin; do echo "$folder/python3"; done; echo /usr/bin/python3)
fi
number=0 tested=
for python in $PYTHONS; do
    libpython=$("$python" -I -c '
import os, sys, sysconfig
assert sys.version_info >= (3, 10)
get = sysconfig.get_config_var
library = os.path.join(get("LIBDIR"), get("INSTSONAME"))
assert ".so" in library and os.path.exists(library)
print(library)
' 2>/dev/null) || { echo "$python skipped: older than 3.10, or without a shared libpython"; continue; }
    minor=$("$python" -I -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    [ -z "$only" ] || [ "$only" = "$minor" ] || continue
    number=$((number + 1))
    folder=$out/$minor-$number
    for name in venv bare installed checkout/.venv; do "$python" -m venv --without-pip "$folder/$name"; done
    echo "$here/host_package" >"$folder/venv/lib/python$minor/site-packages/fake.pth"
    cp -r "$here/host_package/trtx_py" "$folder/installed/lib/python$minor/site-packages/"
    mkdir "$folder/alone"
    cp -r "$here/host_package/trtx_py" "$folder/checkout/"
    cp -r "$here/host_package/trtx_py" "$folder/alone/"
    tested="$tested $minor:$python:$libpython:$folder"
done
[ -n "$tested" ] || { echo "no CPython here to test with" >&2; exit 1; }
mkdir -p "$out/fakes"
unset only
for mode in $modes; do
    build
    run= preload= test=$out/$mode/test_host test_shared=$out/$mode/test_host_shared
    [ "$mode" = valgrind ] && run="valgrind -q --error-exitcode=99"
    [ "$mode" = asan ] && preload="LD_PRELOAD=$($cc -print-file-name=libasan.so)"
    first=1 previous=/nowhere
    for entry in $tested; do
        minor=${entry%%:*} entry=${entry#*:}
        python=${entry%%:*} entry=${entry#*:}
        libpython=${entry%%:*} folder=${entry#*:}
        version=$minor venv=$folder/venv other=$previous site_bare=$folder/bare/lib/python$minor/site-packages
        previous=$venv prefix=$("$python" -I -c 'import sys; print(sys.base_prefix)')
        for copy in installed/lib/python$minor/site-packages checkout alone; do
            cp "$out/$mode/libtrtxpy.so" "$folder/$copy/trtx_py/capi/"
        done
        one_version
        [ $first = 0 ] || [ "$mode" = valgrind ] || once
        first=0
        if [ "$minor" = 3.13 ] && wants by_name; then by_name; fi
    done
done
for entry in $tested; do
    entry=${entry#*:}
    if wants layout; then sh "$capi/../scripts/pyconfig-offsets" --check "${entry%%:*}" || failures=$((failures + 1)); fi
done
echo "$passed passed, $failures failed"
[ "$failures" = 0 ]
