"""Running with fake vendor modules: runtimes, lean libraries, engines and contexts."""

from __future__ import annotations

import gc
import pathlib
import weakref
from typing import Any

import pytest

from tests.unit.backends.fake_vendor import FakeContext, FakeDriver, FakeVendor, Severity, make_plan
from trtx_py._errors import (
    BackendUnavailableError,
    ClosedError,
    EngineError,
    ExecutionError,
    InvalidArgumentError,
    PlanError,
    ShapeError,
    VersionMismatchError,
)
from trtx_py._types import DataType, ShapeRange, TensorLocation, TensorMode
from trtx_py.backends.tensorrt import TensorRTFamilyBackend
from trtx_py.backends.tensorrt._lean import decode_version, lean_library_version

PLAN8 = make_plan()
PLAN10 = make_plan(version=(10, 16, 1, 11))
HOST_CODE = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00\x3e\x00" + bytes(40)


def ignore(severity: object, line: str) -> None:
    """A sink for tests that look at errors only."""


def open_runtime(
    flavour: str = "tensorrt",
    version: str = "10.16.1.11",
    *,
    vendor: FakeVendor | None = None,
    capability: tuple[int, int] = (9, 0),
    **options: Any,
) -> tuple[FakeVendor, Any]:
    kind = {"tensorrt": "full", "tensorrt_rtx": "full"}.get(flavour, flavour.removeprefix("tensorrt_"))
    vendor = vendor or FakeVendor(version, kind)
    driver: Any = FakeDriver(capability)
    backend = TensorRTFamilyBackend(flavour, module=vendor, driver=driver)
    options = {"device": 0, "lean_library": None, "allow_host_code": False, **options}
    return vendor, backend.create_runtime(ignore, **options)


def open_context(**options: Any) -> tuple[FakeVendor, FakeContext, Any]:
    vendor, runtime = open_runtime(**options)
    native: FakeContext = vendor.next_context
    return vendor, native, runtime.deserialize(PLAN10).create_context()


# Lean libraries


@pytest.mark.parametrize(
    ("number", "text"), [(8600, "8.6.0"), (8601, "8.6.1"), (100000, "10.0.0"), (101601, "10.16.1"), (110400, "11.4.0")]
)
def test_decode_version(number: int, text: str) -> None:
    assert decode_version(number) == text


def test_lean_library_is_looked_at_before_tensorrt_loads_it(make_lean: Any, tmp_path: pathlib.Path) -> None:
    assert lean_library_version(make_lean(8600)) == "8.6.0"
    with pytest.raises(EngineError, match="does not exist"):
        lean_library_version(str(tmp_path / "missing.so"))
    with pytest.raises(EngineError, match="is a directory"):
        lean_library_version(str(tmp_path))
    (tmp_path / "text.so").write_bytes(b"\xfd7zXZ" + bytes(64))
    with pytest.raises(EngineError, match="is not a shared library"):
        lean_library_version(str(tmp_path / "text.so"))
    (tmp_path / "cut.so").write_bytes(pathlib.Path(make_lean(8600)).read_bytes()[:500])
    with pytest.raises(EngineError, match="cannot be loaded"):
        lean_library_version(str(tmp_path / "cut.so"))
    with pytest.raises(EngineError, match="no getInferLibVersion"):
        lean_library_version(make_lean(1, "somethingElse"))


def test_lean_library_is_loaded_and_gives_the_version(make_lean: Any) -> None:
    lean = make_lean(8600)
    vendor, runtime = open_runtime("tensorrt_dispatch", lean_library=lean, allow_host_code=True)
    assert (runtime.flavour, runtime.version) == ("tensorrt_dispatch", "8.6.0")
    outer, inner = vendor.runtimes
    assert outer.loaded == lean
    assert outer.engine_host_code_allowed
    assert inner.engine_host_code_allowed
    runtime.destroy()
    runtime.destroy()
    with pytest.raises(ClosedError):
        runtime.deserialize(PLAN8)


def test_what_would_end_the_process_is_refused(make_lean: Any) -> None:
    with pytest.raises(EngineError, match=r"11\.4\.0\.106 cannot load the lean library 8\.6\.0.*10\.16"):
        open_runtime("tensorrt_dispatch", "11.4.0.106", lean_library=make_lean(8600))
    vendor = FakeVendor("10.7.1.116")
    vendor.__version__ = "1.7.1.116"
    with pytest.raises(EngineError, match="loads no lean library"):
        open_runtime("tensorrt_rtx", vendor=vendor, capability=(8, 9), lean_library=make_lean(8600))


