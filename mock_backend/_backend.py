"""MockBackend: TensorRT and a CUDA device that are not there, and behave as if they were."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from trtx_py._errors import BackendUnavailableError, EngineError
from trtx_py._types import BackendInfo, Severity
from trtx_py.backends.protocols import LogSink

from ._builder import MockBuilder
from ._clock import Clock, RealClock
from ._driver import MockDriver
from ._engine import EngineSettings, MockRuntime
from ._faults import Fault, FaultPlan
from ._plan import version_bytes
from ._seam import Ledger, Seam

__all__ = ["MOCK_VERSION", "MockBackend"]

#: Version of the mock's plans; a plan of another version is refused.
MOCK_VERSION = "1.0.0.0"


def _unavailable(text: str, log: tuple[str, ...]) -> BackendUnavailableError:
    return BackendUnavailableError(text, tensorrt_log=log)


class MockBackend:
    """TensorRTBackend without a GPU: real parsing, checking and numbers, a checked device memory, planned faults.

    Each instance has its own devices, memory, faults and counters. Thread-safe.

    Args:
        compute: False gives outputs of zeros, of the right shape, instead of computing them. Outputs whose size depends
            on data are computed all the same. The kernels are native code then: they take no interpreter lock, and
            replays of graphs on an idle stream run inside the launch, if they take no time.
        memory_bytes: memory of each device; beyond it cuMemAlloc reports CUDA_ERROR_OUT_OF_MEMORY.
        faults: planned from the start; more come through ``inject``.
        devices: number of devices, at most 8; 0 makes cuInit report CUDA_ERROR_NO_DEVICE.
        compute_capability: of every device, such as "8.9"; plans for others are refused.
        version: of the mock's plans, up to four dotted numbers.
        clock: where kernel durations, event times and delays are taken from; real time by default.
        operators: "tensorrt" refuses what the parser of tensorrt-rtx does not import; "any" accepts all that ONNX
            Runtime or ONNX's reference evaluator can compute.
        duration_s: time each kernel takes on ``clock``, in seconds.
        profile_sharing: None follows BuildOptions.profile_sharing, which is True by default; False or True overrides
            it, so that a test can have plans with 8.6's rule from code that never mentions it.
        threads: intra-op threads of ONNX Runtime.
        flavour: TensorRT family member that plans carry; "mock" unless this stands in for a joined backend.
    """

    def __init__(
        self,
        *,
        compute: bool = True,
        memory_bytes: int = 8 << 30,
        faults: Iterable[Fault] = (),
        devices: int = 1,
        compute_capability: str = "8.9",
        version: str = MOCK_VERSION,
        clock: Clock | None = None,
        operators: str = "tensorrt",
        duration_s: float = 0.0,
        profile_sharing: bool | None = None,
        threads: int = 1,
        flavour: str = "mock",
    ) -> None:
        if operators not in ("tensorrt", "any"):
            raise ValueError(f"operators is {operators!r}; expected 'tensorrt' or 'any'")
        if not re.fullmatch(r"\d{1,2}\.\d", compute_capability):
            raise ValueError(f"compute_capability is {compute_capability!r}; expected a form such as '8.9'")
        version_bytes(version)
        self._clock: Clock = clock or RealClock()
        self._driver = MockDriver(
            devices=devices, memory_bytes=memory_bytes, compute_capability=compute_capability, clock=self._clock,
            instant=not compute,
        )  # fmt: skip
        self._faults = FaultPlan(self._clock, self._driver.mock, faults)
        self._ledger = Ledger()
        self._capability = compute_capability
        self._operators = operators
        self._profile_sharing = profile_sharing
        self._settings = EngineSettings(compute=compute, duration_s=duration_s, threads=threads)
        self._info = BackendInfo(flavour, flavour, version, can_build=True, can_run=devices > 0, strongly_typed=True)

    @property
    def info(self) -> BackendInfo:
        return self._info

    def plan_settings(self) -> dict[str, object]:
        """What its plans depend on besides ``info``, for the engine cache."""
        return {
            "compute_capability": self._capability,
            "operators": self._operators,
            "profile_sharing": self._profile_sharing,
        }

    @property
    def driver(self) -> MockDriver:
        return self._driver

    @property
    def clock(self) -> Clock:
        """The clock that everything in this backend goes by."""
        return self._clock

    @property
    def compute_capability(self) -> str:
        """Of every device of this backend."""
        return self._capability

    @property
    def calls(self) -> Counter[str]:
        """How often each seam method was called, and "execute" for kernels; a copy."""
        return self._faults.calls

    def inject(self, fault: Fault) -> None:
        """Plan a fault now; its ``nth`` counts from the next call."""
        self._faults.add(fault)

    def clear_faults(self) -> None:
        """Forget all planned faults. A context that was lost stays lost."""
        self._faults.clear()

    def create_builder(self, log: LogSink) -> MockBuilder:
        seam = self._seam(log)
        seam.enter("create_builder", _unavailable)
        return MockBuilder(
            seam, flavour=self._info.flavour, version=self._info.version, compute_capability=self._capability,
            operators=self._operators, profile_sharing=self._profile_sharing,
        )  # fmt: skip

    def create_runtime(
        self,
        log: LogSink,
        *,
        device: int,
        lean_library: str | None,
        allow_host_code: bool,
        runtime_cache: bytes | None = None,
        info: BackendInfo | None = None,
    ) -> MockRuntime:
        """``allow_host_code`` has no meaning here: mock plans carry no code. A lean library is refused.

        Args:
            runtime_cache: there is no such cache here; one that is given is a logged warning.
            info: whose flavour and version plans must have, if not this backend's own; for a joined backend.
        """
        info = info or self._info
        seam = self._seam(log)
        seam.enter("create_runtime", lambda text, lines: EngineError(text, tensorrt_log=lines))
        if lean_library is not None:
            raise BackendUnavailableError(
                f"the mock has no lean runtime and cannot load {lean_library!r}; pass lean_library=None"
            )
        if runtime_cache is not None:
            log(Severity.WARNING, "the mock compiles no kernels and has no runtime cache; the one given is not used")
        current = self._driver.require_healthy("createInferRuntime")
        if current != device:
            raise EngineError(f"a runtime for device {device} was asked for while device {current} is current")
        return MockRuntime(
            seam, flavour=info.flavour, version=info.version, compute_capability=self._capability,
            device=device, settings=self._settings,
        )  # fmt: skip

    def leaks(self) -> list[str]:
        """What is still open or allocated, each with the place where it was made."""
        return self._ledger.leaks() + self._driver.leaks()

    def damage(self) -> list[str]:
        """What was done that ends or corrupts a real process: overwritten red zones, wrong orders of destruction."""
        return self._ledger.damage() + self._driver.damage()

    def assert_clean(self) -> None:
        """Raise AssertionError naming every leak and every damage; for the end of a test."""
        problems = [f"leak: {text}" for text in self.leaks()] + [f"damage: {text}" for text in self.damage()]
        if problems:
            raise AssertionError("\n".join([f"the mock backend found {len(problems)} problems:", *problems]))

    def close(self) -> None:
        """End the streams' threads once their work is done. The backend cannot be used afterwards."""
        self._driver.shutdown()

    def _seam(self, log: LogSink) -> Seam:
        return Seam(self._driver, self._faults, log, self._ledger)
