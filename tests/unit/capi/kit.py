"""The control plane as libtrtxpy sees it: tuples of numbers and addresses, and the lanes' functions from a capsule."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from trtx_py.capi import _control

FLOAT32, FLOAT16, INT32, UINT32, INT64, UINT64, INT8, UINT8, INT4, UINT4 = range(10)
BOOL, BFLOAT16, FLOAT8 = 16, 17, 18

control: Any = _control


def options(
    ranges: Any = None,
    precision: str | None = None,
    level: int = -1,
    lanes: int = 0,
    slots: int = 0,
    max_graphs: int = 0,
    no_cuda_graphs: bool = False,
) -> Any:
    return ranges, precision, level, lanes, slots, max_graphs, no_cuda_graphs


def ok(answer: Any) -> Any:
    """The results of a call that succeeded: the one, or a tuple of them."""
    assert answer[0] == 0, answer
    return answer[1] if len(answer) == 2 else answer[1:]


@contextlib.contextmanager
def context(
    backend: str | None = "mock",
    *,
    completion: int = 0,
    budget: int = 0,
    cached: int = 0,
) -> Iterator[Any]:
    made, _ = ok(control.create_context(backend, 0, completion, budget, None, cached, False))
    try:
        yield made
    finally:
        answer = control.destroy_context(made)
    assert answer == (0,)


@contextlib.contextmanager
def graph(context: Any, model: bytes, **given: Any) -> Iterator[Any]:
    made, _ = ok(control.open_onnx(context, memoryview(model), None, options(**given)))
    try:
        yield made
    finally:
        answer = control.close_graph(made)
    assert answer == (0,)


def read(address: int, shape: Sequence[int], dtype: Any) -> np.ndarray:
    """A copy of what is there."""
    kind = np.dtype(dtype)
    nbytes = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    return np.frombuffer(ctypes.string_at(address, nbytes), kind).reshape(shape).copy()


def write(address: int, array: np.ndarray) -> None:
    ctypes.memmove(address, np.ascontiguousarray(array).ctypes.data, array.nbytes)


class _Table(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("version", ctypes.c_uint),
        ("acquire_among", ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint64), ctypes.c_size_t, ctypes.c_bool,
            ctypes.POINTER(ctypes.c_size_t))),
        ("release", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)),
        ("submit", ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p)),
        ("wait", ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_void_p)),
    ]  # fmt: skip


class _Completion(ctypes.Structure):
    _fields_ = [
        ("token", ctypes.c_uint64), ("status", ctypes.c_int),
        ("launched_ns", ctypes.c_uint64), ("completed_ns", ctypes.c_uint64),
    ]  # fmt: skip


def lanes() -> Any:
    """The functions that C calls."""
    capsule = ok(control.start())
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return _Table.from_address(pointer(capsule, b"trtx_py.lane_table"))


DONE, IN_FLIGHT = 3, 2


class Launcher:
    """What C does with one lane of a captured shape."""

    def __init__(self, bucket: Any) -> None:
        self.table = lanes()
        self.lane, self.places = bucket
        self.by_slot = {slot: (exec_, inputs, outputs) for slot, exec_, inputs, outputs in self.places}
        words = max(self.by_slot) // 64 + 1
        self.mask = (ctypes.c_uint64 * words)()
        for slot in self.by_slot:
            self.mask[slot // 64] |= 1 << slot % 64

    def take(self) -> int:
        """A slot that must be free."""
        slot = self.acquire()
        assert slot is not None
        return slot

    def acquire(self) -> int | None:
        slot = ctypes.c_size_t()
        status = self.table.acquire_among(self.lane, self.mask, len(self.mask), True, ctypes.byref(slot))
        return slot.value if status == 0 else None

    def _submit(self, slot: int, arrays: Sequence[np.ndarray]) -> int:
        exec_, inputs, _ = self.by_slot[slot]
        for address, array in zip(inputs, arrays, strict=True):
            write(address, array)
        return self.table.submit(self.lane, slot, exec_, 7, None)

    def submit(self, slot: int, *arrays: np.ndarray) -> None:
        assert self._submit(slot, arrays) == 0

    def wait(self, slot: int, completion: _Completion | None = None) -> None:
        place = None if completion is None else ctypes.addressof(completion)
        assert self.table.wait(self.lane, slot, 1000, 60_000_000_000, place) == DONE

    def fault(self, slot: int, *arrays: np.ndarray) -> int:
        """The error of a request that fails. The device may be lost before the launch returns, or after it."""
        error = self._submit(slot, arrays)
        if error == 0:
            completion = _Completion()
            self.wait(slot, completion)
            error = completion.status
        return error

    def release(self, slot: int) -> None:
        assert self.table.release(self.lane, slot) == 0

    def run(self, inputs: Sequence[np.ndarray], outputs: Sequence[tuple[Sequence[int], Any]]) -> list[np.ndarray]:
        """One request: acquire, fill, launch, wait, read, release."""
        slot = self.take()
        try:
            self.submit(slot, *inputs)
            self.wait(slot)
            addresses = self.by_slot[slot][2]
            return [read(address, *output) for address, output in zip(addresses, outputs, strict=True)]
        finally:
            self.release(slot)
