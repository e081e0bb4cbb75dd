"""Models that others made: the GPU kit's, the onnx package's light zoo, and what packages on the index carry.

One entry per model: where it is, the profile it is built with, seeded inputs, and what the ONNX parser and the builder
of TensorRT-RTX say to it. The last is an expectation, so that a change of theirs (or of ours) is noticed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.conftest import kit_folder

Range = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
Feeds = dict[str, np.ndarray[Any, Any]]

LIGHT_FOLDER = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"


@dataclass(frozen=True)
class Refusal:
    """What TensorRT-RTX says: the error's type, and parts of the first issue's node, operator and reason."""

    error: str
    node: str = ""
    operator: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Model:
    """One model.

    Attributes:
        origin: "kit", "light", or the import name of the package that carries it.
        file: relative to the kit's onnx folder, the light zoo, or the package.
        profile: ranges of its dynamic inputs (values for a shape tensor).
        apart: its exporter named different axes alike ("?"), which TensorRT takes at its word: name them apart first.
        make: seeded inputs for one inference, inside the profile.
        rtx: None if TensorRT-RTX builds it, else how it refuses.
        tolerance: relative error of the mock against ONNX Runtime.
    """

    name: str
    origin: str
    file: str
    make: Callable[[np.random.Generator], Feeds]
    profile: Mapping[str, Range] = field(default_factory=dict)
    apart: bool = False
    rtx: Refusal | None = None
    tolerance: float = 1e-5

    def path(self) -> Path:
        """Where the model lies; skips the test, with the reason, if it is not on this machine."""
        if self.origin == "kit":
            kit = kit_folder()
            if kit is None:
                pytest.skip("no GPU kit here: neither TRTX_GPU_KIT nor ../shared/gpu-kit")
            found = kit / "onnx" / self.file
        elif self.origin == "light":
            found = LIGHT_FOLDER / self.file
        else:
            # Found without importing: these packages are installed without what they themselves need.
            spec = importlib.util.find_spec(self.origin)
            if spec is None or not spec.submodule_search_locations:
                pytest.skip(f"the package {self.origin} is not installed (tests/requirements-models.txt)")
            found = Path(next(iter(spec.submodule_search_locations))) / self.file
        if not found.is_file():
            pytest.skip(f"{found} does not exist in this version of {self.origin}")
        return found

    def source(self) -> bytes:
        """The model itself; skips as ``path``."""
        data = self.path().read_bytes()
        if not self.apart:
            return data
        model = onnx.load_from_string(data)
        for value in model.graph.input:
            for axis, dim in enumerate(value.type.tensor_type.shape.dim):
                if dim.dim_param == "?":
                    dim.dim_param = f"{value.name}_axis{axis}"
        return model.SerializeToString()

    def profiles(self) -> list[dict[str, Range]] | None:
        """For ``open_engine``."""
        return [dict(self.profile)] if self.profile else None

    def inputs(self) -> Feeds:
        """The same every time."""
        return self.make(np.random.default_rng(20240))


def normal(**shapes: tuple[int, ...]) -> Callable[[np.random.Generator], Feeds]:
    """Standard normal float32 inputs of these shapes."""
    return lambda rng: {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def _ramp(name: str) -> Callable[[np.random.Generator], Feeds]:
    """The input that the light zoo's expected outputs were made with."""
    count = 3 * 224 * 224
    return lambda rng: {name: (np.arange(count).reshape(1, 3, 224, 224) / count).astype(np.float32)}


def _batch(low: int, best: int, high: int, *rest: int) -> Range:
    return ((low, *rest), (best, *rest), (high, *rest))


def _magika(rng: np.random.Generator) -> Feeds:
    return {"bytes": rng.integers(0, 257, (2, 2048)).astype(np.int32)}


def _multi_io(rng: np.random.Generator) -> Feeds:
    return {
        "a": rng.standard_normal((3, 8)).astype(np.float32),
        "b": rng.integers(-20, 20, (3, 8)).astype(np.int32),
        "c": rng.standard_normal((3, 8)).astype(np.float16),
    }


def _shape_input(rng: np.random.Generator) -> Feeds:
    return {"x": rng.standard_normal((1, 4)).astype(np.float32), "shape": np.array([5, 4], np.int32)}


def _silero(batch: int, samples: int, *, rate: bool) -> Callable[[np.random.Generator], Feeds]:
    def make(rng: np.random.Generator) -> Feeds:
        feeds: Feeds = {
            "input": rng.standard_normal((batch, samples)).astype(np.float32),
            "state": rng.standard_normal((2, batch, 128)).astype(np.float32),
        }
        if rate:
            feeds["sr"] = np.array(16000, np.int64)
        return feeds

    return make


_SILERO = {"input": ((1, 576), (1, 576), (4, 576)), "state": ((2, 1, 128), (2, 1, 128), (2, 4, 128))}
_SEQUENCE = normal(input=(5, 576), h=(1, 1, 128), c=(1, 1, 128))
_MAGIKA = {"bytes": _batch(1, 2, 8, 2048)}
_CLS = {"x": _batch(1, 3, 8, 3, 48, 192)}

