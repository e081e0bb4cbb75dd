"""Logger: where lines go, and that nothing about logging can break what is being logged."""

from __future__ import annotations

import gc
import io
import logging
import os
import pty
import re
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest

import trtx_py as trtx
from mock_backend import MockBackend, fail
from tests.unit.ownership import PROFILE, matmul_model

S = trtx.Severity


def test_default_goes_to_logging_by_level(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "trtx_py.tensorrt"), trtx.Logger(S.VERBOSE) as logger:
        logger.verbose("a")
        logger.info("b")
        logger.warning("c")
        logger.error("d")
        logger.log(S.INTERNAL_ERROR, "e 100%\n")
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("DEBUG", "a"), ("INFO", "b"), ("WARNING", "c"), ("ERROR", "d"), ("CRITICAL", "e 100%"),
    ]  # fmt: skip
    assert {r.name for r in caplog.records} == {"trtx_py.tensorrt"}


def test_severity_may_change_at_any_time() -> None:
    lines: list[Any] = []
    with trtx.Logger(S.ERROR, lambda severity, line: lines.append((severity, line))) as logger:
        logger.warning("dropped")
        logger.severity = S.WARNING
        assert logger.severity is S.WARNING
        logger.warning("kept")
        logger.info("dropped")
    assert lines == [(S.WARNING, "kept")]


def test_logging_handler_gets_records_directly(caplog: pytest.LogCaptureFixture) -> None:
    class Recording(logging.Handler):
        def __init__(self) -> None:
            super().__init__(logging.WARNING)
            self.records: list[logging.LogRecord] = []

        def emit(self, record: logging.LogRecord) -> None:
            self.records.append(record)

    handler = Recording()
    with caplog.at_level(logging.DEBUG), trtx.Logger(S.INFO, handler, name="mine") as logger:
        logger.info("below the handler's level")
        logger.error("above")
    assert [(r.name, r.levelno, r.getMessage()) for r in handler.records] == [("mine", logging.ERROR, "above")]
    assert caplog.records == []


def test_broken_handler_is_reported_once_and_breaks_nothing(
    caplog: pytest.LogCaptureFixture, mock_backend: MockBackend
) -> None:
    def broken(severity: trtx.Severity, line: str) -> None:
        raise RuntimeError("handler broke")

    with trtx.Logger(S.VERBOSE, broken) as logger:
        with trtx.Builder(logger, mock_backend) as builder, builder.create_network() as network:
            network.parse_onnx(matmul_model())
        for _ in range(5):
            logger.error("line")
    reports = [r for r in caplog.records if "said once" in r.getMessage()]
    assert len(reports) == 1
    assert "log handler of Logger#" in reports[0].getMessage()


