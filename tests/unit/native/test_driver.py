from __future__ import annotations

import ctypes
import gc
import inspect
import signal
import sys
import threading
import time
import weakref
from typing import Any, cast

import numpy as np
import pytest

from tests.unit.native.driver_table import Table, functions
from trtx_py import _native
from trtx_py._errors import CudaError
from trtx_py._native import Driver
from trtx_py.backends.protocols import CudaDriver

BIG = 2**64 - 1
#: method, arguments, what the driver is given, what it answers, result
CALLS: list[tuple[str, tuple[Any, ...], tuple[Any, ...], tuple[Any, ...], Any]] = [
    ("cuInit", (0,), (0,), (), None),
    ("cuDriverGetVersion", (), (0,), (13000,), 13000),
    ("cuDeviceGetCount", (), (0,), (2,), 2),
    ("cuDeviceGet", (1,), (None, 1), (3,), 3),
    ("cuDeviceGetName", (1,), (None, 256, 1), (b"Fake \xff GPU\0 rest",), "Fake \ufffd GPU"),
    ("cuDeviceTotalMem", (1,), (None, 1), (BIG,), BIG),
    ("cuDeviceGetAttribute", (75, 1), (0, 75, 1), (-9,), -9),
    ("cuDeviceGetUuid", (1,), (None, 1), (bytes(range(16)),), bytes(range(16))),
    ("cuDevicePrimaryCtxRetain", (1,), (None, 1), (BIG,), BIG),
    ("cuDevicePrimaryCtxRelease", (-1,), (-1,), (), None),
    ("cuCtxPushCurrent", (BIG,), (BIG,), (), None),
    ("cuCtxPopCurrent", (), (None,), (12,), 12),
    ("cuCtxGetCurrent", (), (None,), (0,), 0),
    ("cuMemGetInfo", (), (None, None), (1000, BIG), (1000, BIG)),
    ("cuMemAlloc", (2**40,), (None, 2**40), (2**63,), 2**63),
    ("cuMemFree", (2**63,), (2**63,), (), None),
    ("cuMemAllocAsync", (64, 5), (None, 64, 5), (2**40,), 2**40),
    ("cuMemFreeAsync", (2**40, 5), (2**40, 5), (), None),
    ("cuMemHostAlloc", (64, 2**32 - 1), (None, 64, 2**32 - 1), (2**41,), 2**41),
    ("cuMemFreeHost", (2**41,), (2**41,), (), None),
    ("cuMemcpyHtoDAsync", (1, 2, 3, BIG), (1, 2, 3, BIG), (), None),
    ("cuMemcpyDtoHAsync", (1, 2, 3, 4), (1, 2, 3, 4), (), None),
    ("cuMemcpyDtoDAsync", (1, 2, 3, 4), (1, 2, 3, 4), (), None),
    ("cuMemsetD8Async", (1, 255, 3, 4), (1, 255, 3, 4), (), None),
    ("cuStreamCreate", (1,), (None, 1), (21,), 21),
    ("cuStreamDestroy", (21,), (21,), (), None),
    ("cuStreamSynchronize", (21,), (21,), (), None),
    ("cuStreamQuery", (21,), (21,), (), 0),
    ("cuStreamWaitEvent", (21, 31, 1), (21, 31, 1), (), None),
    ("cuEventCreate", (2,), (None, 2), (31,), 31),
    ("cuEventDestroy", (31,), (31,), (), None),
    ("cuEventRecord", (31, 21), (31, 21), (), None),
    ("cuEventQuery", (31,), (31,), (), 0),
    ("cuEventSynchronize", (31,), (31,), (), None),
    ("cuEventElapsedTime", (31, 32), (None, 31, 32), (1.5,), 1.5),
    ("cuThreadExchangeStreamCaptureMode", (2,), (2,), (1,), 1),
    ("cuStreamBeginCapture", (21, 1), (21, 1), (), None),
    ("cuStreamEndCapture", (21,), (21, None), (41,), 41),
    ("cuStreamIsCapturing", (21,), (21, 0), (2,), 2),
    ("cuGraphInstantiate", (41, BIG), (None, 41, BIG), (51,), 51),
    ("cuGraphGetNodes", (41,), (41, None, None), (7,), 7),
    ("cuGraphLaunch", (51, 21), (51, 21), (), None),
    ("cuGraphExecDestroy", (51,), (51,), (), None),
    ("cuGraphDestroy", (41,), (41,), (), None),
]
METHODS = pytest.mark.parametrize(("name", "args", "given", "answers", "result"), CALLS, ids=[c[0] for c in CALLS])


