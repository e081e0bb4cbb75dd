"""Brings devices back that failed: closes what is broken, waits, opens anew and tries it out, ever more rarely."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from numbers import Real

import anyio

from .._arguments import checked_int
from .._errors import InvalidArgumentError, TrtxError
from ._loop import Loop
from ._member import DeviceState, Member, Opened

_log = logging.getLogger("trtx_py")


@dataclass(frozen=True)
class RecoveryPolicy:
    """How a MultiDevice tries to bring a device back.

    Each attempt retains the device's primary context anew, opens the engine and runs it once. That helps where the
    device works again and nobody else holds its broken context. It does not help after a kernel that faulted (700, 716,
    719): the driver then refuses this process's work on every device until it ends, as was measured with driver 580 on
    H200s. Then all attempts fail, and the process has to be started anew.

    Attributes:
        initial_s: before the first attempt, in seconds.
        maximum_s: the longest time between two attempts.
        factor: each wait is this much longer than the one before.
        jitter: up to this share is taken off each wait, at random, so that not all processes try at once; 0 to 1.
        attempts: after so many that failed the device stays out of service.
    """

    initial_s: float = 1.0
    maximum_s: float = 60.0
    factor: float = 2.0
    jitter: float = 0.5
    attempts: int = 10

    def __post_init__(self) -> None:
        for name, low, high in (
            ("initial_s", 0.0, 86400.0), ("maximum_s", 0.0, 86400.0), ("factor", 1.0, 1000.0), ("jitter", 0.0, 1.0),
        ):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real) or not low <= float(value) <= high:
                raise InvalidArgumentError(f"{name} is {value!r}; expected a number from {low:g} to {high:g}")
        checked_int(self.attempts, "attempts", minimum=1)

    def delay_s(self, attempt: int, draw: float) -> float:
        """The wait before an attempt, counted from 1; ``draw`` is a random number from 0 to 1."""
        longest = self.initial_s
        for _ in range(attempt - 1):
            longest = min(longest * self.factor, self.maximum_s)
            if longest == self.maximum_s:
                break
        return min(longest, self.maximum_s) * (1.0 - self.jitter * draw)


class Supervisor:
    """Of one MultiDevice, in its event loop: a task for each device that is out of service.

    Args:
        policy: None: no device is brought back.
        loop: where the tasks run.
        open_on: opens the plan on a device.

    Attributes:
        changed: told whenever a device goes into service again.
    """

    def __init__(
        self,
        policy: RecoveryPolicy | None,
        loop: Loop,
        open_on: Callable[[int], Awaitable[Opened]],
    ) -> None:
        self._policy, self._loop, self._open_on = policy, loop, open_on
        self.changed: Callable[[], object] = bool
        self._scopes: dict[int, anyio.CancelScope] = {}
        self._idle: anyio.Event | None = None
        self._stopped = False
        self._random = random.Random()

    def take_over(self, member: Member) -> None:
        """A device was put into quarantine."""
        if self._stopped or member.device in self._scopes:
            return
        self._scopes[member.device] = anyio.CancelScope()
        self._loop.spawn(self._supervise(member))

    def cancel(self) -> None:
        """End all attempts, as soon as native code lets them. In the event loop; idempotent."""
        self._stopped = True
        for scope in list(self._scopes.values()):
            scope.cancel()

    async def stop(self) -> None:
        """End all attempts, and wait until they have ended. Idempotent."""
        self.cancel()
        if self._scopes:
            self._idle = self._idle or anyio.Event()
            await self._idle.wait()

    def refuse(self) -> None:
        """No attempt begins any more; on any thread."""
        self._stopped = True

    async def _supervise(self, member: Member) -> None:
        try:
            with self._scopes[member.device]:
                await self._bring_back(member)
        except Exception as error:  # nobody awaits this task
            member.last_error = error
            _log.exception("device %d is given up: bringing it back failed", member.device)
        finally:
            if member.state is not DeviceState.SERVING:
                member.state, member.next_attempt_s = DeviceState.LOST, None
            del self._scopes[member.device]
            if self._idle is not None and not self._scopes:
                self._idle.set()

    async def _bring_back(self, member: Member) -> None:
        try:
            await member.opened.close()
        except TrtxError as error:
            _log.warning("device %d: closing the broken engine failed: %s", member.device, error)
        policy = self._policy
        if policy is None:
            return
        for attempt in range(1, policy.attempts + 1):
            member.state = DeviceState.QUARANTINED
            delay_s = policy.delay_s(attempt, self._random.random())
            member.next_attempt_s = time.monotonic() + delay_s
            await anyio.sleep(delay_s)
            if self._stopped:
                return
            member.state, member.next_attempt_s = DeviceState.RECOVERING, None
            member.attempts += 1
            try:
                opened = await self._attempt(member.device)
            except TrtxError as error:
                member.last_error = error
                _log.warning("device %d: attempt %d of %d failed: %s", member.device, attempt, policy.attempts, error)
                continue
            member.install(opened)
            self.changed()
            _log.info("device %d serves again after %d attempts", member.device, attempt)
            return
        _log.error("device %d is given up after %d attempts: %s", member.device, policy.attempts, member.reason)

    async def _attempt(self, device: int) -> Opened:
        opened = await self._open_on(device)
        try:
            await opened.engine.warmup(1)
        except BaseException:
            await opened.close()
            raise
        return opened
