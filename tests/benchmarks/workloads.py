"""Engines and shapes that are measured, and inputs that tell right outputs from stale ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.gpu.kit import Kit

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Workload:
    """One engine of the kit at one shape.

    Attributes:
        engine: file name in the kit, without ``.engine``.
        sizes: leading dimensions that the case's shapes are given: (batch,) or (batch, sequence).
        heavy: a request takes about a millisecond or more: fewer contenders, and fewer samples with --quick.
        small: below 300 us.
    """

    engine: str
    sizes: tuple[int, ...]
    small: bool = False
    heavy: bool = False

    @property
    def model(self) -> str:
        return self.engine.split(".", 1)[0]

    @property
    def name(self) -> str:
        """Such as ``resnet50.fp16 b32``."""
        stem = self.engine.removesuffix(".vcx")
        return f"{stem} b{self.sizes[0]}" if len(self.sizes) == 1 else f"{stem} {'x'.join(map(str, self.sizes))}"


WORKLOADS = (
    Workload("mlp.fp32.vcx", (1,), small=True),
    Workload("mnist_cnn.fp16.vcx", (1,), small=True),
    Workload("bert_small.fp16.vcx", (1, 128), small=True),
    Workload("bert_small.fp16.vcx", (8, 128), small=True),
    Workload("resnet50.fp16.vcx", (1,)),
    Workload("resnet50.fp16.vcx", (8,)),
    Workload("resnet50.fp16.vcx", (32,), heavy=True),
    Workload("resnet50.fp16.vcx", (64,), heavy=True),
    Workload("resnet50.int8.vcx", (1,)),
    Workload("resnet50.int8.vcx", (8,)),
    Workload("resnet50.int8.vcx", (32,), heavy=True),
    Workload("resnet50.int8.vcx", (64,), heavy=True),
)

#: One large request each, which may be cut along its batch axis.
LARGE = (
    Workload("resnet50.fp16.vcx", (64,), heavy=True),
    Workload("resnet50.int8.vcx", (64,), heavy=True),
    Workload("scale_big.fp32.vcx", (16,), heavy=True),
)

#: Called through the C ABI.
CAPI = (
    Workload("mlp.fp32.vcx", (1,), small=True),
    Workload("bert_small.fp16.vcx", (1, 128), small=True),
    Workload("resnet50.fp16.vcx", (1,)),
    Workload("resnet50.int8.vcx", (64,), heavy=True),
)

#: In front of which a batcher stands; the size is that of its largest batch. Arrivals are for the first.
BATCHED = (
    Workload("resnet50.fp16.vcx", (64,), heavy=True),
    Workload("mlp.fp32.vcx", (256,), small=True),
)

#: For a lone client of a batcher, on the engines of BATCHED.
LONE = (
    Workload("resnet50.fp16.vcx", (1,)),
    Workload("mlp.fp32.vcx", (1,), small=True),
)

_SCALE_BIG: dict[str, Any] = {
    "engine": "scale_big.fp32.vcx",
    "seed": 77,
    "relative_error": 1e-6,
    "inputs": [{"name": "x", "shape": [1, 1048576], "dtype": "float32", "kind": "normal"}],
}


class Inputs:
    """Inputs of a workload, made from the kit's cases.

    Attributes:
        first, second: two sets whose outputs differ; the first begins with a case's own rows where the shapes allow.
        shapes: of either.
        tolerance: relative error that the kit allows for this engine against its float32 reference.
    """

    def __init__(self, kit: Kit, workload: Workload) -> None:
        self._kit = kit
        cases = [case for case in kit.cases if case["engine"] == workload.engine]
        if not cases and workload.model == "scale_big":
            cases = [_SCALE_BIG]
        if not cases:
            raise LookupError(f"the kit has no case of {workload.engine}; the benchmarks take inputs from its cases")
        rows = {id(case): case["inputs"][0]["shape"][0] for case in cases}
        self._case = max(cases, key=lambda case: (rows[id(case)] <= workload.sizes[0], rows[id(case)]))
        self._sizes = workload.sizes
        self.tolerance = float(self._case["relative_error"])
        self.first, self.second = self._made(1), self._made(2)
        self._known = self._begin_with_case()
        self.shapes = {name: array.shape for name, array in self.first.items()}

    def _made(self, seed: int) -> Arrays:
        specs = []
        for spec in self._case["inputs"]:
            specs.append({**spec, "shape": [*self._sizes, *spec["shape"][len(self._sizes) :]]})
        return self._kit.inputs({**self._case, "seed": 4000 + seed, "inputs": specs})

    def _begin_with_case(self) -> Arrays:
        """Puts the case's rows first, and gives the outputs that the kit expects of these rows."""
        if "expected" not in self._case:
            return {"y": 2 * self.first["x"]}
        given = self._kit.inputs(self._case)
        for name, array in given.items():
            if array.shape[1:] != self.first[name].shape[1:]:
                return {}
        rows = min(len(next(iter(given.values()))), self._sizes[0])
        for name, array in given.items():
            self.first[name][:rows] = array[:rows]
        return {name: array[:rows] for name, array in self._kit.expected(self._case).items()}

    def error_of_known(self, outputs: Mapping[str, np.ndarray]) -> float | None:
        """Largest relative error of the rows that the kit knows; None where it knows none of this shape."""
        if not self._known:
            return None
        found = {name: outputs[name][: len(want)] for name, want in self._known.items()}
        return self._kit.error(found, self._known)

    def at_case(self) -> tuple[Arrays, Arrays]:
        """Inputs of the case itself and what the kit expects of them."""
        return self._kit.inputs(self._case), self._kit.expected(self._case)
