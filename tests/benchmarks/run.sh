#!/usr/bin/env bash
# The benchmarks: bash tests/benchmarks/run.sh [--quick] [--mock] [--check-only] [--only NAME...] [--out DIR]
# On a GPU machine: source setup.sh of the GPU kit first. Elsewhere: --mock, or --rehearse for the GPU sections on stand-ins.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONFAULTHANDLER=1 ORT_DISABLE_TELEMETRY="${ORT_DISABLE_TELEMETRY-1}"
python="${PYTHON:-}"
if [ -z "$python" ]; then
    python=python3
    [ -z "${TRTX_LEAN_LIBRARY:-}" ] && [ -x .venv/bin/python ] && python=.venv/bin/python
fi
bash scripts/build-native "$python"
exec "$python" -m tests.benchmarks "$@"
