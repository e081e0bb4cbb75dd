"""The mock's network and ONNX parser: refuses what TensorRT's parser refuses, node by node."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from trtx_py._errors import BuilderError, ParserError, ParserIssue, TrtxError
from trtx_py._types import DataType, LayerPrecision, Severity, TensorInfo, TensorLocation, TensorMode
from trtx_py.network import LayerRequest, TensorFacts

from ._building import LayerGraph
from ._dtypes import Dim, onnx_type_name, tensor_dims, trt_type
from ._graph import (
    all_nodes,
    data_dependent,
    operands_not_constant,
    shape_tensors,
    weight_tensors,
    without_weights,
)
from ._layers import model_precisions
from ._operators import SUPPORTED, TABLE_VERSION
from ._seam import LiveObject, Seam
from ._shapes import infer

if TYPE_CHECKING:
    import onnx

__all__ = ["MockNetwork", "declared_dims"]

_WHERE = re.compile(r"op_type:\s*(?P<op>\w+)(?:,\s*node name:\s*(?P<node>[^)]*))?\)?:?\s*(?P<why>.*)", re.S)
_CODE_NODE = "INVALID_NODE"
_CODE_GRAPH = "INVALID_GRAPH"
_CODE_UNSUPPORTED = "UNSUPPORTED_NODE"

#: Limits of tensorrt-rtx 1.7, measured: 2**40 elements pass and 2**41 do not, 9 dimensions do not.
_MAX_RANK = 8
_MAX_DIMENSION = 2**31 - 1
_MAX_ELEMENTS = 2**40


def declared_dims(model: onnx.ModelProto) -> dict[str, tuple[Dim, ...]]:
    """Dimensions of every graph input that is not a weight: numbers, names, or None for a nameless one."""
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = (value for value in model.graph.input if value.name not in weights)
    return {value.name: tensor_dims(value.type.tensor_type) or () for value in inputs}


def _too_large(dims: Iterable[Dim]) -> str:
    """Why TensorRT cannot have a tensor of these dimensions; empty if it can. Dynamic ones count as 1."""
    sizes = [dim if isinstance(dim, int) else 1 for dim in dims]
    if len(sizes) > _MAX_RANK:
        return f"has {len(sizes)} dimensions, and TensorRT takes {_MAX_RANK}"
    if max(sizes, default=0) > _MAX_DIMENSION:
        return f"has a dimension of {max(sizes)}, and TensorRT takes {_MAX_DIMENSION}"
    if math.prod(sizes) > _MAX_ELEMENTS:
        return f"has {math.prod(sizes)} elements, and TensorRT takes {_MAX_ELEMENTS}"
    return ""


def _require_text(parsed: onnx.ModelProto) -> None:
    """ValueError for a name that is not UTF-8: protobuf hands that out as bytes, or raises, by implementation."""
    graph = parsed.graph
    names: list[object] = [v.name for v in (*graph.input, *graph.output, *graph.value_info, *graph.initializer)]
    for node in (*all_nodes(graph.node), *(n for f in parsed.functions for n in all_nodes(f.node))):
        names += [node.name, node.op_type, node.domain, *node.input, *node.output]
        names += [attribute.name for attribute in node.attribute]
    damaged = next((name for name in names if not isinstance(name, str)), None)
    if damaged is not None:
        raise ValueError(f"the name {damaged!r} is not UTF-8")


def _is_function(operator: str) -> bool:
    import onnx

    return onnx.defs.has(operator) and bool(getattr(onnx.defs.get_schema(operator), "has_function", False))


class MockNetwork(LiveObject):
    """BackendNetwork: one parsed ONNX model.

    Stricter than tensorrt-rtx 1.7 where that goes on with something else than the model says: onnx's own checker must
    accept the model; a tensor of unknown rank (taken for a scalar), an output that is also an input (the input gets
    another name), a declared output type that contradicts the nodes (ignored) and a dimension over 2**31 - 1 (may be
    cut to its low bits) are refused.

    Args:
        operators: "tensorrt" for the operators that the real parser imports, "any" for all that can be computed.
    """

    kind = "network"

    def __init__(self, seam: Seam, parent: LiveObject, operators: str) -> None:
        super().__init__(seam, parent)
        self._operators = operators
        self._model: onnx.ModelProto | None = None
        self._tensors: tuple[TensorInfo, ...] = ()
        self._layers: LayerGraph | None = None

    @property
    def model(self) -> onnx.ModelProto:
        """The model with its weights, parsed or built of layers. Raises BuilderError before there is one."""
        self._finish()
        if self._model is None:
            raise BuilderError("the network is empty: parse_onnx() must succeed before it can be built")
        return self._model

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        self._finish()
        return tuple(t for t in self._tensors if t.mode is TensorMode.INPUT)

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        self._finish()
        return tuple(t for t in self._tensors if t.mode is TensorMode.OUTPUT)

    @property
    def num_layers(self) -> int:
        """Nodes of the main graph that compute something; TensorRT's own count differs, it splits and merges nodes."""
        if self._layers is not None:
            return self._layers.num_layers
        return 0 if self._model is None else sum(n.op_type != "Constant" for n in self._model.graph.node)

    def layer_precisions(self) -> tuple[LayerPrecision, ...]:
        """One layer for each node; TensorRT's parser splits and merges some."""
        self._finish()
        return () if self._model is None else model_precisions(self._model)

    def add_input(self, facts: TensorFacts) -> None:
        self._building("add_input").add_input(facts)

    def add_layer(self, request: LayerRequest) -> tuple[TensorFacts, ...]:
        """See BackendNetwork. The outputs are what ONNX makes of the layer."""
        return self._building("add_layer").add_layer(request)

    def mark_output(self, facts: TensorFacts, name: str) -> None:
        self._building("mark_output").outputs[name] = facts

    def unmark_output(self, facts: TensorFacts) -> None:
        outputs = self._building("unmark_output").outputs
        for name in [name for name, one in outputs.items() if one == facts]:
            del outputs[name]

    def set_layer_type(self, request: LayerRequest, output: int | None, dtype: DataType) -> None:
        """Refused, as by a strongly typed TensorRT."""
        raise BuilderError(
            f"the mock is strongly typed: the type of {request} follows from its inputs; put add_cast before or after"
        )

    def _building(self, call: str) -> LayerGraph:
        """The graph to change; what was made of it before no longer counts."""
        self._alive(call, lambda text, log: BuilderError(text, tensorrt_log=log))
        self._seam.enter(call, lambda text, log: BuilderError(text, tensorrt_log=log))
        if self._layers is None:
            self._layers = LayerGraph()
        self._model, self._tensors = None, ()
        return self._layers

    def _finish(self) -> None:
        """Make the model that the layers amount to, checked as a parsed one is."""
        if self._layers is None or self._model is not None or not self._layers.outputs:
            return
        model = self._layers.model("network")
        self._tensors = self._checked(model)
        self._model = model

    def parse_onnx(self, model: bytes, directory: str | None) -> None:
        """Parse and check a serialized ModelProto; see BackendNetwork. Raises ParserError with every issue."""
        self._alive("parse_onnx", lambda text, log: ParserError(text, tensorrt_log=log))
        self._seam.enter("parse_onnx", lambda text, log: ParserError(text, tensorrt_log=log))
        if self._model is not None:
            raise ParserError("a network takes one model; create another network for the next")
        try:
            parsed = self._load(model, directory)
            tensors = self._checked(parsed)
        except TrtxError:
            raise
        except Exception as error:
            # names that are not UTF-8, enumerators that do not exist: onnx and protobuf raise what they happen to meet
            reason = f"the model is damaged: onnx met {type(error).__name__}: {error}"
            raise self._failure([ParserIssue(reason, code=_CODE_GRAPH)]) from error
        self._tensors = tensors
        self._model = parsed

    def _checked(self, parsed: onnx.ModelProto) -> tuple[TensorInfo, ...]:
        """The I/O of a model that passes every check. Raises ParserError with what the first failing ones found."""
        _require_text(parsed)
        issues = self._check_weights(parsed)
        issues += self._check_tensors(parsed)
        issues += self._check_operators(parsed)
        issues = issues or self._check_graph(parsed)
        issues = issues or self._check_shape_tensors(parsed)
        issues = issues or self._check_constants(parsed)
        issues = issues or self._check_types(parsed)
        if issues:
            raise self._failure(issues)
        return self._describe(parsed)

    def _load(self, data: bytes, directory: str | None) -> onnx.ModelProto:
        import onnx
        from google.protobuf.message import DecodeError

        parsed = onnx.ModelProto()
        try:
            parsed.ParseFromString(data)
            empty = not parsed.HasField("graph")
        except DecodeError:
            empty = True
        if empty:
            reason = "Failed to parse the ONNX model: the bytes are not a serialized onnx.ModelProto with a graph."
            raise self._failure([ParserIssue(reason, code="MODEL_DESERIALIZE_FAILED")])
        try:
            self._load_weights(parsed, directory)
        except (OSError, ValueError, onnx.checker.ValidationError) as error:
            raise self._failure([ParserIssue(f"external weights: {error}", code="MODEL_DESERIALIZE_FAILED")]) from error
        return parsed

    def _load_weights(self, parsed: onnx.ModelProto, directory: str | None) -> None:
        import onnx

        outside = [t.name for t in parsed.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        if outside and directory is None:
            raise ValueError(
                f"{len(outside)} weights ({outside[0]!r}, ...) lie in other files, and no directory was given; "
                "parse from a path, or pass the directory"
            )
        if outside and directory is not None:
            onnx.load_external_data_for_model(parsed, directory)

    def _check_weights(self, parsed: onnx.ModelProto) -> list[ParserIssue]:
        import onnx

        names = Counter(tensor.name for tensor in parsed.graph.initializer)
        issues = [
            ParserIssue(f"Failed to import initializer: ONNX graph has duplicate tensor name: {name}", code=_CODE_GRAPH)
            for name, count in names.items()
            if count > 1
        ]
        for tensor in weight_tensors(parsed.graph):
            reason = _too_large(tensor.dims)
            if tensor.data_type not in onnx.TensorProto.DataType.values() or not tensor.data_type:
                reason = f"has element type {tensor.data_type}, which ONNX does not define"
            if reason:
                issues.append(ParserIssue(f"Failed to import initializer: {tensor.name!r} {reason}", code=_CODE_GRAPH))
        return issues

    def _check_tensors(self, parsed: onnx.ModelProto) -> list[ParserIssue]:
        weights = {tensor.name for tensor in parsed.graph.initializer}
        issues = []
        inputs = [value for value in parsed.graph.input if value.name not in weights]
        names = Counter(value.name for value in [*inputs, *parsed.graph.output])
        for name in [name for name, count in names.items() if count > 1]:
            reason = f"{name!r} is more than one of the inputs and outputs; put an Identity between, with another name"
            issues.append(ParserIssue(reason, code=_CODE_GRAPH))
        for role, value in [*(("input", v) for v in inputs), *(("output", v) for v in parsed.graph.output)]:
            kind = value.type.WhichOneof("value")
            if kind is not None and kind != "tensor_type":
                reason = (
                    f"{role} {value.name!r} is a {kind.removesuffix('_type')}; TensorRT has only tensors at its border"
                )
                issues.append(ParserIssue(reason, code=_CODE_UNSUPPORTED))
                continue
            elem = value.type.tensor_type.elem_type
            if elem and trt_type(elem) is None:
                reason = f"{role} {value.name!r} has ONNX type {onnx_type_name(elem)}, which no TensorRT type matches"
                issues.append(ParserIssue(f"{reason}; cast it outside the model", code=_CODE_UNSUPPORTED))
            elif role == "input" and tensor_dims(value.type.tensor_type) is None:
                reason = f"input {value.name!r} has no rank; declare its shape, with names for dynamic dimensions"
                issues.append(ParserIssue(reason, code=_CODE_GRAPH))
            reason = _too_large(tensor_dims(value.type.tensor_type) or ())
            if reason:
                issues.append(ParserIssue(f"{role} {value.name!r} {reason}", code=_CODE_UNSUPPORTED))
        return issues

    def _check_operators(self, parsed: onnx.ModelProto) -> list[ParserIssue]:
        if self._operators == "any":
            return []
        local = {(function.domain, function.name) for function in parsed.functions}
        nodes = [*all_nodes(parsed.graph.node), *(n for f in parsed.functions for n in all_nodes(f.node))]
        issues = []
        for node in nodes:
            if (node.domain, node.op_type) in local:
                continue
            if node.op_type in SUPPORTED:
                if node.domain not in ("", "ai.onnx", "com.microsoft"):
                    # the real parser goes by the name alone; computing needs the operator's own domain
                    node.domain = ""
                continue
            if node.domain in ("", "ai.onnx"):
                reason = f"operator {node.op_type} is not imported by the ONNX parser of tensorrt-rtx {TABLE_VERSION}"
                issues.append(ParserIssue(reason, node.name, node.op_type, _CODE_UNSUPPORTED))
            else:
                reason = (
                    f"no plugin creator for operator {node.op_type} of domain {node.domain!r}: "
                    "Plugin not found, are the plugin name, version, and namespace correct?"
                )
                issues.append(ParserIssue(reason, node.name, node.op_type, _CODE_NODE))
        return issues

    def _check_graph(self, parsed: onnx.ModelProto) -> list[ParserIssue]:
        import onnx

        if not parsed.graph.output:
            return []  # the parser accepts this, the build does not
        try:
            onnx.checker.check_model(without_weights(parsed))
        except onnx.checker.ValidationError as error:
            return [ParserIssue(" ".join(str(error).split()), code=_CODE_GRAPH)]
        return []

    def _check_shape_tensors(self, parsed: onnx.ModelProto) -> list[ParserIssue]:
        import onnx

        integers = (onnx.TensorProto.INT32, onnx.TensorProto.INT64)
        issues = []
        wanted = shape_tensors(parsed.graph)
        for value in parsed.graph.input:
            if value.name not in wanted:
                continue
            elem = value.type.tensor_type.elem_type
            dims = tensor_dims(value.type.tensor_type) or ()
            if elem not in integers:
                reason = (
                    f"Network input {value.name} is a shape tensor and must have type Int32 or Int64. "
                    f"Type is {onnx_type_name(elem)}."
                )
                issues.append(ParserIssue(reason, code=_CODE_NODE))
            elif len(dims) > 1 or any(not isinstance(dim, int) for dim in dims):
                reason = (
                    f"shape tensor {value.name} has dimensions {list(dims)}; it must be a scalar or of fixed length"
                )
                issues.append(ParserIssue(reason, code=_CODE_NODE))
        return issues

    def _check_constants(self, parsed: onnx.ModelProto) -> list[ParserIssue]:
        if self._operators == "any":
            return []
        reason = "operand {!r} must resolve to a build-time constant (an initializer, or what can be folded into one)"
        return [
            ParserIssue(reason.format(name), node.name, node.op_type, _CODE_UNSUPPORTED)
            for node, name in operands_not_constant(parsed.graph)
        ]

    def _check_types(self, parsed: onnx.ModelProto) -> list[ParserIssue]:
        from onnx import shape_inference

        light = without_weights(parsed)
        for output in light.graph.output:
            output.type.tensor_type.ClearField("shape")  # TensorRT, too, goes by what follows from the inputs
        try:
            infer(light, strict=True)
        except shape_inference.InferenceError as error:
            text = " ".join(str(error).split())
            issues = []
            for part in text.split("(op_type:")[1:]:
                found = _WHERE.match("op_type:" + part)
                if found is not None:
                    if _is_function(found["op"]) and "typestr" not in found["why"]:
                        break  # strict inference fails inside functions that are sound; the rest is from inside
                    node, why = (found["node"] or "").strip(), found["why"].strip()
                    issues.append(ParserIssue(f"Invalid Node - {node}: {why}", node, found["op"], _CODE_NODE))
            if not issues and "(op_type:" not in text:
                issues.append(ParserIssue(text, code=_CODE_GRAPH))
            return issues
        return []

    def _describe(self, parsed: onnx.ModelProto) -> tuple[TensorInfo, ...]:
        shape_names = shape_tensors(parsed.graph)
        inputs = declared_dims(parsed)
        types = {value.name: value.type.tensor_type for value in [*parsed.graph.input, *parsed.graph.output]}
        light = without_weights(parsed)
        for output in light.graph.output:
            output.ClearField("type")
        known_types = infer(light).graph
        if self._operators != "any":
            ranks = ((v.name, len(v.type.tensor_type.shape.dim)) for v in known_types.value_info)
            issues = [
                ParserIssue(f"{name!r} has {rank} dimensions, and TensorRT takes {_MAX_RANK}", code=_CODE_NODE)
                for name, rank in ranks
                if rank > _MAX_RANK
            ]
            if issues:
                raise self._failure(issues)
        inferred = {value.name: value.type.tensor_type for value in known_types.output}
        decided = {value.name for value in parsed.graph.output} if shape_names else data_dependent(parsed.graph)
        tensors = []
        for name, dims in inputs.items():
            dtype = trt_type(types[name].elem_type)
            if dtype is None:
                raise self._failure([ParserIssue(f"input {name!r} has no element type", code=_CODE_GRAPH)])
            if onnx_type_name(types[name].elem_type) == "DOUBLE":
                self._seam.log(Severity.WARNING, f"input {name} is DOUBLE; TensorRT reads it as FLOAT")
            host = name in shape_names
            location = TensorLocation.HOST if host else TensorLocation.DEVICE
            shape = tuple(d if isinstance(d, int) else -1 for d in dims)
            tensors.append(TensorInfo(name, TensorMode.INPUT, dtype, shape, location, host))
        for value in parsed.graph.output:
            found, declared = inferred[value.name], types[value.name]
            if found.elem_type and declared.elem_type and found.elem_type != declared.elem_type:
                said, made = onnx_type_name(declared.elem_type), onnx_type_name(found.elem_type)
                reason = f"output {value.name!r} is declared {said}, but the nodes make {made} of it"
                raise self._failure([ParserIssue(reason, code=_CODE_GRAPH)])
            dtype = trt_type(found.elem_type or declared.elem_type)
            dims_or_none = tensor_dims(found)
            known = tensor_dims(declared)
            if dims_or_none is None:
                dims_or_none = known
            elif known is not None and len(known) == len(dims_or_none) and value.name not in decided:
                # inference knows less than TensorRT's; a declared number fills its gaps, unless a value may decide it
                dims_or_none = tuple(a if isinstance(a, int) else b for a, b in zip(dims_or_none, known, strict=True))
            if dtype is None or dims_or_none is None:
                reason = f"type or rank of output {value.name!r} is unknown; declare it in the model"
                raise self._failure([ParserIssue(reason, code=_CODE_GRAPH)])
            shape = tuple(d if isinstance(d, int) else -1 for d in dims_or_none)
            tensors.append(TensorInfo(value.name, TensorMode.OUTPUT, dtype, shape))
        return tuple(tensors)

    def _failure(self, issues: list[ParserIssue]) -> ParserError:
        lines = []
        for issue in issues:
            where = f"While parsing node {issue.node!r} [{issue.operator}]: " if issue.operator else ""
            line = f"ModelImporter: ERROR: {where}[{issue.code}] {issue.reason}"
            self._seam.log(Severity.ERROR, line)
            lines.append(line)
        problems = "1 problem" if len(issues) == 1 else f"{len(issues)} problems"
        return ParserError(f"the ONNX model could not be parsed: {problems}", issues=issues, tensorrt_log=lines)
