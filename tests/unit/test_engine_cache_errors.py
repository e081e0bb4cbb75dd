"""The engine cache where its folder cannot be written, is full, or must not be trusted: opens go on, and say so."""

from __future__ import annotations

import errno
import logging
import os
import pwd
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import trtx_py as trtx
import trtx_py.cache._cache as cache_module
import trtx_py.cache._entry as entry_module
import trtx_py.cache._folder as folder_module
import trtx_py.cache._lock as lock_module
from mock_backend import MockBackend, fail
from tests.unit.ownership import matmul_model


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


async def builds_of(backend: MockBackend, cache: Any, opens: int = 2) -> int:
    """How many of so many opens have built."""
    before = backend.calls["build_serialized_network"]
    for _ in range(opens):
        async with trtx.open_engine(matmul_model(), backend, cache=cache) as engine:
            assert not engine.closed
    return backend.calls["build_serialized_network"] - before


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "trtx_py.cache" and record.levelno >= logging.WARNING
    ]


def fails_with(number: int) -> Callable[..., Any]:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


# Cannot be written


class FailingOs:
    """``os`` for one module of the cache, in which some functions fail."""

    def __init__(self, names: str, number: int) -> None:
        self._names, self._number = names.split(), number

    def __getattr__(self, name: str) -> Any:
        return fails_with(self._number) if name in self._names else getattr(os, name)


#: The module and the function of os in it that fails, and how.
FAILURES = {
    "a read-only file system": (folder_module, "makedirs", errno.EROFS),
    "no locks to be had": (lock_module, "open", errno.EROFS),
    "no room for a file": (entry_module, "open", errno.ENOSPC),
    "no room for its content": (entry_module, "fsync", errno.ENOSPC),
    "no right to rename": (entry_module, "replace", errno.EACCES),
}


@pytest.mark.parametrize(("module", "function", "number"), FAILURES.values(), ids=FAILURES)
async def test_what_cannot_be_written_is_said_once_and_built(
    root: Path, mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch, caplog: Any, module: Any, function: str,
    number: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "os", FailingOs(function, number))
    opens = 2
    built = await builds_of(mock_backend, root, opens)
    kept = len(trtx.EngineCache(root).list())
    assert built == (1 if kept else opens)  # without locks plans are kept all the same
    (warning,) = warnings(caplog)
    assert os.strerror(number) in warning
    assert str(root) in warning
    monkeypatch.undo()
    assert len(files_below(root)) == kept
    assert trtx.EngineCache(root).verify().removed == {}
    assert await builds_of(mock_backend, root) == 1 - kept


