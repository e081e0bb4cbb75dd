"""What opening a MultiDevice takes: its arguments checked, and the plan opened on all devices at once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

import anyio

from .._arguments import checked_int, checked_timeout
from .._errors import BackendUnavailableError, InvalidArgumentError, TrtxError
from ..cuda._properties import device_count, pci_bus_id
from ._member import Member, Opened
from ._nvml import Sampler, open_nvml

if TYPE_CHECKING:
    from ..backends.protocols import CudaDriver, TensorRTBackend


def checked_interval(sample_s: float) -> float:
    """Seconds between two looks at NVML. Raises InvalidArgumentError."""
    interval = checked_timeout(sample_s, "sample_s")
    if interval is None or interval < 0.01:
        raise InvalidArgumentError(f"sample_s is {sample_s!r}; expected 0.01 s or more")
    return interval


def checked_devices(devices: Sequence[int] | None, backend: TensorRTBackend) -> list[int]:
    """Ordinals, each there and once. Raises InvalidArgumentError, BackendUnavailableError."""
    count = device_count(backend)
    if devices is None:
        if not count:
            raise BackendUnavailableError(f"{backend.info.name}: there is no device; see device_properties(0) for why")
        return list(range(count))
    try:
        ordinals = [checked_int(device, "devices", minimum=0) for device in devices]
    except TypeError:
        ordinals = []
    if not ordinals:
        raise InvalidArgumentError(f"devices is {devices!r}; expected ordinals such as [0, 1], or None for all")
    for device in ordinals:
        if device >= count:
            raise InvalidArgumentError(
                f"device {device} does not exist: the driver sees {count}; CUDA_VISIBLE_DEVICES hides devices"
            )
        if ordinals.count(device) > 1:
            raise InvalidArgumentError(f"devices is {list(devices)!r}: {device} is there twice; use lanes for more")
    return ordinals


async def open_all(devices: Sequence[int], open_on: Callable[[int], Awaitable[Opened]]) -> list[Member]:
    """The plan on every device, at the same time.

    Raises what ``open_on`` does, naming the device; those that were opened are left to their owner.
    """
    opened: dict[int, Opened] = {}
    failed: dict[int, Exception] = {}

    async def open_one(device: int, scope: anyio.CancelScope) -> None:
        try:
            opened[device] = await open_on(device)
        except Exception as error:  # out of the task group, which would wrap it
            failed[device] = error
            scope.cancel()

    async with anyio.create_task_group() as group:
        for device in devices:
            group.start_soon(open_one, device, group.cancel_scope)
    for device in devices:
        if device in failed:
            raise named(failed[device], device)
    costs: dict[int, float] = {}
    return [Member(device, opened[device], costs) for device in devices]


def sampler_of(driver: CudaDriver, members: Sequence[Member], sample_s: float) -> Sampler:
    """What keeps the utilisation of these devices up to date. Raises BackendUnavailableError."""
    nvml, handles = open_nvml([pci_bus_id(driver, driver.cuDeviceGet(member.device)) for member in members])
    return Sampler(nvml, handles, [member.load for member in members], sample_s)


def named(error: Exception, device: int) -> Exception:
    """The same error, which says on which device it happened."""
    if isinstance(error, TrtxError) and not error.message.startswith(f"device {device}: "):
        error.message = f"device {device}: {error.message}"
        error.args = (error.message,)
    return error
