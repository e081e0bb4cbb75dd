"""Real PyTorch: every way in which a model of it is kept, converted, and run on the mock with the same numbers.

Needs torch: ``pip install torch==2.13.0 onnxscript safetensors``, in the environment of the tests, or in another one
whose interpreter TRTX_TORCH_PYTHON names. scripts/test-long runs it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trtx_py as trtx

HERE = Path(__file__).parent
PYTHON = os.environ.get("TRTX_TORCH_PYTHON") or sys.executable
TOLERANCE = 1e-4
IMAGE: dict[str, Any] = {"inputs": {"image": (1, 3, 64, 64)}, "dynamic_axes": {"image": {0: "batch"}}}
TEXT: dict[str, Any] = {
    "inputs": {"ids": trtx.InputSpec((2, 7), "int64", 0, 100), "mask": trtx.InputSpec((2, 7), "float32", 0, 1)},
    "dynamic_axes": {"ids": {0: "batch", 1: "words"}, "mask": {0: "batch", 1: "words"}},
}

# ``files`` runs once in an interpreter with torch: models in every kind of file, and what torch computes with them.
_MAKE = """
import sys, numpy as np, torch, warnings
warnings.simplefilter("ignore")
from safetensors.torch import save_file
import torch_nets as nets
folder = sys.argv[1]
torch.set_grad_enabled(False)
rng = np.random.default_rng(3)
image = rng.standard_normal((3, 3, 64, 64)).astype(np.float32)
ids, mask = rng.integers(0, 100, (3, 12)), (rng.random((3, 12)) > 0.3).astype(np.float32)
x = rng.standard_normal((5, 8)).astype(np.float32)
t = torch.from_numpy
resnet, block, gated = nets.resnet18(), nets.transformer(), nets.gated()
text = block(t(ids), t(mask))
np.savez(f"{folder}/expected.npz", image=image, ids=ids, mask=mask, x=x, logits=resnet(t(image)).numpy(),
         hidden=text["hidden"].numpy(), pooled=text["pooled"].numpy(), positive=gated(t(abs(x))).numpy(),
         negative=gated(t(-abs(x))).numpy())
torch.save(resnet.state_dict(), f"{folder}/weights.pt")
torch.save({"state_dict": resnet.state_dict(), "epoch": 3}, f"{folder}/checkpoint.pth")
torch.save(resnet, f"{folder}/whole.pt")
save_file(resnet.state_dict(), f"{folder}/resnet.safetensors")
save_file(block.state_dict(), f"{folder}/block.safetensors")
batch, words = torch.export.Dim("batch", min=1), torch.export.Dim("words", min=1)
torch.export.save(torch.export.export(block, (t(ids), t(mask)), dynamic_shapes=({0: batch, 1: words},) * 2),
                  f"{folder}/block.pt2")
torch.jit.trace(resnet, t(image)).save(f"{folder}/traced.pt")
torch.jit.script(gated).save(f"{folder}/gated.torchscript")
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        subprocess.run([PYTHON, "-c", "import torch, onnxscript, safetensors"], capture_output=True).returncode != 0,
        reason=f"{PYTHON} has no torch, onnxscript and safetensors; see the top of this file",
    ),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torch")
    subprocess.run(
        [PYTHON, "-c", _MAKE, str(folder)], check=True, timeout=300, env={**os.environ, "PYTHONPATH": str(HERE)}
    )
    return folder


@pytest.fixture(scope="module")
def expected(files: Path) -> dict[str, Any]:
    with np.load(files / "expected.npz") as file:
        return dict(file)


async def converted(source: Any, **options: Any) -> trtx.ConvertedModel:
    made = await trtx.convert(
        source, python=PYTHON, import_path=HERE, target="mock", tolerance=TOLERANCE, timeout_s=600, **options
    )
    report = made.report
    assert report.operators is not None
    assert report.operators.supported, report.operators.issues
    assert report.comparison is not None, report.notes
    for output in report.comparison.outputs:
        print(f"{report.format} {output.name}: {output.max_abs_error:.2e} of {output.max_abs_value:.3g}")
    assert "torch" not in sys.modules or sys.executable == PYTHON
    return made


async def outputs(model: trtx.ConvertedModel, inputs: dict[str, Any]) -> list[Any]:
    async with trtx.open_engine(model.source, backend="mock") as engine:
        return list((await engine.infer(inputs)).values())


def assert_same(found: Any, wanted: Any) -> None:
    error = float(np.max(np.abs(found - wanted)))
    print(f"through open_engine: {error:.2e} of {float(np.max(np.abs(wanted))):.3g}")
    np.testing.assert_allclose(found, wanted, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("torch_nets:resnet18", {}),
        ("weights.pt", {"module": "torch_nets:resnet18"}),
        ("checkpoint.pth", {"module": "torch_nets:resnet18"}),
        ("whole.pt", {"trust": True}),
        ("resnet.safetensors", {"module": "torch_nets:ResNet18"}),
        ("traced.pt", {}),
    ],
)
async def test_resnet18(name: str, options: Any, files: Path, expected: dict[str, Any]) -> None:
    made = await converted(name if ":" in name else files / name, **IMAGE, **options)
    (found,) = await outputs(made, {"image": expected["image"]})
    assert_same(found, expected["logits"])


