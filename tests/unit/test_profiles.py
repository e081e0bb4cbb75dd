"""The ledger of profiles on a plan that lets one context at a time use a profile."""

from __future__ import annotations

import threading
from typing import Any

import pytest

import trtx_py as trtx
from trtx_py._profiles import ProfileLedger
from trtx_py._resource import Handle

PATIENCE_S = 30.0


class OneHolder:
    """Stands for TensorRT: gives profile 0 to the first context that is made, and to no other while that one lives."""

    def __init__(self) -> None:
        self.holder: Context | None = None


class Context:
    def __init__(self, engine: OneHolder) -> None:
        self._engine = engine
        if engine.holder is None:
            engine.holder = self

    @property
    def active_profile(self) -> int:
        return 0 if self._engine.holder is self else -1

    def set_profile(self, index: int, stream: int) -> None:
        if self._engine.holder not in (None, self):
            raise trtx.EngineError("profile 0 has been chosen by another context")
        self._engine.holder = self


def test_a_context_that_is_being_made_counts_as_holder() -> None:
    """TensorRT gives the profile inside the creation; whoever asks at that moment is told who has it."""
    engine, ledger = OneHolder(), ProfileLedger(1)
    first = Context(engine)
    second: Any = Context(engine)
    ledger.exclusive = True
    engine.holder = None
    made, asked, outcome = threading.Event(), threading.Event(), []
    maker, other = Handle("Lane", None, name="maker"), Handle("Lane", None, name="other")

    def make() -> Any:
        engine.holder = first  # TensorRT's part is done, ours is not
        made.set()
        assert not asked.wait(0.05)  # the other one must not get an answer in between
        return first

    def ask() -> None:
        assert made.wait(PATIENCE_S)
        try:
            ledger.select(other, second, [0], 0)
        except trtx.TrtxError as error:
            outcome.append(error)
        asked.set()

    thread = threading.Thread(target=ask)
    thread.start()
    ledger.create(maker, make)
    thread.join(PATIENCE_S)
    (error,) = outcome
    assert isinstance(error, trtx.BorrowedError)
    assert "maker" in error.borrowers[0]


def test_the_profile_is_free_again_when_its_holder_left() -> None:
    engine, ledger = OneHolder(), ProfileLedger(1)
    first_handle, second_handle = Handle("Lane", None), Handle("Lane", None)
    first: Any = ledger.create(first_handle, lambda: Context(engine))  # type: ignore[arg-type, return-value]
    second: Any = ledger.create(second_handle, lambda: Context(engine))  # type: ignore[arg-type, return-value]
    assert (first.active_profile, second.active_profile, ledger.exclusive) == (0, -1, True)
    assert not ledger.has_free_profile()
    with pytest.raises(trtx.BorrowedError):
        ledger.select(second_handle, second, [0], 0)
    engine.holder = None
    ledger.left(first_handle)
    assert ledger.select(second_handle, second, [0], 0)
    assert second.active_profile == 0
