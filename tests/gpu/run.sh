#!/usr/bin/env bash
# The GPU tests on a machine with a GPU. Needs the kit (source its setup.sh first: it sets TRTX_GPU_KIT,
# TRTX_LEAN_LIBRARY and PYTHONPATH), gcc, and a python with its headers, numpy, onnx, anyio, msgpack and pytest; installs
# nothing. Compiles the extension modules in place, prints machine, versions and a table of cases, and writes
# $OUT/gpu-run.json. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
: "${TRTX_GPU_KIT:?source setup.sh of the GPU kit first}" "${TRTX_LEAN_LIBRARY:?source setup.sh of the GPU kit first}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1 PYTHONFAULTHANDLER=1
python="${PYTHON:-python3}"
bash scripts/build-native "$python"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
"$python" - <<'PY'
import importlib.metadata as metadata
import sys

missing = []
print("python", sys.version.split()[0])
for name in ("numpy", "onnx", "anyio", "msgpack", "pytest", "tensorrt_dispatch_cu13", "ml_dtypes"):
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        print(name, "not installed")
        if name not in ("ml_dtypes", "tensorrt_dispatch_cu13"):  # the first is for types that no plan of the kit has
            missing.append(name)
sys.exit(f"missing: {', '.join(missing)}" if missing else 0)
PY
exec "$python" -m pytest -c tests/gpu/pytest-gpu.ini --rootdir . -m gpu tests/gpu "$@"
