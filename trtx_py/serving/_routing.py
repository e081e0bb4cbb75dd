"""The way of a request to a device of a MultiDevice, and on to another one where the first fails."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from .._errors import ClosedError, DeviceLostError, NoDeviceError, TrtxError
from .._inputs import Arrays
from .._lane import device_loss
from ._member import DeviceState, Member, Opened
from ._pool_statistics import Counts
from ._strategies import Chooser, Load, RequestInfo


class Router:
    """Used in the pool's event loop alone.

    Args:
        name: of the pool, for messages.
        chooser: the strategy.
        counts: of the pool.
        take_over: told of a device that was put out of service.

    Attributes:
        members: all devices.
        serving: those in service.
        dropping: what is not launched is given up.
    """

    def __init__(self, name: str, chooser: Chooser, counts: Counts, take_over: Callable[[Member], object]) -> None:
        self._name, self._chooser, self._counts, self._take_over = name, chooser, counts, take_over
        self.members: tuple[Member, ...] = ()
        self.serving: list[Member] = []
        self.dropping = False
        self._loads: list[Load] = []

    def start(self, members: Sequence[Member]) -> None:
        """These are the devices."""
        self.members = tuple(members)
        self.find_serving()

    def find_serving(self) -> None:
        """A device went out of service, or into it again."""
        self.serving = [member for member in self.members if member.state is DeviceState.SERVING]
        self._loads = [member.load for member in self.serving]

    def require_member(self) -> None:
        """Raise ClosedError or NoDeviceError unless a device can serve."""
        if self.dropping:
            raise ClosedError(f"{self._name} was closed before the request was launched")
        if not self.serving:
            raise NoDeviceError(
                f"{self._name} has no device in service; nothing was launched:",
                causes={member.device: member.reason for member in self.members},
            )

    def choose(self, request: RequestInfo) -> Member:
        """By the strategy. Raises as ``require_member``; InvalidArgumentError: the strategy's answer was none."""
        self.require_member()
        serving = self.serving
        return serving[0] if len(serving) == 1 else serving[self._chooser(self._loads, request)]

    async def route(self, inputs: Mapping[str, Any], request: RequestInfo, how: Mapping[str, Any]) -> Arrays:
        """Run a request where it can be run. Raises as ``MultiDevice.infer``."""
        while True:  # each turn but the last takes a device out of service
            member = self.choose(request)
            outputs = await self.run_on(member, inputs, request.rows, request.nbytes, how)
            if outputs is not None:
                return outputs

    async def run_on(
        self, member: Member, inputs: Mapping[str, Any], rows: int, nbytes: int, how: Mapping[str, Any]
    ) -> Arrays | None:
        """One request on one device; None: the device failed before the launch, so that it can go elsewhere.

        Raises DeviceLostError where it was launched, and whatever else the request ends with.
        """
        opened = member.opened
        try:
            return await member.infer(inputs, rows, nbytes, how)
        except TrtxError as error:
            lost = self.is_lost(member, opened, error)
            if lost and not getattr(error, "launched", False):
                member.moved += 1
                self._counts.moved += 1
                return None
            member.failed += 1
            if not lost:
                raise
            raise DeviceLostError(
                f"device {member.device} failed while this request ran on it: {device_loss(error) or error}; the "
                "request may be what broke it, so it was not tried on another device",
                device=member.device,
                launched=True,
            ) from error

    @asynccontextmanager
    async def held(self, member: Member, request: RequestInfo) -> AsyncIterator[Opened]:
        """The device has a request of this size for as long as the block lasts."""
        opened, load = member.opened, member.load
        cost = load.begin(request.rows, request.nbytes)
        try:
            yield opened
        except TrtxError as error:
            if not self.is_lost(member, opened, error):
                raise
            launched = getattr(error, "launched", False)
            raise DeviceLostError(
                f"device {member.device} failed while a slot of it was held: {device_loss(error) or error}",
                device=member.device,
                launched=launched,
            ) from error
        finally:
            if opened is member.opened:
                load.end(request.rows, request.nbytes, cost, None, 0.0)

    def is_lost(self, member: Member, opened: Opened, error: TrtxError) -> bool:
        """Whether it was the device that failed; then it is out of service."""
        if member.opened is not opened or member.state is not DeviceState.SERVING:
            # out of service already; its engine may have been closed under a request that was on the way to it
            return device_loss(error) is not None or (isinstance(error, ClosedError) and not self.dropping)
        loss = device_loss(error)
        if loss is None:
            return False
        member.quarantine(loss)
        self.find_serving()
        self._take_over(member)
        return True

    def drop_waiting(self) -> None:
        """From now on nothing is launched any more; what waits ends with ClosedError."""
        self.dropping = True
        for member in self.serving:
            member.opened.drop_waiting(f"{self._name} was closed before the request was launched")

    def busy(self) -> str | None:
        """What is outstanding, or None. On any thread."""
        outstanding = sum(member.load.requests for member in self.members)
        return f"{outstanding} requests outstanding" if outstanding else None
