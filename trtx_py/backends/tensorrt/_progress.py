"""Watches a build, and stops it when asked to."""

from __future__ import annotations

from typing import Any

from ..protocols import BuildProgress
from ._vendor import Vendor


class ProgressState:
    """What the callbacks of one build have seen. Callbacks come from threads of TensorRT's own choice.

    Attributes:
        aborted: the progress object asked for the build to stop.
        failure: the first exception that it raised; the build is stopped then too.
    """

    def __init__(self, progress: BuildProgress) -> None:
        self._progress = progress
        self.aborted = False
        self.failure: BaseException | None = None

    def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
        """Source: nvinfer1::IProgressMonitor::phaseStart"""
        if self.failure is None:
            try:
                self._progress.phase_start(phase, parent, steps)
            except BaseException as error:  # must not unwind through C++; raised again after the build
                self.failure = error

    def step_complete(self, phase: str, step: int) -> bool:
        """Source: nvinfer1::IProgressMonitor::stepComplete"""
        if self.failure is None and not self.aborted:
            try:
                self.aborted = not self._progress.step_complete(phase, step)
            except BaseException as error:  # as above
                self.failure = error
        return self.failure is None and not self.aborted

    def phase_finish(self, phase: str) -> None:
        """Source: nvinfer1::IProgressMonitor::phaseFinish"""
        if self.failure is None:
            try:
                self._progress.phase_finish(phase)
            except BaseException as error:  # as above
                self.failure = error


def make_monitor(vendor: Vendor, state: ProgressState) -> Any:
    """An IProgressMonitor of the vendor's that calls ``state``; None if this version has none (8.6)."""
    if not vendor.facts.progress_monitor or not hasattr(vendor.module, "IProgressMonitor"):
        return None
    base: Any = vendor.module.IProgressMonitor

    class Monitor(base):  # type: ignore[misc]  # the base is known only at run time
        def __init__(self) -> None:
            base.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            state.phase_start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return state.step_complete(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            state.phase_finish(phase_name)

    return Monitor()
