"""The FastAPI example through its ASGI interface: no server and no socket."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import trtx_py as trtx

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")

PATH = Path(__file__).parents[2] / "examples" / "fastapi_app" / "app.py"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, trtx_backend_env: None) -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("fastapi_example", PATH)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # pydantic looks annotations up there
    spec.loader.exec_module(module)
    yield module
    assert trtx.live_objects() == []


def client(example: ModuleType):
    return httpx.AsyncClient(transport=httpx.ASGITransport(example.app), base_url="http://test")


async def test_serves_from_its_lifespan(example: ModuleType) -> None:
    async with client(example) as http:
        assert (await http.get("/readyz")).status_code == 503
        async with example.app.router.lifespan_context(example.app):
            assert (await http.get("/readyz")).json() == {"status": "ready"}
            assert (await http.get("/healthz")).json() == {"status": "alive"}
            pixels = np.random.default_rng(1).integers(0, 17, (40, 64)).tolist()
            answers = await asyncio.gather(*(http.post("/classify", json={"pixels": row}) for row in pixels))
            assert {answer.status_code for answer in answers} == {200}
            raw = await http.post("/classify-raw", content=np.array(pixels, np.float32).tobytes())
            assert np.frombuffer(raw.content, np.int64).tolist() == [answer.json()["digit"] for answer in answers]
        assert (await http.get("/readyz")).status_code == 503


async def test_refuses_what_is_no_image(example: ModuleType) -> None:
    async with client(example) as http, example.app.router.lifespan_context(example.app):
        for pixels in ([1.0] * 63, [17.0] * 64, ["x"] * 64):
            assert (await http.post("/classify", json={"pixels": pixels})).status_code == 422
        for body in (b"", b"x" * 255):
            assert (await http.post("/classify-raw", content=body)).status_code == 422


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (trtx.OverloadedError("full"), 503),
        (trtx.DeadlineExceededError("late"), 504),
        (trtx.ClosedError("closed"), 503),
        (trtx.ShapeError("shape"), 422),
        (trtx.DeviceLostError("gone", launched=False), 500),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_errors_have_statuses(example: ModuleType, error: trtx.TrtxError, status: int) -> None:
    class Failing:
        async def infer(self, inputs: object, **options: object) -> None:
            raise error

    example.app.state.batcher = Failing()
    async with client(example) as http:
        answer = await http.post("/classify", json={"pixels": [1.0] * 64})
    assert (answer.status_code, answer.json()) == (status, {"error": error.message})
    assert ("retry-after" in answer.headers) == (status == 503)
