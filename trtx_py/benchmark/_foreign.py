"""Contenders that are not trtx_py: ONNX Runtime and PyTorch. What is absent says why."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .._arguments import checked_path
from .._errors import InvalidArgumentError
from .._types import Array
from ..quantize._store import stored
from ._errors import NotAvailableError
from ._load import BlockingInfer, Inputs

if TYPE_CHECKING:
    import onnx

_PROVIDERS = {"onnxruntime": "CPUExecutionProvider", "onnxruntime_cuda": "CUDAExecutionProvider"}


def open_onnxruntime(kind: str, model: onnx.ModelProto | None) -> BlockingInfer:
    """A session of ONNX Runtime, with its own defaults but for the provider.

    Raises:
        NotAvailableError: there is no ONNX model, no ONNX Runtime, no such provider, or it cannot run the model.
    """
    if model is None:
        raise NotAvailableError("the source is a plan, and ONNX Runtime runs ONNX models: give reference='model.onnx'")
    # Or it keeps telemetry in the user's home, to be sent to its vendor (since 1.31).
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        runtime: Any = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise NotAvailableError("onnxruntime is not installed; pip install onnxruntime") from error
    provider, present = _PROVIDERS[kind], runtime.get_available_providers()
    if provider not in present:
        raise NotAvailableError(
            f"this onnxruntime {runtime.__version__} has no {provider} (it has {', '.join(present)}); "
            "pip install onnxruntime-gpu in its place"
        )
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    with stored(model) as (blob, folder):
        source = blob if folder is None else os.path.join(folder, "model.onnx")
        try:
            session = runtime.InferenceSession(source, options, providers=[provider])
        except Exception as error:  # its exceptions share no public base
            raise NotAvailableError(
                f"onnxruntime {runtime.__version__} cannot run this model: {_one(error)}"
            ) from error
    if session.get_providers()[0] != provider:
        raise NotAvailableError(f"onnxruntime fell back from {provider} to {', '.join(session.get_providers())}")
    names = [output.name for output in session.get_outputs()]

    def run(inputs: Inputs) -> dict[str, Array]:
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))

    return run


def open_torch(module: object, inputs: Sequence[str], outputs: Sequence[str]) -> BlockingInfer:
    """A PyTorch module on the GPU where torch has one, else on the CPU.

    Args:
        module: an ``nn.Module``, or the path of a .pt2 or TorchScript file; called with one tensor for each input, in
            the order of the model's inputs.
        outputs: names for what it returns, in order.
    Raises:
        NotAvailableError: torch is not installed, or there is no module, or it cannot be loaded.
    """
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError as error:
        raise NotAvailableError("torch is not installed; pip install 'trtx-py[torch]'") from error
    if module is None:
        raise NotAvailableError(
            "PyTorch cannot load ONNX models: give module=, an nn.Module of the same weights or the path of a .pt2 or "
            "TorchScript file"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = _torch_module(torch, module)
    try:
        loaded = loaded.to(device)
    except Exception as error:  # whatever a module of the caller's raises
        raise NotAvailableError(f"PyTorch cannot move the module to {device}: {_one(error)}") from error

    def run(given: Inputs) -> dict[str, Array]:
        with torch.inference_mode():
            found = loaded(*(torch.from_numpy(np.asarray(given[name])).to(device) for name in inputs))
            return _named(found, outputs)

    return run


def _torch_module(torch: Any, module: object) -> Any:
    if isinstance(module, (str, os.PathLike)):
        path = checked_path(module, "module")
        try:
            if path.endswith(".pt2"):
                return torch.export.load(path).module()
            return torch.jit.load(path).eval()
        except Exception as error:  # torch raises RuntimeError, ValueError, pickle's errors, ...
            raise NotAvailableError(f"PyTorch cannot load {path!r}: {_one(error)}") from error
    if not callable(module):
        raise InvalidArgumentError(f"module is {type(module).__name__}; expected an nn.Module, or a path")
    calm: Callable[[], Any] | None = getattr(module, "eval", None)
    return module if calm is None else calm()


def _named(found: Any, names: Sequence[str]) -> dict[str, Array]:
    if isinstance(found, Mapping):
        return {str(name): tensor.cpu().numpy() for name, tensor in found.items()}
    tensors = found if isinstance(found, (tuple, list)) else (found,)
    if len(tensors) != len(names):
        raise InvalidArgumentError(f"the module returns {len(tensors)} tensors; the model has {', '.join(names)}")
    return {name: tensor.cpu().numpy() for name, tensor in zip(names, tensors, strict=True)}


def _one(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]
