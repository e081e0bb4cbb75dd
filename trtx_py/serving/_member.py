"""One device of a MultiDevice: what serves there now, and how it came to that."""

from __future__ import annotations

import enum
import inspect
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .._aio import run_shielded
from .._arguments import closest
from .._engine import Engine
from .._errors import InvalidArgumentError
from .._inputs import Arrays
from .._runtime import Runtime
from ._strategies import Load

if TYPE_CHECKING:
    from .._plan import Plan
    from .._resource import Resource
    from ..backends.protocols import TensorRTBackend
    from ._batcher import DynamicBatcher


class DeviceState(enum.Enum):
    """What a device of a MultiDevice does at the moment."""

    SERVING = "serving"
    #: It failed. Its engine is being closed, or the next attempt to bring it back is waited for.
    QUARANTINED = "quarantined"
    #: A new engine is being opened and tried out.
    RECOVERING = "recovering"
    #: It failed, and is not, or no longer, brought back.
    LOST = "lost"


@dataclass(frozen=True)
class OpenOptions:
    """What it takes to open the plan on any device."""

    plan: Plan
    backend: TensorRTBackend
    runtime: Mapping[str, Any]
    serving: Mapping[str, Any]
    batching: Mapping[str, Any] | None


def checked_batching(batching: Any) -> Mapping[str, Any] | None:
    """Arguments of a DynamicBatcher by name. Raises InvalidArgumentError; their values are checked where it is made."""
    if batching is None:
        return None
    if not isinstance(batching, Mapping):
        raise InvalidArgumentError(
            f"batching is {batching!r}; expected a mapping of DynamicBatcher's arguments by name, such as "
            "{'max_batch_size': 8}, or None for no batching"
        )
    from ._batcher import DynamicBatcher

    parameters = inspect.signature(DynamicBatcher).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    for name in batching:
        if name not in known:
            close = closest(name, known) if isinstance(name, str) else None
            hint = f"did you mean {close!r}?" if close else f"there are {', '.join(known)}"
            raise InvalidArgumentError(f"batching has the option {name!r}, which DynamicBatcher has not; {hint}")
    return dict(batching)


class Opened:
    """The plan on one device: runtime, engine, and batcher where there is one. All are the owner's own."""

    def __init__(self, runtime: Runtime, engine: Engine, batcher: DynamicBatcher | None) -> None:
        self.runtime, self.engine, self.batcher = runtime, engine, batcher

    @classmethod
    async def open(cls, device: int, options: OpenOptions, owner: Resource) -> Opened:
        """Raises as Runtime, ``deserialize`` and DynamicBatcher; then nothing is left open.

        Cancellation: delivered once native code has returned; what was made is closed.
        """
        made: list[Runtime] = []
        try:
            await run_shielded(
                lambda: made.append(Runtime(backend=options.backend, device=device, **options.runtime, _owner=owner))
            )
            engine = await made[0].deserialize(options.plan, **options.serving)
            engine._handle.internal = True
            batcher = None
            if options.batching is not None:
                from ._batcher import DynamicBatcher

                batcher = DynamicBatcher(engine, **options.batching)
                batcher._handle.internal = True
        except BaseException:
            for runtime in made:
                await close_part(runtime)
            raise
        return cls(made[0], engine, batcher)

    async def infer(self, inputs: Mapping[str, Any], how: Mapping[str, Any]) -> Arrays:
        """Run it here. Raises as ``Engine.infer`` or ``DynamicBatcher.infer``."""
        if self.batcher is None:
            return await self.engine.infer(inputs)
        return await self.batcher.infer(inputs, **how)

    async def close(self) -> None:
        """Close all of it, drained. Raises as ``aclose``."""
        await close_part(self.runtime)

    def drop_waiting(self, reason: str) -> None:
        """End what is accepted and not launched with ClosedError."""
        if self.batcher is not None:
            self.batcher._launcher.drop_all()
        self.engine._front.drop_waiting(reason)


async def close_part(part: Runtime) -> None:
    """Close what its owner made for itself before the owner is closed."""
    part._handle.internal = False
    await part.aclose()


class Member:
    """One device. Used in the pool's event loop alone.

    Args:
        costs: of requests by size on any device, which all devices share.

    Attributes:
        opened: what serves, or served last.
        load: the work that it has.
        cause: why it is out of service; None while it serves.
        last_error: of the latest attempt to bring it back.
        next_attempt_s: on the monotonic clock; None unless an attempt is waited for.
    """

    def __init__(self, device: int, opened: Opened, costs: dict[int, float]) -> None:
        self.device = device
        self.opened = opened
        self.load = Load(device, costs)
        self.state = DeviceState.SERVING
        self.cause: BaseException | None = None
        self.last_error: BaseException | None = None
        self.next_attempt_s: float | None = None
        self.completed = self.failed = self.moved = 0
        self.faults = self.attempts = self.recoveries = 0

    async def infer(self, inputs: Mapping[str, Any], rows: int, nbytes: int, how: Mapping[str, Any]) -> Arrays:
        """Run a request here, and keep count of it."""
        opened, load = self.opened, self.load
        begun_s: float | None = time.perf_counter()
        cost = load.begin(rows, nbytes)
        try:
            outputs = await opened.infer(inputs, how)
        except BaseException:
            begun_s = None
            raise
        else:
            self.completed += 1
            return outputs
        finally:
            if opened is self.opened:  # else the load is another's
                load.end(rows, nbytes, cost, begun_s, time.perf_counter())

    def quarantine(self, cause: BaseException) -> None:
        """Out of service from here on."""
        self.state, self.cause = DeviceState.QUARANTINED, cause
        self.faults += 1

    def install(self, opened: Opened) -> None:
        """Back in service."""
        self.opened = opened
        self.load.reset()
        self.state, self.cause = DeviceState.SERVING, None
        self.last_error = self.next_attempt_s = None
        self.recoveries += 1

    @property
    def reason(self) -> BaseException:
        """Why it does not serve: what it failed with, or the latest attempt to bring it back."""
        reason = self.cause if self.last_error is None else self.last_error
        assert reason is not None
        return reason

    @property
    def width(self) -> int:
        """How many requests keep it busy: each lane at work, and one more ready."""
        lanes = self.opened.engine._options.lanes
        return lanes + 1 if self.opened.batcher is None else 2 * lanes + 1
