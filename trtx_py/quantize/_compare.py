"""How far an engine is from the FP32 model it was built from, and where in the model that begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from .._aio import run_shielded
from .._arguments import checked_int
from .._errors import InvalidArgumentError, ShapeError
from .._types import Array
from ._calibration import Calibration, Data
from ._convert import convert_model
from ._float_cast import Converted, prepared_for_casts
from ._measure import ErrorSum, LayerError, layer_errors
from ._policy import CALIBRATED, PrecisionPolicy
from ._qdq import has_quantization, prepared
from ._reference import Runner
from ._store import ModelSource, inputs_of, load_model

if TYPE_CHECKING:
    import onnx

    from .._engine import Engine

#: Batches for which every inner tensor is compared.
_LAYER_BATCHES = 2


@dataclass(frozen=True)
class OutputError:
    """The error of one output over all data.

    Attributes:
        max_abs: largest magnitude of a difference.
        relative: norm of the difference divided by the norm of the FP32 output.
        snr_db: the same in decibels: 20 more for each digit that is right, infinite for no difference.
        top1: share of the rows whose largest entry (last axis) is at the same place; None for an output of integers or
            of one column.
        topk: share of the ``top_k`` largest entries that are in both; None as above.
        rows: how many rows were compared: entries of all axes but the last.
    """

    max_abs: float
    relative: float
    snr_db: float
    top1: float | None
    topk: float | None
    rows: int


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found.

    Attributes:
        outputs: the error of each output of the engine, by name.
        layers: the error of each float tensor inside the converted model, in the order of the graph; empty if that
            could not be had, see ``no_layers``.
        starts_at: the first of them whose relative error is more than ``layer_limit``; None if none is.
        adds_most: the one that added most to the error of its inputs; None without layers.
        no_layers: why there are no layers; empty if there are.
    """

    outputs: Mapping[str, OutputError]
    layers: tuple[LayerError, ...]
    starts_at: LayerError | None
    adds_most: LayerError | None
    no_layers: str

    def __str__(self) -> str:
        lines = [
            f"{name}: max {e.max_abs:.4g}, relative {e.relative:.4g}, SNR {e.snr_db:.1f} dB"
            + ("" if e.top1 is None else f", top-1 agrees for {e.top1:.2%} of {e.rows}")
            for name, e in self.outputs.items()
        ]
        if self.starts_at is not None:
            lines.append(f"the error starts at node {self.starts_at.node!r} ({self.starts_at.operator})")
        return "\n".join(lines)


async def compare(
    model: ModelSource,
    engine: Engine,
    data: Data,
    *,
    calibration: Calibration | None = None,
    policy: PrecisionPolicy | None = None,
    batches: int | None = None,
    batch_size: int = 8,
    top_k: int = 5,
    layer_limit: float = 0.01,
) -> Comparison:
    """Run an engine and its FP32 model (ONNX Runtime, on the CPU) on the same data, and compare.

    Args:
        model: the float32 ONNX model that the engine was built from: a path or bytes.
        engine: open; may serve others meanwhile.
        data: as ``Calibration.data``; not what the engine was calibrated with, if the result is to mean something.
        calibration, policy: those that the engine was built with. With them, or without for a precision that needs
            none, the model is converted again as for the build, and its inner tensors are compared too: as computed by
            ONNX Runtime, since TensorRT fuses them away.
        batches, batch_size: as in Calibration.
        top_k: how many of the largest entries of a row are compared.
        layer_limit: relative error from which on a layer counts as wrong.
    Raises:
        InvalidArgumentError, DTypeError, ShapeError: the data are not such as the model takes, or the outputs differ.
        BackendUnavailableError: onnxruntime is not installed.
        CalibrationError: ONNX Runtime cannot run the model.
        TrtxError: as ``Engine.infer_sync``.
    Cancellation: delivered once the comparison has ended; it changes nothing.
    """
    return await run_shielded(
        lambda: compare_sync(
            model, engine, data, calibration=calibration, policy=policy, batches=batches, batch_size=batch_size,
            top_k=top_k, layer_limit=layer_limit,
        )
    )  # fmt: skip


