"""The README's main job, and what else a wheel must bring, from an installation without a checkout.

    python installed_wheel.py digits.onnx

Run by cibuildwheel in the environment of each wheel, and by tests/integration/test_wheel.py. Needs trtx-py[mock] alone.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from importlib.metadata import entry_points, version
from pathlib import Path

import numpy as np

import trtx_py as trtx


async def main_job(model: str) -> None:
    """One request, then a thousand at once."""
    images = np.zeros((1000, 1, 8, 8), np.float32)
    async with trtx.open_engine(model, backend="mock", cache=False, lanes=2) as engine:
        outputs = await engine.infer({"image": images[:1]})
        assert outputs["probabilities"].shape == (1, 10)
        assert np.isclose(outputs["probabilities"].sum(), 1, atol=1e-5)
        async with trtx.DynamicBatcher(engine, max_batch_size=32, max_delay_s=0.002) as batcher:
            await asyncio.gather(*(batcher.infer({"image": images[n : n + 1]}) for n in range(1000)))
            print(batcher.statistics().batches, "launches for 1000 requests")
    assert trtx.live_objects() == []


def main(model: str) -> None:
    """Everything; raises, or ends with a line that says where it ran."""
    home = Path(trtx.__file__).resolve().parent
    assert home.is_relative_to(Path(sys.prefix).resolve()), f"{home} is not in {sys.prefix}: not the wheel's"
    assert version("trtx-py") == trtx.__version__
    assert (home / "py.typed").is_file()
    asyncio.run(main_job(model))
    assert any(point.value == "mock_backend.pytest_plugin" for point in entry_points(group="pytest11"))
    ask = [sys.executable, "-m", "trtx_py.capi", "--path"]
    library = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    assert Path(library).is_file(), library
    print(f"trtx-py {trtx.__version__} of {home} on CPython {sys.version.split()[0]}: all of it works")


if __name__ == "__main__":
    main(sys.argv[1])