async def test_transformer_with_dynamic_axes(expected: dict[str, Any]) -> None:
    made = await converted("torch_nets:transformer", **TEXT)
    assert made.report.comparison is not None
    assert made.report.comparison.samples == 2
    found = await outputs(made, {"ids": expected["ids"], "mask": expected["mask"]})
    for one, name in zip(found, ("hidden", "pooled"), strict=True):
        assert_same(one, expected[name])


async def test_transformer_from_safetensors_through_open_engine(files: Path, expected: dict[str, Any]) -> None:
    options = {"module": "torch_nets:transformer", "python": PYTHON, "import_path": HERE, **TEXT}
    async with trtx.open_engine(files / "block.safetensors", backend="mock", conversion=options) as engine:
        found = list((await engine.infer({"ids": expected["ids"], "mask": expected["mask"]})).values())
    for one, name in zip(found, ("hidden", "pooled"), strict=True):
        assert_same(one, expected[name])


async def test_exported_program(files: Path, expected: dict[str, Any]) -> None:
    with pytest.raises(trtx.ConversionError, match="trust=True") as caught:
        await converted(files / "block.pt2")
    assert caught.value.cause == "refused"
    made = await converted(files / "block.pt2", trust=True)
    found = await outputs(made, {"ids": expected["ids"], "mask": expected["mask"]})
    for one, name in zip(found, ("hidden", "pooled"), strict=True):
        assert_same(one, expected[name])


async def test_control_flow_of_torchscript(files: Path, expected: dict[str, Any]) -> None:
    made = await converted(
        files / "gated.torchscript", inputs={"x": (5, 8)}, dynamic_axes={"x": {0: "n"}}, simplify=False
    )
    for name, x in (("positive", abs(expected["x"])), ("negative", -abs(expected["x"]))):
        (found,) = await outputs(made, {"x": x})
        assert_same(found, expected[name])


@pytest.mark.parametrize(
    ("name", "options", "cause", "text"),
    [
        ("whole.pt", IMAGE, "refused", "pickles are code"),
        ("weights.pt", IMAGE, "refused", "give module="),
        ("weights.pt", {**IMAGE, "module": "torch_nets:transformer"}, "damaged", "not those of torch_nets:transformer"),
        ("weights.pt", {**IMAGE, "module": "no_such_module:f"}, "missing", "import_path="),
        ("weights.pt", {**IMAGE, "module": "torch_nets:nothing"}, "refused", "has no 'nothing'"),
        ("torch_nets:not_a_module", IMAGE, "refused", "makes a int"),
        ("torch_nets:resnet18", {}, "refused", "give them in order"),
        ("torch_nets:resnet18", {"inputs": {"image": (1, 4, 64, 64)}}, "failed", "to have 3 channels"),
        ("block.pt2", {"trust": True, "dynamic_axes": {"x": {0: "n"}}, "inputs": {"x": (1,)}}, "refused", "leave out"),
    ],
)
async def test_what_is_refused(name: str, options: Any, cause: str, text: str, files: Path) -> None:
    source = name if ":" in name else files / name
    with pytest.raises(trtx.ConversionError) as caught:
        await converted(source, **options)
    assert caught.value.cause == cause, str(caught.value)
    assert text in str(caught.value)


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pickle that makes the file ``ran`` beside it when it is loaded."""
    folder = tmp_path_factory.mktemp("evil")
    program = (
        "import sys, torch\n"
        "class Evil:\n"
        "    def __reduce__(self): return (open, (sys.argv[2], 'w'))\n"
        "torch.save({'w': Evil()}, sys.argv[1])\n"
    )
    subprocess.run([PYTHON, "-c", program, str(folder / "evil.pt"), str(folder / "ran")], check=True, timeout=120)
    return folder


async def test_a_pickle_that_runs_code_runs_none(evil: Path) -> None:
    with pytest.raises(trtx.ConversionError, match="trust=True"):
        await converted(evil / "evil.pt", module="torch_nets:resnet18", **IMAGE)
    assert os.listdir(evil) == ["evil.pt"]


@pytest.mark.parametrize("name", ["weights.pt", "resnet.safetensors", "traced.pt"])
async def test_damaged_file(name: str, files: Path, tmp_path: Path) -> None:
    content = bytearray((files / name).read_bytes())
    path = tmp_path / name
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(trtx.ConversionError) as caught:
        await converted(path, module="torch_nets:resnet18", **IMAGE)
    assert caught.value.cause == "damaged"
