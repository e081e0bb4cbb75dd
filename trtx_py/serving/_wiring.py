"""The graph of an ensemble: checked once, when it is made, so that a request only follows it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .._arguments import closest
from .._engine import Engine
from .._errors import DTypeError, InvalidArgumentError, ShapeError
from .._types import TensorInfo
from ..cuda._array import DeviceArray
from ._steps import Call, Ports, Step, Values, call_of, name_of, ports_of, reads_on_device, require_open, shared_device

#: A value by its name, and whether it is the one in device memory.
Key = tuple[str, bool]


@dataclass(frozen=True)
class Node:
    """Something that runs once its sources are there: a step, or the copy of a value from the device to the host.

    Attributes:
        sources: for each input of the call the value that it reads.
        results: for each output of the call that is wanted the value that it becomes.
    """

    name: str
    target: object
    call: Call
    sources: tuple[tuple[str, Key], ...]
    results: tuple[tuple[str, Key], ...]
    is_step: bool = True


@dataclass(frozen=True)
class Wiring:
    """The checked graph.

    Attributes:
        needs: how many different values each node waits for.
        readers: for each value the nodes that wait for it.
        uses: for each value how many nodes, and the caller, want it.
        chain: no two nodes can ever run at the same time.
        inputs, outputs: what is known of the ensemble's own.
    """

    nodes: tuple[Node, ...]
    needs: tuple[int, ...]
    readers: Mapping[Key, tuple[int, ...]]
    uses: Mapping[Key, int]
    chain: bool
    ports: Ports


@dataclass(frozen=True)
class _End:
    """One end of a connection."""

    step: Step
    name: str
    port: str
    tensor: TensorInfo | None

    def __str__(self) -> str:
        return f"{self.port!r} of step {self.name!r}"


def wire(inputs: Sequence[str], outputs: Sequence[str], steps: Sequence[Step]) -> Wiring:
    """Check everything that can be known before a request, and lay the graph out. Raises as Ensemble says."""
    names = _names(steps)
    makers: dict[str, _End] = {}
    readers: dict[str, list[_End]] = {name: [] for name in inputs}
    for step, name in zip(steps, names, strict=True):
        require_open(step.target, name)
        ports = ports_of(step.target)
        _check_ports(step, name, ports)
        for port, value in step.outputs.items():
            end = _End(step, name, port, ports.outputs[port] if ports else None)
            if value in makers or value in inputs:
                other = makers.get(value, "the ensemble's inputs")
                raise InvalidArgumentError(
                    f"value {value!r} comes from {other} and from {end}; expected exactly one source: rename one"
                )
            makers[value] = end
        for port, value in step.inputs.items():
            readers.setdefault(value, []).append(_End(step, name, port, ports.inputs[port] if ports else None))
    _check_values(inputs, outputs, makers, readers)
    _check_order(names, steps, makers)
    for value, ends in readers.items():
        for end in ends:
            if value in makers:
                _check_connection(value, makers[value], end)
            elif end is not ends[0]:
                _check_alike(value, ends[0], end)
    return _lay_out(names, steps, inputs, outputs, makers, readers)


# Names


def _names(steps: Sequence[Step]) -> list[str]:
    for step in steps:
        if not isinstance(step, Step):
            raise InvalidArgumentError(f"steps has a {type(step).__name__}; expected Step objects")
    if not steps:
        raise InvalidArgumentError("steps is empty; expected at least one Step")
    given = Counter(step.name for step in steps if step.name)
    for name, count in given.items():
        if count > 1:
            raise InvalidArgumentError(f"{count} steps are named {name!r}; expected a name for each, or none")
    taken, names = set(given), []
    for step in steps:
        base = name = step.name or name_of(step.target)
        if not step.name:
            number = 1
            while name in taken:
                number += 1
                name = f"{base}-{number}"
            taken.add(name)
        names.append(name)
    return names


def _check_ports(step: Step, name: str, ports: Ports | None) -> None:
    if ports is None:
        return
    pairs = (("input", step.inputs, ports.inputs), ("output", step.outputs, ports.outputs))
    for kind, mapped, known in pairs:
        for port in mapped:
            if port not in known:
                close = closest(str(port), known)
                raise InvalidArgumentError(
                    f"step {name!r} has no {kind} {port!r}" + (f" (did you mean {close!r}?)" if close else "")
                    + f"; it has {', '.join(str(tensor or repr(other)) for other, tensor in known.items())}"
                )  # fmt: skip
    missing = [port for port in ports.inputs if port not in step.inputs]
    if missing:
        raise InvalidArgumentError(
            f"step {name!r} is given no value for its input {', '.join(map(repr, missing))}: name one in Step.inputs"
        )


def _check_values(
    inputs: Sequence[str], outputs: Sequence[str], makers: Mapping[str, _End], readers: Mapping[str, Sequence[_End]]
) -> None:
    for kind, given in (("inputs", inputs), ("outputs", outputs)):
        if len(set(given)) != len(given):
            raise InvalidArgumentError(f"{kind} are {tuple(given)!r}; expected each name once")
    if not outputs:
        raise InvalidArgumentError("outputs is empty; expected the name of at least one value that a step makes")
    known = [*inputs, *makers]
    for value, ends in readers.items():
        if not ends:
            raise InvalidArgumentError(f"no step reads the input {value!r} of the ensemble: leave it out")
        if value not in known:
            raise InvalidArgumentError(
                f"{ends[0]} reads value {value!r}, which nothing makes; {_there_is(value, known)}"
            )
    for value in outputs:
        if value not in makers:
            raise InvalidArgumentError(f"no step makes the output {value!r}; {_there_is(value, list(makers))}")
    for value, end in makers.items():
        if value not in readers and value not in outputs:
            raise InvalidArgumentError(
                f"value {value!r}, made by {end}, is neither read by a step nor an output: leave it out of Step.outputs"
            )


def _there_is(value: str, known: Sequence[str]) -> str:
    close = closest(str(value), known)
    return f"there is {', '.join(map(repr, known))}" + (f" (did you mean {close!r}?)" if close else "")


def _check_order(names: Sequence[str], steps: Sequence[Step], makers: Mapping[str, _End]) -> None:
    """Refuse cycles."""
    before = {
        name: [makers[value].name for value in step.inputs.values() if value in makers]
        for name, step in zip(names, steps, strict=True)
    }
    waiting = dict(before)
    while free := [name for name, needs in waiting.items() if not any(need in waiting for need in needs)]:
        for name in free:
            del waiting[name]
    if waiting:  # each of these waits for another of them: going back, one is met twice
        path = [next(iter(waiting))]
        while path[-1] not in path[:-1]:
            path.append(next(need for need in before[path[-1]] if need in waiting))
        circle = reversed(path[path.index(path[-1]) :])
        raise InvalidArgumentError(f"steps wait for each other in a circle: {' -> '.join(map(repr, circle))}")


# Tensors that are connected


def _check_connection(value: str, maker: _End, reader: _End) -> None:
    _check_alike(value, maker, reader)
    wanted = reader.tensor
    if maker.tensor is None or wanted is None or not isinstance(reader.step.target, Engine) or wanted.is_shape_tensor:
        return
    made = maker.tensor.shape
    fitting = [
        limits
        for limits in wanted.ranges
        if all(n < 0 or low <= n <= high for low, n, high in zip(limits.min, made, limits.max, strict=True))
    ]
    if wanted.ranges and not fitting:
        raise ShapeError(
            f"value {value!r}: {maker} has shape {made}, which no optimization profile of {reader} admits: "
            f"{', '.join(map(str, wanted.ranges))}"
        )


def _check_alike(value: str, one: _End, other: _End) -> None:
    """Raise unless the same tensor can be at both ends."""
    if one.tensor is None or other.tensor is None:
        return
    if one.tensor.dtype is not other.tensor.dtype:
        raise DTypeError(
            f"value {value!r}: {one} is {one.tensor.dtype.value} and {other} is {other.tensor.dtype.value}; expected "
            "one dtype: put a step that converts between them, or export the models alike"
        )
    shapes = one.tensor.shape, other.tensor.shape
    fits = len(shapes[0]) == len(shapes[1])
    if fits and isinstance(one.step.target, Engine) and isinstance(other.step.target, Engine):  # others split and pad
        fits = all(a == b or a < 0 or b < 0 for a, b in zip(*shapes, strict=True))
    if not fits:
        raise ShapeError(
            f"value {value!r}: {one} has shape {shapes[0]} and {other} has shape {shapes[1]}; expected equal ones "
            "(-1: any size)"
        )


# The graph


def _lay_out(
    names: Sequence[str],
    steps: Sequence[Step],
    inputs: Sequence[str],
    outputs: Sequence[str],
    makers: Mapping[str, _End],
    readers: Mapping[str, Sequence[_End]],
) -> Wiring:
    resident: dict[str, bool] = {}  # values that stay on the device, and whether the host needs a copy

    def stays(maker: _End, reader: _End) -> bool:
        both = reads_on_device(maker.tensor) and reads_on_device(reader.tensor)
        return both and shared_device(maker.step.target, reader.step.target)

    for value, maker in makers.items():
        here = [stays(maker, reader) for reader in readers.get(value, ())]
        if any(here):
            resident[value] = value in outputs or not all(here)
    kept = {makers[value].name for value in resident}  # steps that leave all that they make on the device
    for value, maker in makers.items():
        if maker.name in kept:
            resident.setdefault(value, True)

    def source(value: str, name: str, port: str) -> Key:
        on_device = value in resident and any(
            stays(makers[value], end) for end in readers[value] if (end.name, end.port) == (name, port)
        )
        return value, on_device

    nodes = []
    for name, step in zip(names, steps, strict=True):
        sources = tuple((port, source(value, name, port)) for port, value in step.inputs.items())
        results = tuple((port, (value, value in resident)) for port, value in step.outputs.items())
        nodes.append(Node(name, step.target, call_of(step, name, on_device=name in kept), sources, results))
    for value, copied in resident.items():
        if copied:
            ends = (("value", (value, True)),), (("value", (value, False)),)
            nodes.append(Node(f"copy of {value!r} to the host", None, _to_host, *ends, is_step=False))
    return _wiring(nodes, outputs, _ports(inputs, outputs, makers, readers))


def _ports(
    inputs: Sequence[str], outputs: Sequence[str], makers: Mapping[str, _End], readers: Mapping[str, Sequence[_End]]
) -> Ports:
    first = {value: next((end.tensor for end in readers[value] if end.tensor), None) for value in inputs}
    return Ports(first, {value: makers[value].tensor for value in outputs})


def _wiring(nodes: Sequence[Node], outputs: Sequence[str], ports: Ports) -> Wiring:
    waiting: dict[Key, list[int]] = {}
    maker = {key: index for index, node in enumerate(nodes) for _, key in node.results}
    needs: list[int] = []
    before: list[set[int]] = []
    for index, node in enumerate(nodes):
        keys = {key for _, key in node.sources}
        for key in keys:
            waiting.setdefault(key, []).append(index)
        needs.append(sum(key in maker for key in keys))
        before.append({maker[key] for key in keys if key in maker})
    readers = {key: tuple(found) for key, found in waiting.items()}
    uses = Counter({key: len(found) for key, found in waiting.items()})
    uses.update((name, False) for name in outputs)
    return Wiring(tuple(nodes), tuple(needs), readers, uses, _is_chain(before), ports)


def _is_chain(before: Sequence[set[int]]) -> bool:
    """True if every node but one waits, directly or not, for all that run before it: there is one order only."""
    left, done = set(range(len(before))), set[int]()
    while left:
        ready = [index for index in left if before[index] <= done]
        if len(ready) > 1:
            return False
        done.add(ready[0])
        left.remove(ready[0])
    return True


async def _to_host(inputs: dict[str, Any]) -> Values:
    """What TensorRT writes on the host is there already."""
    value = inputs["value"]
    return {"value": await value.to_host() if isinstance(value, DeviceArray) else value}
