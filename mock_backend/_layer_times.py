"""How long each node of one inference took on the mock: what its profiler is told."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtx_py._errors import ExecutionError
from trtx_py._types import Array, TensorInfo

from ._numerics import Numerics

if TYPE_CHECKING:
    import onnx

__all__ = ["LayerTimes"]

_SUFFIX = "_kernel_time"
#: The one layer of an inference that computes nothing.
_ZEROS = "zeros, nothing computed"
#: What the runner took besides its nodes: as TensorRT names reformats, so that the layers add up.
_BETWEEN = "between nodes"


class LayerTimes:
    """One inference, timed node by node. Used for one enqueue.

    A node's time is what computing it took on this machine, as the runner measured it (ONNX Runtime counts whole
    microseconds), where the backend goes by real time; and an equal share of the time that each kernel of this backend
    takes (``duration_s``), because the mock gives that to the inference and to no node. What the runner took besides
    is one more layer at the end. On any other clock computing takes no time, as everywhere in the mock, and the shares
    are all there is.

    Args:
        model: None for an inference that only writes zeros.
        real: the backend goes by the machine's own clock.
    """

    def __init__(
        self, model: onnx.ModelProto | None, tensors: tuple[TensorInfo, ...], *, threads: int, duration_s: float,
        real: bool,
    ) -> None:  # fmt: skip
        self._duration_ms = duration_s * 1e3
        self._real = real
        self._computing_ms = 0.0
        self._numerics = _TimedNumerics(model, tensors, threads=threads) if model is not None else None
        if self._numerics is not None:
            self._numerics.make_ready()  # now: it must not count as the kernel's time

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs, as Numerics gives them."""
        assert self._numerics is not None, "an inference of zeros computes nothing"
        start = time.perf_counter()
        outputs = self._numerics.run(inputs)
        self._computing_ms = (time.perf_counter() - start) * 1e3
        return outputs

    def layers(self) -> list[tuple[str, float]]:
        """Name and milliseconds of each node, in the order they ran."""
        if self._numerics is None:
            return [(_ZEROS, self._duration_ms)]
        found = self._numerics.node_times()
        share = self._duration_ms / len(found) if found else 0.0
        if not self._real:
            return [(name, share) for name, _ in found]
        between = self._computing_ms - sum(seconds for _, seconds in found) * 1e3
        return [*((name, share + seconds * 1e3) for name, seconds in found), (_BETWEEN, max(between, 0.0))]


class _TimedNumerics(Numerics):
    """Numerics of which every node is timed, in a session of its own without fusions: a node is a node."""

    def __init__(self, model: onnx.ModelProto, tensors: tuple[TensorInfo, ...], *, threads: int) -> None:
        super().__init__(model, tensors, threads=threads)
        self._profiled = False
        self._names: list[str] = []
        self._by_reference: list[tuple[str, float]] = []

    def make_ready(self) -> None:
        """Load the model; ``run`` would."""
        self._prepare()

    def _widened(self) -> onnx.ModelProto:
        model = super()._widened()
        taken = {node.name for node in model.graph.node}
        for index, node in enumerate(model.graph.node):
            if not node.name or node.name in self._names:
                node.name = next(
                    name for name in (f"{node.op_type}_{n}" for n in range(index, index + len(taken) + 2))
                    if name not in taken
                )  # fmt: skip
                taken.add(node.name)
            self._names.append(node.name)
        return model

    def _session_options(self, onnxruntime: Any) -> Any:
        options = super()._session_options(onnxruntime)
        # ONNX Runtime tells times through a file alone, which it opens now and ends with the session.
        folder = tempfile.mkdtemp(prefix="trtx-mock-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        options.enable_profiling = self._profiled = True
        options.profile_file_prefix = os.path.join(folder, "nodes")
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        return options

    def node_times(self) -> list[tuple[str, float]]:
        """Name and seconds of each node of the main graph that ran, in that order. Ends the session.

        Raises ExecutionError: ONNX Runtime's file of times is not whole, which it does not say itself.
        """
        if self.engine != "onnxruntime" or not self._profiled:
            return self._by_reference
        file = Path(self._runner.end_profiling())
        try:
            events = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise ExecutionError(
                f"the mock's times of layers, in {str(file.parent)!r}, are not whole ({error}); is that disk full? "
                "TMPDIR names another place"
            ) from error
        known = set(self._names)
        found = sorted(
            (event["ts"], event["name"].removesuffix(_SUFFIX), event["dur"] / 1e6)
            for event in events
            if event.get("cat") == "Node" and event["name"].endswith(_SUFFIX)
        )
        return [(name, seconds) for _, name, seconds in found if name in known]

    def _loaded(self, runner: Any) -> None:
        for node in getattr(runner, "rt_nodes_", ()):  # of ONNX's reference evaluator
            node.run = self._timing(node.onnx_node.name, node.run)

    def _timing(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = run(*args, **kwargs)
            self._by_reference.append((name, time.perf_counter() - start))
            return result

        return timed
