"""Spans of requests, as the SDK's in-memory exporter sees them."""

from __future__ import annotations

import asyncio
import copy
import importlib
import sys
from collections.abc import Mapping
from typing import Any

import anyio
import numpy as np
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode, Tracer

import trtx_py as trtx
from mock_backend import MockBackend
from tests.unit.serving import affine, rows, serving
from trtx_py.integrations.opentelemetry import traced

X = rows(3)


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracer(spans: InMemorySpanExporter) -> Tracer:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    return provider.get_tracer("test")


def parent_of(span: ReadableSpan) -> int | None:
    return span.parent.span_id if span.parent else None


def only(spans: InMemorySpanExporter) -> ReadableSpan:
    (span,) = spans.get_finished_spans()
    return span


async def test_a_request_of_an_engine(mock_backend: MockBackend, spans: InMemorySpanExporter, tracer: Tracer) -> None:
    async with serving(mock_backend) as engine:
        served = traced(engine, tracer)
        np.testing.assert_array_equal((await served.infer({"x": X}))["y"], affine(X))
        span = only(spans)
        assert span.name == "infer small"
        assert dict(span.attributes or {}) == {
            "trtx.name": "small",
            "trtx.kind": "Engine",
            "trtx.device": 0,
            "trtx.rows": 3,
            "trtx.input.x.shape": (3, 4),
            "trtx.outcome": "completed",
        }
        assert span.status.status_code is StatusCode.UNSET
        assert span.parent is None
        spans.clear()
        async with (await served.infer_on_device({"x": X}))["y"]:
            assert only(spans).name == "infer_on_device small"
        assert served.io_tensors == engine.io_tensors  # all else is the engine's
        assert served.statistics().completed == 2
        assert served.target is engine
        assert "Traced <Engine#" in repr(served)


async def test_the_parent_is_the_span_of_the_caller(
    mock_backend: MockBackend, spans: InMemorySpanExporter, tracer: Tracer
) -> None:
    async with serving(mock_backend) as engine:
        served = traced(engine, tracer, name="mine")

        async def request(number: int) -> None:
            with tracer.start_as_current_span(f"request {number}"):
                await served.infer({"x": X})

        await asyncio.gather(*(request(number) for number in range(5)))
        callers = {span.context.span_id: span for span in spans.get_finished_spans() if span.name.startswith("request")}
        inner = [span for span in spans.get_finished_spans() if span.name == "infer mine"]
        assert {parent_of(span) for span in inner} == set(callers)
        assert len(inner) == 5
        assert trace.get_current_span() is trace.INVALID_SPAN


async def test_a_batcher_with_options(mock_backend: MockBackend, spans: InMemorySpanExporter, tracer: Tracer) -> None:
    async with serving(mock_backend) as engine, trtx.DynamicBatcher(engine) as batcher:
        served = traced(batcher, tracer)
        await served.infer({"x": X}, priority=2, deadline_s=10.0, tenant="blue")
        await served.infer_many({"x": X})
        first, second = spans.get_finished_spans()
        assert (first.name, second.name) == ("infer small", "infer_many small")
        attributes = dict(first.attributes or {})
        assert attributes["trtx.kind"] == "DynamicBatcher"
        assert attributes["trtx.device"] == 0
        assert [attributes[f"trtx.{name}"] for name in ("priority", "deadline_s", "tenant")] == [2, 10.0, "blue"]
        assert "trtx.tenant" not in (second.attributes or {})


