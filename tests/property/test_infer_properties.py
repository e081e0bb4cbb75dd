"""Random models, profiles, shapes, dtypes and strides into ``infer``: the exact answer, or a typed error and nothing.

TRTX_PROPERTY_EXAMPLES sets the number of examples (default 200, some seconds).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

import trtx_py as trtx
from mock_backend import MockBackend
from tests.unit.serving import build, make_model, serving_sync
from trtx_py._types import DataType

EXAMPLES = int(os.environ.get("TRTX_PROPERTY_EXAMPLES", "200"))

ELEMENTS = {
    DataType.FLOAT: TensorProto.FLOAT, DataType.HALF: TensorProto.FLOAT16, DataType.BF16: TensorProto.BFLOAT16,
    DataType.INT8: TensorProto.INT8, DataType.UINT8: TensorProto.UINT8, DataType.INT32: TensorProto.INT32,
    DataType.INT64: TensorProto.INT64, DataType.BOOL: TensorProto.BOOL, DataType.FP8: TensorProto.FLOAT8E4M3FN,
}  # fmt: skip
#: What both TensorRT and numpy add without rounding of their own.
ADDABLE = (DataType.FLOAT, DataType.INT32, DataType.INT64)
#: What onnxruntime takes from numpy as it is.
PLAIN = (DataType.FLOAT, DataType.HALF, DataType.INT8, DataType.UINT8, DataType.INT32, DataType.INT64, DataType.BOOL)

Dims = list[int | str]


@dataclass(frozen=True)
class Spec:
    """One model: ``operator`` over ``dims`` (one list for each input) of ``dtype``.

    Attributes:
        ranges: for each profile, the range (min, opt, max) of each named axis.
    """

    operator: str
    dtype: DataType
    dims: list[Dims]
    axis: int
    order: list[int]
    ranges: list[dict[str, tuple[int, int, int]]]

    @property
    def names(self) -> list[str]:
        return [f"x{number}" for number in range(len(self.dims))]

    def model(self) -> bytes:
        element = ELEMENTS[self.dtype]
        rank = len(self.dims[0])
        nodes, outputs = [], []
        if self.operator in ("Identity", "Transpose"):
            for number, dims in enumerate(self.dims):
                options: dict[str, Any] = {"perm": self.order} if self.operator == "Transpose" and rank else {}
                nodes.append(helper.make_node(self.operator, [f"x{number}"], [f"y{number}"], **options))
                found = [dims[axis] for axis in self.order] if options else dims
                outputs.append((f"y{number}", element, found))
        elif self.operator == "Concat":
            nodes.append(helper.make_node("Concat", self.names, ["y0"], axis=self.axis))
            outputs.append(("y0", element, [f"out{axis}" for axis in range(rank)]))
        else:
            total = "x0"
            for number in range(1, len(self.dims)):
                target = "y0" if number == len(self.dims) - 1 else f"t{number}"
                nodes.append(helper.make_node("Add", [total, f"x{number}"], [target]))
                total = target
            outputs.append(("y0", element, self.dims[0]))
        return make_model(nodes, [(f"x{n}", element, dims) for n, dims in enumerate(self.dims)], outputs)

    def profiles(self) -> list[dict[str, Any]]:
        profiles = []
        for ranges in self.ranges:
            profile = {}
            for name, dims in zip(self.names, self.dims, strict=True):
                if any(isinstance(dim, str) for dim in dims):
                    rows = [ranges[dim] if isinstance(dim, str) else (dim,) * 3 for dim in dims]
                    profile[name] = tuple(tuple(row[part] for row in rows) for part in range(3))
            profiles.append(profile)
        return profiles if profiles[0] else []

    def admits(self, sizes: dict[str, int]) -> bool:
        """The rule itself, written once more: some profile has every named axis in its range."""
        if not sizes:
            return True
        return any(all(ranges[n][0] <= size <= ranges[n][2] for n, size in sizes.items()) for ranges in self.ranges)

    def expected(self, arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
        if self.operator == "Identity":
            return {f"y{n}": array for n, array in enumerate(arrays)}
        if self.operator == "Transpose":
            return {f"y{n}": array.transpose(self.order) for n, array in enumerate(arrays)}
        if self.operator == "Concat":
            return {"y0": np.concatenate(arrays, self.axis)}
        total = arrays[0]
        for array in arrays[1:]:
            total = np.add(total, array)
        return {"y0": np.asarray(total)}


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    operator = draw(st.sampled_from(["Identity", "Transpose", "Concat", "Add"]))
    types = [t for t in ELEMENTS if operator != "Concat" or t is not DataType.FP8]  # ONNX has no Concat of 8-bit floats
    dtype = draw(st.sampled_from(ADDABLE if operator == "Add" else types))
    rank = draw(st.integers(1 if operator == "Concat" else 0, 5))
    count = draw(st.integers(2 if operator == "Add" else 1, 3))
    axis = draw(st.integers(0, max(rank - 1, 0)))
    dynamic = [draw(st.booleans()) for _ in range(rank)]
    fixed = [draw(st.integers(1, 3)) for _ in range(rank)]
    dims: list[Dims] = []
    for number in range(count):
        row: Dims = []
        for position in range(rank):
            own = operator == "Concat" and position == axis
            row.append((f"d{position}_{number}" if own else f"d{position}") if dynamic[position] else fixed[position])
        dims.append(row)
    named = sorted({dim for row in dims for dim in row if isinstance(dim, str)})
    ranges = []
    for _ in range(draw(st.integers(1, 2))):
        limits = {}
        for name in named:
            low, best, high = sorted(draw(st.lists(st.integers(0, 4), min_size=3, max_size=3)))
            limits[name] = (low, max(best, 1), max(high, 1))
        ranges.append(limits)
    order = draw(st.permutations(list(range(rank))))
    return Spec(operator, dtype, dims, axis, order, ranges)


def _values(dtype: DataType, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    if dtype is DataType.BOOL:
        return random.integers(0, 2, shape).astype(bool)
    if dtype in (DataType.INT8, DataType.UINT8, DataType.INT32, DataType.INT64):
        limits = np.iinfo(dtype.numpy)
        return np.asarray(random.integers(limits.min, limits.max, shape, dtype=dtype.numpy, endpoint=True))
    array = np.asarray(random.standard_normal(shape)).astype(dtype.numpy)
    if array.size and dtype is not DataType.FP8:
        array.reshape(-1)[0] = random.choice([np.inf, -np.inf, 0.0, -0.0, 1.0])
    return array


def _laid_out(array: np.ndarray, layout: str) -> np.ndarray:
    """The same values in another layout."""
    if array.ndim == 0 or layout == "plain":
        return array
    if layout == "fortran":
        return np.asfortranarray(array)
    if layout == "reversed":
        every = (slice(None, None, -1),) * array.ndim
        return np.array(array[every])[every]
    if layout == "strided":
        wide = np.zeros([2 * n for n in array.shape], array.dtype)
        view = wide[(slice(None, None, 2),) * array.ndim]
        view[...] = array
        return view
    if layout == "offset":
        raw = bytearray(array.nbytes + 1)
        view = np.frombuffer(raw, array.dtype, array.size, offset=1).reshape(array.shape) if array.size else array
        view[...] = array
        return view
    assert layout == "broadcast"
    return np.broadcast_to(array[:1], array.shape) if array.shape[0] else array


LAYOUTS = ("plain", "fortran", "reversed", "strided", "offset", "broadcast")
DAMAGES = ("none", "none", "none", "rank", "dtype", "static axis", "missing", "unknown")


def _damaged(spec: Spec, feeds: dict[str, np.ndarray], damage: str) -> dict[str, np.ndarray] | None:
    """Feeds that no engine of this model can take, or None if this damage cannot be done to it."""
    feeds = dict(feeds)
    first = feeds["x0"]
    if damage == "rank":
        feeds["x0"] = first[np.newaxis]
    elif damage == "dtype":
        feeds["x0"] = first.astype(np.float64)
    elif damage == "missing":
        del feeds["x0"]
    elif damage == "unknown":
        feeds["x9"] = first
    else:
        static = [axis for axis, dim in enumerate(spec.dims[0]) if isinstance(dim, int)]
        if not static:
            return None
        feeds["x0"] = np.concatenate([first, first], axis=static[0])
    return feeds


@given(spec=specs(), data=st.data())
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
def test_the_exact_answer_or_a_typed_error(spec: Spec, data: st.DataObject) -> None:
    backend = MockBackend()
    model = spec.model()
    session = onnxruntime.InferenceSession(model) if spec.dtype in PLAIN else None
    try:
        graphs = data.draw(st.booleans(), label="graphs")
        with serving_sync(backend, build(model, spec.profiles()), cuda_graphs=graphs) as engine:
            assert [t.dtype for t in engine.io_tensors] == [spec.dtype] * len(engine.io_tensors)
            for _ in range(4):
                _one_request(spec, engine, backend, session, data, graphs)
        backend.assert_clean()
    finally:
        backend.close()


def _one_request(
    spec: Spec, engine: trtx.Engine, backend: MockBackend, session: Any, data: st.DataObject, graphs: bool
) -> None:
    named = sorted({dim for row in spec.dims for dim in row if isinstance(dim, str)})
    if data.draw(st.booleans(), label="inside a profile"):
        ranges = data.draw(st.sampled_from(spec.ranges), label="profile")
        sizes = {name: data.draw(st.integers(ranges[name][0], ranges[name][2]), label=name) for name in named}
    else:
        sizes = {name: data.draw(st.integers(0, 5), label=name) for name in named}
    random = np.random.default_rng(data.draw(st.integers(0, 2**16), label="seed"))
    feeds = {}
    for name, dims in zip(spec.names, spec.dims, strict=True):
        shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in dims)
        layout = data.draw(st.sampled_from(LAYOUTS), label="layout")
        feeds[name] = _laid_out(_values(spec.dtype, shape, random), layout)
    damage = data.draw(st.sampled_from(DAMAGES), label="damage")
    damaged = None if damage == "none" else _damaged(spec, feeds, damage)
    admissible = spec.admits(sizes) and damaged is None
    event(f"{'admissible' if admissible else 'inadmissible'}, {spec.operator}")
    if not admissible:
        before = backend.calls
        with pytest.raises(trtx.InvalidArgumentError) as caught:
            engine.infer_sync(feeds if damaged is None else damaged)
        if damaged is None:
            assert type(caught.value) is trtx.ShapeError
            assert "profile 0:" in str(caught.value)
        if not graphs:  # else a lane may be capturing what came before
            assert backend.calls == before
        return
    arrays = [feeds[name] for name in spec.names]
    copies = [np.array(array) for array in arrays]
    with np.errstate(all="ignore"):  # inf - inf, and integers that wrap
        expected = spec.expected(copies)
    if graphs and data.draw(st.booleans(), label="captured"):
        with engine.alloc_inputs({name: feeds[name].shape for name in spec.names}) as slot:
            for name in spec.names:
                slot[name][...] = feeds[name]
            for name, array in slot.infer_sync().items():
                assert array.shape == expected[name].shape
                assert _same(array, expected[name])
    outputs = engine.infer_sync(feeds)
    assert outputs.keys() == expected.keys()
    for name, array in expected.items():
        found = outputs[name]
        assert found.dtype == spec.dtype.numpy
        assert found.shape == array.shape
        assert _same(found, array)
        assert found.flags.c_contiguous
        assert not any(np.shares_memory(found, given) for given in arrays)
    for array, copy in zip(arrays, copies, strict=True):
        assert array.tobytes() == copy.tobytes()  # inputs are only read
    if session is not None:
        answers = session.run(list(outputs), dict(zip(spec.names, copies, strict=True)))
        for name, array in zip(outputs, answers, strict=True):
            assert _same(outputs[name], array)


def _same(found: np.ndarray, expected: np.ndarray) -> bool:
    """Bit for bit; only which NaN it is may differ."""
    if found.dtype.kind in "biu":
        return np.array_equal(found, expected)
    wide, want = found.astype(np.float64), expected.astype(np.float64)
    return np.array_equal(wide, want, equal_nan=True) and np.array_equal(
        np.signbit(wide[~np.isnan(wide)]), np.signbit(want[~np.isnan(want)])
    )
