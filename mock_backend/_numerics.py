"""The numbers: one model, run by ONNX Runtime where it can and by ONNX's reference evaluator where it cannot."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from trtx_py._types import Array, DataType, TensorInfo, TensorMode
from trtx_py.quantize._reference import WRONG_OPTIMIZERS
from trtx_py.quantize._simulate import rounding_model

from ._dtypes import CARRIED

if TYPE_CHECKING:
    import onnx

__all__ = ["Numerics"]


class Numerics:
    """Runs one model on the CPU. Thread-safe; made ready at the first run.

    I/O types that numpy has no room for (bfloat16, 8- and 4-bit floats, int4) enter and leave the model through a Cast
    from a wider type that holds each of their values exactly.

    Args:
        model: the ONNX model with its weights.
        tensors: its I/O as the engine declares it.
        threads: intra-op threads of ONNX Runtime.
    """

    def __init__(self, model: onnx.ModelProto, tensors: tuple[TensorInfo, ...], *, threads: int = 1) -> None:
        self._model = model
        self._inputs = [t for t in tensors if t.mode is TensorMode.INPUT]
        self._outputs = [t for t in tensors if t.mode is TensorMode.OUTPUT]
        self._threads = threads
        self._lock = threading.Lock()
        self._runner: Any = None
        self._feeds: dict[str, str] = {}
        self._fetches: list[str] = []
        self._wide: dict[str, Any] = {}
        self._model_to_run: Any = None
        self.engine = ""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name, in the dtypes that the engine declares. Raises whatever the runner raises."""
        self._prepare()
        feeds = {}
        for info in self._inputs:
            array = np.asarray(inputs[info.name])
            wide = self._wide.get(info.name)
            feeds[self._feeds[info.name]] = array if wide is None else array.astype(wide)
        results = self._run(feeds)
        outputs: dict[str, Array] = {}
        for info, value in zip(self._outputs, results, strict=True):
            outputs[info.name] = np.asarray(value).astype(info.dtype.numpy, copy=False)
        return outputs

    def _run(self, feeds: dict[str, Array]) -> list[Any]:
        try:
            found: list[Any] = self._runner.run(self._fetches, feeds)
        except Exception:
            # some of ONNX Runtime's kernels find out only here that they lack a case
            if self.engine != "onnxruntime":
                raise
            other = _reference_or_none(self._model_to_run)
            found = [] if other is None else _run_or_nothing(other, self._fetches, feeds)
            if not found:
                raise
            self._loaded(other)
            self._runner, self.engine = other, "onnx.reference"
        return found

    def _prepare(self) -> None:
        with self._lock:
            if self._runner is not None:
                return
            model = self._widened()
            self._model_to_run = model
            self._runner, self.engine = _load(model, self._session_options)
            self._loaded(self._runner)

    def _session_options(self, onnxruntime: Any) -> Any:
        """How ONNX Runtime shall run the model."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Q and DQ are computed as they stand: its integer kernels round elsewhere than TensorRT's.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        return options

    def _loaded(self, runner: Any) -> None:
        """A hook for a runner that was just made."""

    def _widened(self) -> onnx.ModelProto:
        import onnx
        from onnx import TensorProto, helper

        model = onnx.ModelProto()
        # ONNX Runtime leaves out most roundings of FP16 and has no BF16; the error of a precision would not be real.
        model.CopyFrom(rounding_model(self._model)[0])
        graph = model.graph
        weights = {tensor.name for tensor in graph.initializer}
        declared = {v.name: v for v in graph.input if v.name not in weights}
        opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=1)
        for info in self._inputs:
            self._feeds[info.name] = info.name
            value = declared[info.name]
            elem = value.type.tensor_type.elem_type
            if elem == TensorProto.DOUBLE:
                self._wide[info.name] = np.float64
            if info.dtype not in CARRIED:
                continue
            carrier = CARRIED[info.dtype]
            value.name = self._feeds[info.name] = f"{info.name}__wide"
            value.type.tensor_type.elem_type = getattr(TensorProto, carrier)
            self._wide[info.name] = np.int8 if carrier == "INT8" else np.float32
            graph.node.insert(0, helper.make_node("Cast", [value.name], [info.name], to=elem))
        results = {v.name: v for v in graph.output}
        for info in self._outputs:
            value = results[info.name]
            self._fetches.append(info.name)
            if info.dtype not in CARRIED:
                continue
            wide = f"{info.name}__wide"
            to = getattr(TensorProto, CARRIED[info.dtype])
            graph.node.append(helper.make_node("Cast", [info.name], [wide], to=to))
            value.name = self._fetches[-1] = wide
            value.type.tensor_type.elem_type = to
        needs = {DataType.BF16: 13, DataType.FP8: 19, DataType.INT4: 21, DataType.FP4: 23}
        floor = max((needs.get(t.dtype, 0) for t in [*self._inputs, *self._outputs]), default=0)
        if floor > opset:
            raise ValueError(f"a model of opset {opset} cannot have I/O of a type that came with opset {floor}")
        return model


def _load(model: onnx.ModelProto, session_options: Callable[[Any], Any]) -> tuple[Any, str]:
    """A runner with ``run(names, feeds)`` and the name of what is behind it."""
    try:
        # From 1.31 on it keeps telemetry in the user's home, to be sent to its vendor, unless this is set before it is
        # imported. A test double must do neither.
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        import onnxruntime
    except ImportError:
        onnxruntime = None
    if onnxruntime is not None and any(_differs_from_onnx(node, onnxruntime.__version__) for node in model.graph.node):
        reason = f"onnxruntime {onnxruntime.__version__} does not compute Attention as ONNX defines it"
    elif onnxruntime is not None:
        options = session_options(onnxruntime)
        try:
            data = model.SerializeToString()
            session = onnxruntime.InferenceSession(
                data, options, providers=["CPUExecutionProvider"], disabled_optimizers=WRONG_OPTIMIZERS
            )
            return session, "onnxruntime"
        except Exception as error:  # its exceptions share no public base
            reason = f"onnxruntime cannot load this model ({error})"
    else:
        reason = "onnxruntime is not installed"
    try:
        return _reference(model), "onnx.reference"
    except Exception as error:
        raise RuntimeError(f"no way to compute this model: {reason}; onnx's reference evaluator: {error}") from error


def _differs_from_onnx(node: onnx.NodeProto, version: str) -> bool:
    """Measured: ONNX Runtime's Attention caps its scores at the wrong place and makes NaN of rows that are all masked
    in 1.23; 1.31 does neither, but its fourth output still lacks the causal mask that ONNX puts into it.
    """
    if node.op_type != "Attention" or node.domain not in ("", "ai.onnx"):
        return False
    known = tuple(int(part) for part in version.split(".")[:2]) >= (1, 31)
    return not known or (len(node.output) > 3 and any(a.name == "is_causal" and a.i for a in node.attribute))


def _reference_or_none(model: onnx.ModelProto) -> Any:
    try:
        return _reference(model)
    except Exception:  # it names what it lacks; the first runner's error is the one to report
        return None


def _run_or_nothing(runner: Any, names: list[str], feeds: dict[str, Array]) -> list[Any]:
    try:
        return list(runner.run(names, feeds))
    except Exception:  # as above
        return []


def _reference(model: onnx.ModelProto) -> Any:
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(model)
