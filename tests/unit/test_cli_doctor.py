"""trtx doctor, on machines that are like this one and on others."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import trtx_py.diagnostics
from tests.cli import DIGITS, Ran, Run, environment, runner, spawn
from trtx_py import Plan, PlanHeader
from trtx_py.backends._flavours import FLAVOURS
from trtx_py.diagnostics import _diagnose, diagnose
from trtx_py.diagnostics._asking import run_probe

H200 = {"ordinal": 0, "name": "NVIDIA H200", "compute_capability": "9.0", "total_bytes": 150 << 30, "uuid": "GPU-1"}
ADA = {"ordinal": 0, "name": "NVIDIA L4", "compute_capability": "8.9", "total_bytes": 24 << 30, "uuid": "GPU-2"}
NO_DRIVER: dict[str, Any] = {
    "version": None,
    "gpus": [],
    "problem": "the CUDA driver library cannot be used: no libcuda.so.1; install it",
}


def driver(*gpus: dict[str, Any]) -> dict[str, Any]:
    return {"version": "12.8", "gpus": list(gpus), "problem": ""}


def able(version: str) -> dict[str, Any]:
    return {"version": version, "builds": True, "runs": True, "problems": []}


Doctor = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(capsys)


@pytest.fixture
def doctor(run: Run, monkeypatch: pytest.MonkeyPatch) -> Doctor:
    """Runs the command on a machine where the probes answer this; what has no answer is not installed."""

    def examine(*arguments: object, **answers: dict[str, Any]) -> Ran:
        installed = {FLAVOURS[name].bindings for name in answers if name != "driver"}
        here = {*installed, ("mock_backend",), ("onnx",), ("onnxruntime",)}
        monkeypatch.setattr(_diagnose, "is_installed", lambda modules: tuple(modules) in here)
        asked = functools.partial(diagnose, probe=answers.__getitem__)
        monkeypatch.setattr(trtx_py.diagnostics, "diagnose", asked)
        return run("doctor", *arguments).succeeded()

    return examine


def first_three(ran: Ran) -> tuple[str, str, str]:
    problem, cure, works = ran.out.splitlines()[:3]
    assert problem.startswith("problem: ")
    assert cure.startswith("cure: ")
    assert works.startswith("works: ")
    return problem, cure, works


def test_nothing_installed_and_no_gpu(doctor: Doctor) -> None:
    problem, cure, works = first_three(doctor(driver=NO_DRIVER))
    assert "no usable GPU" in problem
    assert "no TensorRT is installed" in problem
    assert "install it; then pip install tensorrt-rtx" in cure
    assert "TRTX_BACKEND=mock" in cure
    assert "the mock" in works


def test_rtx_without_a_driver(doctor: Doctor) -> None:
    rtx = {"version": "1.7.1.116", "builds": True, "runs": False, "problems": [NO_DRIVER["problem"]]}
    problem, cure, works = first_three(doctor(driver=NO_DRIVER, tensorrt_rtx=rtx))
    assert "tensorrt_rtx 1.7.1.116 builds here, and does not run" in problem
    assert cure.startswith("cure: install it")
    assert "tensorrt_rtx 1.7.1.116 (builds)" in works


def test_an_architecture_that_the_flavour_does_not_support(doctor: Doctor) -> None:
    rtx = {"version": "1.7.1.116", "builds": True, "runs": False, "problems": ["tensorrt_rtx does not run on it"]}
    ran = doctor(driver=driver(H200), tensorrt_rtx=rtx)
    problem, cure, _ = first_three(ran)
    assert "tensorrt_rtx 1.7.1.116 does not run on NVIDIA H200 (compute capability 9.0)" in problem
    assert "pip install tensorrt, or pip install tensorrt-dispatch-cu13" in cure
    assert "0: no" in ran.out


def test_a_gpu_and_no_tensorrt(doctor: Doctor) -> None:
    _, cure, _ = first_three(doctor(driver=driver(ADA)))
    assert "pip install tensorrt-rtx" in cure
    _, cure, _ = first_three(doctor(driver=driver(H200)))
    assert "tensorrt-rtx" not in cure


def test_all_is_well(doctor: Doctor) -> None:
    ran = doctor(driver=driver(ADA), tensorrt=able("10.16.1.11"))
    assert ran.out.splitlines()[0] == "ok: NVIDIA L4 (8.9)"
    assert "tensorrt 10.16.1.11 (builds and runs)" in ran.out.splitlines()[1]
    assert "next steps" not in ran.out


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"ended": "crashed", "problem": "loading it ends the process (SIGSEGV): it printed nothing"}, "SIGSEGV"),
        ({"ended": "hung", "problem": "loading it did not end within 60 s"}, "did not end"),
        ({"version": None, "builds": False, "runs": False, "problems": ["libnvinfer.so.10 is missing"]}, "libnvinfer"),
    ],
    ids=["crashed", "hung", "broken"],
)
def test_a_flavour_that_cannot_be_loaded_is_a_finding(doctor: Doctor, answer: dict[str, Any], words: str) -> None:
    problem, cure, _ = first_three(doctor(driver=driver(ADA), tensorrt=answer))
    assert "tensorrt is installed and cannot be used" in problem
    assert words in problem
    assert "reinstall it: pip install tensorrt" in cure


def sealed(folder: Path, flavour: str, version: str, *capabilities: str, **more: Any) -> str:
    path = folder / "x.plan"
    Plan.seal(b"a plan of somebody's", PlanHeader(flavour, version, tuple(capabilities), **more)).save(path)
    return str(path)


def test_a_plan_of_another_version(doctor: Doctor, tmp_path: Path) -> None:
    plan = sealed(tmp_path, "tensorrt", "10.3.0.26", "8.9", version_compatible=False)
    ran = doctor("--plan", plan, driver=driver(ADA), tensorrt=able("10.16.1.11"))
    problem, cure, _ = first_three(ran)
    assert "plan built with tensorrt 10.3.0.26 needs exactly that version, and here is tensorrt 10.16.1.11" in problem
    assert "rebuild it here" in cure


def test_a_plan_for_another_architecture(doctor: Doctor, tmp_path: Path) -> None:
    plan = sealed(tmp_path, "tensorrt", "10.16.1.11", "8.9")
    answers = {"driver": driver(H200), "tensorrt": able("10.16.1.11")}
    problem, cure, _ = first_three(doctor("--plan", plan, **answers))
    assert "built for compute capability 8.9, and here is NVIDIA H200 (9.0)" in problem
    assert "build it again on this machine" in cure
    plan = sealed(tmp_path, "tensorrt", "10.16.1.11", "8.0", build_options={"hardware_compatibility": "ampere_plus"})
    assert doctor("--plan", plan, **answers).out.startswith(f"ok: {plan} runs here with tensorrt\n")


def test_a_plan_that_fits_and_one_of_another_flavour(doctor: Doctor, tmp_path: Path) -> None:
    answers = {"driver": driver(ADA), "tensorrt_rtx": able("1.7.1.116")}
    found = doctor("--plan", sealed(tmp_path, "tensorrt_rtx", "1.7.1.116", "8.9"), "--json", **answers).json
    assert found["plan"]["runs_on"] == ["tensorrt_rtx"]
    found = doctor("--plan", sealed(tmp_path, "tensorrt", "8.6.1.6", "8.9"), "--json", **answers).json
    assert found["plan"]["runs_on"] == []
    assert "open the plan with tensorrt" in found["plan"]["problems"][0]


def test_a_plan_where_nothing_is_installed(doctor: Doctor, tmp_path: Path) -> None:
    plan = sealed(tmp_path, "tensorrt", "8.6.1.6", "8.9")
    problem, cure, _ = first_three(doctor("--plan", plan, driver=NO_DRIVER))
    assert "built with tensorrt 8.6.1.6, and no TensorRT is installed here" in problem
    assert "install tensorrt" in cure


def test_dispatch_needs_a_lean_library(doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRTX_LEAN_LIBRARY", raising=False)
    plan = sealed(tmp_path, "tensorrt", "10.16.1.11", "9.0")
    answers = {"driver": driver(H200), "tensorrt_dispatch": {**able("10.16.1.11"), "builds": False}}
    problem, cure, _ = first_three(doctor("--plan", plan, **answers))
    assert "tensorrt_dispatch 10.16.1.11 has no runtime of its own" in problem
    assert "TRTX_LEAN_LIBRARY" in cure
    assert "others need TRTX_LEAN_LIBRARY" in doctor(**answers).out
    embedding = sealed(tmp_path, "tensorrt", "10.16.1.11", "9.0", version_compatible=True, host_code=True)
    found = doctor("--plan", embedding, "--json", **answers).json["plan"]
    assert found["runs_on"] == ["tensorrt_dispatch"]
    assert "allow_host_code" in found["problems"][0]


def test_a_driver_that_hangs(doctor: Doctor) -> None:
    problem, _, _ = first_three(doctor(driver={"ended": "hung", "problem": "loading it did not end within 60 s"}))
    assert "no usable GPU: loading it did not end within 60 s" in problem


def test_a_damaged_plan_and_what_is_no_plan(doctor: Doctor, tmp_path: Path) -> None:
    problem, _, _ = first_three(doctor("--plan", DIGITS, driver=driver(ADA), tensorrt=able("10.16.1.11")))
    assert "looks like an ONNX model" in problem or "no TensorRT plan" in problem
    path = sealed(tmp_path, "tensorrt", "10.16.1.11", "8.9")
    Path(path).write_bytes(Path(path).read_bytes()[:-1])
    problem, cure, _ = first_three(doctor("--plan", path, driver=driver(ADA), tensorrt=able("10.16.1.11")))
    assert "truncated" in problem
    assert "copy or build it again" in cure


def test_a_name_with_line_breaks_is_one_line(doctor: Doctor, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "a\nb.onnx"
    path.write_bytes(Path(DIGITS).read_bytes())
    problem, _, works = first_three(doctor("--plan", path, driver=driver(ADA), tensorrt=able("10.16.1.11")))
    assert r"a\nb.onnx' does not run here" in problem
    assert works.startswith("works: ")
    assert r"a\nb.onnx': ONNX model" in run("inspect", path).succeeded().out.splitlines()[0]


def test_the_tables_are_readable_at_80_columns(doctor: Doctor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from rich.console import Console

    monkeypatch.setattr(
        "trtx_py.cli._doctor.console", lambda: Console(file=sys.stdout, highlight=False, width=80, color_system=None)
    )
    lines = doctor(driver=NO_DRIVER, tensorrt=able("10.16.1.11")).out.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("TensorRT "))
    names = [line.split()[0] for line in lines[at + 1 :][: len(FLAVOURS)]]
    assert names == list(FLAVOURS)  # a row each


def test_a_plan_of_the_mock(doctor: Doctor, run: Run, tmp_path: Path) -> None:
    path = str(tmp_path / "m.plan")
    run("build", DIGITS, "--backend", "mock", "-o", path).succeeded()
    found = doctor("--plan", path, "--json", driver=NO_DRIVER).json
    assert found["plan"]["runs_on"] == ["mock"]


def test_json_is_one_object_with_all_of_it(doctor: Doctor) -> None:
    found = doctor("--json", driver=driver(H200), tensorrt=able("10.16.1.11")).json
    assert found["gpus"][0]["compute_capability"] == "9.0"
    assert [each["name"] for each in found["flavours"]] == list(FLAVOURS)
    assert {each["name"] for each in found["extras"]} >= {"mock", "serve", "cli"}
    assert found["cache"]["problem"] == ""


def test_a_cache_that_must_not_be_trusted(doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c").chmod(0o777)
    monkeypatch.setenv("TRTX_CACHE_DIR", str(tmp_path / "c"))
    ran = doctor(driver=driver(ADA), tensorrt=able("10.16.1.11"))
    assert "can be written by others" in ran.out
    assert "TRTX_CACHE_DIR" in ran.out


def test_extras_are_those_of_the_project() -> None:
    from trtx_py.diagnostics._extras import EXTRAS

    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    extras = text[text.index("[project.optional-dependencies]") : text.index("[project.scripts]")]
    for name, (packages, _) in EXTRAS.items():
        (line,) = [each for each in extras.splitlines() if each.startswith(f"{name} = ")]
        assert all(package in line for package in packages), name


# Processes


def test_a_probe_that_crashes_and_one_that_hangs() -> None:
    crash = run_probe("x", code="import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert crash["ended"] == "crashed"
    assert "SIGSEGV" in crash["problem"]
    silent = run_probe("x", code="import sys; sys.exit('no such library')")
    assert silent["problem"] == "loading it ends the process (exit code 1): no such library"
    hung = run_probe("x", code="import time; time.sleep(60)", timeout_s=0.2)
    assert hung["ended"] == "hung"


def test_where_the_package_itself_cannot_be_loaded() -> None:
    code = "import sys\nsys.modules['numpy'] = None\nfrom trtx_launch import main\nmain()"
    ran = spawn("doctor", program=[sys.executable, "-c", code]).succeeded()
    assert "engine cache: " in ran.out
    assert "numpy" in ran.out


def test_where_really_nothing_is_installed(tmp_path: Path) -> None:
    """An import hook hides every TensorRT and the driver from the command and from its probes."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Hide:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.startswith(('tensorrt', 'onnxruntime')):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Hide())\n"
    )
    env = environment(TRTX_CACHE_DIR=str(tmp_path / "cache"), CUDA_VISIBLE_DEVICES="")
    env["PYTHONPATH"] = f"{tmp_path}:{env['PYTHONPATH']}"
    ran = spawn("doctor", env=env).succeeded()
    problem, _, works = first_three(ran)
    assert "no TensorRT is installed" in problem
    assert works == "works: the mock (builds and runs, on the CPU)"
    assert ran.err == ""
