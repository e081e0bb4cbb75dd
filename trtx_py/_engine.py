"""The engine: a plan on a device, serving any number of callers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ._arguments import checked_int, checked_timeout
from ._context import ExecutionContext
from ._errors import BorrowedError, EngineError
from ._front import Front
from ._graphs import GraphStatistics, ReroutedError
from ._inputs import Arrays, Given, check_io_types
from ._loops import current_hub, finish
from ._options import EngineOptions
from ._plan import Plan, PlanHeader
from ._profiles import ProfileLedger
from ._refitter import Refitter
from ._request import InferenceResult, Request
from ._resource import Resource
from ._slot import SlotRequest
from ._types import LayerPrecision, TensorInfo, TensorMode
from .backends.protocols import BackendEngine
from .cuda._array import DeviceArray
from .cuda._device import Releases
from .cuda._memory import MemoryStatistics

if TYPE_CHECKING:
    from ._native import Hub, Wait
    from ._runtime import Runtime


@dataclass(frozen=True)
class EngineStatistics:
    """A snapshot of ``engine.statistics()``; counts since the engine was opened, of ``infer`` in all its forms.

    Attributes:
        completed: requests whose result was delivered.
        failed: requests that ended with an error after they were accepted.
        cancelled: requests that nobody waited for any more, before or after the launch.
        waiting: requests accepted and not yet taken by a lane.
        running: requests that a lane or the GPU is working on; also those that nobody waits for any more.
        lanes: lanes started so far.
        contexts: execution contexts that the lanes hold.
        profile_switches: how often a context changed its optimization profile, each a synchronization.
        graphs: what CUDA graphs did.
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
    graphs: GraphStatistics
    device_memory: MemoryStatistics
    pinned_memory: MemoryStatistics


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
    _ledger: ProfileLedger
    _front: Front
    _submit: Callable[[Mapping[str, Any], Hub | None], Wait | None]

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
            resident = native.weights_bytes
            if options.weight_streaming_bytes is not None:
                with runtime._logger.attaching(), access.current:
                    native.set_weight_streaming_budget(options.weight_streaming_bytes)
                resident -= max(0, native.weight_streaming_bytes - options.weight_streaming_bytes)
            if resident > 0:
                weights = access.memory.reserve(resident, f"weights of {handle}")
                releases.add(weights.release)
            handle.device_bytes = max(resident, 0)
            engine._runtime, engine._native, engine._header, engine._options = runtime, native, plan.header, options
            engine._tensors = native.io_tensors
            packed = check_io_types(engine._tensors)
            if packed:
                raise EngineError(
                    f"{handle} has {packed[0]}: inputs and outputs of 4-bit types have no host representation; "
                    "cast them to a wider type inside the model"
                )
            engine._ledger = ProfileLedger(native.num_profiles)
            front = engine._front = Front(
                access, native, engine._tensors, engine._ledger, handle, options, runtime.device.ordinal
            )
            releases.add(front.release)
            engine._submit = front.port.submit
            handle.stop, handle.drain, handle.busy = front.stop, front.drain, front.busy
        return engine

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

    def layer_precisions(self) -> tuple[LayerPrecision, ...]:
        """What each layer computes in, by TensorRT's engine inspector.

        Empty if the plan does not tell: TensorRT keeps the types of layers in plans built with
        ``require_precision=True``, and a lean runtime has no inspector. On the mock one layer for each node.

        Source: nvinfer1::IEngineInspector::getEngineInformation
        """
        self._handle.require_open()
        return self._native.layer_precisions()

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

    def create_refitter(self) -> Refitter:
        """What changes this engine's weights, owned by this engine; of plans built with ``BuilderOptions(refit=...)``.

        Raises EngineError for other plans, and where the runtime has no refitter.
        Source: nvinfer1::createInferRefitter
        """
        self._handle.require_open()
        return Refitter._create(self)

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
        if self._ledger.has_free_profile():
            with contextlib.suppress(BorrowedError):  # a lane was faster
                context._claim_profile()
                return
        # None of them takes it again, for a capture that nobody asked for, before this context has it.
        with self._runtime.device.current(), self._front.lanes.parked():
            if not self._ledger.has_free_profile():
                names = [other.describe() for other in self._ledger.others(context._handle)]
                raise BorrowedError(
                    f"{self._handle} has no optimization profile left for another context: this plan lets one context "
                    f"at a time use a profile, and {' and '.join(names)} holds it; close that first, or build the plan "
                    "with profile sharing",
                    borrowers=names,
                )
            context._claim_profile()

    async def infer(self, inputs: Mapping[str, Any]) -> Arrays:
        """Run the engine once.

        Args:
            inputs: one array for each input tensor, by name; shapes within one optimization profile, dtypes as the
                engine declares them. Arrays are read until the call returns: do not change them before. Numbers and
                lists are converted where nothing but precision is lost. Device tensors of other libraries (DLPack, CUDA
                array interface) are read where they are.
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
        wait = self._submit(inputs, current_hub())
        if wait is None:
            return await self._infer_checked(inputs)
        try:
            outputs: Arrays = await finish(wait)
        except ReroutedError:
            self._front.rerouted += 1
            return await self._infer_enqueued(*self._front.checked(inputs))
        return outputs

    async def _infer_checked(self, inputs: Mapping[str, Any]) -> Arrays:
        """What the native side left to us: another kind of input, a shape that is not captured, a large copy."""
        front = self._front
        arrays, profiles = front.checked(inputs)
        wait = self._submit(arrays, current_hub())  # it may have been only the form that did not fit
        if wait is not None:
            try:
                outputs: Arrays = await finish(wait)
            except ReroutedError:
                front.rerouted += 1
            else:
                return outputs
        return await self._infer_enqueued(arrays, profiles)

    async def _infer_enqueued(self, arrays: Given, profiles: list[int]) -> Arrays:
        request = Request(arrays, profiles)
        self._front.lanes.submit(request)
        return dict((await request.wait()).outputs)

    async def infer_on_device(self, inputs: Mapping[str, Any]) -> dict[str, DeviceArray]:
        """As ``infer``, with the outputs left in device memory that the caller owns.

        Inputs may be device tensors of torch, cupy, jax or numba (anything with DLPack or the CUDA array interface):
        they are read where they are, behind the stream that is current on the calling thread. Then nothing crosses the
        bus.

        Returns:
            DeviceArray by output tensor name, for ``torch.from_dlpack`` and the like; written completely. Outputs that
            TensorRT writes on the host (shape tensors) are host arrays.
        Raises, Cancellation: as ``infer``.
        """
        request = self._front.request(inputs, outputs_on=self._runtime.device)
        return dict((await request.wait()).outputs)

    async def infer_timed(self, inputs: Mapping[str, Any]) -> InferenceResult:
        """As ``infer``, with times measured: total, in the queue, on the GPU.

        TensorRT enqueues it, captured or not, so that its own part can be told from the copies.

        Source: cuEventElapsedTime
        """
        return await self._front.request(inputs, timed=True).wait()

    def infer_sync(self, inputs: Mapping[str, Any], *, timeout_s: float | None = None) -> Arrays:
        """As ``infer``, blocking this thread; for threads, not for coroutines.

        Raises:
            TimeoutError: no result within ``timeout_s`` seconds; the request was cancelled as ``infer`` would be.
        """
        timeout = checked_timeout(timeout_s)  # before anything is submitted
        arrays, profiles = self._front.checked(inputs)
        wait = self._submit(arrays, None)
        if wait is None:
            request = Request(arrays, profiles)
            self._front.lanes.submit(request)
            return dict(request.wait_sync(timeout).outputs)
        if not wait.block(0 if timeout is None else max(1, int(timeout * 1e9))):
            wait.cancel()
            raise TimeoutError(f"no result within {timeout} s; the request was cancelled")
        try:
            outputs: Arrays = wait.result()
        except ReroutedError:
            self._front.rerouted += 1
            request = Request(arrays, profiles)
            self._front.lanes.submit(request)
            return dict(request.wait_sync(timeout).outputs)
        return outputs

    def alloc_inputs(self, shapes: Mapping[str, Any]) -> SlotRequest:
        """``async with engine.alloc_inputs({"x": shape}) as slot:`` takes one pinned slot of one lane, to be filled.

        Waits while all slots are out. The first call for a shape captures its graph on every lane. In a thread use
        ``with`` instead of ``async with``.

        Args:
            shapes: a shape for each input, within one optimization profile.
        Raises:
            InvalidArgumentError: names do not fit, or an input is a shape tensor, which has no place in a slot.
            ShapeError: the shapes lie in no profile.
            ExecutionError: this shape cannot be captured (outputs whose size depends on data, cuda_graphs=False); use
                ``infer``, which can serve it.
            MemoryBudgetError, CudaError: there is no memory for it.
        Cancellation: no slot is taken.
        """
        return SlotRequest(self, shapes)

    async def warmup(self, iterations: int = 10) -> None:
        """Run ``iterations`` inferences with zeros at the optimal shapes of each profile, one after another.

        Makes contexts and buffers, lets TensorRT load its kernels and captures these shapes on every lane where that is
        possible, so that the first caller need not wait. Raises as ``infer``.
        """
        count = checked_int(iterations, "iterations", minimum=0)
        for profile in range(self.num_optimization_profiles):
            inputs = {t.name: _example(t, profile) for t in self._tensors if t.mode is TensorMode.INPUT}
            if count:
                await self.infer(inputs)
                await self._front.capture(inputs)
            for _ in range(count - 1):
                await self.infer(inputs)

    def statistics(self) -> EngineStatistics:
        """Counts and memory, at this moment; after the engine was closed, the last ones."""
        self._handle.require_process()
        front = self._front
        waiting, running, lanes, contexts = front.lanes.load()
        counts, port = front.lanes.counts, front.port
        device = self._runtime.device
        return EngineStatistics(
            completed=counts.completed + port.completed,
            failed=counts.failed + port.failed - front.rerouted,
            cancelled=counts.cancelled + port.cancelled,
            waiting=waiting + port.queued,
            running=running + port.running,
            lanes=lanes,
            contexts=contexts,
            profile_switches=self._ledger.switches,
            graphs=front.graph_statistics(),
            device_memory=device.memory_statistics(),
            pinned_memory=device.pinned_statistics(),
        )


def _example(tensor: TensorInfo, profile: int) -> np.ndarray[Any, Any]:
    """Zeros at a profile's optimal shape; for a shape tensor its optimal values."""
    if not tensor.ranges:
        return np.zeros(tensor.shape, tensor.dtype.numpy)
    optimum = tensor.ranges[profile].opt
    if tensor.is_shape_tensor:
        return np.array(optimum, tensor.dtype.numpy).reshape(tensor.shape)
    return np.zeros(optimum, tensor.dtype.numpy)
