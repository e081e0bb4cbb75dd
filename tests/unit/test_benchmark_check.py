"""Outputs that are wrong or stale are noticed, also where the tolerance is loose; inputs differ from each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trtx_py as trtx
from trtx_py import DataType, ShapeRange, TensorInfo, TensorMode
from trtx_py.benchmark import BenchmarkSpec, WrongOutputError
from trtx_py.benchmark._check import Checker, Expected, deviation
from trtx_py.benchmark._inputs import InputMaker, arrays_of

A = {"y": np.array([[1.0, 2.0], [3.0, 4.0]], np.float32), "label": np.array([0, 1])}
B = {"y": np.array([[2.0, 1.0], [4.0, 3.0]], np.float32), "label": np.array([1, 1])}


def checker(tolerance: float = 0.01) -> Checker:
    return Checker("mine", tolerance, Expected([A, B], "the reference"))


def test_right_outputs_pass() -> None:
    found = checker()
    found.check(0, A)
    found.check(1, B)
    found.check(0, {"y": A["y"] * 1.001, "label": A["label"]})
    assert found.checked == 3
    assert found.worst == pytest.approx(0.001, rel=1e-3)


@pytest.mark.parametrize(
    ("outputs", "problem", "output"),
    [({**A, "y": A["y"] * 1.1}, "wrong", "y"), ({**A, "label": np.array([0, 0])}, "wrong", "label"),
     ({**A, "y": A["y"][:1]}, "shape", "y"), ({"y": A["y"]}, "names", "label"), ({**A, "z": A["y"]}, "names", "z"),
     ({**A, "y": A["y"] * np.float32("nan")}, "not finite", "y"), (B, "stale", "label"),
     ({**A, "y": np.zeros((2, 2), np.float32)}, "wrong", "y")],
)  # fmt: skip
def test_wrong_outputs_are_named(outputs: Any, problem: str, output: str) -> None:
    with pytest.raises(WrongOutputError, match="contender 'mine' is not reported") as caught:
        checker().check(0, outputs)
    error = caught.value
    assert (error.contender, error.output, error.problem, error.tolerance) == ("mine", output, problem, 0.01)
    assert error.max_error > 0.01
    assert "the reference" in str(error)
    assert isinstance(error, trtx.TrtxError)


def test_stale_outputs_within_a_loose_tolerance_are_noticed_by_their_bits() -> None:
    found = checker(tolerance=10.0)
    found.check(0, {**A, "y": A["y"] * 1.5})
    with pytest.raises(WrongOutputError) as caught:
        found.check(1, {**A, "y": A["y"] * 1.5})
    assert caught.value.problem == "stale"
    assert "set 0" in str(caught.value)


def test_infinite_where_the_reference_is_infinite_is_right() -> None:
    odd = {"y": np.array([1.0, np.inf])}
    assert deviation(odd, odd).error == 0
    assert deviation({"y": np.array([1.0, np.nan])}, {"y": np.array([1.0, 5.0])}).problem == "not finite"


def test_inputs_that_cannot_be_told_apart_are_refused() -> None:
    with pytest.raises(trtx.InvalidArgumentError, match="stale outputs could not be told; give inputs="):
        Expected([A, A], "the reference")
    same = [{"y": np.zeros(0)}, {"y": np.zeros(0)}]
    with pytest.raises(trtx.InvalidArgumentError, match="stale"):
        Expected(same, "the reference")


# ---- inputs ----

X = TensorInfo("x", TensorMode.INPUT, DataType.FLOAT, (-1, 3), ranges=(ShapeRange((1, 3), (4, 3), (8, 3)),))
IDS = TensorInfo("ids", TensorMode.INPUT, DataType.INT32, (-1, -1), ranges=(ShapeRange((1, 1), (4, 16), (8, 64)),))
FIXED = TensorInfo("x", TensorMode.INPUT, DataType.HALF, (4, 3))
Y = TensorInfo("y", TensorMode.OUTPUT, DataType.FLOAT, (-1, 2))


def maker(*tensors: TensorInfo, **options: Any) -> InputMaker:
    return InputMaker(BenchmarkSpec(b"model", **options), [*tensors, Y])


def test_random_inputs_differ_and_follow_the_seed() -> None:
    sets = maker(X, IDS).sets(2, 3)
    assert [each.arrays["x"].shape for each in sets] == [(2, 3)] * 3
    assert sets[0].arrays["ids"].shape == (2, 16)
    assert sets[0].arrays["ids"].dtype == np.int32
    assert set(np.unique(sets[0].arrays["ids"])) <= {0, 1}
    fresh = maker(X, IDS).sets(2, 3, fresh=True)
    values = [each.arrays["x"].tobytes() for each in [*sets, *fresh, *maker(X, IDS, seed=1).sets(2, 3)]]
    assert len(set(values)) == 9
    assert maker(X, IDS).sets(2, 3)[1].arrays["x"].tobytes() == values[1]


def test_ranges_and_shapes_of_inputs() -> None:
    found = maker(X, IDS, shapes={"ids": (1, 5)}, input_ranges={"ids": (10, 12), "x": (-1, 0)})
    arrays = found.sets(8, 2)[0].arrays
    assert arrays["ids"].shape == (8, 5)
    assert set(np.unique(arrays["ids"])) == {10, 11, 12}
    assert arrays["x"].min() >= -1
    assert arrays["x"].max() <= 0
    assert maker(FIXED).sets(1, 2)[0].arrays["x"].dtype == np.float16
    assert maker(FIXED).shapes(4) == {"x": (4, 3)}


def test_given_inputs_are_taken_in_turn(tmp_path: Path) -> None:
    rows = np.arange(15, dtype=np.float64).reshape(5, 3)
    np.savez(tmp_path / "inputs.npz", x=rows)
    for given in ({"x": rows}, tmp_path / "inputs.npz"):
        sets = maker(X, inputs=given).sets(2, 3)
        assert [each.samples for each in sets] == [(0, 1), (2, 3), (4, 0)]
        assert sets[2].arrays["x"].tolist() == rows[[4, 0]].tolist()
        assert sets[0].arrays["x"].dtype == np.float32


@pytest.mark.parametrize(
    ("tensor", "options", "batch"),
    [(X, {"shapes": {"z": (1, 3)}}, 1), (X, {"shapes": {"x": (1, 4)}}, 1), (X, {"shapes": {"x": (1,)}}, 1),
     (X, {"input_ranges": {"z": (0, 1)}}, 1), (X, {"input_ranges": {"x": (1, 0)}}, 1),
     (X, {"input_ranges": {"x": "01"}}, 1), (X, {"input_ranges": {"x": (0, float("nan"))}}, 1), (FIXED, {}, 3),
     (X, {"inputs": {"z": np.zeros((4, 3))}}, 1), (X, {"inputs": {"x": np.zeros((1, 3))}}, 1),
     (X, {"inputs": {"x": np.zeros((4, 4))}}, 1), (X, {"inputs": "/no/such/file.npz"}, 1)],
)  # fmt: skip
def test_inputs_that_do_not_fit(tensor: TensorInfo, options: Any, batch: int) -> None:
    with pytest.raises(trtx.InvalidArgumentError):
        maker(tensor, **options).shapes(batch)


def test_files_of_arrays_that_are_none(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 this is cut")
    (tmp_path / "empty.npz").write_bytes(b"")
    np.savez(tmp_path / "objects.npz", x=np.array([{}], dtype=object))
    for name in ("one.npy", "broken.npz", "empty.npz", "objects.npz"):
        with pytest.raises(trtx.InvalidArgumentError, match="inputs"):
            arrays_of(tmp_path / name, "inputs")


@pytest.mark.parametrize(
    "outputs",
    [None, [1], {"y": 1.0}, {"y": [1.0, 2.0]}, {"y": np.zeros(2, complex)}, {"y": np.array([None, None])},
     {"y": np.array(["1", "2"])}],
    ids=str,
)  # fmt: skip
def test_what_is_no_array_of_real_numbers_is_refused(outputs: Any) -> None:
    expected = Expected([{"y": np.array([1.0, 2.0])}, {"y": np.array([3.0, 1.0])}], "somebody")
    with pytest.raises(WrongOutputError, match="numpy arrays by output name") as caught:
        Checker("c", 0.01, expected).check(0, outputs)
    assert caught.value.problem == "type"


def test_an_imaginary_part_is_not_overlooked() -> None:
    expected = Expected([{"y": np.array([1.0, 2.0])}, {"y": np.array([3.0, 1.0])}], "somebody")
    with pytest.raises(WrongOutputError):
        Checker("c", 0.01, expected).check(0, {"y": np.array([1.0 + 5j, 2.0])})