@pytest.fixture
def table() -> Table:
    table = Table()
    table.names = {700: (b"CUDA_ERROR_ILLEGAL_ADDRESS", b"an illegal \xc3\xa4ddress")}
    return table


def test_the_class_has_every_method_of_the_seam_and_no_other() -> None:
    seam = {name for name in vars(CudaDriver) if not name.startswith("_")}
    assert seam == {name for name in vars(Driver) if not name.startswith("_")}
    assert seam - {"api"} == {name for name, *_ in CALLS}
    of_lanes_and_errors = {"cuCtxSetCurrent", "cuGetErrorName", "cuGetErrorString"}
    assert set(functions()) - of_lanes_and_errors == seam - {"api"}


@METHODS
def test_signatures_are_those_of_the_seam(name: str, args: Any, given: Any, answers: Any, result: Any) -> None:
    theirs = inspect.signature(getattr(CudaDriver, name)).parameters.values()
    ours = inspect.signature(getattr(Driver, name)).parameters.values()
    assert [(p.name.rstrip("_"), p.kind) for p in ours][1:] == [(p.name.rstrip("_"), p.kind) for p in theirs][1:]


@METHODS
def test_values_go_both_ways(table: Table, name: str, args: Any, given: Any, answers: Any, result: Any) -> None:
    table.answers[name] = answers
    answer = getattr(Driver(table.capsule), name)(*args)
    assert answer == result
    assert type(answer) is type(result)
    assert table.calls == [(name, given)]


@METHODS
def test_every_status_is_checked(table: Table, name: str, args: Any, given: Any, answers: Any, result: Any) -> None:
    table.answers[name], table.status[name] = answers, 700
    with pytest.raises(CudaError) as caught:
        getattr(Driver(table.capsule), name)(*args)
    error = caught.value
    assert (error.code, error.name, error.call) == (700, "CUDA_ERROR_ILLEGAL_ADDRESS", name)
    assert str(error) == f"{name} returned CUDA_ERROR_ILLEGAL_ADDRESS (700): an illegal äddress"


@METHODS
def test_only_the_queries_return_not_ready(
    table: Table, name: str, args: Any, given: Any, answers: Any, result: Any
) -> None:
    driver = Driver(table.capsule)
    table.answers[name], table.status[name] = answers, 600
    if name in ("cuStreamQuery", "cuEventQuery"):
        assert getattr(driver, name)(*args) == 600
    else:
        with pytest.raises(CudaError, match=r"CUresult 600 \(600\)$"):
            getattr(driver, name)(*args)


