"""The engine cache: what is found, what is built anew, and what is kept."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

import trtx_py as trtx
import trtx_py.cache._cache as cache_module
import trtx_py.cache._key as key_module
from mock_backend import MockBackend
from tests.unit.ownership import PROFILE, SAMPLE, WEIGHTS, matmul_model
from trtx_py._build import BUILD_OPTIONS, BuildRequest
from trtx_py.cache._content import UncacheableError
from trtx_py.quantize import Calibration, PrecisionPolicy


def builds(backend: MockBackend) -> int:
    return backend.calls["build_serialized_network"]


def model_with(weights: np.ndarray) -> bytes:
    model = onnx.load_from_string(matmul_model())
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weights, "w"))
    return model.SerializeToString()


def external_model(folder: Path, weights: np.ndarray = WEIGHTS) -> Path:
    """The same model with its weights in a file beside it; the file of the model never changes."""
    model = onnx.load_from_string(matmul_model())
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for name, value in (("location", "weights.bin"), ("offset", "0"), ("length", str(weights.nbytes))):
        tensor.external_data.add(key=name, value=value)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    (folder / "weights.bin").write_bytes(weights.astype(np.float32).tobytes())
    return folder / "model.onnx"


@pytest.fixture
def cache(tmp_path: Path) -> trtx.EngineCache:
    return trtx.EngineCache(tmp_path / "cache")


def below(cache: trtx.EngineCache, *names: str) -> Path:
    return Path(cache.root, *names)


def entry_file(cache: trtx.EngineCache) -> Path:
    (entry,) = cache.list()
    return below(cache, "plans", f"{entry.key}.plan")


# Found


async def test_second_open_builds_nothing_and_serves_the_same(
    mock_backend_factory: Callable[..., MockBackend], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRTX_CACHE_DIR", str(tmp_path / "engines"))
    results = []
    for expected in (1, 0):
        backend = mock_backend_factory()
        async with trtx.open_engine(matmul_model(), backend, profiles=[PROFILE]) as engine:
            results.append(await engine.infer({"x": SAMPLE}))
        assert builds(backend) == expected
    np.testing.assert_array_equal(results[0]["y"], results[1]["y"])
    assert len(trtx.EngineCache().list()) == 1
    assert trtx.EngineCache().root == str(tmp_path / "engines")


async def test_plan_that_is_found_is_the_one_that_was_built(cache: trtx.EngineCache, mock_backend: MockBackend) -> None:
    built = await cache.plan(matmul_model(), mock_backend, profiles=[PROFILE])
    found = await cache.plan(matmul_model(), mock_backend, profiles=[PROFILE])
    assert (found, found.header) == (built, built.header)
    assert builds(mock_backend) == 1


@pytest.mark.parametrize("place", ["an object", "a path"])
async def test_open_engine_takes_a_cache_by_object_or_path(
    place: str, cache: trtx.EngineCache, mock_backend: MockBackend
) -> None:
    for _ in range(2):
        async with trtx.open_engine(matmul_model(), mock_backend, cache=cache if place == "an object" else cache.root):
            assert builds(mock_backend) == 1
    assert len(cache.list()) == 1


async def test_no_cache_builds_and_keeps_nothing(mock_backend: MockBackend) -> None:
    for _ in range(2):
        async with trtx.open_engine(matmul_model(), mock_backend, cache=False):
            pass
    assert builds(mock_backend) == 2
    assert not os.listdir(os.environ["TRTX_CACHE_DIR"])


async def test_same_request_in_other_words_is_found(
    cache: trtx.EngineCache, mock_backend: MockBackend, tmp_path: Path
) -> None:
    path = tmp_path / "matmul.onnx"
    path.write_bytes(matmul_model())
    await cache.plan(
        matmul_model(), mock_backend, profiles=[PROFILE], flags=("TF32", "REFIT"), compute_capabilities="8.9",
        workspace_bytes=None, max_aux_streams=1,
    )  # fmt: skip
    lists: Any = [{"x": [list(shape) for shape in PROFILE["x"]]}]
    await cache.plan(
        path, mock_backend, profiles=lists, flags=["refit", "tf32"], compute_capabilities=["8.9"],
        max_aux_streams=np.int64(1),
    )  # fmt: skip
    assert builds(mock_backend) == 1


async def test_weights_in_files_and_as_one_blob_are_the_same_model(
    cache: trtx.EngineCache, mock_backend: MockBackend, tmp_path: Path
) -> None:
    path = external_model(tmp_path)
    await cache.plan(path, mock_backend)
    await cache.plan(path.read_bytes(), mock_backend, weights=(tmp_path / "weights.bin").read_bytes())
    await cache.plan(path.read_bytes(), mock_backend, weights=tmp_path / "weights.bin")
    assert builds(mock_backend) == 1


# Not found

BASE: dict[str, Any] = {"profiles": [PROFILE]}
CHANGES: dict[str, dict[str, Any]] = {
    "other profiles": {"profiles": [{"x": ((1, 4), (2, 4), (9, 4))}]},
    "one more profile": {"profiles": [PROFILE, PROFILE]},
    "default profiles": {"profiles": None},
    "precision": {"precision": "tf32"},
    "workspace_bytes": {"workspace_bytes": 1 << 20},
    "optimization_level": {"optimization_level": 1},
    "max_aux_streams": {"max_aux_streams": 0},
    "profile_sharing": {"profile_sharing": False},
    "compute_capabilities": {"compute_capabilities": ("8.6",)},
    "flags": {"flags": ("TF32",)},
    "builder_options": {"builder_options": trtx.BuilderOptions(tiling="fast")},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
async def test_every_option_is_part_of_the_key(
    cache: trtx.EngineCache, mock_backend: MockBackend, change: dict[str, Any]
) -> None:
    for options in (BASE, {**BASE, **change}, BASE):
        await cache.plan(matmul_model(), mock_backend, **options)
    assert builds(mock_backend) == 2
    assert len(cache.list()) == 2


def test_every_option_of_a_build_has_its_rule() -> None:
    assert key_module._OPTIONS.keys() == BUILD_OPTIONS - {"weights"}
    conversions = {"calibration", "precision_policy", "require_precision"}  # the next test's
    assert set(CHANGES) >= key_module._OPTIONS.keys() - conversions


def digest_of(backend: MockBackend, precision: str | None, **options: Any) -> str:
    request = BuildRequest(matmul_model(), backend, precision=precision, options=options)
    return key_module.plan_key(request).digest


def test_all_that_a_conversion_depends_on_is_part_of_the_key(mock_backend: MockBackend, tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    folder.mkdir()
    np.save(folder / "a.npy", SAMPLE)
    requests: dict[str, tuple[str, dict[str, Any]]] = {
        "fp16": ("fp16", {}),
        "bf16": ("bf16", {}),
        "required": ("fp16", {"require_precision": True}),
        "a node kept": ("fp16", {"precision_policy": PrecisionPolicy(keep=frozenset({"product"}))}),
        "a limit": ("fp16", {"precision_policy": PrecisionPolicy(max_relative_error=0.01)}),
        "arrays": ("int8", {"calibration": Calibration({"x": SAMPLE})}),
        "other values": ("int8", {"calibration": Calibration({"x": SAMPLE + 1})}),
        "another method": ("int8", {"calibration": Calibration({"x": SAMPLE}, method="minmax")}),
        "fewer batches": ("int8", {"calibration": Calibration({"x": SAMPLE}, batches=1)}),
        "files": ("int8", {"calibration": Calibration(folder)}),
    }
    keys = {name: digest_of(mock_backend, word, **options) for name, (word, options) in requests.items()}
    assert len(set(keys.values())) == len(keys)
    assert digest_of(mock_backend, "int8", calibration=Calibration({"x": SAMPLE.copy()})) == keys["arrays"]
    kept = Calibration({"x": SAMPLE}, cache=tmp_path / "ranges")
    assert digest_of(mock_backend, "int8", calibration=kept) == keys["arrays"]
    np.save(folder / "a.npy", SAMPLE + 1)
    assert digest_of(mock_backend, "int8", calibration=Calibration(folder)) != keys["files"]


@pytest.mark.parametrize(
    "options",
    [{"calibration": "data"}, {"precision_policy": "strict"}, {"flags": 5}, {"profile_sharing": object()}],
    ids=str,
)  # fmt: skip
def test_value_that_no_rule_knows_has_no_key(mock_backend: MockBackend, options: dict[str, Any]) -> None:
    with pytest.raises(UncacheableError):
        digest_of(mock_backend, "int8", **options)


def test_calibration_data_that_may_be_other_data_the_next_time_has_no_key(mock_backend: MockBackend) -> None:
    for data in (iter([{"x": SAMPLE}]), [{"x": SAMPLE}]):
        with pytest.raises(UncacheableError, match="may be other data"):
            digest_of(mock_backend, "int8", calibration=Calibration(data))


async def test_changed_weight_misses(cache: trtx.EngineCache, mock_backend: MockBackend) -> None:
    changed = WEIGHTS.copy()
    changed[3, 2] = np.nextafter(changed[3, 2], np.float32(9))
    plans = [await cache.plan(model_with(weights), mock_backend) for weights in (WEIGHTS, changed)]
    assert builds(mock_backend) == 2
    assert plans[0].header.onnx_sha256 != plans[1].header.onnx_sha256


async def test_changed_weight_in_external_data_misses(
    cache: trtx.EngineCache, mock_backend: MockBackend, tmp_path: Path
) -> None:
    path = external_model(tmp_path)
    first = path.stat()
    await cache.plan(path, mock_backend)
    changed = WEIGHTS.copy()
    changed[0, 0] += 1
    external_model(tmp_path, changed)
    # Nothing but the bytes tells: size and time of both files are what they were.
    for name in ("model.onnx", "weights.bin"):
        os.utime(tmp_path / name, ns=(first.st_atime_ns, first.st_mtime_ns))
    await cache.plan(path, mock_backend)
    assert builds(mock_backend) == 2


def other_driver(patch: pytest.MonkeyPatch, backend: MockBackend) -> None:
    patch.setattr(backend.driver, "cuDriverGetVersion", lambda: 13_999)


def other_kernel_driver(patch: pytest.MonkeyPatch, backend: MockBackend) -> None:
    patch.setattr(key_module, "_KERNEL_DRIVER", __file__)


def other_package(patch: pytest.MonkeyPatch, backend: MockBackend) -> None:
    patch.setattr(trtx, "__version__", "0.0.0")


def other_environment(patch: pytest.MonkeyPatch, backend: MockBackend) -> None:
    patch.setenv("NVIDIA_TF32_OVERRIDE", "0")


@pytest.mark.parametrize("change", [other_driver, other_kernel_driver, other_package, other_environment])
async def test_what_is_around_the_build_is_part_of_the_key(
    cache: trtx.EngineCache, mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch, change: Callable[..., None]
) -> None:
    await cache.plan(matmul_model(), mock_backend)
    change(monkeypatch, mock_backend)
    await cache.plan(matmul_model(), mock_backend)
    assert builds(mock_backend) == 2


@pytest.mark.parametrize(
    "options",
    [{"version": "1.0.0.1"}, {"compute_capability": "8.6"}, {"operators": "any"}, {"profile_sharing": False},
     {"flavour": "other_mock"}],
    ids=str,
)  # fmt: skip
async def test_another_backend_is_another_key(
    cache: trtx.EngineCache, mock_backend_factory: Callable[..., MockBackend], options: dict[str, Any]
) -> None:
    await cache.plan(matmul_model(), mock_backend_factory())
    other = mock_backend_factory(**options)
    plan = await cache.plan(matmul_model(), other)
    assert builds(other) == 1
    assert plan.header.version == options.get("version", "1.0.0.0")


async def test_backend_that_does_not_describe_its_plans_builds_every_time(
    cache: trtx.EngineCache, mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(mock_backend, "plan_settings", lambda: None)
    with caplog.at_level(logging.INFO, "trtx_py.cache"):
        for _ in range(2):
            await cache.plan(matmul_model(), mock_backend)
    assert builds(mock_backend) == 2
    assert "plan_settings" in caplog.text
    assert cache.list() == ()


async def test_option_that_has_no_one_form_is_not_cached(cache: trtx.EngineCache, mock_backend: MockBackend) -> None:
    for _ in range(2):
        await cache.plan(matmul_model(), mock_backend, flags=(flag for flag in ("TF32",)))
    assert builds(mock_backend) == 2


async def test_model_that_changes_while_it_is_read_is_not_kept(
    cache: trtx.EngineCache, mock_backend: MockBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(model_with(WEIGHTS))
    hashed = key_module.plan_key

    def then_changed(*arguments: Any) -> Any:
        key = hashed(*arguments)
        path.write_bytes(model_with(WEIGHTS + 1))
        return key

    monkeypatch.setattr(cache_module, "plan_key", then_changed)
    await cache.plan(path, mock_backend)
    assert "changed while it was read" in caplog.text
    assert cache.list() == ()


# Damage


@pytest.mark.parametrize("where", [0, 9, 14, 20, 60, 0.3, 0.6, -1])
async def test_flipped_bit_is_noticed_and_built_again(
    cache: trtx.EngineCache, mock_backend: MockBackend, where: Any, caplog: Any
) -> None:
    plan = await cache.plan(matmul_model(), mock_backend)
    file = entry_file(cache)
    whole = file.read_bytes()
    damaged = bytearray(whole)
    damaged[int(where * len(whole)) if isinstance(where, float) else where] ^= 4
    file.write_bytes(damaged)
    assert await cache.plan(matmul_model(), mock_backend) == plan
    assert builds(mock_backend) == 2
    assert caplog.text.count("is damaged and is built again") == 1
    assert await cache.plan(matmul_model(), mock_backend) == plan
    assert builds(mock_backend) == 2
    assert not cache.verify().removed


@pytest.mark.parametrize("length", [0, 1, 47, 48, 100, -1])
async def test_file_that_was_cut_short_is_noticed(
    cache: trtx.EngineCache, mock_backend: MockBackend, length: int
) -> None:
    await cache.plan(matmul_model(), mock_backend)
    file = entry_file(cache)
    file.write_bytes(file.read_bytes()[:length])
    await cache.plan(matmul_model(), mock_backend)
    assert builds(mock_backend) == 2


async def test_plan_under_the_name_of_another_is_noticed(cache: trtx.EngineCache, mock_backend: MockBackend) -> None:
    await cache.plan(model_with(WEIGHTS), mock_backend)
    file = entry_file(cache)
    other = await cache.plan(model_with(WEIGHTS + 1), mock_backend)
    (second,) = [entry.key for entry in cache.list() if entry.key != file.stem]
    below(cache, "plans", f"{second}.plan").write_bytes(file.read_bytes())
    assert await cache.plan(model_with(WEIGHTS + 1), mock_backend) == other
    assert builds(mock_backend) == 3


async def test_verify_removes_what_is_damaged_and_says_why(cache: trtx.EngineCache, mock_backend: MockBackend) -> None:
    await cache.plan(model_with(WEIGHTS), mock_backend)
    damaged = entry_file(cache)
    await cache.plan(model_with(WEIGHTS + 1), mock_backend)
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    report = cache.verify()
    assert report.checked == 2
    assert list(report.removed) == [f"plans/{damaged.name}"]
    assert "SHA-256 does not match" in report.removed[f"plans/{damaged.name}"]
    assert report.freed_bytes == len(content)
    assert not damaged.exists()
    assert len(cache.list()) == 1
    assert cache.verify().removed == {}


# What is kept


async def test_list_says_what_each_plan_is(cache: trtx.EngineCache, mock_backend: MockBackend, tmp_path: Path) -> None:
    path = tmp_path / "matmul.onnx"
    path.write_bytes(matmul_model())
    assert cache.list() == ()
    await cache.plan(path, mock_backend, precision="fp32", compute_capabilities=("8.6", "8.9"))
    (entry,) = cache.list()
    assert (entry.flavour, entry.version, entry.model) == ("mock", "1.0.0.0", "matmul.onnx")
    assert (entry.precision, entry.compute_capabilities) == ("fp32", ("8.6", "8.9"))
    assert entry.size_bytes == entry_file(cache).stat().st_size
    assert 0 <= entry.last_used_s - entry.created_s < 60
    os.utime(entry_file(cache), (1, 1))
    await cache.plan(path, mock_backend, precision="fp32", compute_capabilities=("8.6", "8.9"))
    assert cache.list()[0].last_used_s > entry.created_s - 60


async def three_plans(cache: trtx.EngineCache, backend: MockBackend) -> list[trtx.CacheEntry]:
    """Used at 1000, 2000 and 3000 seconds after the epoch."""
    entries: list[trtx.CacheEntry] = []
    for number in (1, 2, 3):
        await cache.plan(model_with(WEIGHTS + number), backend)
        (new,) = {entry.key for entry in cache.list()} - {entry.key for entry in entries}
        os.utime(below(cache, "plans", f"{new}.plan"), (number * 1000, number * 1000))
        entries += [entry for entry in cache.list() if entry.key == new]
    return entries


async def test_prune_removes_what_was_not_used_for_longest(cache: trtx.EngineCache, mock_backend: MockBackend) -> None:
    first, second, third = await three_plans(cache, mock_backend)
    assert [entry.key for entry in cache.list()] == [third.key, second.key, first.key]
    assert cache.prune().removed == {}
    report = cache.prune(max_bytes=second.size_bytes + third.size_bytes)
    assert list(report.removed) == [f"plans/{first.key}.plan"]
    assert report.freed_bytes == first.size_bytes
    await cache.plan(model_with(WEIGHTS + 2), mock_backend)  # used now
    cache.prune(max_bytes=second.size_bytes)
    assert [entry.key for entry in cache.list()] == [second.key]


async def test_prune_by_age(cache: trtx.EngineCache, mock_backend: MockBackend) -> None:
    *_, third = await three_plans(cache, mock_backend)
    os.utime(below(cache, "plans", f"{third.key}.plan"))
    report = cache.prune(older_than_s=3600)
    assert len(report.removed) == 2
    assert all("not used for 3600 s" in reason for reason in report.removed.values())
    assert [entry.key for entry in cache.list()] == [third.key]


async def test_size_limit_holds_while_plans_are_added(tmp_path: Path, mock_backend: MockBackend) -> None:
    size = (await three_plans(trtx.EngineCache(tmp_path / "measured"), mock_backend))[0].size_bytes
    cache = trtx.EngineCache(tmp_path / "cache", max_bytes=2 * size)
    for number in range(4):
        await cache.plan(model_with(WEIGHTS + number), mock_backend)
        os.utime(below(cache, "plans", f"{cache.list()[0].key}.plan"), (number + 1, number + 1))
        assert sum(entry.size_bytes for entry in cache.list()) <= cache.max_bytes
    assert len(cache.list()) == 2
    before = builds(mock_backend)
    await cache.plan(model_with(WEIGHTS + 3), mock_backend)
    assert builds(mock_backend) == before


async def test_plan_that_is_larger_than_the_cache_is_not_kept(tmp_path: Path, mock_backend: MockBackend) -> None:
    cache = trtx.EngineCache(tmp_path / "cache", max_bytes=100)
    assert await cache.plan(matmul_model(), mock_backend)
    assert cache.list() == ()


async def test_clear_removes_everything_but_what_is_not_ours(
    cache: trtx.EngineCache, mock_backend: MockBackend
) -> None:
    await three_plans(cache, mock_backend)
    strange = below(cache, "plans", "notes.txt")
    strange.write_text("mine")
    assert len(cache.clear().removed) == 3
    assert cache.list() == ()
    assert strange.exists()


@pytest.mark.parametrize("operation", ["list", "prune", "verify", "clear"])
def test_cache_that_does_not_exist_yet_is_empty(cache: trtx.EngineCache, operation: str) -> None:
    result = getattr(cache, operation)()
    assert not (result if operation == "list" else result.removed)
    assert not Path(cache.root).exists()


# Where it lies


def test_default_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("TRTX_CACHE_DIR", str(tmp_path / "own"))
    assert trtx.EngineCache().root == str(tmp_path / "own")
    monkeypatch.setenv("TRTX_CACHE_DIR", "")
    assert trtx.EngineCache().root == str(tmp_path / "xdg" / "trtx_py")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert trtx.EngineCache().root == str(tmp_path / "home" / ".cache" / "trtx_py")


async def test_folders_and_files_are_this_users_alone(cache: trtx.EngineCache, mock_backend: MockBackend) -> None:
    before = os.umask(0)
    try:
        await cache.plan(matmul_model(), mock_backend)
    finally:
        os.umask(before)
    for folder, _, files in os.walk(cache.root):
        assert os.stat(folder).st_mode & 0o077 == 0
        assert all(os.stat(os.path.join(folder, name)).st_mode & 0o077 == 0 for name in files)


# Compiled kernels, which TensorRT-RTX has


class CompilingBackend(MockBackend):
    """A mock whose runtime compiles, as TensorRT-RTX does; ``given`` is what each runtime began with."""

    def __init__(self, content: bytes | None) -> None:
        super().__init__()
        self.content = content
        self.given: list[bytes | None] = []

    def create_runtime(self, log: Any, *, runtime_cache: bytes | None = None, **options: Any) -> Any:
        self.given.append(runtime_cache)
        runtime = super().create_runtime(log, **options)
        vars(runtime)["runtime_cache"] = lambda: self.content
        return runtime


async def open_and_close(backend: MockBackend, cache: trtx.EngineCache, **options: Any) -> None:
    async with trtx.open_engine(matmul_model(), backend, cache=cache, **options):
        pass


async def test_compiled_kernels_are_kept_beside_the_plan(cache: trtx.EngineCache) -> None:
    backend = CompilingBackend(b"kernels" * 100)
    for _ in range(2):
        await open_and_close(backend, cache)
    assert backend.given == [None, backend.content]
    (file,) = below(cache, "kernels").iterdir()
    written = file.stat().st_mtime_ns
    await open_and_close(backend, cache)
    assert file.stat().st_mtime_ns == written  # nothing new, nothing written
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert list(cache.verify().removed) == [f"kernels/{file.name}"]
    file.write_bytes(content)
    await open_and_close(backend, cache)
    assert backend.given[-1] is None  # damaged: TensorRT never saw them
    await open_and_close(backend, cache)
    assert backend.given[-1] == backend.content
    assert len(cache.clear().removed) == 2
    backend.close()


async def test_runtime_cache_of_the_callers_own_comes_first(cache: trtx.EngineCache, tmp_path: Path) -> None:
    backend = CompilingBackend(b"kernels")
    own = tmp_path / "own.cache"
    own.write_bytes(b"own")
    await open_and_close(backend, cache, runtime_cache=own)
    assert backend.given == [b"own"]
    assert not below(cache, "kernels").exists()
    backend.close()


async def test_plan_from_a_file_has_its_kernels_kept_too(cache: trtx.EngineCache) -> None:
    backend = CompilingBackend(b"kernels")
    plan = await cache.plan(matmul_model(), backend)
    for _ in range(2):
        async with trtx.open_engine(plan, backend, cache=cache):
            pass
    assert backend.given == [None, b"kernels"]
    backend.close()