def compare_sync(
    model: ModelSource,
    engine: Engine,
    data: Data,
    *,
    calibration: Calibration | None = None,
    policy: PrecisionPolicy | None = None,
    batches: int | None = None,
    batch_size: int = 8,
    top_k: int = 5,
    layer_limit: float = 0.01,
) -> Comparison:
    """As ``compare``, blocking this thread."""
    checked_int(top_k, "top_k", minimum=1)
    limit: Any = layer_limit
    if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit > 0:
        raise InvalidArgumentError(f"layer_limit is {layer_limit!r}; expected a number above 0")
    loaded, sha256 = load_model(model)
    given = Calibration(data, batches=batches, batch_size=batch_size)
    rows = given.batches_for(inputs_of(loaded))
    reference = Runner(loaded)
    sums: dict[str, _OutputSum] = {}
    for batch in rows:
        wanted = reference.run(batch)
        found = engine.infer_sync(batch)
        if wanted.keys() != found.keys():
            raise InvalidArgumentError(
                f"the engine has the outputs {', '.join(sorted(found))} and the model {', '.join(sorted(wanted))}; "
                "give the model that the engine was built from"
            )
        for name, array in wanted.items():
            if array.shape != found[name].shape:
                raise ShapeError(
                    f"output {name!r} is {list(found[name].shape)} from the engine and {list(array.shape)} from the "
                    "model; give the model that the engine was built from"
                )
            sums.setdefault(name, _OutputSum(top_k)).add(array, found[name])
    sample = list(islice(rows, _LAYER_BATCHES))
    layers, reason = _layers(loaded, sha256, engine.plan_header.precision, calibration, policy, sample)
    return Comparison(
        outputs={name: total.result() for name, total in sums.items()},
        layers=tuple(layers),
        starts_at=next((layer for layer in layers if layer.relative_error > layer_limit), None),
        adds_most=max(layers, key=lambda layer: layer.added, default=None),
        no_layers=reason,
    )


def _layers(
    model: onnx.ModelProto,
    sha256: str,
    word: str | None,
    calibration: Calibration | None,
    policy: PrecisionPolicy | None,
    batches: list[Mapping[str, Array]],
) -> tuple[list[LayerError], str]:
    if word in (None, "fp32", "tf32"):
        return [], "the engine computes in the model's own types, so there is nothing to convert"
    if word in CALIBRATED and (calibration is None or has_quantization(model)):
        return (
            [],
            f"precision={word!r} has ranges that are not known here: give the calibration of the build",
        )
    assert word is not None
    if policy is None or policy.max_relative_error is None:
        calibration = calibration if word in CALIBRATED else None
    converted = convert_model(model, word, sha256=sha256, calibration=calibration, policy=policy)
    graph = (prepared_for_casts if word in ("fp16", "bf16") else prepared)(model, word)
    parts = Converted(converted.model, converted.changed, converted.kept, converted.tensors)
    return layer_errors(graph, parts, batches), ""


class _OutputSum:
    def __init__(self, top_k: int) -> None:
        self._error = ErrorSum()
        self._top_k = top_k
        self._rows = 0
        self._ranked = 0
        self._first = 0
        self._common = 0.0

    def add(self, wanted: Array, found: Array) -> None:
        self._error.add(wanted, found)
        columns = wanted.shape[-1] if wanted.ndim else 1
        rows = wanted.size // columns if columns else 0
        self._rows += rows
        if columns < 2 or wanted.dtype.kind in "iub" or not rows:
            return
        count = min(self._top_k, columns)
        # Stable, so that equal entries are ranked alike in both.
        ranks = [
            np.argsort(-a.astype(np.float64).reshape(rows, columns), axis=1, kind="stable")[:, :count]
            for a in (wanted, found)
        ]
        self._ranked += rows
        self._first += int((ranks[0][:, 0] == ranks[1][:, 0]).sum())
        matches = (ranks[0][:, :, None] == ranks[1][:, None, :]).any(axis=2)
        self._common += float(matches.mean(axis=1).sum())

    def result(self) -> OutputError:
        ranked = self._ranked
        return OutputError(
            max_abs=self._error.largest,
            relative=self._error.relative,
            snr_db=self._error.snr_db,
            top1=self._first / ranked if ranked else None,
            topk=self._common / ranked if ranked else None,
            rows=self._rows,
        )
