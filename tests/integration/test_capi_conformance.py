"""The C ABI as a WebNN implementation would use it: thousands of small graphs, every type, no calls but the library's.

capi_conformance_refused.txt is the committed list of node cases of the onnx package that are refused, each with its
status; ``python -m tests.integration.test_capi_conformance`` writes it anew and prints the counts.
"""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests import webnn
from tests.capi_binding import DTYPES, LIBRARY, Array, CapiError, Context, Graph, live_objects
from tests.onnx_suite import _RANDOM, Case, _trains_dropout, collect_cases, compare, to_array

ort = pytest.importorskip("onnxruntime")

REFUSED = Path(__file__).with_name("capi_conformance_refused.txt")
WEBNN = json.loads(Path(__file__).with_name("webnn_cases.json").read_text(encoding="utf-8"))["tests"]

pytestmark = pytest.mark.skipif(not LIBRARY.is_file(), reason="libtrtxpy is not built: scripts/build-native")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of one case.

    Attributes:
        status: "passed", "WRONG", or the status of the call that refused it.
        reason: of what is not passed.
        judged: ONNX Runtime agrees, where it can run the model and gives what the case itself expects.
        types: of the graph's inputs and outputs.
    """

    name: str
    status: str
    reason: str = ""
    judged: bool = False
    types: frozenset[str] = frozenset()


# Node cases


def run_cases(cases: Sequence[Case]) -> list[Outcome]:
    """All of them in one context, which is closed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # overflow is what many cases are about
        with Context("mock") as context:
            return [run_case(context, case) for case in cases]


def run_case(context: Context, case: Case) -> Outcome:
    """Build, dispatch, read, compare."""
    model, data_sets = case.load()
    rows = [_row(model, inputs) for inputs, _ in data_sets]
    types: frozenset[str] = frozenset()
    judged = False
    try:
        with _opened(context, model, rows) as graph:
            types = frozenset(port.dtype.name for port in (*graph.inputs, *graph.outputs))
            dtypes = {port.name: port.dtype for port in graph.inputs}
            for row, (_, expected) in zip(rows, data_sets, strict=True):
                # TensorRT reads DOUBLE as FLOAT; every other type must be right as it is
                given = {n: a.astype(dtypes[n]) if a.dtype == np.float64 else a for n, a in row.items()}
                found = graph.run(given)
                _compare(model, found, [to_array(value) for value in expected], case)
                judged = _judged(model, row, found, expected, case)
    except CapiError as error:
        return Outcome(case.name, error.status, error.text)
    except AssertionError as error:
        return Outcome(case.name, "WRONG", " ".join(str(error).split()), judged, types)
    return Outcome(case.name, "passed", "", judged, types)


def _input_names(model: onnx.ModelProto) -> list[str]:
    weights = {tensor.name for tensor in model.graph.initializer}
    return [value.name for value in model.graph.input if value.name not in weights]


def _row(model: onnx.ModelProto, inputs: Sequence[Any]) -> dict[str, Array]:
    """By name; without sequences and optionals, whose models are refused."""
    return {
        name: to_array(value)
        for name, value in zip(_input_names(model), inputs, strict=True)
        if isinstance(value, (np.ndarray, np.generic, onnx.TensorProto))
    }


def _opened(context: Context, model: onnx.ModelProto, rows: Sequence[Mapping[str, Array]]) -> Graph:
    """With a profile of what the data needs, where one is wanted."""
    blob = model.SerializeToString()
    dims = {value.name: value.type.tensor_type.shape.dim for value in model.graph.input}
    open_names = [n for n in _input_names(model) if not all(dim.HasField("dim_value") for dim in dims[n])]
    ranges = {n: _range([row[n].shape for row in rows]) for n in open_names if all(n in row for row in rows)}
    try:
        return context.graph(blob, None, ranges or None)
    except CapiError as error:
        if error.status != "BUILD" or "no optimization profile" not in error.text:
            raise
        # Inputs that TensorRT reads as shapes: a profile holds their values, and the text alone says which they are.
        for name in re.findall(r"input '([^']*)'", error.text.split(". Add")[0]):
            ranges[name] = _range([tuple(row[name].reshape(-1).tolist()) for row in rows])
    return context.graph(blob, None, ranges)


