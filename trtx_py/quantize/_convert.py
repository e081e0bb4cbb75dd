"""From a float32 model and a word to a model of that precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from .._arguments import checked_path, replace_file
from .._errors import CalibrationError, InvalidArgumentError, PrecisionError
from ._calibration import Calibration, thresholds
from ._float_cast import Converted, cast_floats, prepared_for_casts
from ._graph import Graph
from ._measure import layer_errors, output_errors
from ._policy import CALIBRATED, CONVERTING, PrecisionPolicy
from ._qdq import activations, has_quantization, prepared, quantize, quantize_weights
from ._readers import Batch
from ._store import MAX_INLINE, ModelSource, inputs_of, load_model

if TYPE_CHECKING:
    import onnx

#: Batches that "automatic by measured error" measures on: each try runs the model on all of them.
_MEASURED_BATCHES = 4


@dataclass(frozen=True, eq=False)
class ConvertedModel:
    """An ONNX model of another precision. Inputs and outputs have the names and types that they had.

    Attributes:
        precision: the word.
        model: the ONNX model, as ``onnx.ModelProto``.
        changed: names of the nodes that compute in the precision now.
        kept: why each other node that could have been meant stayed in FP32, by its name.
        ranges: of "int8" and "fp8": the magnitude at which each quantized activation is clipped.
        tensors: the name in ``model`` of each inner tensor of the FP32 model that has another there.
    """

    precision: str
    model: onnx.ModelProto
    changed: frozenset[str]
    kept: Mapping[str, str]
    ranges: Mapping[str, float]
    tensors: Mapping[str, str]

    def serialized(self) -> bytes:
        """The model as bytes. Raises PrecisionError if it exceeds protobuf's 2 GiB."""
        if sum(len(tensor.raw_data) for tensor in self.model.graph.initializer) > MAX_INLINE:
            raise PrecisionError(
                "the converted model exceeds 2 GiB and cannot be one message; save it with "
                "onnx.save_model(converted.model, path, save_as_external_data=True)"
            )
        blob: bytes = self.model.SerializeToString()
        return blob

    def save(self, path: str) -> None:
        """Write the model to ``path`` in one step. Raises as ``serialized``, and InvalidArgumentError."""
        replace_file(checked_path(path, "path of the model"), self.serialized(), "converted model")


def convert(
    source: ModelSource,
    precision: str,
    *,
    calibration: Calibration | None = None,
    policy: PrecisionPolicy | None = None,
) -> ConvertedModel:
    """Make an FP16, BF16, INT8, FP8 or INT4-weight model of a float32 one. Blocks, for a calibration minutes at times.

    A build with ``precision=`` does this itself where TensorRT is strongly typed; here the model is yours to look at.

    Args:
        source: path of a model, whose external data lies beside it, or a serialized ModelProto.
        precision: "fp16", "bf16", "int8", "fp8" or "int4-weights".
        calibration: data for "int8" and "fp8"; for the others only with ``policy.max_relative_error``.
        policy: what stays in FP32; None takes the defaults of PrecisionPolicy.
    Raises:
        ParserError: not a model.
        PrecisionError: the model cannot have this precision; says why.
        CalibrationError: there are no ranges to be had from the data.
        InvalidArgumentError, DTypeError, ShapeError: an argument, or data that the model does not take.
        BackendUnavailableError: onnxruntime is not installed, and something is to be measured.
    """
    if precision not in CONVERTING:
        raise InvalidArgumentError(f"precision is {precision!r}; expected one of {', '.join(CONVERTING)}")
    model, sha256 = load_model(source)
    return convert_model(model, precision, sha256=sha256, calibration=calibration, policy=policy)