def test_lean_library_that_tensorrt_refuses(make_lean: Any) -> None:
    vendor = FakeVendor("10.16.1.11", "dispatch")
    vendor.Runtime.load_runtime = lambda self, path: None
    with pytest.raises(EngineError, match="could not load the lean library"):
        open_runtime("tensorrt_dispatch", vendor=vendor, lean_library=make_lean(8600))


def test_old_lean_library_is_not_asked_what_it_does_not_know(make_lean: Any) -> None:
    vendor = FakeVendor("10.16.1.11", "dispatch")
    vendor.behind_old_lean = True
    _, runtime = open_runtime("tensorrt_dispatch", vendor=vendor, lean_library=make_lean(8600))
    engine = runtime.deserialize(PLAN8)
    assert vendor.reached == []
    assert engine.device_memory_bytes(0) == engine.device_memory_bytes(None) == 1000
    assert engine.weights_bytes == 0
    shape_input = engine.io_tensors[1]
    assert shape_input.ranges[0].admits((1000, -1000))
    with pytest.raises(EngineError, match="cannot carry an IOutputAllocator into the lean library 8"):
        engine.create_context().set_output_allocator("y", Allocator())


# Runtimes


def test_device_must_exist_and_be_one_that_the_flavour_runs_on() -> None:
    vendor = FakeVendor("10.7.1.116")
    vendor.__version__ = "1.7.1.116"
    with pytest.raises(BackendUnavailableError, match=r"does not run on Fake GPU \(compute capability 9\.0\)"):
        open_runtime("tensorrt_rtx", vendor=vendor)
    with pytest.raises(BackendUnavailableError, match="there is no CUDA device 3; the driver shows 1"):
        open_runtime(device=3)
    driver: Any = FakeDriver((9, 0), (8, 9))
    assert TensorRTFamilyBackend("tensorrt_rtx", module=vendor, driver=driver).refusal_to_run() is None
    only: Any = FakeDriver((9, 0))
    assert "9.0" in (TensorRTFamilyBackend("tensorrt_rtx", module=vendor, driver=only).refusal_to_run() or "")


def test_runtime_that_only_looks_alive_is_never_used() -> None:
    vendor = FakeVendor("10.16.1.11")
    vendor.log_at_creation = [(Severity.WARNING, "lazy loading is off")]
    open_runtime(vendor=vendor)
    vendor.log_at_creation = [(Severity.ERROR, "createInferRuntime: CUDA initialization failure with error: 35")]
    with pytest.raises(EngineError, match="could not create a runtime on Fake GPU") as caught:
        open_runtime(vendor=vendor, allow_host_code=True)
    assert "error: 35" in caught.value.tensorrt_log[0]
    assert not vendor.runtimes[-1].engine_host_code_allowed
    freed: list[bool] = []
    weakref.finalize(vendor.runtimes[-1], freed.append, True)
    del caught
    vendor.runtimes.clear()
    gc.collect()
    assert freed == []


def test_plans_are_checked_before_tensorrt_sees_them() -> None:
    vendor, runtime = open_runtime()
    vendor.deserialized = None
    with pytest.raises(PlanError, match="cut off"):
        runtime.deserialize(make_plan(body=b"12")[:-1])
    with pytest.raises(
        VersionMismatchError, match=r"8\.6\.0\.12 does not run on tensorrt 10\.16\.1\.11 alone"
    ) as caught:
        runtime.deserialize(PLAN8)
    assert (caught.value.plan, caught.value.runtime) == ("tensorrt 8.6.0.12", "tensorrt 10.16.1.11")
    with pytest.raises(VersionMismatchError, match="open the plan with tensorrt_rtx"):
        runtime.deserialize(make_plan(b"vtrt", (1, 7, 1, 116)))
    with pytest.raises(EngineError, match=r"ELF image for x86-64.*allow_host_code=True"):
        runtime.deserialize(make_plan(version=(10, 16, 1, 11), body=HOST_CODE))


