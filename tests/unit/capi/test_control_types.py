"""Types that TensorRT lacks: carried by wider ones through the whole model, and checked on the way in and out."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.onnx_suite import collect_cases
from tests.unit.capi.kit import (
    BOOL,
    FLOAT32,
    INT4,
    INT8,
    INT32,
    INT64,
    UINT4,
    UINT8,
    UINT32,
    UINT64,
    Launcher,
    context,
    control,
    graph,
    ok,
    options,
    read,
)
from tests.unit.capi.test_control_graphs import external_model
from tests.unit.serving import make_model
from trtx_py.capi._dtypes import CARRIERS, DType, converted, packed, unpacked
from trtx_py.capi._model_types import carry, io_types
from trtx_py.capi._status import Status, StatusError

pytestmark = pytest.mark.usefixtures("nothing_stays_open")

ONNX = {
    UINT32: TensorProto.UINT32, UINT64: TensorProto.UINT64, INT8: TensorProto.INT8, UINT8: TensorProto.UINT8,
    INT4: TensorProto.INT4, UINT4: TensorProto.UINT4,
}  # fmt: skip
LACKING = [UINT32, UINT64, INT4, UINT4]  # on the mock; int8 and uint8 arithmetic it can


def content(values: Any, dtype: int) -> memoryview:
    """Numbers as C has them."""
    kind = DType(dtype)
    if not kind.packed:
        return memoryview(np.array(values, kind.numpy).tobytes())
    flat = np.array(values, np.int64).reshape(-1) & 15
    flat = np.append(flat, 0) if flat.size % 2 else flat
    return memoryview((flat[0::2] | flat[1::2] << 4).astype(np.uint8).tobytes())


def numbers(address: int, nbytes: int, dtype: int, dims: Any) -> list[int]:
    raw = memoryview(read(address, (nbytes,), np.uint8).tobytes())
    found: list[int] = unpacked(raw, DType(dtype), tuple(dims), "").tolist()
    return found


def call(owner: Any, model: bytes, *rows: tuple[str, int, Any]) -> Any:
    given = tuple((name, dtype, np.shape(values), content(values, dtype)) for name, dtype, values in rows)
    return control.run(owner, memoryview(model), None, given, options())


def results(answer: Any) -> dict[str, Any]:
    kept, rows = ok(answer)
    found = {name: numbers(address, nbytes, dtype, dims) for name, dtype, dims, address, nbytes in rows}
    del kept
    return found


def binary(operator: str, dtype: int, count: int = 3) -> bytes:
    element = ONNX[dtype]
    return make_model(
        [helper.make_node(operator, ["x", "y"], ["z"])],
        [("x", element, [count]), ("y", element, [count])], [("z", element, [count])],
    )  # fmt: skip


@pytest.mark.parametrize("dtype", LACKING)
def test_arithmetic_to_the_ends_of_the_type(dtype: int) -> None:
    low, high = DType(dtype).limits
    carrier_high = CARRIERS[DType(dtype)].limits[1]
    high = min(high, carrier_high)
    with context() as owner:
        found = results(call(owner, binary("Add", dtype), ("x", dtype, [low, high, 1]), ("y", dtype, [0, 0, 2])))
        assert found["z"] == [low, high, 3]
        if high < carrier_high:
            status, text = call(owner, binary("Add", dtype), ("x", dtype, [1, high, 1]), ("y", dtype, [0, 1, 0]))
            assert status == 7
            assert f"'z': element 1 is {high + 1}" in text
        status, text = call(owner, binary("Sub", dtype), ("x", dtype, [1, 1, low]), ("y", dtype, [0, 0, 1]))
        assert (status, f"element 2 is {low - 1}" in text) == (7, True), text


def test_what_the_carrier_cannot_hold_does_not_go_in() -> None:
    with context() as owner:
        model = binary("Max", UINT64, 1)
        status, text = call(owner, model, ("x", UINT64, [1 << 63]), ("y", UINT64, [0]))
        assert (status, f"'x': element 0 is {1 << 63}" in text) == (7, True)
        high = (1 << 63) - 1
        assert results(call(owner, model, ("x", UINT64, [high]), ("y", UINT64, [0])))["z"] == [high]


@pytest.mark.parametrize("dtype", LACKING)
def test_the_caller_is_told_both_types_and_c_converts(dtype: int) -> None:
    carrier = int(CARRIERS[DType(dtype)])
    with context() as owner:
        made, io = ok(control.open_onnx(owner, memoryview(binary("Mul", dtype)), None, options()))
        assert [row[2:] for row in io] == [(dtype, carrier, (3,))] * 3
        entry, outputs, buckets = ok(control.capture(made, ((3,), (3,))))
        kind = DType(carrier).numpy
        (found,) = Launcher(buckets[0]).run([np.array([1, 2, 3], kind)] * 2, [(outputs[0], kind)])
        assert found.tolist() == [1, 4, 9]
        assert control.release(entry) == (0,)
        plan = ok(control.graph_plan(made))
        assert control.close_graph(made) == (0,)
        made, again = ok(control.open_plan(owner, memoryview(plan), options()))
        assert again == io
        assert control.close_graph(made) == (0,)
        assert results(call(owner, plan, ("x", dtype, [1, 2, 3]), ("y", dtype, [2, 2, 2])))["z"] == [2, 4, 6]


def test_types_inside_that_are_found_when_the_model_is_refused() -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["u"], to=TensorProto.UINT32),
        helper.make_node("Mul", ["u", "w"], ["v"]),
        helper.make_node("Cast", ["v"], ["y"], to=TensorProto.FLOAT),
    ]
    model = make_model(
        nodes, [("x", TensorProto.FLOAT, [2])], [("y", TensorProto.FLOAT, [2])], {"w": np.array([3, 4], np.uint32)}
    )
    with context() as owner:
        assert results(call(owner, model, ("x", FLOAT32, [5, 6])))["y"] == [15, 24]


@pytest.mark.parametrize("dtype", [INT8, UINT8])
def test_eight_bits_are_moved_as_they_are_and_computed_in_wider_ones(dtype: int) -> None:
    high = DType(dtype).limits[1]
    with context() as owner:
        with graph(owner, binary("Max", dtype)) as made:
            assert [row[2:4] for row in made.io] == [(dtype, dtype)] * 3
        with graph(owner, binary("Add", dtype)) as made:
            assert [row[2:4] for row in made.io] == [(dtype, INT32)] * 3
        assert call(owner, binary("Add", dtype), ("x", dtype, [0, high, 0]), ("y", dtype, [0, 1, 0]))[0] == 7


@pytest.mark.parametrize("dtype", [INT4, UINT4])
def test_borders_of_four_bits_that_only_the_engine_refuses(dtype: int) -> None:
    model = make_model(
        [helper.make_node("Identity", ["x"], ["y"])], [("x", ONNX[dtype], [5])], [("y", ONNX[dtype], [5])]
    )
    values = [-8, 7, 0, 1, 2] if dtype == INT4 else [15, 0, 1, 8, 7]
    with context() as owner:
        kept, rows = ok(call(owner, model, ("x", dtype, values)))
        assert rows[0][4] == 3
        assert read(rows[0][3], (3,), np.uint8).tolist() == list(content(values, dtype))
        assert results(call(owner, model, ("x", dtype, values)))["y"] == values
        del kept


def test_names_that_only_c_has_no_types_for() -> None:
    model = make_model(
        [helper.make_node("Identity", ["x"], ["y"])], [("x", TensorProto.DOUBLE, [2])], [("y", TensorProto.DOUBLE, [2])]
    )
    with context() as owner:
        with graph(owner, model) as made:  # TensorRT reads it as float32
            assert [row[2:4] for row in made.io] == [(FLOAT32, FLOAT32)] * 2
        for element in (TensorProto.FLOAT4E2M1, TensorProto.STRING, TensorProto.COMPLEX64, TensorProto.INT16):
            model = make_model(
                [helper.make_node("Identity", ["x"], ["y"])], [("x", element, [2])], [("y", element, [2])], opset=23
            )
            status, text = control.open_onnx(owner, memoryview(model), None, options())
            assert status in (12, 25), text


def everything(element: int) -> onnx.ModelProto:
    """A model that has the type in every place where a type can be."""
    number = int(element)
    constant = helper.make_tensor("", number, [2], [1, 2])
    one = helper.make_tensor("", number, [1], [1])
    branch = helper.make_graph(
        [
            helper.make_node("Constant", [], ["k"], value=helper.make_tensor("", number, [2], [3, 3])),
            helper.make_node("Add", ["inner", "k"], ["then_out"]),
        ],
        "then", [], [helper.make_tensor_value_info("then_out", number, [2])],
    )  # fmt: skip
    other = helper.make_graph(
        [helper.make_node("Identity", ["inner"], ["else_out"])], "else", [],
        [helper.make_tensor_value_info("else_out", number, [2])],
    )  # fmt: skip
    nodes = [
        helper.make_node("Constant", [], ["c"], value=constant),
        helper.make_node("ConstantOfShape", ["two"], ["ones"], value=one),
        helper.make_node("Cast", ["f"], ["cast"], to=number),
        helper.make_node("CastLike", ["f", "c"], ["like"]),
        helper.make_node("Range", ["zero", "limit", "step"], ["range"]),
        helper.make_node("Sum4", ["c", "ones", "cast", "like"], ["s"], domain="mine"),
        helper.make_node("Add", ["s", "w"], ["t"]),
        helper.make_node("Add", ["t", "range"], ["u"]),
        helper.make_node("Add", ["u", "x"], ["inner"]),
        helper.make_node("If", ["flag"], ["y"], then_branch=branch, else_branch=other),
    ]
    scalars = {"zero": 0, "limit": 2, "step": 1}
    body = [
        helper.make_node("Add", ["a", "b"], ["ab"]),
        helper.make_node("Cast", ["c"], ["cc"]),
        helper.make_node("Add", ["cc", "d"], ["cd"]),
        helper.make_node("Add", ["ab", "cd"], ["out"]),
    ]
    reference = body[1].attribute.add()
    reference.name, reference.ref_attr_name, reference.type = "to", "kind", onnx.AttributeProto.INT
    nodes[5].attribute.append(helper.make_attribute("kind", number))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("mine", 1)]
    function = helper.make_function("mine", "Sum4", list("abcd"), ["out"], body, opsets[:1], ["kind"])
    made = helper.make_graph(
        nodes, "g",
        [
            helper.make_tensor_value_info("x", number, [2]), helper.make_tensor_value_info("f", TensorProto.FLOAT, [2]),
            helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", number, [2])],
        [
            helper.make_tensor("w", number, [2], [10, 10]), numpy_helper.from_array(np.array([2], np.int64), "two"),
            *(helper.make_tensor(name, number, [], [value]) for name, value in scalars.items()),
        ],
        value_info=[helper.make_tensor_value_info("s", number, [2])],
    )  # fmt: skip
    return helper.make_model(made, opset_imports=opsets, functions=[function], ir_version=10)


@pytest.mark.parametrize("dtype", [UINT32, UINT64, INT8, UINT8])
def test_a_whole_model_is_retyped(dtype: int) -> None:
    model = everything(ONNX[dtype])
    onnx.checker.check_model(model)
    own = io_types(model)
    assert (own["x"], own["f"], own["flag"]) == (dtype, FLOAT32, BOOL)
    assert carry(model)
    onnx.checker.check_model(model, full_check=True)
    text = onnx.printer.to_text(model)
    assert f"{DType(dtype).name.lower()}[" not in text
    assert f"to: int = {ONNX[dtype]}" not in text
    assert not carry(model)  # nothing is left
    from onnx.reference import ReferenceEvaluator

    kind = CARRIERS[DType(dtype)].numpy
    feeds: Any = {"x": np.array([1, 2], kind), "f": np.array([4, 5], np.float32), "flag": np.array(True)}
    outputs: Any = ReferenceEvaluator(model).run(None, feeds)
    found = outputs[0]
    assert found.dtype == kind
    assert found.tolist() == [1 + 1 + 4 + 4 + 10 + 0 + 1 + 3, 2 + 1 + 5 + 5 + 10 + 1 + 2 + 3]


def test_what_is_quantized_stays() -> None:
    model = onnx.ModelProto()
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        helper.make_node("Cast", ["d"], ["y"], to=TensorProto.UINT32),
    ]
    model.ParseFromString(
        make_model(
            nodes, [("x", TensorProto.FLOAT, [2])], [("y", TensorProto.UINT32, [2])],
            {"scale": np.array(0.5, np.float32), "zero": np.array(0, np.int8)},
        )
    )  # fmt: skip
    raw = model.SerializeToString()
    assert carry(model)
    assert {tensor.name: tensor.data_type for tensor in model.graph.initializer} == {"scale": 1, "zero": 3}
    assert model.graph.node[2].attribute[0].i == TensorProto.INT64
    with context() as owner:
        assert results(call(owner, raw, ("x", FLOAT32, [3, 60])))["y"] == [3, 60]
        assert call(owner, raw, ("x", FLOAT32, [3, -4]))[0] == 7


def test_external_weights_are_retyped_too() -> None:
    values = np.array([7, 8, 4_000_000_000], np.uint32)
    model = onnx.ModelProto()
    model.ParseFromString(external_model("w.bin", 4, values.view(np.float32)))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.UINT32
    model.graph.initializer[0].data_type = TensorProto.UINT32
    blob = memoryview(b"....."[:4] + values.tobytes())
    with context() as owner:
        x = content([1, 2, 3], UINT32)
        answer = control.run(owner, memoryview(model.SerializeToString()), blob, (("x", UINT32, (3,), x),), options())
        assert results(answer)["y"] == [8, 10, 4_000_000_003]


def test_a_constant_beyond_the_carrier_and_the_first_refusal() -> None:
    tensor = helper.make_tensor("w", TensorProto.UINT64, [1], [1 << 63])
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("Add", ["x", "w"], ["y"])], "g",
            [helper.make_tensor_value_info("x", TensorProto.UINT64, [1])],
            [helper.make_tensor_value_info("y", TensorProto.UINT64, [1])], [tensor],
        ),
        opset_imports=[helper.make_opsetid("", 17)], ir_version=8,
    )  # fmt: skip
    with context() as owner:
        status, text = call(owner, model.SerializeToString(), ("x", UINT64, [1]))
        assert (status, "UINT64" in text) == (12, True)
        status, text = call(owner, binary("BitwiseAnd", UINT32), ("x", UINT32, [1, 1, 1]), ("y", UINT32, [1, 1, 1]))
        assert (status, "UINT32" in text) == (12, True)


def test_bool_is_what_is_not_0() -> None:
    model = make_model(
        [helper.make_node("Not", ["x"], ["y"])], [("x", TensorProto.BOOL, [4])], [("y", TensorProto.BOOL, [4])]
    )
    with context() as owner:
        answer = control.run(
            owner, memoryview(model), None, (("x", BOOL, (4,), memoryview(bytes([0, 1, 2, 255]))),), options()
        )
        assert results(answer)["y"] == [True, False, False, False]


@pytest.mark.parametrize("dtype", [INT8, UINT8, INT4, UINT4, UINT32, UINT64, INT32, INT64, BOOL])
def test_conversion_there_and_back(dtype: int) -> None:
    kind = DType(dtype)
    low, high = kind.limits
    carrier = CARRIERS.get(kind, DType.INT64)
    values = np.array([low, 0, 1, min(high, carrier.limits[1])], carrier.numpy)
    there = packed(values, kind, "t")
    assert there.flags.c_contiguous
    assert there.nbytes == kind.nbytes((4,))
    back = converted(unpacked(memoryview(there.tobytes()), kind, (4,), "t"), carrier, "t")
    assert back.dtype == carrier.numpy
    assert back.tolist() == values.tolist()
    for beyond in (low - 1, high + 1):
        if carrier.limits[0] <= beyond <= carrier.limits[1]:
            with pytest.raises(StatusError) as caught:
                packed(np.array([[0, beyond]], carrier.numpy), kind, "t")
            assert caught.value.status is Status.RANGE
            assert f"element 1 is {beyond}" in str(caught.value)
    assert packed(np.empty((0, 3), carrier.numpy), kind, "t").nbytes == 0


@pytest.mark.slow
def test_the_suite_of_onnx_gives_what_it_says_or_is_refused() -> None:
    """Every node test with one of these types at its border: never another result, and no fault."""
    passed, refused = 0, 0
    with context(cached=1) as owner:
        for case in collect_cases(["node"]):
            model, data_sets = case.load()
            types = io_types(model)
            names = [value.name for value in (*model.graph.input, *model.graph.output)]
            if not any(dtype in CARRIERS for dtype in types.values()) or types.keys() != set(names) or not data_sets:
                continue
            inputs, outputs = data_sets[0]
            rows = tuple(
                (name, int(types[name]), array.shape, content(array, types[name]))
                for name, array in (
                    (name, _plain(array, types[name])) for name, array in zip(names, inputs, strict=False)
                )
            )
            answer = control.run(owner, memoryview(model.SerializeToString()), None, rows, options())
            if answer[0]:
                assert answer[0] in (7, 12, 13, 25), (case.name, answer)  # out of range, or not for TensorRT
                refused += 1
                continue
            found = results(answer)
            for name, expected in zip(names[len(inputs) :], outputs, strict=True):
                wanted = _plain(expected, types[name])
                assert np.shape(found[name]) == wanted.shape, case.name
                got = np.array(found[name]).astype(wanted.dtype)
                assert np.allclose(got, wanted, case.rtol, case.atol, equal_nan=True), case.name
            passed += 1
    assert passed > 70, (passed, refused)


def _plain(array: Any, dtype: DType) -> np.ndarray:
    array = numpy_helper.to_array(array) if isinstance(array, TensorProto) else np.asarray(array)
    if dtype.packed:
        return array.astype(np.int8 if dtype is DType.INT4 else np.uint8)
    return array.astype(dtype.numpy)
