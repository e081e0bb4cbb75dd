"""A context of the C ABI: a runtime on a device, the graphs and the memory on it, and the models of one-shot calls."""

from __future__ import annotations

import contextlib
import os
import threading

from .._errors import BackendUnavailableError, BorrowedError
from .._options import Completion
from .._plan import Plan, looks_like_plan
from .._resource import State, _close_subtree, _process
from .._runtime import Runtime
from .._types import Array
from ..backends._named_mocks import named_mock
from ..backends.protocols import TensorRTBackend
from ..backends.registry import BACKEND_VARIABLE, resolve_backend
from ..cuda._buffer import DeviceBuffer, PinnedBuffer
from ._cache import ModelCache
from ._graph import Graph
from ._memory import allocate
from ._models import GraphOptions, Model, build, read_file
from ._run import Given, Result, key_of, run
from ._status import Status, StatusError

#: Backend, TensorRT's version, the device's name, compute capability and memory, whether it is the mock.
Info = tuple[str, str, str, str, int, bool]

_DEFAULT_CACHED = 8


class Buffer:
    """Memory of the library's tensors. ``address`` is 0 for no bytes."""

    def __init__(self, context: Context, memory: DeviceBuffer | PinnedBuffer | None) -> None:
        self._context, self._memory = context, memory
        self.address = 0 if memory is None else memory.address

    def close(self) -> None:
        """Free it. Idempotent."""
        if self._memory is not None:
            self._memory.close()
        self._context._forget(self)


class Context:
    """A device and a TensorRT. Thread-safe."""

    def __init__(
        self,
        backend: str | None,
        device: int,
        completion: int,
        max_device_bytes: int,
        lean_library: str | None,
        max_cached_models: int,
        allow_host_code: bool,
    ) -> None:
        try:
            self._completion = Completion(completion).name.lower()
        except ValueError:
            raise StatusError(Status.INVALID_ARGUMENT, f"completion is {completion}; expected 0, 1 or 2") from None
        self._cache = ModelCache(max_cached_models or _DEFAULT_CACHED)
        self._lock = threading.Lock()
        self._open: set[Graph | Buffer] = set()
        self._runtime = Runtime(
            backend=_backend(backend, lean_library), device=device, lean_library=lean_library,
            allow_host_code=allow_host_code, max_device_bytes=max_device_bytes or None,
        )  # fmt: skip
        self.device = self._runtime.device

    @property
    def info(self) -> Info:
        runtime, device = self._runtime, self._runtime.device
        name = runtime.backend.name
        mock = name == "mock" or name.endswith("+mock")
        return name, runtime.version, device.name, device.compute_capability, device.total_bytes, mock

    def statistics(self) -> tuple[int, ...]:
        """Bytes, peak and open allocations of device memory, the same of pinned memory; cached models, hits, misses."""
        device, pinned = self.device.memory_statistics(), self.device.pinned_statistics()
        return (
            device.current_bytes, device.peak_bytes, device.live,
            pinned.current_bytes, pinned.peak_bytes, pinned.live,
            *self._cache.statistics(),
        )  # fmt: skip

    # Graphs

    def open_onnx(self, model: Model, weights: memoryview | None, options: GraphOptions) -> Graph:
        """Raises as Builder and Runtime."""
        return self._kept(self._load(self._built(model, weights, options), options))

    def open_plan(self, plan: memoryview | Plan, options: GraphOptions) -> Graph:
        """Raises as Runtime.deserialize."""
        options.require_no_build()
        return self._kept(self._load(plan if isinstance(plan, Plan) else Plan(plan), options))

    def open_file(self, path: str, options: GraphOptions) -> Graph:
        """Raises as the two above; StatusError (NOT_FOUND)."""
        content = read_file(path)
        return self.open_plan(content, options) if isinstance(content, Plan) else self.open_onnx(content, None, options)

    def _built(self, model: Model, weights: memoryview | None, options: GraphOptions) -> Plan:
        return build(self._runtime._backend, self.device.ordinal, model, weights, options)

    def _load(self, plan: Plan, options: GraphOptions, *, keep_plan: bool = True) -> Graph:
        engine = self._runtime.deserialize_sync(plan, completion=self._completion, **options.serving())
        try:
            return Graph(engine, plan if keep_plan else None)
        except BaseException:
            engine.close()
            raise

    def _kept(self, graph: Graph) -> Graph:
        graph.on_close = self._forget
        with self._lock:
            self._open.add(graph)
        return graph

    def _forget(self, member: Graph | Buffer) -> None:
        with self._lock:
            self._open.discard(member)

    # Memory

    def allocate(self, nbytes: int, *, on_device: bool) -> Buffer:
        """Zeroed memory; no bytes take none."""
        buffer = Buffer(self, allocate(self.device, nbytes, on_device=on_device) if nbytes else None)
        with self._lock:
            self._open.add(buffer)
        return buffer

    # One-shot calls

    def run(
        self, model: memoryview, weights: memoryview | None, inputs: tuple[Given, ...] | None, options: GraphOptions
    ) -> tuple[list[Array], tuple[Result, ...]]:
        """Run a model or a plan, which is kept by content."""

        def make() -> Graph:
            if not looks_like_plan(bytes(model[:16])):
                return self._load(self._built(model, weights, options), options, keep_plan=False)
            options.require_no_build()
            if weights is not None and weights.nbytes:
                raise StatusError(
                    Status.INVALID_ARGUMENT, "weights were given, and the model is a plan, which has its own"
                )
            return self._load(Plan(model), options, keep_plan=False)

        with self._cache.using(key_of(model, weights, options), make) as graph:
            return run(graph, inputs)

    # The end

    def close(self) -> None:
        """Close the cached models and the runtime. Raises BorrowedError while graphs or buffers are open."""
        with self._lock:
            graphs = sum(isinstance(member, Graph) for member in self._open)
            buffers = len(self._open) - graphs
        if graphs or buffers:
            raise BorrowedError(f"the context has {graphs} open graphs and {buffers} buffers; close these first")
        self._cache.close()
        self._runtime.close()

    def shut_down(self) -> None:
        """Close everything, whatever is still open; the process ends, and nobody uses it any more."""
        with contextlib.suppress(BorrowedError):
            self.close()
            return
        with self._lock:
            graphs = [member for member in self._open if isinstance(member, Graph)]
        for graph in graphs:
            graph.settle()
        handle = self._runtime._handle
        with _process.lock:
            if handle.state is not State.OPEN:
                return
            handle.mark_closing()
        _close_subtree(handle)  # as aclose(), without a thread: at exit there are no new ones


def _backend(name: str | None, lean_library: str | None) -> TensorRTBackend:
    """The named one, else that of TRTX_BACKEND, else the best that can build and run, or run at least."""
    wanted = name or os.environ.get(BACKEND_VARIABLE) or None
    mock = named_mock(wanted) if wanted else None
    if mock is not None:
        return mock
    try:
        return resolve_backend(wanted, need="both", lean_library=lean_library)
    except BackendUnavailableError:
        return resolve_backend(wanted, need="run", lean_library=lean_library)
