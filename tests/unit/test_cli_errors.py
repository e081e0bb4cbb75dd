"""What goes wrong in commands: one line, the right exit code, and no traceback without --debug."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import onnx
import pytest

import trtx_py as trtx
from tests.cli import DIGITS, Run, runner
from trtx_py.cli._app import COMMANDS

MOCK = ("--backend", "mock")
#: A file whose reading fails also for root.
UNREADABLE = "/proc/self/mem"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)
    return runner(capsys)


#: What each command needs, so that only the option in question is wrong.
COMPLETE: dict[str, tuple[str, ...]] = {
    "doctor": (),
    "build": (DIGITS, "-o", "x.plan"),
    "convert": (DIGITS, "-o", "x.onnx"),
    "calibrate": (DIGITS,),
    "inspect": (DIGITS,),
    "run": (DIGITS,),
    "compare": (DIGITS, "--data", DIGITS),
    "bench": (DIGITS,),
    "profile": (DIGITS,),
    "cache": ("list",),
    "serve": (DIGITS,),
    "completion": ("bash",),
}


def test_every_command_is_here() -> None:
    assert COMPLETE.keys() == COMMANDS.keys()


@pytest.mark.parametrize("command", COMPLETE)
def test_an_unknown_option_is_an_error_of_usage(run: Run, command: str) -> None:
    ran = run(command, *COMPLETE[command], "--no-such-thing").failed(2, "--no-such-thing", f"trtx {command}")
    assert ran.out == ""
    found = run(command, *COMPLETE[command], "--no-such-thing", "--json").failed(2)
    assert found.json["error"]["type"] == "NoSuchOption"


@pytest.mark.parametrize(
    "command", [name for name in COMPLETE if name not in ("doctor", "cache", "completion", "convert")]
)
def test_a_file_that_is_not_there_is_an_error_of_usage(run: Run, command: str) -> None:
    arguments = ["gone.onnx" if each == DIGITS else each for each in COMPLETE[command]]
    run(command, *arguments).failed(2, "gone.onnx")


@pytest.mark.parametrize("command", ["build", "inspect", "run", "bench", "profile", "convert"])
def test_a_file_that_cannot_be_read(run: Run, command: str) -> None:
    arguments = [UNREADABLE if each == DIGITS else each for each in COMPLETE[command]]
    run(command, *arguments, *MOCK).failed(1, UNREADABLE, "Input/output error")


@pytest.mark.parametrize("command", ["build", "inspect", "run", "calibrate", "bench", "profile", "convert"])
def test_a_file_that_is_no_model(run: Run, tmp_path: Path, command: str) -> None:
    (tmp_path / "no.onnx").write_bytes(b"\x00\x01 this is no model \xff" * 20)
    arguments = ["no.onnx" if each == DIGITS else each for each in COMPLETE[command]]
    np.save(tmp_path / "x.npy", np.zeros((4, 1, 8, 8), np.float32))
    more = ("--calibration-data", "x.npy", "-o", "q.onnx") if command == "calibrate" else ()
    run(command, *arguments, *more, *MOCK).failed(1, "no.onnx")


def test_a_damaged_plan(run: Run, tmp_path: Path) -> None:
    run("build", DIGITS, *MOCK, "-o", "p.plan").succeeded()
    blob = bytearray((tmp_path / "p.plan").read_bytes())
    blob[-1] ^= 1
    (tmp_path / "p.plan").write_bytes(blob)
    for command in ("inspect", "run", "profile"):
        run(command, "p.plan", *MOCK).failed(1, "SHA-256 does not match")
    (tmp_path / "p.plan").write_bytes(blob[:1000])
    run("run", "p.plan", *MOCK).failed(1, "truncated")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("build", DIGITS, "--precision", "fp17"), "fp17"),
        (("build", DIGITS, "--workspace", "many"), "'many' is no size"),
        (("build", DIGITS, "--min-shapes", "image"), "expected NAME:1x3x224x224"),
        (("build", DIGITS, "--profile", "0"), "each --profile is a whole one"),
        (("build", DIGITS, "--profile", "image:1x1:2x1"), "expected NAME:MIN:OPT:MAX"),
        (("build", DIGITS, "--profile", "image:1x1:3x1:2x1"), "expected min <= opt <= max"),
        (("build", DIGITS, "--profile", "image:1x1:3x1:3"), "differ in rank"),
        (("build", DIGITS, "--compute-capability", "hopper"), "such as 8.9"),
        (("build", DIGITS, "--strip-plan"), "strip_plan leaves the weights out"),
        (("build", DIGITS, "--embed-plugins"), "embed_plugins has no plugin_libraries"),
        (("build", DIGITS, "--exclude-runtime"), "embed_runtime"),
        (("build", DIGITS, "--no-gpu-fallback"), "--dla-core"),
        (("build", DIGITS, "--timing-cache-editable"), "--timing-cache"),
        (("build", DIGITS, "--calibration-cache", "c.json"), "--calibration-data"),
        (("build", DIGITS, "--calibration-percentile", "99"), "--calibration-percentile is for calibration"),
        (("build", DIGITS, "--precision", "fp16", "--image-size", "8x8"), "--image-size is for calibration"),
        (("run", DIGITS, "--calibration-batches", "2"), "--calibration-batches is for calibration"),
        (("build", DIGITS, "--preview-feature", "X=maybe"), "NAME=off"),
        (("build", DIGITS, "-o", "nowhere/x.plan"), "does not exist"),
        (("build",), "MODEL"),
        (("calibrate", DIGITS), "--calibration-data"),
        (("calibrate", DIGITS, "--calibration-data", DIGITS), "--calibration-cache, --output or both"),
        (("convert", DIGITS), "--output"),
        (("convert", DIGITS, "-o", "x.onnx", "--input-type", "x=int64"), "--inputs names no 'x'"),
        (("convert", DIGITS, "-o", "x.onnx", "--dynamic-axis", "x=batch"), "AXIS:NAME"),
        (("run", DIGITS, "--range", "image=5:1"), "LOW:HIGH"),
        (("run", DIGITS, "--input", "=x"), "NAME=VALUE"),
        (("run", DIGITS, "--device", "-1"), "-1"),
        (("run", DIGITS, "--image-size", "8"), "HxW"),
        (("run", DIGITS, "--seed", "-1"), "-1"),
        (("run", DIGITS, "--range", "image=0:inf"), "LOW:HIGH"),
        (("run", DIGITS, "--rtol", "nan"), "no finite number"),
        (("run", DIGITS, "--atol", "inf"), "no finite number"),
        (("run", DIGITS, "--shapes", "image:1x1x8x8,image:2x1x8x8"), "two shapes"),
        (("run", DIGITS, "--shapes", "image:1_0x1x8x8"), "no input with its shape"),
        (("run", DIGITS, "--shapes", f"image:{'9' * 30}x1x8x8"), "no input with its shape"),
        (("run", DIGITS, "-o", ""), "it is empty"),
        (("run", DIGITS, "-o", "/dev/null"), "is a pipe or a device"),
        (("run", DIGITS, "-o", "nowhere/x.npz"), "does not exist"),
        (("run", DIGITS, "-o", "x.npz", "--save-inputs", "./x.npz"), "is given for '-o' / '--output' too"),
        (("run", DIGITS, "-o", DIGITS), "is given for 'MODEL' too"),
        (("run", "/dev/zero"), "is a pipe or a device"),
        (("convert", "/dev/zero", "-o", "x.onnx"), "is a pipe or a device"),
        (("convert", DIGITS, "-o", DIGITS), "is given for 'MODEL' too"),
        (("build", DIGITS, "--profile", "x:1:2:3,x:1:2:3"), "two ranges"),
        (("build", DIGITS, "--workspace", "9" * 400), "more than a size can be"),
        (("build", DIGITS, "--workspace", "9000000000G"), "more than a size can be"),
        (("build", DIGITS, "--image-scale", "nan"), "no finite number"),
        (("build", DIGITS, "--image-scale", "x"), "'x' is not a valid number"),
        (("bench", DIGITS, "--max-regression", "nan"), "no finite number"),
        (("bench", DIGITS, "-o", "nowhere/x.json"), "does not exist"),
        (("profile", DIGITS, "--html", "nowhere/x.html"), "does not exist"),
        (("calibrate", DIGITS, "--calibration-cache", "/dev/zero"), "is a pipe or a device"),
        (("serve", DIGITS, "--drain-s", "nan"), "no number"),
        (("serve", DIGITS, "--host", ""), "--host"),  # not: every interface
        (("serve", DIGITS, "--host", "x" * 70), "--host: 'xxx"),
        (("serve", DIGITS, "--max-delay-ms", "1e30"), "--max-delay-ms"),
        (("bench",), "MODEL"),
        (("bench", DIGITS, "--batch-sweep", "1,x"), "--batch-sweep"),
        (("bench", DIGITS, "--precisions", "fp16,fp15"), "fp15"),
        (("bench", DIGITS, "--iterations", "5", "--requests", "5"), "in place of --requests"),
        (("bench", DIGITS, "--baseline", "nobody"), "nobody"),
        (("bench", DIGITS, "--compare", DIGITS, DIGITS), "leave MODEL out"),
        (("serve", DIGITS, f"digits={DIGITS}"), "one name"),
        (("serve", f"a/b={DIGITS}"), "'a/b' of a model has a slash"),
        (("serve", "--port", "99999", DIGITS), "99999"),
        (("cache", "prune", "--max-size", "x"), "'x' is no size"),
        (("cache", "prune", "--older-than", "1e39"), "--older-than"),
        (("cache", "clear", "--yes", "--dir", ""), "'--dir': it is empty"),
        (("run", DIGITS, "--range", "image=0:1", "--range", "image=0:2"), "--range: 'image' has two values"),
        (("build", DIGITS, "--preview-feature", "X=on", "--preview-feature", "X=off"), "'X' is given twice"),
        (
            (
                "convert",
                DIGITS,
                "-o",
                "x.onnx",
                "--inputs",
                "x:1",
                "--input-type",
                "x=int32",
                "--input-type",
                "x=int64",
            ),
            "--input-type: 'x' has two values",
        ),
        (("convert", DIGITS, "-o", "x.onnx", "--option", "a=1", "--option", "a=2"), "--option: 'a' has two values"),
        (
            ("convert", DIGITS, "-o", "x.onnx", "--dynamic-axis", "x=0:a", "--dynamic-axis", "x=0:b"),
            "--dynamic-axis: axis 0 of 'x' has two names",
        ),
        (("cache", "list", "--dir", "/dev/zero"), "is a pipe or a device"),
        (("cache", "list", "--backend", "mok"), "did you mean 'mock'?"),
        (("calibrate", DIGITS, "--backend", ""), "there is no backend ''"),
        (("convert", DIGITS, "-o", "x.onnx", "--import-path", "/dev/zero"), "is a pipe or a device"),
        (("convert", DIGITS, "-o", "x.onnx", "--dynamic-axis", "x=²:batch"), "AXIS:NAME"),
        (("convert", DIGITS, "-o", "x.onnx", "--dynamic-axis", f"x={'9' * 5000}:batch"), "AXIS:NAME"),
        (("convert", DIGITS, "-o", "x.onnx", "--inputs", "x:1", "--input-range", "x=5:1"), "--input-range x=5:1: "),
        (("convert", DIGITS, "-o", "x.onnx", "--target", "mok"), "--target: there is no backend 'mok'"),
        (("run", DIGITS, "-o", "results/"), "'results/' is the name of a folder"),
        (("build", DIGITS, "--profile", ":1:1:1"), "':1:1:1' is no range"),
        (("build", DIGITS, "--keep", ""), "--keep"),
        (("build", DIGITS, "--flag", " "), "--flag"),
        (("build", DIGITS, "--preview-feature", ""), "--preview-feature"),
        (("build", DIGITS, "--max-relative-error", "1"), "--max-relative-error"),
        (("build", DIGITS, "--precision", "fp16", "--int4-block-size", "16"), "--int4-block-size is for int4-weights"),
        (("build", DIGITS, "--precision", "fp16", "--quantize-operator", "Conv"), "is for int8 and fp8"),
        (
            ("calibrate", DIGITS, "--calibration-data", DIGITS, "-o", "x", "--keep-operator", "Relu"),
            "--keep-operator is for fp16 and bf16; the precision is int8",
        ),
        (("calibrate", DIGITS, "--calibration-percentile", "0"), "--calibration-percentile"),
        (("calibrate", DIGITS, "--calibration-batches", "1" + "0" * 30), "--calibration-batches"),
        (("compare", DIGITS, "--data", DIGITS, "--batches", "1" + "0" * 30), "--batches"),
        (("compare", DIGITS, "--data", DIGITS, "--layer-limit", "0"), "--layer-limit"),
        (("run", DIGITS, "--image-scale", "0"), "--image-scale is 0.0; expected one number other than 0"),
        (("run", DIGITS, "--image-scale", "1e308"), "--image-scale"),
        (("run", DIGITS, "--image-std", "1e-320"), "--image-std"),
        (("run", DIGITS, "--image-size", "0x0"), "--image-size"),
        (("cache", "burn"), "burn"),
        (("completion", "tcsh"), "tcsh"),
        (("bild", DIGITS), "did you mean 'build'?"),
        (("xyzzy",), "there are doctor, build"),
        (("--no-such",), "--no-such"),
    ],
    ids=lambda value: "-".join(value[:4]).replace("/", "")[-40:] if isinstance(value, tuple) else "",
)
def test_arguments_that_cannot_be_used(run: Run, arguments: tuple[str, ...], words: str) -> None:
    assert run(*arguments).failed(2, words).out == ""


def test_options_of_a_build_do_not_go_with_a_plan(run: Run) -> None:
    run("build", DIGITS, *MOCK, "-o", "p.plan").succeeded()
    run("run", "p.plan", *MOCK, "--precision", "fp16").failed(2, "is a plan already")


def test_a_backend_that_there_is_none_of(run: Run) -> None:
    run("run", DIGITS, "--backend", "mok").failed(2, "did you mean 'mock'?")


@pytest.mark.parametrize("option", ["--min-shapes", "--opt-shapes", "--max-shapes"])
def test_the_shape_of_a_scalar_is_a_shape(run: Run, option: str) -> None:
    run("build", DIGITS, *MOCK, option, "image:scalar").failed(1, "input 'image'", "has 4 dimensions")


def test_a_reference_that_cannot_be_run_is_named(run: Run, tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("NoSuchOperator", ["image"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [value("image", 1, [1])], [value("y", 1, [1])])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "other.onnx")
    run("run", DIGITS, *MOCK, "--reference", "other.onnx").failed(1, "--reference other.onnx: ")


def test_an_input_is_of_numbers(run: Run) -> None:
    ran = run("convert", DIGITS, "-o", "x.onnx", "--inputs", "image:1x1x8x8", "--input-type", "image=object")
    ran.failed(1, "'image' has dtype 'object'")


def test_an_input_has_one_file(run: Run, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((4, 1, 8, 8), np.float32))
    run("run", DIGITS, *MOCK, "--input", "x.npy", "--input", "image=x.npy").failed(1, "--input: 'image' has two files")


def test_a_conversion_may_take_centuries(run: Run) -> None:
    run("convert", DIGITS, "-o", "x.onnx", "--timeout", "4294967296", "--no-compare", *MOCK).succeeded()


def test_a_comparison_with_a_plan_is_told_the_block_size(run: Run, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((4, 1, 8, 8), np.float32))
    run("build", DIGITS, *MOCK, "-o", "p.plan", "--precision", "int4-weights", "--int4-block-size", "16").succeeded()
    run("compare", DIGITS, *MOCK, "--engine", "p.plan", "--int4-block-size", "16", "--data", "x.npy").succeeded()


def test_a_terminal_is_not_told_what_a_name_says(run: Run, tmp_path: Path) -> None:
    (tmp_path / "red\x1b[31m.onnx").write_bytes(b"no")
    ran = run("inspect", "red\x1b[31m.onnx", "--json").failed(1, "red\\x1b[31m.onnx")
    assert "\x1b" not in ran.err
    assert "red\x1b[31m.onnx" in ran.json["error"]["message"]


def test_a_name_that_is_no_text_is_shown_escaped(run: Run, tmp_path: Path) -> None:
    name = os.fsdecode(b"no\xff.onnx")
    (tmp_path / name).write_bytes(b"no")
    assert "no\\udcff.onnx" in run("inspect", name).failed(1, "no\\udcff.onnx").err
    assert name in run("inspect", name, "--json").failed(1).json["error"]["message"]
    plan = os.fsdecode(b"p\xff.plan")
    assert "p\\udcff.plan: " in run("build", DIGITS, *MOCK, "-o", plan).succeeded().out
    assert run("build", DIGITS, *MOCK, "-o", plan, "--json").succeeded().json["plan"] == plan


def test_a_backend_that_cannot_serve(run: Run) -> None:
    ran = run("run", DIGITS, "--backend", "tensorrt", "--json").failed(1, "tensorrt")
    assert ran.json == {"error": {"type": "BackendUnavailableError", "message": ran.err.strip()[13:]}}


def test_a_shape_outside_the_profile(run: Run) -> None:
    run("build", DIGITS, *MOCK, "-o", "p.plan").succeeded()
    run("run", "p.plan", *MOCK, "--shapes", "image:99x1x8x8").failed(1, "99")
    run("run", "p.plan", *MOCK, "--shapes", "picture:1x1x8x8").failed(1, "there is no input picture")


def test_what_is_read_is_not_written_over(run: Run, tmp_path: Path) -> None:
    (tmp_path / "m.plan").write_bytes(Path(DIGITS).read_bytes())
    run("build", "m.plan", *MOCK).failed(2, "m.plan")  # where the plan goes by default
    (tmp_path / "link.onnx").symlink_to("m.plan")
    run("build", "m.plan", *MOCK, "-o", "link.onnx").failed(2, "given for 'MODEL' too")
    assert (tmp_path / "m.plan").read_bytes() == Path(DIGITS).read_bytes()


def test_a_pipe_is_not_waited_for(run: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npy")
    run("inspect", "pipe.npy").failed(2, "is a pipe or a device")
    run("run", DIGITS, *MOCK, "--input", "pipe.npy").failed(1, "is a pipe or a device")


def test_inputs_are_never_unpickled(run: Run, tmp_path: Path) -> None:
    np.save(tmp_path / "evil.npy", np.array([{"a": 1}], object), allow_pickle=True)
    np.savez(tmp_path / "evil.npz", allow_pickle=True, image=np.array([{"a": 1}], object))
    run("build", DIGITS, *MOCK, "-o", "p.plan").succeeded()
    for name in ("evil.npy", "evil.npz"):
        run("run", "p.plan", *MOCK, "--input", name).failed(1, name, "allow_pickle=False")


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.png", "x.raw"])
def test_inputs_that_are_damaged(run: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x93NUMPY nonsense")
    if name.endswith(".png"):
        pytest.importorskip("PIL.Image")
    run("build", DIGITS, *MOCK, "-o", "p.plan").succeeded()
    run("run", "p.plan", *MOCK, "--input", name).failed(1, name)


def test_broken_json(run: Run, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text('{"format": ')
    np.save(tmp_path / "x.npy", np.zeros((4, 1, 8, 8), np.float32))
    run("bench", "--compare", "broken.json", "broken.json").failed(1, "broken.json")
    run("calibrate", DIGITS, "--calibration-data", "x.npy", "--calibration-cache", "broken.json").failed(
        1, "broken.json"
    )
    (tmp_path / "list.json").write_text("[1]")
    run("bench", "--compare", "list.json", "list.json").failed(1, "list.json")


def test_a_cache_that_must_not_be_trusted(run: Run, tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    for command in (("list",), ("verify",), ("prune",), ("clear", "--yes")):
        run("cache", *command, "--dir", tmp_path / "open").failed(1, "can be written by others")


def test_debug_shows_the_traceback(run: Run, tmp_path: Path) -> None:
    (tmp_path / "no.onnx").write_bytes(b"no")
    ran = run("build", "no.onnx", *MOCK, "--debug")
    assert ran.code == 1
    assert "Traceback" in ran.err
    assert "ParserError" in ran.err


def test_verbose_shows_log_lines(run: Run) -> None:
    ran = run("run", DIGITS, *MOCK, "--verbose").succeeded()
    assert "trtx: info: " in ran.err
    assert run("run", DIGITS, *MOCK).succeeded().err == ""


def test_an_error_of_our_own_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing: dict[str, str] = {}
    monkeypatch.setattr("trtx_py.diagnostics.describe", lambda path: nothing["x"])
    run("inspect", DIGITS).failed(1, "internal error: KeyError: 'x'", "--debug")


def test_missing_memory_and_interruption_are_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for error, words in (
        (MemoryError(), "not enough memory"),
        (KeyboardInterrupt(), "interrupted; nothing was written"),
    ):

        def fail(path: str, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr("trtx_py.diagnostics.describe", fail)
        run("inspect", DIGITS).failed(1, words)


def test_serving_needs_its_extra(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.delitem(sys.modules, "trtx_py.integrations.oip_server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    run("serve", DIGITS, *MOCK).failed(1, "trtx-py[serve]")


def test_a_raw_plan_is_described(run: Run, tmp_path: Path) -> None:
    raw = bytearray(b"ftrt" + bytes(60))
    struct.pack_into("<Q", raw, 16, 64)
    raw[24:28] = bytes((8, 6, 1, 6))
    (tmp_path / "raw.engine").write_bytes(raw)
    assert "tensorrt 8.6.1.6" in run("inspect", "raw.engine").succeeded().out
    run("run", "raw.engine", *MOCK).failed(1, "8.6.1.6")


def test_nothing_is_left_open_when_a_command_fails(run: Run) -> None:
    run("run", DIGITS, *MOCK, "--input", f"picture={DIGITS}").failed(1, "there is no input 'picture'")
    assert trtx.live_objects() == []


def test_json_of_an_error_is_one_object(run: Run) -> None:
    ran = run("run", DIGITS, *MOCK, "--shapes", "image:1x1x9x9", "--json")
    assert json.loads(ran.out).keys() == {"error"}