async def test_a_failure_is_recorded_and_raised(
    mock_backend: MockBackend, spans: InMemorySpanExporter, tracer: Tracer
) -> None:
    async with serving(mock_backend) as engine:
        with pytest.raises(trtx.ShapeError, match="profile"):
            await traced(engine, tracer).infer({"x": rows(9)})
        span = only(spans)
        attributes = dict(span.attributes or {})
        assert (attributes["trtx.outcome"], attributes["error.type"]) == ("failed", "ShapeError")
        assert span.status.status_code is StatusCode.ERROR
        assert "profile" in (span.status.description or "")
        (event,) = span.events
        assert event.name == "exception"
        assert (event.attributes or {})["exception.type"] == "trtx_py.ShapeError"
        spans.clear()
        with pytest.raises(trtx.InvalidArgumentError):  # wrong from the start: the engine says so
            await traced(engine, tracer).infer(3)  # type: ignore[arg-type]
        assert (only(spans).attributes or {})["error.type"] == "InvalidArgumentError"


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_a_cancelled_request(loop: str, spans: InMemorySpanExporter, tracer: Tracer) -> None:
    class Forever:
        async def infer(self, inputs: Mapping[str, Any], /) -> Mapping[str, Any]:
            await anyio.sleep_forever()
            raise AssertionError("not reached")

    async def main() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(traced(Forever(), tracer).infer, {})
            await anyio.wait_all_tasks_blocked()
            group.cancel_scope.cancel()

    anyio.run(main, backend=loop)
    span = only(spans)
    assert span.name == "infer Forever"
    assert (span.attributes or {})["trtx.outcome"] == "cancelled"
    assert span.status.status_code is StatusCode.UNSET
    assert not span.events


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_an_ensemble_has_a_span_for_each_step(
    loop: str, mock_backend: MockBackend, spans: InMemorySpanExporter, tracer: Tracer
) -> None:
    def halve(y: Any) -> dict[str, Any]:
        trace.get_current_span().set_attribute("thread", "worker")  # the context has followed into the thread
        return {"y": y / 2}

    async def main() -> None:
        async with serving(mock_backend) as engine:
            graph = trtx.Ensemble(
                inputs=("x",),
                outputs=("half", "other"),
                steps=[
                    trtx.Step(engine, {"x": "x"}, {"y": "y"}, name="first"),
                    trtx.Step(halve, {"y": "y"}, {"y": "half"}),
                    trtx.Step(engine, {"x": "y"}, {"y": "other"}, name="second"),
                ],
            )
            with tracer.start_as_current_span("caller"):
                await traced(graph, tracer, name="graph").infer({"x": X})
            assert trace.get_current_span() is trace.INVALID_SPAN

    anyio.run(main, backend=loop)
    by_name = {span.name: span for span in spans.get_finished_spans()}
    assert set(by_name) == {"caller", "infer graph", "step first", "step halve", "step second"}
    whole = by_name["infer graph"]
    assert parent_of(whole) == by_name["caller"].context.span_id
    for name in ("first", "halve", "second"):
        span = by_name[f"step {name}"]
        assert parent_of(span) == whole.context.span_id
        assert (span.attributes or {})["trtx.step"] == name
        assert (span.attributes or {})["trtx.outcome"] == "completed"
    assert (by_name["step halve"].attributes or {})["thread"] == "worker"


async def test_a_failing_step(spans: InMemorySpanExporter, tracer: Tracer) -> None:
    started = asyncio.Event()

    async def wait(x: Any) -> Any:
        started.set()
        await asyncio.Event().wait()

    async def refuse(x: Any) -> Any:
        await started.wait()
        raise ValueError("no")

    graph = trtx.Ensemble(
        inputs=("x",),
        outputs=("a", "b"),
        steps=[trtx.Step(wait, {"x": "x"}, {"a": "a"}), trtx.Step(refuse, {"x": "x"}, {"b": "b"})],
    )
    with pytest.raises(ValueError, match="no"):
        await traced(graph, tracer).infer({"x": 1})
    outcomes = {span.name: (span.attributes or {})["trtx.outcome"] for span in spans.get_finished_spans()}
    assert outcomes == {"step wait": "cancelled", "step refuse": "failed", "infer Ensemble": "failed"}


async def test_without_a_provider_nothing_is_described(mock_backend: MockBackend) -> None:
    class Loud:
        @property
        def shape(self) -> tuple[int, ...]:
            raise AssertionError("looked at")

    class Echo:
        async def infer(self, inputs: Mapping[str, Any], /) -> Mapping[str, Any]:
            return inputs

    inputs = {"x": Loud()}
    assert await traced(Echo(), trace.NoOpTracer()).infer(inputs) is inputs


async def test_a_copy_is_traced_too(spans: InMemorySpanExporter, tracer: Tracer) -> None:
    class Echo:
        async def infer(self, inputs: Mapping[str, Any], /) -> Mapping[str, Any]:
            return inputs

    await copy.copy(traced(Echo(), tracer, name="echo")).infer({})
    assert only(spans).name == "infer echo"


def test_what_cannot_be_traced() -> None:
    with pytest.raises(trtx.InvalidArgumentError, match="target is a int; expected an Engine"):
        traced(3)  # type: ignore[arg-type]


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "trtx_py.integrations.opentelemetry")
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", None)
    with pytest.raises(ImportError, match=r"pip install 'trtx-py\[opentelemetry\]'"):
        importlib.import_module("trtx_py.integrations.opentelemetry")
