"""The steps of a conversion, one worker process after the other, in a folder that is gone afterwards."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .._errors import BackendUnavailableError, ConversionError, InvalidArgumentError, ParserError
from ._process import Cancel, Cancelled, Deadline, interpreter, run_worker
from ._registry import Registry
from ._request import Request
from ._types import (
    Comparison,
    ConversionProgress,
    ConversionReport,
    ConversionStep,
    ConvertedModel,
    OperatorCheck,
    OutputComparison,
    Simplification,
)

#: A protobuf message ends at 2 GiB; what is beyond this is written beside the model.
INLINE_LIMIT = (2 << 30) - (16 << 20)


def run(request: Request, registry: Registry, cancel: Cancel) -> ConvertedModel:
    """Convert. Blocks. Raises ConversionError, InvalidArgumentError, Cancelled."""
    deadline = Deadline.after(request.timeout_s)
    detected = registry.detect(request.source)
    if detected.format == "plan":
        raise ConversionError(
            f"{request.label} is a TensorRT plan: it was built already; give it to open_engine or Plan.load",
            format="plan", step="detect", cause="refused",
        )  # fmt: skip
    function = registry.converter(detected.format)
    with _folder(request) as folder:
        conversion = _Conversion(request, detected.format, folder, deadline, cancel)
        return conversion.run(function, [detected.note] if detected.note else [])


@contextlib.contextmanager
def _folder(request: Request) -> Iterator[str]:
    """A temporary folder; beside ``output``, so that the result need only be renamed."""
    parent = None if request.output is None else os.path.dirname(request.output)
    try:
        folder = tempfile.mkdtemp(prefix=".trtx-convert-", dir=parent)
    except OSError as error:
        raise InvalidArgumentError(
            f"no folder for the conversion can be made in {parent or tempfile.gettempdir()!r}: {error.strerror}; set "
            "TMPDIR, or give output= on another disk"
        ) from error
    try:
        yield folder
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise ConversionError(
            f"{request.label}: {error.strerror} while writing below {os.path.dirname(folder)!r}; free some space, or "
            "give output= on another disk; nothing was written", format=None, step="write", cause="disk",
        ) from error  # fmt: skip
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Conversion:
    def __init__(self, request: Request, format: str, folder: str, deadline: Deadline, cancel: Cancel) -> None:
        self._request, self._format, self._folder = request, format, folder
        self._deadline, self._cancel = deadline, cancel
        for name in ("converted", "result", "scratch"):
            os.mkdir(os.path.join(folder, name))
        self._examples = ""
        if request.examples:
            self._examples = os.path.join(folder, "examples.npz")
            np.savez(self._examples, **dict(request.examples))

    def run(self, function: str | None, notes: list[str]) -> ConvertedModel:
        request = self._request
        source = self._source_path()
        steps: list[Any] = []
        producer, made_samples = "", 0
        if function is not None:
            converted = os.path.join(self._folder, "converted", "model.onnx")
            made = self._worker(request.python, function, source, converted)
            if not os.path.isfile(converted):
                raise ConversionError(
                    f"{request.label}: the converter {function} returned and wrote no model to task.output",
                    format=self._format, step="export", cause="failed",
                )  # fmt: skip
            producer, source = made["producer"] or function, converted
            made_samples = made["samples"]
            steps += made["steps"]
            notes += made["notes"]
        elif request.dynamic_axes:
            raise InvalidArgumentError("an ONNX model has its dynamic axes already; leave out dynamic_axes")
        name = "model.onnx" if request.output is None else os.path.basename(request.output)
        result = os.path.join(self._folder, "result", name)
        refined = self._worker(interpreter(None), "._refine:refine", source, result, is_source=function is None)
        steps += refined["steps"]
        notes += refined["notes"]
        if function is not None and refined["comparison"] is not None and not made_samples:
            notes.append(
                "compared with the exported model before it was simplified, not with the source: the converter gave no "
                "outputs of the source (ConversionTask.reference)"
            )
        operators = self._check_operators(result, notes, steps)
        if self._cancel.wanted:  # no worker was there to notice
            raise Cancelled
        report = ConversionReport(
            format=self._format,
            producer=producer or refined["producer"],
            opset=refined["opset"],
            steps=tuple(ConversionStep(name, seconds) for name, seconds in steps),
            simplification=Simplification(**refined["simplification"]),
            renamed_axes=refined["renamed_axes"],
            operators=operators,
            comparison=_comparison(refined["comparison"]),
            notes=tuple(notes),
        )
        return self._stored(result, refined["files"], report)

    def _source_path(self) -> str:
        source = self._request.source
        if not isinstance(source, (bytes, bytearray, memoryview)):
            path = os.fspath(source)
            return path if self._format == "torch-module" else os.path.abspath(path)
        path = os.path.join(self._folder, "source")
        with open(path, "wb") as file:
            file.write(source if memoryview(source).c_contiguous else bytes(source))
        return path

    def _worker(self, python: str, function: str, source: str, output: str, is_source: bool = False) -> dict[str, Any]:
        request = self._request
        job = {
            "converter": function,
            "source": source,
            "output": output,
            "folder": os.path.join(self._folder, "scratch"),
            "format": self._format,
            "label": request.label,
            "opset": request.opset,
            "options": request.options,
            "trust": request.trust,
            "module": request.module,
            "dynamic_axes": request.dynamic_axes,
            "inputs": [{"name": name, **_fields(spec)} for name, spec in request.inputs.items()],
            "examples": self._examples,
            "samples": os.path.join(self._folder, "samples.npz"),
            "import_path": request.import_path,
            "folder_of_caller": _current_folder(),
            "is_source": is_source,
            "validate": request.validate,
            "simplify": request.simplify,
            "compare": request.compare,
            "tolerance": request.tolerance,
            "inline_limit": INLINE_LIMIT,
        }
        return run_worker(python, job, self._folder, self._event, self._deadline, self._cancel)

    def _event(self, event: Mapping[str, Any]) -> None:
        if self._request.progress is not None:
            text = str(event.get("text", ""))
            self._request.progress(ConversionProgress(str(event.get("step", "")), text, self._deadline.elapsed()))

    def _check_operators(self, path: str, notes: list[str], steps: list[Any]) -> OperatorCheck | None:
        """What the target's parser says; nothing is built."""
        from .. import Builder

        request = self._request
        if not request.check_operators:
            return None
        self._event({"step": "check operators", "text": "asking the target's parser"})
        started = self._deadline.elapsed()
        try:
            with Builder(None, request.target) as builder, builder.create_network() as network:
                target = f"{builder.backend.flavour} {builder.backend.version}"
                try:
                    network.parse_onnx(path)
                except ParserError as error:
                    return OperatorCheck(target, False, error.issues)
                return OperatorCheck(target, True, ())
        except BackendUnavailableError as error:
            if request.target is not None:
                raise
            notes.append(f"operators not checked: {error.message.partition('; looked for:')[0]}")
            return None
        finally:
            steps.append(("check operators", self._deadline.elapsed() - started))

    def _stored(self, result: str, files: list[str], report: ConversionReport) -> ConvertedModel:
        output = self._request.output
        if output is not None:
            _move(os.path.dirname(result), files, os.path.dirname(output))
            return ConvertedModel(None, output, report)
        if len(files) > 1:
            raise ConversionError(
                f"{self._request.label}: the converted model exceeds 2 GB, which no ONNX model in one piece can; give "
                "output= where it is written with its weights beside it",
                format=self._format, step="write", cause="refused",
            )  # fmt: skip
        with open(result, "rb") as file:
            return ConvertedModel(file.read(), None, report)


def _move(source: str, files: list[str], target: str) -> None:
    """All files or none; the model, which is the last one, replaces an older one in one step."""
    moved: list[str] = []
    try:
        for name in files:
            path = os.path.join(target, name)
            fresh = not os.path.exists(path)
            os.replace(os.path.join(source, name), path)
            if fresh:
                moved.append(path)
    except OSError as error:
        for path in moved:
            with contextlib.suppress(OSError):
                os.unlink(path)
        raise InvalidArgumentError(
            f"the converted model cannot be saved in {target!r}: {error.strerror}; nothing was written there"
        ) from error


def _current_folder() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was removed, and no module can lie in it
        return os.path.abspath(os.sep)


def _fields(spec: Any) -> dict[str, Any]:
    return {"shape": list(spec.shape), "dtype": spec.dtype, "low": spec.low, "high": spec.high}


def _comparison(found: Mapping[str, Any] | None) -> Comparison | None:
    if found is None:
        return None
    return Comparison(
        found["samples"], found["tolerance"], tuple(OutputComparison(**output) for output in found["outputs"])
    )
