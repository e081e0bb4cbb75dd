"""Helpers for the mock's own tests: small models, and a rig that owns what a test opens."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from mock_backend import MockBackend

# the entry point brings these where the package is installed; here they must come from the tree under test
from mock_backend.pytest_plugin import mock_backend, mock_backend_factory, trtx_backend_env
from trtx_py._types import BuildOptions, Severity, ShapeRange, TensorLocation, TensorMode

__all__ = ["mock_backend", "mock_backend_factory", "trtx_backend_env"]


def make_model(
    nodes: Sequence[Any],
    inputs: Sequence[tuple[str, str, Any]],
    outputs: Sequence[tuple[str, str, Any]],
    *,
    weights: dict[str, np.ndarray] | None = None,
    opset: int = 17,
    domains: Sequence[str] = (),
) -> bytes:
    """A serialized model; tensors are (name, TensorProto member, shape)."""
    values = [
        [helper.make_tensor_value_info(name, getattr(TensorProto, elem), shape) for name, elem, shape in row]
        for row in (inputs, outputs)
    ]
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    graph = helper.make_graph(list(nodes), "test_graph", values[0], values[1], tensors)
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    data: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return data


def relu(shape: Sequence[int | str] = ("N", 4), elem: str = "FLOAT", opset: int = 17) -> bytes:
    """y = relu(x)."""
    node = helper.make_node("Relu", ["x"], ["y"], name="only")
    return make_model([node], [("x", elem, list(shape))], [("y", elem, list(shape))], opset=opset)


N4 = {"x": ShapeRange((1, 4), (2, 4), (8, 4))}


class Rig:
    """A backend with a current context and a stream; closes what it opened."""

    def __init__(self, backend: MockBackend) -> None:
        self.backend = backend
        self.driver = backend.driver
        self.lines: list[tuple[Severity, str]] = []
        self.stack = contextlib.ExitStack()
        self.driver.cuInit(0)
        self.context = self.driver.cuDevicePrimaryCtxRetain(0)
        self.driver.cuCtxPushCurrent(self.context)
        self.stack.callback(self.driver.cuDevicePrimaryCtxRelease, 0)
        self.stack.callback(self.driver.cuCtxPopCurrent)
        self.stream = self.new_stream()

    def log(self, severity: Severity, text: str) -> None:
        self.lines.append((severity, text))

    def new_stream(self, flags: int = 1) -> int:
        stream = self.driver.cuStreamCreate(flags)
        self.stack.callback(self.driver.cuStreamDestroy, stream)
        return stream

    def new_event(self, flags: int = 0) -> int:
        event = self.driver.cuEventCreate(flags)
        self.stack.callback(self.driver.cuEventDestroy, event)
        return event

    def alloc(self, nbytes: int) -> int:
        pointer = self.driver.cuMemAlloc(nbytes)
        self.stack.callback(self.driver.cuMemFree, pointer)
        return pointer

    def parse(self, model: bytes, directory: str | None = None) -> Any:
        builder = self.backend.create_builder(self.log)
        self.stack.callback(builder.destroy)
        network = builder.create_network()
        self.stack.callback(network.destroy)
        network.parse_onnx(model, directory)
        return network

    def build(self, model: bytes, *profiles: Any, progress: Any = None, **options: Any) -> bytes:
        network = self.parse(model)
        plan: bytes = network.parent.build_serialized_network(
            network, BuildOptions(profiles=tuple(profiles), **options), progress
        )
        return plan

    def engine(self, plan: bytes) -> Any:
        runtime = self.backend.create_runtime(self.log, device=0, lean_library=None, allow_host_code=False)
        self.stack.callback(runtime.destroy)
        engine = runtime.deserialize(plan)
        self.stack.callback(engine.destroy)
        return engine

    def context_of(self, engine: Any) -> Any:
        context = engine.create_context()
        self.stack.callback(context.destroy)
        return context

    def ready(self, model: bytes, *profiles: Any, **options: Any) -> Any:
        """A context of a freshly built engine."""
        return self.context_of(self.engine(self.build(model, *profiles, **options)))

    def bind(self, context: Any, inputs: dict[str, np.ndarray]) -> dict[str, tuple[int, np.ndarray]]:
        """Upload the inputs, set shapes and addresses; returns output name to (address, host array)."""
        from mock_backend._dtypes import to_bytes

        engine = context.parent
        for info in engine.io_tensors:
            if info.mode is not TensorMode.INPUT:
                continue
            array = np.asarray(inputs[info.name], order="C")  # ascontiguousarray would make scalars one-dimensional
            if info.location is TensorLocation.HOST:
                self.stack.callback(array.fill, 0)  # keeps the array alive
                context.set_tensor_address(info.name, array.ctypes.data)
                continue
            context.set_input_shape(info.name, array.shape)
            raw = to_bytes(array, info.dtype)
            pointer = self.alloc(max(raw.nbytes, 1))
            self.driver.cuMemcpyHtoDAsync(pointer, raw.ctypes.data, raw.nbytes, self.stream)
            context.set_tensor_address(info.name, pointer)
        outputs = {}
        for info in engine.io_tensors:
            if info.mode is TensorMode.OUTPUT:
                shape = context.get_tensor_shape(info.name)
                raw = np.zeros(info.dtype.nbytes(shape), np.uint8)
                pointer = self.alloc(max(raw.nbytes, 1))
                context.set_tensor_address(info.name, pointer)
                outputs[info.name] = (pointer, raw)
        return outputs

    def run(self, context: Any, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """One inference through device memory; outputs in their own dtype."""
        from mock_backend._dtypes import from_bytes

        outputs = self.bind(context, inputs)
        context.execute_async_v3(self.stream)
        for pointer, raw in outputs.values():
            self.driver.cuMemcpyDtoHAsync(raw.ctypes.data, pointer, raw.nbytes, self.stream)
        self.driver.cuStreamSynchronize(self.stream)
        infos = {info.name: info for info in context.parent.io_tensors}
        return {
            name: from_bytes(raw, infos[name].dtype, context.get_tensor_shape(name))
            for name, (_, raw) in outputs.items()
        }

    @contextlib.contextmanager
    def blocked(self, stream: int) -> Iterator[None]:
        """Nothing on ``stream`` runs inside the with block."""
        gate = threading.Event()
        self.driver.launch(stream, lambda: _pass(gate), "test gate")
        try:
            yield
        finally:
            gate.set()


def _pass(gate: threading.Event) -> None:
    assert gate.wait(30), "a test forgot to open a stream"


@pytest.fixture
def rig(mock_backend: MockBackend) -> Iterator[Rig]:
    """A rig on a backend that must be clean at the end."""
    made = Rig(mock_backend)
    with made.stack:
        yield made
        made.driver.cuStreamSynchronize(made.stream)  # copies that still run need the memory freed next


@pytest.fixture
def rig_with(mock_backend_factory: Callable[..., MockBackend]) -> Iterator[Callable[..., Rig]]:
    """Makes rigs on backends with options; each must be clean at the end."""
    with contextlib.ExitStack() as stack:

        def make(**options: Any) -> Rig:
            rig = Rig(mock_backend_factory(**options))
            stack.enter_context(rig.stack)
            stack.callback(rig.driver.cuStreamSynchronize, rig.stream)  # as above, before the memory goes
            return rig

        yield make


@pytest.fixture
def loose_rig() -> Iterator[Callable[..., Rig]]:
    """Makes rigs whose end is not checked, for tests that break things on purpose."""
    made: list[MockBackend] = []

    def make(**options: Any) -> Rig:
        made.append(MockBackend(**options))
        return Rig(made[-1])

    yield make
    for backend in made:
        backend.close()  # also takes its context off this thread's stack


@pytest.fixture
def models() -> Any:
    """The helpers of this file that make models."""

    class Models:
        make = staticmethod(make_model)
        relu = staticmethod(relu)
        N4 = N4

    return Models
