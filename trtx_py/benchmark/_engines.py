"""The engines of one benchmark: opened when first asked for, shared by contenders with the same options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from .._aio import run_shielded
from .._build import default_range, read_source
from .._engine import Engine
from .._open import open_engine
from .._plan import Plan
from .._types import TensorInfo
from ..quantize._store import inputs_of, load_model
from ._spec import WITH_ENGINE, BenchmarkSpec, Contender, Source

if TYPE_CHECKING:
    import onnx

#: Batches that a build without profiles serves; see open_engine.
_DEFAULT_LARGEST = 32


class SourceModel:
    """The source, read once.

    Attributes:
        content: a Plan, or path or bytes of an ONNX model.
        model: the ONNX model with its weights; None for a plan.
    """

    def __init__(self, spec: BenchmarkSpec) -> None:
        self.content: Plan | bytes | str = read_source(spec.source)
        self.model: onnx.ModelProto | None = None
        if not isinstance(self.content, Plan):
            self.model, _ = load_model(self.content)

    def profiles(self, spec: BenchmarkSpec) -> Any:
        """The spec's; without any, what its batches and shapes need; None where the defaults do."""
        if spec.profiles is not None or self.model is None:
            return spec.profiles
        largest = max((c.batch for c in spec.contenders if c.kind in WITH_ENGINE), default=1)
        largest = max(largest, *(_batch_limit(contender) for contender in spec.contenders))
        inputs = inputs_of(self.model)
        dynamic = any(-1 in tensor.shape for tensor in inputs)
        if not dynamic or (largest <= _DEFAULT_LARGEST and not spec.shapes):
            return None
        return [{tensor.name: _range(tensor, spec.shapes.get(tensor.name), largest) for tensor in inputs}]


def _batch_limit(contender: Contender) -> int:
    found = contender.batcher.get("max_batch_size", 1)
    return found if isinstance(found, int) else 1


def _range(tensor: TensorInfo, given: Sequence[int] | None, largest: int) -> tuple[tuple[int, ...], ...]:
    usual = default_range(tensor)
    columns = []
    for axis, size in enumerate(tensor.shape):
        if size != -1:
            columns.append((size, size, size))
        elif axis == 0:
            columns.append((1, largest, largest))
        elif given is not None and axis < len(given):
            columns.append((given[axis],) * 3)
        else:
            columns.append((usual.min[axis], usual.opt[axis], usual.max[axis]))
    return tuple(zip(*columns, strict=True)) if columns else ((), (), ())


class EnginePool:
    """Engines by precision and options. Closed by the stack, in reverse order."""

    def __init__(self, spec: BenchmarkSpec, source: SourceModel, stack: AsyncExitStack) -> None:
        self._spec, self._source, self._stack = spec, source, stack
        self._open: list[tuple[object, Engine]] = []

    async def get(
        self, precision: str | None = None, options: Mapping[str, object] | None = None, *, private: bool = False,
        source: Source | None = None,
    ) -> Engine:  # fmt: skip
        """The engine with these options; with ``private`` one that nobody else gets. Raises as ``open_engine``."""
        merged = {**self._spec.options, **(options or {})}
        key = (precision, merged, source)
        if not private:
            for known, engine in self._open:
                if known == key:
                    return engine
        engine = await self._opened(self._stack, precision, merged, source)
        if not private:
            self._open.append((key, engine))
        return engine

    async def within(self, stack: AsyncExitStack) -> Engine:
        """One with the spec's options alone, closed by another stack."""
        return await self._opened(stack, None, self._spec.options)

    async def _opened(
        self, stack: AsyncExitStack, precision: str | None, options: Mapping[str, object], source: Source | None = None
    ) -> Engine:
        def read() -> tuple[Plan | bytes | str, Any]:
            content = self._source.content if source is None else read_source(source)
            return content, None if isinstance(content, Plan) else self._source.profiles(self._spec)

        content, profiles = await run_shielded(read)
        return await stack.enter_async_context(
            open_engine(
                content, self._spec.backend, self._spec.device, profiles, precision,
                **options,  # type: ignore[arg-type]  # open_engine checks each by name
            )
        )  # fmt: skip
