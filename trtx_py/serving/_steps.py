"""The steps of an ensemble: what may be one, what is known of its inputs and outputs, and how it is called."""

from __future__ import annotations

import contextvars
import functools
import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

from .._aio import run_shielded
from .._engine import Engine
from .._errors import ClosedError, InvalidArgumentError
from .._interop import dlpack_type
from .._resource import Resource
from .._types import TensorInfo, TensorLocation, TensorMode


class Inferable(Protocol):
    """What serves requests: an Engine, DynamicBatcher, MultiDevice, Ensemble, or an object of the caller's own."""

    async def infer(self, inputs: Mapping[str, Any], /) -> Mapping[str, Any]:
        """Arrays by output name for arrays by input name."""
        ...


Function = Callable[..., Any]
Values = Mapping[str, Any]
Call = Callable[[dict[str, Any]], Awaitable[Values]]


@dataclass(frozen=True)
class Step:
    """One step of an Ensemble.

    Attributes:
        target: an Engine, a DynamicBatcher, anything else with ``async infer(inputs)``, or a function. A function is
            called with its inputs as keyword arguments and returns a mapping of arrays by output name. A coroutine
            function runs in the event loop, any other in a worker thread.
        inputs: for each input of the target the name of the value that it reads.
        outputs: for the outputs that are wanted the name of the value that each becomes.
        name: in messages, statistics and spans; "" takes that of the engine or function, made unique.
    """

    target: Inferable | Function
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    name: str = ""


@dataclass(frozen=True)
class Ports:
    """What a target says of its inputs and outputs, by name; None for one that is known by its name only."""

    inputs: Mapping[str, TensorInfo | None]
    outputs: Mapping[str, TensorInfo | None]


def ports_of(target: object) -> Ports | None:
    """None if nothing is known before it runs: functions, and objects of the caller's own without ``io_tensors``."""
    known: Any = getattr(target, "_ports", None)  # an ensemble in an ensemble
    if isinstance(known, Ports):
        return known
    tensors = getattr(target, "io_tensors", None)
    if tensors is None:  # a batcher has what its engine has
        tensors = getattr(getattr(target, "engine", None), "io_tensors", None)
    if not isinstance(tensors, tuple) or not all(isinstance(tensor, TensorInfo) for tensor in tensors):
        return None
    return Ports(
        {tensor.name: tensor for tensor in tensors if tensor.mode is TensorMode.INPUT},
        {tensor.name: tensor for tensor in tensors if tensor.mode is TensorMode.OUTPUT},
    )


def name_of(target: object) -> str:
    """What to call a step that was given no name."""
    while isinstance(target, functools.partial):
        target = target.func
    own = getattr(target, "name", None) or getattr(getattr(target, "engine", None), "name", None)
    own = own or getattr(target, "__name__", None)
    return own if isinstance(own, str) else type(target).__name__


def shared_device(producer: object, consumer: object) -> bool:
    """True if both are engines on the same device: what one leaves in its memory the other can read there."""
    if not isinstance(producer, Engine) or not isinstance(consumer, Engine):
        return False
    here, there = producer.runtime.device, consumer.runtime.device
    # Two runtimes share the device's primary context, so long as one driver stands behind both; two mocks have two.
    return here._driver is there._driver and here.ordinal == there.ordinal


def reads_on_device(tensor: TensorInfo | None) -> bool:
    """True if an engine can take this input from another one's device memory: no shape tensors, no exotic types."""
    return (
        tensor is not None and tensor.location is TensorLocation.DEVICE and dlpack_type(tensor.dtype.numpy) is not None
    )


def require_open(target: object, step: str) -> None:
    """Raise ClosedError, naming the step, if what it calls is closed."""
    if getattr(target, "closed", False) is not True:
        return
    what = "its target is closed"
    if isinstance(target, Resource):
        try:
            target._handle.require_open()
        except ClosedError as error:
            what = error.message
    raise ClosedError(f"step {step!r} cannot run: {what}; an ensemble does not own its engines: keep them open")


def call_of(step: Step, name: str, *, on_device: bool) -> Call:
    """How to run a step. ``on_device``: an engine whose outputs stay in device memory."""
    target = step.target
    if isinstance(target, Engine):
        return target.infer_on_device if on_device else target.infer
    infer = getattr(target, "infer", None)
    if callable(infer):
        return _checked(cast("Call", infer), step, name)
    if not callable(target):
        raise InvalidArgumentError(
            f"step {name!r} has a {type(target).__name__} as its target; expected an Engine, a DynamicBatcher, another "
            "object with async infer(inputs), or a function"
        )
    return _checked(_call_of_function(target), step, name)


def _call_of_function(function: Function) -> Call:
    plain: Any = function
    while isinstance(plain, functools.partial):
        plain = plain.func
    if inspect.iscoroutinefunction(plain) or inspect.iscoroutinefunction(getattr(plain, "__call__", None)):  # noqa: B004

        async def call(inputs: dict[str, Any]) -> Values:
            found: Values = await function(**inputs)
            return found
    else:

        async def call(inputs: dict[str, Any]) -> Values:
            # Not anyio.to_thread: a task.cancel() of asyncio's own would leave the thread running behind it.
            context = contextvars.copy_context()
            found: Any = await run_shielded(lambda: context.run(functools.partial(function, **inputs)))
            if inspect.isawaitable(found):  # an ordinary function that returns a coroutine
                found = await found
            return cast("Values", found)

    return call


def _checked(call: Call, step: Step, name: str) -> Call:
    """``call``, with a check that what comes back is what the step promises."""
    wanted = tuple(step.outputs)

    async def checked(inputs: dict[str, Any]) -> Values:
        found: object = await call(inputs)
        if not isinstance(found, Mapping):
            raise InvalidArgumentError(
                f"step {name!r} returned a {type(found).__name__}; expected a mapping of output name to array, with "
                f"{', '.join(map(repr, wanted))}"
            )
        missing = [output for output in wanted if output not in found]
        if missing:
            raise InvalidArgumentError(
                f"step {name!r} returned {', '.join(map(repr, found)) or 'nothing'}; "
                f"{', '.join(map(repr, missing))} is missing: return it, or leave it out of the step's outputs"
            )
        return found

    return checked