def test_host_code_is_loaded_where_it_is_allowed() -> None:
    vendor, runtime = open_runtime(allow_host_code=True)
    assert vendor.runtimes[0].engine_host_code_allowed
    engine = runtime.deserialize(make_plan(version=(8, 6, 0, 12), body=HOST_CODE))
    assert engine.name == "fake"


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("engine was built for a GPU of other compute capability: does not support this compute capability",
         VersionMismatchError),
        ("The engine plan file is not compatible with this version of TensorRT", VersionMismatchError),
        ("out of memory", EngineError),
    ],
)  # fmt: skip
def test_refused_plan_becomes_a_typed_error_with_the_log(line: str, error: type[EngineError]) -> None:
    vendor, runtime = open_runtime()
    vendor.deserialized = None
    vendor.log_during_deserialize = [(Severity.ERROR, line)]
    with pytest.raises(EngineError) as caught:
        runtime.deserialize(PLAN10)
    assert type(caught.value) is error
    assert caught.value.tensorrt_log == (line,)
    assert "Fake GPU (compute capability 9.0)" in caught.value.message


# Engines


def test_engine_describes_its_tensors() -> None:
    _, runtime = open_runtime()
    engine = runtime.deserialize(PLAN10)
    x, s, y = engine.io_tensors
    assert (x.name, x.mode, x.dtype, x.shape) == ("x", TensorMode.INPUT, DataType.FLOAT, (-1, 4))
    assert x.ranges == (ShapeRange((1, 4), (2, 4), (8, 4)), ShapeRange((9, 4), (9, 4), (256, 4)))
    assert (s.location, s.is_shape_tensor, s.dtype) == (TensorLocation.HOST, True, DataType.INT32)
    assert s.ranges == (ShapeRange((1, 1), (2, 2), (3, 3)), ShapeRange((1, 1), (2, 2), (4, 3)))
    assert (y.mode, y.ranges, y.location) == (TensorMode.OUTPUT, (), TensorLocation.DEVICE)
    assert (engine.num_profiles, engine.num_layers, engine.weights_bytes) == (2, 3, 4242)
    assert [engine.device_memory_bytes(p) for p in (None, 0, 1)] == [2000, 100, 101]
    with pytest.raises(EngineError, match="no optimization profile 2"):
        engine.device_memory_bytes(2)


def test_engine_of_8_6_is_asked_by_its_own_names() -> None:
    _, runtime = open_runtime(version="8.6.0")
    engine = runtime.deserialize(PLAN8)
    assert engine.io_tensors[1].ranges[1] == ShapeRange((1, 1), (2, 2), (4, 3))
    assert (engine.device_memory_bytes(1), engine.weights_bytes) == (1000, 0)


def test_context_that_cannot_be_made() -> None:
    vendor, runtime = open_runtime()
    engine = runtime.deserialize(PLAN10)
    vendor.next_context = None
    with pytest.raises(EngineError, match="2000 bytes of device memory"):
        engine.create_context()
    engine.destroy()
    engine.destroy()
    with pytest.raises(ClosedError, match="engine is destroyed"):
        engine.create_context()


# Contexts


class Allocator:
    def __init__(self, answer: int = 4096, fails: BaseException | None = None) -> None:
        self.answer, self.fails, self.calls = answer, fails, []

    calls: list[Any]

    def reallocate(self, name: str, current: int, nbytes: int, alignment: int) -> int:
        if self.fails is not None:
            raise self.fails
        self.calls.append((name, current, nbytes, alignment))
        return self.answer

    def notify_shape(self, name: str, shape: Any) -> None:
        self.calls.append((name, shape))


def bind(context: Any) -> None:
    for name in ("x", "s", "y"):
        context.set_tensor_address(name, 0x1000)


def test_profile_switch_is_proved() -> None:
    _, native, context = open_context()
    context.set_profile(1, 77)
    assert (context.active_profile, native.log) == (1, [("profile", 1, 77)])
    with pytest.raises(EngineError, match="no optimization profile 2"):
        context.set_profile(2, 0)
    native.active_optimization_profile = -1
    with pytest.raises(EngineError, match="another context uses it"):
        context.set_profile(0, 0)
    native.active_optimization_profile, native.answers = 0, False
    with pytest.raises(EngineError, match="did not give optimization profile 1"):
        context.set_profile(1, 0)


