"""Contexts, memory and copies of the mock driver."""

from __future__ import annotations

import ctypes
import threading

import numpy as np
import pytest

from mock_backend import MockBackend
from trtx_py._errors import CudaError


def code_of(call, *args):
    with pytest.raises(CudaError) as caught:
        call(*args)
    return caught.value.code


def test_calls_before_cuinit_are_refused(mock_backend):
    driver = mock_backend.driver
    assert driver.cuDriverGetVersion() == 12080
    assert code_of(driver.cuDeviceGetCount) == 3
    assert code_of(driver.cuMemAlloc, 16) == 3
    driver.cuInit(0)
    assert driver.cuDeviceGetCount() == 1


def test_no_devices():
    assert code_of(MockBackend(devices=0).driver.cuInit, 0) == 100
    assert not MockBackend(devices=0).info.can_run


def test_calls_need_a_current_context(mock_backend):
    driver = mock_backend.driver
    driver.cuInit(0)
    assert driver.cuCtxGetCurrent() == 0
    assert code_of(driver.cuMemAlloc, 16) == 201
    assert code_of(driver.cuStreamCreate, 0) == 201
    assert code_of(driver.cuCtxPopCurrent) == 201
    assert code_of(driver.cuCtxPushCurrent, 1234) == 201


def test_context_stack_belongs_to_the_thread(rig):
    seen = []
    thread = threading.Thread(target=lambda: seen.append(rig.driver.cuCtxGetCurrent()))
    thread.start()
    thread.join()
    assert seen == [0]
    assert rig.driver.cuCtxGetCurrent() == rig.context


def test_primary_context_is_counted(mock_backend):
    driver = mock_backend.driver
    driver.cuInit(0)
    context = driver.cuDevicePrimaryCtxRetain(0)
    assert driver.cuDevicePrimaryCtxRetain(0) == context
    driver.cuDevicePrimaryCtxRelease(0)
    driver.cuCtxPushCurrent(context)
    assert driver.cuMemGetInfo()[1] == 8 << 30
    driver.cuDevicePrimaryCtxRelease(0)
    assert code_of(driver.cuMemGetInfo) == 201
    assert code_of(driver.cuDevicePrimaryCtxRelease, 0) == 201
    assert driver.cuCtxPopCurrent() == context


def test_what_a_context_leaves_behind_is_a_leak(loose_rig):
    rig = loose_rig()
    rig.driver.cuMemAlloc(100)
    rig.driver.cuCtxPopCurrent()
    rig.driver.cuDevicePrimaryCtxRelease(0)
    leaks = "\n".join(rig.backend.leaks())
    assert "device block" in leaks
    assert "test_driver.py" in leaks
    assert "stream" in leaks
    with pytest.raises(AssertionError, match="of 100 bytes"):
        rig.backend.assert_clean()


def test_devices_are_apart(rig_with):
    rig = rig_with(devices=2, memory_bytes=1 << 20)
    driver = rig.driver
    first = rig.alloc(512)
    other_stream = rig.stream
    second_context = driver.cuDevicePrimaryCtxRetain(1)
    driver.cuCtxPushCurrent(second_context)
    assert driver.cuMemGetInfo()[0] == 1 << 20
    with pytest.raises(CudaError, match="belongs to device 0, but device 1 is current") as caught:
        driver.cuMemsetD8Async(first, 0, 512, other_stream)
    assert caught.value.code == 400
    driver.cuCtxPopCurrent()
    driver.cuDevicePrimaryCtxRelease(1)
    assert code_of(driver.cuDeviceGet, 2) == 101


def test_attributes(rig):
    assert (rig.driver.cuDeviceGetAttribute(75, 0), rig.driver.cuDeviceGetAttribute(76, 0)) == (8, 9)
    assert code_of(rig.driver.cuDeviceGetAttribute, 123456, 0) == 1


def test_fresh_memory_is_poisoned(rig):
    pointer = rig.alloc(64)
    host = np.zeros(64, np.uint8)
    rig.driver.cuMemcpyDtoHAsync(host.ctypes.data, pointer, 64, rig.stream)
    assert set(host.tolist()) == {0xCB}


def test_memory_limit(rig_with):
    rig = rig_with(memory_bytes=4096)
    rig.alloc(2048)
    with pytest.raises(CudaError, match="2048 of 4096 are free") as caught:
        rig.driver.cuMemAlloc(2049)
    assert caught.value.code == 2
    assert caught.value.name == "CUDA_ERROR_OUT_OF_MEMORY"
    rig.alloc(2048)


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 101), (100, 1), (50, 51), (-1, 1)])
def test_copies_out_of_a_block_are_refused_at_once(rig, offset, nbytes):
    pointer = rig.alloc(100)
    host = np.zeros(256, np.uint8)
    assert code_of(rig.driver.cuMemcpyHtoDAsync, pointer + offset, host.ctypes.data, nbytes, rig.stream) == 1
    assert code_of(rig.driver.cuMemcpyDtoHAsync, host.ctypes.data, pointer + offset, nbytes, rig.stream) == 1
    assert code_of(rig.driver.cuMemsetD8Async, pointer + offset, 0, nbytes, rig.stream) == 1
    rig.driver.cuStreamSynchronize(rig.stream)  # nothing was enqueued, so nothing failed


def test_swapped_pointers_are_refused(rig):
    pointer = rig.alloc(16)
    host = np.zeros(16, np.uint8)
    assert code_of(rig.driver.cuMemcpyHtoDAsync, host.ctypes.data, pointer, 16, rig.stream) == 1
    assert code_of(rig.driver.cuMemcpyDtoHAsync, pointer, host.ctypes.data, 16, rig.stream) == 1
    assert code_of(rig.driver.cuMemcpyDtoHAsync, 0, pointer, 16, rig.stream) == 1


