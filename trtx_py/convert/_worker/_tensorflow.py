"""TensorFlow, Keras and TensorFlow Lite to ONNX, through tf2onnx."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from ._task import RefusedError, Spec, Task, need, random_samples

_DEFAULT_OPSET = 17
#: What an axis of unknown size gets in random inputs: the leading one is nearly always the batch.
_BATCH, _SIZE = 2, 32


def convert(task: Task) -> None:
    """Write ``task.output``, and samples of what the source computes."""
    with task.step("load", f"loading {task.label}"):
        tf = need("tensorflow", "tensorflow", f"converting {task.format}")
        tf2onnx = need("tf2onnx", "tensorflow", f"converting {task.format}")
        if task.dynamic_axes:
            raise RefusedError("a TensorFlow model has its dynamic axes already; leave out dynamic_axes=")
        loaded = _LOADERS[task.format](tf, task)
    opset = task.opset or _DEFAULT_OPSET
    with task.step("export", "exporting with tf2onnx"):
        model = loaded.export(tf2onnx, opset)
        _replace_erfc(model.graph)
        _require_converted(model.graph, opset)
        with open(task.output, "wb") as file:
            file.write(model.SerializeToString())
    task.producer = f"tensorflow {tf.__version__} (tf2onnx {tf2onnx.__version__})"
    with task.step("reference", "running the source on random inputs"):
        specs = task.specs_of(loaded.specs)
        task.reference_all(random_samples(specs), loaded.run)


def _replace_erfc(graph: Any) -> None:
    """``erfc(x) = 1 - erf(x)``: tf2onnx leaves Erfc as it is, and Keras makes gelu of it."""
    from onnx import TensorProto, helper

    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    nodes: list[Any] = []
    for node in graph.node:
        if node.op_type != "Erfc" or node.domain:
            nodes.append(node)
            continue
        one, erf = f"{node.output[0]}/one", f"{node.output[0]}/erf"
        kind = types.get(node.input[0]) or TensorProto.FLOAT
        graph.initializer.append(helper.make_tensor(one, kind, [], [1.0]))
        nodes.append(helper.make_node("Erf", [node.input[0]], [erf], name=erf))
        nodes.append(helper.make_node("Sub", [one, erf], list(node.output), name=node.name))
    copies = [helper.make_node("Identity", ["x"], ["y"]) for _ in nodes]
    for copy, node in zip(copies, nodes, strict=True):
        copy.CopyFrom(node)
    del graph.node[:]
    graph.node.extend(copies)


def _require_converted(graph: Any, opset: int) -> None:
    """tf2onnx leaves the operators that it does not know in the graph, and only logs that."""
    from onnx import defs

    unknown = {node.op_type for node in graph.node if not node.domain and not defs.has(node.op_type, opset)}
    if unknown:
        raise RefusedError(
            f"tf2onnx has no ONNX for {', '.join(sorted(unknown))} (opset {opset}); change these layers, try a higher "
            "opset=, or convert the model from another of its formats", "failed",
        )  # fmt: skip


class _Function:
    """A tf.function, or what can be wrapped in one."""

    def __init__(self, tf: Any, call: Callable[..., Any], signature: Sequence[Any]) -> None:
        self._tf = tf
        self._signature = tuple(signature)
        self._function = tf.function(call, input_signature=self._signature)
        self.specs = [_spec(one.name, one.shape, one.dtype.name) for one in self._signature]

    def export(self, tf2onnx: Any, opset: int) -> Any:
        model, _ = tf2onnx.convert.from_function(self._function, input_signature=self._signature, opset=opset)
        return model

    def run(self, sample: Any) -> list[Any]:
        found = self._function(*(self._tf.constant(sample[one.name]) for one in self._signature))
        return [tensor.numpy() for tensor in self._tf.nest.flatten(found)]


def _spec(name: str, shape: Any, dtype: str) -> Spec:
    if shape.rank is None:
        raise RefusedError(f"the rank of input {name!r} is not known; export the model again with a shape")
    sizes = shape.as_list()
    return Spec(
        name,
        tuple((_BATCH if axis == 0 else _SIZE) if n is None else n for axis, n in enumerate(sizes)),
        dtype,
        axes={axis: f"{name}_{axis}" for axis, n in enumerate(sizes) if n is None},
    )


def _load_keras(tf: Any, task: Task) -> _Function:
    try:
        model = tf.keras.models.load_model(task.source, compile=False, safe_mode=not task.trust)
    except ValueError as error:
        text = str(error)
        if "safe_mode" in text or "enable_unsafe_deserialization" in text:
            raise RefusedError(
                f"the model holds Python code of its own ({text.partition(chr(10))[0][:200]}), which can do whatever "
                "this user can; pass trust=True if you know where it comes from"
            ) from error
        raise RefusedError(f"Keras cannot load it: {text[:500]}", "damaged") from error
    except OSError as error:
        raise RefusedError(f"Keras cannot read it: {error}; copy the file again", "damaged") from error
    signature = [tf.TensorSpec(one.shape, one.dtype, name=one.name) for one in model.inputs]
    structure = model._inputs_struct if hasattr(model, "_inputs_struct") else list(model.inputs)

    def call(*values: Any) -> Any:
        return model(tf.nest.pack_sequence_as(structure, list(values)), training=False)

    return _Function(tf, call, signature)


def _load_saved_model(tf: Any, task: Task) -> _Function:
    folder = task.source if os.path.isdir(task.source) else os.path.dirname(os.path.abspath(task.source))
    try:
        loaded = tf.saved_model.load(folder)
    except (OSError, ValueError) as error:
        raise RefusedError(
            f"TensorFlow cannot load the SavedModel: {error}; copy its folder again", "damaged"
        ) from error
    name = str(task.options.get("signature", "serving_default"))
    if name not in loaded.signatures:
        raise RefusedError(
            f"the SavedModel has no signature {name!r}; it has {', '.join(loaded.signatures) or 'none'}: choose one "
            "with options={'signature': ...}"
        )
    chosen = loaded.signatures[name]
    inputs = chosen.structured_input_signature[1]
    signature = [tf.TensorSpec(one.shape, one.dtype, name=key) for key, one in inputs.items()]

    def call(*values: Any) -> Any:
        return chosen(**dict(zip(inputs, values, strict=True)))

    function = _Function(tf, call, signature)
    function.keep = loaded  # type: ignore[attr-defined]  # its variables live as long as it does
    return function


def _load_graph(tf: Any, task: Task) -> _Function:
    definition = tf.compat.v1.GraphDef()
    with open(task.source, "rb") as file:
        try:
            definition.ParseFromString(file.read())
        except Exception as error:  # protobuf's DecodeError, by whichever implementation
            raise RefusedError(f"it is no whole GraphDef: {error}; copy the file again", "damaged") from error
    graph = tf.Graph()
    with graph.as_default():
        tf.import_graph_def(definition, name="")
    inputs = _tensors(graph, task, "input_names", _placeholders(graph))
    outputs = _tensors(graph, task, "output_names", _sinks(graph))
    pruned = tf.compat.v1.wrap_function(lambda: tf.import_graph_def(definition, name=""), []).prune(inputs, outputs)
    names = [name.partition(":")[0].replace("/", "_") for name in inputs]
    signature = [
        tf.TensorSpec(graph.get_tensor_by_name(tensor).shape, graph.get_tensor_by_name(tensor).dtype, name=name)
        for tensor, name in zip(inputs, names, strict=True)
    ]
    return _Function(tf, lambda *values: pruned(*values), signature)


def _tensors(graph: Any, task: Task, option: str, found: list[str]) -> list[str]:
    given = task.options.get(option)
    names = found if given is None else [name if ":" in name else f"{name}:0" for name in given]
    if not names:
        raise RefusedError(
            f"the graph's {option.replace('_', ' ')} could not be told; give options={{{option!r}: [...]}}"
        )
    for name in names:
        try:
            graph.get_tensor_by_name(name)
        except (KeyError, ValueError) as error:
            raise RefusedError(f"{option}: {error}") from error
    return names


def _placeholders(graph: Any) -> list[str]:
    return [op.outputs[0].name for op in graph.get_operations() if op.type == "Placeholder"]


def _sinks(graph: Any) -> list[str]:
    """Outputs that nothing reads."""
    idle = {"Const", "NoOp", "Placeholder", "Assert"}
    return [
        output.name
        for op in graph.get_operations()
        if op.type not in idle and not any(output.consumers() for output in op.outputs)
        for output in op.outputs
    ]


class _Lite:
    """A TensorFlow Lite model, which tf2onnx reads by itself."""

    def __init__(self, tf: Any, path: str) -> None:
        self._path = path
        try:
            self._interpreter = tf.lite.Interpreter(model_path=path)
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise RefusedError(f"TensorFlow Lite cannot load it: {error}; copy the file again", "damaged") from error
        self._inputs = self._interpreter.get_input_details()
        self.specs = [
            _spec(one["name"], tf.TensorShape([None if n < 0 else n for n in one["shape_signature"]]),
                  one["dtype"].__name__)
            for one in self._inputs
        ]  # fmt: skip

    def export(self, tf2onnx: Any, opset: int) -> Any:
        model, _ = tf2onnx.convert.from_tflite(self._path, opset=opset)
        return model

    def run(self, sample: Any) -> list[Any]:
        for one in self._inputs:
            self._interpreter.resize_tensor_input(one["index"], sample[one["name"]].shape)
        self._interpreter.allocate_tensors()
        for one in self._inputs:
            self._interpreter.set_tensor(one["index"], sample[one["name"]])
        self._interpreter.invoke()
        return [self._interpreter.get_tensor(one["index"]) for one in self._interpreter.get_output_details()]


_LOADERS: dict[str, Callable[[Any, Task], Any]] = {
    "keras": _load_keras,
    "keras-h5": _load_keras,
    "saved-model": _load_saved_model,
    "tf-graph": _load_graph,
    "tflite": lambda tf, task: _Lite(tf, task.source),
}