def convert_model(
    model: onnx.ModelProto,
    word: str,
    *,
    sha256: str,
    calibration: Calibration | None,
    policy: PrecisionPolicy | None,
    cancelled: Callable[[], bool] = lambda: False,
) -> ConvertedModel:
    """``convert`` for a model in memory; ``sha256`` is what the calibration cache knows it by."""
    chosen = PrecisionPolicy() if policy is None else policy
    _check_arguments(model, word, calibration, chosen)

    def prepare() -> Graph:
        return (prepared_for_casts if word in ("fp16", "bf16") else prepared)(model, word)

    graph = prepare()
    unknown = chosen.keep - {node.name for node in graph.nodes}
    if unknown:
        raise InvalidArgumentError(
            f"PrecisionPolicy.keep names {', '.join(sorted(unknown)[:5])}; the model has no such nodes (nodes without "
            "a name are called by operator and position, such as Conv_3)"
        )
    ranges: dict[str, float] = {}
    if word in CALIBRATED:
        assert calibration is not None
        ranges = _ranges(graph, word, calibration, chosen, sha256, cancelled)

    def attempt(policy: PrecisionPolicy) -> Converted:
        if word in ("fp16", "bf16"):
            return cast_floats(prepare(), word, policy)
        if word == "int4-weights":
            return quantize_weights(prepare(), policy)
        return quantize(prepare(), word, ranges, policy)

    found = attempt(chosen)
    if chosen.max_relative_error is not None:
        assert calibration is not None
        batches = list(islice(calibration.batches_for(inputs_of(model)), _MEASURED_BATCHES))
        found = _closer(graph, found, attempt, chosen, batches, cancelled)
        if not found.changed:
            raise PrecisionError(
                f"an output is within max_relative_error={chosen.max_relative_error} of the FP32 model only if no node "
                f"is {word} (values may leave its range); allow a larger error, or choose another precision"
            )
    if not found.changed:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(found.kept.items())[:4])
        raise PrecisionError(
            f"nothing in this model can be {word}: {reasons or 'it has no float32 nodes'}; build it with precision=None"
        )
    return ConvertedModel(word, found.model, found.changed, found.kept, ranges, found.tensors)


def _check_arguments(
    model: onnx.ModelProto, word: str, calibration: Calibration | None, policy: PrecisionPolicy
) -> None:
    if calibration is None and word in CALIBRATED:
        raise CalibrationError(
            f"precision={word!r} needs ranges for the activations: pass calibration=Calibration(data), or build from "
            "a model that has QuantizeLinear and DequantizeLinear nodes already"
        )
    if calibration is None and policy.max_relative_error is not None:
        raise InvalidArgumentError("max_relative_error is measured on data: pass calibration=Calibration(data) too")
    if word in (*CALIBRATED, "int4-weights") and has_quantization(model):
        raise InvalidArgumentError(
            f"the model has QuantizeLinear or DequantizeLinear nodes already, so it cannot be made {word}; build it "
            "without calibration, or start from the float32 model"
        )


def _ranges(
    graph: Graph,
    word: str,
    calibration: Calibration,
    policy: PrecisionPolicy,
    sha256: str,
    cancelled: Callable[[], bool],
) -> dict[str, float]:
    import onnx

    tensors = activations(graph, policy)
    if not tensors:
        raise PrecisionError(
            f"precision={word!r} quantizes {', '.join(sorted(policy.quantized))} in float32, and this model has "
            "none that the policy leaves to it; build it with another precision"
        )
    # A rewritten opset gives inner tensors names that depend on onnx's converter.
    key = f"{sha256}:{graph.opset}:{onnx.__version__}"
    return thresholds(calibration, graph.model, tensors, inputs_of(graph.model), model_sha256=key, cancelled=cancelled)


def _closer(
    reference: Graph,
    first: Converted,
    attempt: Callable[[PrecisionPolicy], Converted],
    policy: PrecisionPolicy,
    batches: Iterable[Batch],
    cancelled: Callable[[], bool],
) -> Converted:
    """With as few more nodes in FP32 as the measured error asks for; each try keeps half as many again."""
    limit = policy.max_relative_error
    assert limit is not None
    found, ranking = first, list[str]()
    count, tried = 1, 0
    while not cancelled():
        errors = output_errors(reference.model, found.model, batches)
        if max((error.relative for error in errors.values()), default=0.0) <= limit:
            return found
        if not ranking:
            added: dict[str, float] = {}
            for layer in layer_errors(reference, first, batches):
                if layer.node in first.changed:
                    added[layer.node] = max(added.get(layer.node, 0.0), layer.added)
            ranking = sorted(added, key=lambda name: -added[name]) + sorted(first.changed - added.keys())
        if tried >= len(ranking):
            raise PrecisionError(
                f"even with every node in FP32 an output is not within max_relative_error={limit} of the FP32 model"
            )
        try:
            found = attempt(dataclasses.replace(policy, keep=policy.keep | frozenset(ranking[:count])))
        except PrecisionError as error:
            raise PrecisionError(
                f"no conversion stays within max_relative_error={limit}: with {min(count, len(ranking))} nodes in FP32 "
                f"{error.message}"
            ) from error
        tried, count = count, count + max(1, count // 2)
    raise PrecisionError("the build was cancelled while it measured errors")
