"""Inferences on a context and a stream of their own: what their parts take, and their layers. All of it blocks."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from .._engine import Engine
from .._errors import BorrowedError, EngineError, ExecutionError
from .._execution import is_out_of_memory
from .._types import Array, TensorInfo, TensorLocation, TensorMode
from ..backends.protocols import BackendContext
from ..cuda import Event
from ._distribution import Distribution
from ._report import LayerTime, LayerTimes, StageTimes

T = TypeVar("T")

_HOW = (
    "CUDA events around the copies and TensorRT's enqueue, one inference at a time on a context and stream of its own, "
    "not in a CUDA graph, enqueued while the GPU is kept busy with other copies"
)
_NOT_ASKED = "not asked for"

#: Copied from pinned memory to keep the GPU busy: 75 us on PCIe 5.
_BALLAST_BYTES = 4 << 20
_TRIED = 4
_MOST_COPIES = 128
_IN_A_ROW = 3


@dataclass(frozen=True)
class Run:
    """One inference of an OwnContext, in microseconds.

    Attributes:
        enqueue_us: of enqueueV3's call, on the CPU.
        h2d_us, gpu_us, d2h_us: between events.
        host_us: of everything that was enqueued, on the CPU.
        ahead: all was enqueued before the GPU began with it.
    """

    enqueue_us: float
    h2d_us: float
    gpu_us: float
    d2h_us: float
    host_us: float
    ahead: bool


class OwnContext:
    """One inference at a time, enqueued: copies in, TensorRT, copies out, with an event between them. For ``with``.

    ``settle`` before the runs that count.

    Everything it needs is made at the start and given back at the end: a context, a stream, device and pinned memory.

    Args:
        inputs: checked arrays, one for each input.
    Raises:
        BorrowedError: the plan does not share profiles, and callers' contexts hold them.
        EngineError, CudaError, MemoryBudgetError: the context or its memory could not be made.
        ExecutionError: the size of an output depends on data, which this cannot give memory for.
    """

    def __init__(self, engine: Engine, inputs: Mapping[str, Array]) -> None:
        self._device = engine.runtime.device
        self._driver = self._device._driver
        self._undo = contextlib.ExitStack()
        # (address on the device, address of pinned memory, bytes)
        self._ins: list[tuple[int, int, int]] = []
        self._outs: list[tuple[int, int, int]] = []
        try:
            self._open(engine, inputs)
        except BaseException:
            self._undo.close()
            raise

    def _open(self, engine: Engine, inputs: Mapping[str, Array]) -> None:
        device = self._device
        self._stream = device.create_stream()
        self._undo.callback(self._stream.close)
        self._marks: list[Event] = []
        for _ in range(4):
            self._marks.append(device.create_event(timing=True))
            self._undo.callback(self._marks[-1].close)
        memory = self._undo.enter_context(contextlib.ExitStack())  # given back once the context is gone
        self._context = self._undo.enter_context(engine.create_execution_context())
        self._undo.callback(self._stream.synchronize)
        ballast = device.allocate(_BALLAST_BYTES)
        memory.callback(ballast.close)
        source = device.allocate_pinned(_BALLAST_BYTES)
        memory.callback(source.close)
        self._ballast = ballast.address, source.address, _BALLAST_BYTES
        self._copies = 0
        for tensor in engine.io_tensors:
            if tensor.mode is TensorMode.INPUT:
                self._place_input(tensor, inputs[tensor.name], memory)
        for tensor in engine.io_tensors:
            if tensor.mode is TensorMode.OUTPUT:
                self._place_output(tensor, memory)

    def _place_input(self, tensor: TensorInfo, array: Array, memory: contextlib.ExitStack) -> None:
        pinned = self._device.allocate_pinned(max(array.nbytes, 1))
        memory.callback(pinned.close)
        pinned.array(array.shape, array.dtype)[...] = array
        if tensor.location is TensorLocation.HOST:
            self._context.set_tensor_address(tensor.name, pinned)
            return
        buffer = self._device.allocate(max(array.nbytes, 1))
        memory.callback(buffer.close)
        self._ins.append((buffer.address, pinned.address, array.nbytes))
        self._context.set_input_shape(tensor.name, array.shape)
        self._context.set_tensor_address(tensor.name, buffer)

    def _place_output(self, tensor: TensorInfo, memory: contextlib.ExitStack) -> None:
        shape = self._context.get_tensor_shape(tensor.name)
        if -1 in shape:
            raise ExecutionError(
                f"the size of output {tensor.name!r} depends on data (its shape is {shape}): parts of an inference are "
                "measured with memory that is there before; the measured run has its latency"
            )
        nbytes = tensor.dtype.nbytes(shape)
        pinned = self._device.allocate_pinned(max(nbytes, 1))
        memory.callback(pinned.close)
        if tensor.location is TensorLocation.HOST:
            self._context.set_tensor_address(tensor.name, pinned)
            return
        buffer = self._device.allocate(max(nbytes, 1))
        memory.callback(buffer.close)
        self._outs.append((buffer.address, pinned.address, nbytes))
        self._context.set_tensor_address(tensor.name, buffer)

    def run(self) -> Run:
        """One inference, behind as many copies of ballast as ``settle`` found."""
        before, begin, end, after = self._marks
        driver, stream = self._driver, self._stream
        started = time.perf_counter_ns()
        self._copy(driver.cuMemcpyHtoDAsync, [self._ballast] * self._copies)
        before.record(stream)
        self._copy(driver.cuMemcpyHtoDAsync, self._ins)
        begin.record(stream)
        called = time.perf_counter_ns()
        self._context.enqueue_v3(stream)
        enqueue_us = (time.perf_counter_ns() - called) / 1e3
        end.record(stream)
        self._copy(driver.cuMemcpyDtoHAsync, [(pinned, address, nbytes) for address, pinned, nbytes in self._outs])
        after.record(stream)
        host_us = (time.perf_counter_ns() - started) / 1e3
        ahead = not before.query()
        stream.synchronize()
        return Run(
            enqueue_us, before.elapsed_ms(begin) * 1e3, begin.elapsed_ms(end) * 1e3, end.elapsed_ms(after) * 1e3,
            host_us, ahead,
        )  # fmt: skip

    def settle(self, run: Callable[[], Run]) -> None:
        """Runs that do not count: kernels are loaded, and it is found how much ballast gives the CPU its lead.

        An event on an idle stream is over at once. Without a lead, all that the CPU does before the first kernel, and
        between two kernels, would be in the time between the events.
        """
        run()
        host_us = run().host_us
        before, begin, *_ = self._marks
        before.record(self._stream)
        self._copy(self._driver.cuMemcpyHtoDAsync, [self._ballast] * _TRIED)
        begin.record(self._stream)
        self._stream.synchronize()
        copy_us = before.elapsed_ms(begin) * 1e3 / _TRIED
        if copy_us < 1:  # no bus is so fast: the mock's virtual time stands still
            return
        self._copies = min(math.ceil((1.5 * host_us + 50) / copy_us), _MOST_COPIES)
        in_a_row = 0
        while in_a_row < _IN_A_ROW:
            in_a_row = in_a_row + 1 if run().ahead else 0
            if not in_a_row:
                if self._copies == _MOST_COPIES:
                    break
                self._copies = min(2 * self._copies, _MOST_COPIES)

    def _copy(self, copy: Callable[[int, int, int, int], None], pieces: Sequence[tuple[int, int, int]]) -> None:
        """Enqueue copies of (to, from, bytes)."""
        with self._device.current():
            for to, source, nbytes in pieces:
                if nbytes:
                    copy(to, source, nbytes, self._stream.handle)

    def profiled(self, collector: Layers | None) -> None:
        """From now on every ``run`` tells ``collector`` its layers by ``report``; None ends that."""
        self._native(lambda context: context.set_profiler(collector))

    def report(self) -> None:
        """The layers of the latest ``run``."""
        self._native(lambda context: context.report_to_profiler())

    def _native(self, call: Callable[[BackendContext], None]) -> None:
        logger = self._context.engine.runtime._logger
        with self._context._idle(), logger.attaching():
            call(self._context._execution.open_context())

    def __enter__(self) -> OwnContext:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._undo.close()


class Layers:
    """Sums up what the profiler is told. Source: nvinfer1::IProfiler"""

    def __init__(self) -> None:
        # By name and how often it came before in the same run: TensorRT does not promise that names differ.
        self._sums: dict[tuple[str, int], float] = {}
        self._seen: dict[str, int] = {}

    def report_layer_time(self, layer: str, ms: float) -> None:
        number = self._seen[layer] = self._seen.get(layer, 0) + 1
        self._sums[layer, number] = self._sums.get((layer, number), 0.0) + ms

    def next_run(self) -> None:
        """What comes now belongs to another inference."""
        self._seen.clear()

    def clear(self) -> None:
        """Forget all."""
        self._sums.clear()
        self._seen.clear()

    def times(self, found: Sequence[Run]) -> LayerTimes:
        """The means over these inferences."""
        runs, gpu_us = len(found), sum(each.gpu_us for each in found) / len(found)
        means = {key: total * 1e3 / runs for key, total in self._sums.items()}
        whole = sum(means.values())
        layers = tuple(
            LayerTime(name if number == 1 else f"{name} ({number})", mean, mean / whole if whole else 0.0)
            for (name, number), mean in means.items()
        )
        ahead = sum(each.ahead for each in found)
        return LayerTimes(runs, ahead, layers, whole, gpu_us, whole / gpu_us if gpu_us else 0.0, None)


def measure_stages(engine: Engine, inputs: Mapping[str, Array], runs: int, stop: threading.Event) -> StageTimes:
    """``runs`` inferences after two that do not count; fewer once ``stop`` is set."""

    def measure() -> StageTimes:
        with OwnContext(engine, inputs) as own:
            own.settle(own.run)
            return _stages(_repeat(own.run, runs, stop))

    return _or_unavailable(measure, no_stages)


def measure_layers(engine: Engine, inputs: Mapping[str, Array], runs: int, stop: threading.Event) -> LayerTimes:
    """Likewise, with a profiler."""

    def measure() -> LayerTimes:
        layers = Layers()
        with OwnContext(engine, inputs) as own:
            own.profiled(layers)

            def run() -> Run:
                layers.next_run()
                found = own.run()
                own.report()
                return found

            own.settle(run)
            layers.clear()
            found = _repeat(run, runs, stop)
        return layers.times(found) if found else no_layers("cancelled")

    return _or_unavailable(measure, no_layers)


def _repeat(run: Callable[[], Run], runs: int, stop: threading.Event) -> list[Run]:
    found: list[Run] = []
    while len(found) < runs and not stop.is_set():
        found.append(run())
    return found


def _stages(found: Sequence[Run]) -> StageTimes:
    if not found:
        return no_stages("cancelled")
    enqueue = Distribution.of([each.enqueue_us for each in found])
    h2d, gpu, d2h = (
        Distribution.of([getattr(each, part) for each in found]) for part in ("h2d_us", "gpu_us", "d2h_us")
    )
    whole = h2d.mean + gpu.mean + d2h.mean
    share_in, share_gpu, share_out = (each.mean / whole if whole else 0.0 for each in (h2d, gpu, d2h))
    ahead = sum(each.ahead for each in found)
    return StageTimes(len(found), ahead, enqueue, h2d, gpu, d2h, share_in, share_gpu, share_out, _HOW, None)


def _or_unavailable(measure: Callable[[], T], instead: Callable[[str], T]) -> T:
    """What was measured, or why it cannot be here: the rest of a report is worth having without it."""
    try:
        return measure()
    except (BorrowedError, EngineError) as error:
        return instead(error.message)
    except ExecutionError as error:
        if type(error) is ExecutionError or is_out_of_memory(error):
            return instead(error.message)
        raise


def no_stages(why: str = _NOT_ASKED) -> StageTimes:
    """A StageTimes that says why there are none."""
    return StageTimes(0, 0, None, None, None, None, 0.0, 0.0, 0.0, _HOW, why)


def no_layers(why: str = _NOT_ASKED) -> LayerTimes:
    """A LayerTimes that says why there are none."""
    return LayerTimes(0, 0, (), 0.0, 0.0, 0.0, why)
