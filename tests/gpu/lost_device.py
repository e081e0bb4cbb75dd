"""A program that breaks the last of its devices under a MultiDevice, and prints what became of it as JSON.

    python -m tests.gpu.lost_device

It is a process of its own because a kernel that faults breaks it to its end. What it prints: "answered" and "refused",
what became of requests afterwards; "outcome", the state of each device in the end; "error", why the broken one did not
come back.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import sys
import time

import trtx_py as trtx
from tests.gpu.kit import GpuSide, load_kit, pool_options

_PATIENCE_S = 60.0
#: Writes to an address that no allocation holds.
_PTX = b"""
.version 7.0
.target sm_52
.address_size 64
.visible .entry crash()
{
    .reg .u64 %a;
    .reg .u32 %v;
    mov.u64 %a, 64;
    mov.u32 %v, 1;
    st.global.u32 [%a], %v;
    ret;
}
"""


def break_context(device: int) -> int:
    """Run that kernel in the device's primary context; returns the sticky CUresult."""
    cuda = ctypes.CDLL("libcuda.so.1")

    def call(name: str, *arguments: object) -> None:
        status = getattr(cuda, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} returned {status}")

    number, context = ctypes.c_int(), ctypes.c_void_p()
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    call("cuInit", 0)
    call("cuDeviceGet", ctypes.byref(number), device)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), number)
    try:
        call("cuCtxPushCurrent_v2", context)
        call("cuModuleLoadData", ctypes.byref(module), _PTX)
        call("cuModuleGetFunction", ctypes.byref(function), module, b"crash")
        call("cuLaunchKernel", function, 1, 1, 1, 1, 1, 1, 0, None, None, None)
        status: int = cuda.cuCtxSynchronize()
        call("cuCtxPopCurrent_v2", ctypes.byref(context))
    finally:
        cuda.cuDevicePrimaryCtxRelease_v2(number)
    return status


async def lose(side: GpuSide) -> dict[str, object]:
    """Break the last device, use the pool on, and wait for what becomes of it."""
    case = side.kit.case("mlp.fp32.vcx")
    inputs = side.kit.inputs(case)
    policy = trtx.RecoveryPolicy(initial_s=0.2, jitter=0.0, attempts=2)
    devices = range(min(2, trtx.device_count()))
    async with await trtx.MultiDevice.open(
        side.plan("mlp.fp32.vcx"), devices, strategy="round_robin", recovery=policy, **pool_options(side)
    ) as pool:
        await pool.warmup(2)
        for _ in devices:
            await pool.infer(inputs)
        broken = devices[-1]
        status = break_context(broken)
        answered = refused = 0
        for _ in range(8):
            try:
                side.kit.check(case, await pool.infer(inputs))
                answered += 1
            except trtx.NoDeviceError:
                refused += 1
        until = time.monotonic() + _PATIENCE_S
        ends = {"serving", "lost"}
        while not {each.state for each in pool.statistics().devices} <= ends and time.monotonic() < until:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        found = pool.statistics().devices
        return {
            "devices": len(devices), "status": status, "answered": answered, "refused": refused,
            "outcome": [each.state for each in found], "attempts": found[broken].attempts,
            "error": found[broken].last_error,
        }  # fmt: skip


def main() -> int:
    kit = load_kit()
    if kit is None:
        print("no GPU kit", file=sys.stderr)
        return 2
    print(json.dumps(asyncio.run(lose(GpuSide(kit)))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
