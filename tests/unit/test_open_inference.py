"""The Open Inference Protocol application, without a socket: what it answers, refuses, and finishes before it ends."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import anyio
import numpy as np
import pytest

import trtx_py as trtx
from mock_backend import MockBackend
from mock_backend._faults import slow
from tests.asgi import Answer, ask, lifespan
from tests.unit.serving import GateClock, affine, affine_plan, rows, serving

pytest.importorskip("starlette", reason="the extra oip is not installed")

from trtx_py.integrations._oip_codec import DATATYPES
from trtx_py.integrations.open_inference import Model, OpenInferenceApp, Servable, TensorMetadata, create_app

INFER = "/v2/models/m/infer"


class Fake:
    """y = x, or what it is told."""

    def __init__(self, outcome: Any = None) -> None:
        self.outcome = outcome
        self.seen: list[dict[str, Any]] = []

    async def infer(self, inputs: Mapping[str, Any], /) -> Mapping[str, np.ndarray]:
        self.seen.append(dict(inputs))
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome or {"y": inputs["x"]}


class Batching(Fake):
    """With the parameters of a batcher."""

    async def infer(
        self, inputs: Mapping[str, Any], *, priority: int = 0, deadline_s: float | None = None, tenant: str = ""
    ) -> Mapping[str, np.ndarray]:
        self.seen.append({"priority": priority, "deadline_s": deadline_s, "tenant": tenant})
        return {"y": inputs["x"]}


class Held(Fake):
    """Answers when the test lets it."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go = anyio.Event(), anyio.Event()

    async def infer(self, inputs: Mapping[str, Any], /) -> Mapping[str, np.ndarray]:
        self.begun.set()
        await self.go.wait()
        return {"y": inputs["x"]}


def described(servable: Servable, datatype: str = "FP32", shape: tuple[int, ...] = (-1,)) -> Model:
    return Model(servable, [TensorMetadata("x", datatype, shape)], [TensorMetadata("y", datatype, shape)])


def app_of(servable: Servable, datatype: str = "FP32", shape: tuple[int, ...] = (-1,), **options: Any) -> Any:
    return create_app({"m": described(servable, datatype, shape)}, **options)


def request(data: Any = (1.0, 2.0), datatype: str = "FP32", shape: Any = None, **more: Any) -> bytes:
    shape = [len(data)] if shape is None else shape
    return json.dumps(
        {"inputs": [{"name": "x", "datatype": datatype, "shape": shape, "data": list(data)}], **more}
    ).encode()


