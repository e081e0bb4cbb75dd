"""How contexts are made by each version: their activation memory, auxiliary streams and, on RTX, graphs and cache."""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from tests.unit.backends.fake_vendor import FakeDriver, FakeVendor, Severity, make_plan
from trtx_py._errors import ClosedError, EngineError, ExecutionError, InvalidArgumentError
from trtx_py.backends.tensorrt import TensorRTFamilyBackend
from trtx_py.backends.tensorrt._guards import deprecated_calls

ADDRESS = 0x7F00_0000_0100
RTX_PLAN = make_plan(b"vtrt", (1, 7, 1, 116))


class Rig:
    """An engine of one version, over stand-ins."""

    def __init__(self, flavour: str, version: str, lean: str | None = None, cache: bytes | None = None) -> None:
        kind = {"tensorrt": "full", "tensorrt_rtx": "rtx"}.get(flavour, flavour.removeprefix("tensorrt_"))
        self.vendor = FakeVendor(version, kind)
        self.log: list[tuple[Severity, str]] = []
        self._options: dict[str, Any] = {"lean_library": None, "allow_host_code": False, "runtime_cache": cache}
        self._flavour = flavour
        self.lean = lean

    def open(self, lean_library: str | None = None, behind_old_lean: bool = False) -> Any:
        self.vendor.behind_old_lean = behind_old_lean
        self._options["lean_library"] = lean_library
        driver: Any = FakeDriver((8, 9))
        backend = TensorRTFamilyBackend(self._flavour, module=self.vendor, driver=driver)
        self.runtime = backend.create_runtime(lambda *line: self.log.append(line), device=0, **self._options)
        return self.runtime.deserialize(self.plan())

    def plan(self) -> bytes:
        if self._flavour == "tensorrt_rtx":
            return RTX_PLAN
        major, minor, patch = (int(n) for n in (self.lean or self.vendor.__version__).split(".")[:3])
        return make_plan(version=(major, minor, patch, 0))

    @property
    def native(self) -> Any:
        return self.vendor.next_context


def rtx(cache: bytes | None = None) -> tuple[Rig, Any]:
    rig = Rig("tensorrt_rtx", "1.7.1.116", cache=cache)
    return rig, rig.open()


def bind(context: Any) -> None:
    for name in ("x", "s", "y"):
        context.set_tensor_address(name, 0x1000)


@pytest.fixture(autouse=True)
def deprecations_raise() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        yield


# Activation memory


@pytest.mark.parametrize(
    ("flavour", "version", "lean", "made", "told"),
    [
        ("tensorrt", "8.6.0", None, "without memory", (ADDRESS,)),
        ("tensorrt", "10.16.1.11", None, "USER_MANAGED", (ADDRESS, 4096)),
        ("tensorrt", "11.4.0.106", None, "USER_MANAGED", (ADDRESS, 4096)),
        ("tensorrt_dispatch", "10.16.1.11", "8.6.0", "without memory", (ADDRESS,)),
        ("tensorrt_dispatch", "10.16.1.11", "10.0.0", "USER_MANAGED", (ADDRESS,)),
        ("tensorrt_dispatch", "10.16.1.11", "10.16.1", "USER_MANAGED", (ADDRESS, 4096)),
        ("tensorrt_rtx", "1.7.1.116", None, "USER_MANAGED", (ADDRESS, 4096)),
    ],
)
def test_context_gets_its_memory_as_the_version_knows_it(
    flavour: str, version: str, lean: str | None, made: str, told: tuple[int, ...], lean_library: Any
) -> None:
    rig = Rig(flavour, version, lean)
    engine = rig.open(lean_library(lean) if lean else None, behind_old_lean=lean == "8.6.0")
    assert engine.user_managed_memory
    context = engine.create_context(own_memory=False)
    how = rig.vendor.contexts_made[-1][0]
    assert getattr(how, "name", how) == made
    bind(context)
    with pytest.raises(ExecutionError, match=r"no activation memory.*set_device_memory"):
        context.execute_async_v3(0)
    context.set_device_memory(ADDRESS, 4096)
    assert rig.native.log[-1] == ("memory", *told)
    context.execute_async_v3(5)
    assert rig.native.log[-1] == ("execute", 5)


def test_where_no_setter_is_left_contexts_have_their_own_memory(lean_library: Any) -> None:
    rig = Rig("tensorrt_dispatch", "11.4.0.106", "10.0.0")
    engine = rig.open(lean_library("10.0.0"))
    assert not engine.user_managed_memory
    with pytest.raises(InvalidArgumentError, match=r"lean library 10\.0\.0 allocate.*own_memory=True"):
        engine.create_context(own_memory=False)
    engine.create_context()
    assert rig.vendor.contexts_made == [()]


