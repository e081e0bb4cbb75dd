"""``trtx.convert``: from any model to ONNX that TensorRT takes."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .._aio import run_shielded

# Who has a plan or an ONNX model converts nothing: the rest is imported at the first use, not by `import trtx_py`.
if TYPE_CHECKING:
    from ..backends.protocols import TensorRTBackend
    from ._formats import ModelSource
    from ._registry import Registry
    from ._types import ConvertedModel, Converter, InputLike, OnConversionProgress


class Convert:
    """Converters of models; ``trtx_py.convert`` is the one object of this class."""

    @functools.cached_property
    def _registry(self) -> Registry:
        from ._registry import Registry

        return Registry()

    async def __call__(
        self,
        source: ModelSource,
        *,
        inputs: Mapping[str, InputLike] | None = None,
        dynamic_axes: Mapping[str, Mapping[int, str]] | None = None,
        opset: int | None = None,
        module: str | None = None,
        trust: bool = False,
        python: str | os.PathLike[str] | None = None,
        import_path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
        options: Mapping[str, Any] | None = None,
        timeout_s: float | None = 1800.0,
        progress: OnConversionProgress | None = None,
        validate: bool = True,
        simplify: bool = True,
        compare: bool = True,
        tolerance: float = 1e-4,
        output: str | os.PathLike[str] | None = None,
        check_operators: bool = True,
        target: str | TensorRTBackend | None = None,
    ) -> ConvertedModel:
        """Convert a model to ONNX, in processes of its own: nothing of torch, tensorflow or onnx is imported here.

        Args:
            source: a path, the bytes of a file, or ``package.module:factory``, which makes a torch.nn.Module.
            inputs: by name, in order: a shape, an InputSpec, or an array as example. PyTorch modules and TorchScript
                need them; elsewhere they are the sizes to compare with.
            dynamic_axes: for PyTorch, the axes that may have other sizes: ``{"x": {0: "batch"}}``. Axes of one name
                have one size.
            opset: of the result; None for the converter's own choice, and for an ONNX source for no change.
            module: ``package.module:factory``, for files that hold weights alone.
            trust: let code inside the model run: pickles, .pt2 files, Python layers of Keras.
            python: an interpreter that has torch or tensorflow; None for this one. What comes after the export (extra
                ``convert``) runs with this one in any case.
            import_path: the folder, or folders, of modules named above, searched first; None for the current one,
                searched last.
            options: for the converter. SavedModel: ``signature``. Frozen graphs: ``input_names``, ``output_names``.
            timeout_s: for all of it together; None for no limit.
            progress: called from the converting thread with every event. An exception it raises ends the conversion
                and is raised here.
            validate: let onnx.checker look at the model.
            simplify: fold constants and merge nodes with onnxslim. What it breaks is undone, and said in the report.
            compare: run source and result on random inputs.
            tolerance: largest difference allowed, as part of an output's largest magnitude, which counts as 1 at least.
            output: path to write. A model over 2 GB needs one: its weights are written beside it.
            check_operators: ask the target's parser whether it takes the model; the answer is in the report.
            target: which TensorRT that is: as ``backend`` of Builder. None: the one that would build here, if any.

        Raises:
            ConversionError: it could not be converted; says at which step, why, and what the converter printed.
            BackendUnavailableError: ``target`` is not here.
            InvalidArgumentError: an argument cannot be used, or a file cannot be read.
        Cancellation: the worker's whole process group is killed, its folder removed, and nothing is written.
        """
        from ._pipeline import run
        from ._process import Cancel
        from ._request import checked_request

        request = checked_request(
            source, inputs=inputs, dynamic_axes=dynamic_axes, opset=opset, module=module, trust=trust, python=python,
            import_path=import_path, options=options, timeout_s=timeout_s, progress=progress, validate=validate,
            simplify=simplify, compare=compare, tolerance=tolerance, output=output, check_operators=check_operators,
            target=target,
        )  # fmt: skip
        cancel = Cancel()
        try:
            return await run_shielded(lambda: run(request, self._registry, cancel), on_cancel=cancel.set)
        finally:
            cancel.close()

    def sync(
        self,
        source: ModelSource,
        *,
        inputs: Mapping[str, InputLike] | None = None,
        dynamic_axes: Mapping[str, Mapping[int, str]] | None = None,
        opset: int | None = None,
        module: str | None = None,
        trust: bool = False,
        python: str | os.PathLike[str] | None = None,
        import_path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
        options: Mapping[str, Any] | None = None,
        timeout_s: float | None = 1800.0,
        progress: OnConversionProgress | None = None,
        validate: bool = True,
        simplify: bool = True,
        compare: bool = True,
        tolerance: float = 1e-4,
        output: str | os.PathLike[str] | None = None,
        check_operators: bool = True,
        target: str | TensorRTBackend | None = None,
    ) -> ConvertedModel:
        """As ``await convert(...)``, blocking this thread. An exception in it, such as Ctrl-C, ends the worker."""
        from ._pipeline import run
        from ._process import Cancel
        from ._request import checked_request

        request = checked_request(
            source, inputs=inputs, dynamic_axes=dynamic_axes, opset=opset, module=module, trust=trust, python=python,
            import_path=import_path, options=options, timeout_s=timeout_s, progress=progress, validate=validate,
            simplify=simplify, compare=compare, tolerance=tolerance, output=output, check_operators=check_operators,
            target=target,
        )  # fmt: skip
        cancel = Cancel()
        try:
            return run(request, self._registry, cancel)
        finally:
            cancel.close()

    def detect_format(self, source: ModelSource) -> str:
        """Which format a model has: by content, and for a folder by what lies in it.

        Args:
            source: a path, the bytes of a file, or ``package.module:factory``.

        Returns:
            "onnx", "plan", "tf-graph", "saved-model", "keras", "keras-h5", "tflite", "torch-pickle", "torchscript",
            "torch-export", "safetensors", "torch-module", or a format that was registered.

        Raises:
            ConversionError: it is none of these, or is damaged; says what its name promises and what was found.
            InvalidArgumentError: it cannot be read.
        """
        return self._registry.detect(source).format

    def register(
        self, format: str, converter: Converter | str, *, suffixes: Sequence[str] = (), magic: bytes = b""
    ) -> None:
        """Add a converter, or put one in the place of another.

        Args:
            format: a name of your own, or one that ``detect_format`` gives.
            converter: a function that takes a ConversionTask and writes ``task.output``; or its
                ``package.module:function``. It is imported in the worker process, from ``import_path``.
            suffixes: names that such files end with.
            magic: what such files begin with; with it, suffixes are not looked at.

        Raises:
            InvalidArgumentError: nothing would tell the format, or the function cannot be imported elsewhere.
        """
        self._registry.register(format, converter, suffixes=suffixes, magic=magic)

    def unregister(self, format: str) -> None:
        """Take a registered converter away again. Raises InvalidArgumentError if there is none."""
        self._registry.unregister(format)


convert = Convert()