def binary(array: np.ndarray, datatype: str, **more: Any) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a request whose tensor, and whose answer, are binary."""
    header = json.dumps(
        {
            "inputs": [
                {
                    "name": "x",
                    "datatype": datatype,
                    "shape": list(array.shape),
                    "parameters": {"binary_data_size": array.nbytes},
                }
            ],
            "parameters": {"binary_data_output": True},
            **more,
        }
    ).encode()
    return header + array.tobytes(), {"Inference-Header-Content-Length": str(len(header))}


def tensor_of(answer: Answer, dtype: Any) -> np.ndarray:
    """The only output of a binary answer."""
    (output,) = answer.json["outputs"]
    rest = answer.body[int(answer.headers["inference-header-content-length"]) :]
    assert len(rest) == output["parameters"]["binary_data_size"]
    return np.frombuffer(rest, dtype).reshape(output["shape"])


# Metadata and health


async def test_metadata_of_server_and_of_an_engine(mock_backend: MockBackend) -> None:
    async with serving(mock_backend) as engine:
        app = create_app({"m": engine}, name="here")
        server = (await ask(app, "/v2")).json
        assert server == {"name": "here", "version": trtx.__version__, "extensions": ["binary_tensor_data"]}
        model = await ask(app, "/v2/models/m")
        assert model.json == {
            "name": "m",
            "versions": ["1"],
            "platform": "tensorrt",
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
            "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 4]}],
        }
        assert (await ask(app, "/v2/models/m/versions/1")).json == model.json


async def test_an_engine_that_is_closed_is_not_ready_and_not_served(mock_backend: MockBackend) -> None:
    async with serving(mock_backend) as engine:
        app = create_app({"m": engine})
        for path in ("/v2/health/ready", "/v2/models/m/ready", "/v2/models/m/versions/1/ready"):
            assert (await ask(app, path)).status == 200
    assert (await ask(app, "/v2/health/live")).status == 200
    for path in ("/v2/health/ready", "/v2/models/m/ready", "/v2/models/m/versions/1/ready"):
        answer = await ask(app, path)
        assert (answer.status, answer.body) == (400, b"")
    body = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}).encode()
    assert (await ask(app, INFER, body)).status == 503


async def test_ready_is_what_the_model_says() -> None:
    app = create_app({"m": Model(Fake(), [], [], ready=lambda: False)})
    assert (await ask(app, "/v2/models/m/ready")).status == 400


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        ("/v2/models/n", None, 404, "there is no model 'n'; there are 'm'"),
        ("/v2/models/n/infer", b"{}", 404, "there is no model 'n'; there are 'm'"),
        ("/v2/models/m/versions/2", None, 404, "has no version '2'; it has version '1'"),
        ("/v2/models/m/versions/2/infer", b"{}", 404, "has no version '2'"),
        ("/v2/nothing", None, 404, "Not Found"),
        (INFER, None, 405, "Method Not Allowed"),
    ],
)
async def test_what_does_not_exist(path: str, body: bytes | None, status: int, text: str) -> None:
    answer = await ask(app_of(Fake()), path, body)
    assert answer.status == status
    assert text in answer.error


# Inference


async def test_json_in_and_out(mock_backend: MockBackend) -> None:
    async with serving(mock_backend) as engine:
        app = create_app({"m": engine})
        x = rows(2)
        entry = {"name": "x", "datatype": "FP32", "shape": [2, 4], "data": x.tolist()}
        for data in (x.tolist(), x.ravel().tolist()):
            answer = await ask(app, INFER, json.dumps({"id": "seven", "inputs": [{**entry, "data": data}]}).encode())
            assert answer.status == 200
            assert answer.headers["content-type"] == "application/json"
            (output,) = answer.json.pop("outputs")
            assert answer.json["id"] == "seven"
            assert (answer.json["model_name"], answer.json["model_version"]) == ("m", "1")
            assert (output["name"], output["datatype"], output["shape"]) == ("y", "FP32", [2, 4])
            assert np.array_equal(np.float32(output["data"]).reshape(2, 4), affine(x))


async def test_binary_in_and_out(mock_backend: MockBackend) -> None:
    async with serving(mock_backend) as engine:
        app = create_app({"m": engine})
        for padding in range(4):  # whatever the alignment of the tensor in the body
            x = rows(3, padding)
            body, headers = binary(x, "FP32", id="i" * padding)
            answer = await ask(app, "/v2/models/m/versions/1/infer", body, headers)
            assert answer.status == 200, answer.body
            assert answer.headers["content-type"] == "application/octet-stream"
            assert np.array_equal(tensor_of(answer, np.float32), affine(x))


@pytest.mark.parametrize("datatype", DATATYPES)
async def test_every_datatype_in_binary_and_in_json(datatype: str) -> None:
    dtype = DATATYPES[datatype]
    x = np.array([0, 1, 1, 0, 1], dtype) if datatype == "BOOL" else np.array([0, 1, 2, 100, 127], dtype)
    fake = Fake()
    app = app_of(fake, datatype)
    body, headers = binary(x, datatype)
    assert np.array_equal(tensor_of(await ask(app, INFER, body, headers), dtype), x)
    answer = await ask(app, INFER, request(x.tolist(), datatype))
    assert answer.status == 200, answer.body
    (output,) = answer.json["outputs"]
    assert output["datatype"] == datatype
    assert np.array_equal(np.array(output["data"]).astype(dtype), x)
    for seen in fake.seen:
        assert seen["x"].dtype == dtype
        assert np.array_equal(seen["x"], x)


async def test_a_binary_input_is_a_view_of_the_body_and_a_large_output_is_sent_as_it_is() -> None:
    y = np.arange(100_000, dtype=np.float32)
    fake = Fake({"y": y})
    body, headers = binary(np.ones(2, np.float32), "FP32")
    answer = await ask(app_of(fake), INFER, body, headers)
    assert np.shares_memory(fake.seen[0]["x"], np.frombuffer(body, np.uint8))
    assert np.shares_memory(np.asarray(answer.pieces[1]), y)
    assert np.array_equal(tensor_of(answer, np.float32), y)


@pytest.mark.parametrize("y", [np.zeros((0, 3), np.float32), np.float32(7).reshape(()), np.ones((2, 3), np.float32).T])
async def test_outputs_that_are_empty_scalars_or_not_contiguous(y: np.ndarray) -> None:
    app = app_of(Fake({"y": y}))
    body, headers = binary(np.ones(2, np.float32), "FP32")
    assert np.array_equal(tensor_of(await ask(app, INFER, body, headers), np.float32), y)
    (output,) = (await ask(app, INFER, request())).json["outputs"]
    assert np.array_equal(np.float32(output["data"]).reshape(output["shape"]), y)


async def test_outputs_that_were_asked_for_in_their_order_and_form() -> None:
    outputs = {"a": np.ones(1, np.int32), "b": np.full(2, 2, np.int32), "c": np.full(3, 3, np.int32)}
    described = [TensorMetadata(name, "INT32", (-1,)) for name in outputs]
    app = create_app({"m": Model(Fake(outputs), [TensorMetadata("x", "FP32", (-1,))], described)})
    wanted = [{"name": "c", "parameters": {"binary_data": True}}, {"name": "a"}]
    answer = await ask(app, INFER, request(outputs=wanted))
    first, second = answer.json["outputs"]
    assert (first["name"], first["parameters"]) == ("c", {"binary_data_size": 12})
    assert (second["name"], second["data"]) == ("a", [1])
    assert np.frombuffer(answer.body[-12:], np.int32).tolist() == [3, 3, 3]
    refused = await ask(app, INFER, request(outputs=[{"name": "d"}]))
    assert refused.status == 400
    assert "no output 'd'; the model has 'a', 'b', 'c'" in refused.error


async def test_the_same_header_again_reads_the_data_anew() -> None:
    app = app_of(Fake())
    for turn in range(3):
        for length in range(300):  # more headers than are kept
            x = np.full(length, turn, np.float32)
            body, headers = binary(x, "FP32")
            assert np.array_equal(tensor_of(await ask(app, INFER, body, headers), np.float32), x)
            assert (await ask(app, INFER, body + b"!", headers)).status == 400
            assert (await ask(app, INFER, body[:-1], headers)).status == 400


async def test_a_body_in_pieces_is_put_together() -> None:
    x = np.arange(300, dtype=np.float32)
    body, headers = binary(x, "FP32")
    answer = await ask(app_of(Fake()), INFER, [body[:7], body[7:500], b"", body[500:]], headers)
    assert np.array_equal(tensor_of(answer, np.float32), x)


async def test_parameters_reach_a_batcher() -> None:
    batcher = Batching()
    app = app_of(batcher, default_priority=4)
    for priority in (0, 1, 4, 7):
        parameters = {"priority": priority, "timeout": 50_000, "tenant": "t", "of_a_proxy": 1}
        assert (await ask(app, INFER, request(parameters=parameters))).status == 200
    assert (await ask(app, INFER, request())).status == 200
    assert [seen["priority"] for seen in batcher.seen] == [0, 3, 0, -3, 0]
    assert [seen["deadline_s"] for seen in batcher.seen] == [pytest.approx(0.05)] * 4 + [None]
    assert [seen["tenant"] for seen in batcher.seen] == ["t"] * 4 + [""]


class Wrapper:
    """Hands on whatever it is given, as a tracer does."""

    def __init__(self, target: Any) -> None:
        self.target = target

    async def infer(self, inputs: Mapping[str, Any], /, **options: Any) -> Any:
        return await self.target.infer(inputs, **options)


async def test_a_wrapper_is_given_what_the_servable_in_it_takes() -> None:
    batcher = Batching()
    parameters = {"priority": 1, "timeout": 60_000_000, "tenant": "t"}
    for servable in (Wrapper(Fake()), Wrapper(Wrapper(batcher))):
        assert (await ask(app_of(servable), INFER, request(parameters=parameters))).status == 200
    assert batcher.seen == [{"priority": 7, "deadline_s": 60, "tenant": "t"}]


async def test_a_batcher_and_a_pool_of_devices_are_served(mock_backend: MockBackend) -> None:
    x = rows(3)
    body, headers = binary(x, "FP32")
    parameters = {"binary_data_output": True, "priority": 2, "timeout": 60_000_000, "tenant": "t"}
    told, told_headers = binary(x, "FP32", parameters=parameters)
    async with (
        serving(mock_backend) as engine,
        trtx.DynamicBatcher(engine) as batcher,
        await trtx.MultiDevice.open(affine_plan(), devices=[0], backend=mock_backend) as plain,
        await trtx.MultiDevice.open(affine_plan(), devices=[0], backend=mock_backend, batching={}) as pool,
    ):
        app = create_app({"batcher": batcher, "pool": pool, "plain": Model(plain, options=())})
        for model in ("batcher", "pool", "plain"):
            assert (await ask(app, f"/v2/models/{model}")).json["inputs"][0]["shape"] == [-1, 4]
            for given, given_headers in ((body, headers), (told, told_headers)):
                answer = await ask(app, f"/v2/models/{model}/infer", given, given_headers)
                assert answer.status == 200, answer.body
                assert np.array_equal(tensor_of(answer, np.float32), affine(x))
    assert (await ask(app, "/v2/health/ready")).status == 400
    assert (await ask(app, "/v2/models/batcher/infer", body, headers)).status == 503


async def test_a_servable_without_deadlines_is_given_up_at_the_timeout() -> None:
    app = app_of(Held())
    answer = await ask(app, INFER, request(parameters={"timeout": 1}))
    assert answer.status == 504
    assert app.statistics().failed == 1
    assert app.statistics().in_flight == 0


# Refusals


def changed(**changes: Any) -> bytes:
    entry = {"name": "x", "datatype": "FP32", "shape": [2], "data": [1, 2], **changes}
    return json.dumps({"inputs": [{k: v for k, v in entry.items() if v is not None}]}).encode()


BAD = [
    (b"", "not JSON"),
    (b"\xff\xfe", "not JSON"),
    (b"[" * 200_000, "nested too deeply"),
    (b'{"inputs": ' + b"9" * 5000 + b"}", "not JSON"),
    (b"[]", "a list; expected an object"),
    (b"{}", "inputs is missing"),
    (b'{"inputs": []}', "inputs are missing: 'x'"),
    (b'{"inputs": [1]}', "an input is a number"),
    (request(id=3), "id is a number"),
    (request(parameters=[]), "parameters of the request is a list"),
    (request(parameters={"binary_data_output": 1}), "expected true or false"),
    (request(parameters={"priority": 16}), "priority is 16; expected 1 (first) to 15 (last)"),
    (request(parameters={"priority": True}), "priority is True"),
    (request(parameters={"timeout": -1}), "timeout is -1"),
    (request(parameters={"tenant": 7}), "tenant"),
    (request(parameters={"sequence_id": 7}), "sequence_id"),
    (request(outputs={}), "outputs is an object; expected a list"),
    (request(outputs=[{"name": "y", "parameters": {"classification": 2}}]), "classification"),
    (request(outputs=[{"name": "y"}, {"name": "y"}]), "asked for twice"),
    (changed(name="z"), "no input 'z'; the model has 'x'"),
    (changed(name=["x"]), "no input"),
    (changed(datatype="INT32"), "has datatype INT32; the model takes FP32"),
    (changed(datatype="BYTES"), "BYTES is not supported"),
    (changed(datatype="FLOAT"), "there is no datatype 'FLOAT'"),
    (changed(datatype=[]), "there is no datatype"),
    (changed(shape=[3]), "2 values in data; its shape takes 3"),
    (changed(shape=[-2]), "none negative"),
    (changed(shape=[True]), "expected a list of dimensions"),
    (changed(shape=[1] * 65), "expected a list of dimensions"),
    (changed(shape=[0, 1 << 62, 1 << 62], data=[]), "which no array has"),
    (changed(data=None), "no data"),
    (changed(data=["a", "b"]), "data of another kind"),
    (changed(data=[1, None]), "data of another kind"),
    (changed(data=[[1], [1, 2]]), "ragged"),
    (changed(data=[True, False]), "data of another kind"),
    (changed(data=[1, 1e60]), "beyond the largest float32"),
    (changed(data=None, parameters={"binary_data_size": 8}), "0 bytes are left"),
    (changed(parameters={"binary_data_size": 8}), "both data and binary_data_size"),
    (changed(parameters={"binary_data_size": 7}), "take 8"),
    (changed(parameters={"binary_data_size": -1}), "take 8"),
    (changed(parameters={"shared_memory_region": "r"}), "shared_memory_region"),
]


@pytest.mark.parametrize(("body", "text"), BAD, ids=[str(number) for number in range(len(BAD))])
async def test_damaged_requests_are_refused_by_name(body: bytes, text: str) -> None:
    fake = Fake()
    app = app_of(fake)
    answer = await ask(app, INFER, body)
    assert answer.status == 400
    assert text in answer.error
    assert fake.seen == []
    assert app.statistics().refused == 1


@pytest.mark.parametrize(
    ("datatype", "data"),
    [
        ("UINT8", [256]), ("INT8", [-129]), ("UINT64", [-1]), ("INT64", [1 << 63]), ("UINT64", [1 << 64]),
        ("UINT64", [1 << 63, -1]),
        ("UINT64", [1 << 63, 1.0]), ("FP64", [10**400]), ("INT32", [1.0]), ("INT32", [None]),
        ("FP32", [{}]), ("BOOL", [1]), ("FP16", [65_520]), ("INT32", [True]),
        ("INT32", [True, 2]), ("FP32", [True, 2]), ("FP32", [1.5, False]), ("FP64", [[1], [True]]), ("BOOL", [True, 1]),
        ("FP32", [1e39]), ("BF16", [1e39, math.inf]), ("UINT64", [1 << 63, math.nan]),
    ],
)  # fmt: skip
async def test_numbers_that_the_datatype_cannot_hold_are_refused(datatype: str, data: list[Any]) -> None:
    answer = await ask(app_of(Fake(), datatype), INFER, request(data, datatype))
    assert answer.status == 400
    assert "input 'x'" in answer.error


@pytest.mark.parametrize("datatype", ["FP16", "BF16", "FP32", "FP64"])
async def test_infinity_has_a_name_and_no_number_is_infinite(datatype: str) -> None:
    """Python reads 1e400 as infinity, which it is not."""
    for numbers in (b"[1e400, 1]", b"[-1e400, Infinity]", b"[[Infinity], [1e400]]", b"[1e400, 36893488147419103232]"):
        body = request([0, 0], datatype).replace(b'"data": [0, 0]', b'"data": ' + numbers)
        answer = await ask(app_of(Fake(), datatype), INFER, body)
        assert (answer.status, answer.error) == (400, f"input 'x' has values beyond the largest {DATATYPES[datatype]}")
    for numbers in (
        b"[Infinity, -Infinity, NaN, 1]",
        b"[[Infinity, -Infinity], [NaN, 1]]",
        b"[Infinity, -Infinity, NaN, 1.0]",
    ):
        fake = Fake()
        body = request([0, 0, 0, 0], datatype).replace(b'"data": [0, 0, 0, 0]', b'"data": ' + numbers)
        assert (await ask(app_of(fake, datatype), INFER, body)).status == 200
        np.testing.assert_array_equal(fake.seen[0]["x"].astype(np.float64), [math.inf, -math.inf, math.nan, 1])


async def test_limits_of_integers_arrive_as_they_are() -> None:
    for datatype, dtype in DATATYPES.items():
        if dtype.kind in "iu":
            limits = [int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)]
            for data in ([limits[0]], [limits[1]], limits):
                answer = await ask(app_of(Fake(), datatype), INFER, request(data, datatype))
                assert answer.json["outputs"][0]["data"] == data


async def test_damaged_binary_requests() -> None:
    app = app_of(Fake())
    x = np.ones(4, np.float32)
    body, headers = binary(x, "FP32")
    for damaged, text in ((body[:-1], "15 bytes are left"), (body + b"!", "1 bytes more")):
        answer = await ask(app, INFER, damaged, headers)
        assert answer.status == 400
        assert text in answer.error
    for length, text in (("1000000", "the body has"), ("-1", "expected a number"), ("x", "expected a number")):
        answer = await ask(app, INFER, body, {"Inference-Header-Content-Length": length})
        assert answer.status == 400
        assert text in answer.error
    assert (await ask(app, INFER, body)).status == 400  # no header: all of it should be JSON
    flags = np.array([0, 1, 2], np.uint8)
    body, headers = binary(flags, "BOOL")
    assert "other than 0 and 1" in (await ask(app_of(Fake(), "BOOL"), INFER, body, headers)).error


async def test_compressed_bodies_are_refused() -> None:
    answer = await ask(app_of(Fake()), INFER, b"\x1f\x8b", {"Content-Encoding": "gzip"})
    assert answer.status == 415


async def test_large_bodies_are_refused_whether_they_say_so_or_not() -> None:
    app = app_of(Fake(), max_body_bytes=200)
    assert (await ask(app, INFER, request())).status == 200
    for pieces in ([b" " * 201], [b" " * 100] * 3, [b" " * 150] * 10):
        for length in (str(sum(map(len, pieces))), ""):
            answer = await ask(app, INFER, pieces, {"Content-Length": length})
            assert answer.status == 413
            assert "at most 200" in answer.error
            assert answer.headers["connection"] == "close"


async def test_a_client_that_goes_away_gets_no_answer() -> None:
    app = app_of(Fake())
    assert (await ask(app, INFER, [b"{", b'"inputs"'], complete=False)).status == 0
    assert (await ask(app, INFER, [], complete=False)).status == 0
    assert app.statistics().accepted == 0


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (trtx.ShapeError("m"), 400),
        (trtx.DTypeError("m"), 400),
        (trtx.OverloadedError("m"), 503),
        (trtx.NoDeviceError("m", causes={0: trtx.ExecutionError("c")}), 503),
        (trtx.DeadlineExceededError("m"), 504),
        (trtx.ClosedError("m"), 503),
        (trtx.ExecutionError("m"), 500),
        (trtx.BorrowedError("m"), 500),
    ],
)
async def test_typed_errors_have_their_status(error: Exception, status: int) -> None:
    app = app_of(Fake(error), retry_after_s=3)
    answer = await ask(app, INFER, request())
    assert (answer.status, answer.error) == (status, str(error))
    assert answer.headers.get("retry-after") == ("3" if status == 503 else None)
    assert (app.statistics().accepted, app.statistics().failed) == (1, 1)


async def test_an_error_of_another_kind_is_logged_and_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    answer = await ask(app_of(Fake(KeyError("a secret"))), INFER, request())
    assert answer.status == 500
    assert "secret" not in answer.error
    assert "secret" in caplog.text


async def test_a_model_that_does_not_keep_its_word_is_an_error_of_the_server() -> None:
    for outputs in ({"other": np.ones(1)}, {"y": np.array(["a"])}, {"y": np.ones(2, np.complex64)}):
        app = app_of(Fake(outputs))
        answer = await ask(app, INFER, request(outputs=[{"name": "y"}]))
        assert answer.status == 500
        assert "are not as described" in answer.error
        assert app.statistics().failed == 1


async def test_models_that_cannot_be_served_are_refused_when_the_application_is_made() -> None:
    with pytest.raises(trtx.InvalidArgumentError, match=r"model 'm' is a object without infer"):
        create_app({"m": object()})  # type: ignore[dict-item]
    with pytest.raises(trtx.InvalidArgumentError, match=r"model 'm': a Fake has no io_tensors"):
        create_app({"m": Fake()})
    with pytest.raises(trtx.InvalidArgumentError, match=r"options has \['deadline'\]; there are"):
        create_app({"m": Model(Fake(), [], [], options=["deadline"])})
    with pytest.raises(trtx.InvalidArgumentError, match="BYTES"):
        TensorMetadata("x", "BYTES", (1,))
    for option in ("max_body_bytes", "default_priority"):
        with pytest.raises(trtx.InvalidArgumentError, match=option):
            create_app({}, **{option: 0})  # type: ignore[arg-type]


# The end


async def test_drain_refuses_new_requests_and_waits_for_those_that_were_accepted() -> None:
    held = Held()
    app: OpenInferenceApp = app_of(held)
    answers: list[Answer] = []
    ended: list[bool] = []

    async def first() -> None:
        answers.append(await ask(app, INFER, request()))

    async def drain() -> None:
        ended.append(await app.drain())

    async with anyio.create_task_group() as group:
        group.start_soon(first)
        await held.begun.wait()
        assert not await app.drain(0)
        group.start_soon(drain)
        await anyio.wait_all_tasks_blocked()
        assert app.draining
        assert (await ask(app, "/v2/health/live")).status == 200
        assert (await ask(app, "/v2/health/ready")).status == 400
        assert (await ask(app, "/v2/models/m/ready")).status == 400
        refused = await ask(app, INFER, request())
        assert refused.status == 503
        assert refused.headers["retry-after"] == "1"
        assert ended == []
        assert answers == []
        held.go.set()
    assert ended == [True]
    assert answers[0].status == 200
    counts = app.statistics()
    assert (counts.accepted, counts.completed, counts.refused, counts.in_flight) == (1, 1, 1, 0)


def test_drain_on_trio() -> None:
    anyio.run(test_drain_refuses_new_requests_and_waits_for_those_that_were_accepted, backend="trio")


async def test_the_lifespan_opens_the_models_and_closes_them_behind_the_last_answer() -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    events: list[str] = []

    @asynccontextmanager
    async def models() -> AsyncIterator[dict[str, Servable]]:
        async with serving(backend) as engine:
            await engine.warmup(1)
            backend.inject(slow(seconds=1.0))
            yield {"m": engine}
            events.append(f"closing, {app.statistics().in_flight} in flight")

    app = create_app(models)
    assert (await ask(app, "/v2/health/ready")).status == 400
    assert (await ask(app, "/v2/models/m")).status == 503
    x = rows(1)

    async def client() -> None:
        body, headers = binary(x, "FP32")
        answer = await ask(app, INFER, body, headers)
        assert np.array_equal(tensor_of(answer, np.float32), affine(x))
        events.append("answered")

    async with anyio.create_task_group() as group:
        async with lifespan(app):
            assert (await ask(app, "/v2/health/ready")).status == 200
            group.start_soon(client)
            await clock.wait_reached()

            async def release() -> None:
                while not app.draining:
                    await anyio.lowlevel.checkpoint()
                clock.open()

            group.start_soon(release)
        assert (await ask(app, INFER, request())).status == 503
    assert events == ["answered", "closing, 0 in flight"]
    backend.close()