_SAME_NAME = Refusal("BuilderError", reason="Input dimensions with this name have different constant values")
#: If-branches of these exports have outputs whose rank the builder cannot know.
_SCOPE = Refusal("BuilderError", reason="graphScope.cpp")

KIT = (
    Model("hello", "kit", "hello.onnx", normal(input=(1, 3))),
    Model("static", "kit", "static.onnx", normal(x=(2, 16))),
    Model("mlp", "kit", "mlp.onnx", normal(x=(5, 64)), {"x": _batch(1, 8, 256, 64)}),
    Model("mnist_cnn", "kit", "mnist_cnn.onnx", normal(image=(3, 1, 28, 28)), {"image": _batch(1, 8, 64, 1, 28, 28)}),
    Model("multi_io", "kit", "multi_io.onnx", _multi_io, {name: _batch(1, 4, 32, 8) for name in "abc"}),
    Model("shape_input", "kit", "shape_input.onnx", _shape_input, {"shape": ((1, 4), (5, 4), (8, 4))}),
    Model("scale_big", "kit", "scale_big.onnx", normal(x=(2, 1048576)), {"x": _batch(1, 4, 16, 1048576)}),
    Model("superres", "kit", "superres.onnx", normal(input=(1, 1, 224, 224)), {"input": _batch(1, 1, 4, 1, 224, 224)}),
    Model("silero_seq", "kit", "silero_seq.onnx", _SEQUENCE, {"input": _batch(1, 8, 64, 576)}),
    Model("magika", "kit", "magika.onnx", _magika, _MAGIKA),
    Model("ocr_cls", "kit", "ocr_cls.onnx", normal(x=(3, 3, 48, 192)), _CLS, apart=True),
    Model("ocr_cls-as-it-is", "kit", "ocr_cls.onnx", normal(x=(3, 3, 48, 192)), _CLS, rtx=_SAME_NAME),
)

LIGHT = tuple(
    Model(f"light_{name}", "light", f"light_{name}.onnx", _ramp(tensor))
    for name, tensor in {
        "bvlc_alexnet": "data_0", "densenet121": "data_0", "inception_v1": "data_0", "inception_v2": "data_0",
        "resnet50": "gpu_0/data_0", "shufflenet": "gpu_0/data_0", "squeezenet": "data_0", "vgg19": "data_0",
        "zfnet512": "gpu_0/data_0",
    }.items()
)  # fmt: skip

PACKAGES = (
    Model("magika-package", "magika", "models/standard_v3_3/model.onnx", _magika, _MAGIKA),
    Model(
        "silero", "silero_vad", "data/silero_vad.onnx", _silero(2, 576, rate=True), _SILERO, rtx=_SCOPE,
    ),
    Model(
        "silero-op15", "silero_vad", "data/silero_vad_16k_op15.onnx", _silero(2, 576, rate=True),
        _SILERO, rtx=_SCOPE,
    ),
    Model("silero-sequence", "silero_vad", "data/silero_vad_16k_sequence.onnx", _SEQUENCE,
          {"input": _batch(1, 8, 64, 576)}),
    Model("silero-half", "silero_vad", "data/silero_vad_half.onnx", _silero(2, 576, rate=False), _SILERO,
          rtx=_SCOPE),
    Model(
        "silero-ifless", "silero_vad", "data/silero_vad_op18_ifless.onnx", _silero(2, 576, rate=True),
        _SILERO,
    ),
    Model("silero-openvino", "silero_vad", "data/silero_vad_openvino_16k.onnx", _silero(1, 576, rate=False)),
    Model(
        "ocr-det", "rapidocr_onnxruntime", "models/ch_PP-OCRv4_det_infer.onnx", normal(x=(1, 3, 96, 160)),
        {"x": ((1, 3, 32, 32), (1, 3, 96, 160), (1, 3, 320, 320))},
    ),
    Model(
        "ocr-rec", "rapidocr_onnxruntime", "models/ch_PP-OCRv4_rec_infer.onnx", normal(x=(2, 3, 48, 160)),
        {"x": ((1, 3, 48, 32), (2, 3, 48, 160), (4, 3, 48, 640))},
    ),
    Model("ocr-cls", "rapidocr_onnxruntime", "models/ch_ppocr_mobile_v2.0_cls_infer.onnx", normal(x=(3, 3, 48, 192)),
          _CLS, apart=True),
)  # fmt: skip

ALL = (*KIT, *LIGHT, *PACKAGES)


def as_parameters(models: tuple[Model, ...] = ALL) -> list[Any]:
    """For ``pytest.mark.parametrize``; what needs the kit or a package carries the marker ``models``."""
    return [pytest.param(m, id=m.name, marks=[] if m.origin == "light" else [pytest.mark.models]) for m in models]
