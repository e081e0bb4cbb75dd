"""The GPU kit for both sides: real plans on a GPU, and plans of the same models that the mock builds."""

from __future__ import annotations

import asyncio
import importlib.util
import os
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import onnx
import pytest

import trtx_py as trtx
from tests.conftest import kit_folder

T = TypeVar("T")
Range = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

BACKEND = "tensorrt_dispatch"

#: Built on 8.6 without PROFILE_SHARING_0806: one context at a time on their one profile.
NON_SHARING = ("magika.fp32.vcx", "silero_seq.fp32.vcx", "ocr_cls.fp16.vcx", "shape_input.fp32.vcx")
#: Built for several contexts at once; the two without a dynamic axis allow them although they were not built for it.
SHARING = ("mlp.fp32.vcx", "mlp_profiles.fp32.vcx", "multi_io.fp16.vcx", "mnist_cnn.fp16.vcx", "bert_small.fp16.vcx")
STATIC = ("static.fp32.vcx", "hello.fp32.vcx")


def _batch(low: int, best: int, high: int, *rest: int) -> Range:
    return ((low, *rest), (best, *rest), (high, *rest))


_MLP = {"x": _batch(1, 8, 256, 64)}
_TEXT: Range = ((1, 8), (8, 128), (32, 512))

#: Profiles of the plans, as the kit's README gives them; by the engine's name without precision and suffix.
PROFILES: dict[str, list[dict[str, Range]]] = {
    "static": [],
    "hello": [],
    "mlp": [_MLP],
    "mlp_profiles": [{"x": _batch(1, 8, 8, 64)}, {"x": _batch(9, 256, 256, 64)}],
    "mnist_cnn": [{"image": _batch(1, 8, 64, 1, 28, 28)}],
    "multi_io": [{name: _batch(1, 4, 32, 8) for name in "abc"}],
    "shape_input": [{"shape": ((1, 4), (5, 4), (8, 4))}],
    "scale_big": [{"x": _batch(1, 4, 16, 1048576)}],
    "slow": [{"x": _batch(1, 512, 8192, 2048)}],
    "superres": [{"input": _batch(1, 1, 4, 1, 224, 224)}],
    "silero_seq": [{"input": _batch(1, 8, 64, 576)}],
    "magika": [{"bytes": _batch(1, 2, 8, 2048)}],
    "ocr_cls": [{"x": _batch(1, 3, 8, 3, 48, 192)}],
    "bert_small": [{"input_ids": _TEXT, "attention_mask": _TEXT}],
    "resnet50": [{"image": _batch(1, 32, 64, 3, 224, 224)}],
}


def run(main: Coroutine[Any, Any, T]) -> T:
    """The GPU machine may lack pytest's asyncio plugin: these tests bring their own loop."""
    return asyncio.run(main)


class Kit:
    """The kit's folder: cases, models and, on the GPU machine, plans."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._cases = _module(folder / "cases.py")
        self.cases: list[dict[str, Any]] = self._cases.load_cases()

    def inputs(self, case: Mapping[str, Any]) -> dict[str, Any]:
        return dict(self._cases.make_inputs(case))

    def expected(self, case: Mapping[str, Any]) -> dict[str, Any]:
        return dict(self._cases.expected_outputs(case))

    def case(self, engine: str, number: int = 0) -> dict[str, Any]:
        return [case for case in self.cases if case["engine"] == engine][number]

    def error(self, outputs: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
        """The largest relative error of any output; infinite if a name or a shape is wrong."""
        if outputs.keys() != expected.keys():
            return float("inf")
        return max(
            float(self._cases.relative_error(outputs[name], want))
            if outputs[name].shape == want.shape
            else float("inf")
            for name, want in expected.items()
        )

    def check(self, case: Mapping[str, Any], outputs: Mapping[str, Any]) -> float:
        """The error of one case; raises AssertionError if it is beyond the case's tolerance."""
        found = self.error(outputs, self.expected(case))
        assert found <= case["relative_error"], f"{case['engine']}: {found:.2e}, allowed {case['relative_error']:.0e}"
        return found

    def model(self, engine: str) -> bytes:
        """The ONNX model that a plan was built from."""
        stem = engine.split(".", 1)[0]
        path = self.folder / "onnx" / f"{'mlp' if stem == 'mlp_profiles' else stem}.onnx"
        if not path.is_file():
            made: onnx.ModelProto = _module(self.folder / "models.py").ALL[stem][0]()
            return made.SerializeToString()
        model = onnx.load(path)
        for value in model.graph.input:
            for axis, dim in enumerate(value.type.tensor_type.shape.dim):
                if dim.dim_param == "?":  # one name for two axes: the plan's maker named them apart too
                    dim.dim_param = f"{value.name}_axis{axis}"
        return model.SerializeToString()


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"gpu_kit_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_kit() -> Kit | None:
    """The kit of this machine, None where there is none."""
    folder = kit_folder()
    return None if folder is None else Kit(folder)


