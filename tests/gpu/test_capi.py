"""The C ABI on plans of the kit: the same bodies on the mock and on a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.benchmarks.capi_client import CapiError, Client, Dispatch
from tests.gpu.kit import BACKEND, NON_SHARING, Side

ROOT = Path(__file__).parents[2]
_ENGINES = ("static.fp32.vcx", "mlp.fp32.vcx", "multi_io.fp16.vcx", "mnist_cnn.fp16.vcx", "bert_small.fp16.vcx")


def _backend(side: Side) -> tuple[str, str | None]:
    return ("mock", None) if side.name == "mock" else (BACKEND, os.environ["TRTX_LEAN_LIBRARY"])


@pytest.fixture
def client(side: Side) -> Iterator[Client]:
    client = Client(*_backend(side))
    yield client
    client.close()


@pytest.mark.parametrize("engine", _ENGINES)
def test_case(side: Side, client: Client, engine: str, record: Callable[..., None]) -> None:
    """In the graph's own memory and in tensors of the context, with other inputs in between: never stale."""
    case = side.kit.case(engine, 0)
    inputs = side.kit.inputs(case)
    zeros = {name: np.zeros_like(array) for name, array in inputs.items()}
    shapes = {name: array.shape for name, array in inputs.items()}
    errors = []
    with client.graph(bytes(side.plan(engine)), is_plan=True) as graph:
        for in_place in (True, False):
            with contextlib.closing(Dispatch(client, graph, shapes, in_place=in_place)) as dispatch:
                for _ in range(3):
                    errors.append(side.kit.check(case, dispatch.outputs(inputs)))
                    dispatch.outputs(zeros)
    record(f"{engine} through the C ABI", error=max(errors), result="pass")


def test_plan_of_one_context_at_a_time(side: Side, client: Client) -> None:
    """A plan without profile sharing is not captured for foreign callers: a pinned graph would be in others' way."""
    engine = NON_SHARING[2]
    case = side.kit.case(engine, 0)
    inputs = side.kit.inputs(case)
    with client.graph(bytes(side.plan(engine)), is_plan=True) as graph:
        for rows in (1, 2, 1):
            given = {name: array[:1].repeat(rows, 0) for name, array in inputs.items()}
            shapes = {name: array.shape for name, array in given.items()}
            with pytest.raises(CapiError, match="status 25"):
                Dispatch(client, graph, shapes, in_place=True)
            wanted = [(rows, *array.shape[1:]) for array in side.kit.expected(case).values()]
            dispatch = Dispatch(client, graph, shapes, in_place=False, output_shapes=wanted)
            with contextlib.closing(dispatch):
                outputs = dispatch.outputs(given)
                assert all(np.isfinite(array).all() for array in outputs.values())


def test_damaged_plan(side: Side, client: Client) -> None:
    plan = bytearray(bytes(side.plan("mlp.fp32.vcx")))
    with pytest.raises(CapiError, match="status 14"), client.graph(bytes(plan[:-100]), is_plan=True):
        pass


@pytest.mark.parametrize("side", ["gpu"], indirect=True)
def test_current_context_is_restored(side: Side, client: Client) -> None:
    """Whatever CUDA context the caller has is current again after each call."""
    driver = ctypes.CDLL("libcuda.so.1")
    context, found = ctypes.c_void_p(), ctypes.c_void_p()
    assert driver.cuInit(0) == 0
    assert driver.cuCtxCreate_v2(ctypes.byref(context), 0, 0) == 0
    try:
        case = side.kit.case("mlp.fp32.vcx", 0)
        inputs = side.kit.inputs(case)

        def check() -> None:
            assert driver.cuCtxGetCurrent(ctypes.byref(found)) == 0
            assert found.value == context.value

        check()
        with client.graph(bytes(side.plan("mlp.fp32.vcx")), is_plan=True) as graph:
            check()
            shapes = {name: array.shape for name, array in inputs.items()}
            for in_place in (True, False):
                dispatch = Dispatch(client, graph, shapes, in_place=in_place)
                check()
                side.kit.check(case, dispatch.outputs(inputs))
                check()
                dispatch.close()
                check()
        check()
    finally:
        driver.cuCtxDestroy_v2(context)


def _environment(folder: Path) -> Path:
    """A virtual environment that finds what this process finds: the library's Python reads no PYTHONPATH."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--system-site-packages", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *filter(None, sys.path)]
    (site / "test.pth").write_text("\n".join(dict.fromkeys(paths)) + "\n")
    return folder


def test_program_without_python(side: Side, tmp_path: Path, record: Callable[..., None]) -> None:
    """10,000 requests from 8 threads in a C program that is started with an empty environment but for what it needs."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    program, plan = tmp_path / "foreign", tmp_path / "mlp.plan"
    library = ROOT / "trtx_py" / "capi"
    subprocess.run(
        ["gcc", "-std=c11", "-O2", f"-I{ROOT}/capi/include", str(ROOT / "capi/tests/library/foreign.c"), "-o",
         str(program), f"-L{library}", "-ltrtxpy", f"-Wl,-rpath,{library}", "-pthread"],
        check=True,
    )  # fmt: skip
    plan.write_bytes(bytes(side.plan("mlp.fp32.vcx")))
    backend, lean = _backend(side)
    environment = {"TRTXPY_PYTHON": str(_environment(tmp_path / "env"))}
    if lean:
        environment["TRTX_LEAN_LIBRARY"] = lean
    command: list[Any] = [program, backend if side.name == "gpu" else "mock:instant", plan, "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "10000 requests, 0 checks failed\n"
    record("a C program without Python: 10,000 requests from 8 threads", result="pass")
