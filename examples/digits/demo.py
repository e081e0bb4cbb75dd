"""Serves the digit classifier: a plan is built, loaded, and asked about every held-out image at once.

    bash scripts/demo            # sets up what it needs
    python examples/digits/demo.py --backend mock

It uses TensorRT where one can build and run this model, else the mock, and says which.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from pathlib import Path

import digits_data as data
import numpy as np
import numpy.typing as npt
import onnx

import trtx_py as trtx

MODEL = Path(__file__).with_name("digits.onnx")
PROFILE = {"image": ((1, 1, 8, 8), (8, 1, 8, 8), (32, 1, 8, 8))}
SHADES = " .:-=+*%@"
Floats = npt.NDArray[np.float32]


class Heartbeat:
    """A task that asks to run every millisecond, and notes how much later than that it ran.

    What it sees is how long the event loop was busy with something else: with work that blocks it, and with the
    callbacks of other tasks.
    """

    period_s = 0.001

    def __init__(self) -> None:
        self._late_ms: dict[str, list[float]] = {}
        self._now: list[float] = []
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Heartbeat:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def phase(self, name: str) -> None:
        """What is noted from here on belongs to ``name``; a beat that is due now still counts for the last phase."""
        await asyncio.sleep(2 * self.period_s)
        self._now = self._late_ms.setdefault(name, [])

    async def _run(self) -> None:
        while True:
            start = time.perf_counter()
            await asyncio.sleep(self.period_s)
            self._now.append((time.perf_counter() - start - self.period_s) * 1e3)

    def report(self) -> list[str]:
        lines = []
        for name, late in self._late_ms.items():
            if late:
                median, p99 = np.percentile(late, [50, 99])
                lines.append(
                    f"  {name:<18}median {median:6.2f} ms   p99 {p99:6.2f} ms   longest {max(late):6.2f} ms"
                    f"   ({len(late)} beats)"
                )
        return lines


async def classify(engine: trtx.Engine, images: Floats, *, at_once: int) -> npt.NDArray[np.float32]:
    """One request for each image, up to ``at_once`` of them in flight."""
    slots = asyncio.Semaphore(at_once)

    async def one(image: Floats) -> npt.NDArray[np.float32]:
        async with slots:
            outputs = await engine.infer({"image": image[None]})
            return np.asarray(outputs["probabilities"][0], dtype=np.float32)

    return np.stack(await asyncio.gather(*(one(image) for image in images)))


def as_text(image: Floats) -> list[str]:
    """Eight lines of sixteen characters."""
    return ["".join(SHADES[round(float(v) / 16 * (len(SHADES) - 1))] * 2 for v in row) for row in image[0]]


def show(digits: data.Digits, probabilities: Floats, which: list[int]) -> None:
    """A row of images, each with what the model says and what it is."""
    print("   ".join(f"{f'#{i}':<16}" for i in which))
    for row in zip(*(as_text(digits.images[i]) for i in which), strict=True):
        print("   ".join(row))
    said = [int(probabilities[i].argmax()) for i in which]
    print("   ".join(f"{f'{n} ({probabilities[i, n]:.1%})':<16}" for i, n in zip(which, said, strict=True)))
    truth = [
        "right" if n == digits.labels[i] else f"wrong: it is {digits.labels[i]}"
        for i, n in zip(which, said, strict=True)
    ]
    print("   ".join(f"{word:<16}" for word in truth))


def pick(digits: data.Digits, probabilities: Floats) -> list[int]:
    """Three sure ones, and the one that the model is least sure of."""
    unsure = int(probabilities.max(axis=1).argmin())
    sure = probabilities.max(axis=1).argsort()[::-1]
    return [*(int(i) for i in sure[:3]), unsure]


def check_held_out(count: int) -> None:
    """The model carries a fingerprint of the images that its training never saw."""
    stored = {entry.key: entry.value for entry in onnx.load(MODEL).metadata_props}
    if stored.get("held_out") != data.fingerprint(data.held_out_indices(count)):
        raise SystemExit(f"{MODEL} was trained with another split; run examples/digits/train.py")


async def serve(backend: str | None, rounds: int, at_once: int) -> None:
    training, digits = data.load()
    check_held_out(len(training) + len(digits))
    async with Heartbeat() as heart:
        await heart.phase("idle")
        await asyncio.sleep(0.3)

        await heart.phase("build and load")
        start = time.perf_counter()
        async with trtx.open_engine(MODEL, backend=backend, profiles=[PROFILE]) as engine:
            print(f"ready               {time.perf_counter() - start:.2f} s for parsing, building and loading")
            await heart.phase("warm-up")
            await engine.warmup(10)

            await heart.phase("first answers")
            probabilities = await classify(engine, digits.images, at_once=at_once)

            load = np.concatenate([digits.images] * rounds)
            await heart.phase("serving")
            start = time.perf_counter()
            again = await classify(engine, load, at_once=at_once)
            elapsed = time.perf_counter() - start
            await heart.phase("close")

    print()
    show(digits, probabilities, pick(digits, probabilities))
    right = int((probabilities.argmax(axis=1) == digits.labels).sum())
    print(f"\naccuracy            {right / len(digits):.2%} ({right} of {len(digits)} held-out images)")
    if not np.allclose(again.reshape(rounds, *probabilities.shape), probabilities, atol=1e-3):
        raise SystemExit("the same image got different answers")
    rate = len(load) / elapsed
    print(f"requests per second {rate:,.0f} ({len(load):,} single images, {at_once} in flight, {elapsed:.2f} s)")
    print("event loop blocked: how late a task ran that asked to run every millisecond")
    print("\n".join(heart.report()))
    print(f"left open           {len(trtx.live_objects())} objects")


async def run(arguments: argparse.Namespace) -> None:
    backend: str | None = arguments.backend or os.environ.get("TRTX_BACKEND")
    try:
        print(f"backend             {backend or 'looking for a TensorRT that can serve this model'}")
        await serve(backend, arguments.rounds, arguments.at_once)
    except trtx.BackendUnavailableError as error:
        if backend is not None:
            raise SystemExit(str(error)) from None
        print(f"{error}\n")
        print("backend             falling back to the mock: real numbers (ONNX Runtime), not a GPU's speed")
        await serve("mock", arguments.rounds, arguments.at_once)
    except trtx.InvalidArgumentError as error:  # such as a backend that does not exist
        raise SystemExit(str(error)) from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--backend", help="mock, tensorrt, tensorrt_rtx, ...; default: TRTX_BACKEND, else TensorRT, else mock"
    )
    parser.add_argument("--rounds", type=int, default=5, help="passes over the held-out images when measuring speed")
    parser.add_argument("--at-once", type=int, default=64, help="requests in flight")
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.at_once < 1:
        parser.error("--rounds and --at-once must be at least 1")
    try:
        asyncio.run(run(arguments))
    except KeyboardInterrupt:
        print("\nstopped; everything that was open is closed")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
