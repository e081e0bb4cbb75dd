"""The mock's builder: checks what TensorRT checks, reports progress, and writes a plan."""

from __future__ import annotations

import dataclasses
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from trtx_py._errors import BuilderError
from trtx_py._types import BuildOptions, DataType, TensorInfo
from trtx_py.backends.protocols import BuildProgress

from ._dtypes import trt_type
from ._network import MockNetwork, declared_dims
from ._operators import BUILDER_FLAGS
from ._plan import PlanPayload
from ._profiles import check_profiles, ranges_by_input
from ._seam import LiveObject, Seam

__all__ = ["MockBuilder", "check_options", "make_payload"]

_CAPABILITY = re.compile(r"\d{1,2}\.\d")
_PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "int8", "fp8", "int4-weights")
#: Of BuildOptions what a plan does not keep: profiles are in its tensors, and the others are no values.
_NOT_KEPT = ("profiles", "calibrator", "further", "memory")
_NARROW = frozenset({DataType.HALF, DataType.BF16, DataType.INT8, DataType.FP8, DataType.INT4, DataType.FP4})

#: Options of BuilderOptions that the TensorRT it stands for, tensorrt-rtx 1.7, lacks, or that need TensorRT itself.
_REFUSED = {
    "timing_cache": "it measures no kernels, and TensorRT-RTX has a runtime cache instead",
    "dla": "there is no accelerator",
    "plugin_libraries": "it computes with ONNX Runtime, which TensorRT's plugins do not fit",
    "plugin_creators": "it computes with ONNX Runtime, which TensorRT's plugins do not fit",
    "account_memory": "its builder allocates nothing on the device",
}
#: Values that tensorrt-rtx 1.7 takes; a level of hardware compatibility it takes for none (measured).
_ENUMERATORS = {
    "hardware_compatibility": ("NONE",),
    "runtime_platform": ("SAME_AS_BUILD",),
    "tiling": ("NONE", "FAST", "MODERATE", "FULL"),
    "profiling_verbosity": ("LAYER_NAMES_ONLY", "DETAILED", "NONE"),
    "engine_capability": ("STANDARD",),
}
_NAMES = {
    "tactic_sources": ("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"),
    "preview_features": ("ALIASED_PLUGIN_IO_10_03", "RUNTIME_ACTIVATION_RESIZE_10_10"),
}


def check_options(options: BuildOptions) -> None:
    """Raise BuilderError for an option that a strongly typed TensorRT, or the mock, cannot honour."""
    if options.precision is not None and options.precision not in _PRECISIONS:
        raise BuilderError(
            f"precision {options.precision!r} is unknown; expected one of {', '.join(_PRECISIONS)} or None"
        )
    if options.precision not in (None, "fp32", "tf32"):
        raise BuilderError(
            f"precision {options.precision!r} was asked for, but this backend is strongly typed: precisions come from "
            "the model. Convert the model first (cast it, or insert Q/DQ nodes), then build with precision=None"
        )
    unknown = [flag for flag in options.flags if flag not in BUILDER_FLAGS]
    if unknown:
        gone = [f for f in unknown if f in ("FP16", "INT8", "BF16", "FP8", "INT4")]
        hint = " (precisions come from the model: convert it before the build)" if gone else ""
        raise BuilderError(
            f"unknown builder flags {', '.join(unknown)}{hint}; known are {', '.join(sorted(BUILDER_FLAGS))}"
        )
    if "STRIP_PLAN" in options.flags:
        raise BuilderError("the mock computes with the weights in the plan and cannot strip them; drop STRIP_PLAN")
    for name, reason in _REFUSED.items():
        if name in options.further:
            raise BuilderError(f"the mock has no {name}: {reason}; leave {name} unset")
    for name, known in _ENUMERATORS.items():
        value = options.further.get(name)
        if value is not None and value.upper() not in known:
            raise BuilderError(f"the mock refuses {name}={value!r}, as tensorrt_rtx does; it has {', '.join(known)}")
    for name, known in _NAMES.items():
        strange = [one for one in options.further.get(name, ()) if one not in known]
        if strange:
            raise BuilderError(f"the mock has no {name} {', '.join(strange)}; it has {', '.join(known)}")
    if options.workspace_bytes is not None and not 0 <= options.workspace_bytes < 2**63:
        raise BuilderError(f"workspace_bytes is {options.workspace_bytes}; expected 0 to {2**63 - 1}")
    if options.optimization_level is not None and not 0 <= options.optimization_level <= 5:
        raise BuilderError(f"optimization_level is {options.optimization_level}; expected 0 to 5")
    if options.max_aux_streams is not None and options.max_aux_streams < 0:
        raise BuilderError(f"max_aux_streams is {options.max_aux_streams}, and must not be negative")
    if len(set(options.compute_capabilities)) != len(options.compute_capabilities):
        raise BuilderError(f"compute_capabilities names one twice: {', '.join(options.compute_capabilities)}")
    for capability in options.compute_capabilities:
        if not _CAPABILITY.fullmatch(capability):
            raise BuilderError(f"compute capability {capability!r} is not of the form '8.9'")


