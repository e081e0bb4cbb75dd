from __future__ import annotations

import threading

import pytest

from tests.unit.native.driver_table import Table
from trtx_py._errors import BackendUnavailableError, CudaError
from trtx_py.backends import cuda_driver
from trtx_py.backends.cuda_driver import NativeDriver
from trtx_py.backends.protocols import CudaDriver

NAMES = {
    2: "CUDA_ERROR_OUT_OF_MEMORY",
    34: "CUDA_ERROR_STUB_LIBRARY",
    100: "CUDA_ERROR_NO_DEVICE",
    803: "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
}


@pytest.fixture
def table() -> Table:
    table = Table()
    table.names = {code: (name.encode(), b"what it means") for code, name in NAMES.items()}
    return table


def test_it_is_initialized_and_is_the_seam(table: Table) -> None:
    driver: CudaDriver = NativeDriver(table.capsule)
    assert table.calls == [("cuInit", (0,))]
    assert driver.cuEventQuery(5) == 0


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (100, "CUDA_VISIBLE_DEVICES"),
        (34, "stub"),
        (803, "update the driver"),
        (2, "install an NVIDIA driver"),
    ],
)
def test_failed_initialization_says_what_to_do(table: Table, status: int, says: str) -> None:
    table.status["cuInit"] = status
    with pytest.raises(BackendUnavailableError, match=says) as caught:
        NativeDriver(table.capsule)
    assert f"cuInit returned {NAMES[status]} ({status}): what it means" in str(caught.value)
    assert isinstance(caught.value.__cause__, CudaError)


@pytest.mark.parametrize(
    ("reason", "says", "keeps_quiet_about"),
    [
        (
            "no CUDA driver: libcuda.so.1: cannot open shared object file",
            r"libcuda\.so\.1.*install an NVIDIA driver",
            "470",
        ),
        (
            "the CUDA driver libcuda.so.1 has no symbol cuMemAllocAsync: it is too old",
            "cuMemAllocAsync.*470",
            "container",
        ),
        ("this process was forked from one that had loaded the CUDA driver: use spawn", "spawn$", "install"),
    ],
)
def test_a_library_that_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, reason: str, says: str, keeps_quiet_about: str
) -> None:
    def load() -> object:
        raise OSError(reason)

    monkeypatch.setattr(cuda_driver, "load_driver_api", load)
    monkeypatch.setattr(cuda_driver, "_shared", None)
    with pytest.raises(BackendUnavailableError, match=says) as caught:
        cuda_driver.shared_driver()
    assert keeps_quiet_about not in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)


def test_the_process_shares_one_and_tries_again_after_a_failure(monkeypatch: pytest.MonkeyPatch, table: Table) -> None:
    capsule = table.capsule
    monkeypatch.setattr(cuda_driver, "load_driver_api", lambda: capsule)
    monkeypatch.setattr(cuda_driver, "_shared", None)
    table.status["cuInit"] = 100
    with pytest.raises(BackendUnavailableError):
        cuda_driver.shared_driver()
    table.status.clear()
    found: list[NativeDriver] = []
    threads = [threading.Thread(target=lambda: found.append(cuda_driver.shared_driver())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(map(id, found))) == 1
    assert len(table.calls) == 2


def test_the_status_names_are_the_drivers_own() -> None:
    """What cuda-python calls the codes that have a next step."""
    real = pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")
    for code, name in NAMES.items():
        assert real.CUresult(code).name == name
    assert set(cuda_driver._INIT_NEXT_STEPS) <= {int(code) for code in real.CUresult} | {35}
