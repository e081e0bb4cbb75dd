"""One job as a converter sees it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import numpy as np

Arrays = Mapping[str, Any]


class RefusedError(Exception):
    """A conversion that cannot be done, with a text for the caller and the cause as ConversionError knows it."""

    def __init__(self, message: str, cause: str = "refused") -> None:
        super().__init__(message)
        self.cause = cause


def need(module: str, extra: str, why: str) -> Any:
    """An optional package. Raises RefusedError, naming the extra, if it is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        missing = (getattr(error, "name", None) or module).partition(".")[0]
        otherwise = "leave that out" if extra == "convert" else "name an interpreter that has it with python="
        raise RefusedError(
            f"{why} needs {module}, and {missing!r} is not installed ({error}); pip install 'trtx-py[{extra}]', or "
            f"{otherwise}",
            "missing",
        ) from error


@dataclass(frozen=True)
class Spec:
    """One input: an example of its shape, and the names of the axes that may have other sizes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    low: float | None = None
    high: float | None = None
    axes: Mapping[int, str] = field(default_factory=dict)
    example: Any = None

    def array(self, shape: Sequence[int], random: np.random.Generator) -> Any:
        """A random value of that shape, or the example if it has it."""
        if self.example is not None and tuple(shape) == self.shape:
            return self.example
        if self.dtype == "bool":
            return random.integers(0, 2, shape).astype(bool)
        if np.issubdtype(_numpy_dtype(self.dtype), np.integer):
            low = 0 if self.low is None else int(self.low)
            high = max(low + 1, low + 2 if self.high is None else int(self.high))
            return random.integers(low, high, shape).astype(self.dtype)
        if self.low is not None or self.high is not None:
            low_f = 0.0 if self.low is None else self.low
            values = random.uniform(low_f, low_f + 1.0 if self.high is None else self.high, shape)
        else:
            values = random.standard_normal(shape)
        return values.astype(_numpy_dtype(self.dtype))


def _numpy_dtype(name: str) -> Any:
    if name == "bfloat16":
        return np.dtype(import_module("ml_dtypes").bfloat16)
    return np.dtype(name)


def random_samples(specs: Sequence[Spec], seed: int = 0) -> list[dict[str, Any]]:
    """Inputs of the example's sizes, and, where axes are dynamic, of one size more along each."""
    random = np.random.default_rng(seed)
    samples = [{spec.name: spec.array(spec.shape, random) for spec in specs}]
    if any(spec.axes for spec in specs):
        samples.append(
            {
                spec.name: spec.array([n + (axis in spec.axes) for axis, n in enumerate(spec.shape)], random)
                for spec in specs
            }
        )
    return samples


class Task:
    """What a converter gets; see trtx_py.convert.ConversionTask."""

    def __init__(self, job: Mapping[str, Any], events: int) -> None:
        self.job = job
        self.source: str = job["source"]
        self.output: str = job["output"]
        self.folder: str = job["folder"]
        self.format: str = job["format"]
        self.label: str = job["label"]
        self.opset: int | None = job["opset"]
        self.options: Mapping[str, Any] = job["options"]
        self.trust: bool = job["trust"]
        self.module: str | None = job["module"]
        self.dynamic_axes: Mapping[str, Mapping[int, str]] = {
            name: {int(axis): label for axis, label in axes.items()} for name, axes in job["dynamic_axes"].items()
        }
        self.producer = ""
        self.current_step = "start"
        self.extra: dict[str, Any] = {}
        self._events = events
        self._steps: list[tuple[str, float]] = []
        self._notes: list[str] = []
        self._samples: dict[str, Any] = {}
        self._count = 0

    def progress(self, text: str) -> None:
        """Tell the caller."""
        line = json.dumps({"step": self.current_step, "text": str(text)[:2000]}) + "\n"
        os.write(self._events, line.encode())

    def note(self, text: str) -> None:
        """Put a line into the report."""
        self._notes.append(str(text))

    @contextmanager
    def step(self, name: str, text: str = "") -> Iterator[None]:
        """One step: its name is in the report, and in the error if it fails."""
        before, self.current_step = self.current_step, name
        started = time.monotonic()
        self.progress(text or name)
        yield
        self._steps.append((name, time.monotonic() - started))
        self.current_step = before

    def specs(self) -> list[Spec]:
        """The caller's inputs, in order."""
        examples = {}
        if self.job["examples"]:
            with np.load(self.job["examples"], allow_pickle=False) as file:
                examples = {name: file[name] for name in file.files}
        return [
            Spec(
                one["name"], tuple(one["shape"]), one["dtype"], one["low"], one["high"],
                self.dynamic_axes.get(one["name"], {}), examples.get(str(index)),
            )
            for index, one in enumerate(self.job["inputs"])
        ]  # fmt: skip

    def specs_of(self, declared: Sequence[Spec]) -> list[Spec]:
        """What the model declares, with the caller's sizes, limits and examples where they are given."""
        given = {spec.name: spec for spec in self.specs()}
        known = {spec.name for spec in declared}
        unknown = sorted(given.keys() - known)
        if unknown:
            raise RefusedError(f"inputs= names {', '.join(unknown)}; the model's inputs are {', '.join(sorted(known))}")
        found = []
        for spec in declared:
            one = given.get(spec.name)
            if one is None:
                found.append(spec)
                continue
            if len(one.shape) != len(spec.shape):
                raise RefusedError(
                    f"inputs= gives {spec.name!r} the shape {one.shape}; the model's has {len(spec.shape)} dimensions"
                )
            found.append(replace(spec, shape=one.shape, low=one.low, high=one.high, example=one.example))
        return found

    def samples(self) -> list[dict[str, Any]]:
        """Random inputs by name, made from the caller's ``inputs``."""
        specs = self.specs()
        return random_samples(specs) if specs else []

    def reference(self, inputs: Arrays, outputs: Sequence[Any]) -> None:
        """What the source gives for ``inputs``."""
        for name, array in inputs.items():
            self._samples[f"in:{self._count}:{name}"] = _storable(array)
        for index, array in enumerate(outputs):
            self._samples[f"out:{self._count}:{index}"] = _storable(array)
        self._count += 1

    def reference_all(self, samples: Sequence[Arrays], run: Any) -> None:
        """``reference`` for each sample that the source can compute; the first one it must."""
        for number, sample in enumerate(samples):
            try:
                outputs = run(sample)
            except Exception as error:
                if number == 0:
                    raise
                sizes = {name: tuple(np.shape(array)) for name, array in sample.items()}
                self.note(f"not compared with inputs of {sizes}: the source itself refuses them ({error})"[:500])
                continue
            self.reference(sample, outputs)

    def save_samples(self) -> None:
        """Write what ``reference`` was given, for the comparison."""
        if self._samples:
            np.savez(self.job["samples"], **self._samples)

    def result(self) -> dict[str, Any]:
        """What goes back to the caller."""
        self.save_samples()
        return {
            "producer": str(self.producer),
            "steps": self._steps,
            "notes": self._notes,
            "samples": self._count,
            **self.extra,
        }


def _storable(array: Any) -> Any:
    found = np.asarray(array)
    # .npz knows numpy's own types only.
    return found if found.dtype.kind in "biufc" and found.dtype.isbuiltin == 1 else found.astype(np.float32)
