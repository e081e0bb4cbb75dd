"""How an engine's contexts are made: with whose memory, and on TensorRT-RTX with which configuration."""

from __future__ import annotations

from typing import Any, Literal

from ..._types import Severity
from .._flavours import SIZED_DEVICE_MEMORY_SINCE_LEAN, Version
from ..protocols import LogSink
from ._guards import deprecated_calls
from ._runtime_cache import RuntimeCache
from ._vendor import Vendor

#: How a context without memory of its own is told where to compute: set_device_memory, or the older property.
MemorySetter = Literal["set_device_memory", "device_memory"]

_WITHOUT_MEMORY = "create_execution_context_without_device_memory"


class ContextMaker:
    """What the version behind one engine can do, and makes contexts by it.

    Attributes:
        memory_setter: how contexts made with ``own_memory=False`` get memory; None if there can be no such contexts.
        captures_itself: contexts capture CUDA graphs on their own.
    Source: nvinfer1::ICudaEngine::createExecutionContext, IRuntimeConfig
    """

    def __init__(self, vendor: Vendor, log: LogSink, engine: Any, *, lean: Version | None, cache: RuntimeCache) -> None:
        self._vendor = vendor
        self._log = log
        self._cache = cache
        self._strategies = vendor.members("ExecutionContextAllocationStrategy")
        self._graphs = vendor.members("CudaGraphStrategy")
        # TensorRT 10 and 11 have an IRuntimeConfig too, with nothing in it that the strategy alone does not say.
        self._configures = hasattr(vendor.module, "IRuntimeCache") or bool(self._graphs)
        # Measured for 8.6 behind 10.16: this method and the property work, newer ones would reach past its end.
        self._old_lean = lean is not None and lean < (10,)
        self.captures_itself = "WHOLE_GRAPH_CAPTURE" in self._graphs
        self.memory_setter: MemorySetter | None = self._find_setter(engine, lean)

    def _find_setter(self, engine: Any, lean: Version | None) -> MemorySetter | None:
        by_strategy = not self._old_lean and "USER_MANAGED" in self._strategies
        if not by_strategy and not hasattr(engine, _WITHOUT_MEMORY):
            return None
        context: Any = getattr(self._vendor.module, "IExecutionContext", None)
        if hasattr(context, "set_device_memory") and (lean is None or lean >= SIZED_DEVICE_MEMORY_SINCE_LEAN):
            return "set_device_memory"
        return "device_memory" if hasattr(context, "device_memory") else None

    def make(self, engine: Any, *, own_memory: bool, cuda_graphs: bool) -> tuple[Any, Any]:
        """The context, None if TensorRT made none, and what must be kept as long as the context."""
        if self._configures:
            return self._make_configured(engine, own_memory, cuda_graphs)
        if own_memory:
            return engine.create_execution_context(), None
        if not self._old_lean and "USER_MANAGED" in self._strategies:
            return engine.create_execution_context(self._strategies["USER_MANAGED"]), None
        with deprecated_calls():
            return getattr(engine, _WITHOUT_MEMORY)(), None

    def _make_configured(self, engine: Any, own_memory: bool, cuda_graphs: bool) -> tuple[Any, Any]:
        """For TensorRT-RTX, which no machine here runs: by the signatures of 1.7, run with stand-ins only.

        Never ask a context or configuration for its configuration or cache: the bindings hand out a second owner.
        """
        config = engine.create_runtime_config()
        if config is None:
            return None, None
        if not own_memory:
            config.set_execution_context_allocation_strategy(self._strategies["USER_MANAGED"])
        if self.captures_itself:
            wanted = self._graphs["WHOLE_GRAPH_CAPTURE" if cuda_graphs else "DISABLED"]
            config.cuda_graph_strategy = wanted
            # The property's setter drops the bool by which TensorRT refuses.
            if config.cuda_graph_strategy != wanted:
                self._log(
                    Severity.WARNING,
                    f"{self._vendor.title} refused CudaGraphStrategy.{wanted.name}; contexts stay with "
                    f"{config.cuda_graph_strategy.name}",
                )
        self._cache.attach(config)
        return engine.create_execution_context(config), config