def test_file_has_milliseconds_and_is_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "trt.log"
    for number in range(2):
        with trtx.Logger(S.INFO, lambda *_: None, file=path) as logger:
            logger.warning(f"line {number} é")
            logger.verbose("dropped")
        logger.error("after close: dropped from the file, and no error")
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2
    for number, line in enumerate(lines):
        assert re.fullmatch(rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{{3}} WARNING +line {number} é", line)


def test_file_that_cannot_be_opened(tmp_path: Path) -> None:
    for path in (tmp_path / "missing" / "x.log", tmp_path):
        with pytest.raises(trtx.InvalidArgumentError, match="cannot be opened for appending"):
            trtx.Logger(file=path)
    assert trtx.live_objects() == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_does_not_silence_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    console, lines = io.StringIO(), []
    logger = trtx.Logger(S.INFO, lambda _, line: lines.append(line), file="/dev/full", console=console)
    logger.error("one")
    logger.error("two")
    assert lines == ["one", "two"]
    assert console.getvalue().count("\n") == 2
    assert caplog.text.count("the log file of Logger#") == 1
    with pytest.raises(OSError, match="No space"):
        logger.close()  # what was not written cannot be written now either; the logger is closed all the same
    assert logger.closed


def on_terminal(severity: trtx.Severity) -> str:
    """What a logger writes to a terminal for one line."""
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as stream:
        with trtx.Logger(S.VERBOSE, lambda *_: None, console=stream) as logger:
            logger.log(severity, "line")
        stream.flush()
        text = os.read(leader, 4096).decode()
    os.close(leader)
    return text


def test_colour_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert re.fullmatch(r"\x1b\[31m.* ERROR +line\x1b\[0m\r\n", on_terminal(S.ERROR))
    assert "\x1b" not in on_terminal(S.INFO)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in on_terminal(S.ERROR)
    monkeypatch.delenv("NO_COLOR")
    stream = io.StringIO()
    with trtx.Logger(handler=lambda *_: None, console=stream) as logger:
        logger.error("line")
    assert re.fullmatch(r"\S+ \S+ ERROR +line\n", stream.getvalue())


def test_console_true_is_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with trtx.Logger(handler=lambda *_: None, console=True) as logger:
        logger.info("line")
    captured = capsys.readouterr()
    assert captured.err.endswith("line\n")
    assert captured.out == ""


def test_many_threads_lose_and_mix_nothing(tmp_path: Path) -> None:
    lines: list[str] = []
    path = tmp_path / "trt.log"
    with trtx.Logger(S.INFO, lambda _, line: lines.append(line), file=path) as logger:

        def work(number: int) -> None:
            for step in range(200):
                logger.info(f"{number}-{step}")

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    wanted = sorted(f"{n}-{step}" for n in range(8) for step in range(200))
    assert sorted(lines) == wanted
    assert sorted(line.split()[-1] for line in path.read_text().splitlines()) == wanted


@pytest.mark.parametrize("arguments", [{"severity": "loud"}, {"severity": 9}, {"handler": 5}])
def test_arguments_that_cannot_be(arguments: dict[str, Any]) -> None:
    with pytest.raises(trtx.InvalidArgumentError, match="expected"):
        trtx.Logger(**arguments)
    with trtx.Logger() as logger, pytest.raises(trtx.InvalidArgumentError, match=r"Severity\.WARNING"):
        logger.severity = "loud"  # type: ignore[assignment]


def test_exceptions_carry_the_lines_of_their_call() -> None:
    backend = MockBackend(faults=[fail("build_serialized_network")])
    with trtx.Logger(S.INTERNAL_ERROR, lambda *_: None) as logger, trtx.Builder(logger, backend) as builder:
        logger.error("before: belongs to nobody")
        with builder.create_network() as network, builder.create_config() as config:
            network.parse_onnx(matmul_model())
            with builder.create_optimization_profile() as profile:
                profile.set_shape("x", *PROFILE["x"])
                config.add_optimization_profile(profile)
            with pytest.raises(trtx.BuilderError) as caught:
                builder.build_serialized_network_sync(network, config)
    assert len(caught.value.tensorrt_log) == 1
    assert "fault injected" in caught.value.tensorrt_log[0]
    assert "TensorRT said:" in str(caught.value)
    backend.assert_clean()


def test_attaching_blocks() -> None:
    """Lines go to the innermost block of their thread; those of a foreign thread to every open one."""
    with trtx.Logger(handler=lambda *_: None) as logger:
        outer_error, inner_error = trtx.TrtxError("outer"), trtx.TrtxError("inner")
        with pytest.raises(trtx.TrtxError), logger.attaching():  # noqa: PT012 - the block is the point
            with pytest.raises(trtx.TrtxError), logger.attaching():  # noqa: PT012 - the block is the point
                logger.warning("one")
                foreign = threading.Thread(target=logger.error, args=("foreign",))
                foreign.start()
                foreign.join()
                logger.info("not severe enough")
                raise inner_error
            with logger.attaching():  # equal to the outer block in all but identity
                pass
            logger.error("two")
            raise outer_error
        assert inner_error.tensorrt_log == ("one", "foreign")
        assert outer_error.tensorrt_log == ("foreign", "two")
        with logger.attaching():
            pass
        assert logger._collectors == []


def test_blocks_that_look_alike_are_told_apart() -> None:
    with trtx.Logger(handler=lambda *_: None) as logger:
        error = trtx.TrtxError("outer")
        with pytest.raises(trtx.TrtxError), logger.attaching():  # noqa: PT012 - the block is the point
            with logger.attaching():
                pass
            logger.error("line")
            raise error
        assert error.tensorrt_log == ("line",)


def test_long_logs_keep_their_end() -> None:
    with trtx.Logger(handler=lambda *_: None) as logger:
        error = trtx.TrtxError("outer")
        with pytest.raises(trtx.TrtxError), logger.attaching():  # noqa: PT012 - the block is the point
            for number in range(1000):
                logger.error(str(number))
            raise error
    assert error.tensorrt_log[-1] == "999"
    assert len(error.tensorrt_log) == 50


def test_default_logger_is_nobodys(mock_backend: MockBackend) -> None:
    with trtx.Builder(None, mock_backend):
        assert [item.kind for item in trtx.live_objects()] == ["Builder", "Device"]
    with pytest.raises(trtx.InvalidArgumentError, match="Logger or None"):
        trtx.Builder(logging.getLogger(), mock_backend)  # type: ignore[arg-type]


def test_handler_that_holds_the_application_does_not_keep_it_alive(mock_backend: MockBackend) -> None:
    """Native code logs through a weak reference: else its owner's handle would keep the whole application."""

    class Application:
        def __init__(self) -> None:
            self.logger = trtx.Logger(handler=self.on_line)
            self.builder = trtx.Builder(self.logger, mock_backend)

        def on_line(self, severity: trtx.Severity, line: str) -> None:
            """Never called here."""

    application = Application()
    seen = weakref.ref(application)
    application.builder.close()
    application.builder = trtx.Builder(application.logger, mock_backend)
    builder_handle = application.builder._handle
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        del application
        gc.collect()
        trtx.live_objects()
        gc.collect()
        assert trtx.live_objects() == []
    assert seen() is None
    assert builder_handle.state.value == "closed"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"file": "a\0b"}, "null character"), ({"file": 1}, "log file is int"), ({"file": b"x"}, "log file is bytes"),
        ({"file": True}, "log file is bool"), ({"console": 5}, "console is 5"), ({"console": "x"}, "console is 'x'"),
        ({"name": 5}, "name is 5"),
    ],
    ids=str,
)  # fmt: skip
def test_destinations_that_are_none(options: dict[str, Any], words: str) -> None:
    with pytest.raises(trtx.InvalidArgumentError, match=words):
        trtx.Logger(**options)
    os.fstat(1)  # nobody took over, and closed, the caller's descriptor


