"""Commands in processes of their own: start-up, signals, closed pipes and full disks."""

from __future__ import annotations

import json
import signal
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.cli import DIGITS, LAUNCH, environment, runner, spawn, start

HEAVY = ("numpy", "onnx", "asyncio", "anyio", "tensorrt_rtx", "onnxruntime", "msgpack", "rich.console")


def test_help_starts_fast(tmp_path: Path) -> None:
    """It is what the shell's completion waits for: seconds are not measured here, but what they are made of."""
    code = (
        "import sys\nfrom trtx_launch import main\n"
        "try:\n    main()\nfinally:\n"
        f"    sys.stderr.write(repr([name for name in {HEAVY!r} if name in sys.modules]))"
    )
    for arguments in (["--help"], ["build", "--help"]):
        ran = spawn(*arguments, program=[sys.executable, "-c", code]).succeeded()
        assert ran.err == "[]"
    asked = environment(_TRTX_COMPLETE="bash_complete", COMP_WORDS="trtx bu", COMP_CWORD="1")
    ran = spawn(program=[sys.executable, "-c", code], env=asked)
    assert ran.out == "plain,build\n"
    assert ran.err == "[]"


def test_the_module_runs_as_the_command_does() -> None:
    ran = spawn("cache", "path", "--json", program=[sys.executable, "-m", "trtx_py"]).succeeded()
    assert ran.json["path"]


def test_without_click_it_says_what_to_install() -> None:
    code = "import sys\nsys.modules['click'] = None\nfrom trtx_launch import main\nmain()"
    ran = spawn("doctor", program=[sys.executable, "-c", code])
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.count("\n") == 1
    assert "pip install 'trtx-py[cli]'" in ran.err


def test_an_extension_module_that_cannot_be_loaded_is_one_line() -> None:
    code = "import sys\nsys.modules['trtx_py._native'] = None\nfrom trtx_launch import main\nmain()"
    ran = spawn("run", DIGITS, "--backend", "mock", program=[sys.executable, "-c", code])
    ran.failed(1, "extension module cannot be loaded", "reinstall trtx-py")


def test_a_reader_that_leaves_is_no_traceback() -> None:
    with start("inspect", DIGITS) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(60) == 1
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_closed_standard_streams_go_nowhere() -> None:
    code = f"import os, sys\nsys.argv[1:] = ['inspect', {DIGITS!r}, '--json']\n{{}}from trtx_launch import main\nmain()"
    shell = ["sh", "-c", 'exec "$0" -c "$1" <&- >&-', sys.executable, code.format("")]
    assert spawn(program=shell).succeeded().err == ""
    shell = ["sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, code.format("sys.argv[2] = 'gone'\n")]
    ran = spawn(program=shell)
    assert ran.code == 2
    assert ran.json.keys() == {"error"}


def test_standard_output_of_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "ж.onnx").write_bytes(Path(DIGITS).read_bytes())
    options: dict[str, Any] = {"cwd": tmp_path, "env": environment(PYTHONIOENCODING="latin-1:strict")}
    assert spawn("inspect", "ж.onnx", **options).succeeded().out.startswith("\\u0436.onnx: ONNX model")
    assert spawn("inspect", "ж.onnx", "--json", **options).succeeded().json["path"] == "ж.onnx"


def test_standard_output_on_a_full_disk() -> None:
    for more in ((), ("--json",)):
        with open("/dev/full", "w") as full:
            spawn("inspect", DIGITS, *more, stdout=full).failed(1, "standard output cannot be written: No space left")