async def test_disk_that_is_full_in_the_middle_of_a_plan_leaves_nothing(
    root: Path, mock_backend: MockBackend, caplog: Any
) -> None:
    """A real write that ends halfway: the process may write no more than 800 bytes to a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (800, before[1]))
    try:
        assert await builds_of(mock_backend, root) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.strerror(errno.EFBIG) in warnings(caplog)[0]
    assert files_below(root) == []
    assert await builds_of(mock_backend, root) == 1


async def test_folder_below_a_file_is_said_once_and_built(
    tmp_path: Path, mock_backend: MockBackend, caplog: Any
) -> None:
    (tmp_path / "file").write_text("")
    assert await builds_of(mock_backend, tmp_path / "file" / "cache") == 2
    (warning,) = warnings(caplog)
    assert os.strerror(errno.ENOTDIR) in warning


async def test_cache_that_may_only_be_read_serves_what_it_has(
    root: Path, mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    await builds_of(mock_backend, root)
    calls = {folder_module: "makedirs", lock_module: "open", entry_module: "open replace", cache_module: "utime unlink"}
    for module, functions in calls.items():
        monkeypatch.setattr(module, "os", FailingOs(functions, errno.EROFS))
    assert await builds_of(mock_backend, root) == 0
    assert warnings(caplog) == []


@pytest.mark.parametrize("call", ["cuDriverGetVersion", "cuDeviceGetCount", "cuDeviceGetName"])
async def test_driver_that_does_not_say_what_it_is_costs_the_caching_alone(
    root: Path, mock_backend: MockBackend, call: str, caplog: Any
) -> None:
    mock_backend.inject(fail(call))
    with caplog.at_level(logging.INFO, "trtx_py.cache"):
        assert await builds_of(mock_backend, root, 1) == 1
    assert "the driver does not say what it is" in caplog.text
    assert await builds_of(mock_backend, root) == 1


@pytest.mark.parametrize("home", ["", "relative"])
async def test_no_home_is_said_once_and_built(
    home: str, mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def no_account(number: int) -> Any:
        raise KeyError(number)

    for name in ("TRTX_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(pwd, "getpwuid", no_account)
    with pytest.raises(trtx.CacheError, match="TRTX_CACHE_DIR"):
        trtx.EngineCache()
    assert await builds_of(mock_backend, True) == 2
    assert len(warnings(caplog)) == 1


def test_empty_home_is_that_of_the_account(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRTX_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "")
    assert trtx.EngineCache().root == os.path.join(pwd.getpwuid(os.geteuid()).pw_dir, ".cache", "trtx_py")


async def test_folder_where_an_entry_would_be_is_left_alone(root: Path, mock_backend: MockBackend) -> None:
    cache = trtx.EngineCache(root)
    await cache.plan(matmul_model(), mock_backend)
    (root / "plans" / f"{'a' * 64}.plan").mkdir()
    before = len(os.listdir("/proc/self/fd"))
    assert len(cache.list()) == 1
    assert (cache.verify().checked, dict(cache.verify().removed)) == (1, {})
    (entry,) = cache.list()
    assert list(cache.clear().removed) == [f"plans/{entry.key}.plan"]
    (root / "plans" / f"{entry.key}.plan").mkdir()  # in the way of what is built
    assert await builds_of(mock_backend, cache) == 2
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("operation", ["prune", "verify", "clear"])
async def test_what_cannot_be_removed_is_an_error_that_names_the_folder(
    root: Path, mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    cache = trtx.EngineCache(root)
    await cache.plan(matmul_model(), mock_backend)
    (file,) = files_below(root)
    file.write_bytes(b"damaged")
    os.utime(file, (1, 1))
    monkeypatch.setattr(os, "unlink", fails_with(errno.EROFS))
    with pytest.raises(trtx.CacheError, match="cannot be") as caught:
        getattr(cache, operation)(**({"older_than_s": 1} if operation == "prune" else {}))
    assert caught.value.path == str(root)
    assert os.strerror(errno.EROFS) in str(caught.value)


# Must not be trusted


def link_elsewhere(root: Path) -> None:
    (root.parent / "elsewhere").mkdir()
    root.symlink_to(root.parent / "elsewhere")


def writable_by_others(root: Path) -> None:
    root.mkdir()
    root.chmod(0o777)


def writable_by_group(root: Path) -> None:
    root.mkdir()
    root.chmod(0o720)


def no_folder(root: Path) -> None:
    root.write_text("")


UNTRUSTED = {
    link_elsewhere: "symbolic link to",
    writable_by_others: r"written by others \(mode 0777\)",
    writable_by_group: r"written by others \(mode 0720\)",
    no_folder: "not a folder",
}


@pytest.mark.parametrize(("arrange", "reason"), UNTRUSTED.items(), ids=lambda item: getattr(item, "__name__", ""))
async def test_folder_that_others_could_fill_is_refused_where_it_is_named(
    root: Path, mock_backend: MockBackend, arrange: Callable[[Path], None], reason: str
) -> None:
    arrange(root)
    for make in (lambda: trtx.EngineCache(root), lambda: trtx.EngineCache(str(root))):
        with pytest.raises(trtx.CacheError, match=reason) as caught:
            make()
        assert caught.value.path == str(root)
    with pytest.raises(trtx.CacheError, match=reason):
        await builds_of(mock_backend, root)
    assert mock_backend.calls["build_serialized_network"] == 0
    assert files_below(root.parent) in ([], [root])


@pytest.mark.parametrize(("arrange", "reason"), UNTRUSTED.items(), ids=lambda item: getattr(item, "__name__", ""))
async def test_default_folder_that_others_could_fill_is_said_once_and_not_used(
    root: Path, mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch, caplog: Any,
    arrange: Callable[[Path], None], reason: str,
) -> None:  # fmt: skip
    arrange(root)
    monkeypatch.setenv("TRTX_CACHE_DIR", str(root))
    assert await builds_of(mock_backend, True) == 2
    assert len(warnings(caplog)) == 1
    assert files_below(root.parent) in ([], [root])


@pytest.fixture
def of_another_user(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Makes a file look like another user's; as root it is."""

    def give_away(path: Path) -> None:
        if os.geteuid() == 0:
            os.chown(path, 54321, -1, follow_symlinks=False)
        else:
            mine = os.geteuid()
            monkeypatch.setattr(os, "geteuid", lambda: mine + 1)

    return give_away


