"""The dynamic batcher: many small requests become few large launches."""

from __future__ import annotations

import dataclasses
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import anyio

from .._arguments import checked_int, checked_timeout
from .._errors import ClosedError, InvalidArgumentError, ShapeError, TrtxError
from .._graphs import ReroutedError
from .._inputs import Arrays
from .._loops import current_hub, finish
from .._resource import Handle, Resource, process_ends
from ._copier import Copier
from ._groups import GraphPools, Groups
from ._jobs import Job, Parts
from ._launcher import Launcher
from ._loop import Loop, running_loop, running_native, until_of
from ._many import Crew, ManyRequest, NativeWay
from ._policy import NEVER, BatchPolicy, Scheduler, Ticket
from ._rows import Crop, Group, Pad, RowLayout, Rows, ladder
from ._statistics import BatcherStatistics, Counts

if TYPE_CHECKING:
    from .._engine import Engine
    from .._native import Wait
    from ._filling import RowsRequest

_DRAIN_POLL_S = 0.001
#: How long the end of an engine waits for callers that fill rows, once there is nothing else to wait for.
_HOLDERS_S = 1.0
_NOTHING_LEFT: dict[str, Any] = {"waiting": 0, "waiting_rows": 0, "running_batches": 0, "bytes_in_flight": 0}


