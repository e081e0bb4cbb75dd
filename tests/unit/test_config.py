"""BuilderConfig and OptimizationProfile: what they take, and what reaches the build."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import trtx_py as trtx
from mock_backend import MockBackend
from tests.unit.ownership import matmul_model
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


@pytest.mark.parametrize("value", [[8.9], 8.9, None, 5, [None], [b"8.9"], b"8.9", ["8"], ["8.x"], ["8.\u00b2"]])
def test_bad_compute_capabilities(value: Any, config: trtx.BuilderConfig) -> None:
    with pytest.raises(trtx.InvalidArgumentError, match=r'expected text .*"8.9"'):
        config.compute_capabilities = value
    assert config.compute_capabilities == ()


@pytest.mark.parametrize("flag", [5, None, b"TF32"])
def test_flags_that_are_not_names(flag: Any, config: trtx.BuilderConfig) -> None:
    for change in (config.set_flag, config.clear_flag):
        with pytest.raises(trtx.InvalidArgumentError, match=r"flag is .*nvinfer1::BuilderFlag"):
            change(flag)


class _BytesPath:
    def __fspath__(self) -> bytes:
        return b"x"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"profiles": {}}, "profiles is dict; expected a list of mappings: [{'x': (min, opt, max)}]"),
        ({"profiles": "x"}, "profiles is str"),
        ({"profiles": ((1, 2, 3),)}, "profile 0 is tuple; expected {'x': (min, opt, max)}"),
        ({"compute_capabilities": [8.9]}, "compute capability is 8.9"),
        ({"compute_capabilities": None}, "compute_capabilities is None"),
        ({"flags": 5}, "flags is 5"),
        ({"flags": [5]}, "flag is 5"),
        ({"lanes": 0}, "lanes is 0"),
        ({"lanes": "2"}, "lanes is '2'"),
        ({"noncontiguous": "maybe"}, "noncontiguous is 'maybe'"),
        ({"lean_library": 5}, "lean_library is int"),
        ({"lean_library": _BytesPath()}, "lean_library is _BytesPath of bytes"),
        ({"lean_library": "/missing/lean.so"}, "lean_library '/missing/lean.so' is not a file"),
    ],
    ids=str,
)
async def test_open_engine_refuses_before_it_builds(
    options: dict[str, Any], words: str, mock_backend: MockBackend
) -> None:
    with pytest.raises(trtx.InvalidArgumentError) as caught:
        async with trtx.open_engine(matmul_model(), mock_backend, **options):
            pass
    assert words in str(caught.value)
    assert not mock_backend.calls["build_serialized_network"]


@pytest.mark.parametrize("source", [5, _BytesPath()])
async def test_open_engine_refuses_sources(source: Any, mock_backend: MockBackend) -> None:
    with pytest.raises(trtx.InvalidArgumentError, match=r"source is .*expected a path, bytes or a Plan"):
        async with trtx.open_engine(source, mock_backend):
            pass


async def test_one_flag_alone(mock_backend: MockBackend) -> None:
    async with trtx.open_engine(matmul_model(), mock_backend, flags="TF32") as engine:
        assert engine._header.build_options["flags"] == ["TF32"]


@pytest.mark.parametrize("backend", [123, object(), MockBackend, ["mock"], b"mock"])
def test_backends_that_are_none(backend: Any) -> None:
    for kind in (trtx.Builder, trtx.Runtime):
        with pytest.raises(trtx.InvalidArgumentError, match=r"backend is .*expected None, one of mock, "):
            kind(None, backend)
