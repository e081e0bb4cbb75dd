"""Bad input is a typed error that says what was found and expected, and nothing of it reaches the device."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto

import trtx_py as trtx
from mock_backend import MockBackend
from tests.unit.serving import (
    PAIR,
    RESHAPE,
    SPLIT,
    affine,
    build,
    identity_model,
    pair_model,
    reshape_model,
    rows,
    serving_sync,
    split_plan,
)

PAIR_FEEDS: dict[str, Any] = {
    "left": np.zeros((2, 2), np.float32), "right": np.ones((2, 2), np.float32), "fixed": np.arange(3, dtype=np.int32),
}  # fmt: skip


class Untouched:
    """Refusals, each of which must leave the mock exactly as it was: no call of driver or TensorRT for it."""

    def __init__(self, backend: MockBackend, engine: trtx.Engine) -> None:
        self.backend, self.engine = backend, engine

    def refuses(self, inputs: Any, error: type[Exception], *parts: str) -> str:
        before = self.backend.calls
        with pytest.raises(error) as caught:
            self.engine.infer_sync(inputs)
        assert type(caught.value) is error
        assert self.backend.calls == before
        text = str(caught.value)
        for part in parts:
            assert part in text, text
        return text


@pytest.fixture
def pair(mock_backend: MockBackend) -> Iterator[Untouched]:
    with serving_sync(mock_backend, build(pair_model(), [PAIR]), cuda_graphs=False) as engine:
        yield Untouched(mock_backend, engine)


@pytest.fixture
def affine_engine(mock_backend: MockBackend) -> Iterator[Untouched]:
    with serving_sync(mock_backend, cuda_graphs=False) as engine:
        yield Untouched(mock_backend, engine)


def test_wrong_name_suggests_the_close_one(pair: Untouched) -> None:
    feeds = {**PAIR_FEEDS, "lefft": PAIR_FEEDS["left"]}
    del feeds["left"]
    text = pair.refuses(feeds, trtx.InvalidArgumentError, "'left' is missing", "no input 'lefft'", "mean 'left'?")
    assert "input 'right' float32 [?x2]" in text  # what is expected


def test_surplus_name(pair: Untouched) -> None:
    text = pair.refuses({**PAIR_FEEDS, "zzz": 1}, trtx.InvalidArgumentError, "no input 'zzz'")
    assert "mean" not in text
    assert "missing" not in text


def test_names_that_are_not_strings(pair: Untouched) -> None:
    pair.refuses({**PAIR_FEEDS, 7: 1}, trtx.InvalidArgumentError, "no input 7")


def test_missing_inputs_are_all_named(pair: Untouched) -> None:
    pair.refuses({"right": PAIR_FEEDS["right"]}, trtx.InvalidArgumentError, "'left' is missing", "'fixed' is missing")
    pair.refuses({}, trtx.InvalidArgumentError, "'left' is missing", "'right' is missing", "'fixed' is missing")


@pytest.mark.parametrize("inputs", [None, [1], np.zeros(3), "x", 3, {"x"}, [("x", 1)]], ids=str)
def test_inputs_that_are_not_a_mapping(affine_engine: Untouched, inputs: Any) -> None:
    affine_engine.refuses(inputs, trtx.InvalidArgumentError, type(inputs).__name__, "mapping")


@pytest.mark.parametrize("kind", [dict, MappingProxyType, collections.UserDict, collections.ChainMap])
def test_any_mapping_will_do(affine_engine: Untouched, kind: Any) -> None:
    x = rows(3)
    assert np.array_equal(affine_engine.engine.infer_sync(kind({"x": x}))["y"], affine(x))


@pytest.mark.parametrize("dtype", ["f8", "f2", "i4", "i8", "u1", "?", "c8", "S3", "U3", "M8[s]", "V4", "O"])
def test_wrong_dtypes(affine_engine: Untouched, dtype: str) -> None:
    array = np.zeros((2, 4), dtype)
    affine_engine.refuses({"x": array}, trtx.DTypeError, "'x'", array.dtype.name, "expected float32", "astype")


def test_bfloat16_is_not_float32(affine_engine: Untouched) -> None:
    affine_engine.refuses({"x": np.zeros((2, 4), ml_dtypes.bfloat16)}, trtx.DTypeError, "bfloat16", "float32")


def test_other_byte_order(affine_engine: Untouched) -> None:
    swapped = rows(2).astype(np.dtype("f4").newbyteorder())
    affine_engine.refuses({"x": swapped}, trtx.DTypeError, "other byte order", "float32")


def test_numpy_scalars_have_a_dtype_python_numbers_have_none(mock_backend: MockBackend) -> None:
    plan = build(identity_model(TensorProto.FLOAT, ()))
    with serving_sync(mock_backend, plan, cuda_graphs=False) as engine:  # a capture beside it would be calls too
        tester = Untouched(mock_backend, engine)
        assert engine.infer_sync({"x": 2.5})["y"] == np.float32(2.5)
        assert engine.infer_sync({"x": 3})["y"].shape == ()
        tester.refuses({"x": np.float64(2.5)}, trtx.DTypeError, "float64", "float32")
        tester.refuses({"x": 1j}, trtx.DTypeError, "complex128")
        tester.refuses({"x": "2.5"}, trtx.DTypeError)
        tester.refuses({"x": None}, trtx.InvalidArgumentError, "NoneType, not a host array")
        tester.refuses({"x": 1e300}, trtx.DTypeError, "cannot represent")
        assert np.isinf(engine.infer_sync({"x": float("inf")})["y"])
        assert np.isnan(engine.infer_sync({"x": float("nan")})["y"])


@pytest.mark.parametrize(
    ("element", "good", "bad"),
    [
        (TensorProto.FLOAT, [[1, 2.5], [True, 0.1]], [[[1e39]], [["a"]], [[1j]], [[10**400]]]),
        (TensorProto.FLOAT16, [[1.5, 60000]], [[[70000]], [[1e9, 1.0]]]),
        (TensorProto.BFLOAT16, [[1, 2], [0.5, 3]], [[["a"]]]),
        (TensorProto.INT8, [[1, -128], [127, True]], [[[128]], [[-129]], [[1.0]]]),
        (TensorProto.UINT8, [[0, 255]], [[[-1]], [[256]], [[0.5]]]),
        (TensorProto.INT32, [[1, 2**31 - 1]], [[[2**31]], [[1.0]], [[2**70]]]),
        (TensorProto.INT64, [[-(2**63), 2**63 - 1]], [[[2**63]], [[1.5]]]),
        (TensorProto.BOOL, [[True, False]], [[[1]], [[0.0]]]),
    ],
    ids=lambda value: TensorProto.DataType.Name(value) if isinstance(value, int) else None,
)
def test_lists_lose_nothing_but_precision(mock_backend: MockBackend, element: int, good: Any, bad: list[Any]) -> None:
    profile = {"x": ((1, 1), (2, 2), (8, 8))}
    with serving_sync(mock_backend, build(identity_model(element, ("N", "M")), [profile])) as engine:
        dtype = engine.io_tensors[0].dtype.numpy
        out = engine.infer_sync({"x": good})["y"]
        assert out.dtype == dtype
        assert np.array_equal(out, np.array(good).astype(dtype))
        tester = Untouched(mock_backend, engine)
        for value in bad:
            tester.refuses({"x": value}, trtx.DTypeError, "'x'", dtype.name)


def test_ragged_lists(affine_engine: Untouched) -> None:
    affine_engine.refuses({"x": [[1, 2, 3, 4], [1, 2]]}, trtx.InvalidArgumentError, "'x'", "cannot be made an array")


def test_empty_list_is_a_matter_of_shape(affine_engine: Untouched) -> None:
    affine_engine.refuses({"x": []}, trtx.ShapeError, "(0,)", "(-1, 4)")


def test_masked_arrays(affine_engine: Untouched) -> None:
    masked = np.ma.masked_array(rows(2), mask=np.eye(2, 4, dtype=bool))
    affine_engine.refuses({"x": masked}, trtx.InvalidArgumentError, "'x'", "masked", "fill")
    affine_engine.refuses({"x": list(masked)}, trtx.InvalidArgumentError, "'x'", "masked")


def test_object_arrays(affine_engine: Untouched) -> None:
    array = np.empty((1, 4), object)
    array[:] = 1.0
    affine_engine.refuses({"x": array}, trtx.DTypeError, "object", "float32")
    affine_engine.refuses({"x": object()}, trtx.InvalidArgumentError, "a object, not a host array")
    affine_engine.refuses({"x": {"a": 1}}, trtx.InvalidArgumentError, "a dict, not a host array")


def test_device_memory(affine_engine: Untouched) -> None:
    """A bare buffer has neither shape nor dtype; what has them is read where it is: test_interop.py."""
    with affine_engine.engine._runtime.device.allocate(16) as buffer:
        affine_engine.refuses(
            {"x": buffer}, trtx.InvalidArgumentError, "a DeviceBuffer, not a host array", "to the host"
        )


class _Unreadable(collections.UserDict[str, Any]):
    def __getitem__(self, key: str) -> Any:
        raise OSError("the file is gone")


def test_a_mapping_that_raises(affine_engine: Untouched) -> None:
    inputs = _Unreadable({"x": rows(1)})
    affine_engine.refuses(inputs, trtx.InvalidArgumentError, "_Unreadable", "OSError: the file is gone")


@pytest.mark.parametrize(
    "timeout", [float("nan"), -1, -0.5, float("inf"), 1e300, 10**400, "1", True, [1], 1j], ids=lambda v: str(v)[:9]
)
def test_timeouts_that_cannot_be(affine_engine: Untouched, timeout: Any) -> None:
    with affine_engine.engine.create_execution_context() as context:
        before = affine_engine.backend.calls
        for call in (affine_engine.engine.infer_sync, context.execute_sync):
            with pytest.raises(trtx.InvalidArgumentError, match=r"timeout_s is .*expected None"):
                call({"x": rows(1)}, timeout_s=timeout)
        assert affine_engine.backend.calls == before
    assert affine_engine.engine.infer_sync({"x": rows(1)}, timeout_s=np.float32(30))["y"].shape == (1, 4)


class _Hostile:
    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise RuntimeError("can't convert a CUDA tensor")


class _Foreign:
    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self._array


def test_foreign_objects(affine_engine: Untouched) -> None:
    error = trtx.InvalidArgumentError
    affine_engine.refuses({"x": _Hostile()}, error, "'x'", "_Hostile", "can't convert a CUDA tensor")
    affine_engine.refuses({"x": [_Hostile()]}, error, "'x'", "can't convert a CUDA tensor")
    affine_engine.refuses({"x": _Foreign(np.zeros((2, 4)))}, trtx.DTypeError, "float64")
    x = rows(2)
    for foreign in (_Foreign(x), x.data):
        assert np.array_equal(affine_engine.engine.infer_sync({"x": foreign})["y"], affine(x))


def _layouts() -> dict[str, np.ndarray]:
    big = rows(8, seed=3)
    raw = bytearray(3 * 4 * 4 + 1)
    unaligned = np.frombuffer(raw, np.float32, 12, offset=1).reshape(3, 4)
    unaligned[:] = big[:3]
    layouts = {
        "fortran": np.asfortranarray(big[:3]),
        "transposed": np.ascontiguousarray(big[:4]).T,
        "reversed rows": big[::-1],
        "reversed columns": big[:, ::-1],
        "every other row": big[::2],
        "broadcast row": np.broadcast_to(big[0], (5, 4)),
        "broadcast scalar": np.broadcast_to(np.float32(7), (2, 4)),
        "unaligned": unaligned,
        "read-only": big[:2].copy(),
    }
    layouts["read-only"].flags.writeable = False
    return layouts


@pytest.mark.parametrize("name", _layouts())
def test_layout_never_changes_the_answer(affine_engine: Untouched, name: str) -> None:
    x = _layouts()[name]
    out = affine_engine.engine.infer_sync({"x": x})["y"]
    assert np.array_equal(out, affine(np.array(x)))
    assert out.flags.c_contiguous
    assert out.flags.owndata


@pytest.mark.parametrize("name", _layouts())
def test_layouts_are_refused_where_that_was_asked_for(mock_backend: MockBackend, name: str) -> None:
    x = _layouts()[name]
    with serving_sync(mock_backend, noncontiguous="refuse") as engine:
        if x.flags.c_contiguous:
            assert np.array_equal(engine.infer_sync({"x": x})["y"], affine(x))
            return
        tester = Untouched(mock_backend, engine)
        tester.refuses({"x": x}, trtx.InvalidArgumentError, "'x'", "C-contiguous", str(x.strides), "ascontiguousarray")
        assert np.array_equal(engine.infer_sync({"x": np.array(x, order="C")})["y"], affine(np.array(x)))


@pytest.mark.parametrize("shape", [(4,), (2, 4, 1), (), (2, 3), (2, 0), (1, 1, 4)], ids=str)
def test_shapes_that_the_engine_cannot_have(affine_engine: Untouched, shape: tuple[int, ...]) -> None:
    affine_engine.refuses({"x": np.zeros(shape, np.float32)}, trtx.ShapeError, "'x'", str(shape), "(-1, 4)")


@pytest.mark.parametrize("count", [0, 9, 1000])
def test_shapes_outside_every_profile_name_every_range(mock_backend: MockBackend, count: int) -> None:
    with serving_sync(mock_backend, split_plan()) as engine:
        Untouched(mock_backend, engine).refuses(
            {"x": np.zeros((count, 4), np.float32)}, trtx.ShapeError, "'x'", f"({count}, 4)",
            "profile 0: [1, 4]..[4, 4]", "profile 1: [5, 4]..[8, 4]",
        )  # fmt: skip


def test_zero_sized_axes_within_the_profile(mock_backend: MockBackend) -> None:
    with serving_sync(mock_backend, build(identity_model(1, ("N", 4)), [{"x": ((0, 4), (1, 4), (2, 4))}])) as engine:
        out = engine.infer_sync({"x": np.zeros((0, 4), np.float32)})["y"]
        assert out.shape == (0, 4)
        assert np.array_equal(engine.infer_sync({"x": rows(2)})["y"], rows(2))
        assert engine.infer_sync({"x": rows(2)[2:]})["y"].shape == (0, 4)


def test_inputs_of_several_profiles_at_once(mock_backend: MockBackend) -> None:
    small, large = dict.fromkeys(PAIR, ((1, 2),) * 3), dict.fromkeys(PAIR, ((3, 2), (3, 2), (4, 2)))
    with serving_sync(mock_backend, build(pair_model(), [small, large])) as engine:
        feeds = {**PAIR_FEEDS, "left": np.zeros((1, 2), np.float32), "right": np.zeros((3, 2), np.float32)}
        Untouched(mock_backend, engine).refuses(
            feeds, trtx.ShapeError, "'left' has shape (1, 2)", "'right' has shape (3, 2)", "profile 1: [3, 2]..[4, 2]"
        )


def test_inputs_that_contradict_each_other_run_nothing(pair: Untouched) -> None:
    feeds = {**PAIR_FEEDS, "left": np.zeros((1, 2), np.float32), "right": np.zeros((3, 2), np.float32)}
    with pytest.raises(trtx.TrtxError, match=r"left has 1, right has 3|fit together"):
        pair.engine.infer_sync(feeds)
    assert pair.backend.calls["execute"] == 0
    assert np.array_equal(pair.engine.infer_sync(PAIR_FEEDS)["total"], np.ones((2, 2)))


class TestShapeTensors:
    @pytest.fixture
    def engine(self, mock_backend: MockBackend) -> Iterator[trtx.Engine]:
        with serving_sync(mock_backend, build(reshape_model(), [RESHAPE])) as engine:
            yield engine

    @pytest.mark.parametrize("shape", [(2, 3), (3, 2), (1, 6), (6, 1)], ids=str)
    def test_values_decide_the_shape(self, engine: trtx.Engine, shape: tuple[int, int]) -> None:
        x = np.arange(6, dtype=np.float32)
        for values in (np.array(shape), list(shape), shape, np.array([*shape, 0, 0])[:2], np.array(shape[::-1])[::-1]):
            out = engine.infer_sync({"x": x, "shape": values})["y"]
            assert np.array_equal(out, x.reshape(shape))

    @pytest.mark.parametrize("values", [(0, 3), (13, 1), (-1, 2), (2**62, 1)], ids=str)
    def test_values_outside_the_profile(
        self, engine: trtx.Engine, mock_backend: MockBackend, values: tuple[int, int]
    ) -> None:
        Untouched(mock_backend, engine).refuses(
            {"x": np.zeros(6, np.float32), "shape": np.array(values)}, trtx.ShapeError,
            "'shape' has values", str(values), "[1, 1]..[12, 12]",
        )  # fmt: skip

    def test_nan_and_fractions(self, engine: trtx.Engine, mock_backend: MockBackend) -> None:
        x = np.zeros(6, np.float32)
        tester = Untouched(mock_backend, engine)
        for values in (np.array([np.nan, 3]), [float("nan"), 3], [2.0, 3.0], np.array([2.0, 3.0], np.float32)):
            tester.refuses({"x": x, "shape": values}, trtx.DTypeError, "'shape'", "int64")

    def test_values_that_do_not_fit_the_data(self, engine: trtx.Engine) -> None:
        with pytest.raises(trtx.ShapeError, match="4,4"):  # only TensorRT can tell, before it enqueues
            engine.infer_sync({"x": np.zeros(6, np.float32), "shape": [4, 4]})
        assert engine.infer_sync({"x": np.zeros(6, np.float32), "shape": [2, 3]})["y"].shape == (2, 3)

    def test_wrong_length(self, engine: trtx.Engine, mock_backend: MockBackend) -> None:
        tester = Untouched(mock_backend, engine)
        tester.refuses({"x": np.zeros(6, np.float32), "shape": [1, 2, 3]}, trtx.ShapeError, "'shape'", "(2,)")
        tester.refuses({"x": np.zeros(6, np.float32), "shape": 6}, trtx.ShapeError, "'shape'", "()")


@pytest.mark.parametrize("shape", [(float("nan"), 4), (2.5, 4), (np.nan, 4), ("2", 4), (None, 4), float("nan"), "24"])
def test_nan_shapes(mock_backend: MockBackend, shape: Any) -> None:
    with (
        trtx.Builder(None, mock_backend) as builder,
        builder.create_optimization_profile() as profile,
        pytest.raises(trtx.ShapeError),
    ):
        profile.set_shape("x", shape, (2, 4), (8, 4))
    with (
        serving_sync(mock_backend) as engine,
        engine.create_execution_context() as context,
        pytest.raises(trtx.ShapeError),
    ):
        context.set_input_shape("x", shape)


async def test_open_engine_refuses_nan_profiles(mock_backend: MockBackend) -> None:
    profiles: Any = [{"x": ((1, 4), (float("nan"), 4), SPLIT[1]["x"][2])}]
    with pytest.raises(trtx.ShapeError, match="nan"):
        async with trtx.open_engine(identity_model(1, ("N", 4)), mock_backend, profiles=profiles):
            pass


async def test_all_ways_in_check_alike(mock_backend: MockBackend) -> None:
    with serving_sync(mock_backend) as engine, engine.create_execution_context() as context:
        before = mock_backend.calls
        for call in (engine.infer, engine.infer_timed, context.execute):
            with pytest.raises(trtx.DTypeError):
                await call({"x": np.zeros((2, 4))})
        for call_sync in (engine.infer_sync, context.execute_sync):
            with pytest.raises(trtx.ShapeError):
                call_sync({"x": np.zeros((9, 4), np.float32)})
        assert mock_backend.calls == before
        assert engine.statistics().failed == 0
