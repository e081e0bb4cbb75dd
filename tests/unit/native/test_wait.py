"""Wait: awaited, cancelled at every point, driven by hand, blocked on."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
from typing import Any

import pytest

from trtx_py._loops import current_hub

from .rig import (
    BALANCED,
    FOREVER_NS,
    LATENCY,
    LOOPS,
    MODES,
    PATIENCE_NS,
    FailedError,
    RefusedError,
    at_rest,
    rig,
    submit,
)

RUNNERS = pytest.mark.parametrize("run", LOOPS.values(), ids=LOOPS)
LAUNCH_FAILED = 719


def ask(port, value=1.0):
    wait = submit(port, value, current_hub())
    assert wait is not None
    return wait


def new_loop(run):
    loops = []

    async def nothing():
        loops.append(type(asyncio.get_running_loop()))

    run(nothing())
    return loops[0]()


async def until_done(wait):
    while not wait.done:  # noqa: ASYNC110 -- nobody would set an event
        await asyncio.sleep(0)


async def timer(port):
    """What _loops.finish starts for queued waits."""
    while port.pump():  # noqa: ASYNC110 -- nobody would set an event
        await asyncio.sleep(0.001)


@RUNNERS
@pytest.mark.parametrize("instant", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("slots", [1, 3, 16])
def test_many_clients(run, mode, slots, instant):
    async def client(port, base):
        for n in range(25):
            assert (await ask(port, base + n))["y"][0, 0] == base + n

    async def main(port):
        await asyncio.gather(*(client(port, 100 * n) for n in range(8)))

    with rig(instant=instant) as r:
        port = r.port(r.lane(slots, mode).bucket())
        run(main(port))
        assert at_rest(port)
        assert port.completed == 200


@RUNNERS
@pytest.mark.parametrize("mode", MODES)
def test_loop_runs_while_a_request_is_awaited(run, mode):
    async def main(r, lane, port):
        gate = lane.hold()
        waiting = asyncio.ensure_future(client(port))
        await asyncio.sleep(0.002)
        assert not waiting.done()
        gate.open()
        assert (await waiting)["y"][0, 0] == 1

    async def client(port):
        return await ask(port)

    with rig() as r:
        lane = r.lane(1, mode)
        port = r.port(lane.bucket())
        run(main(r, lane, port))
        assert at_rest(port)


@RUNNERS
def test_await_lets_the_others_run_even_if_the_result_is_there(run):
    async def main(port):
        turns = []

        async def other():
            while True:
                turns.append(1)
                await asyncio.sleep(0)

        task = asyncio.ensure_future(other())
        for n in range(50):
            wait = ask(port)
            assert wait.done
            before = len(turns)
            await wait
            assert len(turns) > before, n
        task.cancel()

    with rig(instant=True) as r:
        port = r.port(r.lane(1).bucket())
        run(main(port))


@RUNNERS
@pytest.mark.parametrize("mode", [LATENCY, BALANCED])
@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("queued", [False, True])
def test_task_cancelled_while_it_waits(run, mode, turns, queued):
    async def client(port):
        return await ask(port)

    async def main(lane, port):
        gate = lane.hold()
        blocker = asyncio.ensure_future(client(port)) if queued else None
        await asyncio.sleep(0)
        task = asyncio.ensure_future(client(port))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert port.cancelled == (1 if turns else 0)
        gate.open()
        if blocker is not None:
            await blocker
        await client(port) if not queued else None

    with rig() as r:
        lane = r.lane(2 if not queued else 1, mode)
        port = r.port(lane.bucket())
        run(main(lane, port))
        assert at_rest(port)


@RUNNERS
def test_task_cancelled_when_the_result_is_there_but_not_taken(run):
    async def client(port):
        return await ask(port)

    async def main(r, lane, port):
        gate = lane.hold()
        task = asyncio.ensure_future(client(port))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        gate.open()
        lane.rest()
        current_hub().drain()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert lane.native.acquire() == 0
        lane.native.release(0)

    with rig() as r:
        lane = r.lane(1, BALANCED)
        port = r.port(lane.bucket())
        run(main(r, lane, port))
        assert (port.cancelled, port.completed) == (1, 0)
        assert at_rest(port)


@RUNNERS
def test_wait_that_is_never_awaited_and_results_that_are_never_taken(run):
    async def main(port):
        for _ in range(10):
            ask(port)
        done = ask(port)
        await until_done(done)
        del done
        assert (await ask(port, 7))["y"][0, 0] == 7

    with rig() as r:
        port = r.port(r.lane(2).bucket())
        run(main(port))
        assert (port.cancelled, port.completed) == (11, 1)
        assert at_rest(port)


@RUNNERS
@pytest.mark.parametrize("mode", MODES)
def test_loop_closed_with_waits_pending_leaves_the_slots_to_others(run, mode):
    async def client(port):
        return await ask(port)

    async def first(lane, port):
        tasks = [asyncio.ensure_future(client(port)) for _ in range(4)]
        await asyncio.sleep(0.001)
        return tasks

    async def second(port):
        timers = asyncio.ensure_future(timer(port))
        assert (await ask(port, 5))["y"][0, 0] == 5
        await timers

    with rig() as r:
        lane = r.lane(2, mode)
        port = r.port(lane.bucket())
        gate = lane.hold()
        loop = new_loop(run)
        tasks = loop.run_until_complete(first(lane, port))
        loop.close()
        for task in tasks:
            task._log_destroy_pending = False
        del task, tasks
        gc.collect()
        assert port.cancelled == 4
        gate.open()
        run(second(port))
        assert at_rest(port)


@RUNNERS
@pytest.mark.parametrize("mode", MODES)
def test_two_loops_in_two_threads_share_a_port(run, mode):
    errors = []

    async def client(port, base):
        for n in range(40):
            wait = ask(port, base + n)
            if n % 5 == 1:
                del wait
                continue
            assert (await wait)["y"][0, 0] == base + n

    async def main(port, base):
        clients = asyncio.gather(*(client(port, base + 100 * n) for n in range(4)))
        while not clients.done():
            port.pump()
            await asyncio.sleep(0.001)
        await clients

    def thread(port, base):
        try:
            run(main(port, base))
        except BaseException as error:
            errors.append(error)

    with rig() as r:
        port = r.port(r.lane(2, mode).bucket(), r.lane(1, mode).bucket())
        threads = [threading.Thread(target=thread, args=(port, 1000 * n)) for n in range(2)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert not errors
        assert at_rest(port)
        assert port.hits == 320


@RUNNERS
def test_failure_at_completion_reaches_every_awaiter(run):
    async def client(port):
        with pytest.raises(FailedError) as caught:
            await ask(port)
        return caught.value.status

    async def main(r, lane, port):
        gate = lane.hold()
        tasks = [asyncio.ensure_future(client(port)) for _ in range(5)]
        await asyncio.sleep(0)
        r.fault("cuEventQuery", LAUNCH_FAILED, lose=True)
        gate.open()
        assert set(await asyncio.gather(*tasks)) == {LAUNCH_FAILED}

    with rig(sound=False) as r:
        lane = r.lane(2)
        port = r.port(lane.bucket())
        run(main(r, lane, port))
        assert at_rest(port)
        assert port.failed == 5


@RUNNERS
def test_queued_task_is_told_of_failure_from_another_thread(run):
    async def client(port):
        with pytest.raises(RefusedError):
            await ask(port)

    async def main(lane, port):
        lane.hold()
        keep = ask(port)
        task = asyncio.ensure_future(client(port))
        await asyncio.sleep(0)
        thread = threading.Thread(target=port.fail_queued, args=(RefusedError("closing"),))
        thread.start()
        await task
        thread.join()
        keep.cancel()

    with rig() as r:
        lane = r.lane(1)
        port = r.port(lane.bucket())
        run(main(lane, port))
        assert at_rest(port)


@RUNNERS
def test_cancel_by_hand_ends_the_task_that_awaits(run):
    async def main(lane, port):
        lane.hold()
        wait = ask(port)

        async def client():
            with pytest.raises(RuntimeError, match="cancelled"):
                await wait

        task = asyncio.ensure_future(client())
        await asyncio.sleep(0)
        wait.cancel()
        await task

    with rig() as r:
        lane = r.lane(1, BALANCED)
        port = r.port(lane.bucket())
        run(main(lane, port))
        assert at_rest(port)


def test_one_awaiter_and_one_result():
    async def main(port):
        wait = ask(port)
        assert await wait
        with pytest.raises(RuntimeError, match="taken already"):
            wait.result()
        with pytest.raises(RuntimeError, match="awaited already"):
            await wait
        assert wait.launched_ns <= wait.completed_ns

    with rig() as r:
        port = r.port(r.lane(1).bucket())
        asyncio.run(main(port))


def test_by_hand_send_throw_close():
    async def main(lane, port):
        lane.hold()
        wait = ask(port)
        with pytest.raises(RuntimeError, match="not done"):
            wait.result()
        assert wait.__await__() is wait
        future = wait.send(None)
        assert future._asyncio_future_blocking
        assert wait.send(None) is future
        with pytest.raises(KeyError, match="why"):
            wait.throw(KeyError("why"))
        with pytest.raises(RuntimeError, match="cancelled"):
            wait.send(None)
        for way in ((ValueError,), (ValueError, "text"), (ValueError, ValueError("x"), None)):
            with pytest.raises(ValueError):
                ask(port).throw(*way)
        with pytest.raises(TypeError):
            ask(port).throw(3)
        ask(port).close()

    with rig() as r:
        lane = r.lane(1, BALANCED)
        port = r.port(lane.bucket())
        asyncio.run(main(lane, port))
        assert at_rest(port)
        assert port.cancelled == 6


def test_place_is_awaited():
    async def main(port):
        place = await port.acquire(((1, 4),), current_hub())
        queued = port.acquire(((1, 4),), current_hub())
        place.inputs[0][:] = 3
        assert (await place.submit(current_hub(), False))["y"] is place.outputs[0]

        async def release():
            place.release()

        task = asyncio.ensure_future(release())
        other = await queued
        assert other.slot == place.slot
        await task

    with rig() as r:
        port = r.port(r.lane(1).bucket())
        asyncio.run(main(port))
        assert at_rest(port)
        assert port.hits == 1


def test_cycle_of_wait_future_and_task_is_collected():
    async def client(port):
        me: Any = asyncio.current_task()
        me._log_destroy_pending = False
        await ask(port)
        return me

    async def main(port):
        tasks = [asyncio.ensure_future(client(port)) for _ in range(3)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        del tasks[:]

    with rig() as r:
        lane = r.lane(1, BALANCED)
        lane.hold()
        port = r.port(lane.bucket())
        loop = asyncio.new_event_loop()
        loop.run_until_complete(main(port))
        loop.close()
        del loop
        gc.collect()
        assert port.cancelled == 3
        assert at_rest(port)


def test_block_times_out_and_goes_on():
    with rig() as r:
        lane = r.lane(1)
        port = r.port(lane.bucket())
        gate = lane.hold()
        first, second = submit(port), submit(port, 2)
        assert not first.block(1000)
        assert not second.block(1000)
        with pytest.raises(ValueError, match="timeout_ns"):
            first.block(-1)
        first.cancel()
        threading.Timer(0.005, gate.open).start()
        assert second.block(FOREVER_NS)
        assert second.result()["y"][0, 0] == 2
        assert at_rest(port)


def test_blocked_thread_sees_its_wait_cancelled():
    with rig() as r:
        lane = r.lane(1)
        port = r.port(lane.bucket())
        lane.hold()
        first, second = submit(port), submit(port)
        threads = [threading.Thread(target=wait.block, args=(PATIENCE_NS,)) for wait in (first, second)]
        for thread in threads:
            thread.start()
        second.cancel()
        threads[1].join()
        r.gates[0].open()
        threads[0].join()
        assert first.done
        first.cancel()
        assert at_rest(port)


def test_signal_interrupts_a_blocked_thread():
    with rig() as r:
        lane = r.lane(1)
        port = r.port(lane.bucket())
        lane.hold()
        wait = submit(port)
        timer = threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            timer.start()  # in here: the signal may come before this thread blocks
            wait.block(FOREVER_NS)
        timer.join()
        wait.cancel()


def test_forked_child_refuses_and_touches_nothing():
    async def child(wait):
        await wait

    with rig() as r:
        lane = r.lane(1)
        port = r.port(lane.bucket())
        lane.hold()
        wait = submit(port)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                for call in (lambda: submit(port), lambda: wait.block(0)):
                    try:
                        call()
                    except RefusedError:
                        continue
                    os._exit(2)
                port.pump()
                del wait
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        r.gates[0].open()
        assert wait.block(PATIENCE_NS)
        wait.result()
        assert at_rest(port)
