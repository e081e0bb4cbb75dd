"""Rows of the next batch that a caller fills in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any

from .._arguments import checked_int, checked_shape
from .._errors import BorrowedError, ClosedError, InvalidArgumentError, ShapeError
from .._inputs import Arrays
from .._types import Array
from ._jobs import Job
from ._loop import until_of
from ._memory import OwnRows
from ._policy import Batch, State, Ticket
from ._rows import Rows, without

if TYPE_CHECKING:
    from .. import _native
    from ._batcher import DynamicBatcher
    from ._loop import Loop
    from ._memory import Memory


_LEFT = "the `async with` block of these rows was left before they were launched"


class BatchRows:
    """Rows of the next batch, from ``async with batcher.alloc_rows(k) as rows``. One inference.

    ``rows["x"]`` is the array of input "x", in the memory that is launched: what is written there is copied no more.
    Do not use it after ``infer`` was called or the block was left. Until then it stays, whatever is closed.
    """

    __slots__ = ("_batch", "_batcher", "_error", "_grant", "_memory", "_seat", "_ticket", "_views", "sent")

    def __init__(self, batcher: DynamicBatcher) -> None:
        self._batcher = batcher
        self._seat: _native.Seat | None = None  # it came through a RowGate, and has no ticket
        self._ticket: Ticket | None = None
        self._memory: Memory | None = None
        self._batch: Batch | None = None
        self._views: Mapping[str, Array] | None = None  # made when it is asked for
        self._grant: Any = None
        self.sent = False
        self._error: BaseException | None = None

    def __getitem__(self, name: str) -> Array:
        """The array of an input. Raises InvalidArgumentError if there is none of that name."""
        views = self._views if self._views is not None and not self.sent else self._look()
        try:
            return views[name]
        except KeyError:
            raise InvalidArgumentError(
                f"there is no input {name!r}; the engine has {', '.join(views) or 'none'}"
            ) from None

    @property
    def inputs(self) -> Mapping[str, Array]:
        """The input arrays, to be written."""
        return MappingProxyType(dict(self._look()))

    def _look(self) -> Mapping[str, Array]:
        self._require_unsent()
        views = self._views
        if views is None:
            if self._seat is not None:
                views = self._seat.inputs()
            else:
                layout, ticket = self._batcher._layout, self._ticket
                assert self._memory is not None
                assert ticket is not None
                arrays = layout.part(self._memory.inputs, ticket.offset, ticket.offset + ticket.rows)
                views = dict(zip((tensor.name for tensor in layout.inputs), arrays, strict=True))
            self._views = views
        return views

    async def infer(self) -> Arrays:
        """Send the rows off. Raises and is cancelled as ``DynamicBatcher.infer``; BorrowedError a second time."""
        self._require_unsent()
        batcher, seat = self._batcher, self._seat
        if seat is not None:
            self.sent, self._views = True, None
            launcher = batcher._launcher
            launcher.came(seat.filled())
            try:
                outputs: Arrays = await seat
            except BaseException:
                launcher.left(seat)
                raise
            return outputs
        ticket = self._ticket
        assert ticket is not None
        if batcher._groups.pools.closed:  # and nobody was there to say so
            batcher._launcher.drop(ticket)
        views = self._look() if self._batch is None and self._error is None else {}
        self.sent = True
        if self._error is not None:
            self._let_go()
            raise self._error
        if self._batch is not None:
            self._filled()
            batcher._launcher.soon()
            return await self._result(ticket)
        # No batch waits for it: as any other request, with what is in the old rows.
        assert self._memory is not None
        try:
            arrays = tuple(view.copy() for view in views.values())
            rows = Rows(ticket.rows, ticket.group, arrays, sum(array.nbytes for array in arrays))
            loop = batcher._loop
            assert loop is not None
            later = batcher._submit(loop, rows, ticket.priority, ticket.deadline, ticket.tenant, ticket)
        finally:
            self._let_go()
        return await self._result(later)

    async def _result(self, ticket: Ticket) -> Arrays:
        try:
            outputs: Arrays = await ticket.payload.outcome
        except BaseException as error:
            self._batcher._give_up(ticket, error)
            raise
        return outputs

    # ---- the batcher's side ----

    def granted(self, batch: Batch) -> None:
        """The ticket has its place in a batch."""
        batcher, ticket = self._batcher, self._ticket
        assert ticket is not None
        if batcher._groups.crowded(batch.group):
            memory: Memory = OwnRows(batcher._layout.blank(batch.group, ticket.rows), ticket.rows)
            batcher._scheduler.set_apart(ticket)
            batcher._launcher.soon()
            ticket.offset = 0
        else:
            batch.pending += 1
            self._batch, memory = batch, batch.memory
        memory.hold()
        self._memory = memory
        if self._grant is not None and not self._grant.done():
            self._grant.set_result(None)

    def refuse(self, error: BaseException) -> None:
        """The request has ended before it was sent: shed, late, or closed."""
        if self._grant is not None and not self._grant.done():
            self._grant.set_exception(error)
        self._error = error
        if self._batch is not None:
            self._batch.pending -= 1
            self._batch.memory.withheld = True
            self._batch = None

    @property
    def slow(self) -> bool:
        """The batch waits for it."""
        return self._batch is not None and not self.sent

    def detach(self) -> None:
        """The batch goes without these rows; what is written to them is sent with a later one. They go on waiting."""
        batch, ticket = self._batch, self._ticket
        assert batch is not None
        assert ticket is not None
        self._batcher._scheduler.set_apart(ticket)
        self._batch = None
        batch.pending -= 1
        batch.memory.withheld = True

    def withhold(self, batch: Batch) -> Ticket:
        """As ``detach``, for rows that came into this batch without a ticket: they get one."""
        batcher, seat = self._batcher, self._seat
        assert seat is not None
        assert batcher._loop is not None
        job = Job((), batcher._loop.outcome())
        job.admit()  # it was counted when it came
        job.filler = self
        nbytes = seat.rows * batcher._layout.row_bytes(batch.group)
        ticket = self._ticket = Ticket(seat.rows, batch.group, nbytes=nbytes, payload=job)
        ticket.offset = seat.offset
        batcher._scheduler.set_apart(ticket)
        self._memory, self._seat = batch.memory, None
        batch.memory.hold()
        batch.memory.withheld = True
        seat.cancel()
        return ticket

    def _filled(self) -> None:
        batch, self._batch = self._batch, None
        assert batch is not None
        batch.pending -= 1
        self._let_go()

    def _let_go(self) -> None:
        memory, self._memory = self._memory, None
        self._views = None
        if memory is not None:
            memory.let_go()

    def _require_unsent(self) -> None:
        if self.sent:
            raise BorrowedError("these rows were sent already; take others with alloc_rows")
        if self._memory is None and self._seat is None:
            raise ClosedError("these rows were given back; use them inside the `async with` block")

    def _leave(self) -> None:
        """Unsent rows are given back; who still waits for the result of sent ones that are not launched gets none."""
        batcher, ticket, seat = self._batcher, self._ticket, self._seat
        if seat is not None:
            self._seat = self._views = None
            self._leave_seat(seat)
            return
        if self._batch is not None:
            self._filled()
        self._let_go()
        assert ticket is not None
        if ticket.state is not State.ENDED and batcher._launcher.take_out(ticket) and self.sent:
            batcher._launcher.fail(ticket, ClosedError(_LEFT))
        if not self.sent and self._error is None and ticket.payload.accepted:
            batcher._counts.end(ticket.payload, "cancelled")

    def _leave_seat(self, seat: _native.Seat) -> None:
        if seat.done():
            return
        batcher = self._batcher
        if not self.sent:
            seat.cancel()
            batcher._launcher.left(seat)
        elif batcher._launcher.is_open(seat):  # another task waits for the result
            seat.set_exception(ClosedError(_LEFT))
            batcher._counts.failed += 1
            batcher._launcher.soon()


class RowsRequest:
    """What ``batcher.alloc_rows`` returns: ``async with`` it, once."""

    def __init__(
        self,
        batcher: DynamicBatcher,
        rows: int,
        shapes: Mapping[str, Sequence[int]] | None,
        priority: int,
        deadline_s: float | None,
        tenant: str,
    ) -> None:
        self._batcher = batcher
        self._rows = checked_int(rows, "rows", minimum=1)
        known = batcher._layout.only_group if shapes is None else None
        self._group = _group(batcher, self._rows, shapes) if known is None else known
        self._options = priority, deadline_s, tenant
        self._alike = deadline_s is None and tenant == "" and priority == 0
        self._made: BatchRows | None = None

    async def __aenter__(self) -> BatchRows:
        batcher = self._batcher
        loop = batcher._running()
        if self._made is not None:
            raise InvalidArgumentError("alloc_rows(...) is good for one `async with`; call it again for other rows")
        _, deadline_s, _ = self._options
        until = until_of(loop, deadline_s)
        if self._group not in batcher._groups.known:
            await batcher._prepare(self._group, loop)
        largest = batcher._groups.largest(self._group)
        if self._rows > largest:
            raise ShapeError(f"alloc_rows({self._rows}): a batch has at most {largest} rows")
        made = self._made = BatchRows(batcher)
        gate = batcher._groups.gate(self._group) if self._alike and not batcher._groups.crowded(self._group) else None
        if gate is not None and gate.load is not None:
            seat = gate.place(self._rows, loop.now(), made)
            if seat is None and batcher._launcher.next_load(gate):
                seat = gate.place(self._rows, loop.now(), made)
            if seat is not None:
                made._seat = seat
                batcher._counts.accepted += 1
                batcher._launcher.came(gate.load)
                return made
        await self._stand_in_line(made, loop, until)
        return made

    async def _stand_in_line(self, made: BatchRows, loop: Loop, until: float) -> None:
        batcher = self._batcher
        nbytes = self._rows * batcher._layout.row_bytes(self._group)
        job = Job((), loop.outcome())
        priority, _, tenant = self._options
        made._ticket = Ticket(self._rows, self._group, priority, tenant, until, nbytes, job)
        job.filler = made
        try:
            batcher._launcher.offer(made._ticket)
            if made._memory is None:  # its batch is not open yet
                made._grant = loop.outcome()
                await made._grant
        except BaseException:
            made._leave()
            raise

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._made is not None:
            self._made._leave()


def _group(
    batcher: DynamicBatcher, rows: int, shapes: Mapping[str, Sequence[int]] | None
) -> tuple[tuple[int, ...], ...]:
    layout = batcher._layout
    if shapes is not None and not isinstance(shapes, Mapping):
        raise InvalidArgumentError(f"alloc_rows got shapes {shapes!r}; expected a shape by input name")
    if shapes is not None and shapes.keys() != {tensor.name for tensor in layout.inputs}:
        expected = ", ".join(tensor.name for tensor in layout.inputs)
        raise InvalidArgumentError(f"alloc_rows got shapes for {sorted(shapes)}; expected one for each of {expected}")
    group = []
    for tensor, axis in zip(layout.inputs, layout.input_axes, strict=True):
        shape = tensor.shape if shapes is None else checked_shape(shapes[tensor.name], f"shape of {tensor.name!r}")
        if shapes is not None and (len(shape) != len(tensor.shape) or shape[axis] != rows):
            raise ShapeError(
                f"alloc_rows({rows}): {tensor.name!r} cannot have shape {shape}; {rows} rows on axis {axis}"
            )
        row = without(shape, axis)
        if -1 in row:
            raise InvalidArgumentError(
                f"{tensor} has other dynamic axes: alloc_rows needs shapes={{{tensor.name!r}: ...}}"
            )
        group.append(row)
    return tuple(group)