@METHODS
def test_arguments_are_checked_by_name(
    table: Table, name: str, args: Any, given: Any, answers: Any, result: Any
) -> None:
    driver = Driver(table.capsule)
    call = getattr(driver, name)
    for wrong in (args[1:], (*args, 1)):
        if len(wrong) != len(args):
            with pytest.raises(TypeError, match=rf"^{name}\(\) takes {len(args)} arguments, not {len(wrong)}$"):
                call(*wrong)
    for index in range(len(args)):
        for bad in ("7", 7.0, None, b"7"):
            with pytest.raises(TypeError, match=rf"^{name}\(\): \w+ must be int, not {type(bad).__name__}$"):
                call(*args[:index], bad, *args[index + 1 :])
        for huge in (2**64, -(2**64), 2**2000):
            with pytest.raises(OverflowError, match=rf"^{name}\(\): \w+ must be -?\d"):
                call(*args[:index], huge, *args[index + 1 :])
    assert table.calls == []


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("cuDeviceGet", (2**31,)),
        ("cuDeviceGet", (-(2**31) - 1,)),
        ("cuInit", (2**32,)),
        ("cuInit", (-1,)),
        ("cuMemsetD8Async", (1, 256, 1, 1)),
        ("cuMemsetD8Async", (1, -1, 1, 1)),
        ("cuEventQuery", (-1,)),
    ],
)
def test_narrow_arguments_do_not_wrap(table: Table, name: str, args: Any) -> None:
    with pytest.raises(OverflowError, match=rf"^{name}\(\)"):
        getattr(Driver(table.capsule), name)(*args)
    assert table.calls == []


def test_integers_of_other_types(table: Table) -> None:
    class Handle:
        def __index__(self) -> int:
            return 9

    class Broken:
        def __index__(self) -> int:
            raise KeyError("broken")

    driver = Driver(table.capsule)
    for value, expected in ((np.uint64(BIG), BIG), (np.int32(5), 5), (True, 1), (Handle(), 9)):
        driver.cuEventQuery(value)  # type: ignore[arg-type]  # what __index__ is for
        assert table.calls.pop() == ("cuEventQuery", (expected,))
    with pytest.raises(KeyError, match="broken"):
        driver.cuEventQuery(Broken())  # type: ignore[arg-type]


def test_a_subclass_says_what_is_raised(table: Table) -> None:
    class Mine(Driver):
        def __init__(self, note: str) -> None:
            super().__init__(table.capsule)
            self.note = note

        def _error(self, call: str, code: int, /) -> Any:
            if code == 1:
                return super()._error(call, code)
            if code == 2:
                raise OSError("no text")
            return LookupError(self.note, call, code) if code == 3 else "not an exception"

    mine = Mine("note")
    assert weakref.ref(mine)() is mine
    table.status["cuEventQuery"] = 3
    with pytest.raises(LookupError) as caught:
        mine.cuEventQuery(1)
    assert caught.value.args == ("note", "cuEventQuery", 3)
    table.status["cuEventQuery"] = 1
    with pytest.raises(CudaError, match=r"^cuEventQuery returned CUresult 1 \(1\)$"):
        mine.cuEventQuery(1)
    table.status["cuEventQuery"] = 2
    with pytest.raises(OSError, match="no text"):
        mine.cuEventQuery(1)
    table.status["cuEventQuery"] = 4
    with pytest.raises(TypeError, match=r"Mine._error\(\) must return an exception, not str"):
        mine.cuEventQuery(1)


def test_a_failure_inside_an_except_block_keeps_its_context(table: Table) -> None:
    table.status["cuMemFree"] = 700
    driver = Driver(table.capsule)

    def clean_up() -> None:
        try:
            raise ValueError("first")
        except ValueError:
            driver.cuMemFree(1)

    with pytest.raises(CudaError) as caught:
        clean_up()
    assert isinstance(caught.value.__context__, ValueError)


def test_the_capsule_is_kept_and_given_back(table: Table) -> None:
    capsule = table.capsule
    before = sys.getrefcount(capsule)
    driver = Driver(capsule)
    assert driver.api is capsule
    assert Driver(api=driver.api).cuEventQuery(1) == 0
    del driver
    gc.collect()
    assert sys.getrefcount(capsule) == before
    with pytest.raises(AttributeError):
        Driver(capsule).api = capsule  # type: ignore[misc]


