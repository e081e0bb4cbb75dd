"""What one lane has on the device: streams, activation memory, the native lane, and the contexts that share them."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from . import _native
from ._errors import EngineError
from ._ingest import Ingest
from ._options import DEFAULT_SLOTS, EngineOptions
from ._profiles import ProfileLedger
from ._resource import Handle
from ._types import TensorInfo, TensorLocation, TensorMode
from .backends.protocols import BackendContext, BackendEngine
from .cuda._device import DeviceAccess, Releases

_CLOSE_S = 5.0

_numbers = itertools.count(1)
_watcher_lock = threading.Lock()
_watchers: list[_native.Watcher] = []


def _watcher() -> _native.Watcher:
    """The process's one watcher: it looks after the lanes of all engines, and sleeps while nobody waits."""
    with _watcher_lock:
        if not _watchers:
            _watchers.append(_native.Watcher())
        return _watchers[0]


#: The block of activation memory for what TensorRT enqueues kernel by kernel.
ENQUEUED = -1


class LaneSite:
    """Streams, activation memory and native lane of one lane, or of one context of the caller's.

    Everything is made when it is first asked for, so that a lane nobody uses costs nothing. What a lane does runs in
    the order of its one stream. A captured graph is launched as a whole, by any thread: the contexts of captured shapes
    never run at the same time and share blocks of activation memory. TensorRT's enqueue launches kernel by kernel, and
    a graph may come in between: what is enqueued has a block of its own.
    Used by one thread at a time, with the device current.

    Args:
        options: how the engine serves; None for a context of the caller's own, which has memory of its own.
        ingest: where callers' device tensors come in.
    """

    def __init__(
        self,
        access: DeviceAccess,
        engine: BackendEngine,
        tensors: Sequence[TensorInfo],
        ledger: ProfileLedger,
        handle: Handle,
        options: EngineOptions | None = None,
        ingest: Ingest | None = None,
    ) -> None:
        self.access = access
        self.driver = access.driver
        self.engine = engine
        self.ledger = ledger
        self.handle = handle
        self.options = options or EngineOptions()
        self.ingest = ingest
        self.inputs = tuple(t for t in tensors if t.mode is TensorMode.INPUT)
        self.outputs = tuple(t for t in tensors if t.mode is TensorMode.OUTPUT)
        self.shares_memory = options is not None and engine.user_managed_memory
        self._streams: list[int] = []
        self._aux_streams: dict[int, list[int]] = {}
        self._activations: dict[int, int] = {}
        self._lane: _native.Lane | None = None

    @property
    def stream(self) -> int:
        """The lane's stream."""
        return self.streams(1)[0]

    def streams(self, count: int) -> list[int]:
        """The lane's stream and ``count - 1`` more, for work that is not ordered by it."""
        while len(self._streams) < count:
            self._streams.append(self.access.streams.take())
        return self._streams[:count]

    @property
    def lane(self) -> _native.Lane:
        """The native lane over the stream."""
        if self._lane is None:
            options = self.options
            try:
                self._lane = _native.Lane(
                    self.driver.api, self.access.context, self.stream, options.slots or DEFAULT_SLOTS, _watcher(),
                    options.wake_mode,
                )  # fmt: skip
            except RuntimeError as error:
                raise self.driver._error("cuEventCreate", error.args[1]) from None
        return self._lane

    def order_behind_producers(self) -> None:
        """What is enqueued on the lane's stream from now on waits for the tensors that callers handed in so far."""
        if self.ingest is not None:
            self.ingest.order(self.stream)

    @property
    def activation_bytes(self) -> int:
        """Activation memory of one context."""
        return self.engine.device_memory_bytes(None)

    def missing_bytes(self, parts: int) -> int:
        """Activation memory still to be allocated before a shape can be captured in ``parts``."""
        return self.activation_bytes * sum(part not in self._activations for part in range(ENQUEUED, parts))

    def activation(self, part: int) -> int:
        """Address of block number ``part``; block 0 serves what is captured in one part."""
        address = self._activations.get(part)
        if address is None:
            nbytes = max(self.activation_bytes, 1)
            address = self.access.memory.allocate_device(nbytes, owner=f"activations of {self.handle}")
            self._activations[part] = address
            self.handle.device_bytes += nbytes
        return address

    def free_enqueued(self) -> None:
        """Give the block of what is enqueued back until something is again; none of it is running."""
        address = self._activations.get(ENQUEUED)
        if address is None:
            return
        nbytes = max(self.activation_bytes, 1)
        self.access.memory.free_device(address, nbytes)
        del self._activations[ENQUEUED]  # what could not be freed is used on, and freed at the end
        self.handle.device_bytes -= nbytes

    def aux_streams(self, part: int) -> list[int] | None:
        """Streams for the parallel branches inside TensorRT, for contexts that use block ``part``; None: TensorRT's."""
        wanted = self.options.auxiliary_streams
        if wanted is None:
            return None
        if part not in self._aux_streams:
            count = min(wanted, self.engine.num_aux_streams)
            self._aux_streams[part] = [self.access.streams.take() for _ in range(count)]
        return self._aux_streams[part]

    def rest(self) -> None:
        """Wait until the GPU is done with all that was launched on the lane, also with what nobody waits for any more.

        A request that was cancelled in flight is in no queue and on no list, and its graph runs to its end.
        """
        while self._lane is not None and self._lane.poll():
            time.sleep(0.0005)

    def release(self) -> None:
        """Give everything back, whatever part of it fails. The contexts are gone, and nothing runs."""
        lane, self._lane = self._lane, None
        taken = [*self._streams, *itertools.chain.from_iterable(self._aux_streams.values())]
        self._streams, self._aux_streams = [], {}
        activations, self._activations = self._activations, {}
        releases = Releases(self.access)
        for stream in taken:
            releases.add(partial(self.access.streams.give, stream))
        nbytes = max(self.activation_bytes, 1) if activations else 0
        for address in activations.values():
            self.handle.device_bytes -= nbytes
            releases.add(partial(self.access.memory.free_device, address, nbytes))
        if lane is not None:
            releases.add(partial(_close_lane, lane, self.handle))
        releases()  # last to first: the lane before its stream


