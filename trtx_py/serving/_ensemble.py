"""Ensembles: several engines and functions as one awaitable."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.abc

from .._errors import ExecutionError, InvalidArgumentError
from .._inputs import Arrays
from ._metrics import SECONDS, Histogram, HistogramSnapshot
from ._steps import Step, require_open
from ._wiring import Key, Node, Wiring, wire

#: Given the name of a step, what it is to run inside of.
Around = Callable[[str], AbstractContextManager[object]]


@dataclass(frozen=True)
class EnsembleStatistics:
    """A snapshot of ``ensemble.statistics()``; counts since it was made.

    Attributes:
        completed: requests whose result was delivered.
        failed: requests that ended with an error.
        cancelled: requests that their caller cancelled.
        running: requests at work.
        completion_s: seconds from the call to the result, of completed requests.
        step_s: for each step, by name, the seconds that it took where it succeeded.
    """

    completed: int
    failed: int
    cancelled: int
    running: int
    completion_s: HistogramSnapshot
    step_s: Mapping[str, HistogramSnapshot]


class Ensemble:
    """A small graph of engines and functions: preprocessing, models side by side, a head.

    A step starts as soon as its inputs are there; steps that do not depend on each other run at the same time. Values
    between engines on the same device stay in its memory, and each is freed behind the last step that reads it.

    It owns nothing and need not be closed: keep its engines open as long as it is used. Any number of tasks, event
    loops (asyncio and trio) and threads may use it at once.

    Args:
        inputs: names of the values that callers give.
        outputs: names of the values that they get.
        steps: in any order; connected by the names of values.

    Raises:
        InvalidArgumentError: a value without or with two sources, one that nobody reads, a circle, an input or output
            that an engine does not have, two steps of one name.
        DTypeError, ShapeError: two connected tensors do not fit; names both.
        ClosedError: an engine is closed.
    """

    def __init__(self, *, inputs: Sequence[str], outputs: Sequence[str], steps: Sequence[Step]) -> None:
        self._inputs, self._outputs = _checked_names(inputs, "inputs"), _checked_names(outputs, "outputs")
        if not isinstance(steps, Iterable):
            raise InvalidArgumentError(f"steps is {steps!r}; expected a sequence of Step objects")
        self._steps = tuple(steps)
        self._wiring = wire(self._inputs, self._outputs, self._steps)
        self._ports = self._wiring.ports  # as a step of another ensemble it is checked against this
        self._lock = threading.Lock()
        self._completed = self._failed = self._cancelled = self._running = 0
        self._completion = Histogram(SECONDS)
        self._seconds = {node.name: Histogram(SECONDS) for node in self._wiring.nodes if node.is_step}

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the values that callers give."""
        return self._inputs

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the values that they get."""
        return self._outputs

    @property
    def step_names(self) -> tuple[str, ...]:
        """Of each step, in the order they were given."""
        return tuple(self._seconds)

    async def infer(self, inputs: Mapping[str, Any], *, around: Around | None = None) -> Arrays:
        """Run the graph once.

        Args:
            inputs: one array for each input of the ensemble, by name; as the steps that read it take it.
            around: for tracing: each step runs inside ``with around(name):``, in the task that runs it. Parallel steps
                have contexts (contextvars) of their own, copied from the caller's.
        Returns:
            Host arrays that the caller owns, by output name. Where a function is the last step, what it returned.
        Raises:
            InvalidArgumentError: names do not fit, or a function returned something else than its step promises.
            ClosedError: an engine is closed; nothing ran.
            As the steps: the first error, as it is, with a note (``__notes__``) that names the step. The other steps
            have been cancelled and have ended by then.
        Cancellation: all steps are cancelled, each as its target defines it, and have ended when it is delivered.
            Functions in worker threads cannot be cancelled: they are waited for, their result is dropped.
        """
        self._check(inputs)
        run = _Run(self._wiring, inputs, around)
        began = time.perf_counter()
        with self._lock:
            self._running += 1
        completed = failed = 0
        try:
            await run.to_the_end()
            outputs = {name: run.values[name, False] for name in self._outputs}
            completed = 1
            return outputs
        except Exception:
            failed = 1
            raise
        finally:  # also for a cancellation, and where the event loop went away under the coroutine
            run.values.clear()
            self._count(run, time.perf_counter() - began, completed, failed)

    def _check(self, inputs: Mapping[str, Any]) -> None:
        expected = f"expected a mapping of array by name: {', '.join(map(repr, self._inputs)) or 'empty'}"
        if not isinstance(inputs, Mapping):
            raise InvalidArgumentError(f"inputs is {type(inputs).__name__}; {expected}")
        if inputs.keys() != set(self._inputs):
            problems = [f"{name!r} is missing" for name in self._inputs if name not in inputs]
            problems += [f"there is no input {name!r}" for name in inputs if name not in self._inputs]
            raise InvalidArgumentError(f"inputs do not fit the ensemble: {', '.join(problems)}; {expected}")
        for node in self._wiring.nodes:
            require_open(node.target, node.name)

    def _count(self, run: _Run, seconds: float, completed: int, failed: int) -> None:
        with self._lock:
            self._running -= 1
            self._completed += completed
            self._failed += failed
            self._cancelled += not (completed or failed)
            if completed:
                self._completion.observe(seconds)
            for name, taken in run.seconds:
                self._seconds[name].observe(taken)

    def statistics(self) -> EnsembleStatistics:
        """Counts and times, at this moment."""
        with self._lock:
            return EnsembleStatistics(
                completed=self._completed,
                failed=self._failed,
                cancelled=self._cancelled,
                running=self._running,
                completion_s=self._completion.snapshot(),
                step_s={name: histogram.snapshot() for name, histogram in self._seconds.items()},
            )

    def __repr__(self) -> str:
        return f"<Ensemble {', '.join(self._inputs)} -> {', '.join(self.step_names)} -> {', '.join(self._outputs)}>"


class _Run:
    """One request on its way through the graph. Belongs to one event loop."""

    def __init__(self, wiring: Wiring, inputs: Mapping[str, Any], around: Around | None) -> None:
        self._wiring = wiring
        self._around = around
        self._needs = list(wiring.needs)
        self._uses = dict(wiring.uses)
        self._group: anyio.abc.TaskGroup | None = None
        self._error: BaseException | None = None
        self._left = len(wiring.nodes)
        self.values: dict[Key, Any] = {(name, False): value for name, value in inputs.items()}
        self.seconds: list[tuple[str, float]] = []

    async def to_the_end(self) -> None:
        """Run all nodes. Raises the first error; whatever happens, nothing runs any more when this is over."""
        first = [index for index, needs in enumerate(self._needs) if not needs]
        if self._wiring.chain:
            await self._follow(first[0])  # never two at once: no tasks, no group
            return
        try:
            async with anyio.create_task_group() as self._group:
                for index in first:
                    self._group.start_soon(self._attempt, index)
        finally:
            self._group = None
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback refers to this frame: no cycles
        if self._left:
            raise ExecutionError(
                f"{self._left} steps of the ensemble did not run: a step was cancelled, and not by the caller"
            )

    async def _attempt(self, index: int) -> None:
        """``_follow`` in a task: the first error is kept for the caller, as it is, and ends the other tasks."""
        try:
            await self._follow(index)
        except anyio.get_cancelled_exc_class() as cancellation:
            # It is kept with the task, in a cycle: not with the frames it came through, which hold device arrays.
            raise cancellation.with_traceback(None)  # noqa: B904 - it is the same one
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            if self._error is None:
                self._error = error
            assert self._group is not None
            self._group.cancel_scope.cancel()

    async def _follow(self, index: int) -> None:
        """Run a node, and in the same task one of those that were waiting for it only, to the end."""
        ready = [index]
        while ready:
            index = ready.pop()
            for other in ready:
                assert self._group is not None  # a chain has one at a time
                self._group.start_soon(self._attempt, other)
            ready = await self._run(index)

    async def _run(self, index: int) -> list[int]:
        """Run a node; returns the nodes that can run now."""
        node = self._wiring.nodes[index]
        inputs = {port: self.values[key] for port, key in node.sources}
        for key in {key for _, key in node.sources}:
            self._uses[key] -= 1
            if not self._uses[key]:
                del self.values[key]  # the last reader has it
        try:
            found = await self._call(node, inputs)
        except Exception as error:
            _note(error, f"in {'step ' + repr(node.name) if node.is_step else 'the ' + node.name} of an ensemble")
            raise
        self._left -= 1
        ready = []
        for port, key in node.results:
            self.values[key] = found[port]
            for reader in self._wiring.readers.get(key, ()):
                self._needs[reader] -= 1
                if not self._needs[reader]:
                    ready.append(reader)
        return ready

    async def _call(self, node: Node, inputs: dict[str, Any]) -> Mapping[str, Any]:
        if not node.is_step:
            return await node.call(inputs)
        began = time.perf_counter()
        if self._around is None:
            found = await node.call(inputs)
        else:
            with self._around(node.name):
                found = await node.call(inputs)
        self.seconds.append((node.name, time.perf_counter() - began))
        return found


def _note(error: Exception, text: str) -> None:
    """As ``add_note`` of CPython 3.11; where that is missing, what reads notes finds it all the same."""
    notes = getattr(error, "__notes__", None)
    if notes is None:
        notes = []
        error.__notes__ = notes  # type: ignore[attr-defined,unused-ignore]
    if text not in notes:  # one error can end several requests of a batch
        notes.append(text)


def _checked_names(names: Sequence[str], what: str) -> tuple[str, ...]:
    found = None if isinstance(names, str) or not isinstance(names, Iterable) else tuple(names)
    if found is None or not all(isinstance(name, str) for name in found):
        raise InvalidArgumentError(f"{what} is {names!r}; expected a sequence of names, such as ('image',)")
    return found