def test_nothing_leaks(table: Table) -> None:
    class Mine(Driver):
        pass

    driver, value = Mine(table.capsule), 2**50 + 1
    table.status["cuMemFree"] = 700

    def use() -> None:
        driver.cuEventQuery(value)
        driver.cuEventQuery(np.uint64(3))
        Mine(table.capsule)
        mistakes: list[tuple[Any, Any]]
        mistakes = [(driver.cuMemFree, value), (driver.cuMemFree, "x"), (driver.cuEventQuery, -value)]
        for call, wrong in mistakes:
            with pytest.raises(Exception, match=r"."):
                call(wrong)
        table.calls.clear()

    rounds = 2000
    for _ in range(50):
        use()
    gc.collect()
    counts = [sys.getrefcount(one) for one in (driver, value, Mine, Driver, CudaError, table.capsule, None)]
    blocks = sys.getallocatedblocks()
    for _ in range(rounds):
        use()
    gc.collect()
    after = [sys.getrefcount(one) for one in (driver, value, Mine, Driver, CudaError, table.capsule, None)]
    assert all(abs(a - b) < rounds / 2 for a, b in zip(after, counts, strict=True))
    assert sys.getallocatedblocks() - blocks < rounds / 2


def test_misuse_of_the_class(table: Table) -> None:
    for wrong in (None, 3, ctypes.pythonapi.PyCapsule_New):
        with pytest.raises(TypeError, match=r'Driver\(\): api must be a capsule "trtx_cuda_api", not '):
            Driver(wrong)
    with pytest.raises(TypeError):
        Driver()  # type: ignore[call-arg]
    empty = Driver.__new__(Driver)
    with pytest.raises(RuntimeError, match="__init__ was not called"):
        empty.cuEventQuery(1)
    with pytest.raises(RuntimeError, match="__init__ was not called"):
        _ = empty.api
    assert str(empty._error("cuInit", 5)) == "cuInit returned CUresult 5 (5)"
    driver = Driver(table.capsule)
    with pytest.raises(RuntimeError, match="called twice"):
        driver.__init__(table.capsule)  # type: ignore[misc]  # what a second super().__init__() would do
    with pytest.raises(TypeError):
        driver._error("cuInit")  # type: ignore[call-arg]


SLEEP_US = 20_000_000  # but for a signal


@pytest.mark.parametrize(
    ("name", "rest"),
    [
        ("cuStreamSynchronize", ()),
        ("cuEventSynchronize", ()),
        ("cuMemFree", ()),
        ("cuMemFreeHost", ()),
        ("cuMemFreeAsync", (0,)),
        ("cuMemcpyHtoDAsync", (0, 0, 0)),
        ("cuMemcpyDtoHAsync", (0, 0, 0)),
        ("cuStreamDestroy", ()),
        ("cuEventRecord", (0,)),
        ("cuGraphLaunch", (0,)),
        ("cuGraphExecDestroy", ()),
        ("cuStreamEndCapture", ()),
    ],
)
def test_other_threads_run_while_the_driver_blocks(table: Table, name: str, rest: tuple[int, ...]) -> None:
    table.replace(name, ctypes.CDLL(None).usleep)
    driver = Driver(table.capsule)

    def call() -> None:
        with pytest.raises(CudaError):  # what a sleep is that a signal ended
            getattr(driver, name)(SLEEP_US, *rest)

    thread = threading.Thread(target=call)
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        begun = time.monotonic()
        thread.start()
        for _ in range(10):  # were the interpreter's lock held, not before the sleep is over
            time.sleep(0.001)
        asleep = thread.is_alive()
        while thread.is_alive():
            signal.pthread_kill(cast("int", thread.ident), signal.SIGUSR1)
            thread.join(0.001)
        assert asleep
        assert time.monotonic() - begun < SLEEP_US / 1e6
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_loading_says_what_is_missing() -> None:
    reason = ""
    try:
        Driver(_native.load_driver_api()).cuDriverGetVersion()
    except OSError as error:
        reason = str(error)
    assert not reason or "libcuda.so.1" in reason