def test_versions_without_any_way_are_asked_for_nothing() -> None:
    rig = Rig("tensorrt", "10.16.1.11")
    del rig.vendor.ExecutionContextAllocationStrategy
    assert rig.open().user_managed_memory  # by the method of 8.6, which is still there
    rig = Rig("tensorrt", "11.4.0.106")
    del rig.vendor.ExecutionContextAllocationStrategy
    assert not rig.open().user_managed_memory
    rig = Rig("tensorrt", "10.16.1.11")
    rig.vendor.IExecutionContext = object
    assert not rig.open().user_managed_memory


@pytest.mark.parametrize(
    ("address", "nbytes", "says"),
    [
        (ADDRESS, 1999, "1999 bytes of activation memory are too few; expected at least 2000"),
        (ADDRESS + 8, 4096, "multiple of 256"),
        (0, 4096, "cannot be at 0x0"),
        (-256, 4096, "cannot be at"),
        (2**64, 4096, "cannot be at"),
    ],
)
def test_memory_that_kernels_would_run_out_of_is_refused(address: int, nbytes: int, says: str) -> None:
    rig = Rig("tensorrt", "10.16.1.11")
    context = rig.open().create_context(own_memory=False)
    with pytest.raises(InvalidArgumentError, match=says):
        context.set_device_memory(address, nbytes)
    assert rig.native.log == []


def test_memory_is_for_contexts_without() -> None:
    rig = Rig("tensorrt", "10.16.1.11")
    engine = rig.open()
    with pytest.raises(InvalidArgumentError, match="memory of its own"):
        engine.create_context().set_device_memory(ADDRESS, 4096)
    context = engine.create_context(own_memory=False)
    context.destroy()
    for call in (lambda: context.set_device_memory(ADDRESS, 4096), lambda: context.set_aux_streams([1])):
        with pytest.raises(ClosedError, match="execution context is destroyed"):
            call()


def test_errors_of_calls_that_return_nothing_are_in_the_log() -> None:
    rig = Rig("tensorrt", "10.16.1.11")
    context = rig.open().create_context(own_memory=False)
    logger = rig.vendor.runtimes[0].logger
    rig.native.during_setting = lambda: logger.log(Severity.ERROR, "setDeviceMemoryV2: bad memory")
    with pytest.raises(EngineError, match="refused 4096 bytes at") as caught:
        context.set_device_memory(ADDRESS, 4096)
    assert caught.value.tensorrt_log == ("setDeviceMemoryV2: bad memory",)
    bind(context)
    with pytest.raises(ExecutionError, match="no activation memory"):
        context.execute_async_v3(0)
    with pytest.raises(EngineError, match="refused the auxiliary streams"):
        context.set_aux_streams([7])


def test_context_without_memory_that_cannot_be_made() -> None:
    rig = Rig("tensorrt", "10.16.1.11")
    engine = rig.open()
    rig.vendor.next_context = None
    with pytest.raises(EngineError, match="was to get its memory later"):
        engine.create_context(own_memory=False)


def test_engine_that_needs_no_memory_runs_without() -> None:
    rig = Rig("tensorrt", "8.6.0")
    rig.vendor.engine_class = type("Tiny", (rig.vendor.engine_class,), {"device_memory_size": 0})
    context = rig.open().create_context(own_memory=False)
    bind(context)
    context.execute_async_v3(0)
    context.set_device_memory(ADDRESS, 1)


