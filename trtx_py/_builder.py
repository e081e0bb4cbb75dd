"""The builder: networks become plans."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from ._aio import run_shielded
from ._build_stream import BuildStream
from ._builder_options import BuilderOptions
from ._config import BuilderConfig, OptimizationProfile
from ._errors import BackendUnavailableError, BorrowedError, BuilderError, InvalidArgumentError
from ._logger import Logger, checked_logger, owner_of
from ._network import Network
from ._onnx_source import OnnxSource
from ._plan import Plan, PlanHeader
from ._precision import PrecisionRequest, ReadyNetwork, counted, read_back, ready_network
from ._resource import Resource
from ._types import BackendInfo, BuildOptions, LayerPrecision, ProfileSpec, ShapeRange, TensorInfo
from .backends._raw_plan import find_host_code
from .backends.protocols import TensorRTBackend
from .backends.registry import resolve_backend
from .cuda._device import Device

#: Called from the building thread with the phase, the step that was completed and the number of steps of that phase.
OnProgress = Callable[[str, int, int], None]


class _Progress:
    """Passes progress on and carries the wish to abort into the build."""

    def __init__(self, on_progress: OnProgress | None, aborted: threading.Event | None = None) -> None:
        if on_progress is not None and not callable(on_progress):
            raise InvalidArgumentError(
                f"on_progress is {type(on_progress).__name__}; expected None or a function of (phase, step, steps)"
            )
        self.aborted = threading.Event() if aborted is None else aborted
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

    def create_config(self, options: BuilderOptions | None = None) -> BuilderConfig:
        """A new config, owned by this builder, with ``options`` or with TensorRT's defaults.

        Raises InvalidArgumentError for an option that no TensorRT could honour; what the one at hand lacks is found
        when the build starts.
        Source: nvinfer1::IBuilder::createBuilderConfig
        """
        self._handle.require_open()
        return BuilderConfig._create(self, options)

    def load_plugins(self, libraries: Iterable[str | os.PathLike[str]] = (), creators: Iterable[object] = ()) -> None:
        """Make plugins known, before a model that has them is parsed; for the life of the process.

        Plans with them run in processes that know them too. Whatever is loaded runs with all rights of this process.

        Args:
            libraries: paths of libraries with plugins.
            creators: Python objects derived from the vendor's IPluginCreatorV3One. What is known already is skipped.
        Raises:
            BuilderError: TensorRT does not take it, or this version has no such plugins; names the plugin.
            InvalidArgumentError: not paths.
        Source: nvinfer1::IPluginRegistry::loadLibrary, registerCreator
        """
        self._handle.require_open()
        wanted = BuilderOptions(plugin_libraries=tuple(libraries), plugin_creators=tuple(creators))
        with self._handle.lend("load_plugins()"), self._logger.attaching():
            self._native.load_plugins([os.fspath(path) for path in wanted.plugin_libraries], wanted.plugin_creators)

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

    def build_stream(self, network: Network, config: BuilderConfig) -> BuildStream:
        """A build that is watched: ``async with builder.build_stream(network, config) as stream``.

        ``async for step in stream`` gives a BuildStep for each step that was completed, and raises what
        ``build_serialized_network`` would; then ``stream.plan`` is the plan. TensorRT 8.6 reports no steps.

        Cancellation, and leaving the block early: the build is stopped at its next step; no plan results.
        Source: nvinfer1::IBuilder::buildSerializedNetwork, nvinfer1::IProgressMonitor
        """
        self._handle.require_open()
        aborted = threading.Event()
        return BuildStream(lambda on_step: self._build(network, config, _Progress(on_step, aborted)), aborted.set)

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
        options, request = config._snapshot(), config._precision_request()
        _check_tf32(options)
        if not self._building.acquire(blocking=False):
            raise BorrowedError(
                f"{self._handle} is building something else; a builder builds one plan at a time: make another"
            )
        try:
            with (
                self._handle.lend("a build"), network._changing("a build"), config._handle.lend("a build"),
                self._logger.attaching(), self._on_device(),
            ):  # fmt: skip
                targets = self._targets(options)
                if self._device is not None:
                    options = replace(options, memory=self._device._access.memory)
                with ready_network(
                    self._native, network._native, source, self._backend.info, options, request,
                    targets=targets, cancelled=progress.aborted.is_set,
                ) as ready:  # fmt: skip
                    serialized = self._native.build_serialized_network(ready.native, ready.options, progress)
                    if progress.aborted.is_set():
                        raise BuilderError("the build was cancelled")
                    layers = self._read_back(ready, request, serialized)
                header = self._header(network, options, source, serialized, request, layers)
                return Plan.seal(serialized, header)
        finally:
            self._building.release()

    def _on_device(self) -> AbstractContextManager[None]:
        return nullcontext() if self._device is None else self._device.current()

    def _targets(self, options: BuildOptions) -> tuple[str, ...]:
        """The architectures that are built for; empty if there is no GPU and none was named."""
        if options.compute_capabilities or self._device is None:
            return options.compute_capabilities
        return (self._device._compute_capability(),)  # also while the builder waits to close

    def _read_back(
        self, ready: ReadyNetwork, request: PrecisionRequest, serialized: bytes | memoryview
    ) -> tuple[LayerPrecision, ...]:
        def inspect() -> tuple[LayerPrecision, ...]:
            runtime = self._backend.create_runtime(
                self._logger._sink(), device=0 if self._device is None else self._device.ordinal, lean_library=None,
                allow_host_code=True,
            )  # fmt: skip
            try:
                engine = runtime.deserialize(serialized)
                try:
                    return engine.layer_precisions()
                finally:
                    engine.destroy()
            finally:
                runtime.destroy()

        return read_back(self._backend.info, ready, request, inspect)

    def _header(
        self,
        network: Network,
        options: BuildOptions,
        source: OnnxSource,
        serialized: bytes | memoryview,
        request: PrecisionRequest,
        layers: Sequence[LayerPrecision],
    ) -> PlanHeader:
        info = self._backend.info
        capabilities = self._targets(options)
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
                **{name: _noted(value) for name, value in options.further.items()},
                **_precision_notes(request, layers),
            },
            version_compatible="VERSION_COMPATIBLE" in options.flags,
            host_code=find_host_code(serialized) is not None,
        )


def _check_tf32(options: BuildOptions) -> None:
    """A precision turns TF32 on or off, and so may a flag: one would be dropped where they differ."""
    off = options.further.get("tf32") is False
    if options.precision == "fp32" and "TF32" in options.flags:
        raise InvalidArgumentError("the flag TF32 is set, and precision 'fp32' turns it off; clear one of them")
    if off and (options.precision == "tf32" or "TF32" in options.flags):
        raise InvalidArgumentError("tf32 is False, and precision 'tf32' or the flag TF32 turns it on; leave one unset")


def _precision_notes(request: PrecisionRequest, layers: Sequence[LayerPrecision]) -> dict[str, object]:
    if request.word is None:
        return {}
    return {
        "layers_by_precision": counted(layers),
        "calibration": None if request.calibration is None else request.calibration.method_key,
        "precision_policy": None if request.policy is None else request.policy.described(),
        "require_precision": request.required,
    }


def _noted(value: object) -> object:
    """An option as a plan's header keeps it."""
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(name): _noted(one) for name, one in value.items()}
    if isinstance(value, (tuple, list)):
        return [_noted(one) for one in value]
    return str(value)


def _range_of(tensor: TensorInfo, profile: ProfileSpec) -> ShapeRange:
    """The profile's range, or for an input that needs none the one shape it can have."""
    return profile.get(tensor.name) or ShapeRange(tensor.shape, tensor.shape, tensor.shape)
