"""What goes into a conversion and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .._errors import ParserIssue


@dataclass(frozen=True)
class InputSpec:
    """One input of a model that does not say itself what it takes.

    Attributes:
        shape: an example; axes that ``dynamic_axes`` names may have other sizes later.
        dtype: as numpy spells it.
        low: smallest random value; integers are 0 or 1 if neither limit is given, floats are normally distributed.
        high: the end of the random values, itself not one of them.
    """

    shape: Sequence[int]
    dtype: str = "float32"
    low: float | None = None
    high: float | None = None


#: A shape, an InputSpec, or an array that serves as example.
InputLike = InputSpec | Sequence[int] | npt.NDArray[np.generic]


@dataclass(frozen=True)
class ConversionProgress:
    """One event: ``step`` is what runs now, ``text`` what it says, ``elapsed_s`` since the conversion began."""

    step: str
    text: str
    elapsed_s: float


OnConversionProgress = Callable[[ConversionProgress], None]


@dataclass(frozen=True)
class ConversionStep:
    """One step that was taken, and how long it took."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Simplification:
    """What simplifying did.

    Attributes:
        tool: name and version of what simplified; empty if nothing did.
        nodes_before, nodes_after: of the main graph.
        used: False if its result was dropped or it was not asked for.
        note: why it was dropped.
    """

    tool: str
    nodes_before: int
    nodes_after: int
    used: bool
    note: str = ""


@dataclass(frozen=True)
class OutputComparison:
    """One output of the converted model against the source's, the worst of all samples.

    Attributes:
        name: of the ONNX output.
        max_abs_error: largest difference.
        max_abs_value: largest magnitude of the source's values; the allowed difference is the tolerance times this or
            times 1, whichever is larger.
    """

    name: str
    max_abs_error: float
    max_abs_value: float


@dataclass(frozen=True)
class Comparison:
    """The converted model against its source on random inputs; ``samples`` of them, each with sizes of its own."""

    samples: int
    tolerance: float
    outputs: tuple[OutputComparison, ...]


@dataclass(frozen=True)
class OperatorCheck:
    """What the target's parser says about the converted model.

    Attributes:
        target: flavour and version.
        supported: True if it takes the model.
        issues: every node that it refuses, with operator and reason.
    """

    target: str
    supported: bool
    issues: tuple[ParserIssue, ...]


@dataclass(frozen=True)
class ConversionReport:
    """How a model was converted.

    Attributes:
        format: of the source; see ``detect_format``.
        producer: what made the ONNX model, such as "torch 2.13.0 (torch.onnx.export, dynamo)".
        opset: version of ONNX's default operator set.
        steps: what was done, in order.
        simplification: what simplifying did.
        renamed_axes: "input, axis" to its new name, for dynamic axes that shared a name by accident.
        operators: None if it was not checked; ``notes`` says why.
        comparison: None if it was not compared; ``notes`` says why.
        notes: what else is worth knowing.
    """

    format: str
    producer: str
    opset: int
    steps: tuple[ConversionStep, ...]
    simplification: Simplification
    renamed_axes: Mapping[str, str]
    operators: OperatorCheck | None
    comparison: Comparison | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class ConvertedModel:
    """An ONNX model that was made from another.

    Attributes:
        model: the serialized model; None if it was written to a file.
        path: where it was written, with external data beside it if it exceeds 2 GB; None without ``output``.
        report: how it was made.
    """

    model: bytes | None = field(repr=False)
    path: str | None
    report: ConversionReport

    @property
    def source(self) -> bytes | str:
        """What ``open_engine`` and ``Network.parse_onnx`` take: the path where there is one, else the bytes."""
        return self.path if self.path is not None else self.model or b""


class ConversionTask(Protocol):
    """What a registered converter gets: a function ``convert(task)`` that runs in the worker process.

    It writes an ONNX model to ``output`` (external data beside it) and returns; whatever it raises becomes a
    ConversionError with its text, its traceback and the end of what it printed.

    Attributes:
        source: path of the model.
        output: path to write.
        folder: an empty folder for whatever it needs, removed afterwards.
        format: the format it was registered for.
        opset: wanted by the caller, None for the converter's choice.
        options: the caller's ``options``.
        trust: the caller allows code inside the model to run.
        dynamic_axes: by input: axis to name.
        producer: to be set to the converter's name and version.
    """

    source: str
    output: str
    folder: str
    format: str
    opset: int | None
    options: Mapping[str, object]
    trust: bool
    dynamic_axes: Mapping[str, Mapping[int, str]]
    producer: str

    def progress(self, text: str) -> None:
        """Tell the caller."""
        ...

    def note(self, text: str) -> None:
        """Put a line into the report."""
        ...

    def samples(self) -> list[dict[str, npt.NDArray[np.generic]]]:
        """Random inputs by name, made from the caller's ``inputs``; none if the caller gave none."""
        ...

    def reference(
        self, inputs: Mapping[str, npt.NDArray[np.generic]], outputs: Sequence[npt.NDArray[np.generic]]
    ) -> None:
        """What the source itself gives for ``inputs``, in the order of the ONNX outputs: the result is compared."""
        ...


Converter = Callable[[ConversionTask], None]

for _public in (ConversionProgress, ConversionReport, ConversionTask, ConvertedModel, InputSpec):
    # Errors and reprs show the public name, not the module that happens to define it.
    _public.__module__ = "trtx_py"
