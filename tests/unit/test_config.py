"""BuilderConfig and OptimizationProfile: what they take, and what reaches the build."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import trtx_py as trtx
from mock_backend import MockBackend
from trtx_py._types import BuildOptions


@pytest.fixture
def builder(mock_backend: MockBackend) -> Iterator[trtx.Builder]:
    with trtx.Builder(None, mock_backend) as made:
        yield made


@pytest.fixture
def config(builder: trtx.Builder) -> Iterator[trtx.BuilderConfig]:
    with builder.create_config() as made:
        yield made


def test_defaults(config: trtx.BuilderConfig) -> None:
    assert config._snapshot() == BuildOptions()


def test_everything_reaches_the_build(config: trtx.BuilderConfig, builder: trtx.Builder) -> None:
    config.workspace_bytes = 1 << 30
    config.precision = "fp16"
    config.compute_capabilities = ["8.9", "9.0"]
    config.optimization_level = 5
    config.max_aux_streams = 0
    config.profile_sharing = False
    config.set_flag("tf32")
    config.set_flag("VERSION_COMPATIBLE")
    config.set_flag("DEBUG")
    config.clear_flag("debug")
    config.clear_flag("never set")
    with builder.create_optimization_profile() as profile:
        profile.set_shape("x", [1, 4], np.array([2, 4]), (8, 4))
        assert config.add_optimization_profile(profile) == 0
    limits = trtx.ShapeRange((1, 4), (2, 4), (8, 4))
    assert config.optimization_profiles == ({"x": limits},)
    assert config.flags == {"TF32", "VERSION_COMPATIBLE"}
    assert config._snapshot() == BuildOptions(
        workspace_bytes=1 << 30, precision="fp16", compute_capabilities=("8.9", "9.0"),
        flags=("TF32", "VERSION_COMPATIBLE"), optimization_level=5, max_aux_streams=0, profile_sharing=False,
        profiles=({"x": limits},),
    )  # fmt: skip
    config.compute_capabilities = "7.5"  # one is enough
    assert config.compute_capabilities == ("7.5",)
    for name in ("workspace_bytes", "precision", "optimization_level", "max_aux_streams"):
        setattr(config, name, None)
        assert getattr(config, name) is None


BAD: list[tuple[str, list[Any]]] = [
    ("workspace_bytes", [-1, 1.5, "1", True]),
    ("precision", ["fp17", "", 16, b"fp16"]),
    ("compute_capabilities", ["sm_89", "8", "8.9.0", ["8.9", "x.y"], [8.9, None]]),
    ("optimization_level", [-1, 6, 2.0, "3"]),
    ("max_aux_streams", [-1, 8, False]),
    ("profile_sharing", ["no", None, 1]),
]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD for value in values])
def test_bad_values_change_nothing(name: str, value: Any, config: trtx.BuilderConfig) -> None:
    before = config._snapshot()
    with pytest.raises(trtx.InvalidArgumentError):
        setattr(config, name, value)
    assert config._snapshot() == before


@pytest.mark.parametrize("flag", ["", "not a name", "1X", None, 5])
def test_bad_flags(flag: Any, config: trtx.BuilderConfig) -> None:
    with pytest.raises(trtx.InvalidArgumentError, match="flag"):
        config.set_flag(flag)
    assert config.flags == frozenset()


def test_profile_is_copied_once(builder: trtx.Builder, config: trtx.BuilderConfig) -> None:
    with builder.create_optimization_profile() as profile:
        with pytest.raises(trtx.InvalidArgumentError, match="is empty"):
            config.add_optimization_profile(profile)
        profile.set_shape("x", (1,), (2,), (3,))
        profile.set_shape("x", (1,), (2,), (4,))  # replaced
        assert profile.ranges == {"x": trtx.ShapeRange((1,), (2,), (4,))}
        with pytest.raises(TypeError):
            profile.ranges["x"] = None  # type: ignore[index]
        config.add_optimization_profile(profile)
        with pytest.raises(trtx.InvalidArgumentError, match="holds a copy"):
            profile.set_shape("x", (1,), (2,), (5,))
        assert config.add_optimization_profile(profile) == 1  # the same ranges twice: two contexts of a plan
    assert len(config.optimization_profiles) == 2
    for thing in (None, {"x": 1}, config):
        with pytest.raises(trtx.InvalidArgumentError, match="expected what"):
            config.add_optimization_profile(thing)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("minimum", "optimum", "maximum"),
    [
        ((2,), (1,), (3,)), ((1,), (4,), (3,)), ((1, 2), (2,), (3,)), ((1,), (1,), (2**31,)),
        ((1.5,), (2,), (3,)), ((float("nan"),), (2,), (3,)), ("1", "2", "3"), (1, 2, 3), ((None,), (1,), (1,)),
        ((1,) * 9, (1,) * 9, (1,) * 9), ((True,), (True,), (True,)),
    ],
)  # fmt: skip
def test_bad_ranges(minimum: Any, optimum: Any, maximum: Any, builder: trtx.Builder) -> None:
    with builder.create_optimization_profile() as profile:
        with pytest.raises(trtx.ShapeError):
            profile.set_shape("x", minimum, optimum, maximum)
        assert profile.ranges == {}


@pytest.mark.parametrize("name", ["", None, 5, b"x"])
def test_bad_names(name: Any, builder: trtx.Builder) -> None:
    with builder.create_optimization_profile() as profile, pytest.raises(trtx.InvalidArgumentError, match="non-empty"):
        profile.set_shape(name, (1,), (1,), (1,))
