"""A page in headless Chromium: what its console says, what it asks the network for, and how it looks at a width.

Speaks the DevTools protocol over a pipe, so that nothing but Chromium has to be installed.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_PATIENCE_S = 60.0


def find_browser() -> str | None:
    """Path of a Chromium, None if there is none; TRTX_BROWSER names another."""
    return os.environ.get("TRTX_BROWSER") or next(filter(None, map(shutil.which, _NAMES)), None)


@dataclass
class Seen:
    """What a page did at one width.

    Attributes:
        problems: errors and warnings of the console, and exceptions that nobody caught.
        requests: addresses that it asked for, besides its own and those that hold their data.
        overflow: pixels by which it is wider than the window.
        plots: width and height of each plot's drawing, and how many marks it has.
        text: what ``document.body.innerText`` is.
        png: the whole page as it looks.
    """

    problems: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    overflow: int = 0
    plots: list[tuple[float, float, int]] = field(default_factory=list)
    text: str = ""
    png: bytes = b""


class _Pipe:
    """One browser: commands out, answers and events in."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing = reading, writing
        self._numbers = itertools.count(1)
        self._rest = b""
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params, **({"sessionId": session} if session else {})}
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._writing, data) :]
        while True:
            answer = self.next()
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def next(self) -> dict[str, Any]:
        deadline = time.monotonic() + _PATIENCE_S
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._reading], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "the browser does not answer"
            data = os.read(self._reading, 1 << 20)
            assert data, "the browser ended"
            self._rest += data
        line, self._rest = self._rest.split(b"\0", 1)
        found: dict[str, Any] = json.loads(line)
        return found


@contextmanager
def _browser(path: str) -> Iterator[_Pipe]:
    to_browser, our_end = os.pipe()
    their_answers, from_browser = os.pipe()
    with tempfile.TemporaryDirectory(prefix="trtx-browser-") as folder:
        command = (
            f'exec "$0" --headless=new --no-sandbox --disable-gpu --no-first-run --remote-debugging-pipe '
            f'--user-data-dir="$1" about:blank 3<&{to_browser} 4>&{from_browser}'
        )
        process = subprocess.Popen(
            ["bash", "-c", command, path, folder],
            pass_fds=(to_browser, from_browser), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        pipe = _Pipe(their_answers, our_end)
        try:
            yield pipe
            pipe.call("Browser.close")
        finally:
            os.close(our_end)
            os.close(their_answers)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            _settle(Path(folder))


def _settle(folder: Path) -> None:
    """Helpers of the browser may write for a moment after it has ended."""
    for _ in range(50):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            break
        time.sleep(0.1)
    folder.mkdir(exist_ok=True)


_MEASURE = """
(() => {
  const plots = [...document.querySelectorAll('[data-figure]')].map(place => {
    const drawing = place.querySelector('svg.main-svg');
    const box = drawing ? drawing.getBoundingClientRect() : {width: 0, height: 0};
    return [box.width, box.height, place.querySelectorAll('.trace path').length];
  });
  const page = document.documentElement;
  const overflow = page.scrollWidth - page.clientWidth;
  return {plots, overflow, height: page.scrollHeight, text: document.body.innerText};
})()
"""


def look(page: Path, width: int, browser: str) -> Seen:
    """Open ``page`` in a window of ``width`` pixels."""
    seen = Seen()
    with _browser(browser) as pipe:
        target = pipe.call("Target.createTarget", url="about:blank")["targetId"]
        session = pipe.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            pipe.call(f"{domain}.enable", session)
        pipe.call(
            "Emulation.setDeviceMetricsOverride", session, width=width, height=900, deviceScaleFactor=1, mobile=False
        )
        pipe.events.clear()
        pipe.call("Page.navigate", session, url=page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in pipe.events):
            pipe.events.append(pipe.next())
        time.sleep(1.0)  # plots are drawn on animation frames
        found = pipe.call("Runtime.evaluate", session, expression=_MEASURE, returnByValue=True)["result"]["value"]
        seen.overflow, seen.text = found["overflow"], found["text"]
        seen.plots = [(each[0], each[1], each[2]) for each in found["plots"]]
        clip = {"x": 0, "y": 0, "width": width, "height": min(found["height"], 12_000), "scale": 1}
        shot = pipe.call("Page.captureScreenshot", session, clip=clip, captureBeyondViewport=True)
        seen.png = base64.b64decode(shot["data"])
        for event in pipe.events:
            _note(event, seen, page.as_uri())
    return seen


def _note(event: dict[str, Any], seen: Seen, own: str) -> None:
    method, params = event.get("method"), event.get("params", {})
    if method == "Runtime.exceptionThrown":
        seen.problems.append(json.dumps(params["exceptionDetails"])[:500])
    elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
        seen.problems.append(json.dumps(params["args"])[:500])
    elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
        seen.problems.append(str(params["entry"]["text"]))
    elif method == "Network.requestWillBeSent":
        url = params["request"]["url"]
        if url != own and not url.startswith(("data:", "blob:")):
            seen.requests.append(url)
