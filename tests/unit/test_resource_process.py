"""The end of the process, and its forks."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PRELUDE = """
import asyncio, gc, os, sys, threading, warnings
import trtx_py as trtx
from mock_backend import MockBackend, slow
from tests.unit.ownership import SAMPLE, grow_tree, record_destruction, shared_plan
backend = MockBackend()
"""


def run(script: str, *options: str) -> str:
    """Standard output of a script that must end with status 0 and nothing on standard error."""
    done = subprocess.run(
        [sys.executable, *options, "-c", PRELUDE + textwrap.dedent(script)],
        capture_output=True, text=True, timeout=120, check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def test_exit_with_everything_open_destroys_in_order() -> None:
    out = run(
        """
        import mock_backend._seam as seam
        destroy = seam.LiveObject.destroy
        seam.LiveObject.destroy = lambda self: (destroy(self), print(self.kind, flush=True))[0]
        tree = grow_tree(backend)
        tree.engine.infer_sync({"x": SAMPLE})
        tree.context.set_tensor_address("x", tree.buffer)  # lent from a tree that is younger than the one it serves
        release = backend.driver.cuMemFree
        backend.driver.cuMemFree = lambda address: (release(address), print("cuMemFree", flush=True))[0]
        print("exit", flush=True)
        """
    )
    lines = out[out.index("exit\n") :].split("\n")
    assert lines.index("execution context") < lines.index("engine") < lines.index("runtime")
    assert lines.index("network") < lines.index("builder")
    assert lines[-2] == "cuMemFree"  # the lent buffer, whose tree waits for the borrower's


def test_exit_with_requests_in_flight() -> None:
    assert run(
        """
        runtime = trtx.Runtime(None, MockBackend(faults=[slow(seconds=0.05)]))
        engine = runtime.deserialize_sync(shared_plan())
        for _ in range(3):
            threading.Thread(target=engine.infer_sync, args=({"x": SAMPLE},), daemon=True).start()
        while (counts := engine.statistics()).running + counts.waiting + counts.completed < 3:
            pass  # all were accepted: one that comes later gets a ClosedError
        print("end")
        """
    ) == "end\n"  # fmt: skip


def test_exit_inside_a_running_loop() -> None:
    assert run(
        """
        async def main():
            async with trtx.open_engine(shared_plan(), backend) as engine:
                await engine.infer({"x": SAMPLE})
                print("end")
                sys.exit(0)
        asyncio.run(main())
        """
    ) == "end\n"  # fmt: skip


def test_exit_with_collected_objects_on_the_queue() -> None:
    run("trtx.Device(0, backend=backend).create_stream(); del backend")


def test_exit_with_warnings_as_errors() -> None:
    run("tree = grow_tree(backend)", "-W", "error")


def test_fork() -> None:
    out = run(
        """
        tree = grow_tree(backend)
        tree.engine.infer_sync({"x": SAMPLE})
        before = backend.calls
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            assert trtx.live_objects() == []
            for name, item in tree.objects().items():
                assert item.closed, name
                item.close()
                asyncio.run(item.aclose())
                try:
                    with item:
                        raise AssertionError(name)
                except trtx.ClosedError as error:
                    assert "forked" in str(error), error
            attempts = [
                lambda: tree.engine.infer_sync({"x": SAMPLE}), lambda: asyncio.run(tree.engine.infer({"x": SAMPLE})),
                tree.engine.statistics, tree.engine.create_execution_context, tree.device.create_stream,
                tree.device.memory_statistics, tree.builder.create_network, tree.stream.synchronize,
                lambda: tree.buffer.address, lambda: tree.runtime.deserialize_sync(shared_plan()),
            ]
            for attempt in attempts:
                try:
                    attempt()
                except trtx.ClosedError as error:
                    assert "forked" in str(error), error
                else:
                    raise AssertionError("the child used what belongs to its parent")
            with trtx.Logger() as logger:  # what needs no driver of the parent's works
                assert [item.kind for item in trtx.live_objects()] == ["Logger"]
            tree = attempts = item = attempt = None
            gc.collect()
            assert trtx.live_objects() == []
            assert backend.calls == before, backend.calls - before
            import atexit
            atexit._run_exitfuncs()
            assert backend.calls == before, "the exit of the child touched the driver"
            print("child", flush=True)
            os._exit(7)  # not sys.exit: ONNX Runtime, which the mock computes with, cannot be torn down after a fork
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print("status", status)
        tree.engine.infer_sync({"x": SAMPLE})
        assert len(trtx.live_objects()) == 16
        tree.close()
        assert trtx.live_objects() == []
        backend.assert_clean()
        """,
        "-W", "error", "-W", "ignore:This process:DeprecationWarning",
    )  # fmt: skip
    assert out == "child\nstatus 7\n"


def test_fork_while_a_lock_is_held() -> None:
    """The child gets locks of its own: another thread's, taken at the moment of the fork, would never be released."""
    out = run(
        """
        from trtx_py._resource import _process
        device = trtx.Device(0, backend=backend)
        taken, go_on = threading.Event(), threading.Event()
        def hold():
            with _process.lock:
                taken.set()
                go_on.wait()
        thread = threading.Thread(target=hold)
        thread.start()
        taken.wait()
        child = os.fork()
        if child == 0:
            assert device.closed and trtx.live_objects() == []
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        go_on.set()
        thread.join()
        device.close()
        print("end")
        """,
        "-W", "ignore:This process:DeprecationWarning",
    )  # fmt: skip
    assert out == "end\n"
