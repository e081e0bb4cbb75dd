"""Builder and network: from an ONNX model to a plan."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from ..._errors import BuilderError, InvalidArgumentError
from ..._types import BuildOptions, Severity
from ..protocols import BuildProgress, CudaDriver, LogSink
from ._advanced import AdvancedOptions
from ._calibrator import add_calibrator
from ._guards import alive, created
from ._log_router import Operation
from ._network import Network
from ._options import apply_options
from ._plugins import load_plugins
from ._profiles import add_profiles
from ._progress import ProgressState, make_monitor
from ._vendor import Vendor

#: part of a log line -> what to do about it
_NEXT_STEPS = (
    (
        "cudaError 35",
        "there is no GPU or driver here to build for: name the target with compute_capabilities, such as ('8.9',)",
    ),
    (
        "cudaError 100",
        "there is no GPU here to build for: name the target with compute_capabilities, such as ('8.9',)",
    ),
    ("libnvinfer_lean", "the lean runtime to embed is not installed: add the flag EXCLUDE_LEAN_RUNTIME"),
    ("is not supported", "build for a newer compute capability, or change the model where the log says"),
    ("graph_jit.cpp", "this step runs on a GPU: build where one is, or drop the flags REFIT and STRIP_PLAN"),
)


class Builder:
    """Implements BackendBuilder.

    Source: nvinfer1::IBuilder
    """

    def __init__(self, vendor: Vendor, log: LogSink, driver: Callable[[], CudaDriver]) -> None:
        self._vendor = vendor
        self._log = log
        self._driver = driver
        self._building = threading.Lock()
        with vendor.router.operation(log) as operation:
            handle: Any = vendor.module.Builder(vendor.logger)
            if not created(handle, operation):
                raise BuilderError(f"{vendor.title} could not create a builder", tensorrt_log=operation.lines)
        self._handle: Any = handle
        vendor.router.open(log)

    def create_network(self) -> Network:
        """An empty network, explicit batch, strongly typed where this version builds nothing else."""
        builder = alive(self._handle, "builder")
        flags = 0
        members = self._vendor.members("NetworkDefinitionCreationFlag")
        if self._vendor.facts.explicit_batch_flag:
            flags |= 1 << int(members["EXPLICIT_BATCH"])
        if self._vendor.facts.typing == "strong" and "STRONGLY_TYPED" in members:
            flags |= 1 << int(members["STRONGLY_TYPED"])
        with self._vendor.router.operation(self._log) as operation:
            handle = builder.create_network(flags)
            if handle is None:
                raise BuilderError(f"{self._vendor.title} could not create a network", tensorrt_log=operation.lines)
            _without_recorder(handle)
            return Network(self._vendor, self._log, builder, handle)

    def load_plugins(self, libraries: Sequence[str], creators: Sequence[object]) -> None:
        """See BackendBuilder."""
        alive(self._handle, "builder")
        with self._vendor.router.operation(self._log) as operation:
            load_plugins(self._vendor, libraries, creators, operation)

    def build_serialized_network(
        self, network: Any, options: BuildOptions, progress: BuildProgress | None
    ) -> memoryview:
        """Source: nvinfer1::IBuilder::buildSerializedNetwork, which releases the interpreter lock."""
        builder = alive(self._handle, "builder")
        if not isinstance(network, Network) or not network.belongs_to(builder):
            raise InvalidArgumentError(f"{network!r} is no network of this builder; create it with create_network()")
        if not self._building.acquire(blocking=False):
            raise BuilderError("this builder is building already; wait for that build or use another builder")
        try:
            with self._vendor.router.operation(self._log) as operation:
                return self._build(builder, network, options, progress, operation)
        finally:
            self._building.release()

    def _build(
        self, builder: Any, network: Network, options: BuildOptions, progress: BuildProgress | None, op: Operation
    ) -> memoryview:
        config = builder.create_builder_config()
        if config is None:
            raise BuilderError(f"{self._vendor.title} could not create a configuration", tensorrt_log=op.lines)
        apply_options(self._vendor, config, network.native, options, op)
        advanced = AdvancedOptions(
            self._vendor, self._log, builder, config, options.further, options.memory, network.native
        )
        built = False
        try:
            advanced.apply(op)
            plan = self._build_configured(builder, config, network, options, progress, op)
            built = True
            return plan
        finally:
            advanced.finish(built=built)

    def _build_configured(
        self,
        builder: Any,
        config: Any,
        network: Network,
        options: BuildOptions,
        progress: BuildProgress | None,
        op: Operation,
    ) -> memoryview:
        profiles = add_profiles(self._vendor, builder, config, network.inputs, options.profiles, op)
        state = ProgressState(progress) if progress is not None else None
        monitor = make_monitor(self._vendor, state) if state is not None else None
        if monitor is not None:
            config.progress_monitor = monitor
        elif state is not None:
            self._log(
                Severity.INFO,
                f"{self._vendor.title} has no IProgressMonitor: this build can neither be watched nor aborted",
            )
        feeder, calibrator = None, None
        if options.calibrator is not None:
            feeder, calibrator = add_calibrator(
                self._vendor, config, builder, network.inputs, options.calibrator, self._driver()
            )
        try:
            host_memory = self._run(builder, network.native, config)
        finally:
            # The config borrows all of them; they must outlive it.
            del config, monitor, profiles, calibrator
            if feeder is not None:
                feeder.release()
        if feeder is not None and feeder.failure is not None:
            raise feeder.failure
        if state is not None and state.failure is not None:
            raise state.failure
        if state is not None and state.aborted:
            raise BuilderError("the build was aborted by its progress callback", tensorrt_log=op.lines)
        if host_memory is None:
            self._clear_leftovers(builder, options)
            raise BuilderError(self._failure_text(op, options), tensorrt_log=op.lines, codes=op.codes)
        return memoryview(host_memory).cast("B")  # which keeps it; a copy would be the size of the weights

    def _run(self, builder: Any, network: Any, config: Any) -> Any:
        """The build itself, with an error recorder for as long as it takes."""
        if self._vendor.recorder is None:
            return builder.build_serialized_network(network, config)
        builder.error_recorder = self._vendor.recorder
        try:
            return builder.build_serialized_network(network, config)
        finally:
            builder.error_recorder = None

    def _clear_leftovers(self, builder: Any, options: BuildOptions) -> None:
        """Build a network of one layer after a failed build, so that the failure does not reach the next plan.

        TensorRT-RTX 1.7 keeps code of a build that failed while it compiled for 7.5, process-wide, and puts it into
        the next plan, or fails that build too; any build in between takes it away. Measured.
        """
        if not self._vendor.flavour.can_target or "7.5" not in options.compute_capabilities:
            return
        module = self._vendor.module
        network = builder.create_network(0)
        config = builder.create_builder_config()
        only = BuildOptions(compute_capabilities=("8.0",))
        with self._vendor.router.operation(_discard) as operation:
            tensor = network.add_input("x", module.DataType.FLOAT, (1, 16))
            network.mark_output(network.add_activation(tensor, module.ActivationType.RELU).get_output(0))
            apply_options(self._vendor, config, network, only, operation)
            builder.build_serialized_network(network, config)

    def _failure_text(self, op: Operation, options: BuildOptions) -> str:
        target = f" for compute capability {', '.join(options.compute_capabilities)}" * bool(
            options.compute_capabilities
        )
        text = f"{self._vendor.title} could not build the network{target}"
        log = "\n".join(op.lines)
        step = next((step for part, step in _NEXT_STEPS if part in log), "the log says why")
        return f"{text}; {step}"

    def destroy(self) -> None:
        """Idempotent. Networks must have been destroyed before."""
        if self._handle is None:
            return
        with self._vendor.router.operation(self._log):
            self._handle = None
        self._vendor.router.close(self._log)


def _without_recorder(network: Any) -> None:
    """Take away the error recorder that a network has from a builder which is building meanwhile, on another thread.

    A parser gives its network's recorder back in its destructor, and the bindings destroy the parser after the network:
    with a recorder to give back that ends the process (tensorrt-rtx 1.7, measured).
    """
    if getattr(network, "error_recorder", None) is not None:
        network.error_recorder = None


def _discard(severity: Severity, message: str) -> None:
    """A sink for lines that nobody asked for."""