def test_frees_that_are_wrong(rig):
    pointer = rig.driver.cuMemAlloc(100)
    with pytest.raises(CudaError, match="bytes inside"):
        rig.driver.cuMemFree(pointer + 4)
    rig.driver.cuMemFree(pointer)
    with pytest.raises(CudaError, match=r"double free.*allocated at .*test_driver.py.*freed at .*test_driver.py"):
        rig.driver.cuMemFree(pointer)
    assert code_of(rig.driver.cuMemFree, 12345) == 1
    rig.driver.cuMemFree(0)


def test_use_after_free_is_explained(rig):
    pointer = rig.driver.cuMemAlloc(100)
    rig.driver.cuMemFree(pointer)
    with pytest.raises(CudaError, match="use after free"):
        rig.driver.cuMemsetD8Async(pointer, 0, 1, rig.stream)


def test_memory_freed_under_queued_work_is_a_device_fault(loose_rig):
    rig = loose_rig()
    pointer = rig.driver.cuMemAlloc(100)
    with rig.blocked(rig.stream):
        rig.driver.cuMemsetD8Async(pointer, 0, 100, rig.stream)
        rig.driver.cuMemFree(pointer)
    assert code_of(rig.driver.cuStreamSynchronize, rig.stream) == 700
    assert code_of(rig.driver.cuMemAlloc, 16) == 700


def test_pageable_source_is_staged(rig):
    pointer = rig.alloc(8)
    source = np.full(8, 1, np.uint8)
    with rig.blocked(rig.stream):
        rig.driver.cuMemcpyHtoDAsync(pointer, source.ctypes.data, 8, rig.stream)
        source[:] = 2
    target = np.zeros(8, np.uint8)
    rig.driver.cuMemcpyDtoHAsync(target.ctypes.data, pointer, 8, rig.stream)
    assert set(target.tolist()) == {1}  # and no synchronize was needed: a pageable target is complete on return


def test_pinned_source_is_read_when_the_copy_runs(rig):
    pointer = rig.alloc(8)
    host = rig.driver.cuMemHostAlloc(8, 0)
    assert host % 4096 == 0
    ctypes.memset(host, 1, 8)
    with rig.blocked(rig.stream):
        rig.driver.cuMemcpyHtoDAsync(pointer, host, 8, rig.stream)
        ctypes.memset(host, 2, 8)
    rig.driver.cuMemcpyDtoHAsync(host, pointer, 8, rig.stream)
    rig.driver.cuStreamSynchronize(rig.stream)
    assert ctypes.string_at(host, 8) == b"\2" * 8
    rig.driver.cuMemFreeHost(host)


def test_freed_pinned_memory_is_caught(rig):
    pointer = rig.alloc(8)
    host = rig.driver.cuMemHostAlloc(8, 1)
    assert code_of(rig.driver.cuMemcpyHtoDAsync, pointer, host + 4, 8, rig.stream) == 1
    rig.driver.cuMemFreeHost(host)
    with pytest.raises(CudaError, match="use after free"):
        rig.driver.cuMemcpyHtoDAsync(pointer, host, 8, rig.stream)
    with pytest.raises(CudaError, match="double free"):
        rig.driver.cuMemFreeHost(host)


def test_pinned_memory_freed_under_a_copy_is_a_device_fault(loose_rig):
    rig = loose_rig()
    pointer, host = rig.driver.cuMemAlloc(8), rig.driver.cuMemHostAlloc(8, 0)
    with rig.blocked(rig.stream):
        rig.driver.cuMemcpyDtoHAsync(host, pointer, 8, rig.stream)
        rig.driver.cuMemFreeHost(host)
    assert code_of(rig.driver.cuStreamSynchronize, rig.stream) == 700


def test_pinned_overrun_and_write_after_free_are_damage(loose_rig):
    rig = loose_rig()
    host = rig.driver.cuMemHostAlloc(10, 0)
    ctypes.memset(host + 10, 0, 2)
    assert any("2 bytes after it" in text for text in rig.backend.damage())
    rig.driver.cuMemFreeHost(host)
    ctypes.memset(host, 1, 1)
    assert any("written to after it was freed" in text for text in rig.backend.damage())


def test_device_red_zones_are_checked(loose_rig):
    rig = loose_rig()
    pointer = rig.driver.cuMemAlloc(10)
    view = rig.driver.device_view(pointer, 10, "test")
    ctypes.memset(view.ctypes.data + 10, 0, 3)
    rig.driver.cuMemFree(pointer)
    assert any("3 bytes after it" in text for text in rig.backend.damage())


def test_sticky_error_ends_with_the_context(loose_rig):
    rig = loose_rig()
    pointer = rig.driver.cuMemAlloc(16)
    with rig.blocked(rig.stream):
        rig.driver.cuMemsetD8Async(pointer, 0, 16, rig.stream)
        rig.driver.cuMemFree(pointer)
    for call in (
        lambda: rig.driver.cuStreamSynchronize(rig.stream),
        lambda: rig.driver.cuStreamQuery(rig.stream),
        rig.driver.cuMemGetInfo,
        lambda: rig.driver.cuEventCreate(0),
        lambda: rig.driver.cuStreamDestroy(rig.stream),
    ):
        assert code_of(call) == 700
    rig.driver.cuCtxPopCurrent()
    rig.driver.cuDevicePrimaryCtxRelease(0)
    context = rig.driver.cuDevicePrimaryCtxRetain(0)
    rig.driver.cuCtxPushCurrent(context)
    rig.driver.cuMemFree(rig.driver.cuMemAlloc(16))
    rig.driver.cuDevicePrimaryCtxRelease(0)
    rig.backend.assert_clean()  # what a fault kept from being closed is no leak
