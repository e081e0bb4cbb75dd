"""The error of each node's results in a converted model, against the FP32 model on the same data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .._types import Array
from ._float_cast import Converted
from ._graph import Graph
from ._readers import Batch
from ._reference import Runner
from ._simulate import rounding_model

if TYPE_CHECKING:
    import onnx


#: The largest number of FP16.
_FP16_LARGEST = 65504.0


class ErrorSum:
    """Adds up the difference between two tensors over batches.

    Attributes:
        peak: largest finite magnitude of the reference.
        signal, noise: sums of squares, of the reference and of the difference.
        largest: largest magnitude of a difference.
    """

    def __init__(self) -> None:
        self.peak = 0.0
        self.signal = 0.0
        self.noise = 0.0
        self.largest = 0.0

    def add(self, reference: Array, found: Array) -> None:
        """Take in one batch of both, of one shape."""
        wanted, given = reference.astype(np.float64), found.astype(np.float64)
        # What is not finite in both alike is no error: masks are made of it.
        with np.errstate(invalid="ignore"):
            difference = np.where(wanted == given, 0.0, given - wanted)
        difference = np.where(np.isnan(wanted) & np.isnan(given), 0.0, difference)
        finite = wanted[np.isfinite(wanted)]
        self.peak = max(self.peak, float(np.abs(finite).max(initial=0.0)))
        self.signal += float(np.square(finite).sum())
        self.noise += float(np.square(difference).sum())
        largest = float(np.abs(difference).max(initial=0.0))
        # Of a number and NaN max() takes the first, whichever that is.
        self.largest = math.inf if math.isnan(largest) else max(self.largest, largest)

    @property
    def relative(self) -> float:
        """Norm of the difference divided by the norm of the reference; infinite where the difference is not finite."""
        if not self.noise:
            return 0.0
        if not math.isfinite(self.noise) or not self.signal:
            return math.inf
        return math.sqrt(self.noise / self.signal)

    @property
    def snr_db(self) -> float:
        """Signal to noise in decibels: 20 more for each digit that is right. Infinite for no error."""
        relative = self.relative
        if not relative:
            return math.inf
        return -20 * math.log10(relative) if math.isfinite(relative) else -math.inf


@dataclass(frozen=True)
class LayerError:
    """The error of what one node computes.

    Attributes:
        node: its name in the FP32 model.
        operator: its ONNX operator.
        tensor: the result that is meant.
        relative_error: norm of the difference divided by the norm of the FP32 result.
        snr_db: the same in decibels.
        added: how much of the relative error its inputs did not have; infinite where a result is, in the reduced
            precision alone, and the node reads or makes numbers that FP16 cannot hold.
    """

    node: str
    operator: str
    tensor: str
    relative_error: float
    snr_db: float
    added: float


def layer_errors(reference: Graph, converted: Converted, batches: Iterable[Batch]) -> list[LayerError]:
    """The error of every float result in the main graph, in the order of the graph.

    Args:
        reference: the FP32 model that was converted.
    Raises as Runner.
    """
    from onnx import TensorProto

    names = [
        name
        for node in reference.nodes
        for name in node.output
        if name and reference.types.get(name) == TensorProto.FLOAT
    ]
    simulated, wide = rounding_model(converted.model)
    places = {name: _place(name, converted.tensors, wide) for name in names}
    made = {name for node in simulated.graph.node for name in node.output}
    places = {name: place for name, place in places.items() if place in made}
    sums = {name: ErrorSum() for name in places}
    plain, rounded = Runner(reference.model, places), Runner(simulated, places.values())
    for batch in batches:
        wanted, found = plain.run(batch), rounded.run(batch)
        for name, place in places.items():
            sums[name].add(wanted[name], found[place])
    result = []
    for node in reference.nodes:
        before = max((sums[name].relative for name in node.input if name in sums), default=0.0)
        peak = max((sums[name].peak for name in (*node.input, *node.output) if name in sums), default=0.0)
        for name in node.output:
            if name in sums:
                error = sums[name].relative
                # Behind an overflow all is infinite; of these nodes those overflow by themselves that exceed FP16 too.
                own = math.inf if math.isfinite(before) or peak > _FP16_LARGEST else 0.0
                added = error - before if math.isfinite(error) else own
                result.append(
                    LayerError(node.name, node.op_type, name, error, sums[name].snr_db, max(added, 0.0))
                )  # fmt: skip
    return result


def _place(name: str, tensors: Mapping[str, str], wide: Mapping[str, str]) -> str:
    low = tensors.get(name, name)
    return wide.get(low, low)


def output_errors(reference: onnx.ModelProto, model: onnx.ModelProto, batches: Iterable[Batch]) -> dict[str, ErrorSum]:
    """The error of every output. Raises as Runner."""
    plain, rounded = Runner(reference), Runner(rounding_model(model)[0])
    sums: dict[str, ErrorSum] = {}
    for batch in batches:
        wanted, found = plain.run(batch), rounded.run(batch)
        for name, array in wanted.items():
            sums.setdefault(name, ErrorSum()).add(array, found[name])
    return sums
