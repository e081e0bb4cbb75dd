"""The mock's runtime and engine."""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING

import numpy as np

from trtx_py._errors import CudaError, EngineError, PlanError, TrtxError, VersionMismatchError
from trtx_py._types import Array, LayerPrecision, Shape, TensorInfo, TensorMode
from trtx_py.backends.protocols import BackendContext

from ._clock import RealClock
from ._context import ALIGNMENT, MockContext
from ._dtypes import onnx_type_name
from ._graph import weight_tensors
from ._layer_times import LayerTimes
from ._layers import model_precisions
from ._numerics import Numerics
from ._plan import PlanPayload
from ._refit import MockRefitter
from ._seam import LiveObject, Seam
from ._shapes import ShapeResolver

if TYPE_CHECKING:
    import onnx

__all__ = ["EngineSettings", "MockEngine", "MockRuntime"]


class EngineSettings:
    """How engines of one backend compute.

    Attributes:
        compute: False fills outputs with zeros of the right shape instead of computing them.
        duration_s: how long each kernel takes on the backend's clock, in seconds, on top of computing.
        threads: intra-op threads of ONNX Runtime.
    """

    def __init__(self, *, compute: bool, duration_s: float, threads: int) -> None:
        self.compute = compute
        self.duration_s = duration_s
        self.threads = threads


def _engine_error(text: str, log: tuple[str, ...]) -> TrtxError:
    return EngineError(text, tensorrt_log=log)


class MockRuntime(LiveObject):
    """BackendRuntime of the mock, for one device."""

    kind = "runtime"

    def __init__(
        self, seam: Seam, *, flavour: str, version: str, compute_capability: str, device: int, settings: EngineSettings
    ) -> None:
        super().__init__(seam, None)
        self._flavour = flavour
        self._version = version
        self._capability = compute_capability
        self._device = device
        self._settings = settings

    @property
    def flavour(self) -> str:
        return self._flavour

    @property
    def version(self) -> str:
        return self._version

    def deserialize(self, plan: bytes | memoryview) -> MockEngine:
        """An engine with its weights on the device.

        Raises PlanError for damaged bytes, VersionMismatchError for another flavour, version or GPU architecture, and
        EngineError when the weights do not fit.
        """
        call = "IRuntime::deserializeCudaEngine"
        self._alive(call, _engine_error)
        self._seam.enter("deserialize", _engine_error)
        self._on_device(self._device, call, _engine_error)
        try:
            payload = PlanPayload.from_bytes(plan)
        except PlanError as error:
            raise self._seam.refuse(
                call, error.message, lambda text, log: PlanError(text, tensorrt_log=log), code="1: Serialization"
            ) from error
        self._check_origin(payload, call)
        return MockEngine(self._seam, self, payload, self._device, self._settings)

    def runtime_cache(self) -> bytes | None:
        """None: the mock compiles nothing."""
        return None

    def _check_origin(self, payload: PlanPayload, call: str) -> None:
        def mismatch(plan: str, here: str, next_step: str) -> TrtxError:
            text = f"the plan was built for {plan}, but this runtime is {here}; {next_step}"
            return self._seam.refuse(
                call,
                text,
                lambda t, log: VersionMismatchError(t, plan=plan, runtime=here, tensorrt_log=log),
                code="6: Version",
            )

        made = f"{payload.flavour} {payload.version}"
        here = f"{self._flavour} {self._version}"
        if made != here:
            raise mismatch(made, here, "build the plan again with this one, or run it with that one")
        if self._capability not in payload.compute_capabilities:
            built = f"compute capability {', '.join(payload.compute_capabilities)}"
            raise mismatch(
                built, f"compute capability {self._capability}", "name it in compute_capabilities and rebuild"
            )


_REFIT_FLAGS = frozenset({"REFIT", "REFIT_IDENTICAL", "REFIT_INDIVIDUAL"})