class Side(Protocol):
    """Where a test body runs: the same plans by name, and a runtime for them."""

    name: str
    kit: Kit

    def runtime(self) -> trtx.Runtime: ...
    def plan(self, engine: str) -> trtx.Plan: ...
    def foreign_runtime(self) -> trtx.Runtime:
        """One of a version that these plans do not fit."""
        ...

    def slow_inputs(self) -> dict[str, Any]:
        """For slow.fp32.vcx: long enough that a task can be cancelled while it runs."""
        ...


class GpuSide:
    """Plans of 8.6 through the dispatch runtime and the lean library."""

    name = "gpu"

    def __init__(self, kit: Kit) -> None:
        missing = [v for v in ("TRTX_GPU_KIT", "TRTX_LEAN_LIBRARY") if not os.environ.get(v)]
        if missing:
            pytest.skip(f"not set up for a GPU: {', '.join(missing)} not set (the kit's setup.sh sets them)")
        self.kit = kit

    def runtime(self) -> trtx.Runtime:
        return trtx.Runtime(backend=BACKEND)

    def plan(self, engine: str) -> trtx.Plan:
        return trtx.Plan.load(self.kit.folder / "engines" / f"{engine}.engine")

    def foreign_runtime(self) -> trtx.Runtime:
        kept = os.environ.pop("TRTX_LEAN_LIBRARY")
        try:
            return trtx.Runtime(backend=BACKEND)
        finally:
            os.environ["TRTX_LEAN_LIBRARY"] = kept

    def slow_inputs(self) -> dict[str, Any]:
        return {"x": np.zeros((8192, 2048), np.float32)}


def pool_options(side: Side) -> dict[str, Any]:
    """What a MultiDevice of this side's plans is opened with."""
    return {"backend": side.backend if isinstance(side, MockSide) else BACKEND}


class MockSide:
    """Plans that the mock builds from the kit's models; each is built once."""

    name = "mock"
    _plans: dict[str, trtx.Plan] = {}  # noqa: RUF012 - shared on purpose: a plan is a value

    def __init__(self, kit: Kit) -> None:
        from mock_backend import MockBackend

        self.kit = kit
        self.backend = MockBackend(devices=2)

    def runtime(self) -> trtx.Runtime:
        return trtx.Runtime(backend=self.backend)

    def plan(self, engine: str) -> trtx.Plan:
        if engine not in self._plans:
            self._plans[engine] = self._build(engine)
        return self._plans[engine]

    def _build(self, engine: str) -> trtx.Plan:
        with (
            trtx.Builder(backend=self.backend) as builder,
            builder.create_network() as network,
            builder.create_config() as config,
        ):
            network.parse_onnx(self.kit.model(engine))
            config.profile_sharing = engine not in NON_SHARING
            for ranges in PROFILES[engine.split(".", 1)[0]]:
                with builder.create_optimization_profile() as profile:
                    for name, limits in ranges.items():
                        profile.set_shape(name, *limits)
                    config.add_optimization_profile(profile)
            return builder.build_serialized_network_sync(network, config)

    def foreign_runtime(self) -> trtx.Runtime:
        from mock_backend import MockBackend

        return trtx.Runtime(backend=MockBackend(version="2.0.0.0"))

    def slow_inputs(self) -> dict[str, Any]:
        return {"x": np.zeros((64, 2048), np.float32)}
