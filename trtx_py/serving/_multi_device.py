"""One plan on several devices, behind one ``infer``."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio

from .._aio import run_shielded
from .._arguments import checked_int, checked_timeout
from .._errors import ClosedError, InvalidArgumentError, TrtxError
from .._inputs import Arrays
from .._logger import checked_logger, owner_of
from .._options import EngineOptions, serving_options
from .._plan import Plan
from .._resource import Resource
from .._types import TensorInfo
from ..backends.registry import resolve_backend
from ._data_parallel import RowCutter
from ._loop import Loop, running_loop, running_native
from ._member import Member, Opened, OpenOptions, checked_batching
from ._opening import checked_devices, checked_interval, named, open_all, sampler_of
from ._pool_statistics import Counts, MultiDeviceStatistics, statistics_of
from ._routing import Router
from ._run_rows import run_rows
from ._strategies import RequestInfo, Strategy, make_chooser
from ._supervisor import RecoveryPolicy, Supervisor

if TYPE_CHECKING:
    from .._logger import Logger
    from .._slot import Slot
    from ..backends.protocols import TensorRTBackend

_RUNTIME_OPTIONS = frozenset({"lean_library", "allow_host_code", "max_device_bytes", "runtime_cache"})


class MultiDevice(Resource):
    """One plan on several devices. Made by ``await MultiDevice.open(plan)``.

    Owns a runtime, an engine and, with ``batching``, a batcher for each device; page-locked memory belongs to the
    context of its device. Any number of tasks of the event loop that opened it may use it.

    A device that fails is taken out of service with its cause. What it had not launched goes to the others unnoticed;
    what was launched fails with DeviceLostError, for it may be the request itself that broke the device.
    """

    _router: Router
    _tensors: tuple[TensorInfo, ...]
    _cutter: RowCutter
    _options: OpenOptions
    _loop: Loop
    _supervisor: Supervisor
    _counts: Counts
    _outstanding: int
    _closing: bool
    _on_idle: anyio.Event | None

    def __init__(self) -> None:
        self._refuse_construction("await MultiDevice.open(plan)")

    @classmethod
    async def open(
        cls,
        plan: Plan | bytes | bytearray | memoryview | str | os.PathLike[str],
        devices: Sequence[int] | None = None,
        *,
        strategy: str | Strategy = "least_loaded",
        backend: str | TensorRTBackend | None = None,
        batching: Mapping[str, Any] | None = None,
        recovery: RecoveryPolicy | None = RecoveryPolicy(),  # noqa: B008 - frozen
        sample_s: float = 0.1,
        logger: Logger | None = None,
        **options: Any,
    ) -> MultiDevice:
        """Read and check the plan once, and make an engine of it on every device at the same time.

        Args:
            plan: a Plan, the bytes of one, or a path.
            devices: ordinals; None: all that the driver shows.
            strategy: where the next request goes: "least_loaded" (outstanding work, weighted by the time that such
                requests took), "round_robin", "utilisation" (NVML; needs the extra ``nvml``), or a callable
                ``(candidates: Sequence[DeviceLoad], request: RequestInfo) -> index``.
            backend: as for Runtime; the same for all devices.
            batching: arguments of a DynamicBatcher in front of each engine; None: no batching.
            recovery: how devices that failed are brought back; None: not at all.
            sample_s: for "utilisation": seconds between two looks, 0.01 at least.
            logger: the caller's own; it stays open.
            **options: of Runtime (lean_library, allow_host_code, max_device_bytes for each device, runtime_cache) and
                of EngineOptions (lanes, completion, ...).
        Raises:
            InvalidArgumentError: unknown options, no such device, one named twice, or no strategy.
            BackendUnavailableError: nothing here can run it; for "utilisation": no NVML.
            As Runtime and ``deserialize``, with the device's number in front of the message. Nothing is left open.
        Cancellation: delivered once native code has returned; what was opened is closed.
        """
        chooser = make_chooser(strategy, checked_interval(sample_s))
        if recovery is not None and not isinstance(recovery, RecoveryPolicy):
            raise InvalidArgumentError(f"recovery is {recovery!r}; expected a RecoveryPolicy or None")
        unknown = options.keys() - _RUNTIME_OPTIONS - serving_options()
        if unknown:
            known = ", ".join(sorted(_RUNTIME_OPTIONS | serving_options()))
            raise InvalidArgumentError(f"MultiDevice has no option {', '.join(sorted(unknown))}; it has {known}")
        serving = {name: value for name, value in options.items() if name not in _RUNTIME_OPTIONS}
        EngineOptions.of(serving)  # before anything is read
        batcher_options = checked_batching(batching)
        checked = await run_shielded(lambda: Plan.load(plan))
        header = checked.header
        chosen = await run_shielded(
            lambda: resolve_backend(
                backend, need="run", plan_flavour=header.flavour, plan_version=header.version,
                lean_library=options.get("lean_library"),
            )
        )  # fmt: skip
        ordinals = checked_devices(devices, chosen)
        runtime = {"logger": logger, **{name: options[name] for name in _RUNTIME_OPTIONS & options.keys()}}
        pool = cls.__new__(cls)
        with pool._opening(owner_of(checked_logger(logger)), name=chosen.info.name) as handle:
            pool._options = OpenOptions(checked, chosen, runtime, serving, batcher_options)
            pool._loop = running_loop()
            pool._counts = Counts()
            pool._outstanding = 0
            pool._closing = False
            pool._on_idle = None
            pool._supervisor = supervisor = Supervisor(recovery, pool._loop, pool._open_on)
            pool._router = router = Router(str(handle), chooser, pool._counts, supervisor.take_over)
            supervisor.changed = router.find_serving
            handle.stop, handle.busy = supervisor.refuse, router.busy
        try:
            members = await open_all(ordinals, pool._open_on)
            pool._tensors = members[0].opened.engine.io_tensors
            pool._cutter = RowCutter(pool._tensors)
            router.start(members)
            if strategy == "utilisation":
                sampler = await run_shielded(lambda: sampler_of(chosen.driver, members, sample_s))
                handle.release = sampler.stop
        except BaseException:
            await pool.aclose(drain=False)
            raise
        return pool

    async def _open_on(self, device: int) -> Opened:
        return await Opened.open(device, self._options, self)

    # ---- what callers use ----

    @property
    def devices(self) -> tuple[int, ...]:
        """Ordinals of the devices, in service or not."""
        return tuple(member.device for member in self._router.members)

    @property
    def io_tensors(self) -> tuple[TensorInfo, ...]:
        """Inputs and outputs of the plan, as ``Engine.io_tensors``."""
        return self._tensors

    async def infer(
        self,
        inputs: Mapping[str, Any],
        *,
        priority: int = 0,
        deadline_s: float | None = None,
        tenant: str = "",
    ) -> Arrays:
        """Run the engine once, on the device that the strategy chooses.

        Args:
            inputs: as ``Engine.infer``; with batching as ``DynamicBatcher.infer``. Device tensors stay on their device
                and need one engine there: give host arrays.
            priority, deadline_s, tenant: as ``DynamicBatcher.infer``; only with batching.
        Returns:
            New arrays that the caller owns, by output tensor name.
        Raises:
            DeviceLostError: the device failed while this ran on it; another attempt may break another device.
            NoDeviceError: no device is in service; has each one's cause. At once, without waiting for a recovery.
            InvalidArgumentError: also, the strategy's answer was none.
            ClosedError: the pool is closed or closing.
            As ``Engine.infer`` or ``DynamicBatcher.infer``.
        Cancellation: before the launch nothing runs; after it the result is dropped.
        """
        how = self._how(priority, deadline_s, tenant)
        self._enter()
        try:
            outputs = await self._router.route(inputs, self._request(inputs, priority, deadline_s, tenant), how)
        except BaseException as error:
            self._leave(error)
            raise
        self._leave(None)
        return outputs

    async def infer_many(
        self,
        inputs: Mapping[str, Any],
        *,
        chunk_rows: int | None = None,
        retry: bool = False,
        priority: int = 0,
        deadline_s: float | None = None,
        tenant: str = "",
    ) -> Arrays:
        """Run any number of rows, cut along axis 0, on all devices at once.

        Each device takes the next chunk when it is free. Rows must not depend on each other.

        Args:
            inputs: arrays by input name. Those with a dynamic first axis are cut; others go whole to every chunk.
            chunk_rows: rows of a chunk at most; None: what one launch takes, or less if there are few for each device.
            retry: run a chunk once more elsewhere if its device failed while it ran. Without it that ends the call: it
                may be these rows that break devices. Chunks that were not launched are moved in any case.
            priority, deadline_s, tenant: as for ``infer``.
        Returns:
            New arrays that the caller owns, with all rows in order.
        Raises:
            InvalidArgumentError, ShapeError: the inputs, or this engine's tensors, cannot be cut like that.
            As ``infer``; the first error ends all of it.
        Cancellation: cancels all chunks.
        """
        how = self._how(priority, deadline_s, tenant)
        if chunk_rows is not None:
            checked_int(chunk_rows, "chunk_rows", minimum=1)
        self._enter()
        try:
            outputs = await run_rows(self._router, self._cutter, inputs, chunk_rows=chunk_rows, retry=retry, how=how)
        except BaseException as error:
            self._leave(error)
            raise
        self._leave(None)
        return outputs

    @asynccontextmanager
    async def alloc_inputs(self, shapes: Mapping[str, Sequence[int]]) -> AsyncIterator[Slot]:
        """``async with pool.alloc_inputs({"x": shape}) as slot:`` takes one pinned slot on the device that is chosen.

        As ``Engine.alloc_inputs``: rows that the caller writes there are not copied on the host, which several devices
        together may have no memory bandwidth for. The slot stays on its device; while it is held it counts as a
        request of its size there, so that slots are spread too, and ``aclose`` waits for it as for a request.

        Raises:
            DeviceLostError: out of the block, where the device failed; ``launched`` says whether anything ran.
            As ``infer``, and as ``Engine.alloc_inputs``.
        """
        self._enter()
        error: BaseException | None = None
        try:
            request = self._cutter.request_of(shapes)
            member = self._router.choose(request)
            async with self._router.held(member, request) as opened, opened.engine.alloc_inputs(shapes) as slot:
                yield slot
        except BaseException as raised:
            error = raised
            raise
        finally:
            self._leave(error)

    async def warmup(self, iterations: int = 10) -> None:
        """``Engine.warmup`` on every device in service, all at once. Raises as ``infer``."""
        count = checked_int(iterations, "iterations", minimum=0)
        self._require_serving()
        failed: dict[int, Exception] = {}

        async def warm_up(member: Member) -> None:
            try:
                await member.opened.engine.warmup(count)
                if count and member.opened.batcher is not None:
                    await member.opened.batcher.warmup()
            except Exception as error:  # out of the task group, which would wrap it
                failed[member.device] = error
                if isinstance(error, TrtxError):
                    self._router.is_lost(member, member.opened, error)

        async with anyio.create_task_group() as group:
            for member in self._router.serving:
                group.start_soon(warm_up, member)
        for device, error in failed.items():
            raise named(error, device)

    def statistics(self) -> MultiDeviceStatistics:
        """Counts and states at this moment; after it was closed, the last ones."""
        return MultiDeviceStatistics(
            **vars(self._counts),
            outstanding=self._outstanding,
            devices=tuple(statistics_of(member) for member in self._router.members),
        )

    async def aclose(self, *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Refuse new requests, finish what was accepted, and close everything. Idempotent.

        Args:
            drain: False gives up what is not launched.
            timeout_s: after so many seconds what is not launched is given up. What was launched is awaited in any case.
        What was given up gets ClosedError and is counted in ``statistics().dropped``.
        Cancellation: what is not launched is given up, the closing goes on to its end, and the cancellation is
            delivered after it.
        """
        timeout = checked_timeout(timeout_s)
        if not self.closed:
            self._closing = True
            try:
                self._supervisor.cancel()  # and wait for it last: opening a device takes as long as it takes
                if drain and self._outstanding:
                    self._on_idle = self._on_idle or anyio.Event()
                    with anyio.move_on_after(timeout):
                        await self._on_idle.wait()
                self._router.drop_waiting()
                await self._supervisor.stop()
            except BaseException:
                self._router.drop_waiting()
                await super().aclose()
                raise
        await super().aclose()

    # ---- the way of a request ----

    def _require_serving(self) -> None:
        if self._closing or self.closed:
            self._handle.require_open()
            raise ClosedError(f"{self._handle} is closing and takes no more requests")
        if self._loop.native is not running_native():
            raise InvalidArgumentError(
                f"{self._handle} belongs to the event loop that opened it; open one in each loop, or use engines, "
                "which serve any number of loops"
            )

    def _how(self, priority: int, deadline_s: float | None, tenant: str) -> dict[str, Any]:
        if self._options.batching is not None:
            return {"priority": priority, "deadline_s": deadline_s, "tenant": tenant}
        if priority or deadline_s is not None or tenant:
            raise InvalidArgumentError(
                "priority, deadline_s and tenant need batching: open the pool with batching={} or more"
            )
        return {}

    def _request(self, inputs: Mapping[str, Any], priority: int, deadline_s: float | None, tenant: str) -> RequestInfo:
        try:
            nbytes = 0
            for array in inputs.values():
                nbytes += getattr(array, "nbytes", 0)
            return RequestInfo(self._cutter.rows(inputs), nbytes, priority, deadline_s, tenant)
        except AttributeError:
            return RequestInfo(1, 0, priority, deadline_s, tenant)  # no mapping: the engine says so

    def _enter(self) -> None:
        self._require_serving()
        self._counts.accepted += 1
        self._outstanding += 1

    def _leave(self, error: BaseException | None) -> None:
        counts = self._counts
        if error is None:
            counts.completed += 1
        elif isinstance(error, ClosedError) and self._router.dropping:
            counts.dropped += 1
        elif isinstance(error, Exception):
            counts.failed += 1
        else:
            counts.cancelled += 1
        self._outstanding -= 1
        if self._on_idle is not None and not self._outstanding:
            self._on_idle.set()