class MockEngine(LiveObject):
    """BackendEngine of the mock. Thread-safe for queries and for contexts in different threads."""

    kind = "engine"

    def __init__(
        self, seam: Seam, runtime: MockRuntime, payload: PlanPayload, device: int, settings: EngineSettings
    ) -> None:
        import onnx

        self._payload = payload
        self._device = device
        self.settings = settings
        model = onnx.ModelProto()
        try:
            model.ParseFromString(payload.model)
            self.dims_model = model
            self.numerics = Numerics(model, payload.tensors, threads=settings.threads)
            self.shapes = ShapeResolver(model, payload.tensors, self.numerics)
            self._weights = _weight_bytes(model)
            self._activations = tuple(self._estimate(index) for index in range(payload.num_profiles))
        except Exception as error:  # onnx and protobuf raise what they happen to meet in a model nobody checked
            text = f"the model inside the plan {payload.name!r} is damaged: {type(error).__name__}: {error}"
            raise seam.refuse(
                "IRuntime::deserializeCudaEngine", text, _engine_error, code="1: Serialization"
            ) from error
        self._lock = threading.Lock()
        self._profile_holders: dict[int, MockContext] = {}
        self._has_had_context = False
        self._weights_address = 0
        if self._weights:
            try:
                self._weights_address = seam.driver.allocate(
                    self._weights, "cuMemAlloc", label=f"weights of engine {payload.name!r}"
                )
            except CudaError as cause:
                text = f"the weights of engine {payload.name!r} take {self._weights} bytes: {cause}"
                raise seam.refuse(
                    "IRuntime::deserializeCudaEngine", text, _engine_error, code="2: OutOfMemory"
                ) from cause
        super().__init__(seam, runtime, payload.name)

    @property
    def name(self) -> str:
        return self._payload.name

    @property
    def io_tensors(self) -> tuple[TensorInfo, ...]:
        return self._payload.tensors

    @property
    def num_profiles(self) -> int:
        return self._payload.num_profiles

    @property
    def num_layers(self) -> int:
        return self._payload.num_layers

    def layer_precisions(self) -> tuple[LayerPrecision, ...]:
        """One layer for each node of the model in the plan."""
        return model_precisions(self.dims_model)

    def create_refitter(self) -> MockRefitter:
        """See BackendEngine. Of a plan that was built to be refitted."""
        if not _REFIT_FLAGS & set(self._payload.options.get("flags", ())):
            text = f"the weights of {self} cannot be changed: it was built without BuilderOptions(refit=...)"
            raise self._seam.refuse("createInferRefitter", text, _engine_error)
        return MockRefitter(self._seam, self, self.dims_model, self._payload.options.get("refittable_weights"))

    def take_weights(self) -> None:
        """``dims_model`` has other weights now. There is no context yet."""
        self.numerics = Numerics(self.dims_model, self._payload.tensors, threads=self.settings.threads)
        self.shapes = ShapeResolver(self.dims_model, self._payload.tensors, self.numerics)

    @property
    def weight_streaming_bytes(self) -> int:
        """Weights that could stay on the host: all, in a plan built for it."""
        return self._weights if "WEIGHT_STREAMING" in self._payload.options.get("flags", ()) else 0

    def set_weight_streaming_budget(self, nbytes: int) -> None:
        """See BackendEngine. It has no effect on the numbers, and the mock holds all weights on its device."""
        if not self.weight_streaming_bytes:
            text = f"{self} was built without weight_streaming"
            raise self._seam.refuse("ICudaEngine::setWeightStreamingBudgetV2", text, _engine_error)

    @property
    def weights_bytes(self) -> int:
        return self._weights

    @property
    def device(self) -> int:
        """Ordinal of the device that holds the weights."""
        return self._device

    def device_memory_bytes(self, profile: int | None) -> int:
        """Activation memory of one context, in bytes; an estimate, see ShapeResolver.working_set_bytes."""
        self._seam.enter("device_memory_bytes", _engine_error)
        if profile is not None and not 0 <= profile < self.num_profiles:
            raise EngineError(f"{self} has profiles 0 to {self.num_profiles - 1}, not {profile}")
        return self.activation_bytes(profile)

    def activation_bytes(self, profile: int | None) -> int:
        """As device_memory_bytes, without a call."""
        return max(self._activations) if profile is None else self._activations[profile]

    @property
    def user_managed_memory(self) -> bool:
        return True

    @property
    def num_aux_streams(self) -> int:
        """Kernels of the mock have no parallel branches."""
        return 0

    @property
    def captures_itself(self) -> bool:
        return False

    @property
    def untried_profiler(self) -> str | None:
        return None

    def layer_times(self) -> LayerTimes:
        """What one enqueue with a profiler is timed by; it computes the model node by node."""
        real = type(self._seam.driver.clock) is RealClock
        settings = self.settings
        return LayerTimes(
            self.dims_model if settings.compute else None, self._payload.tensors,
            threads=settings.threads, duration_s=settings.duration_s, real=real,
        )  # fmt: skip

    def create_context(self, *, own_memory: bool = True, cuda_graphs: bool = True) -> BackendContext:
        """A context, with its activation memory if ``own_memory``. ``cuda_graphs`` has no meaning here.

        Raises EngineError, also when there is not enough memory.
        """
        call = "ICudaEngine::createExecutionContext"
        self._alive(call, _engine_error)
        self._seam.enter("create_context", _engine_error)
        self._on_device(self._device, call, _engine_error)
        context = MockContext(self._seam, self, self._activations_for_context(call) if own_memory else None)
        with self._lock:
            # 8.6 gives profile 0 to the first context alone; an engine that shares profiles gives it to each
            if self._payload.profile_sharing or not self._has_had_context:
                context.take_profile(0)
                self._profile_holders.setdefault(0, context)
            self._has_had_context = True
        return context

    def _activations_for_context(self, call: str) -> tuple[int, int]:
        nbytes = max(self.activation_bytes(None), ALIGNMENT)
        try:
            address = self._seam.driver.allocate(nbytes, "cuMemAlloc", label=f"activations of engine {self.name!r}")
        except CudaError as cause:
            text = f"the activation memory of a context of {self.name!r} takes {nbytes} bytes: {cause}"
            raise self._seam.refuse(call, text, _engine_error, code="2: OutOfMemory") from cause
        return address, nbytes

    def claim_profile(self, context: MockContext, index: int) -> str:
        """Give profile ``index`` to ``context``; the reason if it cannot have it, an empty string if it has it now."""
        with self._lock:
            if not 0 <= index < self.num_profiles:
                return f"there is no optimization profile {index}; the engine has {self.num_profiles}"
            if not self._payload.profile_sharing:
                holder = self._profile_holders.get(index)
                if holder is not None and holder is not context:
                    return (
                        f"optimization profile {index} is in use by another context ({holder}) and this plan does not "
                        "share profiles: build it with profile_sharing=True, or add a profile for each context"
                    )
                self._drop(context)
                self._profile_holders[index] = context
            return ""

    def release_profile(self, context: MockContext) -> None:
        """``context`` is being destroyed: others may have its profile."""
        with self._lock:
            self._drop(context)

    def _drop(self, context: MockContext) -> None:
        self._profile_holders = {i: c for i, c in self._profile_holders.items() if c is not context}

    def _release(self) -> None:
        self._seam.driver.release(self._weights_address)

    def _estimate(self, profile: int) -> int:
        shapes: dict[str, Shape | None] = {}
        values: dict[str, Array] = {}
        for info in self._payload.tensors:
            if info.mode is not TensorMode.INPUT:
                continue
            if info.is_shape_tensor:
                values[info.name] = np.array(info.ranges[profile].max, info.dtype.numpy).reshape(info.shape)
            else:
                shapes[info.name] = info.ranges[profile].max
        return self.shapes.working_set_bytes(shapes, values)


def _weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes of all weights as they lie on the device, each rounded up to the alignment."""
    import onnx

    total = 0
    for tensor in weight_tensors(model.graph):
        name = onnx_type_name(tensor.data_type)
        packed = name in ("INT4", "UINT4", "FLOAT4E2M1")
        bits = 4 if packed else onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * 8
        total += -(-((math.prod(tensor.dims) * bits + 7) // 8) // ALIGNMENT) * ALIGNMENT
    return total
