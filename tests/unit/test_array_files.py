"""Arrays in files: read without unpickling, made at random, compared."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import trtx_py as trtx
from trtx_py import _array_files as files
from trtx_py._types import DataType, TensorInfo, TensorMode

X = TensorInfo("x", TensorMode.INPUT, DataType.FLOAT, (-1, 4), ranges=(trtx.ShapeRange((1, 4), (2, 4), (8, 4)),))
INDEX = TensorInfo("index", TensorMode.INPUT, DataType.INT64, (3,))
SIZES = TensorInfo(
    "sizes",
    TensorMode.INPUT,
    DataType.INT32,
    (2,),
    is_shape_tensor=True,
    ranges=(trtx.ShapeRange((1, 1), (5, 6), (9, 9)),),
)


def test_shapes_come_from_the_caller_the_profile_and_the_model() -> None:
    assert files.concrete_shapes([X, INDEX, SIZES], {}) == {"x": (2, 4), "index": (3,), "sizes": (2,)}
    assert files.concrete_shapes([X], {"x": (7, 4)}) == {"x": (7, 4)}
    with pytest.raises(trtx.InvalidArgumentError, match="there is no input y; the inputs are x"):
        files.concrete_shapes([X], {"y": (1,)})
    with pytest.raises(trtx.ShapeError, match="say its size"):
        files.concrete_shapes([TensorInfo("x", TensorMode.INPUT, DataType.FLOAT, (-1,))], {})


@pytest.mark.parametrize(
    ("tensor", "shape"),
    [(X, (9, 4)), (X, (1 << 40, 4)), (X, (2, 5)), (X, (2,)), (INDEX, (4,)), (INDEX, (3, 1))],
)
def test_shapes_that_cannot_be_are_refused_before_memory_is_taken(tensor: TensorInfo, shape: tuple[int, ...]) -> None:
    with pytest.raises(trtx.ShapeError, match=rf"input '{tensor.name}' cannot have shape .*; it takes"):
        files.concrete_shapes([tensor], {tensor.name: shape})


@pytest.mark.parametrize(
    ("tensor", "limits"),
    [(X, (-1.7e308, 1.7e308)), (X, (1e39, 1e40)), (INDEX, (0.2, 0.7)), (INDEX, (0.0, 1e300)), (SIZES, (0.0, 3e9))],
    ids=str,
)
def test_limits_that_cannot_be_say_of_which_input(tensor: TensorInfo, limits: tuple[float, float]) -> None:
    shapes = files.concrete_shapes([tensor], {})
    with pytest.raises(trtx.InvalidArgumentError, match=f"no random values .* for input '{tensor.name}'"):
        files.random_inputs([tensor], shapes, limits={tensor.name: limits})


def test_every_kind_of_damage_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, x=np.arange(64.0), y=np.ones((8, 8)))
    whole = path.read_bytes()
    for at in range(0, len(whole), 3):
        broken = bytearray(whole)
        broken[at] ^= 0xFF
        path.write_bytes(broken)
        with contextlib.suppress(trtx.InvalidArgumentError, MemoryError):  # or it is not noticed
            files.read_npz(str(path))


def test_random_inputs_are_those_of_their_seed() -> None:
    shapes = files.concrete_shapes([X, INDEX, SIZES], {})
    one = files.random_inputs([X, INDEX, SIZES], shapes, seed=3)
    two = files.random_inputs([X, INDEX, SIZES], shapes, seed=3)
    other = files.random_inputs([X, INDEX, SIZES], shapes, seed=4)
    assert all((one[name] == two[name]).all() for name in one)
    assert (one["x"] != other["x"]).any()
    assert one["sizes"].tolist() == [5, 6]
    assert set(one["index"].tolist()) <= {0, 1}
    limited = files.random_inputs([X, INDEX], shapes, limits={"x": (5.0, 6.0), "index": (10, 12)})
    assert 5 <= limited["x"].min() <= limited["x"].max() < 6
    assert set(limited["index"].tolist()) <= {10, 11}


def test_arrays_go_to_npz_and_come_back(tmp_path: Path) -> None:
    path = str(tmp_path / "a.npz")
    files.save_arrays(path, {"a/b": np.arange(3), "half": np.ones(2, ml_dtypes.bfloat16)})
    found = files.read_npz(path)
    assert found["a/b"].tolist() == [0, 1, 2]
    assert found["half"].dtype == np.float32
    with pytest.raises(trtx.InvalidArgumentError, match=r"cannot be saved"):
        files.save_arrays(str(tmp_path / "no" / "a.npz"), {})


def test_json_has_names_for_what_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.save_arrays(str(path), {"y": np.array([[1.5, np.inf, np.nan]], np.float32)})
    (found,) = json.loads(path.read_text())
    assert found == {"name": "y", "dimensions": "1x3", "dtype": "float32", "values": [1.5, "inf", "nan"]}


def test_one_array_is_no_npz(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(2))
    with pytest.raises(trtx.InvalidArgumentError, match=r"expected arrays by name"):
        files.read_npz(str(tmp_path / "a.npy"))
    with pytest.raises(trtx.InvalidArgumentError, match="cannot be read"):
        files.read_npz(str(tmp_path / "gone.npz"))


def test_raw_files_have_the_size_of_the_input(tmp_path: Path) -> None:
    values = np.arange(8, dtype=np.float32)
    (tmp_path / "x.bin").write_bytes(values.tobytes())
    assert (files.read_input(str(tmp_path / "x.bin"), X, (2, 4)) == values.reshape(2, 4)).all()
    with pytest.raises(trtx.ShapeError, match="has 32 bytes, and input 'x' of float32 and shape"):
        files.read_input(str(tmp_path / "x.bin"), X, (3, 4))
    with pytest.raises(trtx.InvalidArgumentError, match="cannot be read"):
        files.read_input(str(tmp_path / "gone.bin"), X, (3, 4))


def test_differences() -> None:
    wanted = {"y": np.array([1.0, 2.0, 0.0, np.inf, np.nan])}
    (same,) = files.differences({"y": wanted["y"].copy()}, wanted)
    assert (same.within, same.max_abs, same.wrong) == (True, 0.0, 0)
    (other,) = files.differences({"y": np.array([1.0, 2.5, 1e-6, np.inf, np.nan])}, wanted)
    assert (other.within, other.wrong, other.elements) == (False, 1, 5)
    assert other.max_abs == 0.5
    assert other.max_rel == 0.25
    (lost,) = files.differences({"y": np.array([np.nan, 2.0, 0.0, np.inf, np.nan])}, wanted)
    assert (lost.within, lost.max_abs) == (False, np.inf)
    (finite,) = files.differences({"y": np.array([1.0, 2.0, 0.0, 3.0, np.nan])}, wanted)
    assert not finite.within
    with pytest.raises(trtx.InvalidArgumentError, match="the reference has z"):
        files.differences({"y": wanted["y"]}, {"z": wanted["y"]})
    with pytest.raises(trtx.ShapeError):
        files.differences({"y": np.zeros(2)}, {"y": np.zeros(3)})
    with pytest.raises(trtx.DTypeError):
        files.differences({"y": np.zeros(2)}, {"y": np.array(["a", "b"])})


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=8), st.floats(0, 1), st.floats(0, 1))
def test_what_is_within_is_what_numpy_takes_for_close(values: list[float], noise: float, atol: float) -> None:
    wanted = np.array(values)
    found = wanted + noise
    (one,) = files.differences({"y": found}, {"y": wanted}, rtol=0.0, atol=atol)
    assert one.within == bool((np.abs(found - wanted) <= atol).all())
