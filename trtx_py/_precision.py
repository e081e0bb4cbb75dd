"""A build's precision: the model converted before it where TensorRT is strongly typed, and read back after it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ._errors import BackendUnavailableError, BuilderError, InvalidArgumentError, PrecisionError
from ._onnx_source import OnnxSource
from ._types import BackendInfo, BuildOptions, LayerPrecision, TensorInfo
from .backends.protocols import BackendBuilder, BackendNetwork

if TYPE_CHECKING:
    import onnx

    from .quantize import Calibration, PrecisionPolicy

#: The GPU architecture that each word needs at least (TensorRT-RTX 1.7 refuses older ones; measured).
_NEEDS = {"bf16": (8, 0), "fp8": (8, 9), "int4-weights": (8, 0)}
#: Words that are Q/DQ nodes on every version: no flag alone makes them.
_ALWAYS_CONVERTED = ("fp8", "int4-weights")
_CONVERTED = ("fp16", "bf16", "int8", *_ALWAYS_CONVERTED)
_SHOWN = 8
_NOT_COMPUTING = frozenset({"CAST", "CONSTANT", "DEQUANTIZE", "IDENTITY", "QUANTIZE"})


@dataclass(frozen=True)
class PrecisionRequest:
    """What a config says about precision; see BuilderConfig."""

    word: str | None = None
    calibration: Calibration | None = None
    policy: PrecisionPolicy | None = None
    required: bool = False


@dataclass(frozen=True)
class ReadyNetwork:
    """What to build, and how it is to be read back.

    Attributes:
        native: the network: the caller's own, or one of the converted model.
        options: for the backend.
        kept: names of nodes that stayed in FP32 by the conversion's rules, those inside control flow among them.
        changed: names of nodes that the conversion changed.
        expands: TensorRT makes layers without a name of some of them.
    """

    native: BackendNetwork
    options: BuildOptions
    kept: frozenset[str] = frozenset()
    changed: frozenset[str] = frozenset()
    expands: bool = False


@contextmanager
def ready_network(
    builder: BackendBuilder,
    native: BackendNetwork,
    source: OnnxSource,
    info: BackendInfo,
    options: BuildOptions,
    request: PrecisionRequest,
    *,
    targets: Sequence[str],
    cancelled: Callable[[], bool],
) -> Iterator[ReadyNetwork]:
    """Convert the model if this TensorRT takes precisions from it alone; what was made is destroyed behind the block.

    Args:
        targets: compute capabilities that are built for; empty if that is not known.
    Raises:
        PrecisionError: this version, this GPU or this model cannot have it.
        CalibrationError, InvalidArgumentError, DTypeError, ShapeError, BackendUnavailableError: as
            ``quantize.convert``.
        ParserError: TensorRT's parser does not take the converted model.
    """
    word = request.word
    _check_request(info, request)
    _check_targets(info, word, targets)
    if word not in _CONVERTED:
        yield ReadyNetwork(native, options)
        return
    if not info.strongly_typed and word not in _ALWAYS_CONVERTED:
        yield ReadyNetwork(native, _weakly(info, source, options, request, native.inputs))
        return
    from .quantize._convert import convert_model
    from .quantize._graph import whole_nodes
    from .quantize._qdq import has_quantization
    from .quantize._store import model_of, stored

    model = model_of(source)
    # The flags of a weakly typed version still have to allow the type.
    options = replace(options, precision=None if info.strongly_typed else word)
    if word in ("int8", "fp8", "int4-weights") and request.calibration is None and has_quantization(model):
        yield ReadyNetwork(native, options)
        return
    converted = convert_model(
        model, word, sha256=source.sha256, calibration=request.calibration, policy=request.policy, cancelled=cancelled
    )
    if cancelled():
        raise BuilderError("the build was cancelled")
    inner = whole_nodes(model.graph)
    kept, expands = inner | converted.kept.keys() - converted.changed, bool(inner - converted.changed)
    del model
    network = builder.create_network()
    try:
        with stored(converted.model) as (blob, folder):
            network.parse_onnx(blob, folder)
            _check_border(native, network, word)
            yield ReadyNetwork(network, options, kept, converted.changed, expands)
    finally:
        network.destroy()


def _check_request(info: BackendInfo, request: PrecisionRequest) -> None:
    word, policy = request.word, request.policy
    if request.required and word is None:
        raise InvalidArgumentError("require_precision needs a precision to require; set precision too")
    measured = policy is not None and policy.max_relative_error is not None
    if request.calibration is not None and not (word in ("int8", "fp8") or (measured and word in _CONVERTED)):
        raise InvalidArgumentError(
            f"calibration is for precision 'int8' and 'fp8', and for PrecisionPolicy.max_relative_error; precision is "
            f"{word!r}: leave calibration out"
        )
    if policy is None:
        return
    if word not in _CONVERTED:
        raise InvalidArgumentError(
            f"precision_policy says what stays in FP32 of a conversion, and precision={word!r} converts nothing; leave "
            "it out"
        )
    if not info.strongly_typed and word not in _ALWAYS_CONVERTED:
        raise InvalidArgumentError(
            f"{info.name} {info.version} is weakly typed and chooses the precision of each layer itself, so it cannot "
            "keep a precision_policy; convert the model with trtx_py.quantize.convert(), and build it with "
            "precision=None"
        )


def _check_targets(info: BackendInfo, word: str | None, targets: Sequence[str]) -> None:
    needed = _NEEDS.get(word or "")
    if needed is None:
        return
    for target in targets:
        major, _, minor = target.partition(".")
        if (int(major), int(minor)) < needed:
            raise PrecisionError(
                f"{info.name} {info.version} cannot build precision={word!r} for compute capability {target}: it needs "
                f"{needed[0]}.{needed[1]} or later; choose another precision, or leave that GPU out"
            )


def _weakly(
    info: BackendInfo,
    source: OnnxSource,
    options: BuildOptions,
    request: PrecisionRequest,
    inputs: tuple[TensorInfo, ...],
) -> BuildOptions:
    """Flags do it; TensorRT's own calibrator finds the ranges."""
    options = replace(options, inspectable=request.required)
    if request.calibration is None:
        return options
    from .quantize._calibrator import TensorRTCalibrator
    from .quantize._qdq import has_quantization
    from .quantize._store import model_of

    model: onnx.ModelProto = model_of(source)
    if has_quantization(model):
        raise InvalidArgumentError(
            "the model has QuantizeLinear or DequantizeLinear nodes already, so TensorRT does not calibrate it; leave "
            "calibration out, or start from the float32 model"
        )
    title = f"{info.name} {info.version}"
    return replace(options, calibrator=TensorRTCalibrator(request.calibration, inputs, source.sha256, title))


