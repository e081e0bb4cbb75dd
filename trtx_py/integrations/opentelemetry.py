"""OpenTelemetry spans for requests. Extra: ``opentelemetry``.

    served = traced(batcher)
    await served.infer({"image": x})  # a span, below the one that is current here

What is not wrapped costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

try:
    from opentelemetry import trace
    from opentelemetry.trace import Span, Status, StatusCode, Tracer
except ImportError as error:
    raise ImportError(
        f"trtx_py.integrations.opentelemetry needs opentelemetry-api ({error}); install it with: "
        "pip install 'trtx-py[opentelemetry]'"
    ) from error

import trtx_py as trtx

__all__ = ["Inferable", "Traced", "traced"]


class Inferable(Protocol):
    """What can be traced: an Engine, DynamicBatcher, MultiDevice, Ensemble, or an object of your own."""

    async def infer(self, inputs: Mapping[str, Any], /) -> Mapping[str, Any]:
        """Arrays by output name for arrays by input name."""
        ...


def traced(target: Inferable, tracer: Tracer | None = None, *, name: str | None = None) -> Traced:
    """``target`` with a span around each of its requests; for an Ensemble also one for each step, below it.

    A span is called ``infer NAME`` and has the attributes ``trtx.name``, ``trtx.kind`` (type of the target),
    ``trtx.device``, ``trtx.rows`` (first dimension of the first input), ``trtx.input.NAME.shape``, ``trtx.priority``,
    ``trtx.deadline_s``, ``trtx.tenant`` where they are given, and ``trtx.outcome``: "completed", "failed" or
    "cancelled". A failure is recorded as an exception, with ``error.type`` and the status ERROR. Spans of steps are
    called ``step NAME`` and have ``trtx.step``. The parent is the span that is current where ``infer`` is called.

    Args:
        tracer: None: of the provider that is set globally.
        name: None: the engine's name, or the target's type.
    Returns:
        An object to use instead of ``target``, which it keeps alive and does not own: close the target as before.
    Raises:
        InvalidArgumentError: ``target`` has no ``infer``.
    """
    if not callable(getattr(target, "infer", None)):
        raise trtx.InvalidArgumentError(
            f"target is a {type(target).__name__}; expected an Engine, DynamicBatcher, MultiDevice, Ensemble or "
            "another object with async infer(inputs)"
        )
    return Traced(target, tracer or trace.get_tracer("trtx_py", trtx.__version__), name)


class Traced:
    """A target whose requests are traced. Made by ``traced``; all else (``statistics``, ...) is the target's own."""

    def __init__(self, target: Inferable, tracer: Tracer, name: str | None) -> None:
        self._target = target
        self._tracer = tracer
        engine: Any = target if isinstance(target, trtx.Engine) else getattr(target, "engine", None)
        own = name or getattr(target, "name", None) or getattr(engine, "name", None)
        self._name = own if isinstance(own, str) else type(target).__name__
        self._attributes: dict[str, str | int] = {"trtx.name": self._name, "trtx.kind": type(target).__name__}
        if isinstance(engine, trtx.Engine):
            self._attributes["trtx.device"] = engine.runtime.device.ordinal

    @property
    def target(self) -> Inferable:
        """What is traced."""
        return self._target

    async def infer(self, inputs: Mapping[str, Any], **options: Any) -> Mapping[str, Any]:
        """As the target's ``infer``, inside a span."""
        if isinstance(self._target, trtx.Ensemble):
            options.setdefault("around", self._step)
        return await self._request("infer", inputs, options)

    async def infer_many(self, inputs: Mapping[str, Any], **options: Any) -> Mapping[str, Any]:
        """As the target's ``infer_many``, inside a span."""
        return await self._request("infer_many", inputs, options)

    async def infer_on_device(self, inputs: Mapping[str, Any], **options: Any) -> Mapping[str, Any]:
        """As the target's ``infer_on_device``, inside a span."""
        return await self._request("infer_on_device", inputs, options)

    async def _request(self, method: str, inputs: Mapping[str, Any], options: dict[str, Any]) -> Mapping[str, Any]:
        call = getattr(self._target, method)
        with self._span(f"{method} {self._name}", self._attributes) as span:
            if span.is_recording():
                _describe(span, inputs, options)
            found: Mapping[str, Any] = await call(inputs, **options)
            return found

    @contextmanager
    def _span(self, name: str, attributes: Mapping[str, str | int]) -> Iterator[Span]:
        with self._tracer.start_as_current_span(
            name, attributes=attributes, record_exception=False, set_status_on_exception=False
        ) as span:
            try:
                yield span
            except Exception as error:
                span.record_exception(error)
                span.set_status(Status(StatusCode.ERROR, str(error)))
                span.set_attribute("error.type", type(error).__qualname__)
                span.set_attribute("trtx.outcome", "failed")
                raise
            except BaseException:  # no failure: nobody waits for the result any more
                span.set_attribute("trtx.outcome", "cancelled")
                raise
            span.set_attribute("trtx.outcome", "completed")

    @contextmanager
    def _step(self, name: str) -> Iterator[None]:
        with self._span(f"step {name}", {"trtx.name": self._name, "trtx.step": name}):
            yield

    def __getattr__(self, name: str) -> Any:
        if name == "_target":  # of an object that copy or pickle has only begun to make
            raise AttributeError(name)
        return getattr(self._target, name)

    def __repr__(self) -> str:
        return f"<Traced {self._target!r}>"


def _describe(span: Span, inputs: object, options: Mapping[str, Any]) -> None:
    """What is to be seen of a request without touching its data. Inputs that are wrong are the target's to refuse."""
    rows: int | None = None
    for name, value in inputs.items() if isinstance(inputs, Mapping) else ():
        shape = getattr(value, "shape", None)
        if isinstance(shape, tuple) and all(isinstance(n, int) for n in shape):
            span.set_attribute(f"trtx.input.{name}.shape", list(shape))
            if rows is None and shape:
                rows = shape[0]
                span.set_attribute("trtx.rows", rows)
    for option in ("priority", "deadline_s", "tenant"):
        value = options.get(option)
        if isinstance(value, (int, float, str)) and value != "":
            span.set_attribute(f"trtx.{option}", value)
