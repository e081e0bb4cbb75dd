"""Where an engine's requests come in: straight onto a captured graph where there is one, else to the lanes' threads."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from . import _native
from ._capture import NotCapturableError, ShapeKey
from ._errors import ClosedError, CudaError, TrtxError
from ._execution import Execution
from ._graphs import GraphCache, GraphCounts, GraphStatistics
from ._ingest import Ingest
from ._inputs import Given, InputCheck
from ._lane import Lanes
from ._options import EngineOptions
from ._profiles import ProfileLedger
from ._request import Request
from ._resource import Handle, opening
from ._site import LaneSite
from ._types import TensorInfo, TensorMode
from .backends.protocols import STICKY_CUDA_ERRORS, BackendEngine, CudaDriver
from .cuda._device import Device, DeviceAccess

#: Requests that are expected to take longer than this let the event loop sleep, in every mode.
_MAX_HOT_NS = 2_000_000
_STALLED_S = 1.0
#: Where one of these failed, the graph was not launched.
_LAUNCHING = frozenset({"cuCtxPushCurrent", "cuGraphLaunch"})


class _LaneFactory:
    """Makes lanes for an engine without referring to the engine object."""

    def __init__(
        self,
        access: DeviceAccess,
        native: BackendEngine,
        tensors: Sequence[TensorInfo],
        ledger: ProfileLedger,
        owner: Handle,
        options: EngineOptions,
        ingest: Ingest,
        graphs: Callable[[LaneSite], GraphCache],
    ) -> None:
        def site(handle: Handle) -> LaneSite:
            return LaneSite(access, native, tensors, ledger, handle, options, ingest)

        self._make_site = site
        self._owner = owner
        self._graphs = graphs
        self._made: dict[Handle, GraphCache] = {}

    def __call__(self) -> tuple[Execution, Handle]:
        handle = Handle("Lane", self._owner, internal=True)
        site = self._make_site(handle)
        cache = self._graphs(site)
        execution = Execution(site, cache)
        with opening(handle):
            handle.release = execution.release
        self._made[handle] = cache
        return execution, handle

    def graphs_of(self, handle: Handle) -> GraphCache:
        """Of the lane that was just made; once."""
        return self._made.pop(handle)


class Front:
    """The request path of one engine. Thread-safe. Refers to the engine's handle, never to the engine.

    Attributes:
        port: the native door: requests of captured shapes go through it without a thread.
        lanes: the threads for everything else.
    """

    def __init__(
        self,
        access: DeviceAccess,
        native: BackendEngine,
        tensors: Sequence[TensorInfo],
        ledger: ProfileLedger,
        handle: Handle,
        options: EngineOptions,
        ordinal: int,
    ) -> None:
        self.check = InputCheck(tensors, native.num_profiles, copy_noncontiguous=options.noncontiguous == "copy")
        self._inputs = tuple(t for t in tensors if t.mode is TensorMode.INPUT)
        self._options = options
        self._handle = handle
        self._counts = GraphCounts()
        self.rerouted = 0  # the port counts these as failed; they went on to a lane's thread
        self._ingest = Ingest(access, ordinal)
        self.release = self._ingest.release
        self._driver = access.driver
        name = str(handle)
        port = self.port = _native.Port(
            np.ndarray,
            tuple(t.name for t in self._inputs),
            self._refuse,
            self._failure,
            _MAX_HOT_NS if options.wake_mode == 0 else 0,
        )
        counts, check = self._counts, self.check

        def graphs(site: LaneSite) -> GraphCache:
            return GraphCache(site, port, counts, check.admitting)

        factory = _LaneFactory(access, native, tensors, ledger, handle, options, self._ingest, graphs)
        self.lanes = Lanes(
            name, options.lanes, factory, on_loss=self._lost, graphs=factory.graphs_of, wanted=lambda: port.queued
        )

    def _refuse(self) -> None:
        """Says why the port is closed: never returns."""
        self._handle.require_open()
        self.lanes.require_serving()
        raise ClosedError(f"{self._handle} is closing and takes no more requests")

    def _lost(self, cause: TrtxError) -> None:
        """The device is gone: nobody waits for a slot any more."""
        self.port.close()
        self.port.fail_queued(cause)

    def _failure(self, status: int, call: str) -> TrtxError:
        """The typed error of a status that the native side met."""
        error = cuda_error(self._driver, status, call or "the replay of a CUDA graph")
        if call in _LAUNCHING:
            error.launched = False
        if status in STICKY_CUDA_ERRORS:
            self.lanes.lose(error)
        return error

    def request(self, inputs: Mapping[str, Any], *, timed: bool = False, outputs_on: Device | None = None) -> Request:
        """Check the inputs and hand them to a lane's thread. Raises at once if they do not fit."""
        arrays, profiles = self.checked(inputs)
        request = Request(arrays, profiles, timed=timed, outputs_on=outputs_on)
        self.lanes.submit(request)
        return request

    async def infer_accepted(self, arrays: Given) -> Mapping[str, Any]:
        """Serve part of what was accepted before the engine began to close. Raises as Engine.infer."""
        given, profiles = self.check(arrays)
        request = Request(given, profiles)
        self.lanes.submit(request, accepted=True)
        return (await request.wait()).outputs

    def checked(self, inputs: Mapping[str, Any]) -> tuple[Given, list[int]]:
        """What the engine can take of these inputs, and the profiles that admit it. Raises as InputCheck."""
        self._handle.require_open()
        views = self._ingest.views(inputs) if type(inputs) is dict else {}
        return self.check(inputs, views)

    def capture_requests(self, key: ShapeKey) -> list[Request]:
        """Ask each lane to record ``key``. Raises ShapeError if no profile admits it."""
        profiles = self.check.require_profiles(dict(key.shapes), dict(key.values))
        return self.lanes.submit_to_each(lambda: Request({}, profiles, capture=key))

    async def capture_for_batches(self, key: ShapeKey, *, within: ShapeKey | None, places: int) -> None:
        """Record ``key`` on every lane, in the memory of ``within``, with so many slots at least.

        Raises NotCapturableError, BorrowedError, MemoryBudgetError, CudaError, ClosedError.
        """
        profiles = self.check.require_profiles(dict(key.shapes), {})
        requests = self.lanes.submit_to_each(lambda: Request({}, profiles, capture=key, within=within, places=places))
        for request in requests:
            await request.wait()

    def borrow(self, key: ShapeKey) -> tuple[_native.Bucket, ...]:
        """The graphs for ``key``, one for each lane that has it, which are kept until they are returned."""
        return _native.borrow_buckets(self.port, tuple(shape for _, shape in key.shapes))

    async def capture(self, inputs: Mapping[str, Any]) -> None:
        """Record the shape of these inputs on every lane, if it can be recorded at all."""
        arrays, _ = self.checked(inputs)
        for request in self.capture_requests(ShapeKey.of(self._inputs, arrays)):
            with contextlib.suppress(NotCapturableError):  # infer() serves it
                await request.wait()

    def acquire(self, key: ShapeKey, hub: _native.Hub | None) -> _native.Wait | None:
        """A wait for a slot of a captured shape; None if it is not captured."""
        return self.port.acquire(tuple(shape for _, shape in key.shapes), hub)

    def make_up(self, key: ShapeKey) -> None:
        """A slot of ``key`` is waited for: lanes whose capture of it was lost, and which could serve, capture it."""
        self.lanes.make_up(key, list(self.check.admitting(dict(key.shapes), dict(key.values))))

    # The hooks of the engine's handle.

    def stop(self) -> None:
        """Refuse new requests; what was accepted goes on."""
        self.port.close()
        self.lanes.refuse()

    def busy(self) -> str | None:
        """What is in flight, or None. Takes no lock: whoever asks holds the lock of the ownership tree."""
        running, waiting = self.port.in_flight, self.port.queued
        here = f"{running} requests on the GPU, {waiting} waiting for a slot" if running or waiting else None
        return "; ".join(filter(None, (here, self.lanes.busy()))) or None

    def drop_waiting(self, reason: str) -> int:
        """End what is accepted and not launched with ClosedError; returns how many requests that were."""
        queued = self.port.queued
        self.port.fail_queued(ClosedError(reason))
        return queued + self.lanes.drop_waiting(lambda: ClosedError(reason))

    def drain(self) -> None:
        """Wait until every accepted request has ended, and the lanes' threads have.

        What is finished and not fetched is brought into its wait: then nothing refers to graphs and memory any more,
        and a result that is fetched late, by a loop that was busy elsewhere, is still the right one.
        """
        stalled_since = time.monotonic()
        while (on_gpu := self.port.settle()) or self.port.pump():
            if on_gpu:
                stalled_since = time.monotonic()
            elif time.monotonic() - stalled_since > _STALLED_S:
                # All slots are held by callers, whose own objects are closed by now: nobody gives one back.
                self.port.fail_queued(ClosedError(f"{self._handle} was closed before a slot became free"))
            time.sleep(0.0005)
        self.lanes.drain()
        self.lanes.rest()  # as each release does; but an interrupt of this wait loses nothing

    def graph_statistics(self) -> GraphStatistics:
        """What graphs did so far."""
        return self._counts.statistics(self.port.hits - self.rerouted)


def cuda_error(driver: CudaDriver, status: int, call: str) -> CudaError:
    """A CudaError with the driver's own name and text for ``status``."""
    return driver._error(call, status)