def _check_border(before: BackendNetwork, after: BackendNetwork, word: str) -> None:
    for old, new in ((before.inputs, after.inputs), (before.outputs, after.outputs)):
        wanted = {t.name: (t.dtype, t.shape) for t in old}
        found = {t.name: (t.dtype, t.shape) for t in new}
        if wanted != found:
            changed = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
            raise PrecisionError(
                f"converting to precision={word!r} changed the inputs or outputs {', '.join(changed)}: "
                f"{[wanted.get(n) for n in changed]} became {[found.get(n) for n in changed]}; convert the model with "
                "trtx_py.quantize.convert() and look at it"
            )


def read_back(
    info: BackendInfo,
    ready: ReadyNetwork,
    request: PrecisionRequest,
    inspect: Callable[[], tuple[LayerPrecision, ...]],
) -> tuple[LayerPrecision, ...]:
    """The layers of what was built, checked if the request says so.

    Args:
        inspect: loads the plan and asks the engine inspector; called where the network does not decide.
    Raises:
        PrecisionError: ``require_precision`` does not hold, or cannot be known here.
    """
    if request.word is None:
        return ()
    if not info.strongly_typed and not request.required:
        return ()
    layers = ready.native.layer_precisions() if info.strongly_typed else _inspected(info, inspect)
    if request.required:
        _require(info, layers, request.word, ready)
    return layers


def _inspected(info: BackendInfo, inspect: Callable[[], tuple[LayerPrecision, ...]]) -> tuple[LayerPrecision, ...]:
    title = f"{info.name} {info.version}"
    try:
        layers = inspect()
    except BackendUnavailableError as error:
        raise PrecisionError(
            f"require_precision: {title} chooses the precision of each layer itself, and the plan cannot be loaded "
            f"here to see what it chose ({error.message}); build on a machine with a GPU, or without require_precision"
        ) from error
    if not layers:
        raise PrecisionError(f"require_precision: the engine inspector of {title} tells no layer's types for this plan")
    return layers


def _require(info: BackendInfo, layers: Sequence[LayerPrecision], word: str, ready: ReadyNetwork) -> None:
    heavy = [layer for layer in layers if layer.multiplies]
    judged = heavy or [layer for layer in layers if layer.dtype is not None]
    wrong = [layer for layer in judged if not layer.computes_in(word)]
    right = len(judged) - len(wrong)
    if heavy:
        wrong = [layer for layer in wrong if not _is_excused(layer.name, ready)]
    elif right:
        wrong = []  # without a product, casts and shapes stand beside whatever was converted
    if right and not wrong:
        return
    problems = [
        f"{layer.kind} {layer.name!r} computes in {layer.dtype.name if layer.dtype else 'no float type'}"
        for layer in wrong[:_SHOWN]
    ]
    if len(wrong) > _SHOWN:
        problems.append(f"and {len(wrong) - _SHOWN} more")
    raise PrecisionError(
        f"require_precision: {info.name} {info.version} was asked for {word!r}, and {right} of {len(judged)} layers "
        f"{'that multiply ' if heavy else ''}compute in it; look at the conversion with trtx_py.quantize.convert(), or "
        "build without require_precision",
        problems=problems,
    )


def _is_excused(layer: str, ready: ReadyNetwork) -> bool:
    """It was made of a node that stayed in FP32: TensorRT names it after that, sometimes with more behind."""
    if ready.expands and layer.startswith("(Unnamed Layer"):
        return True
    if layer in ready.changed:
        return False  # its name may begin with that of another node
    return any(layer == node or layer.startswith((f"{node} ", f"{node}_", f"{node}:")) for node in ready.kept if node)


def counted(layers: Sequence[LayerPrecision]) -> dict[str, int]:
    """How many layers compute in each type, by its name; constants, conversions and integers are left out."""
    computing = [layer.dtype for layer in layers if layer.kind not in _NOT_COMPUTING]
    return dict(sorted(Counter(dtype.name for dtype in computing if dtype is not None).items()))
