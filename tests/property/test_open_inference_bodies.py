"""Whatever a client sends, the Open Inference Protocol endpoint answers it, with tensors or with a typed refusal."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("starlette", reason="the extra oip is not installed")

from tests.asgi import Answer, ask
from trtx_py.integrations._oip_codec import DATATYPES
from trtx_py.integrations.open_inference import Model, TensorMetadata, create_app

EXAMPLES = settings(max_examples=int(os.environ.get("TRTX_PROPERTY_EXAMPLES", "200")), deadline=None)
LENGTH = "Inference-Header-Content-Length"


class Echo:
    async def infer(self, inputs: Any, /) -> Any:
        return {f"{name}'": array for name, array in inputs.items()}


def post(datatypes: dict[str, str], body: Any, headers: dict[str, str]) -> Answer:
    inputs = [TensorMetadata(name, datatype, (-1,)) for name, datatype in datatypes.items()]
    outputs = [TensorMetadata(f"{tensor.name}'", tensor.datatype, (-1,)) for tensor in inputs]
    app = create_app({"m": Model(Echo(), inputs, outputs)})
    answer, again = (asyncio.run(ask(app, "/v2/models/m/infer", body, headers)) for _ in range(2))
    assert (again.status, again.body) == (answer.status, answer.body)  # whether or not its header is known
    counts = app.statistics()
    assert counts.in_flight == 0
    assert counts.failed == 0
    assert counts.completed + counts.refused == 2
    if answer.status == 200:
        assert counts.completed == 2
        assert "outputs" in answer.json
    else:
        assert answer.status in (400, 415)
        assert answer.error
    return answer


@st.composite
def tensors(draw: st.DrawFn) -> tuple[str, np.ndarray]:
    datatype = draw(st.sampled_from(sorted(DATATYPES)))
    dtype = DATATYPES[datatype]
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    count = int(np.prod(shape))
    if dtype.kind == "b":
        array = np.array(draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype)
    elif dtype.kind in "iu":
        limits = np.iinfo(dtype)
        numbers = st.integers(int(limits.min), int(limits.max))
        array = np.array(draw(st.lists(numbers, min_size=count, max_size=count)), dtype)
    else:
        array = np.frombuffer(draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize)), dtype)
    return datatype, array.reshape(shape)


def encoded(given_tensors: list[tuple[str, np.ndarray]], binary: list[bool], answer: bool) -> tuple[bytes, int]:
    """A body, and how much of it is JSON."""
    entries, rest = [], b""
    for number, ((datatype, array), apart) in enumerate(zip(given_tensors, binary, strict=True)):
        entry: dict[str, Any] = {"name": f"x{number}", "datatype": datatype, "shape": list(array.shape)}
        if apart:
            entry["parameters"] = {"binary_data_size": array.nbytes}
            rest += array.tobytes()
        else:
            with np.errstate(invalid="ignore"):  # signalling NaNs
                wide = array.astype(np.float64) if array.dtype.kind not in "biu" else array
            entry["data"] = wide.tolist()
        entries.append(entry)
    header = json.dumps({"inputs": entries, "parameters": {"binary_data_output": answer}}).encode()
    return header + rest, len(header)


@EXAMPLES
@given(st.lists(tensors(), min_size=1, max_size=3), st.data())
def test_tensors_come_back_bit_by_bit(found: list[tuple[str, np.ndarray]], data: st.DataObject) -> None:
    binary = [data.draw(st.booleans()) for _ in found]
    body, length = encoded(found, binary, True)
    datatypes = {f"x{number}": datatype for number, (datatype, _) in enumerate(found)}
    answer = post(datatypes, body, {LENGTH: str(length)})
    assert answer.status == 200, answer.body
    rest = answer.body[int(answer.headers[LENGTH.lower()]) :]
    for output, (datatype, array), apart in zip(answer.json["outputs"], found, binary, strict=True):
        size = output["parameters"]["binary_data_size"]
        back = np.frombuffer(rest[:size], DATATYPES[datatype]).reshape(output["shape"])
        rest = rest[size:]
        assert back.shape == array.shape
        if apart or array.dtype.kind in "biu":
            assert back.tobytes() == array.tobytes()
        else:  # through JSON a NaN keeps being one, and not more
            with np.errstate(invalid="ignore"):
                assert np.array_equal(back.astype(np.float64), array.astype(np.float64), equal_nan=True)
    assert rest == b""


@EXAMPLES
@given(st.lists(tensors(), min_size=1, max_size=2), st.data())
def test_damaged_bodies_are_refused_and_never_crash(found: list[tuple[str, np.ndarray]], data: st.DataObject) -> None:
    body, length = encoded(found, [data.draw(st.booleans()) for _ in found], data.draw(st.booleans()))
    damaged = bytearray(body)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged)))
        how = data.draw(st.sampled_from(["set", "cut", "insert"]))
        if how == "set" and at < len(damaged):
            damaged[at] = data.draw(st.integers(0, 255))
        elif how == "cut":
            del damaged[at:]
        else:
            damaged[at:at] = data.draw(st.binary(max_size=4))
    headers = {LENGTH: data.draw(st.sampled_from([str(length), str(len(damaged)), "0", "", "-1", "1e3", str(1 << 70)]))}
    datatypes = {f"x{number}": datatype for number, (datatype, _) in enumerate(found)}
    post(datatypes, bytes(damaged), headers)


NAMES = st.sampled_from(
    ["id", "inputs", "outputs", "parameters", "name", "shape", "datatype", "data", "binary_data_size", "binary_data",
     "binary_data_output", "priority", "timeout", "tenant", "x0", "FP32", "INT8"]
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | NAMES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=5),
    max_leaves=20,
)
TENSOR = st.fixed_dictionaries(
    {"name": st.just("x0") | JSON, "datatype": st.just("INT8") | JSON, "shape": st.just([1]) | JSON},
    optional={"data": JSON, "parameters": JSON},
)


@EXAMPLES
@given(JSON | st.fixed_dictionaries({"inputs": st.lists(TENSOR, max_size=2)}, optional={"outputs": JSON, "id": JSON}))
def test_any_json_is_answered(value: Any) -> None:
    post({"x0": "INT8"}, json.dumps(value).encode(), {})


@EXAMPLES
@given(st.binary(max_size=200), st.text("0123456789- ", max_size=4))
def test_any_bytes_are_answered(body: bytes, length: str) -> None:
    post({"x0": "INT8"}, body, {LENGTH: length})
