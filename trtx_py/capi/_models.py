"""From the bytes that a foreign caller has to a plan, and to what he calls the types of its tensors."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .._build import add_profiles
from .._builder import Builder
from .._errors import BuilderError, InvalidArgumentError
from .._onnx_source import load_onnx
from .._options import EngineOptions
from .._plan import Plan, PlanHeader, looks_like_plan
from .._types import Shape
from ..backends.protocols import TensorRTBackend
from ._dtypes import ALIEN, CARRIERS, DType, of_engine
from ._model_types import carried_types, carry, computes_in_8_bits, io_types
from ._status import Status, StatusError

if TYPE_CHECKING:
    import onnx

_TYPES_KEY = "capi_types"  # in a plan's build options: what carried tensors stand for

Ranges = tuple[tuple[str, Shape, Shape, Shape], ...]
#: ONNX, as the bytes or the path of a model.
Model = memoryview | str


@dataclass(frozen=True)
class GraphOptions:
    """trtxpy_graph_options; None, 0 and an optimization level of -1 for defaults.

    Raises InvalidArgumentError at once for serving options that no engine takes: a build can last minutes.
    """

    ranges: Ranges | None
    precision: str | None
    optimization_level: int
    lanes: int
    slots: int
    max_graphs: int
    no_cuda_graphs: bool

    def __post_init__(self) -> None:
        EngineOptions.of(self.serving())

    def serving(self) -> dict[str, Any]:
        """As EngineOptions has it."""
        given = {"lanes": self.lanes, "slots": self.slots, "max_graphs": self.max_graphs}
        return {name: value for name, value in given.items() if value} | {"cuda_graphs": not self.no_cuda_graphs}

    def require_no_build(self) -> None:
        """Raises InvalidArgumentError if there are options of a build, and the model is a plan already."""
        given = [name for name in ("ranges", "precision") if getattr(self, name) is not None]
        if self.optimization_level >= 0:
            given.append("optimization_level")
        if given:
            raise InvalidArgumentError(f"{', '.join(given)}: these belong to a build, and the model is a plan already")


def carried_in(header: PlanHeader) -> dict[str, DType]:
    """The types that tensors of a plan stand for, of those that are carried."""
    stored = header.build_options.get(_TYPES_KEY)
    if not isinstance(stored, Mapping):
        return {}
    known = {int(dtype) for dtype in CARRIERS}
    # Whoever sealed the plan may have put anything here, also what has no hash.
    numbers = {name: number for name, number in stored.items() if isinstance(name, str) and isinstance(number, int)}
    return {name: DType(number) for name, number in numbers.items() if number in known}


def read_file(path: str) -> Plan | str:
    """A plan, or the path of an ONNX model."""
    try:
        with open(path, "rb") as file:
            start = file.read(16)
    except FileNotFoundError:
        raise StatusError(Status.NOT_FOUND, f"there is no file {path!r}") from None
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise InvalidArgumentError(f"{path!r} cannot be read: {error}") from None
    return Plan.load(path) if looks_like_plan(start) else os.path.abspath(path)


def build(
    backend: TensorRTBackend, device: int, model: Model, weights: memoryview | None, options: GraphOptions
) -> Plan:
    """The plan of an ONNX model, as it is or, where TensorRT refuses its types or computes in 8 bits, with carriers.

    Raises what the model as it is met: ParserError, BuilderError, InvalidArgumentError.
    """
    if weights is not None and not weights.nbytes:
        weights = None
    proto = _whole(model, weights)
    # Of types that no TensorRT has at its border its parser would only complain, to the terminal at that.
    carry_first = proto is not None and (not ALIEN.isdisjoint(io_types(proto).values()) or computes_in_8_bits(proto))
    del proto
    if carry_first:
        with contextlib.suppress(BuilderError, StatusError, OverflowError):
            plan = _build_carried(backend, device, model, weights, options)
            if plan is not None:
                return plan
    try:
        return _build(backend, device, model, weights, options)
    except (BuilderError, StatusError) as refusal:
        if carry_first:
            raise
        try:
            plan = _build_carried(backend, device, model, weights, options)
        except (BuilderError, StatusError, OverflowError):
            raise refusal from None
        if plan is None:
            raise
        return plan


def _whole(model: Model, weights: memoryview | None) -> onnx.ModelProto | None:
    """The model with all its weights inside; None if that is too large for one message."""
    import onnx

    source = load_onnx(model, weights)
    if source.directory is not None:
        return None
    proto = onnx.ModelProto()
    proto.ParseFromString(source.model)
    return proto


def _build_carried(
    backend: TensorRTBackend, device: int, model: Model, weights: memoryview | None, options: GraphOptions
) -> Plan | None:
    """The plan of the retyped model; None if there is nothing to retype, or weights are not at hand."""
    proto = _whole(model, weights)
    if proto is None:
        return None
    own = io_types(proto)
    if not carry(proto):
        return None
    plan = _build(backend, device, memoryview(proto.SerializeToString()), None, options)
    engine = {tensor.name: of_engine(tensor.dtype, tensor.name) for tensor in plan.header.io_tensors}
    types = {name: int(dtype) for name, dtype in carried_types(own, engine).items()}
    note = {**plan.header.build_options, _TYPES_KEY: types}
    return Plan.seal(plan.serialized, dataclasses.replace(plan.header, build_options=note))


def _build(
    backend: TensorRTBackend, device: int, model: Model, weights: memoryview | None, options: GraphOptions
) -> Plan:
    with Builder(backend=backend, device=device) as builder, builder.create_network() as network:
        network.parse_onnx(model, weights)
        for tensor in (*network.inputs, *network.outputs):
            of_engine(tensor.dtype, tensor.name)  # what the engine could not have is said before minutes have passed
        with builder.create_config() as config:
            config.precision = options.precision
            if options.optimization_level >= 0:
                config.optimization_level = options.optimization_level
            ranges = options.ranges
            add_profiles(builder, network, config, None if ranges is None else [_profile(ranges)])
            return builder.build_serialized_network_sync(network, config)


def _profile(ranges: Ranges) -> dict[str, tuple[Shape, Shape, Shape]]:
    profile = {name: (low, best, high) for name, low, best, high in ranges}
    if len(profile) < len(ranges):
        raise InvalidArgumentError(f"an input has two ranges: {', '.join(name for name, *_ in ranges)}")
    return profile