def test_warning_filters_are_as_before_whatever_overlaps() -> None:
    before = list(warnings.filters)

    def work() -> None:
        for _ in range(200):
            with deprecated_calls(), deprecated_calls():
                warnings.warn("old", DeprecationWarning, stacklevel=1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before


# Auxiliary streams and capture


@pytest.mark.parametrize("version", ["8.6.0", "10.16.1.11", "11.4.0.106"])
def test_auxiliary_streams(version: str) -> None:
    rig = Rig("tensorrt", version)
    engine = rig.open()
    assert engine.num_aux_streams == 2
    assert not engine.captures_itself
    context = engine.create_context()
    for streams in ([3], [3, 4], []):
        context.set_aux_streams(streams)
        assert rig.native.log[-1] == ("aux", streams)
    context.set_aux_streams((3, 4, 5))
    assert rig.native.log[-1] == ("aux", [3, 4])
    for streams in ([0], [3, 3], [-1], [2**64]):
        with pytest.raises(InvalidArgumentError, match="all differ, and not the default stream 0"):
            context.set_aux_streams(streams)


def test_engine_without_auxiliary_streams_is_given_none() -> None:
    rig = Rig("tensorrt", "10.16.1.11")
    rig.vendor.engine_class = type("Plain", (rig.vendor.engine_class,), {"num_aux_streams": 0})
    rig.open().create_context().set_aux_streams([3])
    assert rig.native.log == []


def test_refusal_during_a_capture_says_what_to_do() -> None:
    rig = Rig("tensorrt", "8.6.0")
    context = rig.open().create_context()
    bind(context)
    line = (  # as TensorRT 8.6 writes it
        "1: [caskUtils.cpp::createCaskHardwareInfo::852] Error Code 1: Cuda Runtime "
        "(operation not permitted when stream is capturing)"
    )

    def refuse(native: Any) -> None:
        rig.vendor.runtimes[0].logger.log(Severity.ERROR, line)
        native.answers = False

    rig.native.during_enqueue = refuse
    with pytest.raises(ExecutionError, match="enqueue it once with this shape before") as caught:
        context.execute_async_v3(0)
    assert caught.value.tensorrt_log == (line,)


# TensorRT-RTX


def test_rtx_contexts_capture_their_own_graphs() -> None:
    rig, engine = rtx()
    assert engine.captures_itself
    engine.create_context()
    engine.create_context(cuda_graphs=False)
    engine.create_context(own_memory=False)
    assert rig.vendor.contexts_made == [
        ("STATIC", "WHOLE_GRAPH_CAPTURE"),
        ("STATIC", "DISABLED"),
        ("USER_MANAGED", "WHOLE_GRAPH_CAPTURE"),
    ]
    assert rig.log == []


def test_rtx_keeps_a_contexts_configuration_as_long_as_the_context() -> None:
    rig, engine = rtx()
    context = engine.create_context()
    gc.collect()
    config = rig.vendor.config()
    assert config.dynamic_shapes_kernel_specialization_strategy.name == "LAZY"
    assert config.cache() is rig.vendor.caches[0]()
    del config
    context.destroy()
    gc.collect()
    assert rig.vendor.config() is None


def test_rtx_strategy_that_is_refused_is_said() -> None:
    rig, engine = rtx()
    rig.vendor.takes_graph_strategy = False
    engine.create_context()
    (line,) = rig.log
    assert line[0] == Severity.WARNING
    assert "refused CudaGraphStrategy.WHOLE_GRAPH_CAPTURE; contexts stay with DISABLED" in line[1]


def test_rtx_before_1_2_has_no_graphs_of_its_own() -> None:
    rig = Rig("tensorrt_rtx", "1.7.1.116")
    del rig.vendor.CudaGraphStrategy
    engine = rig.open()
    assert not engine.captures_itself
    engine.create_context()
    assert rig.vendor.contexts_made == [("STATIC", None)]
    assert engine.create_context() is not None


def test_rtx_configuration_that_cannot_be_made() -> None:
    rig, engine = rtx()
    rig.vendor.makes_config = False
    with pytest.raises(EngineError, match="could not create an execution context"):
        engine.create_context()


def test_rtx_engines_of_one_runtime_share_its_cache() -> None:
    rig, engine = rtx(b"kernels of yesterday")
    assert rig.runtime.runtime_cache() is None
    contexts = [engine.create_context(), rig.runtime.deserialize(RTX_PLAN).create_context()]
    (cache,) = rig.vendor.caches
    assert rig.runtime.runtime_cache() == b"kernels of yesterday+new"
    for context in contexts:
        context.destroy()
    engine.destroy()
    gc.collect()
    assert cache() is not None
    rig.runtime.destroy()
    gc.collect()
    assert cache() is None
    with pytest.raises(ClosedError):
        rig.runtime.runtime_cache()
    assert rig.log == []


def test_rtx_makes_one_cache_for_all_threads() -> None:
    rig, engine = rtx()
    threads = [threading.Thread(target=engine.create_context) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(rig.vendor.caches) == 1
    assert rig.runtime.runtime_cache() == b"+new"


def test_rtx_cache_that_does_not_fit_is_a_warning() -> None:
    rig, engine = rtx(b"of another version")
    engine.create_context()
    assert "refused the runtime cache given" in rig.log[0][1]
    rig.vendor.takes_cache = False
    engine.create_context()
    assert "did not take the runtime cache" in rig.log[1][1]
    assert rig.runtime.runtime_cache() == b"+new"
    cache = rig.vendor.caches[0]()
    assert cache is not None
    cache.serializes = False
    with pytest.raises(EngineError, match="could not serialize its runtime cache"):
        rig.runtime.runtime_cache()
    rig, engine = rtx(b"kernels")
    rig.vendor.makes_cache = False
    engine.create_context()
    assert "could not create a runtime cache" in rig.log[0][1]
    assert rig.runtime.runtime_cache() is None


def test_runtimes_without_a_cache_say_so() -> None:
    rig = Rig("tensorrt", "10.16.1.11", cache=b"kernels")
    rig.open().create_context()
    assert rig.runtime.runtime_cache() is None
    ((severity, line),) = rig.log
    assert severity == Severity.WARNING
    assert "tensorrt 10.16.1.11 has no runtime cache" in line


def test_engine_outlives_no_runtime() -> None:
    rig, engine = rtx()
    rig.runtime.destroy()
    with pytest.raises(ClosedError, match="runtime is destroyed"):
        engine.create_context()
