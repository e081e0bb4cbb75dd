"""Lets TensorRT tell Python how long each layer took."""

from __future__ import annotations

from typing import Any

from ..._errors import EngineError
from ..protocols import LayerProfiler
from ._vendor import Vendor

#: What a context needs for it, on all versions from 8.6 on.
_PARTS = ("profiler", "enqueue_emits_profile", "report_to_profiler")


class ProfilerState:
    """What TensorRT told, on its way to the caller's profiler.

    Attributes:
        failure: what the profiler raised; it must not unwind through C++.
    """

    def __init__(self, profiler: LayerProfiler) -> None:
        self._profiler = profiler
        self.failure: BaseException | None = None

    def report(self, layer: str, ms: float) -> None:
        """Source: nvinfer1::IProfiler::reportLayerTime"""
        try:
            self._profiler.report_layer_time(str(layer), float(ms))
        except BaseException as error:  # raised again after the report
            self.failure = self.failure or error


def attach(vendor: Vendor, context: Any, profiler: LayerProfiler) -> tuple[ProfilerState, Any]:
    """Set ``profiler`` on a context of the vendor's; what TensorRT borrows has to be kept for as long as it is there.

    Layers are told when they are asked for, not by the enqueue, which would wait for the GPU and so stand between two
    events around it.

    Raises EngineError where this version has no profiler.
    """
    base: Any = getattr(vendor.module, "IProfiler", None)
    if base is None or not all(hasattr(type(context), part) for part in _PARTS):
        raise EngineError(f"{vendor.title} has no IProfiler that reports when it is asked; profile with layers=False")
    state = ProfilerState(profiler)

    class Profiler(base):  # type: ignore[misc]  # the base is known only at run time
        def __init__(self) -> None:
            base.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            state.report(layer_name, ms)

    native = Profiler()
    context.profiler = native
    context.enqueue_emits_profile = False
    return state, native


def detach(context: Any) -> None:
    """Have no profiler any more."""
    context.profiler = None
