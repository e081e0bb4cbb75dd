"""What every section on the GPU works with: kit, bindings, C loops, event loops, one runtime of ours."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trtx_py as trtx
from tests.gpu.kit import BACKEND, Kit, load_kit

from .bare import BareRuntime
from .checks import Contender
from .floor import Floor
from .loops import Loops
from .ours import Engines
from .samples import Samples
from .workloads import BATCHED, CAPI, LARGE, LONE, WORKLOADS, Workload


class SetupError(RuntimeError):
    """The machine is not set up for these benchmarks."""


@dataclass(frozen=True)
class Settings:
    """How long things take.

    Attributes:
        quick: fewer samples, fewer engines where several show the same.
        check_only: outputs are compared once, nothing is timed.
        scale: multiplies all counts.
    """

    quick: bool = False
    check_only: bool = False
    scale: float = 1.0

    def rounds(self, workload: Workload) -> tuple[int, int]:
        """Rounds, and samples in each."""
        if self.quick:
            rounds, samples = (8, 20) if workload.heavy else (10, 60)
        else:
            rounds, samples = (20, 200) if workload.small else (20, 100)
        return max(3, round(rounds * min(1, self.scale * 4))), max(5, round(samples * self.scale))

    def count(self, full: int, quick: int) -> int:
        """Of repetitions in a section."""
        return max(3, round((quick if self.quick else full) * self.scale))


class Rig:
    """Made once for a run on the GPU."""

    workloads: tuple[Workload, ...] = WORKLOADS
    large: tuple[Workload, ...] = LARGE
    capi: tuple[Workload, ...] = CAPI
    batched: tuple[Workload, ...] = BATCHED
    lone: tuple[Workload, ...] = LONE
    loaded: Workload = Workload("resnet50.fp16.vcx", (1,))
    parallel: Workload = Workload("resnet50.fp16.vcx", (64,), heavy=True)
    measured_memory: tuple[Workload, ...] = (
        Workload("resnet50.fp16.vcx", (32,)),
        Workload("bert_small.fp16.vcx", (8, 128)),
    )
    torch: tuple[Workload, ...] = (
        Workload("resnet50.fp16.vcx", (1,)),
        Workload("resnet50.fp16.vcx", (32,), heavy=True),
    )
    #: For the processes that measure memory.
    child_arguments: tuple[str, ...] = ()

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        missing = [name for name in ("TRTX_GPU_KIT", "TRTX_LEAN_LIBRARY") if not os.environ.get(name)]
        if missing:
            raise SetupError(f"{', '.join(missing)} not set: source setup.sh of the GPU kit, or run with --mock")
        kit = load_kit()
        if kit is None:
            raise SetupError(f"no cases.json in TRTX_GPU_KIT={os.environ['TRTX_GPU_KIT']}; expected the kit's folder")
        self.kit: Kit = kit
        self.lean_library = os.environ["TRTX_LEAN_LIBRARY"]
        self.loops = Loops()
        self.runtime = self.open_runtime()
        self.bare = BareRuntime(self.lean_library)
        self.floor = Floor()

    def open_runtime(self) -> trtx.Runtime:
        """A runtime of ours for the kit's plans."""
        return trtx.Runtime(backend=BACKEND, lean_library=self.lean_library)

    def pool_options(self) -> dict[str, Any]:
        """What opens the kit's plans on several devices."""
        return {"backend": BACKEND, "lean_library": self.lean_library}

    def plan_bytes(self, engine: str) -> bytes:
        """For the bare runtime."""
        return Path(self.kit.folder, "engines", f"{engine}.engine").read_bytes()

    def plan(self, engine: str) -> Any:
        """For ours."""
        return self.plan_bytes(engine)

    @contextlib.contextmanager
    def engines(self, engine: str) -> Iterator[Engines]:
        """Engines of ours for one plan."""
        engines = Engines(self.runtime, self.plan(engine), self.loops)
        try:
            yield engines
        finally:
            engines.close()

    def close(self) -> None:
        self.runtime.close()
        self.loops.close()


def interleave(contenders: list[Contender], rounds: int, count: int) -> dict[str, Samples]:
    """Rounds A B C, B C A, C A B, ...: drift meets all alike, and nobody always follows the same one."""
    results = {each.name: Samples() for each in contenders}
    if len(results) != len(contenders):
        raise ValueError(f"contenders share a name: {[each.name for each in contenders]}")
    for each in contenders:  # caches, clocks and averages of expected times
        each.round(max(3, count // 4))
    for number in range(rounds):
        turn = number % len(contenders)
        for each in contenders[turn:] + contenders[:turn]:
            results[each.name].add(each.round(count))
    return results


def wall_clock() -> float:
    """Seconds, for what sections took."""
    return time.perf_counter()
