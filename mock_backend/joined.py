"""JoinedBackend: a real parser and builder, and a mock runtime for what they accept."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

from trtx_py._errors import BuilderError, EngineError, ParserError
from trtx_py._types import (
    BackendInfo,
    BuildOptions,
    DataType,
    LayerPrecision,
    Severity,
    TensorInfo,
    TensorLocation,
    TensorMode,
)
from trtx_py.backends.protocols import BackendBuilder, BackendNetwork, BuildProgress, LogSink, TensorRTBackend
from trtx_py.network import LayerRequest, TensorFacts

from ._backend import MockBackend
from ._builder import MockBuilder, make_payload
from ._driver import MockDriver
from ._engine import MockRuntime
from ._network import MockNetwork

__all__ = ["JoinedBackend"]


class JoinedBackend:
    """Builds with ``real``, so that every error of parse and build is NVIDIA's own, and runs on ``mock``.

    The plan is a mock plan: the ONNX model, the I/O as the real network declares it, and size and SHA-256 of the plan
    that the real builder made, which is then thrown away.

    Args:
        real: a backend that can build, such as tensorrt_rtx; its driver and runtime are not used.
        mock: whose devices, faults and settings are used; its own flavour and version are replaced by the joint ones.
            None makes one with ``operators="any"``, since the real parser decides.
    """

    def __init__(self, real: TensorRTBackend, mock: MockBackend | None = None) -> None:
        name = f"{real.info.name}+mock"
        if not real.info.can_build:
            raise BuilderError(f"{real.info.name} cannot build, so there is nothing to join; use the mock alone")
        self._real = real
        self._mock = MockBackend(operators="any") if mock is None else mock
        self._info = BackendInfo(
            name, name, real.info.version, can_build=True, can_run=self._mock.info.can_run,
            strongly_typed=real.info.strongly_typed,
        )  # fmt: skip

    @property
    def info(self) -> BackendInfo:
        return self._info

    def plan_settings(self) -> dict[str, object] | None:
        """Those of both; None if the real backend does not say."""
        describe = getattr(self._real, "plan_settings", None)
        real = None if describe is None else describe()
        return None if real is None else {"real": real, "mock": self._mock.plan_settings()}

    @property
    def driver(self) -> MockDriver:
        return self._mock.driver

    @property
    def mock(self) -> MockBackend:
        """The half that runs: faults, counters, leaks."""
        return self._mock

    def create_builder(self, log: LogSink) -> JoinedBuilder:
        real = self._real.create_builder(log)
        try:
            # the real parser judges the model; the mock's copy only carries it, so its log lines would mislead
            shadow = self._mock.create_builder(_quiet)
        except BaseException:
            real.destroy()
            raise
        return JoinedBuilder(real, shadow, self._info, self._mock.compute_capability)

    def create_runtime(
        self,
        log: LogSink,
        *,
        device: int,
        lean_library: str | None,
        allow_host_code: bool,
        runtime_cache: bytes | None = None,
    ) -> MockRuntime:
        return self._mock.create_runtime(
            log, device=device, lean_library=lean_library, allow_host_code=allow_host_code,
            runtime_cache=runtime_cache, info=self._info,
        )  # fmt: skip


def _quiet(severity: Severity, line: str) -> None:
    """A sink for lines that only repeat what the real library said."""


class JoinedNetwork:
    """A real network and the mock's copy of the same model."""

    def __init__(self, real: BackendNetwork, shadow: MockNetwork) -> None:
        self.real = real
        self.shadow = shadow

    def parse_onnx(self, model: bytes, directory: str | None) -> None:
        """The real parser first; a model that only the mock cannot take is a ParserError that says so."""
        self.real.parse_onnx(model, directory)
        try:
            self.shadow.parse_onnx(model, directory)
        except ParserError as error:
            raise ParserError(
                "the real parser accepted this model, but the mock that should run it did not",
                issues=error.issues,
                tensorrt_log=error.tensorrt_log,
            ) from error

    def add_input(self, facts: TensorFacts) -> None:
        self.real.add_input(facts)
        self.shadow.add_input(facts)

    def add_layer(self, request: LayerRequest) -> tuple[TensorFacts, ...]:
        """The real network first; its types and shapes are those that count."""
        made = self.real.add_layer(request)
        try:
            self.shadow.add_layer(request)
        except BuilderError as error:
            raise BuilderError(
                f"the real network took {request}, but the mock that should run it did not: {error.message}",
                tensorrt_log=error.tensorrt_log,
            ) from error
        return made

    def mark_output(self, facts: TensorFacts, name: str) -> None:
        self.real.mark_output(facts, name)
        self.shadow.mark_output(facts, name)

    def unmark_output(self, facts: TensorFacts) -> None:
        self.real.unmark_output(facts)
        self.shadow.unmark_output(facts)

    def set_layer_type(self, request: LayerRequest, output: int | None, dtype: DataType) -> None:
        self.real.set_layer_type(request, output, dtype)

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        return self.real.inputs

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        return self.real.outputs

    @property
    def num_layers(self) -> int:
        return self.real.num_layers

    def layer_precisions(self) -> tuple[LayerPrecision, ...]:
        return self.real.layer_precisions()

    def destroy(self) -> None:
        try:
            self.real.destroy()
        finally:
            self.shadow.destroy()


class JoinedBuilder:
    """BackendBuilder over a real builder; see JoinedBackend."""

    def __init__(self, real: BackendBuilder, shadow: MockBuilder, info: BackendInfo, capability: str) -> None:
        self._real = real
        self._shadow = shadow
        self._info = info
        self._capability = capability

    def create_network(self) -> JoinedNetwork:
        real = self._real.create_network()
        try:
            return JoinedNetwork(real, self._shadow.create_network())
        except BaseException:
            real.destroy()
            raise

    def load_plugins(self, libraries: Sequence[str], creators: Sequence[object]) -> None:
        self._real.load_plugins(libraries, creators)

    def build_serialized_network(self, network: Any, options: BuildOptions, progress: BuildProgress | None) -> bytes:
        """A mock plan for what the real builder built. Raises BuilderError, in the real library's words."""
        if not isinstance(network, JoinedNetwork):
            raise BuilderError("the network was not created by this builder")
        if not options.compute_capabilities:
            # without a GPU the real builder must be told what to build for
            options = dataclasses.replace(options, compute_capabilities=(self._capability,))
        plan = self._real.build_serialized_network(network.real, options, progress)
        payload = make_payload(
            network.shadow,
            self._shadow.effective(options),
            flavour=self._info.flavour,
            version=self._info.version,
            compute_capabilities=options.compute_capabilities,
            tensors=_located(network),
            num_layers=network.real.num_layers,
            real_plan={"sha256": hashlib.sha256(plan).hexdigest(), "bytes": len(plan)},
        )
        return payload.to_bytes()

    def destroy(self) -> None:
        try:
            self._real.destroy()
        finally:
            self._shadow.destroy()


def _located(network: JoinedNetwork) -> tuple[TensorInfo, ...]:
    """I/O as the real network declares it; a shape tensor lies on the host, wherever the network's entry says so."""
    known = {t.name for t in network.shadow.inputs + network.shadow.outputs}
    tensors = network.real.inputs + network.real.outputs
    strangers = [t.name for t in tensors if t.name not in known]
    if strangers:
        raise EngineError(f"the real network has tensors that the ONNX model has not: {', '.join(strangers)}")
    return tuple(
        dataclasses.replace(t, location=TensorLocation.HOST) if t.is_shape_tensor and t.mode is TensorMode.INPUT else t
        for t in tensors
    )
