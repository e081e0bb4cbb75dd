"""Lanes that get into each other's way on a plan that lets one context at a time use a profile."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

import trtx_py as trtx
from tests.unit.serving import PATIENCE_S
from trtx_py._lane import Lanes
from trtx_py._request import InferenceResult, Request

OTHERS = 2  # asks for whichever profile the lane itself does not hold


class Exclusive:
    """Stands for Execution: of two profiles it takes one at its first run; the two lanes meet at each barrier once."""

    contexts = 1

    def __init__(self, holders: dict[int, Exclusive], barriers: list[threading.Barrier]) -> None:
        self._holders, self._barriers = holders, list(barriers)
        self._mine = -1

    @property
    def holds_profile(self) -> bool:
        return self in self._holders.values()

    def wants_capture(self, request: Request) -> None:
        """Nothing is captured here."""

    def step_back(self) -> None:
        del self._holders[self._mine]

    def run(self, request: Request) -> InferenceResult:
        (wanted,) = request.profiles
        if self._mine < 0:
            self._mine = wanted
            self._holders[wanted] = self
            self._barriers.pop().wait(PATIENCE_S)
        elif 1 - self._mine in self._holders:
            self._barriers.pop().wait(PATIENCE_S)
            raise trtx.BorrowedError("the other lane has it")
        return InferenceResult({"y": np.array(wanted)}, 0.0, 0.0, 0.0)


def test_two_lanes_refused_at_the_same_time() -> None:
    """One gives up its profile and ends; the other finds that out and tries again instead of failing."""
    holders: dict[int, Exclusive] = {}
    barriers = [threading.Barrier(2), threading.Barrier(2)]

    def make() -> Any:
        return Exclusive(holders, barriers), "a lane"

    lanes = Lanes("test", 2, make)
    for profiles in ((0, 1), (OTHERS, OTHERS)):
        requests = [Request({}, [profile], timed=False) for profile in profiles]
        for request in requests:
            lanes.submit(request)
        for request, profile in zip(requests, profiles, strict=True):
            assert int(request.wait_sync(PATIENCE_S).outputs["y"]) == profile
    assert lanes.load() == (0, 0, 1, 1)
    lanes.drain()
    assert (lanes.counts.completed, lanes.counts.failed) == (4, 0)
