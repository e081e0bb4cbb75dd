"""What a caller asks of a conversion, checked before anything is started."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .._arguments import checked_int, checked_path, checked_shape, checked_timeout
from .._errors import InvalidArgumentError
from ._formats import ModelSource, is_module_name
from ._process import interpreter
from ._types import InputLike, InputSpec, OnConversionProgress

if TYPE_CHECKING:
    from ..backends.protocols import TensorRTBackend


@dataclass(frozen=True)
class Request:
    """One conversion. ``inputs`` are InputSpecs, ``examples`` the arrays among them by their position."""

    source: ModelSource
    inputs: Mapping[str, InputSpec]
    examples: Mapping[str, Any]
    dynamic_axes: Mapping[str, Mapping[int, str]]
    opset: int | None
    module: str | None
    trust: bool
    python: str
    import_path: Sequence[str] | None
    options: Mapping[str, Any]
    timeout_s: float | None
    progress: OnConversionProgress | None
    validate: bool
    simplify: bool
    compare: bool
    tolerance: float
    output: str | None
    check_operators: bool
    target: str | TensorRTBackend | None

    @property
    def label(self) -> str:
        """What to call the source in messages."""
        if isinstance(self.source, (bytes, bytearray, memoryview)):
            return "the model (bytes)"
        path = os.fspath(self.source)
        return os.path.basename(os.path.normpath(path)) or path


def checked_request(
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
) -> Request:
    """Raises InvalidArgumentError for what cannot be meant."""
    if not isinstance(source, (bytes, bytearray, memoryview)):
        checked_path(source, "source", "a path, bytes or package.module:factory")
    if progress is not None and not callable(progress):
        raise InvalidArgumentError(f"progress is {type(progress).__name__}; expected None or a function of one event")
    if module is not None and not _names_module(module):
        raise InvalidArgumentError(f"module is {module!r}; expected 'package.module:factory'")
    specs, examples = _checked_inputs(inputs)
    return Request(
        source=source,
        inputs=specs,
        examples=examples,
        dynamic_axes=_checked_axes(dynamic_axes, specs),
        opset=None if opset is None else checked_int(opset, "opset", minimum=1),
        module=module,
        trust=bool(trust),
        python=interpreter(None if python is None else checked_path(python, "python")),
        import_path=_checked_folders(import_path),
        options=_checked_options(options),
        timeout_s=checked_timeout(timeout_s),
        progress=progress,
        validate=bool(validate),
        simplify=bool(simplify),
        compare=bool(compare),
        tolerance=_checked_tolerance(tolerance),
        output=_checked_output(output),
        check_operators=bool(check_operators),
        target=target,
    )


def _names_module(value: Any) -> bool:
    return isinstance(value, str) and is_module_name(value)


def _checked_tolerance(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise InvalidArgumentError(f"tolerance is {value!r}; expected a number from 0 on, such as 1e-4")
    return float(value)


def _checked_inputs(inputs: Any) -> tuple[dict[str, InputSpec], dict[str, Any]]:
    specs: dict[str, InputSpec] = {}
    examples: dict[str, Any] = {}
    if inputs is None:
        return specs, examples
    if not isinstance(inputs, Mapping):
        raise InvalidArgumentError(
            f"inputs is {type(inputs).__name__}; expected names with shapes, InputSpecs or arrays: "
            "{'x': (1, 3, 224, 224)}"
        )
    for index, (name, given) in enumerate(inputs.items()):
        if not isinstance(name, str) or not name:
            raise InvalidArgumentError(f"inputs has the name {name!r}; expected text")
        if isinstance(given, np.ndarray):
            if given.dtype.kind not in "biuf":
                raise InvalidArgumentError(f"inputs: {name!r} is an array of {given.dtype}; expected numbers")
            specs[name] = InputSpec(given.shape, given.dtype.name)
            examples[str(index)] = given
            continue
        spec = given if isinstance(given, InputSpec) else InputSpec(given)
        if spec.dtype != "bfloat16":
            try:
                if np.dtype(spec.dtype).kind not in "biufc":  # objects, texts and times are no inputs
                    raise TypeError
            except TypeError:
                raise InvalidArgumentError(
                    f"inputs: {name!r} has dtype {spec.dtype!r}; expected one of numpy's"
                ) from None
        shape = checked_shape(spec.shape, f"the shape of input {name!r}")
        specs[name] = InputSpec(shape, spec.dtype, spec.low, spec.high)
    return specs, examples


def _checked_axes(axes: Any, specs: Mapping[str, InputSpec]) -> dict[str, dict[int, str]]:
    if axes is None:
        return {}
    if not isinstance(axes, Mapping):
        raise InvalidArgumentError(f"dynamic_axes is {type(axes).__name__}; expected {{'x': {{0: 'batch'}}}}")
    found: dict[str, dict[int, str]] = {}
    sizes: dict[str, int] = {}
    for name, named in axes.items():
        if name not in specs:
            raise InvalidArgumentError(f"dynamic_axes names {name!r}; inputs= has {', '.join(specs) or 'none'}")
        if not isinstance(named, Mapping):
            raise InvalidArgumentError(f"dynamic_axes[{name!r}] is {named!r}; expected axis to name: {{0: 'batch'}}")
        shape = specs[name].shape
        found[name] = {}
        for axis, label in named.items():
            number = checked_int(
                axis, f"an axis of dynamic_axes[{name!r}]", minimum=-len(shape), maximum=len(shape) - 1
            )
            if not isinstance(label, str) or not label.isidentifier():
                raise InvalidArgumentError(
                    f"dynamic_axes[{name!r}][{axis}] is {label!r}; expected a name such as 'batch'"
                )
            size = shape[number]
            if sizes.setdefault(label, size) != size:
                raise InvalidArgumentError(
                    f"dynamic_axes: {label!r} is {sizes[label]} and {size}; axes of one name have one size: change "
                    "inputs= or the name"
                )
            found[name][number % len(shape)] = label
    return found


def _checked_folders(folders: Any) -> list[str] | None:
    if folders is None:
        return None
    if isinstance(folders, (str, os.PathLike)):
        folders = [folders]
    return [os.path.abspath(checked_path(folder, "import_path")) for folder in folders]


def _checked_options(options: Any) -> dict[str, Any]:
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise InvalidArgumentError(f"options is {type(options).__name__}; expected names with values for the converter")
    try:
        copied: dict[str, Any] = json.loads(json.dumps(dict(options)))
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(
            f"options cannot be handed to another process: {error}; expected text, numbers, lists and mappings"
        ) from error
    return copied


def _checked_output(output: Any) -> str | None:
    if output is None:
        return None
    path = os.path.abspath(checked_path(output, "output"))
    folder = os.path.dirname(path)
    if os.path.isdir(path):
        raise InvalidArgumentError(f"output {path!r} is a folder; expected the path of the file to write")
    if not os.path.isdir(folder):
        raise InvalidArgumentError(f"output {path!r}: there is no folder {folder!r}; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InvalidArgumentError(f"output {path!r}: the folder {folder!r} cannot be written")
    return path
