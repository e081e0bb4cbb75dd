"""Times that TensorRT has measured, kept beside the plans: given to each build, added to, and never an error."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mock_backend._builder as builder_module
import trtx_py as trtx
import trtx_py.cache._timings as timings_module
from mock_backend import MockBackend
from tests.unit.backends.test_tensorrt_advanced import V8, V10, Config10, Config86, Fixture, TimingCache
from tests.unit.ownership import PROFILE, matmul_model
from trtx_py.backends.tensorrt import TensorRTFamilyBackend
from trtx_py.cache._key import timings_key
from trtx_py.cache._lock import try_lock


class MeasuringBackend(MockBackend):
    """Builds as TensorRT does: with times, to which each build adds one of its own."""

    has_timing_cache = True

    def __init__(self, version: str = "10.9.0", name: bytes = b"") -> None:
        super().__init__(version=version)
        self.given: list[bytes | None] = []
        self.during: Callable[[], object] = lambda: None
        make = self.create_builder

        def create_builder(log: Any) -> Any:
            builder = make(log)
            build = builder.build_serialized_network

            def measured(network: Any, options: Any, progress: Any) -> bytes:
                further = dict(options.further)
                wanted = further.pop("timing_cache", None)
                self.given.append(None if wanted is None else wanted._read())
                plan: bytes = build(network, dataclasses.replace(options, further=further), progress)
                self.during()
                if wanted is not None:
                    mine = b"%s<%s%d>" % (self.given[-1], name, len(self.given))
                    wanted._replace(mine, lambda other: mine + b"|" + other)
                return plan

            vars(builder)["build_serialized_network"] = measured
            return builder

        vars(self)["create_builder"] = create_builder


@pytest.fixture
def cache(tmp_path: Path) -> trtx.EngineCache:
    return trtx.EngineCache(tmp_path / "cache")


@pytest.fixture
def backend() -> Any:
    made = MeasuringBackend()
    yield made
    made.close()


async def build(cache: trtx.EngineCache, backend: MockBackend, level: int, **options: Any) -> None:
    """A build that no earlier one has done: ``level`` differs."""
    await cache.plan(matmul_model(), backend, profiles=[PROFILE], optimization_level=level, **options)


def below(cache: trtx.EngineCache, *names: str) -> Path:
    return Path(cache.root, *names)


def timings(cache: trtx.EngineCache) -> Path:
    (file,) = below(cache, "timings").iterdir()
    return file


async def test_each_build_begins_with_the_times_of_those_before(
    cache: trtx.EngineCache, backend: MeasuringBackend
) -> None:
    for level in range(3):
        await build(cache, backend, level)
    await build(cache, backend, 2)  # found
    assert backend.given == [b"", b"<1>", b"<1><2>"]
    assert timings(cache).stat().st_mode & 0o077 == 0
    assert len(cache.list()) == 3  # one entry for each plan
    assert os.listdir(below(cache, "locks")) == []


async def test_another_version_has_times_of_its_own(cache: trtx.EngineCache, backend: MeasuringBackend) -> None:
    other = MeasuringBackend("10.10.0")
    await build(cache, backend, 1)
    await build(cache, other, 1)
    assert other.given == [b""]
    assert len(list(below(cache, "timings").iterdir())) == 2
    other.close()


async def test_builds_at_the_same_time_lose_nothing(cache: trtx.EngineCache, backend: MeasuringBackend) -> None:
    other = MeasuringBackend(name=b"other")

    def meanwhile() -> None:
        asyncio.run(build(cache, other, 5))

    backend.during = meanwhile
    await build(cache, backend, 1)
    backend.during = lambda: None
    await build(cache, backend, 2)
    assert backend.given == [b"", b"<1>|<other1>"]
    other.close()


async def test_damaged_times_are_measured_again(
    cache: trtx.EngineCache, backend: MeasuringBackend, caplog: pytest.LogCaptureFixture
) -> None:
    await build(cache, backend, 1)
    file = timings(cache)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING, "trtx_py.cache"):
        await build(cache, backend, 2)
    assert backend.given == [b"", b""]  # TensorRT never saw them
    assert "measured again" in caplog.text
    await build(cache, backend, 3)
    assert backend.given[-1] == b"<2>"
    file.write_bytes(content)
    assert list(cache.verify().removed) == [f"timings/{file.name}"]


async def test_times_are_pruned_with_the_rest(cache: trtx.EngineCache, backend: MeasuringBackend) -> None:
    await build(cache, backend, 1)
    assert sorted(place.partition("/")[0] for place in cache.prune(max_bytes=0).removed) == ["plans", "timings"]


@pytest.mark.parametrize(
    "options",
    [
        {"flags": ("disable_timing_cache",)},
        {"builder_options": trtx.BuilderOptions(flags=("DISABLE_TIMING_CACHE",))},
    ],
)
async def test_who_wants_none_gets_none(
    options: dict[str, Any], cache: trtx.EngineCache, backend: MeasuringBackend
) -> None:
    await build(cache, backend, 1, **options)
    assert backend.given == [None]


async def test_flags_that_can_be_read_once_are_the_builds(
    cache: trtx.EngineCache, backend: MeasuringBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(trtx.BuilderConfig, "set_flag", lambda config, flag: seen.append(flag))
    await build(cache, backend, 1, flags=iter(["SPARSE_WEIGHTS"]))
    assert (seen, backend.given) == (["SPARSE_WEIGHTS"], [None])
    with pytest.raises(trtx.InvalidArgumentError, match="flags is 5"):
        await build(cache, backend, 1, flags=5)


async def test_the_callers_own_comes_first(cache: trtx.EngineCache, backend: MeasuringBackend, tmp_path: Path) -> None:
    file = tmp_path / "own"
    file.write_bytes(b"own")
    own = trtx.TimingCache(file)
    await build(cache, backend, 1, builder_options=trtx.BuilderOptions(timing_cache=own))
    assert backend.given == [b"own"]
    assert file.read_bytes() == b"own<1>"
    assert not below(cache, "timings").exists()


async def test_options_given_stay_as_they_are(cache: trtx.EngineCache, backend: MeasuringBackend) -> None:
    given = trtx.BuilderOptions(workspace_bytes=1 << 20)
    for _ in range(2):
        await cache.plan(matmul_model(), backend, profiles=[PROFILE], builder_options=given)
    assert backend.given == [b""]
    assert given.timing_cache is None


async def test_backend_that_measures_nothing_gets_none(cache: trtx.EngineCache, mock_backend: MockBackend) -> None:
    assert "timing_cache" in builder_module._REFUSED  # it would fail the build
    await build(cache, mock_backend, 1)
    assert not below(cache, "timings").exists()


def test_which_tensorrt_measures() -> None:
    measures = {name: TensorRTFamilyBackend(name, module=Fixture(V10).vendor).has_timing_cache for name in FLAVOURS}
    assert measures == {"tensorrt": True, "tensorrt_rtx": False, "tensorrt_lean": False, "tensorrt_dispatch": False}


FLAVOURS = ("tensorrt", "tensorrt_rtx", "tensorrt_lean", "tensorrt_dispatch")


async def test_times_that_cannot_be_kept_are_a_warning(
    cache: trtx.EngineCache,
    backend: MeasuringBackend,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    below(cache).mkdir(mode=0o700)
    below(cache, "timings").write_bytes(b"in the way")
    with caplog.at_level(logging.WARNING, "trtx_py.cache"):
        await build(cache, backend, 1)
    assert "is not a folder" in caplog.text
    assert len(cache.list()) == 1
    below(cache, "timings").unlink()
    monkeypatch.setattr(timings_module, "_POLL_S", 0.0)
    locks: list[Any] = []
    lock = os.path.join(cache.root, "locks", f"{timings_key(backend, 0)}.lock")
    backend.during = lambda: locks.append(try_lock(lock))
    await build(cache, backend, 2)
    assert "another process holds their lock" in caplog.text
    locks[0].release()


class Combining(TimingCache):
    def combine(self, other: TimingCache, ignore_mismatch: bool) -> bool:
        if b"strange" in other.content:
            return False
        self.content += b"&" + other.content
        return True


class Combining8(Config86):
    def create_timing_cache(self, content: bytes) -> TimingCache:
        return Combining(content)


class Combining10(Config10):
    def create_timing_cache(self, content: bytes) -> TimingCache:
        return Combining(content)


@pytest.mark.parametrize(("version", "config"), [(V8, Combining8), (V10, Combining10)])
def test_tensorrt_combines_what_it_measured_with_what_others_did(version: str, config: Any) -> None:
    replaced: list[bytes] = []

    @dataclasses.dataclass(frozen=True)
    class Shared(trtx.TimingCache):
        def _read(self) -> bytes:
            return b"before"

        def _replace(self, content: bytes, combined: Callable[[bytes], bytes]) -> None:
            replaced.extend([content, combined(b"strange"), combined(b"theirs")])

    fixture = Fixture(version)
    fixture.config_class = config
    fixture.build(timing_cache=Shared("unused"))
    assert replaced == [b"before+measured", b"before+measured", b"before&theirs+measured"]
