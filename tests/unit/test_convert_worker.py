"""Converters in processes of their own: what they say, how they fail, and that nothing of them stays behind."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import numpy as np
import onnx
import pytest

import trtx_py as trtx
from tests.unit import fake_converters
from trtx_py.convert import _pipeline, _process

HERE = Path(__file__).parent
QUICK: dict[str, Any] = {"import_path": HERE, "simplify": False, "target": "mock"}

Registered = Callable[[str], Path]


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Registered]:
    """Registers a converter of fake_converters for .fake files, and gives one."""

    def register(function: str) -> Path:
        trtx.convert.register("fake", f"fake_converters:{function}", suffixes=(".fake",))
        path = tmp_path / "model.fake"
        path.write_text('{"factor": 3}')
        return path

    yield register
    trtx.convert.unregister("fake")


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary folders go; none is left at the end."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


def is_gone(pid: int) -> bool:
    """Ended, or a zombie that init has not looked at yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def assert_ends(pid: int) -> None:
    """SIGKILL was sent; the process is gone as soon as the kernel has seen to it."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([fd], [], [], 10)[0], f"process {pid} still runs"
    finally:
        os.close(fd)
    assert is_gone(pid)


def assert_missing(*paths: str | Path) -> None:
    assert [str(path) for path in paths if os.path.exists(path)] == []


async def test_a_converter_of_ones_own(fake: Registered) -> None:
    events: list[trtx.ConversionProgress] = []
    made = await trtx.convert(fake("good"), inputs={"x": (2, 4)}, progress=events.append, **QUICK)
    assert made.path is None
    assert made.model == made.source
    report = made.report
    assert (report.format, report.producer, report.opset) == ("fake", "fake 1.0", 17)
    assert "made by a test" in report.notes
    assert report.comparison is not None
    assert report.comparison.samples == 1
    assert [output.name for output in report.comparison.outputs] == ["y"]
    assert report.operators is not None
    assert report.operators.supported
    assert "scaling" in [event.text for event in events]
    assert [step.name for step in report.steps][-2:] == ["compare", "check operators"]
    assert all(a.elapsed_s <= b.elapsed_s for a, b in itertools.pairwise(events))
    async with trtx.open_engine(made.source, backend="mock") as engine:
        x = np.ones((3, 4), np.float32)
        np.testing.assert_array_equal((await engine.infer({"x": x}))["y"], 3 * x)


def test_synchronous_twin(fake: Registered, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    made = trtx.convert.sync(fake("good"), inputs={"x": np.ones((2, 4), np.float32)}, output=out, **QUICK)
    assert made.model is None
    assert made.source == made.path == str(out)
    onnx.checker.check_model(str(out))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.fake", "out.onnx", "scratch"]


def test_the_worker_is_told_everything(fake: Registered) -> None:
    made = trtx.convert.sync(fake("describe"), opset=18, options={"a": [1]}, trust=True, **QUICK)
    assert json.loads(made.report.notes[0]) == ["fake", 18, {"a": [1]}, True, ""]
    assert made.report.comparison is not None
    assert any("not with the source" in note for note in made.report.notes)


def test_another_interpreter(fake: Registered, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text(f'#!/bin/sh\nCUDA_VISIBLE_DEVICES=other exec {sys.executable} "$@"\n')
    other.chmod(0o755)
    made = trtx.convert.sync(fake("describe"), python=other, **QUICK)
    assert json.loads(made.report.notes[0])[-1] == "other"
    with pytest.raises(trtx.InvalidArgumentError, match="expected the path of a Python interpreter"):
        trtx.convert.sync(fake("describe"), python=tmp_path / "none", **QUICK)
    broken = tmp_path / "python-broken"
    broken.write_text("no program\n")
    broken.chmod(0o755)
    with pytest.raises(trtx.InvalidArgumentError, match="cannot be started"):
        trtx.convert.sync(fake("describe"), python=broken, **QUICK)
    broken.write_text("#!/bin/sh\necho this is no Python; exit 2\n")
    with pytest.raises(trtx.ConversionError, match="status 2 and without a result") as caught:
        trtx.convert.sync(fake("describe"), python=broken, **QUICK)
    assert "this is no Python" in caught.value.log_tail


@pytest.mark.parametrize(
    ("function", "cause", "texts"),
    [
        ("crash", "crashed", ["SIGSEGV", "segment 7 of 9"]),
        ("out_of_memory", "killed", ["SIGKILL", "memory"]),
        ("no_memory", "memory", ["memory ran out"]),
        ("leave", "crashed", ["status 3"]),
        ("fail", "failed", ["ValueError: layer 4 is unknown", "loaded 3 layers", "model.fake"]),
        ("exit_politely", "failed", ["usage: convert FILE"]),
        ("nothing", "failed", ["wrote no model"]),
        ("full_disk", "disk", ["No space left on device", "TMPDIR"]),
        ("full_disk_inside", "disk", ["No space left on device"]),
        ("no_room_at_all", "disk", ["TMPDIR", "File too large"]),
        ("wrong", "differs", ["off by up to", "'y'", "tolerance"]),
        ("no_such_function", "failed", ["no_such_function"]),
    ],
)
def test_failures(fake: Registered, function: str, cause: str, texts: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    with pytest.raises(trtx.ConversionError) as caught:
        trtx.convert.sync(fake(function), inputs={"x": (2, 4)}, output=out, **QUICK)
    assert caught.value.cause == cause
    assert caught.value.format == "fake"
    assert [text for text in texts if text not in str(caught.value)] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.fake", "scratch"]


def test_what_a_converter_tells_need_not_be_text(fake: Registered) -> None:
    report = trtx.convert.sync(fake("strange_words"), compare=False, **QUICK).report
    assert report.producer == "7"
    assert "made in" in report.notes[0]


def test_who_lives_on_and_talks_keeps_nobody_waiting(fake: Registered, monkeypatch: pytest.MonkeyPatch) -> None:
    end = _process._Worker.end

    def end_in_chatter(worker: Any) -> None:
        reads = itertools.count()

        def read() -> bool:
            assert next(reads) < 1000  # a process in a session of its own fills the pipe faster than we read
            return True

        worker._read_output = read
        end(worker)

    monkeypatch.setattr(_process._Worker, "end", end_in_chatter)
    assert trtx.convert.sync(fake("good"), compare=False, **QUICK).model


def test_traceback_and_the_end_of_much_output(fake: Registered) -> None:
    with pytest.raises(trtx.ConversionError) as caught:
        trtx.convert.sync(fake("chatter"), **QUICK)
    assert "in chatter" in caught.value.details
    assert "line 19999" in caught.value.log_tail
    assert len(caught.value.log_tail) <= 16 << 10
    assert len(str(caught.value).splitlines()) < 20


def test_a_missing_package_names_its_extra(tmp_path: Path) -> None:
    # Modules that are found first and say that they are not there: torch may be installed where this runs.
    (tmp_path / "hidden").mkdir()
    for package in ("torch", "tensorflow"):
        (tmp_path / "hidden" / f"{package}.py").write_text(
            f"raise ModuleNotFoundError(\"No module named '{package}'\", name='{package}')\n"
        )
    from tests.unit.test_convert_formats import CONTENT

    for kind, extra in (("torch-pickle", "torch"), ("tflite", "tensorflow")):
        with pytest.raises(trtx.ConversionError) as caught:
            trtx.convert.sync(CONTENT[kind], import_path=tmp_path / "hidden", target="mock")
        assert caught.value.cause == "missing"
        assert f"trtx-py[{extra}]" in str(caught.value)
        assert "python=" in str(caught.value)


def test_a_timeout_ends_the_whole_group(fake: Registered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pids, ahead = tmp_path / "pids", [0.0]

    def progress(event: trtx.ConversionProgress) -> None:
        if event.text == "hanging":
            ahead[0] = 60 - event.elapsed_s - 0.2

    monkeypatch.setattr(_process, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + ahead[0]))
    with pytest.raises(trtx.ConversionError, match="longer than 60 s") as caught:
        trtx.convert.sync(fake("hang"), options={"pids": str(pids)}, timeout_s=60, progress=progress, **QUICK)
    assert caught.value.cause == "timeout"
    assert "about to hang" in caught.value.log_tail
    *processes, folder = json.loads(pids.read_text())
    for pid in processes:
        assert_ends(pid)
    assert not Path(folder).exists()


async def test_cancellation_ends_the_whole_group(fake: Registered, tmp_path: Path) -> None:
    pids, hanging = tmp_path / "pids", asyncio.Event()
    loop = asyncio.get_running_loop()

    def progress(event: trtx.ConversionProgress) -> None:
        if event.text == "hanging":
            loop.call_soon_threadsafe(hanging.set)

    out = tmp_path / "out.onnx"
    task = asyncio.create_task(
        trtx.convert(fake("hang"), options={"pids": str(pids)}, progress=progress, output=out, **QUICK)
    )
    with anyio.fail_after(60):
        await hanging.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    *processes, folder = json.loads(pids.read_text())
    for pid in processes:
        assert_ends(pid)
    assert_missing(folder, out)


async def test_cancellation_between_workers_writes_nothing(
    fake: Registered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checking, cancelled = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def check(*arguments: Any) -> None:
        loop.call_soon_threadsafe(checking.set)
        assert cancelled.wait(30)

    monkeypatch.setattr(_pipeline._Conversion, "_check_operators", check)
    out = tmp_path / "out.onnx"
    task = asyncio.create_task(trtx.convert(fake("good"), compare=False, output=out, **QUICK))
    with anyio.fail_after(60):
        await checking.wait()
        task.cancel()
        await anyio.lowlevel.checkpoint()  # the task learns of it
        cancelled.set()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert_missing(out)


def test_modules_of_the_current_folder_come_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "onnx.py").write_text("raise SystemExit('not the package')\n")
    (tmp_path / "of_the_folder.py").write_text("from fake_converters import good as convert\n")
    source = tmp_path / "model.local"
    source.write_text('{"factor": 3}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    trtx.convert.register("local", "of_the_folder:convert", suffixes=(".local",))
    try:
        report = trtx.convert.sync(source, simplify=False, compare=False, check_operators=False).report
    finally:
        trtx.convert.unregister("local")
    assert report.producer == "fake 1.0"


def test_under_trio(fake: Registered, tmp_path: Path) -> None:
    source = fake("hang")

    async def run() -> None:
        hanging = anyio.Event()
        token = anyio.lowlevel.current_token()

        def progress(event: trtx.ConversionProgress) -> None:
            if event.text == "hanging":
                anyio.from_thread.run_sync(hanging.set, token=token)

        async with anyio.create_task_group() as group:

            async def convert() -> None:
                await trtx.convert(source, options={"pids": str(tmp_path / "pids")}, progress=progress, **QUICK)

            group.start_soon(convert)
            with anyio.fail_after(60):
                await hanging.wait()
            group.cancel_scope.cancel()

    anyio.run(run, backend="trio")
    *processes, _ = json.loads((tmp_path / "pids").read_text())
    for pid in processes:
        assert_ends(pid)


def test_what_a_worker_leaves_running_is_ended(fake: Registered, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    trtx.convert.sync(fake("leave_a_child"), options={"pids": str(pids)}, timeout_s=60, **QUICK)
    *processes, _ = json.loads(pids.read_text())
    for pid in processes:
        assert_ends(pid)


def test_the_worker_dies_with_its_caller(fake: Registered, tmp_path: Path) -> None:
    pids, source = tmp_path / "pids", fake("hang")
    program = (
        "import sys, trtx_py as trtx\n"
        "trtx.convert.register('fake', 'fake_converters:hang', suffixes=('.fake',))\n"
        "say = lambda event: print(event.text, flush=True)\n"
        f"trtx.convert.sync({str(source)!r}, options={{'pids': {str(pids)!r}}}, import_path={str(HERE)!r},\n"
        "                  progress=say)\n"
    )
    caller = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1]), "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert caller.stdout is not None
    with caller:
        assert any(line.strip() == "hanging" for line in caller.stdout)
        caller.kill()
    worker, child, _ = json.loads(pids.read_text())
    assert_ends(worker)
    os.kill(child, 9)  # only the worker itself is the kernel's to end


def test_an_exception_of_progress_ends_the_conversion(fake: Registered, tmp_path: Path) -> None:
    def progress(event: trtx.ConversionProgress) -> None:
        if event.text == "hanging":
            raise LookupError("enough")

    pids = tmp_path / "pids"
    with pytest.raises(LookupError, match="enough"):
        trtx.convert.sync(fake("hang"), options={"pids": str(pids)}, progress=progress, timeout_s=60, **QUICK)
    for pid in json.loads(pids.read_text())[:2]:
        assert_ends(pid)


def test_nothing_heavy_is_imported_by_the_caller(fake: Registered) -> None:
    source = fake("good")
    program = (
        "import sys, trtx_py as trtx\n"
        "trtx.convert.register('fake', 'fake_converters:good', suffixes=('.fake',))\n"
        f"made = trtx.convert.sync({str(source)!r}, inputs={{'x': (2, 4)}}, import_path={str(HERE)!r},\n"
        "                         simplify=False, check_operators=False)\n"
        "assert made.report.comparison.samples == 1\n"
        "heavy = ('torch', 'tensorflow', 'onnx', 'onnxruntime', 'onnxslim', 'tf2onnx', 'fake_converters')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
    )  # fmt: skip
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_threads_convert_at_the_same_time(fake: Registered) -> None:
    source, made = fake("good"), []

    def work() -> None:
        made.append(trtx.convert.sync(source, inputs={"x": (2, 4)}, **QUICK).model)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(made) == 3
    assert len(set(made)) == 1


# Through open_engine


async def test_open_engine_converts(fake: Registered) -> None:
    x = np.ones((2, 4), np.float32)
    options = {"import_path": HERE, "simplify": False, "inputs": {"x": x}}
    async with trtx.open_engine(fake("good"), backend="mock", conversion=options) as engine:
        np.testing.assert_array_equal((await engine.infer({"x": x}))["y"], 3 * x)


async def test_open_engine_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "tensorflow.py").write_text("raise ModuleNotFoundError('gone', name='tensorflow')")
    path = tmp_path / "m.tflite"
    path.write_bytes(b"\x1c\0\0\0TFL3" + bytes(60))
    with pytest.raises(trtx.ConversionError, match=r"trtx-py\[tensorflow\]"):
        async with trtx.open_engine(path, backend="mock", conversion={"import_path": tmp_path}):
            pass


@pytest.mark.parametrize(
    ("source", "conversion", "error", "text"),
    [
        (b"damaged", None, trtx.ParserError, "not an ONNX model"),
        (b"damaged", {}, trtx.ConversionError, "no model that is known"),
        ("no-such.onnx", None, trtx.InvalidArgumentError, "cannot be read"),
        (b"ftrt", None, trtx.PlanError, "too short|cut off"),
        (b"ftrt", {}, trtx.ConversionError, "built already"),
        (b"TFL3TFL3", {"wrong": 1}, trtx.InvalidArgumentError, "wrong"),
        (b"damaged", 3, trtx.InvalidArgumentError, "conversion is int"),
    ],
)
async def test_open_engine_with_what_it_cannot_convert(
    source: Any, conversion: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        async with trtx.open_engine(source, backend="mock", conversion=conversion):
            pass


# Registration


def test_register_functions(tmp_path: Path) -> None:
    trtx.convert.register("own", fake_converters.good, magic=b"OWN1")
    try:
        assert trtx.convert.detect_format(b"OWN1 and more") == "own"
        path = tmp_path / "m.onnx"
        path.write_bytes(b"OWN1")
        assert trtx.convert.detect_format(path) == "own"
    finally:
        trtx.convert.unregister("own")
    with pytest.raises(trtx.ConversionError):
        trtx.convert.detect_format(b"OWN1 and more")
    with pytest.raises(trtx.InvalidArgumentError, match="no converter was registered"):
        trtx.convert.unregister("own")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("own", lambda task: None), "another process can import"),
        (("own", "no module"), r"package\.module:function"),
        (("own", 7), "another process can import"),
        (("onnx", "a:b"), "a name of your own"),
        (("", "a:b"), "a name of your own"),
        (("own", "a:b", ()), "nothing tells"),
        (("own", "a:b", "foo"), r"\.foo"),
        (("own", "a:b", ("foo",)), r"\.foo"),
    ],
)
def test_what_cannot_be_registered(arguments: Any, text: str) -> None:
    name, converter, *rest = arguments
    with pytest.raises(trtx.InvalidArgumentError, match=text):
        trtx.convert.register(name, converter, suffixes=rest[0] if rest else (".own",))


# Arguments


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"inputs": [(1, 2)]}, "inputs is list"),
        ({"inputs": {"x": (1, -2)}}, "dimension 1 is -2"),
        ({"inputs": {"x": trtx.InputSpec((1,), "float33")}}, "float33"),
        ({"inputs": {"x": np.array(["a"])}}, "expected numbers"),
        ({"inputs": {3: (1,)}}, "the name 3"),
        ({"dynamic_axes": {"y": {0: "n"}}}, "names 'y'"),
        ({"inputs": {"x": (1, 2)}, "dynamic_axes": {"x": {2: "n"}}}, "expected -2 to 1"),
        ({"inputs": {"x": (1, 2)}, "dynamic_axes": {"x": {0: "a b"}}}, "expected a name"),
        ({"inputs": {"x": (1, 2)}, "dynamic_axes": {"x": {0: "n", 1: "n"}}}, "have one size"),
        ({"opset": 0}, "opset is 0"),
        ({"timeout_s": -1}, "timeout_s is -1"),
        ({"tolerance": float("nan")}, "tolerance is nan"),
        ({"module": "no module"}, "package.module:factory"),
        ({"progress": 3}, "progress is int"),
        ({"options": {"a": {1, 2}}}, "another process"),
        ({"output": "/no/such/folder/m.onnx"}, "there is no folder"),
        ({"output": "/"}, "is a folder"),
    ],
)
def test_arguments_are_checked_before_anything_starts(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(trtx.InvalidArgumentError, match=text.replace("(", r"\(")):
        trtx.convert.sync(b"", **arguments)


def test_a_plan_is_no_source() -> None:
    with pytest.raises(trtx.ConversionError, match="built already"):
        trtx.convert.sync(b"ftrt" + bytes(64))
