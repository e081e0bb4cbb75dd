"""The Ray Serve example, with the real Ray: two replicas on this machine, each with its own engine and batcher."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import trtx_py as trtx

pytest.importorskip("ray", reason="the extra ray is not installed")

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "digits" / "digits.onnx"
PROFILE = {"image": ((1, 1, 8, 8), (16, 1, 8, 8), (32, 1, 8, 8))}
REQUESTS = 300

#: The example's main(), which keeps what it was answered, and replicas that say what they left open.
DRIVER = """
import os
from pathlib import Path
import numpy as np
from ray import serve
import deployment

class Watched(deployment.Replica):
    async def __del__(self):
        await deployment.Replica.__del__(self)
        import trtx_py
        Path(os.environ["FOLDER"], f"closed-{os.getpid()}").write_text(str(trtx_py.live_objects()))

def keeping(images, run=deployment.run_locally):
    answers, replicas = run(images)
    np.save(Path(os.environ["FOLDER"], "answers.npy"), answers)
    return answers, replicas

given = deployment.Digits
deployment.Digits = serve.deployment(
    num_replicas=given.num_replicas, max_ongoing_requests=given.max_ongoing_requests
)(Watched)
deployment.run_locally = keeping
deployment.main()
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short: Ray keeps Unix sockets in it, whose paths have a limit."""
    path = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


def test_what_the_page_shows_is_in_the_example() -> None:
    page = (ROOT / "docs" / "how-to" / "ray-serve.md").read_text(encoding="utf-8")
    example = (ROOT / "examples" / "ray_serve" / "deployment.py").read_text(encoding="utf-8")
    blocks = re.findall(r"^```py\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert blocks
    assert [block for block in blocks if block not in example] == []


def processes_of(folder: Path) -> list[str]:
    """Command lines that name it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has just ended
            continue
        if str(folder) in line:
            found.append(line)
    return found


def answers_of_the_engine(images: np.ndarray) -> np.ndarray:
    """Without Ray."""

    async def ask() -> np.ndarray:
        async with trtx.open_engine(MODEL, backend="mock", profiles=[PROFILE]) as engine:
            parts = [await engine.infer({"image": images[first : first + 30]}) for first in range(0, len(images), 30)]
            return np.concatenate([part["probabilities"] for part in parts])

    return asyncio.run(ask())


def test_two_replicas_answer_and_end(folder: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'examples' / 'ray_serve'}",  # for all of Ray's processes
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "FOLDER": str(folder),
        "TRTX_BACKEND": "mock",
    }
    driver = folder / "driver.py"
    driver.write_text(DRIVER)
    result = subprocess.run(
        [sys.executable, str(driver)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    images = np.random.default_rng(0).uniform(0, 16, (REQUESTS, 1, 8, 8)).astype(np.float32)
    answers = np.load(folder / "answers.npy")
    assert answers.shape == (REQUESTS, 10)
    np.testing.assert_allclose(answers, answers_of_the_engine(images), rtol=1e-4, atol=1e-6)
    served = re.findall(r"^replica (\d+): (\d+) requests in (\d+) launches$", result.stdout, re.MULTILINE)
    assert len(served) == 2, result.stdout
    assert sum(int(requests) for _, requests, _ in served) == REQUESTS
    assert sum(int(launches) for *_, launches in served) < REQUESTS, "nothing was batched"
    # Each replica closed what it had opened, and Ray left no process.
    closed = {path.name: path.read_text() for path in folder.glob("closed-*")}
    assert closed == {f"closed-{process}": "[]" for process, *_ in served}
    assert processes_of(folder) == []