@pytest.mark.parametrize(
    ("name", "shape", "error", "says"),
    [
        ("x", (9, 4), ShapeError, r"outside \[1, 4\]..\[8, 4\]"),
        ("x", (2, 5), ShapeError, "cannot have the shape"),
        ("x", (2,), ShapeError, "cannot have the shape"),
        ("x", (-1, 4), ShapeError, "not complete"),
        ("x", ("a", 4), ShapeError, "is not a shape"),
        ("y", (2, 4), InvalidArgumentError, "no input named 'y'; there are 'x', 's'"),
        ("zz", (2, 4), InvalidArgumentError, "no input named 'zz'"),
    ],
)
def test_input_shapes_are_checked_first(name: str, shape: Any, error: type[Exception], says: str) -> None:
    _, native, context = open_context()
    with pytest.raises(error, match=says):
        context.set_input_shape(name, shape)
    assert native.log == []


def test_range_is_that_of_the_active_profile() -> None:
    _, native, context = open_context()
    context.set_profile(1, 0)
    context.set_input_shape("x", (9, 4))
    assert native.log[-1] == ("shape", "x", (9, 4))
    native.active_optimization_profile = -1
    with pytest.raises(EngineError, match="has no optimization profile"):
        context.set_input_shape("x", (9, 4))


def test_every_false_is_a_typed_error() -> None:
    _, native, context = open_context()
    bind(context)
    native.answers = False
    with pytest.raises(ShapeError, match="refused the shape"):
        context.set_input_shape("x", (2, 4))
    with pytest.raises(InvalidArgumentError, match="refused the address 0x10"):
        context.set_tensor_address("x", 16)
    with pytest.raises(ShapeError, match="inputs set so far"):
        context.get_tensor_shape("y")
    with pytest.raises(EngineError, match="refused an output allocator"):
        context.set_output_allocator("y", Allocator())
    with pytest.raises(ExecutionError, match="nothing was enqueued"):
        context.execute_async_v3(0)


def test_nothing_is_enqueued_without_addresses_or_profile() -> None:
    _, native, context = open_context()
    with pytest.raises(ExecutionError, match="no address is set for 's', 'x', 'y'"):
        context.execute_async_v3(0)
    bind(context)
    native.active_optimization_profile = -1
    with pytest.raises(ExecutionError, match="has no optimization profile"):
        context.execute_async_v3(0)
    assert not any(call[0] == "execute" for call in native.log)
    native.active_optimization_profile = 0
    context.execute_async_v3(5)
    assert native.log[-1] == ("execute", 5)
    context.set_tensor_address("x", 0)
    with pytest.raises(ExecutionError, match="'x'"):
        context.execute_async_v3(5)
    with pytest.raises(InvalidArgumentError, match="is no address"):
        context.set_tensor_address("x", -1)
    with pytest.raises(InvalidArgumentError, match="no tensor named 'q'"):
        context.set_tensor_address("q", 1)


def test_output_allocator_is_called_and_replaces_an_address() -> None:
    _, native, context = open_context()
    context.set_tensor_address("x", 1)
    context.set_tensor_address("s", 1)
    allocator = Allocator()
    context.set_output_allocator("y", allocator)

    def enqueue(native: FakeContext) -> None:
        inner = native.allocators["y"]
        assert inner.reallocate_output("y", None, 100, 256) == 4096
        assert inner.reallocate_output_async("y", 4096, 200, 256, 5) == 4096
        inner.notify_shape("y", (3, 4))

    native.during_enqueue = enqueue
    context.execute_async_v3(0)
    assert allocator.calls == [("y", 0, 100, 256), ("y", 4096, 200, 256), ("y", (3, 4))]
    context.set_output_allocator("y", None)
    assert native.allocators["y"] is None
    with pytest.raises(ExecutionError, match="no address is set for 'y'"):
        context.execute_async_v3(0)


def test_output_allocator_that_raises_is_the_cause() -> None:
    _, native, context = open_context()
    bind(context)
    failure = MemoryError("none left")
    context.set_output_allocator("y", Allocator(fails=failure))

    def enqueue(native: FakeContext) -> None:
        native.answers = native.allocators["y"].reallocate_output("y", 0, 100, 256) != 0

    native.during_enqueue = enqueue
    with pytest.raises(ExecutionError, match="output allocator of 'y' failed: none left") as caught:
        context.execute_async_v3(0)
    assert caught.value.__cause__ is failure


def test_destroyed_context_answers_closed() -> None:
    _, _, context = open_context()
    context.destroy()
    context.destroy()
    with pytest.raises(ClosedError, match="execution context is destroyed"):
        context.execute_async_v3(0)