class DynamicBatcher(Resource):
    """Puts requests of many callers into one launch. Owned by the engine; belongs to the event loop that uses it first.

    A launch happens as soon as a lane is free; while all are at work, behind them once a batch is full, or the oldest
    request has waited ``max_delay_s``, or its deadline is near. Who meets an idle engine goes to it directly.
    Rows are written straight into pinned memory of the next launch.

    Args:
        engine: what runs the batches. Its ``lanes`` are how many of them run at once.
        max_batch_size: rows of one launch at most; what the engine's profiles allow if that is less.
        max_delay_s: how long a request waits for others, in seconds, while every lane is at work.
        max_queue: rows that may be accepted and not launched.
        policy: admission and order, see BatchPolicy.
        batch_axis: which axis of each tensor counts the rows, for all of them or by name; it says too that the rows are
            independent of each other. None: axis 0, and before the first batch it is tried out whether a row's outputs
            change with its neighbours; a model that mixes rows is refused then.
        pad: brings a request's inputs to a shape that others have, see ``pad_axis``.
        crop: brings its outputs back: ``crop(outputs, inputs)`` with the inputs as they were given.

    Raises:
        InvalidArgumentError: a value is none, or a tensor has no rows.
        ClosedError: the engine is closed.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_batch_size: int = 64,
        max_delay_s: float = 0.002,
        max_queue: int = 4096,
        policy: BatchPolicy | None = None,
        batch_axis: int | Mapping[str, int] | None = None,
        pad: Pad | None = None,
        crop: Crop | None = None,
    ) -> None:
        checked_int(max_batch_size, "max_batch_size", minimum=1)
        checked_int(max_queue, "max_queue", minimum=1)
        delay = checked_timeout(max_delay_s, "max_delay_s")
        if delay is None:
            raise InvalidArgumentError("max_delay_s is None; expected seconds")
        policy = BatchPolicy() if policy is None else policy
        if not isinstance(policy, BatchPolicy):
            raise InvalidArgumentError(f"policy is {type(policy).__name__}; expected a BatchPolicy")
        for name, function in (("pad", pad), ("crop", crop)):
            if function is not None and not callable(function):
                raise InvalidArgumentError(f"{name} is {function!r}; expected a function, or None")
        engine._handle.require_open()
        options = engine._options
        layout = RowLayout(engine.io_tensors, engine._front.check, batch_axis)
        largest = min(max_batch_size, layout.largest() or max_batch_size, max_queue)
        sizes = sorted({size for size in policy.batch_sizes or ladder(largest) if size < largest} | {largest})
        self._engine = engine
        self._pad, self._crop = pad, crop
        self._layout = layout
        scheduler = self._scheduler = Scheduler(policy, max_rows=max_queue, max_delay_s=delay, lanes=options.lanes)
        self._groups = Groups(
            engine, layout, sizes, policy.depth,
            independent=batch_axis is not None or options.batch_axis is not None,
            in_line=self._is_in_line, short=pad is None and crop is None,
        )  # fmt: skip
        # Nothing that only the batcher knows has to be done to a request.
        self._plain = pad is None and crop is None and policy.max_bytes_in_flight is None
        self._loop: Loop | None = None
        self._door = _Door()
        self._on_idle: anyio.Event | None = None
        with self._opening(engine, name=engine.name) as handle:
            copier, crew = Copier(), Crew()
            self._launcher = Launcher(engine, str(handle), layout, scheduler, self._groups, copier, self._idle)
            self._counts = self._launcher.counts
            self._native = self._launcher.native = NativeWay(
                str(handle), layout, scheduler, self._groups, self._launcher, crew, options.wake_mode, self._idle
            )
            self._door.drop_apart = weakref.WeakMethod(self._launcher.drop_apart)
            _hook(handle, self._door, scheduler, self._counts, self._groups.pools, copier, crew)

    # ---- what callers use ----

    @property
    def engine(self) -> Engine:
        """The owner."""
        return self._engine

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Numbers of rows that batches are padded to, ascending; the last is the largest batch."""
        return self._groups.sizes

    async def warmup(self) -> None:
        """Capture the graphs for the engine's optimal shapes now, and not at the first request. Raises as ``infer``."""
        loop = self._running()
        self._scheduler.preparing += 1
        self._native.look()
        try:
            await self._groups.prepare_first(loop)
        finally:
            self._scheduler.preparing -= 1
            self._idle()

    async def infer(
        self,
        inputs: Mapping[str, Any],
        *,
        priority: int = 0,
        deadline_s: float | None = None,
        tenant: str = "",
    ) -> Arrays:
        """Run the engine on these rows, together with those of others.

        Args:
            inputs: an array for each input, batch axis included: (1, ...) is one row, (k, ...) is k rows that stay
                together. They are read until the call returns.
            priority: the higher goes first.
            deadline_s: seconds from now; what was not launched by then is given up, and the GPU spends no time on it.
            tenant: whose it is, for fair shares.
        Returns:
            New arrays that the caller owns, with as many rows.
        Raises:
            InvalidArgumentError, DTypeError, ShapeError: it does not fit; nobody else is affected.
            OverloadedError: no room, and the policy is not to wait; or it was shed.
            DeadlineExceededError: it was not launched in time.
            ExecutionError, CudaError: it was launched and failed.
            ClosedError: the batcher or its engine is closed or closing.
        Cancellation: before the launch its rows are taken out, nothing runs for them; after it the result is dropped.
        """
        loop = self._running()
        launcher = self._launcher
        gate = launcher.gate
        alike = deadline_s is None and tenant == "" and priority.__class__ is int and priority == 0
        if gate is not None and alike:
            seat = gate.submit(inputs, loop.now())
            if seat is None and launcher.next_load(gate):
                seat = gate.submit(inputs, loop.now())
            if seat is not None:
                self._counts.accepted += 1
                launcher.came(gate.load)
                try:
                    outputs: Arrays = await seat
                except BaseException:
                    launcher.left(seat)
                    raise
                return outputs
        scheduler = self._scheduler
        if launcher.lone and self._plain and alike and scheduler.quiet and self._groups.may_go_alone(inputs):
            # Nobody is there, and the engine has a graph for it: the shortest way.
            wait = self._engine._submit(inputs, current_hub())
            if wait is not None:
                found = await self._lone(wait)
                if found is not None:
                    return found
        given = inputs
        until = until_of(loop, _checked_options(priority, deadline_s, tenant))
        rows, inputs = await self._read(inputs, loop)
        if (
            launcher.lone
            and scheduler.quiet
            and until == NEVER  # in the engine it might wait for others'
            and self._groups.may_bypass(rows.group, rows.rows)
            and rows.nbytes <= scheduler.max_bytes
        ):
            outputs = await self._bypass(rows, inputs)
        else:
            ticket = self._submit(loop, rows, priority, until, tenant)
            try:
                outputs = await ticket.payload.outcome
            except BaseException as error:
                self._give_up(ticket, error)
                raise
        return self._cropped(outputs, given)

    async def infer_many(
        self,
        inputs: Mapping[str, Any],
        *,
        priority: int = 0,
        deadline_s: float | None = None,
        tenant: str = "",
    ) -> Arrays:
        """As ``infer`` for any number of rows: cut into batches, in the order of the rows, with one result.

        Admission looks at the first batch; the others follow as there is room, a few at a time, so that many rows do
        not keep other callers out. While there are no others, native threads do the work, batch after batch, without
        this event loop: the input arrays are read in these threads, C-contiguous ones only.

        Raises, Cancellation: as ``infer``; the first error ends all of it.
        """
        loop = self._running()
        given = inputs
        until = until_of(loop, _checked_options(priority, deadline_s, tenant))
        rows, _ = await self._read(inputs, loop)
        largest = self._groups.largest(rows.group)
        if rows.nbytes > self._scheduler.max_bytes:
            largest = max(1, min(largest, int(self._scheduler.max_bytes * rows.rows // rows.nbytes)))
        parts = Parts(self._layout, rows, largest, loop.outcome())

        def offer_next() -> bool:
            piece = parts.next()
            if piece is None:
                return False
            start, part = piece
            job = Job(part.arrays, parts.outcome, parts)
            job.parts, job.start = parts, start
            ticket = Ticket(part.rows, part.group, priority, tenant, until, part.nbytes, job)
            self._launcher.offer(ticket, wait=parts.accepted)
            parts.tickets.add(ticket)
            return True

        request = ManyRequest(parts, offer_next, until, (priority, tenant))
        try:
            self._native.begin(request)
            outputs: Arrays = await parts.outcome
        except BaseException as error:
            self._native.end(request)
            for ticket in parts.tickets:
                self._launcher.take_out(ticket)
            if not isinstance(error, TrtxError):
                self._counts.end(parts, "cancelled")
            elif parts.accepted:
                self._counts.end(parts, "failed")
            raise
        self._native.end(request)
        return self._cropped(outputs, given)

    def alloc_rows(
        self,
        rows: int = 1,
        shapes: Mapping[str, Sequence[int]] | None = None,
        *,
        priority: int = 0,
        deadline_s: float | None = None,
        tenant: str = "",
    ) -> RowsRequest:
        """``async with batcher.alloc_rows(k) as rows:`` gives k rows of the next batch, to be filled in place.

        ``rows["x"]`` is the array of input "x" in the batch's memory, ``await rows.infer()`` sends it off. Nothing is
        copied on the way in. A batch does not wait long for who is slow to fill: their rows move to a later one.

        Args:
            shapes: of one request's inputs, batch axis included, for engines whose other axes are dynamic.
        Raises, Cancellation: as ``infer``.
        """
        from ._filling import RowsRequest

        return RowsRequest(self, rows, shapes, priority, _checked_options(priority, deadline_s, tenant), tenant)

    def statistics(self) -> BatcherStatistics:
        """Counts and histograms, at this moment; after it was closed, the last ones."""
        lost = self._door.lost
        found = self._launcher.statistics()
        return found if lost is None else dataclasses.replace(found, **vars(lost), **_NOTHING_LEFT)

    async def aclose(self, *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Refuse new requests, finish what was accepted, and end. Idempotent.

        Args:
            drain: False gives up what is not launched.
            timeout_s: after so many seconds what is not launched is given up. What was launched is awaited in any case.
        What was given up gets ClosedError and is counted in ``statistics().dropped``. Callers inside ``alloc_rows`` are
        waited for as well, so do not await this there; given up, they get ClosedError from ``infer``, and their arrays
        stay until they leave the block.
        Cancellation: what is not launched is given up; the cancellation is delivered once the rest has ended.
        """
        timeout = checked_timeout(timeout_s)
        try:
            if drain and not self.closed and self._is_here():
                self._door.shut()
                self._on_idle = self._on_idle or anyio.Event()
                self._idle()
                with anyio.move_on_after(timeout):
                    await self._on_idle.wait()
        finally:
            if not self.closed:
                self._door.shut()
                if self._is_here():
                    self._launcher.drop_all()
            try:
                with anyio.CancelScope(shield=True):
                    await super().aclose()
            finally:
                if self._on_idle is not None and self._is_here():
                    self._on_idle.set()  # for another call that still waits

    # ---- the way of a request ----

    def _is_here(self) -> bool:
        """This is its event loop's thread, or it has none."""
        return self._loop is None or self._loop.native is running_native()

    def _running(self) -> Loop:
        """The loop, which is the one that runs here. Raises InvalidArgumentError, ClosedError."""
        if self._door.closed:
            self._handle.require_open()
            raise ClosedError(f"{self._handle} is closing and takes no more requests")
        loop = self._loop
        if loop is None:
            self._handle.require_open()
            loop = self._loop = self._launcher.loop = running_loop()
            self._door.loop = weakref.ref(loop)
        elif loop.native is not running_native():
            raise InvalidArgumentError(
                f"{self._handle} belongs to another event loop; make one for each loop, or use the engine itself, "
                "which serves any number of loops"
            )
        return loop

    async def _read(self, inputs: Mapping[str, Any], loop: Loop) -> tuple[Rows, Mapping[str, Any]]:
        """The request's rows, and its inputs as the engine would get them; its group is prepared."""
        if self._pad is not None:
            try:
                inputs = self._pad(inputs)
            except TrtxError:
                raise
            except Exception as error:
                raise InvalidArgumentError(f"the padding function failed ({type(error).__name__}: {error})") from error
        rows = self._layout.read(inputs)
        if rows.group not in self._groups.known:
            await self._prepare(rows.group, loop)
        return rows, inputs

    def _cropped(self, outputs: Arrays, given: Mapping[str, Any]) -> Arrays:
        if self._crop is None:
            return outputs
        try:
            return self._crop(outputs, given)
        except TrtxError:
            raise
        except Exception as error:
            raise InvalidArgumentError(f"the cropping function failed ({type(error).__name__}: {error})") from error

    async def _prepare(self, group: Group, loop: Loop) -> None:
        self._scheduler.preparing += 1  # aclose() waits for it
        self._native.look()  # graphs are recorded in slots that nobody holds
        try:
            await self._groups.prepare(group, loop)
        finally:
            self._scheduler.preparing -= 1
            self._idle()

    async def _lone(self, wait: Wait) -> Arrays | None:
        """The result of a request that the engine has launched; None: its graph is gone, it goes another way."""
        scheduler, launcher, counts = self._scheduler, self._launcher, self._counts
        counts.accepted += 1
        scheduler.running += 1
        try:
            outputs: Arrays = await finish(wait)
        except ReroutedError:
            counts.accepted -= 1
            return None
        except TrtxError:
            counts.failed += 1
            raise
        except BaseException:
            counts.cancelled += 1
            raise
        finally:
            scheduler.running -= 1
            if not scheduler.quiet or self._on_idle is not None:
                launcher.soon()
        launcher.bypassed(self._layout.count(outputs), (wait.completed_ns - wait.launched_ns) / 1e9)
        return outputs

    async def _bypass(self, rows: Rows, inputs: Mapping[str, Any]) -> Arrays:
        """Nobody is there: the engine itself is the shortest way."""
        scheduler, counts, launcher = self._scheduler, self._counts, self._launcher
        counts.accepted += 1
        started = time.perf_counter()
        scheduler.started(rows.nbytes)
        try:
            outputs = await self._engine.infer(inputs)
        except TrtxError:
            counts.failed += 1
            raise
        except BaseException:
            counts.cancelled += 1
            raise
        else:
            launcher.bypassed(rows.rows, time.perf_counter() - started)
            return outputs
        finally:
            scheduler.ended(rows.nbytes)
            if not scheduler.idle:
                launcher.soon()
            self._idle()

    def _submit(
        self,
        loop: Loop,
        rows: Rows,
        priority: int,
        until: float,
        tenant: str,
        instead: Ticket | None = None,
    ) -> Ticket:
        """Raises ShapeError, OverloadedError, InvalidArgumentError.

        Args:
            until: its deadline, by the loop's clock.
            instead: of this ticket, which was accepted before and set apart.
        """
        largest = self._groups.largest(rows.group)
        if rows.rows > largest:
            raise ShapeError(
                f"a request of {rows.rows} rows stays together and a batch has at most {largest}; use infer_many"
            )
        job = Job(rows.arrays, loop.outcome(), None if instead is None else instead.payload)
        ticket = Ticket(rows.rows, rows.group, priority, tenant, until, rows.nbytes, job)
        self._launcher.offer(ticket, instead=instead)
        return ticket

    def _give_up(self, ticket: Ticket, error: BaseException) -> None:
        """The caller does not get its result; if that is its own doing, nobody needs one."""
        if not isinstance(error, TrtxError):  # cancelled, or the loop went away
            self._launcher.take_out(ticket)
            self._counts.end(ticket.payload.account, "cancelled")

    def _is_in_line(self, group: Group) -> bool:
        """Somebody has rows of this group that are not launched."""
        scheduler = self._scheduler
        apart = any(ticket.group == group for ticket in scheduler.apart)
        return apart or scheduler.in_line(group) or scheduler.is_outside(group) or self._native.uses(group)

    def _idle(self) -> None:
        """Tell who waits for it that nothing is under way any more."""
        if self._on_idle is not None and self._scheduler.idle:
            self._on_idle.set()


class _Door:
    """Open or shut. What closes the batcher's handle refers to this, and not to the batcher.

    Attributes:
        loop: the batcher's, once it has one.
        drop_apart: the launcher's.
        lost: the counts that stay as they are, because the loop ended with requests in line.
    """

    def __init__(self) -> None:
        self.closed = False
        self.loop: weakref.ref[Loop] | None = None
        self.drop_apart: weakref.WeakMethod[Callable[[], None]] | None = None
        self.lost: Counts | None = None

    def shut(self) -> None:
        self.closed = True

    @property
    def deserted(self) -> bool:
        """The loop brings nothing to an end: it is over, nothing refers to it any more, or it stands while all ends."""
        loop = self.loop() if self.loop is not None else None
        return self.loop is not None and (loop is None or loop.over or (process_ends() and loop.stands))

    def clear(self) -> None:
        """Have the loop give up callers that fill rows."""
        loop = self.loop() if self.loop is not None else None
        drop = self.drop_apart() if self.drop_apart is not None else None
        if loop is not None and drop is not None:
            loop.soon_threadsafe(drop)


def _hook(
    handle: Handle, door: _Door, scheduler: Scheduler, counts: Counts, pools: GraphPools, copier: Copier, crew: Crew
) -> None:
    """How a batcher's handle is closed. None of it refers to the batcher, or to the engine."""

    def busy() -> str | None:
        if scheduler.idle or door.deserted:
            return None
        return f"{scheduler.running} batches running, {scheduler.waiting} requests waiting"

    def drain() -> None:
        # In the thread that closes: the batcher's loop goes on meanwhile, and brings everything to its end.
        patience = time.monotonic() + _HOLDERS_S
        while not scheduler.idle:
            if door.deserted:
                door.lost = _lost(counts)
                break
            now = time.monotonic()
            if not scheduler.stalled:
                patience = now + _HOLDERS_S
            elif now > patience:
                door.clear()  # they may be waiting for this very end
                patience = now + _HOLDERS_S
            time.sleep(_DRAIN_POLL_S)
        # Here, and not in the release: lanes may be released before the batcher is, with the memory these work on.
        copier.close()
        crew.close()
        pools.settle()

    handle.stop, handle.busy, handle.drain, handle.release = door.shut, busy, drain, pools.close


def _lost(counts: Counts) -> Counts:
    """The counts when nobody is left to answer: all that has not ended was dropped."""
    ended = counts.completed + counts.failed + counts.cancelled + counts.shed + counts.late
    return dataclasses.replace(counts, dropped=counts.accepted - ended)


def _checked_options(priority: Any, deadline_s: Any, tenant: Any) -> float | None:
    """The deadline in seconds. Raises InvalidArgumentError."""
    if priority.__class__ is not int:
        checked_int(priority, "priority")
    if not isinstance(tenant, str):
        raise InvalidArgumentError(f"tenant is {tenant!r}; expected a string")
    return None if deadline_s is None else checked_timeout(deadline_s, "deadline_s")
