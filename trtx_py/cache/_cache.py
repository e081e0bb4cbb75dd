"""The engine cache: a plan that was built before is found instead of built."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from .._aio import run_shielded
from .._arguments import checked_int, checked_path, checked_timeout
from .._build import BUILD_OPTIONS, BuildRequest, Built, Profiles, Source, read_source
from .._errors import CacheError, InvalidArgumentError, TrtxError
from .._logger import Logger
from .._plan import Plan
from ..backends.protocols import TensorRTBackend
from ..backends.registry import resolve_backend
from ._content import UncacheableError
from ._entry import (
    TEMPORARY,
    CacheEntry,
    CacheReport,
    DamagedEntryError,
    read_blob,
    read_description,
    read_plan,
    write_plan,
)
from ._folder import default_root, trusted_folder
from ._kernels import Kernels
from ._key import PlanKey, kernels_key, plan_key, timings_key
from ._lock import FileLock, try_lock
from ._said import log, warn_once
from ._timings import KeptTimings, with_timings

DEFAULT_MAX_BYTES = 16 << 30

_List = list  # the class has a method of that name
_PLANS, _KERNELS, _TIMINGS, _LOCKS = "plans", "kernels", "timings", "locks"
_POLL_S = 0.05
_NAME = re.compile(r"[0-9a-f]{64}")
_TEMPORARY_NAME = re.compile(rf"\.([0-9a-f]{{64}})\.[0-9a-f]+{re.escape(TEMPORARY)}")
_SUFFIXES = {_PLANS: ".plan", _KERNELS: ".kernels", _TIMINGS: ".timings"}


@dataclass(frozen=True)
class _File:
    """One file of the cache, as the folder lists it."""

    folder: str
    path: str
    key: str
    size: int
    used_s: float

    @property
    def place(self) -> str:
        return f"{self.folder}/{os.path.basename(self.path)}"


class EngineCache:
    """Plans on disk, by the hash of all that they are made of.

    That is: the model with all its weights, the profiles, the precision and every other option of the build, the
    TensorRT flavour and version, the GPU (or the architectures asked for), the driver, and the version of this package.
    What is not known to be the same is another key, and a build of which that cannot be said is not cached.

    Any number of processes may use one cache. Of those that want the same plan one builds it while the others wait. A
    plan is written under another name and then renamed, and its SHA-256 is checked whenever it is read: a damaged one
    is a logged warning, and built again. What was not used for longest goes first when the cache is full.

    The cache is owned by nobody and need not be closed.

    Args:
        root: its folder, which need not exist yet. None: TRTX_CACHE_DIR, else ``trtx_py`` in XDG_CACHE_HOME, else
            ``~/.cache/trtx_py``.
        max_bytes: how large its files may be together.

    Raises:
        CacheError: the folder is a symbolic link, belongs to another user or can be written by others (plans are
            programs), or there is no home to put it in.
        InvalidArgumentError: root is no path, or max_bytes no positive number.
    """

    def __init__(self, root: str | os.PathLike[str] | None = None, *, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self._max_bytes = checked_int(max_bytes, "max_bytes", minimum=1)
        self._root = default_root() if root is None else os.path.abspath(checked_path(root, "root"))
        with contextlib.suppress(OSError):  # what cannot be looked at now is said when it is used
            self._is_there()

    def __repr__(self) -> str:
        return f"EngineCache({self._root!r}, max_bytes={self._max_bytes})"

    @property
    def root(self) -> str:
        """Its folder, as an absolute path."""
        return self._root

    @property
    def max_bytes(self) -> int:
        """How large its files may be together."""
        return self._max_bytes

    async def plan(
        self,
        source: Source,
        backend: str | TensorRTBackend | None = None,
        device: int = 0,
        profiles: Profiles | None = None,
        precision: str | None = None,
        *,
        logger: Logger | None = None,
        **options: Any,
    ) -> Plan:
        """The plan of a model: found here, or built and kept.

        Args:
            source: an ONNX model, as a path or as bytes.
            backend, device, profiles, precision, logger: as for ``open_engine``; the backend need only build.
            **options: of the build, as for ``open_engine``.

        Returns:
            The plan. That it could not be kept, because the folder cannot be written or the disk is full, is a logged
            warning.
        Raises:
            BackendUnavailableError, ParserError, BuilderError: as Builder and Network.
            InvalidArgumentError: the source is a plan already, or an option is unknown or of no use.
        Cancellation: while the model is hashed or another process builds, the wait ends at once; the own build is
            stopped, and nothing is kept. Others that wait for the same plan go on: one of them builds it.
        """
        unknown = options.keys() - BUILD_OPTIONS
        if unknown:
            known = ", ".join(sorted(BUILD_OPTIONS))
            raise InvalidArgumentError(f"EngineCache.plan has no option {', '.join(sorted(unknown))}; it has {known}")
        model = await run_shielded(lambda: read_source(source))
        if isinstance(model, Plan):
            raise InvalidArgumentError("the source is a plan already; expected an ONNX model: use the plan as it is")
        chosen = await run_shielded(lambda: resolve_backend(backend, need="build"))
        return await self._obtain(BuildRequest(model, chosen, device, profiles, precision, options, logger))

    def list(self) -> tuple[CacheEntry, ...]:
        """One entry for each plan, the one that was used last first. Damaged ones are not among them.

        Raises CacheError if the folder cannot be read or must not be trusted.
        """
        found = []
        with self._managing("read"):
            for file in self._files(_PLANS):
                with contextlib.suppress(DamagedEntryError, FileNotFoundError):
                    found.append(read_description(file.path, file.key))
        return tuple(sorted(found, key=lambda entry: entry.last_used_s, reverse=True))

    def prune(self, max_bytes: int | None = None, older_than_s: float | None = None) -> CacheReport:
        """Remove what was not used for longest, and what builders that were killed have left.

        Args:
            max_bytes: how large all files may be together; None for the cache's own limit.
            older_than_s: remove what was not used for so many seconds, too.
        Raises:
            CacheError: something cannot be removed, or the folder must not be trusted.
            InvalidArgumentError: a limit is no number, or negative.
        """
        limit = self._max_bytes if max_bytes is None else checked_int(max_bytes, "max_bytes", minimum=0)
        age = checked_timeout(older_than_s, "older_than_s")
        with self._managing("pruned"):
            files = sorted(self._files(), key=lambda file: file.used_s)
            reasons: dict[_File, str] = {}
            if age is not None:
                before = time.time() - age
                reasons = {file: f"not used for {age:g} s" for file in files if file.used_s < before}
            left = sum(file.size for file in files if file not in reasons)
            for file in files:
                if left > limit and file not in reasons:
                    reasons[file] = f"least recently used, over the limit of {limit} bytes"
                    left -= file.size
            return self._removed(len(files), reasons)

    def verify(self) -> CacheReport:
        """Read everything, and remove what is damaged or was not written by this user.

        Raises CacheError if something cannot be read or removed, or the folder must not be trusted.
        """
        with self._managing("verified"):
            files = _List(self._files())
            reasons: dict[_File, str] = {}
            for file in files:
                try:
                    (read_plan if file.folder == _PLANS else read_blob)(file.path, file.key)
                except FileNotFoundError:
                    continue  # another process removed it
                except DamagedEntryError as error:
                    reasons[file] = str(error)
            return self._removed(len(files), reasons)

    def clear(self) -> CacheReport:
        """Remove all plans and what belongs to them. What is being built goes on, and is kept when it is done.

        Raises CacheError if something cannot be removed, or the folder must not be trusted.
        """
        with self._managing("cleared"):
            files = _List(self._files())
            return self._removed(len(files), dict.fromkeys(files, "cleared"))

    async def _obtain(self, request: BuildRequest) -> Plan:
        """The plan of ``request``, found or built. Raises what the build does, and nothing because of the cache."""
        given_up = threading.Event()
        try:
            key = await run_shielded(lambda: plan_key(request, given_up.is_set), on_cancel=given_up.set)
        except UncacheableError as error:
            log.info("a plan is built, and not kept: %s", error)
            return (await (await self._timed(request)).build()).plan
        found = await run_shielded(lambda: self._find(key))
        if found is not None:
            return found
        held: list[FileLock] = []
        try:
            found = await run_shielded(lambda: self._turn(key, held, given_up), on_cancel=given_up.set)
            if found is not None:
                return found
            built = await (await self._timed(request)).build()
            await run_shielded(lambda: self._keep(key, built, request))
            return built.plan
        finally:
            for lock in held:
                lock.release()

    def _find(self, key: PlanKey, *, locked: bool = False) -> Plan | None:
        path = self._path(_PLANS, key.digest)
        try:
            if not self._is_there(_PLANS):
                return None
            plan = read_plan(path, key.digest)
        except FileNotFoundError:
            return None
        except DamagedEntryError as error:
            if locked:  # now nobody else can have put a new one there
                log.warning("the cached plan of %s is damaged and is built again: %s (%s)", key.model, error, path)
                with contextlib.suppress(OSError):  # the new one replaces it
                    os.unlink(path)
            return None
        except (OSError, CacheError) as error:
            warn_once(self._root, "read", error)
            return None
        with contextlib.suppress(OSError):  # a cache that may only be read serves all the same
            os.utime(path, follow_symlinks=False)
        log.debug("found the plan of %s in the engine cache: %s", key.model, path)
        return plan

    def _turn(self, key: PlanKey, held: _List[FileLock], given_up: threading.Event) -> Plan | None:
        """Wait until this key is ours to build (the lock is in ``held``), or until another has built it.

        Without a lock where there can be none: then the plan may be built twice, which harms nobody.
        """
        path = self._path(_PLANS, key.digest)
        try:
            for folder in (_PLANS, _LOCKS):
                self._folder(folder)
            before = _identity(path)
            said = False
            while not given_up.is_set():
                lock = try_lock(self._path(_LOCKS, key.digest))
                if lock is not None:
                    held.append(lock)
                    self._sweep(_PLANS, key.digest)
                    return self._find(key, locked=True)
                if not said:
                    log.info("the plan of %s is being built already; waiting for it", key.model)
                    said = True
                given_up.wait(_POLL_S)
                if _identity(path) != before:
                    before = _identity(path)
                    found = self._find(key)
                    if found is not None:
                        return found
        except (OSError, CacheError) as error:
            warn_once(self._root, "written", error)
        return None

    def _keep(self, key: PlanKey, built: Built, request: BuildRequest) -> None:
        # What was read more than once may have been two things.
        read_again = built.read_again or request.options.get("calibration") is not None
        if built.model_sha256 != key.model_sha256 or (read_again and not _unchanged(key, request)):
            log.warning("%s changed while it was read; the plan that was built is not kept", key.model)
            return
        if len(built.plan) > self._max_bytes:
            log.info("a plan of %d bytes is not kept: the cache may take %d", len(built.plan), self._max_bytes)
            return
        path = self._path(_PLANS, key.digest)
        try:
            self._folder(_PLANS)
            write_plan(path, key.digest, built.plan, key.model)
            self._shrink(keep=path)
        except (OSError, CacheError) as error:
            warn_once(self._root, "written", error)

    def _kernels(self, plan: Plan, backend: TensorRTBackend, device: int) -> Kernels | None:
        """What a runtime has compiled for a plan before, and where to keep what it will."""
        try:
            key = kernels_key(plan.sha256, backend, device)
        except UncacheableError:
            return None
        content = None
        try:
            if self._is_there(_KERNELS):
                content = read_blob(self._path(_KERNELS, key), key)
        except FileNotFoundError:
            log.debug("nothing was compiled for this plan yet")
        except DamagedEntryError as error:
            log.warning("compiled kernels in the engine cache are damaged and are compiled again: %s", error)
        except (OSError, CacheError) as error:
            warn_once(self._root, "read", error)
            return None
        return Kernels(content, self._root, key, self._path(_KERNELS, key), partial(self._lock_in, _KERNELS))

    async def _timed(self, request: BuildRequest) -> BuildRequest:
        """``request`` with the times that earlier builds have measured, where TensorRT measures."""

        def kept() -> KeptTimings:
            key = timings_key(request.backend, request.device)
            return KeptTimings(
                self._path(_TIMINGS, key), root=self._root, key=key, lock=partial(self._lock_in, _TIMINGS),
                is_there=partial(self._is_there, _TIMINGS),
            )  # fmt: skip

        return await run_shielded(lambda: with_timings(request, kept))

    def _lock_in(self, folder: str, key: str) -> FileLock | None:
        """The lock of what is about to be written there. Raises CacheError, OSError."""
        for name in (folder, _LOCKS):
            self._folder(name)
        lock = try_lock(self._path(_LOCKS, key))
        if lock is not None:
            self._sweep(folder, key)
        return lock

    def _path(self, folder: str, key: str) -> str:
        return os.path.join(self._root, folder, key + _SUFFIXES.get(folder, ".lock"))

    def _is_there(self, *folders: str) -> bool:
        """Raises CacheError, OSError."""
        return trusted_folder(self._root) and all(trusted_folder(os.path.join(self._root, each)) for each in folders)

    def _folder(self, name: str) -> None:
        """Make it if it is not there. Raises CacheError, OSError."""
        trusted_folder(self._root, create=True)
        trusted_folder(os.path.join(self._root, name), create=True)

    def _files(self, *folders: str) -> Iterator[_File]:
        for folder in folders or _SUFFIXES:
            if not self._is_there(folder):
                continue
            with os.scandir(os.path.join(self._root, folder)) as entries:
                for entry in entries:
                    key, dot, suffix = entry.name.partition(".")
                    if not _NAME.fullmatch(key) or dot + suffix != _SUFFIXES[folder]:
                        continue
                    with contextlib.suppress(FileNotFoundError):  # another process removed it
                        status = entry.stat(follow_symlinks=False)
                        if stat.S_ISDIR(status.st_mode):
                            continue  # no process of ours makes one, and it holds no plan
                        yield _File(folder, entry.path, key, status.st_size, status.st_mtime)

    def _shrink(self, keep: str) -> None:
        """Remove what was not used for longest until the rest fits, but not what was just written."""
        files = sorted(self._files(), key=lambda file: file.used_s)
        left = sum(file.size for file in files)
        for file in files:
            if left > self._max_bytes and file.path != keep:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(file.path)
                left -= file.size
        self._remove_leftovers()

    def _sweep(self, folder: str, key: str) -> None:
        """Remove what a process that was killed has left; whoever holds the key's lock is the only one to write."""
        for path, owner in self._temporaries(folder):
            if owner == key:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)

    def _temporaries(self, folder: str) -> _List[tuple[str, str]]:
        """Path and key of files that are not yet, or will never be, entries."""
        with os.scandir(os.path.join(self._root, folder)) as entries:
            named = [(entry.path, _TEMPORARY_NAME.fullmatch(entry.name)) for entry in entries]
        return [(path, name[1]) for path, name in named if name]

    def _removed(self, checked: int, reasons: dict[_File, str]) -> CacheReport:
        gone: dict[str, str] = {}
        freed = 0
        for file, reason in reasons.items():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file.path)
                gone[file.place] = reason
                freed += file.size
        for place, size in self._remove_leftovers():
            gone[place] = "left by a process that was killed"
            freed += size
        self._remove_free_locks()
        return CacheReport(checked, gone, freed)

    def _remove_free_locks(self) -> None:
        """The kernel lets go of a killed process's lock; its empty file stays until somebody wants the same plan."""
        if self._is_there(_LOCKS):
            for name in os.listdir(os.path.join(self._root, _LOCKS)):
                key = name.removesuffix(".lock")
                lock = try_lock(self._path(_LOCKS, key)) if key != name and _NAME.fullmatch(key) else None
                if lock is not None:
                    lock.release()

    def _remove_leftovers(self) -> _List[tuple[str, int]]:
        """What processes that were killed have left, for whatever key: the place and size of each that is gone now."""
        gone: _List[tuple[str, int]] = []
        for folder in _SUFFIXES:
            if not self._is_there(folder, _LOCKS):
                continue
            for path, key in self._temporaries(folder):
                lock = try_lock(self._path(_LOCKS, key))
                if lock is None:
                    continue  # it is being written
                with lock, contextlib.suppress(FileNotFoundError):
                    size = os.lstat(path).st_size
                    os.unlink(path)
                    gone.append((f"{folder}/{os.path.basename(path)}", size))
        return gone

    @contextlib.contextmanager
    def _managing(self, verb: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CacheError(
                f"the engine cache {self._root!r} cannot be {verb}: {error}; "
                "check who owns it and whether it can be written",
                path=self._root,
            ) from error


def cache_of(cache: Any) -> EngineCache | None:
    """What ``open_engine(cache=)`` names.

    Raises:
        CacheError: the folder that was named must not be trusted; of the default one that is a warning.
        InvalidArgumentError: it is none of what can be named.
    """
    if isinstance(cache, EngineCache):
        return cache
    if cache is False:
        return None
    if cache is True:
        try:
            return EngineCache()
        except CacheError as error:
            warn_once(error.path, "trusted", error)
            return None
    return EngineCache(checked_path(cache, "cache", "True, False, an EngineCache or the path of one"))


def _identity(path: str) -> tuple[int, int] | None:
    """Changes when another file takes the name."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_ctime_ns


def _unchanged(key: PlanKey, request: BuildRequest) -> bool:
    try:
        return plan_key(request) == key
    except (TrtxError, UncacheableError):
        return False