def test_folder_of_another_user_is_refused(root: Path, of_another_user: Callable[[Path], None]) -> None:
    root.mkdir()
    of_another_user(root)
    with pytest.raises(trtx.CacheError, match="belongs to user"):
        trtx.EngineCache(root)


async def test_folder_that_becomes_unsafe_is_not_read_any_more(
    root: Path, mock_backend: MockBackend, caplog: Any
) -> None:
    cache = trtx.EngineCache(root)
    assert await builds_of(mock_backend, cache) == 1
    (root / "plans").chmod(0o777)
    assert await builds_of(mock_backend, cache) == 2
    assert any("written by others" in text for text in warnings(caplog))
    with pytest.raises(trtx.CacheError, match="written by others"):
        cache.list()


def make_link(file: Path) -> None:
    copy = file.parent.parent / "copy"
    file.rename(copy)
    file.symlink_to(copy)


def make_writable(file: Path) -> None:
    file.chmod(0o666)


def make_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file, 0o600)


@pytest.mark.parametrize(
    "change", [make_link, make_writable, make_pipe, None], ids=lambda f: getattr(f, "__name__", "")
)
async def test_file_that_others_could_have_written_is_not_loaded_but_replaced(
    root: Path, mock_backend: MockBackend, caplog: Any, change: Callable[[Path], None] | None, request: Any
) -> None:
    cache = trtx.EngineCache(root)
    assert await builds_of(mock_backend, cache) == 1
    (file,) = files_below(root)
    if change is None and os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    (change or request.getfixturevalue("of_another_user"))(file)
    assert await builds_of(mock_backend, cache) == 1
    assert "is damaged and is built again" in warnings(caplog)[0]
    assert file.is_file()
    assert not file.is_symlink()
    assert cache.verify().removed == {}
    (change or request.getfixturevalue("of_another_user"))(file)
    assert list(cache.verify().removed) == [f"plans/{file.name}"]


# Arguments


@pytest.mark.parametrize("cache", [5, None, b"path", object()], ids=repr)
async def test_cache_must_be_one(mock_backend: MockBackend, cache: Any) -> None:
    with pytest.raises(trtx.InvalidArgumentError, match="expected True, False, an EngineCache or the path of one"):
        async with trtx.open_engine(matmul_model(), mock_backend, cache=cache):
            pass


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [({"root": 5}, "root"), ({"max_bytes": 0}, "max_bytes"), ({"max_bytes": 1.5}, "max_bytes"),
     ({"root": "a\0"}, "null")],
    ids=repr,
)  # fmt: skip
def test_constructor_refuses(arguments: dict[str, Any], expected: str) -> None:
    with pytest.raises(trtx.InvalidArgumentError, match=expected):
        trtx.EngineCache(**arguments)


@pytest.mark.parametrize(
    "arguments", [{"max_bytes": -1}, {"max_bytes": "all"}, {"older_than_s": -1}, {"older_than_s": "a day"}], ids=repr
)
def test_prune_refuses(root: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(trtx.InvalidArgumentError, match=next(iter(arguments))):
        trtx.EngineCache(root).prune(**arguments)


async def test_plan_refuses_what_is_no_model_to_build(root: Path, mock_backend: MockBackend) -> None:
    cache = trtx.EngineCache(root)
    plan = await cache.plan(matmul_model(), mock_backend)
    with pytest.raises(trtx.InvalidArgumentError, match="a plan already"):
        await cache.plan(plan, mock_backend)
    with pytest.raises(trtx.InvalidArgumentError, match="lanes"):
        await cache.plan(matmul_model(), mock_backend, lanes=2)


@pytest.mark.parametrize(
    ("options", "error"),
    [({"precision": "fp99"}, trtx.InvalidArgumentError), ({"flags": 5}, trtx.InvalidArgumentError),
     ({"profiles": {"x": ()}}, trtx.InvalidArgumentError), ({"workspace_bytes": "much"}, trtx.InvalidArgumentError),
     ({"flags": "NO_SUCH_FLAG"}, trtx.BuilderError), ({"weights": b"none needed"}, trtx.InvalidArgumentError),
     ({"device": 5}, trtx.TrtxError)],
    ids=str,
)  # fmt: skip
async def test_errors_of_the_build_are_those_without_a_cache(
    root: Path, mock_backend: MockBackend, options: dict[str, Any], error: type[Exception]
) -> None:
    found = []
    for cache in (trtx.EngineCache(root), False):
        with pytest.raises(error) as caught:
            async with trtx.open_engine(matmul_model(), mock_backend, cache=cache, **options):
                pass
        found.append((type(caught.value), str(caught.value)))
    assert found[0] == found[1]
    assert files_below(root) == []
