"""The engine: a plan on a device, serving any number of callers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ._arguments import checked_int, checked_timeout
from ._context import ExecutionContext
from ._errors import BorrowedError, EngineError, InvalidArgumentError
from ._execution import Execution
from ._inputs import Arrays, InputCheck, check_io_types
from ._lane import Lanes
from ._plan import Plan, PlanHeader
from ._profiles import ProfileLedger
from ._request import InferenceResult, Request
from ._resource import Handle, Resource, opening
from ._types import TensorInfo, TensorMode
from .backends.protocols import BackendEngine
from .cuda._device import DeviceAccess, Releases
from .cuda._memory import MemoryStatistics

if TYPE_CHECKING:
    from ._runtime import Runtime


@dataclass(frozen=True)
class EngineOptions:
    """How an engine serves.

    Attributes:
        lanes: how many inferences may run at once, each with a context, a stream and buffers of its own. A plan that
            does not share optimization profiles uses one whatever is asked.
        noncontiguous: what to do with inputs that are not C-contiguous: "copy" (the result is right either way) or
            "refuse" (for callers who want to know about the cost).
    """

    lanes: int = 1
    noncontiguous: str = "copy"

    def __post_init__(self) -> None:
        checked_int(self.lanes, "lanes", minimum=1, maximum=64)
        if self.noncontiguous not in ("copy", "refuse"):
            raise InvalidArgumentError(f'noncontiguous is {self.noncontiguous!r}; expected "copy" or "refuse"')


@dataclass(frozen=True)
class EngineStatistics:
    """A snapshot of ``engine.statistics()``; counts since the engine was opened, of ``infer`` in all its forms.

    Attributes:
        completed: requests whose result was delivered.
        failed: requests that ended with an error after they were accepted.
        cancelled: requests that nobody waited for any more, before or after the launch.
        waiting: requests accepted and not yet taken by a lane.
        running: requests that a lane is working on.
        lanes: lanes started so far.
        contexts: execution contexts that the lanes hold.
        profile_switches: how often a context changed its optimization profile, each a synchronization.
        device_memory, pinned_memory: what trtx_py allocated through the runtime's device, other engines included.
    """

    completed: int
    failed: int
    cancelled: int
    waiting: int
    running: int
    lanes: int
    contexts: int
    profile_switches: int
    device_memory: MemoryStatistics
    pinned_memory: MemoryStatistics


class _LaneFactory:
    """Makes lanes for an engine without referring to the engine object."""

    def __init__(
        self,
        access: DeviceAccess,
        native: BackendEngine,
        tensors: tuple[TensorInfo, ...],
        ledger: ProfileLedger,
        owner: Handle,
    ) -> None:
        self._access, self._native, self._tensors, self._ledger = access, native, tensors, ledger
        self._owner = owner

    def __call__(self) -> tuple[Execution, Handle]:
        handle = Handle("Lane", self._owner, internal=True)
        execution = Execution(self._access, self._native, self._tensors, self._ledger, handle)
        with opening(handle):
            handle.release = execution.release
        return execution, handle


class Engine(Resource):
    """A deserialized plan. Made by ``await runtime.deserialize(plan)`` or ``open_engine``.

    ``infer`` may be called by any number of tasks, event loops and threads at once.

    Source: nvinfer1::ICudaEngine
    """

    _runtime: Runtime
    _native: BackendEngine
    _header: PlanHeader
    _options: EngineOptions
    _tensors: tuple[TensorInfo, ...]

    def __init__(self) -> None:
        self._refuse_construction("await runtime.deserialize(plan)")

    @classmethod
    def _create(cls, runtime: Runtime, plan: Plan, options: EngineOptions) -> Engine:
        engine = cls.__new__(cls)
        access = runtime.device._access
        with engine._opening(runtime) as handle:
            releases = Releases(access)
            with runtime._logger.attaching(), access.current:
                native = runtime._native.deserialize(plan.serialized)
                releases.add(native.destroy)
                handle.release = releases
            handle.name = native.name
            handle.device_bytes = native.weights_bytes
            engine._runtime, engine._native, engine._header, engine._options = runtime, native, plan.header, options
            engine._tensors = native.io_tensors
            packed = check_io_types(engine._tensors)
            if packed:
                raise EngineError(
                    f"{handle} has {packed[0]}: inputs and outputs of 4-bit types have no host representation; "
                    "cast them to a wider type inside the model"
                )
            engine._check = InputCheck(
                engine._tensors, native.num_profiles, copy_noncontiguous=options.noncontiguous == "copy"
            )
            engine._ledger = ProfileLedger(native.num_profiles)
            engine._lanes = Lanes(
                str(handle), options.lanes, _LaneFactory(access, native, engine._tensors, engine._ledger, handle)
            )
            handle.stop, handle.drain, handle.busy = engine._lanes.refuse, engine._lanes.drain, engine._lanes.busy
        return engine

    if TYPE_CHECKING:
        _check: InputCheck
        _ledger: ProfileLedger
        _lanes: Lanes

    @property
    def name(self) -> str:
        """Name of the network it was built from. Source: ICudaEngine::getName"""
        return self._handle.name

    @property
    def io_tensors(self) -> tuple[TensorInfo, ...]:
        """Inputs and outputs with mode, dtype, shape (-1 where dynamic), location, and the ranges of each profile."""
        return self._tensors

    @property
    def num_optimization_profiles(self) -> int:
        """At least 1. Source: ICudaEngine::getNbOptimizationProfiles"""
        self._handle.require_open()
        return self._native.num_profiles

    @property
    def num_layers(self) -> int:
        """Layers after optimization. Source: ICudaEngine::getNbLayers"""
        self._handle.require_open()
        return self._native.num_layers

    @property
    def plan_header(self) -> PlanHeader:
        """What the plan says about itself."""
        return self._header

    @property
    def runtime(self) -> Runtime:
        """The owner."""
        return self._runtime

    def device_memory_bytes(self, profile: int | None = None) -> int:
        """Activation memory that one execution context takes: for one profile, or the most that any needs.

        Source: ICudaEngine::getDeviceMemorySizeV2, getDeviceMemorySizeForProfileV2
        """
        self._handle.require_open()
        if profile is not None:
            profile = checked_int(profile, "profile", minimum=0, maximum=self._native.num_profiles - 1)
        return self._native.device_memory_bytes(profile)

    def create_execution_context(self) -> ExecutionContext:
        """A context of the caller's own, owned by this engine; its profile is chosen by the shapes it is given.

        Raises:
            BorrowedError: the plan does not share optimization profiles and others hold them all; names them.
            EngineError, CudaError: TensorRT could not make it, for example for lack of memory.
        Source: nvinfer1::ICudaEngine::createExecutionContext
        """
        self._handle.require_open()
        context = ExecutionContext._create(self)
        if self._ledger.exclusive and not context._has_profile:
            try:
                self._make_room(context)
            except BaseException:
                context.close()
                raise
        return context

    def _make_room(self, context: ExecutionContext) -> None:
        """On a plan that does not share profiles: the lanes step back for the caller's context."""
        if not self._ledger.has_free_profile():
            with self._runtime.device.current():
                self._lanes.park()
        if not self._ledger.has_free_profile():
            names = [other.describe() for other in self._ledger.others(context._handle)]
            raise BorrowedError(
                f"{self._handle} has no optimization profile left for another context: this plan lets one context at a "
                f"time use a profile, and {' and '.join(names)} holds it; close that first, or build the plan with "
                "profile sharing",
                borrowers=names,
            )
        context._claim_profile()

    async def infer(self, inputs: Mapping[str, Any]) -> Arrays:
        """Run the engine once.

        Args:
            inputs: one host array for each input tensor, by name; shapes within one optimization profile, dtypes as the
                engine declares them. Arrays are read until the call returns: do not change them before. Numbers and
                lists are converted where nothing but precision is lost.
        Returns:
            New C-contiguous arrays that the caller owns, by output tensor name.
        Raises:
            InvalidArgumentError, DTypeError: names or dtypes do not fit; names the tensor, found and expected.
            ShapeError: the shapes lie in no profile; names the tensor, the shape and the ranges.
            BorrowedError: the caller's own contexts hold every optimization profile that would do.
            ExecutionError, CudaError: it was accepted and failed.
            ClosedError: the engine is closed or closing.
        Cancellation: before a lane has taken it nothing runs; after it the result is dropped, and the lane keeps its
            buffers until the GPU is done.
        Source: nvinfer1::IExecutionContext::enqueueV3
        """
        return (await self._submit(inputs, timed=False).wait()).outputs

    async def infer_timed(self, inputs: Mapping[str, Any]) -> InferenceResult:
        """As ``infer``, with times measured: total, in the queue, on the GPU. Source: cuEventElapsedTime"""
        return await self._submit(inputs, timed=True).wait()

    def infer_sync(self, inputs: Mapping[str, Any], *, timeout_s: float | None = None) -> Arrays:
        """As ``infer``, blocking this thread; for threads, not for coroutines.

        Raises:
            TimeoutError: no result within ``timeout_s`` seconds; the request was cancelled as ``infer`` would be.
        """
        timeout = checked_timeout(timeout_s)  # before anything is submitted
        return self._submit(inputs, timed=False).wait_sync(timeout).outputs

    async def warmup(self, iterations: int = 10) -> None:
        """Run ``iterations`` inferences with zeros at the optimal shapes of each profile, one after another.

        Makes the lane's context and buffers and lets TensorRT load its kernels, so that the first caller need not wait.
        Raises as ``infer``.
        """
        count = checked_int(iterations, "iterations", minimum=0)
        for profile in range(self.num_optimization_profiles):
            inputs = {t.name: _example(t, profile) for t in self._tensors if t.mode is TensorMode.INPUT}
            for _ in range(count):
                await self.infer(inputs)

    def statistics(self) -> EngineStatistics:
        """Counts and memory, at this moment; after the engine was closed, the last ones."""
        self._handle.require_process()
        waiting, running, lanes, contexts = self._lanes.load()
        counts = self._lanes.counts
        device = self._runtime.device
        return EngineStatistics(
            completed=counts.completed,
            failed=counts.failed,
            cancelled=counts.cancelled,
            waiting=waiting,
            running=running,
            lanes=lanes,
            contexts=contexts,
            profile_switches=self._ledger.switches,
            device_memory=device.memory_statistics(),
            pinned_memory=device.pinned_statistics(),
        )

    def _submit(self, inputs: Mapping[str, Any], *, timed: bool) -> Request:
        self._handle.require_open()
        arrays, profiles = self._check(inputs)
        request = Request(arrays, profiles, timed=timed)
        self._lanes.submit(request)
        return request


def _example(tensor: TensorInfo, profile: int) -> np.ndarray[Any, Any]:
    """Zeros at a profile's optimal shape; for a shape tensor its optimal values."""
    if not tensor.ranges:
        return np.zeros(tensor.shape, tensor.dtype.numpy)
    optimum = tensor.ranges[profile].opt
    if tensor.is_shape_tensor:
        return np.array(optimum, tensor.dtype.numpy).reshape(tensor.shape)
    return np.zeros(optimum, tensor.dtype.numpy)