def test_a_console_that_only_writes() -> None:
    class Sink:
        text = ""

        def write(self, text: str) -> None:
            self.text += text

    sink: Any = Sink()
    with trtx.Logger(console=sink) as logger:
        logger.info("hello")
    assert sink.text.endswith("INFO           hello\n")


class _Mute:
    def __str__(self) -> str:
        raise RuntimeError("no")


def test_log_takes_anything() -> None:
    lines: list[Any] = []
    anything: Any
    with trtx.Logger(S.VERBOSE, lambda severity, line: lines.append((severity, line))) as logger:
        for anything in (3, None, "loud", 99):
            logger.log(anything, "x")
        for anything in (5, None, b"b", _Mute()):
            logger.info(anything)
    assert lines[:4] == [(S.INFO, "x"), (S.ERROR, "x"), (S.ERROR, "x"), (S.ERROR, "x")]
    assert [line for _, line in lines[4:]] == [
        "5", "None", "b'b'", "(a _Mute whose text cannot be had: RuntimeError)",
    ]  # fmt: skip


def test_every_line_of_the_file_has_the_time(tmp_path: Path) -> None:
    path = tmp_path / "t.log"
    with trtx.Logger(file=path) as logger:
        logger.warning("one\ntwo\n\nthree\n")
        logger.info("")
    found = path.read_text().splitlines()
    assert [line[24:].split() for line in found] == [
        ["WARNING", "one"], ["WARNING", "two"], ["WARNING"], ["WARNING", "three"], ["INFO"],
    ]  # fmt: skip
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} ", line) for line in found)