def make_payload(
    network: MockNetwork,
    options: BuildOptions,
    *,
    flavour: str,
    version: str,
    compute_capabilities: Sequence[str],
    tensors: tuple[TensorInfo, ...] | None = None,
    num_layers: int | None = None,
    real_plan: Mapping[str, Any] | None = None,
) -> PlanPayload:
    """The plan of a parsed network whose options and profiles were checked.

    Args:
        tensors: I/O to declare instead of the network's own, where a real parser described it.
    """
    tensors = network.inputs + network.outputs if tensors is None else tensors
    inputs = {t.name for t in network.inputs}
    ranges = ranges_by_input([t for t in tensors if t.name in inputs], options.profiles)
    described = tuple(dataclasses.replace(t, ranges=ranges.get(t.name, ())) for t in tensors)
    plain = {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.name not in _NOT_KEPT}
    if "refittable_weights" in options.further:
        plain["refittable_weights"] = list(options.further["refittable_weights"])
    return PlanPayload(
        flavour=flavour,
        version=version,
        name=network.model.graph.name or "Unnamed Network",
        compute_capabilities=tuple(compute_capabilities),
        profile_sharing=options.profile_sharing,
        tensors=described,
        num_profiles=max(len(options.profiles), 1),
        num_layers=network.num_layers if num_layers is None else num_layers,
        model=network.model.SerializeToString(deterministic=True),
        options=plain,
        real_plan=real_plan,
    )


class MockBuilder(LiveObject):
    """BackendBuilder of the mock. One build at a time: a second one, from another thread, is refused."""

    kind = "builder"

    def __init__(
        self,
        seam: Seam,
        *,
        flavour: str,
        version: str,
        compute_capability: str,
        operators: str,
        profile_sharing: bool | None = None,
    ) -> None:
        super().__init__(seam, None)
        self._flavour = flavour
        self._version = version
        self._capability = compute_capability
        self._operators = operators
        self._profile_sharing = profile_sharing
        self._building = threading.Lock()

    def effective(self, options: BuildOptions) -> BuildOptions:
        """``options`` with what the backend overrides."""
        if self._profile_sharing is None:
            return options
        return dataclasses.replace(options, profile_sharing=self._profile_sharing)

    def create_network(self) -> MockNetwork:
        """An empty network that must be destroyed before this builder."""
        self._alive("create_network", lambda text, log: BuilderError(text, tensorrt_log=log))
        self._seam.enter("create_network", lambda text, log: BuilderError(text, tensorrt_log=log))
        return MockNetwork(self._seam, self, self._operators)

    def load_plugins(self, libraries: Sequence[str], creators: Sequence[object]) -> None:
        """Refused: what TensorRT's plugins do, the mock cannot."""
        for name, given in (("plugin_libraries", libraries), ("plugin_creators", creators)):
            if given:
                raise BuilderError(f"the mock has no {name}: {_REFUSED[name]}")

    def build_serialized_network(self, network: Any, options: BuildOptions, progress: BuildProgress | None) -> bytes:
        """The plan. Raises BuilderError for everything TensorRT refuses, and when ``progress`` asked to stop."""
        call = "IBuilder::buildSerializedNetwork"
        self._alive(call, lambda text, log: BuilderError(text, tensorrt_log=log))
        if not isinstance(network, MockNetwork) or network.parent is not self:
            raise BuilderError("the network was not created by this builder")
        if not self._building.acquire(blocking=False):
            raise BuilderError("this builder is already building; use one builder for each concurrent build")
        try:
            network._alive(call, lambda text, log: BuilderError(text, tensorrt_log=log))
            self._seam.enter("build_serialized_network", lambda text, log: BuilderError(text, tensorrt_log=log))
            try:
                self._check(network, options)
            except BuilderError as error:
                raise self._seam.refuse(call, error.message, lambda t, log: BuilderError(t, tensorrt_log=log)) from None
            self._report(network, progress)
            capabilities = options.compute_capabilities or (self._capability,)
            payload = make_payload(
                network,
                self.effective(options),
                flavour=self._flavour,
                version=self._version,
                compute_capabilities=capabilities,
            )
            return payload.to_bytes()
        finally:
            self._building.release()

    def _check(self, network: MockNetwork, options: BuildOptions) -> None:
        model = network.model
        check_options(options)
        if options.precision in ("fp32", "tf32"):
            types = {t.dtype for t in network.inputs + network.outputs}
            types |= {d for w in model.graph.initializer if (d := trt_type(w.data_type)) is not None}
            if types & _NARROW:
                found = ", ".join(sorted(t.value for t in types & _NARROW))
                raise BuilderError(
                    f"precision {options.precision!r} was asked for, but the model has {found} tensors and this "
                    "backend is strongly typed; build a float32 model, or pass precision=None"
                )
        known = {weights.name for weights in model.graph.initializer}
        strange = [name for name in options.further.get("refittable_weights", ()) if name not in known]
        if strange:
            raise BuilderError(f"refittable_weights names {', '.join(strange)}; the network has no such weights")
        if not network.outputs:
            raise BuilderError("Network must have at least one output; mark one in the model")
        check_profiles(network.inputs, declared_dims(model), options.profiles)

    def _report(self, network: MockNetwork, progress: BuildProgress | None) -> None:
        if progress is None:
            return
        nodes = list(network.model.graph.node)
        outer = "Building engine from subgraph"
        phases = ("Computing profile tactics", "Tactic selection")
        progress.phase_start(outer, None, len(phases))
        stopped = False
        for number, phase in enumerate(phases):
            progress.phase_start(phase, outer, len(nodes))
            for step in range(len(nodes)):
                if not progress.step_complete(phase, step):
                    stopped = True
                    break
            progress.phase_finish(phase)
            stopped = stopped or not progress.step_complete(outer, number)
            if stopped:
                break
        progress.phase_finish(outer)
        if stopped:
            raise self._seam.refuse(
                "IBuilder::buildSerializedNetwork",
                "the build was cancelled: the progress monitor asked to stop",
                lambda text, log: BuilderError(text, tensorrt_log=log),
                code="10: Build Cancelled",
            )
