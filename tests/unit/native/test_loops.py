"""_loops: the hub of the running loop, and finish() on asyncio, uvloop and trio."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import weakref

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trtx_py import _loops
from trtx_py._loops import current_hub, finish

from .rig import LOOPS, MODES, RefusedError, at_rest, rig, submit

RUNNERS = pytest.mark.parametrize(
    "run",
    [*(lambda f, *a, run=run: run(f(*a)) for run in LOOPS.values()), trio.run],
    ids=[*LOOPS, "trio"],
)


async def ask(port, value=1.0):
    return await finish(submit(port, value, current_hub()))


@RUNNERS
@pytest.mark.parametrize("mode", MODES)
def test_requests_one_after_the_other(run, mode):
    async def main(port):
        for n in range(10):
            assert (await ask(port, n))["y"][0, 0] == n

    with rig() as r:
        port = r.port(r.lane(1, mode).bucket())
        run(main, port)
        assert at_rest(port)


@RUNNERS
def test_queue_is_served_though_its_slots_were_dropped(run):
    async def main(r, lane, port):
        gate = lane.hold()
        submit(port).cancel()  # comes back silently
        wait = submit(port, 4, current_hub())
        assert wait.queued
        gate.open()
        assert (await finish(wait))["y"][0, 0] == 4

    with rig() as r:
        lane = r.lane(1)
        port = r.port(lane.bucket())
        run(main, r, lane, port)
        assert at_rest(port)


@RUNNERS
def test_one_hub_for_each_loop_that_goes_with_it(run):
    hubs = []

    async def main():
        assert current_hub() is current_hub()
        hubs.append(weakref.ref(current_hub()))

    for _ in range(3):
        run(main)
    gc.collect()
    assert [hub() for hub in hubs] == [None] * 3
    assert _loops._hubs == {}


def test_closed_loop_is_not_kept_alive():
    async def main():
        return current_hub().fd

    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    gone = weakref.ref(loop)
    loop.close()
    del loop
    gc.collect()
    assert gone() is None


def test_loop_that_stops_with_a_queue_does_not_keep_another_from_pumping():
    async def leave(port):
        wait = submit(port, 1.0, current_hub())
        finish(wait)
        return wait

    with rig() as r:
        lane = r.lane(1)
        port = r.port(lane.bucket())
        gate = lane.hold()
        first = submit(port)
        left = asyncio.run(leave(port))
        assert left.queued
        del left

        async def main():
            wait = submit(port, 3, current_hub())
            first.cancel()
            gate.open()
            return await finish(wait)

        assert asyncio.run(main())["y"][0, 0] == 3
        assert at_rest(port)


def test_no_loop_no_hub():
    with pytest.raises(RuntimeError, match="no running event loop"):
        current_hub()


def test_trio_cancellation_drops_the_result():
    async def main(lane, port):
        lane.hold()
        for _ in range(2):  # in flight, and queued
            with trio.move_on_after(0.001) as scope:
                await ask(port)
            assert scope.cancelled_caught
        r.gates[0].open()
        assert (await ask(port, 6))["y"][0, 0] == 6

    with rig() as r:
        lane = r.lane(1)
        port = r.port(lane.bucket())
        trio.run(main, lane, port)
        assert (port.cancelled, port.completed) == (2, 1)
        assert at_rest(port)


def test_trio_hears_of_failure():
    async def main(lane, port):
        lane.hold()
        keep = submit(port)

        async def client():
            with pytest.raises(RefusedError):
                await ask(port)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(client)
            await wait_all_tasks_blocked()
            port.fail_queued(RefusedError("closing"))
        keep.cancel()

    with rig() as r:
        lane = r.lane(1)
        port = r.port(lane.bucket())
        trio.run(main, lane, port)
        assert at_rest(port)


def test_trio_as_a_guest_of_asyncio():
    async def main(port):
        assert (await ask(port, 2))["y"][0, 0] == 2

    async def host(port):
        done = asyncio.get_running_loop().create_future()
        trio.lowlevel.start_guest_run(
            main,
            port,
            run_sync_soon_threadsafe=asyncio.get_running_loop().call_soon_threadsafe,
            done_callback=done.set_result,
        )
        (await done).unwrap()

    with rig() as r:
        port = r.port(r.lane(1).bucket())
        asyncio.run(host(port))
        assert at_rest(port)


SCRIPT = """
import asyncio, sys
from tests.unit.native.rig import Rig, sample
from trtx_py._loops import current_hub, finish
r = Rig()
lane = r.lane(1)
port = r.port(lane.bucket())
async def client():
    await finish(port.submit({"x": sample()}, current_hub()))
async def main():
    await client()
    lane.hold().open()
    return asyncio.ensure_future(client())
loop = asyncio.new_event_loop()
loop.run_until_complete(main())
loop.close()
print("end")
"""


def test_interpreter_exits_in_silence_with_everything_open():
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr
    assert "Task was destroyed" in done.stderr or done.stderr == ""
