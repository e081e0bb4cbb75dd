# Shared by the scripts beside it; sourced, not run. Sets up virtual environments inside the checkout.
# shellcheck shell=bash

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"

# ONNX Runtime writes into the user's home and reports to its vendor unless it is told not to.
export ORT_DISABLE_TELEMETRY="${ORT_DISABLE_TELEMETRY-1}"

say() { printf -- '--- %s\n' "$*"; }

# usable_python PROGRAM [X.Y]: true if it runs and is CPython 3.10 or newer (or exactly X.Y).
# Running it matters: a version manager's shims exist for interpreters that are not active.
usable_python() {
    "$1" - "${2:-}" 2>/dev/null <<'PY'
import sys
want = sys.argv[1]
ok = sys.implementation.name == "cpython" and sys.version_info >= (3, 10)
sys.exit(not (ok and want in ("", "%d.%d" % sys.version_info[:2])))
PY
}

# find_python [X.Y]: prints the path of an interpreter, or fails.
find_python() {
    local want="${1:-}" program
    local -a programs=()
    if [ -z "$want" ]; then
        programs+=(${PYTHON:+"$PYTHON"} python3 python3.12 python3.11 python3.13 python3.10 python3.14)
    else
        programs+=("python$want")
    fi
    programs+=("$HOME"/.pyenv/versions/"${want:-3.1}"*/bin/python)
    for program in "${programs[@]}"; do
        if command -v "$program" >/dev/null && usable_python "$program" "$want"; then
            command -v "$program"
            return 0
        fi
    done
    return 1
}

# need_packages PYTHON: what a distribution keeps in packages of their own: venv, the headers, a C compiler for the
# extension modules. Installs what is missing if we may, else says what it is.
need_packages() {
    local version missing=()
    version="$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
    "$1" -c 'import ensurepip, venv' 2>/dev/null || missing+=("python$version-venv")
    "$1" -c 'import os, sysconfig; open(os.path.join(sysconfig.get_path("include"), "Python.h")).close()' 2>/dev/null ||
        missing+=("python$version-dev")
    command -v "${CC:-gcc}" >/dev/null || missing+=(gcc libc6-dev)
    [ "${#missing[@]}" -gt 0 ] || return 0
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "installing ${missing[*]}"
        apt-get -qq update || return 1
        DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${missing[@]}" >/dev/null
    else
        echo "error: $1 lacks its venv module or its headers, or there is no C compiler; install (Debian, Ubuntu):" \
            "apt-get install ${missing[*]}" >&2
        return 1
    fi
}

# pip_install VENV ARGUMENTS...: once more if the network had a hiccup.
pip_install() {
    local python="$1/bin/python"
    shift
    "$python" -m pip install -qq --disable-pip-version-check "$@" || {
        say "pip failed; trying once more"
        sleep 3
        "$python" -m pip install -qq --disable-pip-version-check "$@"
    }
}

gpu_present() { [ -e /dev/nvidiactl ] || [ -e /dev/dxg ]; }

# The extras of each set of packages. TRTX_EXTRAS adds to any of them (for example: TRTX_EXTRAS=tensorrt).
extras_of() {
    case "$1" in
        demo) printf 'mock,cli'; if gpu_present; then printf ',rtx'; fi ;;
        unit) printf test-core ;;
        test) printf 'test,dev,docs' ;;
        *) echo "error: no package set $1" >&2; return 1 ;;
    esac
    printf '%s' "${TRTX_EXTRAS:+,$TRTX_EXTRAS}"
}

# ensure_env VENV SET [X.Y]: VENV holds the package (editable) and SET's packages; its extension modules are up to date.
# Every step says what to do if it fails, because bash ignores "set -e" in a function that is called as a condition.
# Made anew when pyproject.toml or the list of model packages changed, or when its interpreter is gone.
ensure_env() {
    local venv="$1" set="$2" want="${3:-}" python wanted extras mark
    wanted="$(cat pyproject.toml tests/requirements-models.txt | sha256sum | cut -d' ' -f1)"
    if ! { [ -x "$venv/bin/python" ] && "$venv/bin/python" -c '' 2>/dev/null &&
           [ "$(cat "$venv/.trtx-inputs" 2>/dev/null)" = "$wanted" ]; }; then
        python="$(find_python "$want")" || {
            echo "error: no CPython ${want:-3.10 or newer} found; install one or set PYTHON" >&2
            return 1
        }
        need_packages "$python" || return 1
        say "making $venv with $("$python" -V) ($python)"
        rm -rf "$venv"
        "$python" -m venv "$venv" || return 1
        pip_install "$venv" --upgrade pip || return 1
        echo "$wanted" >"$venv/.trtx-inputs"
    fi
    extras="$(extras_of "$set")" || return 1
    mark="$venv/.trtx-set-$set"
    if [ "$(cat "$mark" 2>/dev/null)" != "$extras" ]; then
        say "installing trtx-py[$extras] into $venv"
        pip_install "$venv" --editable ".[$extras]" || return 1
        case "$set" in
            demo) pip_install "$venv" 'scikit-learn>=1.4' || return 1 ;;
            test)
                pip_install "$venv" --no-deps --requirement tests/requirements-models.txt || return 1
                # pyright needs Node; as a package where the machine has none
                command -v node >/dev/null || pip_install "$venv" 'pyright[nodejs]' || true
                ;;
        esac
        echo "$extras" >"$mark"
    fi
    scripts/build-native "$venv/bin/python"
}
