"""A model run by ONNX Runtime on the CPU, with any of its inner tensors as outputs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .._errors import BackendUnavailableError, CalibrationError
from .._types import Array
from ._store import stored

if TYPE_CHECKING:
    import onnx


#: Takes Relu away before a QuantizeLinear of FP8, as if its zero were the smallest number (measured with 1.31).
WRONG_OPTIMIZERS = ("ReluQuantRewrite",)


class Runner:
    """Runs one model in FP32, with Q/DQ and roundings as the model says and none more.

    Args:
        model: with its weights.
        expose: names of inner tensors to return beside the outputs.
    Raises:
        BackendUnavailableError: onnxruntime is not installed.
        CalibrationError: it cannot load this model; its words are in the message.
    """

    def __init__(self, model: onnx.ModelProto, expose: Iterable[str] = ()) -> None:
        import onnx

        runtime = _onnxruntime()
        shown = onnx.ModelProto()
        shown.CopyFrom(model)
        have = {value.name for value in shown.graph.output}
        # A graph input cannot be an output as well; who asks for one has its values already.
        have |= {value.name for value in shown.graph.input}
        shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(expose) if name not in have)
        options = runtime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = min(4, os.cpu_count() or 1)
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Its own integer kernels would round elsewhere than Q and DQ say.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        with stored(shown) as (blob, folder):
            source = blob if folder is None else os.path.join(folder, "model.onnx")
            try:
                self._session = runtime.InferenceSession(
                    source, options, providers=["CPUExecutionProvider"], disabled_optimizers=WRONG_OPTIMIZERS
                )
            except Exception as error:  # its exceptions share no public base
                raise CalibrationError(
                    f"onnxruntime {runtime.__version__} cannot run this model, so nothing can be measured on it: "
                    f"{' '.join(str(error).split())[:500]}"
                ) from error
        self._names = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs and exposed tensors by name; exposed inputs are not among them. Raises CalibrationError."""
        try:
            found: list[Any] = self._session.run(self._names, dict(inputs))
        except Exception as error:  # as above
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in inputs.items())
            raise CalibrationError(
                f"onnxruntime could not run the model on {shapes}: {' '.join(str(error).split())[:500]}; "
                "check that the data are such as the model expects"
            ) from error
        return dict(zip(self._names, found, strict=True))


def _onnxruntime() -> Any:
    # Or it keeps telemetry in the user's home, to be sent to its vendor (since 1.31).
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendUnavailableError(
            "onnxruntime is not installed: calibration, measured precision and compare run the FP32 model with it; "
            "pip install 'trtx-py[quantize]'"
        ) from error
    return onnxruntime
