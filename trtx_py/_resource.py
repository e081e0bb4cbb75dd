"""Ownership, checked at run time: who owns what, what may be closed when, and what is still open.

Each owned object has a Handle, a record that outlives the object itself. It knows its parent, its children, who borrows
it, where it was made, how much memory it holds and how to release what it stands for. The object (a Resource) keeps its
parent object alive, so an owner is never collected before what it owns; when a whole subtree becomes garbage at once,
the collector may visit it in any order, and it is the handles that restore the right one.

Releasing never happens inside the garbage collector: a collected object only puts its handle on a queue, and one thread
of this module releases it, children first; ``live_objects()`` waits for that thread.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import enum
import functools
import itertools
import logging
import os
import queue
import sys
import threading
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Literal, NoReturn, TypeVar

from ._aio import run_shielded
from ._errors import BorrowedError, ClosedError
from ._origin import caller

_log = logging.getLogger("trtx_py")
_R = TypeVar("_R", bound="Resource")


class State(enum.Enum):
    OPENING = "opening"
    OPEN = "open"
    CLOSING = "closing"
    CLOSED = "closed"


class _Process:
    """What a forked child must start afresh: the lock, the graveyard and the number that marks its own objects."""

    def __init__(self) -> None:
        self.epoch = 0
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.graveyard: queue.SimpleQueue[Handle | threading.Event] = queue.SimpleQueue()
        self.reaper: threading.Thread | None = None
        self.buried = 0
        self.roots: dict[int, Handle] = {}
        self.ending = False

    def reset_in_child(self) -> None:
        # The parent's objects must never be destroyed here: their destructors would call a driver that does not work
        # after a fork. One reference too many keeps all of them, and so their native parts, for the child's whole life.
        orphans = list(self.roots.values())
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(orphans))
        self.epoch += 1
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.graveyard = queue.SimpleQueue()
        self.reaper = None
        self.roots = {}
        self.ending = False


_process = _Process()
_serials: defaultdict[str, Iterator[int]] = defaultdict(lambda: itertools.count(1))
_keys = itertools.count(1)


class Handle:
    """The part of an owned object that ownership is about; it outlives the object when that is garbage collected."""

    def __init__(self, kind: str, parent: Handle | None, *, name: str = "", internal: bool = False) -> None:
        self.key = next(_keys)
        self.kind = kind
        self.name = name
        self.serial = next(_serials[kind])
        self.parent = parent
        self.internal = internal  # made by its owner for itself: no obstacle to closing the owner while it is idle
        self.made_at = caller()
        self.epoch = _process.epoch
        self.state = State.OPENING
        self.children: dict[int, Handle] = {}
        self.loans: dict[int, tuple[str, Handle | None]] = {}
        self.host_bytes = 0
        self.device_bytes = 0
        self.release: Callable[[], None] | None = None
        self.stop: Callable[[], None] | None = None
        self.drain: Callable[[], None] | None = None
        self.busy: Callable[[], str | None] | None = None
        self.keeps: object = None  # foreign things that must live as long as what this stands for
        self.abandoned = False
        self.settling = False
        self.claimed = False
        self.closer: int | None = None

    def __str__(self) -> str:
        label = f"{self.kind}#{self.serial}"
        return f"{label} {self.name!r}" if self.name else label

    def describe(self) -> str:
        return f"{self} (made at {self.made_at})"

    def link(self) -> None:
        _ensure_reaper()  # first: where no thread can be started any more, nothing must be registered either
        with _process.lock:
            if self.parent is not None:
                if self.parent.state is not State.OPENING:  # an owner makes internal children while it is being made
                    self.parent.require_open()
                self.parent.children[self.key] = self
            else:
                _process.roots[self.key] = self

    def opened(self) -> None:
        """The object is complete. Raises ClosedError if its owner began to close while it was being made."""
        with _process.changed:
            owner = self.parent
            if owner is not None and owner.state not in (State.OPENING, State.OPEN):
                raise ClosedError(f"{owner} was closed while {self} was being made")
            self.state = State.OPEN
            _process.changed.notify_all()

    def mark_closing(self, closer: int | None = None) -> None:
        """Under the lock. What is still being made below is not marked: ``opened()`` will find that it is too late."""
        for node in self.subtree():
            if node is self or node.state is State.OPEN:
                node.state = State.CLOSING
                node.closer = closer
        _process.changed.notify_all()

    def unlink(self) -> None:
        with _process.lock:
            self.state = State.CLOSED
            siblings = _process.roots if self.parent is None else self.parent.children
            siblings.pop(self.key, None)
            _process.changed.notify_all()

    def require_open(self) -> None:
        """Raise ClosedError unless the object can be used."""
        self.require_process()
        if self.state is not State.OPEN:
            word = "closed" if self.state is State.CLOSED else self.state.value
            raise ClosedError(f"{self} is {word}; it was made at {self.made_at}")

    def require_process(self) -> None:
        """Raise ClosedError in a forked child, where even a lock may be held by a thread that is not there."""
        if self.epoch != _process.epoch:
            raise ClosedError(f"{self} belongs to the process that this one was forked from; open another one here")

    def is_within(self, ancestor: Handle) -> bool:
        node: Handle | None = self
        while node is not None:
            if node is ancestor:
                return True
            node = node.parent
        return False

    def blockers(self, root: Handle) -> list[str]:
        """What stands against a synchronous close of ``root``, found at and below this handle."""
        found = [what for what, borrower in self.loans.values() if borrower is None or not borrower.is_within(root)]
        if self is not root and not self.internal:
            return [self.describe()]
        reason = self.busy() if self.busy is not None else None
        if reason is not None:
            found.append(f"{self}: {reason}")
        for child in self.children.values():
            found.extend(child.blockers(root))
        return found

    def lasting_loans(self, root: Handle) -> list[str]:
        """Loans to objects outside ``root``, at and below this handle: no waiting ends them."""
        found = [what for what, who in self.loans.values() if who is not None and not who.is_within(root)]
        for child in self.children.values():
            found.extend(child.lasting_loans(root))
        return found

    def subtree(self) -> list[Handle]:
        """This handle and everything below, in the order to release: children first, the youngest first."""
        nodes: list[Handle] = []
        for child in reversed(list(self.children.values())):
            nodes.extend(child.subtree())
        nodes.append(self)
        return nodes

    def lend(self, what: str, borrower: Handle | None = None, keep: object = None) -> Loan:
        """Keep the object open until the loan ends: to an operation that will end, or to another object.

        A loan to another object must ``keep`` the lent one alive, or the garbage collector would find it open.
        """
        with _process.lock:
            self.require_open()
            loan = Loan(self, keep)
            self.loans[loan.key] = (what, borrower)
        return loan


class Loan:
    """Keeps an object open. Ending it twice is harmless."""

    def __init__(self, handle: Handle, keep: object = None) -> None:
        self.key = next(_keys)
        self._handle = handle
        self._keep = keep

    def end(self) -> None:
        with _process.changed:
            self._handle.loans.pop(self.key, None)
            _process.changed.notify_all()
        self._keep = None
        if self._handle.abandoned:
            _process.graveyard.put(self._handle)  # collected while it was lent: it can go now

    def __enter__(self) -> Loan:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.end()


def _settle(handle: Handle, step: Literal["stop", "drain"]) -> None:
    """Stop or drain one handle, unless another thread, closing a subtree that overlaps, has done so or releases it.

    While that one is at it, this one waits: it may be about to release what is still in use, such as lanes, which are
    younger than a batcher. A loan keeps that other thread from the release until this one is done with it.
    """
    with _process.changed:
        while handle.settling:
            _process.changed.wait()
        action: Callable[[], None] | None = getattr(handle, step)
        if action is None or handle.claimed:
            return
        handle.settling = True
        loan = next(_keys)
        handle.loans[loan] = ("closing", None)
    try:
        action()
        setattr(handle, step, None)
    finally:
        with _process.changed:
            handle.settling = False
            handle.loans.pop(loan)
            _process.changed.notify_all()


def _claim(handle: Handle) -> bool:
    """True if this thread is to release ``handle``; False once another one, closing a subtree that overlaps, has."""
    with _process.changed:
        while any(borrower is None for _, borrower in handle.loans.values()):
            _process.changed.wait()
        if not handle.claimed:
            handle.claimed = True
            return True
        while handle.state is not State.CLOSED:
            _process.changed.wait()
        return False


def _release(handle: Handle) -> None:
    """Release one handle whose children are gone; whatever happens, it is closed afterwards."""
    try:
        if handle.release is not None:
            handle.release()
    finally:
        handle.unlink()
        handle.release = handle.stop = handle.drain = handle.busy = handle.keeps = None
    parent = handle.parent
    if parent is not None and parent.abandoned:
        _process.graveyard.put(parent)


def _close_subtree(root: Handle) -> None:
    """Drain, then release everything below ``root`` and ``root`` itself. All of it has been marked as closing."""
    with _process.changed:
        # Another thread may be making a child at this moment: it fails, but only once native code has returned to it.
        while any(node.state is State.OPENING for node in root.subtree()):
            _process.changed.wait()
        nodes = root.subtree()
    errors: list[Exception] = []

    def attempt(action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever one of them raises, the others must still be released
            errors.append(error)

    for node in nodes:
        attempt(functools.partial(_settle, node, "stop"))
    for node in nodes:
        attempt(functools.partial(_settle, node, "drain"))
    for node in nodes:
        if _claim(node):
            attempt(functools.partial(_release, node))
    if errors:
        for other in errors[1:]:
            _log.error("while closing %s: %s", root, other)
        raise errors[0]


def _bury(handle: Handle) -> None:
    """Release a handle whose object was garbage collected, once nothing below it is left and nobody borrows it."""
    with _process.lock:
        handle.abandoned = True
        if handle.state is not State.OPEN or handle.epoch != _process.epoch:
            return
        if handle.internal and handle.parent is not None:
            return  # its owner needs it to the end and releases it then
        if any(not child.internal for child in handle.children.values()) or handle.lasting_loans(handle):
            return  # the last child to go, or the end of the loan, puts this handle back on the queue
        handle.mark_closing()
    try:
        _close_subtree(handle)
    except Exception:
        _log.exception("releasing %s after it was garbage collected failed", handle)


def _reap_forever(process: _Process, graveyard: queue.SimpleQueue[Handle | threading.Event]) -> None:
    while True:
        item = graveyard.get()
        if isinstance(item, threading.Event):
            item.set()
        else:
            _bury(item)
            process.buried += 1


def _ensure_reaper() -> None:
    if _process.reaper is None:
        with _process.lock:
            if _process.reaper is None:
                reaper = threading.Thread(
                    target=_reap_forever, args=(_process, _process.graveyard), name="trtx_py-reaper", daemon=True
                )
                reaper.start()
                _process.reaper = reaper


def _reap_now() -> None:
    """Wait until the reaper has released everything that was collected before this call."""
    if _process.reaper is None or _process.reaper is threading.current_thread():
        return
    before = -1
    while before != _process.buried:  # a burial can put the owner on the queue: until a round finds nothing
        before = _process.buried
        reached = threading.Event()
        _process.graveyard.put(reached)
        reached.wait()


@atexit.register
def _release_everything() -> None:
    """At exit, before the interpreter takes modules apart: the destructors of TensorRT still find a working driver."""
    _process.ending = True
    _reap_now()
    pending = list(reversed(list(_process.roots.values())))
    while pending:
        # What is lent to an object of another tree comes after that tree.
        root = next((root for root in pending if not root.lasting_loans(root)), pending[0])
        pending.remove(root)
        with _process.lock:
            state = root.state
            if state is State.OPEN:
                root.mark_closing()
        try:
            if state is State.OPEN:
                _close_subtree(root)
            elif state is State.CLOSING:
                _wait_closed(root)  # another thread is at it: the interpreter must not go away under its feet
        except Exception:
            _log.exception("releasing %s at exit failed", root)
    _process.ending = False


def process_ends() -> bool:
    """Everything is being released: whatever is to act in an event loop that does not run now never will."""
    return _process.ending


os.register_at_fork(after_in_child=_process.reset_in_child)


@contextlib.contextmanager
def opening(handle: Handle) -> Iterator[None]:
    """Register first, construct inside, and leave nothing behind if that fails."""
    handle.link()
    try:
        yield
        handle.opened()
    except BaseException as error:
        with _process.lock:
            handle.mark_closing()
        try:
            _close_subtree(handle)
        except Exception as second:
            _second_failure(handle, error, second)
        raise


class Resource:
    """An object that must be closed: a synchronous and an asynchronous context manager.

    ``close()`` refuses with BorrowedError while something open depends on the object. ``aclose()`` closes everything
    below it first, after draining what is in flight. Both may be called any number of times.
    """

    _handle: Handle
    _parent: Resource | None = None

    @contextlib.contextmanager
    def _opening(
        self, parent: Resource | None, *, name: str = "", internal: bool = False, kind: str | None = None
    ) -> Iterator[Handle]:
        """Register first, construct inside, and leave nothing behind if that fails."""
        handle = Handle(
            kind or type(self).__name__, parent._handle if parent is not None else None, name=name, internal=internal
        )
        with opening(handle):
            self._handle, self._parent = handle, parent
            yield handle

    @classmethod
    def _refuse_construction(cls, factory: str) -> NoReturn:
        raise TypeError(f"{cls.__name__} objects are made by their owner: use {factory}")

    @property
    def closed(self) -> bool:
        """True once the object is closed or closing, and in a forked child."""
        return self._handle.state is not State.OPEN or self._handle.epoch != _process.epoch

    def close(self) -> None:
        """Release what the object stands for. Idempotent.

        Raises:
            BorrowedError: something open still depends on it, or work is in flight; names each. Nothing was closed.
        """
        handle = self._handle
        here = threading.get_ident()
        with _process.changed:
            if handle.epoch != _process.epoch or handle.state is State.CLOSED:
                return
            if handle.state is State.CLOSING:
                if handle.closer is None:
                    raise BorrowedError(f"{handle} is being closed by aclose() at this moment; await that call")
                if handle.closer != here:  # another thread's close(): it has nothing to wait for and is soon done
                    _wait_closed(handle)
                return
            self._refuse_if_internal()
            blockers = handle.blockers(handle)
            if blockers:
                raise BorrowedError(
                    f"{handle} cannot be closed while it is in use by:\n  "
                    + "\n  ".join(blockers)
                    + "\nClose these first, or await aclose(), which closes what it owns in order.",
                    borrowers=blockers,
                )
            handle.mark_closing(closer=here)
        try:
            _close_subtree(handle)
        except Exception:
            raise
        except BaseException:  # Ctrl-C: this call ends, and the closing goes on to its end
            going_on = threading.Thread(target=_close_subtree, args=(handle,), name="trtx_py-closing", daemon=True)
            going_on.start()
            handle.closer = going_on.ident
            raise

    async def aclose(self) -> None:
        """Close the object and everything below it: no new work, drained, children first. Idempotent.

        Raises:
            BorrowedError: an object outside this subtree borrows something in it; nothing was closed.
        Cancellation: the closing itself goes on to its end in any case; the cancellation is delivered after it.
        """
        handle = self._handle
        with _process.lock:
            if handle.epoch != _process.epoch or handle.state is State.CLOSED:
                return
            if handle.state is State.CLOSING:
                mine = False
            else:
                mine = True
                self._refuse_if_internal()
                loans = handle.lasting_loans(handle)
                if loans:
                    raise BorrowedError(
                        f"{handle} cannot be closed while it is lent to:\n  " + "\n  ".join(loans), borrowers=loans
                    )
                handle.mark_closing()
        await run_shielded((lambda: _close_subtree(handle)) if mine else (lambda: _wait_closed(handle)))

    def _refuse_if_internal(self) -> None:
        handle = self._handle
        if handle.internal and handle.parent is not None:
            raise BorrowedError(
                f"{handle} was made by {handle.parent} for itself and is closed together with it; close that",
                borrowers=[handle.parent.describe()],
            )

    def __enter__(self: _R) -> _R:
        self._handle.require_open()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if exc is None:
            self.close()
            return
        try:
            self.close()
        except Exception as error:
            _second_failure(self._handle, exc, error)

    async def __aenter__(self: _R) -> _R:
        self._handle.require_open()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if exc is None:
            await self.aclose()
            return
        try:
            await self.aclose()
        except Exception as error:
            _second_failure(self._handle, exc, error)

    def __repr__(self) -> str:
        return f"<{self._handle} {self._handle.state.value}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__} objects cannot be pickled: they stand for something in this process")

    def __del__(self) -> None:
        handle: Handle | None = self.__dict__.get("_handle")
        if handle is None or sys.is_finalizing():
            return
        if handle.state is State.OPEN and handle.epoch == _process.epoch:
            try:
                if not handle.internal:
                    warnings.warn(f"unclosed {handle.describe()}", ResourceWarning, source=self, stacklevel=2)
            finally:  # where warnings are errors, that error goes to sys.unraisablehook, and the release goes on
                _process.graveyard.put(handle)


def _wait_closed(handle: Handle) -> None:
    with _process.changed:
        while handle.state is not State.CLOSED:
            _process.changed.wait()


def _second_failure(handle: Handle, first: BaseException, second: Exception) -> None:
    """The body's own exception goes on; that closing failed too is noted on it and logged."""
    text = f"closing {handle} failed too: {second}"
    add_note: Any = getattr(first, "add_note", None)
    if add_note is not None:
        add_note(text)
    _log.warning("%s", text)
