"""The builder: networks become plans."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from ._aio import run_shielded
from ._config import BuilderConfig, OptimizationProfile
from ._errors import BackendUnavailableError, BorrowedError, BuilderError, InvalidArgumentError
from ._logger import Logger, checked_logger, owner_of
from ._network import Network
from ._onnx_source import OnnxSource
from ._plan import Plan, PlanHeader
from ._resource import Resource
from ._types import BackendInfo, BuildOptions, ProfileSpec, ShapeRange, TensorInfo
from .backends._raw_plan import find_host_code
from .backends.protocols import TensorRTBackend
from .backends.registry import resolve_backend
from .cuda._device import Device

#: Called from the building thread with the phase, the step that was completed and the number of steps of that phase.
OnProgress = Callable[[str, int, int], None]


class _Progress:
    """Passes progress on and carries the wish to abort into the build."""

    def __init__(self, on_progress: OnProgress | None) -> None:
        if on_progress is not None and not callable(on_progress):
            raise InvalidArgumentError(
                f"on_progress is {type(on_progress).__name__}; expected None or a function of (phase, step, steps)"
            )
        self.aborted = threading.Event()
        self._on_progress = on_progress
        self._steps: dict[str, int] = {}

    def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
        self._steps[phase] = steps

    def step_complete(self, phase: str, step: int) -> bool:
        if self._on_progress is not None:
            self._on_progress(phase, step, self._steps.get(phase, 0))
        return not self.aborted.is_set()

    def phase_finish(self, phase: str) -> None:
        self._steps.pop(phase, None)


class Builder(Resource):
    """Parses models and builds plans, with one member of the TensorRT family or a stand-in for it.

    Args:
        logger: receives TensorRT's lines; None takes the default one of this process, which hands them to Python's
            ``logging`` under "trtx_py.tensorrt" and needs no closing.
        backend: a name ("mock", "tensorrt", "tensorrt_rtx", "tensorrt_rtx+mock"), a backend object such as
            ``mock_backend.MockBackend(...)``, or None: TRTX_BACKEND, else the best installed TensorRT that can build.
        device: the GPU to build on, where there is one.

    Raises:
        BackendUnavailableError: nothing here can build; says what was looked for and what to install.

    Source: nvinfer1::IBuilder. One build at a time; make several builders for several at once.
    """

    def __init__(
        self, logger: Logger | None = None, backend: str | TensorRTBackend | None = None, *, device: int = 0
    ) -> None:
        self._backend = resolve_backend(backend, need="build")
        self._logger = checked_logger(logger)
        self._building = threading.Lock()
        with self._opening(owner_of(self._logger), name=self._backend.info.name) as handle, self._logger.attaching():
            try:
                self._device: Device | None = Device._create(self._backend, device, parent=self)
            except BackendUnavailableError:
                self._device = None  # no driver: some flavours build all the same, the others say so in the next line
            with self._on_device():
                self._native = self._backend.create_builder(self._logger._sink())
                destroy = self._native.destroy
                handle.release = destroy if self._device is None else self._device._carry(destroy)

    @property
    def backend(self) -> BackendInfo:
        """Which TensorRT this is and what it can do."""
        return self._backend.info

    def create_network(self) -> Network:
        """A new, empty network, owned by this builder. Source: nvinfer1::IBuilder::createNetworkV2"""
        self._handle.require_open()
        return Network._create(self)

    def create_config(self) -> BuilderConfig:
        """A new config with default options, owned by this builder. Source: nvinfer1::IBuilder::createBuilderConfig"""
        self._handle.require_open()
        return BuilderConfig._create(self)

    def create_optimization_profile(self) -> OptimizationProfile:
        """A new, empty profile, owned by this builder. Source: nvinfer1::IBuilder::createOptimizationProfile"""
        self._handle.require_open()
        return OptimizationProfile._create(self)

    async def build_serialized_network(
        self, network: Network, config: BuilderConfig, *, on_progress: OnProgress | None = None
    ) -> Plan:
        """Build a plan, off the event loop.

        Args:
            network: a parsed network of this builder.
            config: a config of this builder; its options are read when the build starts.
            on_progress: called from the building thread with phase, step and number of steps. An exception that it
                raises aborts the build and is raised here.

        Raises:
            BuilderError: TensorRT could not build it; its own lines are in ``tensorrt_log``.
            InvalidArgumentError: the network is empty or belongs to another builder, or on_progress is no function.
            BorrowedError: this builder is building something else.
        Cancellation: the build is asked to stop at its next step and the cancellation is delivered once it has
            (TensorRT 8.6 cannot stop: there the build runs to its end first). No plan results.
        Source: nvinfer1::IBuilder::buildSerializedNetwork
        """
        progress = _Progress(on_progress)
        return await run_shielded(lambda: self._build(network, config, progress), on_cancel=progress.aborted.set)

    def build_serialized_network_sync(
        self, network: Network, config: BuilderConfig, *, on_progress: OnProgress | None = None
    ) -> Plan:
        """As ``build_serialized_network``, blocking this thread; other Python threads go on."""
        return self._build(network, config, _Progress(on_progress))

    def _build(self, network: Network, config: BuilderConfig, progress: _Progress) -> Plan:
        self._handle.require_open()
        for what, given, kind in (("network", network, Network), ("config", config, BuilderConfig)):
            if not isinstance(given, kind):
                raise InvalidArgumentError(
                    f"{what} is {type(given).__name__}; expected a {kind.__name__} of this builder"
                )
            if given._parent is not self:
                raise InvalidArgumentError(f"{given!r} belongs to another builder than {self!r}; make it from this one")
        source = network._parsed()
        options = config._snapshot()
        if not self._building.acquire(blocking=False):
            raise BorrowedError(
                f"{self._handle} is building something else; a builder builds one plan at a time: make another"
            )
        try:
            with (
                self._handle.lend("a build"), network._handle.lend("a build"), config._handle.lend("a build"),
                self._logger.attaching(), self._on_device(),
            ):  # fmt: skip
                serialized = self._native.build_serialized_network(network._native, options, progress)
                if progress.aborted.is_set():
                    raise BuilderError("the build was cancelled")
                return Plan.seal(serialized, self._header(network, options, source, serialized))
        finally:
            self._building.release()

    def _on_device(self) -> AbstractContextManager[None]:
        return nullcontext() if self._device is None else self._device.current()

    def _header(self, network: Network, options: BuildOptions, source: OnnxSource, serialized: bytes) -> PlanHeader:
        info = self._backend.info
        capabilities = options.compute_capabilities
        if not capabilities and self._device is not None:
            capabilities = (self._device._compute_capability(),)  # also while the builder waits to close
        profiles = options.profiles or ({},)
        inputs = tuple(
            replace(tensor, ranges=tuple(_range_of(tensor, profile) for profile in profiles))
            for tensor in network._native.inputs  # lent to this build: its owner may have begun to close
        )
        return PlanHeader(
            flavour=info.flavour,
            version=info.version,
            compute_capabilities=capabilities,
            precision=options.precision,
            io_tensors=inputs + network._native.outputs,
            onnx_sha256=source.sha256,
            build_options={
                "workspace_bytes": options.workspace_bytes,
                "flags": list(options.flags),
                "optimization_level": options.optimization_level,
                "max_aux_streams": options.max_aux_streams,
                "profile_sharing": options.profile_sharing,
            },
            version_compatible="VERSION_COMPATIBLE" in options.flags,
            host_code=find_host_code(serialized) is not None,
        )


def _range_of(tensor: TensorInfo, profile: ProfileSpec) -> ShapeRange:
    """The profile's range, or for an input that needs none the one shape it can have."""
    return profile.get(tensor.name) or ShapeRange(tensor.shape, tensor.shape, tensor.shape)
