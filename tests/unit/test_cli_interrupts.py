"""Ctrl-C while a command's coroutine runs: it cancels, and interrupts nothing that was about to save something."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

from trtx_py._aio import run_shielded
from trtx_py.cli._session import run_async


def press() -> None:
    """Ctrl-C, at this very line."""
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(autouse=True)
def _handler() -> None:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("presses", [1, 2])
def test_what_was_begun_at_the_first_is_done_after_the_second(presses: int) -> None:
    done = list[str]()

    def save() -> None:
        time.sleep(0.01)
        done.append("saved")

    async def work() -> None:
        try:
            press()
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            if presses == 2:
                press()
            await run_shielded(save)
            done.append("told")
            raise

    with pytest.raises(KeyboardInterrupt):
        run_async(work())
    assert done == (["saved", "told"] if presses == 1 else ["saved"])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_it_wakes_a_loop_that_waits() -> None:
    async def work() -> None:
        threading.Timer(0.05, press).start()
        await asyncio.sleep(60)

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_async(work())
    assert time.monotonic() - begun < 30


def test_in_the_last_step() -> None:
    """Also where nothing is awaited any more."""

    async def work() -> None:
        press()

    with pytest.raises(KeyboardInterrupt):
        run_async(work())


def test_the_third_ends_what_does_not_listen() -> None:
    async def work() -> None:
        press()
        press()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.sleep(60)
        press()
        pytest.fail("not interrupted")

    with pytest.raises(KeyboardInterrupt):
        run_async(work())


@pytest.mark.parametrize("raised", [ValueError, asyncio.CancelledError])
def test_what_is_raised_without_it_is_not_changed(raised: type[BaseException]) -> None:
    async def work() -> None:
        raise raised

    with pytest.raises(raised):
        run_async(work())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_results_and_handlers_of_others() -> None:
    async def work(result: Callable[[], object]) -> object:
        return result()

    assert run_async(work(lambda: 3)) == 3
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert run_async(work(lambda: signal.getsignal(signal.SIGINT))) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
