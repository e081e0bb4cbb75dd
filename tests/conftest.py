"""What all tests share: nothing may be left open, and where the models are."""

from __future__ import annotations

import gc
import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import trtx_py as trtx
from trtx_py._resource import _release_everything

SHARED_KIT = Path(__file__).resolve().parents[2] / "shared" / "gpu-kit"


def kit_folder() -> Path | None:
    """The GPU kit's folder: TRTX_GPU_KIT, or beside the checkout, or None."""
    named = os.environ.get("TRTX_GPU_KIT")
    for folder in ([Path(named)] if named else []) + [SHARED_KIT]:
        if (folder / "cases.json").is_file():
            return folder
    return None


def pytest_configure() -> None:
    """Ctrl-C is heard here and in what tests start, also where the tests were started in the background, by a shell
    that lets such programs ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # How long an example takes says more about the machine than about the code. Loaded before any test is imported: on
    # top of it is what tests set themselves.
    # The same examples each time, so that what a change broke is told from what luck found; scripts/test-long asks for
    # many more, and those are new ones.
    settings.register_profile(
        "untimed",
        parent=settings(),
        deadline=None,
        derandomize="TRTX_PROPERTY_EXAMPLES" not in os.environ,
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.load_profile("untimed")


def pytest_collection_finish() -> None:
    """What was imported so far stays."""
    # Hypothesis, imported above, is among it: Trio registers something with it at its import, and it looks who refers
    # to that, but not among what is frozen.
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _engine_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test reads or writes the user's own engine cache; also none that a fixture of a module opens."""
    folder = tmp_path_factory.mktemp("engine-caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRTX_CACHE_DIR", str(folder / "shared"))
        yield folder


_numbers = itertools.count()


@pytest.fixture(autouse=True)
def engine_cache_root(_engine_caches: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default engine cache of this test alone: what is built once more must not depend on other tests."""
    root = _engine_caches / str(next(_numbers))
    monkeypatch.setenv("TRTX_CACHE_DIR", str(root))
    return root


_finished = itertools.count(1)


@pytest.fixture(autouse=True)
def _nothing_left_open() -> Iterator[None]:
    """Every test leaves ``live_objects()`` empty. What a failed one left is closed: the next one is not to blame."""
    yield
    gc.collect()
    left = trtx.live_objects()
    if left:
        _release_everything()
    elif next(_finished) % 32 == 0:
        # What lives now stays (modules that tests imported, reports): to look at it again took as long as the tests.
        gc.freeze()
    assert not left, "left open:\n" + "\n".join(map(str, left))
