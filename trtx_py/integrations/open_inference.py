"""An ASGI application that speaks the Open Inference Protocol v2 (KServe, Triton) over HTTP. Extra: ``oip``.

    app = create_app({"digits": batcher})
    uvicorn.run(app)

It serves health, metadata and inference, in JSON and with the binary tensor extension in both directions.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import anyio

try:
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
    from starlette.types import Receive, Scope, Send
except ImportError as error:
    raise ImportError(
        f"trtx_py.integrations.open_inference needs starlette ({error}); install it with: pip install 'trtx-py[oip]'"
    ) from error

import trtx_py as trtx

from ._oip_codec import Array, InferRequest, RequestReader, TensorMetadata, datatype_of, write_response
from ._oip_http import Disconnected, Refused, draining, read_headers, receive_body, refusal, send_answer, send_error

__all__ = ["Model", "OpenInferenceApp", "Servable", "ServerStatistics", "TensorMetadata", "create_app"]

_EXTENSIONS = ["binary_tensor_data"]
_OPTIONS = frozenset({"priority", "deadline_s", "tenant"})
_MAX_TENANT = 128
_US = 1e-6
_MAX_TIMEOUT_US = 86_400_000_000  # a day


class Servable(Protocol):
    """What can be served: an Engine, a DynamicBatcher, MultiDevice, an Ensemble, or an object of your own.

    ``infer`` may take ``priority``, ``deadline_s`` and ``tenant`` by keyword; it gets those it takes. A wrapper that
    hands on any keyword says what it wraps by ``target``. Tensors are described by ``io_tensors`` of it or of its
    ``engine``; where it has neither, say them in ``Model``.
    """

    async def infer(self, inputs: Mapping[str, Any], /) -> Mapping[str, Array]:
        """Arrays by output name, which must not change any more."""
        ...


@dataclass(frozen=True)
class Model:
    """A servable with what cannot be read from it.

    Attributes:
        servable: what answers.
        inputs, outputs: its tensors; None: what ``io_tensors`` says.
        version: the one version that there is, as in ``/v2/models/NAME/versions/1``.
        platform: for the metadata.
        ready: asked by the readiness endpoints; None: ready until it is closed.
        options: which of priority, deadline_s and tenant ``infer`` is given; None: those that its signature has. A
            MultiDevice without batching takes none: ``options=()``.
    """

    servable: Servable
    inputs: Sequence[TensorMetadata] | None = None
    outputs: Sequence[TensorMetadata] | None = None
    version: str = "1"
    platform: str = "tensorrt"
    ready: Callable[[], bool] | None = None
    options: Collection[str] | None = None


Models: TypeAlias = Mapping[str, "Servable | Model"]


@dataclass(frozen=True)
class ServerStatistics:
    """Inference requests, since the application was made.

    Attributes:
        accepted: read completely, understood, and handed to their model.
        completed: of those, answered with tensors.
        failed: of those, answered with an error, or cancelled by the server.
        refused: answered with an error before they reached their model.
        in_flight: accepted and not answered yet.
    """

    accepted: int
    completed: int
    failed: int
    refused: int
    in_flight: int


class _Served:
    """A model with all that a request needs, looked up once."""

    def __init__(self, name: str, given: Servable | Model) -> None:
        model = given if isinstance(given, Model) else Model(given)
        infer = getattr(model.servable, "infer", None)
        if not callable(infer):
            raise trtx.InvalidArgumentError(
                f"model {name!r} is a {type(model.servable).__name__} without infer(); expected an Engine, "
                "DynamicBatcher, MultiDevice, Ensemble or the like"
            )
        self.name, self.model, self.version = name, model, model.version
        self.infer: Callable[..., Any] = infer
        self.options = _options_of(model.servable) if model.options is None else frozenset(model.options)
        if not self.options <= _OPTIONS:
            raise trtx.InvalidArgumentError(
                f"model {name!r}: options has {sorted(self.options - _OPTIONS)}; there are {sorted(_OPTIONS)}"
            )
        self.inputs = _described(name, model, "inputs", model.inputs, trtx.TensorMode.INPUT)
        self.outputs = _described(name, model, "outputs", model.outputs, trtx.TensorMode.OUTPUT)
        self.read = RequestReader(self.inputs, self.outputs)

    @property
    def ready(self) -> bool:
        if self.model.ready is not None:
            return self.model.ready()
        return not getattr(self.model.servable, "closed", False)

    def answer(self, request: InferRequest, outputs: Mapping[str, Array]) -> tuple[bytes, list[memoryview]]:
        """As ``write_response``. Raises ExecutionError for what the model did not promise."""
        try:
            return write_response(self.name, self.version, request, outputs)
        except (KeyError, trtx.DTypeError) as error:
            raise trtx.ExecutionError(f"the outputs of model {self.name!r} are not as described: {error}") from error

    def metadata(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "versions": [self.version],
            "platform": self.model.platform,
            "inputs": [tensor.described() for tensor in self.inputs.values()],
            "outputs": [tensor.described() for tensor in self.outputs.values()],
        }


def _options_of(servable: Any) -> frozenset[str]:
    """Which of a request's parameters its ``infer`` takes; where it takes any, what it wraps is asked."""
    parameters = inspect.signature(servable.infer).parameters
    if all(each.kind is not inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
        return _OPTIONS & parameters.keys()
    target = getattr(servable, "target", None)
    return _options_of(target) if callable(getattr(target, "infer", None)) else _OPTIONS


def _described(
    name: str, model: Model, what: str, given: Sequence[TensorMetadata] | None, mode: trtx.TensorMode
) -> dict[str, TensorMetadata]:
    if given is not None:
        return {tensor.name: tensor for tensor in given}
    servable: Any = model.servable
    tensors = getattr(servable, "io_tensors", None)
    if tensors is None:
        tensors = getattr(getattr(servable, "engine", None), "io_tensors", None)
    if tensors is None:
        raise trtx.InvalidArgumentError(
            f"model {name!r}: a {type(servable).__name__} has no io_tensors to read its {what} from; "
            f"pass Model(servable, inputs=[TensorMetadata(...)], outputs=[TensorMetadata(...)])"
        )
    return {
        tensor.name: TensorMetadata(tensor.name, datatype_of(tensor.dtype.numpy), tuple(tensor.shape))
        for tensor in tensors
        if tensor.mode is mode
    }


class OpenInferenceApp(Starlette):
    """Made by ``create_app``: a Starlette application, so middleware, mounts and exception handlers are Starlette's.

    It ends in three steps, which its lifespan takes when the server stops: ``drain()``, then what opened the models
    closes them. A server that should say that it is not ready before it stops listening calls ``drain()`` itself.
    """

    def __init__(
        self,
        models: Models | Callable[[], AbstractAsyncContextManager[Models]],
        *,
        name: str,
        max_body_bytes: int,
        default_priority: int,
        retry_after_s: int,
    ) -> None:
        self._server_name = name
        self._models: dict[str, _Served] | None = None
        self._open = models if callable(models) else None
        if not callable(models):
            self._models = _served(models)
        self._draining = False
        self._idle: anyio.Event | None = None
        self._accepted = self._completed = self._failed = self._refused = 0
        infer = _Infer(self, max_body_bytes, default_priority, retry_after_s)
        model = "/v2/models/{model}"
        version = model + "/versions/{version}"
        super().__init__(
            routes=[
                # The first is what nearly all requests want: routes are tried in order.
                Route(f"{model}/infer", infer, methods=["POST"]),
                Route(f"{version}/infer", infer, methods=["POST"]),
                Route("/v2", self._metadata),
                Route("/v2/health/live", self._live),
                Route("/v2/health/ready", self._ready),
                *[Route(f"{each}/ready", self._model_ready) for each in (model, version)],
                *[Route(each, self._model_metadata) for each in (model, version)],
            ],
            exception_handlers={HTTPException: _refused_by_routing},
            lifespan=OpenInferenceApp._lifespan,
        )

    @property
    def draining(self) -> bool:
        """No new work is taken."""
        return self._draining

    def statistics(self) -> ServerStatistics:
        """Counts, at this moment."""
        return ServerStatistics(self._accepted, self._completed, self._failed, self._refused, self._in_flight)

    @property
    def _in_flight(self) -> int:
        return self._accepted - self._completed - self._failed

    async def drain(self, timeout_s: float | None = None) -> bool:
        """Say that the server is not ready, refuse new requests with 503, and wait until the accepted are answered.

        Returns:
            True when all are; False when ``timeout_s`` seconds were over first: they go on.
        Cancellation: it remains draining.
        """
        self._draining = True
        with anyio.move_on_after(timeout_s):
            while self._in_flight:
                self._idle = self._idle or anyio.Event()
                await self._idle.wait()
        return not self._in_flight

    def _begin(self) -> None:
        self._accepted += 1

    def _end(self, completed: bool) -> None:
        if completed:
            self._completed += 1
        else:
            self._failed += 1
        if self._idle is not None and not self._in_flight:
            self._idle.set()
            self._idle = None

    @asynccontextmanager
    async def _lifespan(self) -> AsyncIterator[None]:
        if self._open is None:
            yield
            await self.drain()
            return
        async with self._open() as models:
            self._models = _served(models)
            yield
            await self.drain()

    def _find(self, path: Mapping[str, str]) -> _Served:
        """Raises HTTPException 404, or 503 while the models are being opened."""
        if self._models is None:
            raise HTTPException(503, "the models are not open yet")
        served = self._models.get(path["model"])
        if served is None:
            known = ", ".join(map(repr, self._models)) or "none"
            raise HTTPException(404, f"there is no model {path['model']!r}; there are {known}")
        version = path.get("version")
        if version is not None and version != served.version:
            raise HTTPException(
                404, f"model {served.name!r} has no version {version!r}; it has version {served.version!r}"
            )
        return served

    async def _metadata(self, request: Request) -> Response:
        return JSONResponse({"name": self._server_name, "version": trtx.__version__, "extensions": _EXTENSIONS})

    async def _live(self, request: Request) -> Response:
        return Response(status_code=200)

    async def _ready(self, request: Request) -> Response:
        models = self._models
        ready = not self._draining and models is not None and all(served.ready for served in models.values())
        return _yes_or_no(ready)

    async def _model_metadata(self, request: Request) -> Response:
        return JSONResponse(self._find(request.path_params).metadata())

    async def _model_ready(self, request: Request) -> Response:
        return _yes_or_no(self._find(request.path_params).ready and not self._draining)


class _Infer:
    """The inference endpoint: plain ASGI, since a Request and a Response object would cost more than the rest of it."""

    def __init__(self, app: OpenInferenceApp, max_body_bytes: int, default_priority: int, retry_after_s: int) -> None:
        self._app, self._max_body_bytes, self._default_priority = app, max_body_bytes, default_priority
        self._retry_after_s = retry_after_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        try:
            served = app._find(scope["path_params"])
            length, header_length = read_headers(scope["headers"])
            if app._draining:
                raise draining()
            body = await receive_body(receive, length, self._max_body_bytes)
            request = served.read(body, header_length)
            options, timeout_s = self._options(served, request)
            if app._draining:  # meanwhile
                raise draining()
        except Disconnected:
            app._refused += 1
            return
        except HTTPException as error:
            app._refused += 1
            await send_error(send, Refused(error.status_code, error.detail), self._retry_after_s)
            return
        except Exception as error:
            app._refused += 1
            await send_error(send, refusal(error), self._retry_after_s)
            return
        app._begin()
        completed = False
        try:
            try:
                if timeout_s is None:
                    outputs = await served.infer(request.inputs, **options)
                else:  # for a servable that knows no deadlines
                    with anyio.fail_after(timeout_s):
                        outputs = await served.infer(request.inputs, **options)
                header, tensors = served.answer(request, outputs)
            except Exception as error:
                await send_error(send, refusal(error), self._retry_after_s)
                return
            await send_answer(send, header, tensors)
            completed = True
        finally:
            app._end(completed)

    def _options(self, served: _Served, request: InferRequest) -> tuple[dict[str, Any], float | None]:
        """Keyword arguments for ``infer``, and a timeout that is left to us."""
        parameters = request.parameters
        options: dict[str, Any] = {}
        timeout_s: float | None = None
        if not parameters or (len(parameters) == 1 and request.binary):  # nothing, or what most clients say
            return options, timeout_s
        if parameters.get("sequence_id"):
            raise trtx.InvalidArgumentError("sequence_id: there are no models with a state here; leave it out")
        priority = parameters.get("priority", 0)
        highest = 2 * self._default_priority - 1
        if type(priority) is not int or not 0 <= priority <= highest:
            raise trtx.InvalidArgumentError(
                f"priority is {priority!r}; expected 1 (first) to {highest} (last), or 0 for {self._default_priority}"
            )
        if priority and "priority" in served.options:
            options["priority"] = self._default_priority - priority
        timeout = parameters.get("timeout", 0)
        if type(timeout) is not int or not 0 <= timeout <= _MAX_TIMEOUT_US:
            raise trtx.InvalidArgumentError(f"timeout is {timeout!r}; expected microseconds, at most {_MAX_TIMEOUT_US}")
        if timeout and "deadline_s" in served.options:
            options["deadline_s"] = timeout * _US
        elif timeout:
            timeout_s = timeout * _US
        tenant = parameters.get("tenant", "")
        if type(tenant) is not str or len(tenant) > _MAX_TENANT:
            raise trtx.InvalidArgumentError(f"tenant: expected a string of at most {_MAX_TENANT} characters")
        if tenant and "tenant" in served.options:
            options["tenant"] = tenant
        return options, timeout_s


def _served(models: Models) -> dict[str, _Served]:
    return {name: _Served(name, model) for name, model in models.items()}


def _yes_or_no(answer: bool) -> Response:
    """The protocol's way: 200 or 4xx, and no body."""
    return Response(status_code=200 if answer else 400)


async def _refused_by_routing(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, status_code=error.status_code, headers=error.headers)


def create_app(
    models: Models | Callable[[], AbstractAsyncContextManager[Models]],
    *,
    name: str = "trtx_py",
    max_body_bytes: int = 64 << 20,
    default_priority: int = 8,
    retry_after_s: int = 1,
) -> OpenInferenceApp:
    """An ASGI application that serves ``models`` by the Open Inference Protocol v2.

    Args:
        models: by name; they remain the caller's and must outlive the application. Or a function that returns an
            asynchronous context manager of them: the application's lifespan enters it on the server's event loop, and
            leaves it when all that was accepted has been answered.
        name: the server's, in its metadata.
        max_body_bytes: larger requests get 413.
        default_priority: what a request without priority counts as: 1 goes first, ``2 * default_priority - 1`` last.
            A servable's ``infer`` is given the difference, so 0 for the default and more for what goes first.
        retry_after_s: what Retry-After says when the server is overloaded or draining.
    Raises:
        InvalidArgumentError: a model cannot be served; names it.
        DTypeError: one of its tensors has a type that the protocol lacks.

    Requests may have the parameters ``priority``, ``timeout`` (microseconds: ``deadline_s`` of a servable that takes
    it, else the wait is given up then) and ``tenant``. Errors are ``{"error": text}``: 400 for what does not fit the
    model, 404, 413, 503 when overloaded, draining or closed, 504 after the timeout, 500 when inference failed.
    """
    for what, value, least in (
        ("max_body_bytes", max_body_bytes, 1),
        ("default_priority", default_priority, 1),
        ("retry_after_s", retry_after_s, 0),
    ):
        if type(value) is not int or value < least:
            raise trtx.InvalidArgumentError(f"{what} is {value!r}; expected a whole number from {least} on")
    return OpenInferenceApp(
        models,
        name=name,
        max_body_bytes=max_body_bytes,
        default_priority=default_priority,
        retry_after_s=retry_after_s,
    )
