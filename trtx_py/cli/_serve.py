"""``trtx serve``: models over HTTP, by the Open Inference Protocol."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import click

from ._app import command as make_command
from ._app import options
from ._build_options import build_options
from ._opening import loading_options, open_source
from ._session import Session, run_async
from ._values import WORD, Number, Pair

if TYPE_CHECKING:
    from ..integrations.open_inference import Servable

_own = options(
    click.argument("models", nargs=-1, required=True, type=Pair(optional=True), metavar="[NAME=]FILE..."),
    click.option("--host", type=WORD, default="127.0.0.1", show_default=True, metavar="HOST", help="Where to listen."),
    click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, metavar="N",
                 help="Where to listen; 0 takes one that is free."),
    click.option("--batching/--no-batching", default=True, show_default=True, help="Put requests together."),
    click.option("--max-batch-size", type=click.IntRange(min=1), default=32, show_default=True, metavar="N",
                 help="Rows in a batch."),
    click.option("--max-delay-ms", type=Number(0, 86_400_000), default=1.0, show_default=True, metavar="MS",
                 help="How long a request may wait for others."),
    click.option("--warmup", type=click.IntRange(min=0), default=1, show_default=True, metavar="N",
                 help="Inferences before requests are accepted."),
    click.option("--drain-s", type=Number(min=0, infinite=True), default=30.0, show_default=True, metavar="S",
                 help="Seconds that accepted requests have at the end."),
)  # fmt: skip


@make_command("serve", _own, loading_options, build_options)
def command(session: Session, models: tuple[tuple[str, str], ...], host: str, port: int, **given: Any) -> None:
    """Serve plans and ONNX models over HTTP until SIGTERM or Ctrl-C.

    A model is called NAME, or as its file without ending. What was accepted is answered before the command ends; a
    second signal ends it at once.
    """
    try:
        from ..integrations.oip_server import serve_or_stop
        from ..integrations.open_inference import create_app
    except ImportError as error:
        missing = error.__cause__ or error
        raise click.ClickException(
            f"serving over HTTP is not installed ({missing}); pip install 'trtx-py[serve]'"
        ) from error
    try:
        host.encode("idna")  # as it is done when it is looked up
    except UnicodeError as error:
        raise click.BadParameter(f"{host!r:.60} is no name of a host: {error}", param_hint="--host") from error
    named = {name or os.path.splitext(os.path.basename(path))[0]: path for name, path in models}
    if len(named) < len(models):
        raise click.UsageError("two models have one name; give NAME=FILE")
    for name, path in named.items():
        if "/" in name:  # which no route leads to
            raise click.UsageError(f"the name {name!r} of a model has a slash, which its address cannot have")
        if not os.path.isfile(path):
            raise click.UsageError(f"there is no file {path!r}")
    own = {name: given.pop(name) for name in ("batching", "max_batch_size", "max_delay_ms", "warmup", "drain_s")}
    failed: list[BaseException] = []

    @contextlib.asynccontextmanager
    async def opened() -> AsyncIterator[dict[str, Servable]]:
        # uvicorn does not hand on what goes wrong here.
        async with contextlib.AsyncExitStack() as stack:
            try:
                found = {name: await _open(stack, session, path, own, dict(given)) for name, path in named.items()}
            except BaseException as error:
                failed.append(error)
                raise
            yield found

    def ready(address: str, number: int) -> None:
        url = f"http://{address}:{number}"
        found = {"url": url, "models": sorted(named), "pid": os.getpid()}
        session.answer(found, lambda: click.echo(f"serving {', '.join(sorted(named))} at {url}"))

    app = create_app(opened)
    # What goes wrong is raised below; uvicorn would log it as well, with a traceback.
    log_level = "info" if session.verbose else "critical"
    served = run_async(serve_or_stop(app, host, port, own["drain_s"], log_level, ready))
    if served is None:
        session.interrupted = "nothing was served yet"
        raise KeyboardInterrupt
    if failed:
        raise failed[0]
    if not served:
        raise click.ClickException(
            f"{host}:{port} cannot be listened at; is something else there? --port 0 takes a free one"
        )


async def _open(
    stack: contextlib.AsyncExitStack, session: Session, path: str, own: dict[str, Any], given: dict[str, Any]
) -> Servable:
    import trtx_py as trtx

    engine = await stack.enter_async_context(open_source(session, path, given))
    await engine.warmup(own["warmup"])
    if not own["batching"]:
        return engine
    try:
        batcher = trtx.DynamicBatcher(
            engine, max_batch_size=own["max_batch_size"], max_delay_s=own["max_delay_ms"] / 1000
        )
    except trtx.InvalidArgumentError as error:
        raise trtx.InvalidArgumentError(f"{path}: {error}; --no-batching serves it without") from error
    return await stack.enter_async_context(batcher)