def test_files_on_a_full_disk(tmp_path: Path) -> None:
    """A limit on the size of files does what a full disk does; nothing half-written stays."""
    code = (
        "import json, resource, sys, io, contextlib\n"
        "import numpy as np\n"
        "from trtx_py.cli import main\n"
        "np.save('x.npy', np.zeros((16, 1, 8, 8), np.float32))\n"
        "main(['build', sys.argv[1], '--backend', 'mock', '-o', 'good.plan', '--json'])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "found = []\n"
        "for line in json.loads(sys.argv[2]):\n"
        "    out, err = io.StringIO(), io.StringIO()\n"
        "    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):\n"
        "        code = main(line)\n"
        "    found.append([code, err.getvalue()])\n"
        "sys.stdout.write('\\n' + json.dumps(found))\n"
    )
    lines = [
        ["build", DIGITS, "--backend", "mock", "-o", "x.plan"],
        ["run", "good.plan", "--backend", "mock", "-o", "x.npz"],
        ["calibrate", DIGITS, "--calibration-data", "x.npy", "-o", "x.onnx"],
        ["profile", "good.plan", "--backend", "mock", "--iterations", "2", "--warmup", "1", "--no-layers",
         "--no-stages", "-o", "x.json"],
        ["bench", "good.plan", "--backend", "mock", "--contender", "engine", "--rounds", "1", "--requests", "2",
         "--warmup-limit", "0.1", "-o", "x.bench"],
    ]  # fmt: skip
    ran = spawn(DIGITS, json.dumps(lines), program=[sys.executable, "-c", code], cwd=tmp_path)
    found = json.loads(ran.out.splitlines()[-1])
    for (status, error), line in zip(found, lines, strict=True):
        assert status == 1, (line, error)
        assert "File too large" in error
        assert error.count("\n") == 1, error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good.plan", "x.npy"]


SLOW_BUILD = """
import contextlib, sys, time
import trtx_py
from trtx_py.cli import _build, main

def slow(phase, step, steps):
    sys.stderr.write("step\\n")
    sys.stderr.flush()
    time.sleep(0.5)

_build._on_progress = lambda session, wanted: lambda: contextlib.nullcontext(slow)
sys.exit(main())
"""

SLOW_RUN = """
import sys
import trtx_py
from trtx_py.backends import registry, _named_mocks
from trtx_py.cli import main, _run

def made(name):
    sys.stderr.write("step\\n")
    sys.stderr.flush()
    return _named_mocks.named_mock("mock:duration_s=5")

registry._make = made
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("code", "arguments"),
    [(SLOW_BUILD, ("build", DIGITS, "-o", "x.plan")), (SLOW_RUN, ("run", DIGITS, "-o", "x.npz"))],
    ids=["build", "run"],
)
def test_ctrl_c(code: str, arguments: tuple[str, ...], tmp_path: Path) -> None:
    program = [sys.executable, "-c", code]
    with start(*arguments, "--backend", "mock", "--json", program=program, cwd=tmp_path) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "step\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 1
    lines = [line for line in err.splitlines() if line not in ("", "step")]
    assert lines == ["trtx: error: interrupted; nothing was written"]
    assert json.loads(out)["error"]["message"] == "interrupted; nothing was written"
    assert list(tmp_path.iterdir()) == []


INTERRUPTED_IMPORT = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path, target=None):
        if name == sys.argv[-1]:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
from trtx_launch import main
main()
"""


