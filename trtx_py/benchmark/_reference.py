"""What outputs are compared with: ONNX Runtime on the CPU, a file, or a bare loop."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import numpy as np

from .._aio import run_shielded
from .._arguments import checked_path
from .._errors import BackendUnavailableError, CalibrationError, InvalidArgumentError
from .._types import Array
from ..quantize._reference import Runner
from ..quantize._store import load_model
from ._check import Expected
from ._engines import EnginePool, SourceModel
from ._inputs import InputMaker, InputSet, arrays_of
from ._load import Outputs
from ._spec import BenchmarkSpec
from ._targets import bare_reference

if TYPE_CHECKING:
    import onnx


class Reference:
    """Gives the outputs that are right.

    Attributes:
        name: what it is, for messages and the result.
        model: the ONNX model, where there is one.
        exact: it runs the very plan that is measured, so that no precision excuses a difference.
    """

    def __init__(self, spec: BenchmarkSpec, source: SourceModel, pool: EnginePool, maker: InputMaker) -> None:
        self._pool, self._maker = pool, maker
        self.model: onnx.ModelProto | None = source.model
        self.exact = False
        self._file: dict[str, Array] | None = None
        self._runner: Runner | None = None
        if spec.reference is not None:
            path = checked_path(spec.reference, "reference")
            if os.path.splitext(path)[1].lower() == ".npz":
                self._open_file(spec, path)
                return
            self.model = load_model(path)[0]
        if self.model is not None:
            try:
                self._runner = Runner(self.model)
            except (BackendUnavailableError, CalibrationError) as error:
                if spec.reference is not None:
                    raise
                reason = " ".join(str(error).split())[:200]
                self.name = f"a bare loop over the plan, because ONNX Runtime cannot say: {reason}"
            else:
                self.name = "ONNX Runtime on the CPU, FP32"
                return
        else:
            self.name = "a bare loop over the same plan"
        self.exact = True

    def _open_file(self, spec: BenchmarkSpec, path: str) -> None:
        if spec.inputs is None:
            raise InvalidArgumentError(
                f"reference {path!r} has the outputs of certain inputs: give them as inputs=, sample for sample"
            )
        self._file = arrays_of(path, "reference")
        self.name = f"the file {os.path.basename(path)}"

    async def expected(self, batch: int, sets: Sequence[InputSet]) -> Expected:
        """Outputs for these sets. Raises InvalidArgumentError if they cannot be told from each other."""
        if self._runner is not None or self._file is not None:
            return await run_shielded(lambda: Expected(self._known(sets), self.name))
        arrays = [each.arrays for each in sets]
        shapes = self._maker.shapes(batch)
        # An engine of its own: its lanes and the bare loop's context may not fit on one profile.
        async with AsyncExitStack() as stack:
            engine = await self._pool.within(stack)
            return await run_shielded(lambda: Expected(bare_reference(engine, shapes, arrays), self.name))

    def _known(self, sets: Sequence[InputSet]) -> list[Outputs]:
        if self._runner is not None:
            runner = self._runner
            return [runner.run(each.arrays) for each in sets]
        assert self._file is not None
        found: list[Outputs] = []
        for each in sets:
            rows = np.asarray(each.samples, np.int64)
            short = [name for name, array in self._file.items() if array.ndim == 0 or len(array) <= rows.max()]
            if short:
                raise InvalidArgumentError(
                    f"{self.name} has fewer samples than the inputs in {', '.join(short)}; expected one for each"
                )
            found.append({name: array[rows] for name, array in self._file.items()})
        return found
