"""What a MultiDevice says about itself."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .._engine import EngineStatistics
from ._member import Member

if TYPE_CHECKING:
    from ._statistics import BatcherStatistics


@dataclass(frozen=True)
class DeviceStatistics:
    """One device of a MultiDevice.

    Attributes:
        device: ordinal.
        state: "serving", "quarantined", "recovering" or "lost".
        cause: why it does not serve, None while it does.
        last_error: how the latest attempt to bring it back failed, None if none did.
        next_attempt_s: seconds until the next attempt; None if none is waited for.
        completed: requests answered by this device; of ``infer_many``, chunks.
        failed: requests that ended with an error there.
        moved: requests that were given to it, and went to another device because it failed before they were launched.
        faults: how often it failed.
        attempts, recoveries: how often it was tried, and managed, to bring it back.
        outstanding_requests, outstanding_rows, outstanding_bytes: given to it and not answered.
        outstanding_s: how long these are expected to keep it busy, in seconds.
        utilisation: busy share of its GPU by NVML, with the strategy "utilisation" alone.
        engine: of the engine that serves, or served last.
        batcher: of the batcher, where there is one.
    """

    device: int
    state: str
    cause: str | None
    last_error: str | None
    next_attempt_s: float | None
    completed: int
    failed: int
    moved: int
    faults: int
    attempts: int
    recoveries: int
    outstanding_requests: int
    outstanding_rows: int
    outstanding_bytes: int
    outstanding_s: float
    utilisation: float | None
    engine: EngineStatistics
    batcher: BatcherStatistics | None


@dataclass(frozen=True)
class MultiDeviceStatistics:
    """A snapshot of ``pool.statistics()``; counts since it was opened. A call of ``infer_many`` counts as one.

    Attributes:
        accepted: calls that were let in.
        completed, failed, cancelled: by how they ended.
        dropped: accepted calls that ``aclose`` gave up.
        moved: requests that went on to another device.
        outstanding: accepted and not ended.
        devices: each device, in the order they were given in.
    """

    accepted: int
    completed: int
    failed: int
    cancelled: int
    dropped: int
    moved: int
    outstanding: int
    devices: tuple[DeviceStatistics, ...]


@dataclass
class Counts:
    """Calls by how they ended."""

    accepted: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    dropped: int = 0
    moved: int = 0


def statistics_of(member: Member) -> DeviceStatistics:
    """Of one device, at this moment."""
    load, opened = member.load, member.opened
    due_s = member.next_attempt_s
    return DeviceStatistics(
        device=member.device,
        state=member.state.value,
        cause=None if member.cause is None else str(member.cause),
        last_error=None if member.last_error is None else str(member.last_error),
        next_attempt_s=None if due_s is None else max(0.0, due_s - time.monotonic()),
        completed=member.completed,
        failed=member.failed,
        moved=member.moved,
        faults=member.faults,
        attempts=member.attempts,
        recoveries=member.recoveries,
        outstanding_requests=load.requests,
        outstanding_rows=load.rows,
        outstanding_bytes=load.nbytes,
        outstanding_s=load.seconds,
        utilisation=load.utilisation,
        engine=opened.engine.statistics(),
        batcher=None if opened.batcher is None else opened.batcher.statistics(),
    )
