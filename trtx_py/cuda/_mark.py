"""Marks behind enqueued work: what a buffer, or an execution context, still has to wait for."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from .._errors import CudaError
from .._resource import Handle
from ..backends.protocols import CU_EVENT_DISABLE_TIMING, CUDA_SUCCESS, STICKY_CUDA_ERRORS
from ._device import DeviceAccess


class Mark:
    """The end of the work enqueued on one stream, for several to ask about and to wait for. Thread-safe.

    The driver's event goes as soon as the work is known to be over and nobody waits for it, so that a mark may outlive
    the device it was made on.
    """

    def __init__(self, access: DeviceAccess) -> None:
        self._access = access
        self._lock = threading.Lock()
        self._waiters = 0
        self._armed = True
        self._over = False
        with access.current:
            self._event = access.driver.cuEventCreate(CU_EVENT_DISABLE_TIMING)

    def arm(self) -> bool:
        """Keep the mark until it is recorded again; False if it is over already and of no more use."""
        with self._lock:
            self._armed = not self._over
            return self._armed

    def record(self, stream: int) -> None:
        """Move the armed mark to the present end of ``stream``: always the same, or older work would be lost."""
        try:
            with self._access.current:
                self._access.driver.cuEventRecord(self._event, stream)
        finally:
            self.disarm()

    def disarm(self) -> None:
        """Nothing was enqueued after all: the mark stays where it was."""
        with self._lock:
            self._armed = False

    def over(self) -> bool:
        """True once the work before the mark has ended, whichever way. Raises CudaError if its event cannot go."""
        with self._lock:
            if not self._over and not self._armed:
                try:
                    with self._access.current:
                        self._over = self._access.driver.cuEventQuery(self._event) == CUDA_SUCCESS
                except CudaError:
                    self._over = True  # the device failed: nothing runs on it any more
                self._let_go()
            return self._over

    def wait(self) -> None:
        """Block until the work before the mark has ended. Raises CudaError unless the device is lost, which ends it."""
        with self._lock:
            if self._over:
                return
            self._waiters += 1
        try:
            # Without the lock: whoever asks over() holds the lock of the ownership tree and must not wait for the GPU.
            with self._access.current:
                self._access.driver.cuEventSynchronize(self._event)
        except CudaError as error:
            if error.code not in STICKY_CUDA_ERRORS:
                raise
        finally:
            with self._lock:
                self._waiters -= 1
                self._over = True
                self._let_go()

    def _let_go(self) -> None:
        if self._over and not self._waiters and self._event:
            event, self._event = self._event, 0
            try:
                with self._access.current:
                    self._access.driver.cuEventDestroy(event)
            except CudaError as error:
                if error.code not in STICKY_CUDA_ERRORS:  # a lost device took the event with it
                    raise


class Uses:
    """Enqueued work that uses a buffer which is not lent any more: the address was replaced, the kernel still runs.

    The buffer is busy until that work has ended: ``close()`` refuses, ``aclose()`` and the reaper wait for it.
    """

    def __init__(self, handle: Handle) -> None:
        self._marks: list[Mark] = []
        handle.busy, handle.drain = self._busy, self._drain

    def add(self, marks: Iterable[Mark]) -> None:
        self._marks = [*(mark for mark in self._marks if not mark.over()), *marks]

    def _busy(self) -> str | None:
        if all(mark.over() for mark in self._marks):
            return None
        return "an inference that was enqueued with its address is not finished; synchronize that stream first"

    def _drain(self) -> None:
        for mark in self._marks:
            mark.wait()
