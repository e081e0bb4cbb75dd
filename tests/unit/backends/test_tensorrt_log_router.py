from __future__ import annotations

import logging
import threading

import pytest

from trtx_py._types import Severity
from trtx_py.backends.tensorrt._log_router import LogRouter


class Sink:
    def __init__(self) -> None:
        self.lines: list[tuple[Severity, str]] = []

    def log(self, severity: Severity, line: str) -> None:
        self.lines.append((severity, line))

    @property
    def texts(self) -> list[str]:
        return [line for _, line in self.lines]


def in_thread(work: object) -> None:
    assert callable(work)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)


def test_lines_go_to_the_operation_of_the_calling_thread() -> None:
    router, one, two = LogRouter(), Sink(), Sink()
    router.open(one.log)
    router.open(two.log)
    with router.operation(one.log) as outer:
        router.emit(1, "for one")
        with router.operation(two.log) as inner:
            router.emit(3, "for two")
        router.emit(2, "for one again")
    assert (one.texts, two.texts) == (["for one", "for one again"], ["for two"])
    assert outer.lines == ["for one", "for one again"]
    assert inner.lines == []
    assert one.lines[0][0] is Severity.ERROR


def test_two_threads_keep_their_lines_apart() -> None:
    router, one, two = LogRouter(), Sink(), Sink()
    both = threading.Barrier(2, timeout=10)

    def work(sink: Sink, text: str) -> None:
        with router.operation(sink.log) as operation:
            both.wait()
            router.emit(1, text)
            both.wait()
        assert operation.lines == [text]

    other = threading.Thread(target=work, args=(two, "two"))
    other.start()
    work(one, "one")
    other.join(10)
    assert (one.texts, two.texts) == (["one"], ["two"])


def test_lines_of_other_threads_go_to_every_open_sink_once() -> None:
    router, one, two, closed = LogRouter(), Sink(), Sink(), Sink()
    for sink in (one, one, two, closed):
        router.open(sink.log)
    router.close(closed.log)
    router.emit(1, "nobody's")
    router.close(one.log)  # still open once
    assert (one.texts, two.texts, closed.texts) == (["nobody's"], ["nobody's"], [])
    router.emit(1, "again")
    router.close(one.log)
    router.close(one.log)  # once too often
    router.emit(1, "later")
    assert (one.texts, two.texts) == (["nobody's", "again"], ["nobody's", "again", "later"])


def test_worker_threads_lines_reach_the_only_operation() -> None:
    router, sink = LogRouter(), Sink()
    router.open(sink.log)
    with router.operation(sink.log) as operation:
        in_thread(lambda: router.emit(1, "from a worker"))
        in_thread(lambda: router.emit(3, "chatter"))
    assert operation.lines == ["from a worker"]
    with router.operation(sink.log) as first, router.operation(sink.log) as second:
        in_thread(lambda: router.emit(1, "whose?"))
    assert first.lines == second.lines == []
    assert sink.texts == ["from a worker", "chatter", "whose?"]


def test_a_sink_that_fails_is_reported_and_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    router, good = LogRouter(), Sink()

    def broken(severity: Severity, line: str) -> None:
        raise ZeroDivisionError("in the sink")

    router.open(broken)
    router.open(good.log)
    with caplog.at_level(logging.ERROR, "trtx_py"):
        router.emit(1, "line")
        with router.operation(broken) as operation:
            router.emit(1, "kept")
    assert good.texts == ["line"]
    assert operation.lines == ["kept"]
    assert len(caplog.records) == 2


def test_interrupt_in_a_sink_is_raised_when_the_call_is_over() -> None:
    router = LogRouter()

    def interrupted(severity: Severity, line: str) -> None:
        raise KeyboardInterrupt

    went_on = []

    def work() -> None:
        with router.operation(interrupted):
            router.emit(1, "line")
            went_on.append(True)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert went_on


def test_severities_out_of_range_are_clamped() -> None:
    router, sink = LogRouter(), Sink()
    router.open(sink.log)
    router.emit(-3, "worst")
    router.emit(17, "least")
    assert [severity for severity, _ in sink.lines] == [Severity.INTERNAL_ERROR, Severity.VERBOSE]