def _close_lane(lane: _native.Lane, handle: Handle) -> None:
    deadline = time.monotonic() + _CLOSE_S
    while not lane.close():  # the watcher may be looking at it
        if time.monotonic() > deadline:
            raise EngineError(f"{handle} still has work in flight and cannot be released")
        time.sleep(0.0005)


class OwnedContext:
    """One execution context of a site: holds a profile in the ledger, and gives it back.

    Raises EngineError, CudaError, MemoryBudgetError; nothing is left behind then.
    """

    def __init__(self, site: LaneSite, part: int = ENQUEUED) -> None:
        self.key = ("context", next(_numbers))
        self._site = site
        self._give_back: Callable[[], Any] | None = None
        own_memory = not site.shares_memory
        with contextlib.ExitStack() as undo:
            if own_memory:
                nbytes = site.activation_bytes
                reservation = site.access.memory.reserve(nbytes, f"an execution context of {site.handle}")
                undo.callback(reservation.release)
                site.handle.device_bytes += nbytes
                undo.callback(self._forget_bytes, nbytes)
            address = 0 if own_memory else site.activation(part)
            self.native: BackendContext = site.ledger.create(
                self, partial(site.engine.create_context, own_memory=own_memory, cuda_graphs=site.options.cuda_graphs)
            )
            undo.callback(site.ledger.left, self)
            undo.callback(self.native.destroy)
            self._memory = 0
            if not own_memory:
                self._compute_at(address)
            streams = site.aux_streams(part)
            if streams:
                self.native.set_aux_streams(streams)
            self._give_back = undo.pop_all().close

    @property
    def holds_profile(self) -> bool:
        return self.native.active_profile >= 0

    def select_profile(self, candidates: Sequence[int]) -> None:
        """Be in one of these profiles. Raises BorrowedError if others hold all of them."""
        if self._site.ledger.select(self, self.native, candidates, self._site.stream):
            self._site.driver.cuStreamSynchronize(self._site.stream)

    def compute_in(self, part: int) -> None:
        """Use block number ``part`` from now on. Nothing of it may be running. Raises MemoryBudgetError, CudaError."""
        if self._site.shares_memory:
            self._compute_at(self._site.activation(part))

    def _compute_at(self, address: int) -> None:
        if address != self._memory:
            self.native.set_device_memory(address, max(self._site.activation_bytes, 1))
            self._memory = address

    def destroy(self) -> None:
        """Idempotent. Nothing of it may be running."""
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back()

    def describe(self) -> str:
        return self._site.handle.describe()

    def __str__(self) -> str:
        return str(self._site.handle)

    def _forget_bytes(self, nbytes: int) -> None:
        self._site.handle.device_bytes -= nbytes


class DeviceBlock:
    """Device memory that a handle answers for."""

    def __init__(self, site: LaneSite, nbytes: int, what: str) -> None:
        self._site, self.nbytes = site, nbytes
        self.address = site.access.memory.allocate_device(nbytes, owner=f"{what} of {site.handle}")
        site.handle.device_bytes += nbytes

    def free(self) -> None:
        """Idempotent."""
        address, self.address = self.address, 0
        if address:
            self._site.handle.device_bytes -= self.nbytes
            self._site.access.memory.free_device(address, self.nbytes)


class PinnedBlock:
    """Page-locked memory that a handle answers for."""

    def __init__(self, site: LaneSite, nbytes: int, what: str) -> None:
        self._site, self.nbytes = site, nbytes
        self.address = site.access.memory.allocate_pinned(nbytes, owner=f"{what} of {site.handle}")
        site.handle.host_bytes += nbytes

    def free(self) -> None:
        """Idempotent."""
        address, self.address = self.address, 0
        if address:
            self._site.handle.host_bytes -= self.nbytes
            self._site.access.memory.free_pinned(address, self.nbytes)


def on_device(tensors: Sequence[TensorInfo]) -> tuple[TensorInfo, ...]:
    """The tensors that TensorRT reads or writes on the device."""
    return tuple(t for t in tensors if t.location is TensorLocation.DEVICE)