@pytest.mark.parametrize("module", ["trtx_py.cli._main", "trtx_py.cli._session", "numpy._core._asarray"])
def test_ctrl_c_while_modules_are_imported(module: str) -> None:
    """numpy, where a module in C is the first to import it, prints a traceback, and says that it cannot be loaded."""
    pytest.importorskip("uvicorn")
    program = [sys.executable, "-c", INTERRUPTED_IMPORT]
    ran = spawn("serve", "--backend", "mock", "--json", "--", DIGITS, f"x={module}", module, program=program)
    assert ran.json.keys() == {"error"}
    ran.failed(1, "interrupted")


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_leaves_what_was_measured(times: int, tmp_path: Path) -> None:
    """Also if it is pressed again while that is written."""
    arguments = ("bench", DIGITS, "--backend", "mock", "--contender", "engine", "--rounds", 1000, "--requests", 20,
                 "--warmup-limit", 0.1, "-o", "b.json", "--verbose")  # fmt: skip
    with start(*arguments, cwd=tmp_path) as process:
        assert process.stderr is not None
        for _ in range(2):  # said before the first turn, and then after each tenth of them
            assert any(line.startswith("measure ") for line in process.stderr)
        for _ in range(times):
            process.send_signal(signal.SIGINT)
            time.sleep(0.03)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.splitlines()[-1] == "trtx: error: interrupted; complete rounds, if there were any, are in b.json"
    assert "Traceback" not in err
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["complete"] is False
    assert found["rounds"] >= 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_answers_and_ends_at_a_signal(number: signal.Signals) -> None:
    pytest.importorskip("uvicorn")
    pytest.importorskip("starlette")
    with start("serve", f"d={DIGITS}", "--backend", "mock", "--port", 0, "--max-batch-size", 4, "--json") as process:
        assert process.stdout is not None
        text = ""
        while not text.rstrip().endswith("}"):
            line = process.stdout.readline()
            assert line, process.stderr and process.stderr.read()
            text += line
        found = json.loads(text)
        assert found["models"] == ["d"]
        tensor = {"name": "image", "datatype": "FP32", "shape": [1, 1, 8, 8], "data": [0.0] * 64}
        request = urllib.request.Request(
            f"{found['url']}/v2/models/d/infer", json.dumps({"inputs": [tensor]}).encode(), method="POST"
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            assert len(json.load(response)["outputs"][0]["data"]) == 10
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_ends_at_a_signal_while_models_are_built(number: signal.Signals) -> None:
    pytest.importorskip("uvicorn")
    code = (
        "import sys, trtx_py\nfrom trtx_py.backends import registry, _named_mocks\n"
        "def made(name):\n    sys.stderr.write('step\\n')\n    sys.stderr.flush()\n"
        "    return _named_mocks.named_mock('mock:duration_s=0.2')\n"
        "registry._make = made\nfrom trtx_py.cli import main\nsys.exit(main())"
    )
    with start(
        "serve", DIGITS, "--backend", "mock", "--warmup", 2000, "--json", program=[*LAUNCH[:2], code]
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "step\n"
        time.sleep(0.1)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)  # the warm-up would take more than 400 s
    assert process.returncode == 1
    assert err.strip().splitlines()[-1] == "trtx: error: interrupted; nothing was served yet"
    assert json.loads(out).keys() == {"error"}


def test_serve_says_why_it_cannot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("uvicorn")
    run = runner(capsys)
    (tmp_path / "no.onnx").write_bytes(b"no model")
    run("serve", tmp_path / "no.onnx", "--backend", "mock", "--port", 0).failed(1, "no.onnx")
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        run("serve", DIGITS, "--backend", "mock", "--port", port).failed(1, f"127.0.0.1:{port} cannot be listened at")


def test_the_launcher_loads_the_package_once() -> None:
    code = (
        "import sys\nfrom trtx_launch._defer import reserve\nreserve()\nreserve()\n"
        "import trtx_py._errors\nassert 'numpy' not in sys.modules\n"
        "import trtx_py\nassert not hasattr(trtx_py, '__no_such__')\nassert 'numpy' not in sys.modules\n"
        "assert callable(trtx_py.convert)\nassert 'numpy' in sys.modules\n"
        "from trtx_py import open_engine, ShapeError\nassert ShapeError.__module__ == 'trtx_py'\n"
        "assert callable(trtx_py.convert)\n"
        "try:\n    trtx_py.nothing\nexcept AttributeError:\n    pass\nelse:\n    raise AssertionError\n"
    )
    assert spawn(program=[*LAUNCH[:2], code]).succeeded().err == ""


def test_the_launcher_lets_modules_be_imported_in_any_order() -> None:
    """`from . import _native` asks the package for a name, which must not load the facade in the middle of a part."""
    code = (
        "from trtx_launch._defer import reserve\nreserve()\n"
        "import trtx_py._engine\nimport trtx_py\nassert trtx_py.Engine is trtx_py._engine.Engine\n"
        "assert callable(trtx_py.convert)\n"
    )
    assert spawn(program=[*LAUNCH[:2], code]).succeeded().err == ""
