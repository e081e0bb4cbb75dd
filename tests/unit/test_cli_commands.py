"""Each command where all goes well, on the mock."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import trtx_py as trtx
from tests.cli import DIGITS, Run, runner

MOCK = ("--backend", "mock")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)
    return runner(capsys)


@pytest.fixture
def plan(run: Run, tmp_path: Path) -> str:
    path = str(tmp_path / "digits.plan")
    run("build", DIGITS, *MOCK, "-o", path).succeeded()
    return path


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("samples") / "samples.npy"
    np.save(path, np.random.default_rng(0).uniform(0, 16, (32, 1, 8, 8)).astype(np.float32))
    return str(path)


def test_help_lists_the_commands(run: Run) -> None:
    for arguments in ([], ["--help"]):
        printed = run(*arguments).succeeded().out
        for name in ("doctor", "build", "inspect", "bench", "serve"):
            assert f"\n  {name} " in printed


def test_version(run: Run) -> None:
    assert run("--version").succeeded().out == f"trtx {trtx.__version__}\n"


def test_build_with_options(run: Run, tmp_path: Path) -> None:
    found = run(
        "build", DIGITS, *MOCK, "-o", "made.plan", "--profile", "image:1x1x8x8:4x1x8x8:16x1x8x8", "--workspace", "64M",
        "--optimization-level", 2, "--precision", "fp16", "--no-tf32", "--refit", "all", "--json",
    ).succeeded()  # fmt: skip
    header = trtx.Plan.load(tmp_path / "made.plan").header
    assert found.json["plan"] == "made.plan"
    assert found.json["precision"] == header.precision == "fp16"
    assert header.build_options["workspace_bytes"] == 64 << 20
    assert header.build_options["optimization_level"] == 2
    assert header.build_options["tf32"] is False
    assert "REFIT" in header.build_options["flags"]
    assert header.io_tensors[0].ranges == (trtx.ShapeRange((1, 1, 8, 8), (4, 1, 8, 8), (16, 1, 8, 8)),)


def test_build_puts_the_plan_beside_the_model(run: Run, tmp_path: Path) -> None:
    model = tmp_path / "here.onnx"
    model.write_bytes(Path(DIGITS).read_bytes())
    printed = run("build", "here.onnx", *MOCK).succeeded().out
    assert printed.startswith("here.plan: ")
    assert (tmp_path / "here.plan").is_file()


def test_build_with_several_profiles(run: Run, tmp_path: Path) -> None:
    run("build", DIGITS, *MOCK, "-o", "p.plan", "--profile", "image:1x1x8x8:1x1x8x8:1x1x8x8", "--min-shapes",
        "image:2x1x8x8", "--max-shapes", "image:8x1x8x8").succeeded()  # fmt: skip
    ranges = trtx.Plan.load(tmp_path / "p.plan").header.io_tensors[0].ranges
    assert [each.opt[0] for each in ranges] == [1, 8]


def test_build_int8_with_a_calibration_cache(run: Run, tmp_path: Path, samples: str) -> None:
    found = run("build", DIGITS, *MOCK, "-o", "p.plan", "--precision", "int8", "--calibration-data", samples,
                "--calibration-cache", "ranges.json", "--keep", "layer2", "--json").succeeded().json  # fmt: skip
    assert found["build_options"]["layers_by_precision"]["INT8"] > 0
    assert found["build_options"]["precision_policy"] == {"keep": ["layer2"]}
    assert (tmp_path / "ranges.json").is_file()


def test_build_draws_a_bar_when_asked(run: Run) -> None:
    found = run("build", DIGITS, *MOCK, "-o", "p.plan", "--progress", "--json").succeeded()
    assert found.json["plan"] == "p.plan"  # the bar is elsewhere


def test_inspect_a_plan(run: Run, plan: str) -> None:
    printed = run("inspect", plan).succeeded().out
    assert "built with mock 1.0.0.0, for compute capability 8.9" in printed
    assert "profile 0: [1, 1, 8, 8] .. [8, 1, 8, 8] .. [32, 1, 8, 8]" in printed
    found = run("inspect", plan, *MOCK, "--layers", "--json").succeeded().json
    assert found["kind"] == "plan"
    assert {layer["computes_in"] for layer in found["layers"]} == {"float32"}
    assert "MATRIX_MULTIPLY" in run("inspect", plan, *MOCK, "--layers").succeeded().out


def test_inspect_a_model(run: Run) -> None:
    found = run("inspect", DIGITS, "--json").succeeded().json
    assert found["operators"]["Gemm"] == 3
    assert found["parameters"] == 17_227
    assert found["io_tensors"][0] == {
        "name": "image", "mode": "input", "dtype": "float32", "shape": [-1, 1, 8, 8], "location": "device",
        "is_shape_tensor": False, "ranges": [],
    }  # fmt: skip
    assert "operators: Gemm 3" in run("inspect", DIGITS).succeeded().out
    assert "layer0" in run("inspect", DIGITS, *MOCK, "--layers").succeeded().out


def test_run_saves_outputs_and_compares_them(run: Run, plan: str, tmp_path: Path) -> None:
    run("run", plan, *MOCK, "--seed", 7, "-o", "out.npz", "--save-inputs", "in.npz").succeeded()
    with np.load(tmp_path / "out.npz") as saved, np.load(tmp_path / "in.npz") as given:
        assert saved["probabilities"].shape == (8, 10)
        assert given["image"].std() > 0.5
    again = run("run", plan, *MOCK, "--input", "in.npz", "--reference", "out.npz", "--json").succeeded().json
    assert again["within"] is True
    assert again["differences"][0]["max_abs"] == 0
    assert run("run", plan, *MOCK, "--seed", 7, "--reference", DIGITS, "--json").succeeded().json["within"] is True


def test_run_says_where_outputs_differ_and_keeps_them(run: Run, plan: str, tmp_path: Path) -> None:
    run("run", plan, *MOCK, "--seed", 1, "-o", "one.npz").succeeded()
    other = run("run", plan, *MOCK, "--seed", 2, "-o", "two.npz", "--reference", "one.npz", "--json")
    other.failed(1, "1 of 1 outputs differ from one.npz", "'probabilities'")
    assert other.json["within"] is False
    assert (tmp_path / "two.npz").is_file()


def test_run_takes_inputs_of_every_kind(run: Run, plan: str, tmp_path: Path) -> None:
    image = np.random.default_rng(1).uniform(0, 16, (2, 1, 8, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", image)
    (tmp_path / "x.raw").write_bytes(image.tobytes())
    outputs = []
    for spec, shapes in (("x.npy", ()), ("image=x.npy", ()), ("image:x.raw", ("--shapes", "image:2x1x8x8"))):
        run("run", plan, *MOCK, "--input", spec, *shapes, "-o", "o.npz").succeeded()
        with np.load(tmp_path / "o.npz") as saved:
            outputs.append(saved["probabilities"])
    assert outputs[0].shape == (2, 10)
    assert all((each == outputs[0]).all() for each in outputs)


def test_run_takes_an_image(run: Run, plan: str, tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    pillow.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "x.png")
    found = run("run", plan, *MOCK, "--input", "x.png", "--image-scale", 1, "--json").succeeded().json
    assert found["inputs"]["image"]["max"] == 63
    assert found["inputs"]["image"]["shape"] == [1, 1, 8, 8]


def test_run_builds_a_model_for_its_shapes(run: Run) -> None:
    found = run("run", DIGITS, *MOCK, "--shapes", "image:3x1x8x8", "--range", "image=0:16", "--json").succeeded().json
    assert found["outputs"]["probabilities"]["shape"] == [3, 10]
    assert 0 <= found["inputs"]["image"]["min"] <= found["inputs"]["image"]["max"] < 16


def test_run_exports_json_as_trtexec_does(run: Run, plan: str, tmp_path: Path) -> None:
    import json

    run("run", f"--loadEngine={plan}", *MOCK, "--shapes=image:1x1x8x8", "--exportOutput=o.json").succeeded()
    (output,) = json.loads((tmp_path / "o.json").read_text())
    assert (output["name"], output["dimensions"], len(output["values"])) == ("probabilities", "1x10", 10)


def test_compare(run: Run, samples: str) -> None:
    found = run("compare", DIGITS, *MOCK, "--data", samples, "--precision", "fp16", "--fail-above", 0.1, "--json")
    comparison = found.succeeded().json["comparison"]
    assert 0 < comparison["outputs"]["probabilities"]["relative"] < 0.1
    assert comparison["layers"]
    wrong = run("compare", DIGITS, *MOCK, "--data", samples, "--precision", "fp16", "--fail-above", 0)
    wrong.failed(1, "'probabilities' has a relative error of")
    assert "SNR" in wrong.out


def test_compare_with_a_plan(run: Run, plan: str, samples: str) -> None:
    found = run("compare", DIGITS, "--engine", plan, *MOCK, "--data", samples, "--json").succeeded().json
    assert found["comparison"]["outputs"]["probabilities"]["max_abs"] < 1e-5


def test_calibrate(run: Run, tmp_path: Path, samples: str) -> None:
    found = run("calibrate", DIGITS, "--calibration-data", samples, "--calibration-cache", "ranges.json", "-o",
                "q.onnx", "--calibration-method", "minmax", "--json").succeeded().json  # fmt: skip
    assert found["ranges"]
    assert set(found["quantized"]) == {"layer0", "layer1", "layer2"}
    described = run("inspect", "q.onnx", "--json").succeeded().json
    assert described["operators"]["QuantizeLinear"] >= 3
    assert (tmp_path / "ranges.json").is_file()
    printed = run("calibrate", DIGITS, "--calibration-data", samples, "--calibration-cache", "ranges.json",
                  "--calibration-method", "minmax").succeeded().out  # fmt: skip
    assert "3 nodes quantized" in printed


def test_build_finds_the_ranges_that_calibrate_found(run: Run, tmp_path: Path, samples: str) -> None:
    said = ("--calibration-data", samples, "--calibration-cache", "ranges.json")
    run("calibrate", DIGITS, *said).succeeded()
    before = (tmp_path / "ranges.json").read_bytes()
    run("build", DIGITS, *MOCK, "-o", "p.plan", "--precision", "int8", *said).succeeded()
    assert (tmp_path / "ranges.json").read_bytes() == before


def test_bench_takes_its_batch_from_the_shapes(run: Run) -> None:
    said = ("--contender", "engine", "--rounds", 1, "--requests", 2, "--warmup-limit", 0.1)
    found = run("bench", DIGITS, *MOCK, "--shapes", "image:3x1x8x8", *said, "--json").succeeded().json
    assert found["contenders"][0]["batch"] == 3
    run("bench", DIGITS, *MOCK, "--shapes", "a:3x1,b:4x1", *said).failed(2, "say --batch")


def test_convert_an_onnx_model(run: Run, tmp_path: Path) -> None:
    found = run("convert", DIGITS, "-o", "c.onnx", "--no-simplify", "--target", "mock", "--json").succeeded().json
    assert found["report"]["format"] == "onnx"
    assert found["report"]["operators"]["supported"] is True
    assert (tmp_path / "c.onnx").is_file()


def test_cache_commands(run: Run, engine_cache_root: Path) -> None:
    assert run("cache", "path").succeeded().out.strip() == str(engine_cache_root)
    assert run("cache", "list", "--json").succeeded().json["entries"] == []
    run("run", DIGITS, *MOCK).succeeded()
    (entry,) = run("cache", "list", "--json").succeeded().json["entries"]
    assert entry["model"] == "digits.onnx"
    assert entry["key"][:12] in run("cache", "list").succeeded().out
    assert run("cache", "verify", "--json").succeeded().json["removed"] == {}
    assert run("cache", "prune", "--older-than", 1).succeeded().out.startswith("1 files, 0 removed")
    assert len(run("cache", "prune", "--max-size", "1K", "--json").succeeded().json["removed"]) == 1
    run("run", DIGITS, *MOCK).succeeded()
    run("cache", "clear").failed(2, "give --yes")
    assert len(run("cache", "clear", "--yes", "--json").succeeded().json["removed"]) == 1


@pytest.mark.parametrize("answer", [True, False])
def test_cache_clear_asks_on_a_terminal(run: Run, monkeypatch: pytest.MonkeyPatch, answer: bool) -> None:
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    run("run", DIGITS, *MOCK).succeeded()
    monkeypatch.setattr("sys.stdin", Terminal("y\n" if answer else "n\n"))
    ran = run("cache", "clear")
    assert ran.code == (0 if answer else 1)
    assert "Remove all 1 plans in" in ran.err
    assert len(run("cache", "list", "--json").json["entries"]) == (0 if answer else 1)


def test_cache_in_a_folder_of_its_own(run: Run, tmp_path: Path) -> None:
    assert run("cache", "path", "--dir", tmp_path / "elsewhere").succeeded().out.strip() == str(tmp_path / "elsewhere")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(run: Run, shell: str) -> None:
    assert "_TRTX_COMPLETE" in run("completion", shell).succeeded().out
    assert run("completion", shell, "--json").succeeded().json["shell"] == shell


def test_completion_completes_options_and_backends(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.shell_completion import ShellComplete

    from trtx_py.cli._app import app

    complete = ShellComplete(app, {}, "trtx", "_TRTX_COMPLETE")
    assert "build" in {each.value for each in complete.get_completions([], "bu")}
    assert "--precision" in {each.value for each in complete.get_completions(["build"], "--prec")}
    assert "fp16" in {each.value for each in complete.get_completions(["build", "--precision"], "f")}
    assert "tensorrt_rtx+mock" in {each.value for each in complete.get_completions(["run", "--backend"], "tensorrt_")}


def test_bench_and_compare_results(run: Run, tmp_path: Path) -> None:
    found = run("bench", DIGITS, *MOCK, "--contender", "engine", "--contender", "bare", "--rounds", 2, "--requests", 4,
                "--warmup-limit", 0.2, "-o", "b.json", "--markdown", "b.md", "--json").succeeded().json  # fmt: skip
    assert [each["name"] for each in found["contenders"]] == ["engine", "bare"]
    assert found["meaningful"] is False
    assert "engine" in (tmp_path / "b.md").read_text()
    same = run("bench", "--compare", "b.json", "b.json", "--json").succeeded().json
    assert same["ok"] is True
    worse = (tmp_path / "b.json").read_text().replace('"bare"', '"gone"')
    (tmp_path / "worse.json").write_text(worse)
    run("bench", "--compare", "b.json", "worse.json").failed(1, "bare", "missing")


def test_bench_of_sweeps(run: Run) -> None:
    found = run("bench", DIGITS, *MOCK, "--batch-sweep", "1,2", "--graphs-on-off", "--precisions", "model,fp16",
                "--rounds", 1, "--iterations", 3, "--warmup-limit", 0.1, "--no-accuracy").succeeded().out  # fmt: skip
    for name in ("engine b2", "graphs off b1", "graphs on b1", "fp16 b1"):
        assert name in found


def test_profile_writes_reports(run: Run, tmp_path: Path, plan: str) -> None:
    found = run("profile", plan, *MOCK, "--iterations", 5, "--warmup", 2, "--runs", 2, "-o", "p.json", "--trace",
                "t.json", "--markdown", "p.md", "--shapes", "image:2x1x8x8", "--json").succeeded().json  # fmt: skip
    assert found["requests"] == 5
    assert {path.name for path in tmp_path.iterdir()} >= {"p.json", "t.json", "p.md"}
    assert "Latency" in run("profile", plan, *MOCK, "--iterations", 2, "--no-layers", "--no-stages").succeeded().out