def _range(rows: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    columns = list(zip(*rows, strict=True))
    return tuple(map(min, columns)), rows[0], tuple(map(max, columns))


def _compare(model: onnx.ModelProto, found: dict[str, Array], expected: Sequence[Array], case: Case) -> None:
    """As the other suite; integers that nothing was rounded to exactly: 2**60 + 1 is not 2**60."""
    compare(model, found, expected, rtol=case.rtol, atol=case.atol)
    if any(node.op_type in _RANDOM for node in model.graph.node) or _trains_dropout(model):
        return
    for value, want in zip(model.graph.output, expected, strict=True):
        if want.dtype.kind in "iub":
            np.testing.assert_array_equal(found[value.name], want, err_msg=f"output {value.name!r}")


def _judged(
    model: onnx.ModelProto, row: dict[str, Array], found: dict[str, Array], expected: Sequence[Any], case: Case
) -> bool:
    """Raises AssertionError where ONNX Runtime gives something else."""
    reference = _run_reference(model, row)
    if reference is None:
        return False
    try:
        _compare(model, dict(zip(found, reference, strict=True)), [to_array(value) for value in expected], case)
    except AssertionError:
        return False  # it is no judge of a case whose expectation it does not meet
    _compare(model, found, reference, case)
    return True


def _run_reference(model: onnx.ModelProto, row: dict[str, Array]) -> list[Array] | None:
    """None for what ONNX Runtime cannot run."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return list(session.run(None, row))
    except Exception:  # its exceptions share no base
        return None


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    return run_cases(collect_cases(["node"]))


@pytest.fixture(scope="module")
def committed() -> dict[str, str]:
    return dict(line.split() for line in REFUSED.read_text().splitlines() if line and not line.startswith("#"))


def test_no_answer_is_wrong(outcomes: list[Outcome]) -> None:
    wrong = {o.name: o.reason[:300] for o in outcomes if o.status == "WRONG"}
    assert not wrong, json.dumps(wrong, indent=1)


def test_what_is_refused_is_what_is_listed(outcomes: list[Outcome], committed: dict[str, str]) -> None:
    """In both directions with the onnx package that the list was written with; others have other cases."""
    refused = {o.name: o.status for o in outcomes if o.status not in ("passed", "WRONG")}
    if f"# onnx {onnx.__version__}" not in REFUSED.read_text().splitlines():
        refused = {name: status for name, status in refused.items() if name in committed}
        committed = {name: status for name, status in committed.items() if name in refused}
    changed = {
        name: f"listed as {committed.get(name, 'passed')}, now {refused.get(name, 'passed')}"
        for name in sorted(refused.keys() | committed.keys())
        if refused.get(name) != committed.get(name)
    }
    assert not changed, json.dumps(changed, indent=1)


def test_refusals_are_those_of_types_and_operators(outcomes: list[Outcome]) -> None:
    """A case fails at run time for nothing but a number that its type cannot hold, and never without a text."""
    refused = [o for o in outcomes if o.status != "passed"]
    assert {o.status for o in refused} <= {"PARSE", "BUILD", "UNSUPPORTED", "RANGE"}
    assert all(o.reason for o in refused)


def test_every_type_was_computed_with(outcomes: list[Outcome]) -> None:
    passed = frozenset[str]().union(*(o.types for o in outcomes if o.status == "passed"))
    assert passed >= {dtype.name for dtype in DTYPES.values()}


def test_onnx_runtime_judged_most(outcomes: list[Outcome]) -> None:
    passed = [o for o in outcomes if o.status == "passed"]
    assert sum(o.judged for o in passed) > 0.8 * len(passed)


@pytest.mark.parametrize("name", ["test_add", "test_cast_FLOAT_to_FLOAT16", "test_equal"])
def test_a_wrong_answer_is_found(name: str, outcomes: list[Outcome]) -> None:
    """The runner itself: an expectation that is off by one number."""
    assert next(o for o in outcomes if o.name == name).status == "passed"
    case = next(case for case in collect_cases(["node"]) if case.name == name)
    model, [(inputs, outputs)] = case.load()
    off = to_array(outputs[0]).copy()
    off.reshape(-1)[-1] = 1 - off.reshape(-1)[-1]
    (wrong,) = run_cases([dataclasses.replace(case, load=lambda: (model, [(inputs, [off])]))])
    assert wrong.status == "WRONG"


def test_nothing_stays_open(outcomes: list[Outcome]) -> None:
    assert outcomes
    assert live_objects() == 0


# Cases in WebNN's own form


@pytest.fixture
def context() -> Iterator[Context]:
    with Context("mock") as made:
        yield made
    assert live_objects() == 0


@pytest.mark.parametrize("case", WEBNN, ids=[case["name"] for case in WEBNN])
def test_webnn_case(context: Context, case: dict[str, Any]) -> None:
    built = webnn.translate(case["graph"])
    onnx.checker.check_model(built.model)
    if "expectedStatus" in case:
        with pytest.raises(CapiError) as caught, context.graph(built.model.SerializeToString()) as graph:
            graph.run(built.inputs)
        assert caught.value.status == case["expectedStatus"]
        return
    with context.graph(built.model.SerializeToString()) as graph:
        found = graph.run(built.inputs)
    assert found.keys() == built.expected.keys()
    for name, want in built.expected.items():
        webnn.require_close(found[name], want, name)
    reference = _run_reference(built.model, built.inputs)
    if reference is not None:
        for name, want in zip(found, reference, strict=True):
            webnn.require_close(found[name], want, name)


def test_webnn_cases_cover_operators_and_types() -> None:
    operators = {operator["name"] for case in WEBNN for operator in case["graph"]["operators"]}
    assert len(operators) >= 25
    assert operators <= webnn.OPERATORS.keys()
    descriptors = [
        tensor["descriptor"]
        for case in WEBNN
        for tensor in (*case["graph"]["inputs"].values(), *case["graph"].get("expectedOutputs", {}).values())
    ]
    assert {d["dataType"] for d in descriptors} == webnn.TYPES.keys()


# Numbers that a carried type cannot hold


def _model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, tuple[int, Sequence[int | str]]],
    outputs: Mapping[str, tuple[int, Sequence[int | str]]],
    weights: Sequence[onnx.TensorProto] = (),
) -> bytes:
    given, made = (
        [helper.make_tensor_value_info(name, *typed) for name, typed in side.items()] for side in (inputs, outputs)
    )
    graph = helper.make_graph(list(nodes), "graph", given, made, initializer=list(weights))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()


def _onnx(dtype: np.dtype[Any]) -> int:
    return int(helper.np_dtype_to_tensor_dtype(dtype))


CARRIED = ("uint32", "uint64", "int8", "uint8", "int4", "uint4")
_BY_NAME = {dtype.name: dtype for dtype in DTYPES.values()}


def _limits(dtype: np.dtype[Any]) -> tuple[int, int]:
    import ml_dtypes

    info = ml_dtypes.iinfo(dtype)
    # what carries uint64 ends at int64's
    return int(info.min), min(int(info.max), 2**63 - 1)


def _array(values: Sequence[int], dtype: np.dtype[Any]) -> Array:
    return np.array(values, np.int64).astype(dtype)


def _binary(operator: str, dtype: np.dtype[Any], count: int = 3) -> bytes:
    kind = _onnx(dtype), [count]
    return _model([helper.make_node(operator, ["a", "b"], ["y"])], {"a": kind, "b": kind}, {"y": kind})


@pytest.mark.parametrize("name", CARRIED)
def test_the_ends_of_a_carried_type_are_exact(context: Context, name: str) -> None:
    dtype = _BY_NAME[name]
    low, high = _limits(dtype)
    a, b = _array([low, high, high - 1], dtype), _array([0, 0, 1], dtype)
    with context.graph(_binary("Add", dtype)) as graph:
        assert [port.dtype for port in (*graph.inputs, *graph.outputs)] == [dtype] * 3
        found = graph.run({"a": a, "b": b})["y"]
    assert found.dtype == dtype
    assert found.tolist() == [low, high, high]


@pytest.mark.parametrize("name", CARRIED)
@pytest.mark.parametrize(
    ("operator", "a", "b"), [("Add", "high", 1), ("Sub", "low", 1), ("Mul", "high", 2)], ids=["add", "sub", "mul"]
)
def test_beyond_the_ends_it_is_refused(context: Context, name: str, operator: str, a: str, b: int) -> None:
    """And the graph goes on."""
    dtype = _BY_NAME[name]
    low, high = _limits(dtype)
    far = _array([0, 0, low if a == "low" else high], dtype)
    with context.graph(_binary(operator, dtype)) as graph:
        with pytest.raises(CapiError) as caught:
            graph.run({"a": far, "b": _array([0, 0, b], dtype)})
        assert caught.value.status == "RANGE"
        assert "element 2" in caught.value.text
        assert graph.run({"a": _array([1, 2, 3], dtype), "b": _array([1, 1, 1], dtype)})["y"].shape == (3,)
        assert graph.statistics()["failed"] == 1


@pytest.mark.parametrize("value", [2**63, 2**64 - 1])
def test_an_input_that_the_carrier_cannot_hold_is_refused(context: Context, value: int) -> None:
    with context.graph(_binary("Max", np.dtype(np.uint64))) as graph:
        given = np.array([0, value, 1], np.uint64)
        with pytest.raises(CapiError) as caught:
            graph.run({"a": given, "b": given})
        assert caught.value.status == "RANGE"
        assert str(value) in caught.value.text


@pytest.mark.parametrize("name", CARRIED)
@pytest.mark.parametrize("to", ["float32", "float16", "int32", "int64", "bool"])
def test_casts_from_and_to_carried_types(context: Context, name: str, to: str) -> None:
    carried, other = _BY_NAME[name], _BY_NAME[to]
    values = [0, 1, 5, 7]
    nodes = [
        helper.make_node("Cast", ["a"], ["wide"], to=_onnx(other)),
        helper.make_node("Cast", ["wide"], ["back"], to=_onnx(carried)),
    ]
    model = _model(nodes, {"a": (_onnx(carried), [4])}, {"wide": (_onnx(other), [4]), "back": (_onnx(carried), [4])})
    with context.graph(model) as graph:
        found = graph.run({"a": _array(values, carried)})
    np.testing.assert_array_equal(found["wide"], np.array(values).astype(other))
    np.testing.assert_array_equal(found["back"].astype(np.int64), np.array(values).astype(other).astype(np.int64))


@pytest.mark.parametrize("name", CARRIED)
@pytest.mark.parametrize("value", [-9.0, -129.0, 16.0, 256.0, 2.0**33])
def test_casts_that_do_not_fit_are_refused(context: Context, name: str, value: float) -> None:
    import ml_dtypes

    dtype = _BY_NAME[name]
    info = ml_dtypes.iinfo(dtype)
    model = _model(
        [helper.make_node("Cast", ["a"], ["y"], to=_onnx(dtype))],
        {"a": (TensorProto.FLOAT, [2])},
        {"y": (_onnx(dtype), [2])},
    )
    with context.graph(model) as graph:
        given = {"a": np.array([3, value], np.float32)}
        if info.min <= value <= info.max:
            assert graph.run(given)["y"].tolist() == [3, int(value)]
            return
        with pytest.raises(CapiError) as caught:
            graph.run(given)
        assert caught.value.status == "RANGE"


@pytest.mark.xfail(strict=True, reason="what is carried is compared with its type at the graph's border only")
@pytest.mark.parametrize(
    ("nodes", "kind", "result", "a", "b"),
    [
        ([("Add", {}), ("Cast", {"to": TensorProto.FLOAT})], TensorProto.UINT8, TensorProto.FLOAT, 250, 10),
        ([("Add", {}), ("Cast", {"to": TensorProto.FLOAT})], TensorProto.UINT64, TensorProto.FLOAT, 2**62, 2**62),
        ([("Sub", {}), ("Cast", {"to": TensorProto.FLOAT})], TensorProto.UINT32, TensorProto.FLOAT, 1, 2),
        (
            [("Add", {}), ("Cast", {"to": TensorProto.UINT8}), ("Cast", {"to": TensorProto.INT32})],
            TensorProto.INT32, TensorProto.INT32, 290, 10,
        ),
    ],
    ids=["uint8", "uint64", "uint32", "cast"],
)  # fmt: skip
def test_numbers_inside_a_graph_that_do_not_fit(
    context: Context, nodes: list[tuple[str, dict[str, Any]]], kind: int, result: int, a: int, b: int
) -> None:
    """They are RANGE, or what ONNX makes of them."""
    names = ["a", *(f"t{i}" for i in range(len(nodes) - 1)), "y"]
    made = [
        helper.make_node(operator, [names[i], "b"] if i == 0 else [names[i]], [names[i + 1]], **attributes)
        for i, (operator, attributes) in enumerate(nodes)
    ]
    model = _model(made, {"a": (kind, [1]), "b": (kind, [1])}, {"y": (result, [1])})
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    given = {"a": np.array([a], dtype), "b": np.array([b], dtype)}
    reference = _run_reference(onnx.load_from_string(model), given)
    assert reference is not None
    try:
        with context.graph(model) as graph:
            answer = graph.run(given)["y"].tolist()
    except CapiError as error:
        answer = error.status
    assert answer in ("RANGE", reference[0].tolist())


def test_integers_that_a_trial_cannot_be_computed_from(context: Context) -> None:
    """A graph is tried on zeros before it is captured; what divides by them serves its requests all the same."""
    with context.graph(_binary("Div", np.dtype(np.int32))) as graph:
        given = {"a": np.array([7, -7, 9], np.int32), "b": np.array([2, 2, -4], np.int32)}
        for _ in range(3):
            assert graph.run(given)["y"].tolist() == [3, -3, -2]
        assert graph.statistics()["uncaptured"] == 3


# Shapes, names, weights


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (0,), (2, 0, 3), (1,) * 8], ids=str)
@pytest.mark.parametrize("location", [0, 1], ids=["host", "device"])
def test_every_type_in_every_shape(
    context: Context, dtype: np.dtype[Any], shape: tuple[int, ...], location: int
) -> None:
    """Rank 0, no elements, an odd number of them, the most axes: written, passed through a graph and read."""
    count = int(np.prod(shape, dtype=np.int64))
    values = (np.arange(count) % 2).reshape(shape).astype(dtype)
    with context.tensor_of(values, location) as tensor:
        assert tensor.describe() == (dtype, shape)
        np.testing.assert_array_equal(tensor.read(), values)
    kind = _onnx(dtype), list(shape)
    with context.graph(_model([helper.make_node("Identity", ["x"], ["y"])], {"x": kind}, {"y": kind})) as graph:
        assert graph.outputs[0].shape == shape
        for _ in range(2):
            found = graph.run({"x": values}, location)["y"]
            assert (found.dtype, found.shape) == (dtype, shape)
            np.testing.assert_array_equal(found, values)


def test_more_axes_than_there_can_be_are_refused(context: Context) -> None:
    with pytest.raises(CapiError) as caught:
        context.tensor(np.dtype(np.float32), (1,) * 9)
    assert caught.value.status == "INVALID_ARGUMENT"


@pytest.mark.parametrize("name", ["float32", "float16", "int64", *CARRIED])
def test_dynamic_shapes(context: Context, name: str) -> None:
    """One graph, many shapes, one of them without elements; outside the range it is SHAPE."""
    dtype = _BY_NAME[name]
    kind = _onnx(dtype), ["batch", "width"]
    model = _model(
        [helper.make_node("Add", ["x", "x"], ["double"]), helper.make_node("Transpose", ["double"], ["y"])],
        {"x": kind},
        {"y": (_onnx(dtype), ["width", "batch"])},
    )
    ranges = {"x": ((0, 1), (2, 3), (6, 5))}
    with context.graph(model, ranges=ranges) as graph:
        assert graph.inputs[0].shape == (-1, -1)
        for shape in [(2, 3), (1, 1), (6, 5), (0, 4), (2, 3), (3, 2)]:
            x = (np.arange(np.prod(shape)) % 4).reshape(shape).astype(np.int64)
            assert graph.output_shapes({"x": shape}) == [shape[::-1]]
            found = graph.run({"x": x.astype(dtype)})["y"]
            assert found.dtype == dtype
            np.testing.assert_array_equal(found.astype(np.int64), (2 * x).T)
        for other in ([7, 1], [1, 6], [1, 0], [2, 3, 1], [4]):
            with pytest.raises(CapiError) as caught:
                graph.run({"x": np.zeros(other, dtype)})
            assert caught.value.status == "SHAPE", other


def test_the_default_profile(context: Context) -> None:
    kind: tuple[int, Sequence[int | str]] = (TensorProto.FLOAT, ["batch", 3])
    with context.graph(_model([helper.make_node("Neg", ["x"], ["y"])], {"x": kind}, {"y": kind})) as graph:
        for rows in (1, 8, 32):
            x = np.random.default_rng(rows).standard_normal((rows, 3)).astype(np.float32)
            np.testing.assert_array_equal(graph.run({"x": x})["y"], -x)
        with pytest.raises(CapiError) as caught:
            graph.run({"x": np.zeros((33, 3), np.float32)})
        assert caught.value.status == "SHAPE"


def test_values_of_shape_tensors_have_ranges(context: Context) -> None:
    """Also of numbers below 0: -1 leaves an axis to Reshape."""
    model = _model(
        [helper.make_node("Reshape", ["x", "to"], ["y"])],
        {"x": (TensorProto.FLOAT, [4]), "to": (TensorProto.INT64, [2])},
        {"y": (TensorProto.FLOAT, ["a", "b"])},
    )
    x = np.arange(4, dtype=np.float32)
    with context.graph(model, ranges={"to": ((-1, 1), (2, 2), (4, 4))}) as graph:
        for to in [(2, 2), (4, 1), (-1, 2)]:
            found = graph.run({"x": x, "to": np.array(to, np.int64)})["y"]
            np.testing.assert_array_equal(found, x.reshape(to))


def test_resizing_is_asked_for(context: Context) -> None:
    kind = TensorProto.FLOAT, [2, 2]
    x = np.ones((2, 2), np.float32)
    with (
        context.graph(_model([helper.make_node("Neg", ["x"], ["y"])], {"x": kind}, {"y": kind})) as graph,
        context.tensor_of(x) as given,
        context.tensor(x.dtype, (4,)) as result,
    ):
        with pytest.raises(CapiError) as caught:
            graph.dispatch([("x", given)], [("y", result)], resize=False)
        assert caught.value.status == "SHAPE"
        graph.dispatch([("x", given)], [("y", result)])
        np.testing.assert_array_equal(result.read(), -x)
        graph.dispatch([("x", given)], [("y", result)], resize=False)


@pytest.mark.parametrize("name", ["größe", "输入", "a b/c:0", "🙂", "e\u0301", "x" * 300])
@pytest.mark.parametrize("dtype", [np.float32, np.uint32], ids=["own", "carried"])
def test_names_are_any_text(context: Context, name: str, dtype: type) -> None:
    kind = _onnx(np.dtype(dtype)), [2]
    model = _model([helper.make_node("Add", [name, name], [name + "'"])], {name: kind}, {name + "'": kind})
    with context.graph(model) as graph:
        assert [port.name for port in (*graph.inputs, *graph.outputs)] == [name, name + "'"]
        found = graph.run({name: np.array([1, 2], dtype)})
        with context.graph_from_plan(graph.plan()) as loaded:
            again = loaded.run({name: np.array([1, 2], dtype)})
    assert found[name + "'"].tolist() == again[name + "'"].tolist() == [2, 4]


@pytest.mark.parametrize("dtype", [d for d in DTYPES.values() if d.name != "float8_e4m3fn"], ids=str)
def test_weights_in_a_blob(context: Context, dtype: np.dtype[Any]) -> None:
    """Two tensors of one blob, with what is none of theirs in between. ONNX has no Where of float8."""
    one, two = _array([1, 0, 1], dtype), _array([0, 0, 1], dtype)
    blob, tensors = b"", []
    for name, array in (("one", one), ("two", two)):
        blob += b"\xff" * 5
        whole = numpy_helper.from_array(array, name)
        tensor = TensorProto(name=name, data_type=whole.data_type, dims=whole.dims, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", "wéights.bin"), ("offset", len(blob)), ("length", len(whole.raw_data))):
            tensor.external_data.add(key=key, value=str(value))
        tensors.append(tensor)
        blob += whole.raw_data
    kind, flags = (_onnx(dtype), [3]), (TensorProto.BOOL, [3])
    model = _model([helper.make_node("Where", ["flags", "one", "two"], ["y"])], {"flags": flags}, {"y": kind}, tensors)
    for flag in (False, True):
        with context.graph(model, blob) as graph:
            found = graph.run({"flags": np.full(3, flag)})["y"]
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, one if flag else two)
    for weights, words in ((None, "external data"), (blob[:-1], "too short")):
        with pytest.raises(CapiError) as caught:
            context.graph(model, weights)
        assert caught.value.status == "PARSE"
        assert words in caught.value.text


if __name__ == "__main__":
    ran = run_cases(collect_cases(["node"]))
    listed = [f"{o.name} {o.status}" for o in ran if o.status not in ("passed", "WRONG")]
    counts = Counter(o.status for o in ran)
    told = ", ".join(f"{status} {count}" for status, count in sorted(counts.items()))
    REFUSED.write_text("\n".join([f"# onnx {onnx.__version__}", f"# {len(ran)} cases: {told}", *listed]) + "\n")
    print(f"{len(ran)} cases: {told}; ONNX Runtime judged {sum(o.judged for o in ran)}")
    for each in ran:
        if each.status == "WRONG":
            print(each.name, each.reason[:500])
