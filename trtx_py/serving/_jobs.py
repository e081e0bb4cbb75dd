"""Who asked for rows, and how results come together that were computed in parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .._inputs import Arrays
from .._types import Array
from ._policy import Ticket
from ._rows import RowLayout, Rows
from ._statistics import Account

if TYPE_CHECKING:
    from ._filling import BatchRows


class Job(Account):
    """What a ticket's payload is.

    Attributes:
        arrays: what is to be written; empty where the caller fills the rows.
        outcome: what the caller awaits.
        account: where the request's end is counted.
        parts, start: of a request that was cut: who puts the parts together, and which row this one begins with.
        filler: the caller's hold on rows that it fills.
    """

    __slots__ = ("account", "arrays", "filler", "outcome", "parts", "start")

    def __init__(self, arrays: tuple[Array, ...], outcome: Any, account: Account | None = None) -> None:
        super().__init__()
        self.arrays = arrays
        self.outcome = outcome
        self.account = account or self
        self.parts: Parts | None = None
        self.start = 0
        self.filler: BatchRows | None = None

    def give(self, outputs: Arrays) -> None:
        """Its rows are there: new arrays."""
        if self.parts is not None:
            self.parts.take(outputs, 0, next(iter(outputs.values())).shape[0], self.start)
        elif not self.outcome.done():
            self.outcome.set_result(outputs)


class Parts(Account):
    """A request that is cut into batches, a few of which are under way at a time.

    Attributes:
        position: the first row that was not given out yet, by ``next`` or another way.
    """

    def __init__(self, layout: RowLayout, rows: Rows, largest: int, outcome: Any) -> None:
        super().__init__()
        self.rows, self.outcome = rows, outcome
        self.tickets: set[Ticket] = set()
        #: Offers the next piece; False: there is none.
        self.advance: Callable[[], bool] | None = None
        self._layout = layout
        self._missing = rows.rows
        self._outputs: Arrays = {}
        self._largest = largest
        self.position = 0

    def next(self) -> tuple[int, Rows] | None:
        """The next piece and its first row; None: there is none, or nobody waits any more."""
        start = self.position
        if start >= self.rows.rows or self.outcome.done():
            return None
        stop = self.position = min(start + self._largest, self.rows.rows)
        arrays = self._layout.part(self.rows.arrays, start, stop)
        return start, Rows(stop - start, self.rows.group, arrays, sum(array.nbytes for array in arrays))

    def outputs_like(self, views: Mapping[str, Array]) -> Arrays:
        """The whole request's outputs, which may be written where rows are done; these are some rows of each."""
        for name, view in views.items():
            if name not in self._outputs:
                axis = self._layout.output_axes[name]
                shape = (*view.shape[:axis], self.rows.rows, *view.shape[axis + 1 :])
                self._outputs[name] = np.empty(shape, view.dtype)
        return self._outputs

    def take(self, outputs: Mapping[str, Array], start: int, count: int, offset: int) -> None:
        """Rows ``start`` and following of these outputs are the request's rows ``offset`` and following."""
        axes, whole = self._layout.output_axes, self.outputs_like(outputs)
        for name, array in outputs.items():
            before = (slice(None),) * axes[name]
            to, source = (*before, slice(offset, offset + count)), (*before, slice(start, start + count))
            whole[name][to] = array[source]
        self.landed(count)

    def landed(self, count: int) -> bool:
        """So many rows of the outputs were written. True: that was the last of them."""
        self._missing -= count
        if self._missing or self.outcome.done():
            return False
        self.outcome.set_result(self._outputs)
        return True
