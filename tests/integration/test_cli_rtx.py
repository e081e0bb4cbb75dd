"""Commands with NVIDIA's own TensorRT-RTX, which parses and builds on a machine without a GPU."""

from __future__ import annotations

import importlib.util
import signal
import time
from pathlib import Path

import numpy as np
import pytest

import trtx_py as trtx
from tests.cli import DIGITS, Run, runner, spawn, start

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed"
)

RTX = ("--backend", "tensorrt_rtx", "--compute-capability", "8.9")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)
    return runner(capsys)


def test_build_as_trtexec_would(run: Run, tmp_path: Path) -> None:
    found = run(
        "build", f"--onnx={DIGITS}", "--saveEngine=d.plan", "--fp16", "--minShapes=image:1x1x8x8",
        "--optShapes=image:8x1x8x8", "--maxShapes=image:32x1x8x8", "--memPoolSize=workspace:256",
        "--builderOptimizationLevel=3", "--computeCapabilities=89,120", "--skipInference", "--backend",
        "tensorrt_rtx", "--json",
    ).succeeded().json  # fmt: skip
    assert found["flavour"] == "tensorrt_rtx"
    assert found["compute_capabilities"] == ["8.9", "12.0"]
    assert found["build_options"]["layers_by_precision"]["HALF"] > 0
    header = trtx.Plan.load(tmp_path / "d.plan").header
    assert header.io_tensors[0].ranges == (trtx.ShapeRange((1, 1, 8, 8), (8, 1, 8, 8), (32, 1, 8, 8)),)


def test_a_calibrated_model_builds(run: Run, tmp_path: Path) -> None:
    images = np.random.default_rng(0).uniform(0, 16, (16, 1, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "samples.npz", image=images)
    run("calibrate", DIGITS, "--calibration-data", "samples.npz", "-o", "q.onnx").succeeded()
    found = run("build", "q.onnx", *RTX, "-o", "q.plan", "--json").succeeded().json
    assert found["bytes"] > 1000
    layers = run("inspect", "q.onnx", "--layers", "--backend", "tensorrt_rtx", "--json").succeeded().json["layers"]
    assert "int8" in {layer["computes_in"] for layer in layers}


def test_a_converted_model_is_checked_by_its_parser(run: Run) -> None:
    found = run("convert", DIGITS, "-o", "c.onnx", "--target", "tensorrt_rtx", "--json").succeeded().json
    assert found["report"]["operators"]["target"].startswith("tensorrt_rtx ")
    assert found["report"]["operators"]["supported"] is True


def test_what_it_cannot_do_is_one_line(run: Run) -> None:
    run("build", DIGITS, *RTX, "-o", "x.plan", "--hardware-compatibility", "ampere_plus").failed(
        1, "hardware_compatibility", "tensorrt_rtx"
    )
    run("build", DIGITS, *RTX, "-o", "x.plan", "--timing-cache", "t.bin").failed(1, "timing_cache")
    run("build", DIGITS, *RTX, "-o", "x.plan", "--dla-core", "0").failed(1, "dla")
    run("build", DIGITS, *RTX, "-o", "x.plan", "--min-shapes", "image:4x1x9x9").failed(1)


@pytest.mark.skipif(trtx.device_count() > 0, reason="here is a GPU")
def test_run_and_doctor_without_a_driver(run: Run) -> None:
    run("build", DIGITS, *RTX, "-o", "d.plan").succeeded()
    run("run", "d.plan", "--backend", "tensorrt_rtx").failed(1, "driver")
    lines = spawn("doctor", "--plan", "d.plan").succeeded().out.splitlines()
    assert lines[0].startswith("problem: d.plan does not run here: tensorrt_rtx ")
    assert lines[1].startswith("cure: install an NVIDIA driver")
    assert "tensorrt_rtx 1." in lines[2]
    lines = spawn("doctor").succeeded().out.splitlines()
    assert "no usable GPU" in lines[0]
    assert "builds here, and does not run" in lines[0]


def test_the_join_runs_what_rtx_parsed(run: Run) -> None:
    found = run("run", DIGITS, "--backend", "tensorrt_rtx+mock", "--reference", DIGITS, "--compute-capability", "8.9",
                "--json").succeeded().json  # fmt: skip
    assert found["within"] is True


def test_ctrl_c_stops_a_build(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = tmp_path / "deep.onnx"
    onnx.save(_deep(onnx), model)
    with start("build", model, *RTX, "-o", tmp_path / "x.plan", "--verbose", "--optimization-level", 5) as process:
        assert process.stderr is not None
        for line in process.stderr:  # its own lines say that it is at work
            if "info" in line or "debug" in line:
                break
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.splitlines()[-1] == "trtx: error: interrupted; nothing was written"
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["deep.onnx"]


def _deep(onnx: object) -> object:
    """Many convolutions of different sizes, so that there is time to interrupt their build."""
    from typing import Any

    o: Any = onnx
    generator = np.random.default_rng(0)
    nodes, weights, name, channels = [], [], "x", 3
    for number in range(120):
        size = 16 + 8 * (number % 13)
        w = (generator.standard_normal((size, channels, 3, 3)) / 50).astype(np.float32)
        weights.append(o.numpy_helper.from_array(w, f"w{number}"))
        nodes.append(o.helper.make_node("Conv", [name, f"w{number}"], [f"c{number}"], pads=[1, 1, 1, 1]))
        nodes.append(o.helper.make_node("Relu", [f"c{number}"], [f"r{number}"]))
        name, channels = f"r{number}", size
    info = o.helper.make_tensor_value_info
    graph = o.helper.make_graph(
        nodes, "deep", [info("x", o.TensorProto.FLOAT, [1, 3, 64, 64])],
        [info(name, o.TensorProto.FLOAT, [1, channels, 64, 64])], weights,
    )  # fmt: skip
    return o.helper.make_model(graph, opset_imports=[o.helper.make_opsetid("", 17)], ir_version=9)
