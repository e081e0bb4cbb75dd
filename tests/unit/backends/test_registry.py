from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from mock_backend import MockBackend
from tests.unit.backends.fake_vendor import FakeDriver, FakeVendor
from trtx_py._errors import BackendUnavailableError, InvalidArgumentError
from trtx_py.backends import registry
from trtx_py.backends.registry import backend_names, installed_backends, resolve_backend
from trtx_py.backends.tensorrt import TensorRTFamilyBackend


class Absent:
    """A backend that is not installed."""

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def info(self) -> Any:
        raise BackendUnavailableError(f"{self.name} is not installed; pip install {self.name}")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that decides what is installed, and on which GPUs."""
    monkeypatch.delenv("TRTX_BACKEND", raising=False)
    monkeypatch.delenv("TRTX_LEAN_LIBRARY", raising=False)

    def install(versions: dict[str, str], *gpus: tuple[int, int]) -> dict[str, Any]:
        instances: dict[str, Any] = {}
        for name in registry.REAL_BACKENDS:
            if name not in versions:
                instances[name] = Absent(name)
                continue
            vendor = FakeVendor("10.0.0" if name == "tensorrt_rtx" else versions[name])
            vendor.__version__ = versions[name]
            driver: Any = FakeDriver(*gpus)
            instances[name] = TensorRTFamilyBackend(name, module=vendor, driver=driver)
        monkeypatch.setattr(registry, "_instances", instances)
        return instances

    return install


ALL = {"tensorrt": "10.3.0.26", "tensorrt_rtx": "1.7.1.116", "tensorrt_dispatch": "10.16.1.11"}


def test_importing_it_imports_no_vendor() -> None:
    code = (
        "import sys, trtx_py.backends.registry\n"
        "print([m for m in sys.modules if m.split('.')[0] in "
        "('tensorrt', 'tensorrt_rtx', 'tensorrt_lean', 'tensorrt_dispatch', 'cuda', 'onnx', 'mock_backend')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_objects_pass_through() -> None:
    anything = MockBackend()
    assert resolve_backend(anything, need="both") is anything


def test_names() -> None:
    assert backend_names() == (
        "mock", "tensorrt", "tensorrt_rtx", "tensorrt_lean", "tensorrt_dispatch", "tensorrt+mock", "tensorrt_rtx+mock",
    )  # fmt: skip


def test_unknown_name_lists_the_known_and_the_closest(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidArgumentError, match="did you mean 'tensorrt_rtx'"):
        resolve_backend("tensorrt-rtx", need="build")
    with pytest.raises(InvalidArgumentError, match="there are mock, tensorrt") as caught:
        resolve_backend("qqq", need="build")
    assert "did you mean" not in str(caught.value)
    monkeypatch.setenv("TRTX_BACKEND", "mok")
    with pytest.raises(InvalidArgumentError, match=r"'mok' \(TRTX_BACKEND\).*did you mean 'mock'"):
        resolve_backend(None, need="build")
    wrong: Any = "everything"
    with pytest.raises(InvalidArgumentError, match="need is 'everything'"):
        resolve_backend("mock", need=wrong)


@pytest.mark.parametrize(
    ("gpus", "need", "installed", "chosen"),
    [
        ([], "build", ALL, "tensorrt_rtx"),
        ([(8, 9)], "build", ALL, "tensorrt"),
        ([(8, 9)], "both", ALL, "tensorrt"),
        ([(8, 9)], "both", {"tensorrt_rtx": "1.7.1.116"}, "tensorrt_rtx"),
        ([(9, 0)], "run", {"tensorrt_rtx": "1.7.1.116", "tensorrt_dispatch": "10.16.1.11"}, "tensorrt_dispatch"),
    ],
)
def test_best_installed(machine: Any, gpus: Any, need: Any, installed: dict[str, str], chosen: str) -> None:
    instances = machine(installed, *gpus)
    assert resolve_backend(None, need=need) is instances[chosen]


def test_plan_decides_among_the_installed(machine: Any) -> None:
    instances = machine(ALL, (8, 9))
    rtx = resolve_backend(None, need="run", plan_flavour="tensorrt_rtx", plan_version="1.7.1.116")
    assert rtx is instances["tensorrt_rtx"]
    newer = resolve_backend(None, need="run", plan_flavour="tensorrt", plan_version="10.16.1.11")
    assert newer is instances["tensorrt_dispatch"]
    with pytest.raises(BackendUnavailableError, match=r"a plan of tensorrt 11\.4\.0\.106") as caught:
        resolve_backend(None, need="run", plan_flavour="tensorrt", plan_version="11.4.0.106")
    assert "newer than tensorrt 10.3.0.26" in str(caught.value)
    assert "newer than tensorrt_dispatch 10.16.1.11" in str(caught.value)
    with pytest.raises(BackendUnavailableError, match="backend='mock'"):
        resolve_backend("tensorrt", need="run", plan_flavour="mock", plan_version="1.0.0.0")


def test_none_found_says_why_not_each_and_what_to_install(machine: Any) -> None:
    machine({"tensorrt_rtx": "1.7.1.116"}, (9, 0))
    with pytest.raises(BackendUnavailableError) as caught:
        resolve_backend(None, need="both")
    text = str(caught.value)
    assert "tensorrt: tensorrt is not installed; pip install tensorrt" in text
    assert "tensorrt_rtx: tensorrt_rtx does not run on Fake GPU (compute capability 9.0)" in text
    assert "tensorrt_lean: tensorrt_lean has no builder" in text
    assert "TRTX_BACKEND=mock" in text


def test_named_backend_that_cannot_serve(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(ALL)
    with pytest.raises(BackendUnavailableError, match=r"'tensorrt_dispatch' cannot build here: .* has no builder"):
        resolve_backend("tensorrt_dispatch", need="build")
    with pytest.raises(BackendUnavailableError, match=r"'tensorrt_lean' cannot run here: .*not installed"):
        resolve_backend("tensorrt_lean", need="run")
    with pytest.raises(BackendUnavailableError, match="builds on a GPU only"):
        resolve_backend("tensorrt", need="build")
    monkeypatch.setenv("TRTX_BACKEND", "tensorrt_rtx")
    with pytest.raises(BackendUnavailableError, match=r"'tensorrt_rtx' \(TRTX_BACKEND\) cannot run here"):
        resolve_backend(None, need="run")


def test_lean_library_is_considered(machine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    machine({"tensorrt_rtx": "1.7.1.116", "tensorrt_dispatch": "10.16.1.11"}, (8, 9))
    missing = str(tmp_path / "libnvinfer_lean.so.8")
    with pytest.raises(BackendUnavailableError, match="does not exist") as caught:
        resolve_backend(None, need="run", lean_library=missing)
    assert "tensorrt_rtx 1.7.1.116 loads no lean library" in str(caught.value)
    monkeypatch.setenv("TRTX_LEAN_LIBRARY", missing)
    with pytest.raises(BackendUnavailableError, match="does not exist"):
        resolve_backend("tensorrt_dispatch", need="run")
    assert resolve_backend("tensorrt_rtx", need="build").info.name == "tensorrt_rtx"


def test_installed_backends_reports_each(machine: Any) -> None:
    machine(ALL, (9, 0))
    found = {status.name: status for status in installed_backends()}
    assert list(found) == list(registry.REAL_BACKENDS)
    assert (found["tensorrt"].builds, found["tensorrt"].runs, found["tensorrt"].reasons) == (True, True, ())
    assert (found["tensorrt_rtx"].builds, found["tensorrt_rtx"].runs) == (True, False)
    assert "9.0" in found["tensorrt_rtx"].reasons[0]
    lean = found["tensorrt_lean"]
    assert (lean.info, lean.builds, lean.runs) == (None, False, False)
    assert "tensorrt-lean-cu13" in lean.install
    assert found["tensorrt_dispatch"].runs


def test_mock_is_one_for_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mock_backend")
    monkeypatch.setattr(registry, "_instances", {})
    monkeypatch.setenv("TRTX_BACKEND", "mock")
    mock = resolve_backend(None, need="both")
    assert mock.info.flavour == "mock"
    assert resolve_backend("mock", need="run") is mock


def test_joined_backend(machine: Any) -> None:
    pytest.importorskip("mock_backend")
    machine({"tensorrt_rtx": "1.7.1.116"})
    joined = resolve_backend("tensorrt_rtx+mock", need="both")
    assert (joined.info.can_build, joined.info.can_run, joined.info.version) == (True, True, "1.7.1.116")
    assert resolve_backend("tensorrt_rtx+mock", need="both") is joined
    with pytest.raises(BackendUnavailableError, match="not installed"):
        resolve_backend("tensorrt+mock", need="both")
