"""What is to be measured: contenders, the load on them, and how long."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from .._arguments import checked_int
from .._errors import InvalidArgumentError
from .._plan import Plan
from .._types import Array
from ..backends.protocols import TensorRTBackend
from ._load import ClosedLoop, Load, OpenLoop
from ._stats import checked_confidence
from ._warmup import WarmUp, positive

#: How a contender runs a request; see Contender.
Kind = Literal[
    "engine", "slot", "batcher", "sync", "bare", "to_thread", "onnxruntime", "onnxruntime_cuda", "torch", "call"
]
KINDS: tuple[str, ...] = get_args(Kind)
#: Kinds that need an engine of trtx_py.
WITH_ENGINE = frozenset({"engine", "slot", "batcher", "sync", "bare", "to_thread"})
#: Kinds that share one with others of the same options: they hold no slot and no optimization profile of it.
SHARING = frozenset({"engine", "sync"})

Source = Plan | bytes | str | os.PathLike[str]
#: What a contender of kind "call" is: awaited with host arrays by input name, gives arrays by output name.
Call = Callable[[Mapping[str, Array]], Awaitable[Mapping[str, Array]]]
Profiles = Sequence[Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]]


@dataclass(frozen=True)
class Contender:
    """One way of running requests.

    Attributes:
        name: unique in its run; results of two runs are compared by it.
        kind: "engine" (``await engine.infer``), "slot" (inputs written into pinned memory, ``await slot.infer``),
            "batcher" (``await batcher.infer``), "sync" (``engine.infer_sync`` in threads), "bare" (copies,
            ``execute_async_v3`` and a stream synchronize in a Python loop: TensorRT with no serving code),
            "to_thread" (``await asyncio.to_thread`` of the bare loop), "onnxruntime" and "onnxruntime_cuda" (the FP32
            ONNX model), "torch" (``module``), "call" (``call``).
        batch: rows of one request: the first axis of every input that is dynamic there.
        precision: of the build, as for ``open_engine``; None keeps the model's own.
        options: of ``open_engine`` for this contender alone: lanes, cuda_graphs, completion, calibration, ...
        batcher: arguments of ``DynamicBatcher``, for kind "batcher".
        load: None uses that of the spec.
        module: for kind "torch": an ``nn.Module``, or the path of a ``.pt2`` (torch.export) or TorchScript file.
            PyTorch cannot load ONNX, so without one it is reported as not available.
        call: for kind "call": an async function of yours. It must return numpy arrays that no later call overwrites.
        tolerance: relative error of the outputs that is accepted; None takes the spec's, else what is usual for
            ``precision``.
        source: another plan or model for this contender's engine, such as the same network in another precision: with
            the same inputs and outputs. None takes the spec's.
        versus: name of the contender that it is compared with; None takes the spec's baseline, if that has the same
            batch and load.
    """

    name: str
    kind: Kind = "engine"
    batch: int = 1
    precision: str | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    batcher: Mapping[str, object] = field(default_factory=dict)
    load: Load | None = None
    module: object = None
    call: Call | None = None
    tolerance: float | None = None
    versus: str | None = None
    source: Source | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        name: Any = self.name
        if not isinstance(name, str) or not name.strip():
            raise InvalidArgumentError(f"a contender's name is {self.name!r}; expected a text")
        who = f"contender {self.name!r}"
        if self.kind not in KINDS:
            raise InvalidArgumentError(f"{who} has the kind {self.kind!r}; expected one of {', '.join(KINDS)}")
        checked_int(self.batch, f"{who}: batch", minimum=1)
        for option in ("options", "batcher"):
            _mapping(getattr(self, option), f"{who}: {option}")
        if self.load is not None and not isinstance(self.load, (ClosedLoop, OpenLoop)):
            raise InvalidArgumentError(f"{who}: load is {self.load!r}; expected a ClosedLoop, an OpenLoop or None")
        if self.tolerance is not None:
            positive(self.tolerance, f"{who}: tolerance")
        if (self.kind == "call") != (self.call is not None) or (self.call is not None and not callable(self.call)):
            raise InvalidArgumentError(
                f'{who}: call is {self.call!r}; kind "call" needs an async function, others none'
            )
        for option, kinds in (("module", ("torch",)), ("batcher", ("batcher",))):
            if getattr(self, option) and self.kind not in kinds:
                raise InvalidArgumentError(f"{who}: {option} is for kind {kinds[0]!r}, and this is {self.kind!r}")
        for option in ("precision", "options", "source"):
            if getattr(self, option) and self.kind not in WITH_ENGINE:
                raise InvalidArgumentError(f"{who}: {option} is for an engine, and kind {self.kind!r} has none")


@dataclass(frozen=True)
class BenchmarkSpec:
    """One benchmark: everything in it is measured side by side, in one process, in rounds of random order.

    Attributes:
        source: an ONNX model or a plan, as a path or as bytes, or a Plan.
        contenders: none means trtx_py's engine and all baselines, at batch 1.
        baseline: name of the contender that others are compared with; None takes the first that could be measured.
        load: of contenders that bring none of their own.
        rounds: how often each contender has its turn. Intervals are bootstrapped over rounds: fewer than 6 say little.
        requests: in each turn of a contender; under a closed loop of several clients at least 4 for each of them.
        settle: requests before each turn that are not measured: another contender had the caches and the GPU before.
        warmup: when a contender counts as warm.
        backend, device, profiles: as for ``open_engine``. Without profiles a model with dynamic axes is built for 1 to
            the largest batch that is asked for, and at its best there.
        options: of ``open_engine``, for all engines.
        shapes: full shapes of inputs whose axes beyond the first are dynamic, by name; the first entry is replaced by
            the batch where that axis is dynamic. Other dynamic axes take their optimum of the first profile.
        inputs: arrays by input name, or the path of an .npz of them, with at least two different samples along the
            first axis. None: random ones.
        input_ranges: (low, high) of random inputs by name, both included for integers. Without: standard normal for
            floats, 0 and 1 for integers and booleans.
        input_sets: how many different sets of inputs the requests go through in turn.
        reference: what outputs are compared with: the path of an .onnx model, or of an .npz with the outputs for
            ``inputs``, by output name, sample for sample. None: the source itself run by ONNX Runtime on the CPU if it
            is an ONNX model, else a bare loop over the plan.
        tolerance: relative error that is accepted of every contender without its own.
        on_wrong_output: "raise" ends the run with WrongOutputError, or ContenderError where one raises; "exclude"
            leaves that contender alone out.
        checks_per_round: requests of each turn, chosen at random, whose outputs are checked after it.
        accuracy: compare engines with a precision with the FP32 model by ``trtx_py.compare``, after the timing.
        seed: of inputs, orders, arrivals and bootstrap.
        confidence: of all intervals.
        time_limit_s: no round begins after so many seconds of measuring; the result says how many there were.
    """

    source: Source = field(repr=False)
    contenders: Sequence[Contender] = ()
    baseline: str | None = None
    load: Load = field(default_factory=ClosedLoop)
    rounds: int = 20
    requests: int = 100
    settle: int = 3
    warmup: WarmUp = field(default_factory=WarmUp)
    backend: str | TensorRTBackend | None = None
    device: int = 0
    profiles: Profiles | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    inputs: Mapping[str, Array] | str | os.PathLike[str] | None = None
    input_ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    input_sets: int = 4
    reference: str | os.PathLike[str] | None = None
    tolerance: float | None = None
    on_wrong_output: Literal["raise", "exclude"] = "raise"
    checks_per_round: int = 2
    accuracy: bool = True
    seed: int = 0
    confidence: float = 0.95
    time_limit_s: float | None = None

    def __post_init__(self) -> None:
        checked_int(self.rounds, "rounds", minimum=1, maximum=100_000)
        checked_int(self.requests, "requests", minimum=1, maximum=10_000_000)
        checked_int(self.settle, "settle", minimum=0)
        checked_int(self.input_sets, "input_sets", minimum=2, maximum=64)
        checked_int(self.checks_per_round, "checks_per_round", minimum=1)
        checked_int(self.seed, "seed", minimum=0)
        checked_int(self.device, "device", minimum=0)
        checked_confidence(self.confidence)
        for name in ("options", "shapes", "input_ranges"):
            _mapping(getattr(self, name), name)
        for name in ("tolerance", "time_limit_s"):
            if getattr(self, name) is not None:
                positive(getattr(self, name), name)
        if not isinstance(self.load, (ClosedLoop, OpenLoop)):
            raise InvalidArgumentError(f"load is {self.load!r}; expected a ClosedLoop or an OpenLoop")
        if not isinstance(self.warmup, WarmUp):
            raise InvalidArgumentError(f"warmup is {self.warmup!r}; expected a WarmUp")
        if self.on_wrong_output not in ("raise", "exclude"):
            raise InvalidArgumentError(f'on_wrong_output is {self.on_wrong_output!r}; expected "raise" or "exclude"')
        if isinstance(self.contenders, Contender) or not all(isinstance(c, Contender) for c in self.contenders):
            raise InvalidArgumentError("contenders are not all of the type Contender; expected a sequence of them")
        object.__setattr__(self, "contenders", tuple(self.contenders) or default_contenders())
        self._check_names()

    def _check_names(self) -> None:
        names = [contender.name for contender in self.contenders]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InvalidArgumentError(f"several contenders have the name {', '.join(twice)}; give each its own")
        wanted = {self.baseline, *(contender.versus for contender in self.contenders)} - {None, *names}
        if wanted:
            unknown = ", ".join(sorted(map(str, wanted)))
            raise InvalidArgumentError(f"there is no contender {unknown} to compare with; there are {', '.join(names)}")

    def load_of(self, contender: Contender) -> Load:
        """Its own, or else that of all."""
        return self.load if contender.load is None else contender.load


def _mapping(value: object, what: str) -> None:
    if not isinstance(value, Mapping):
        raise InvalidArgumentError(f"{what} is {value!r:.60}; expected a mapping by name")


def baselines(
    *,
    batch: int = 1,
    load: Load | None = None,
    precision: str | None = None,
    options: Mapping[str, object] | None = None,
    module: object = None,
    suffix: str = "",
) -> tuple[Contender, ...]:
    """What trtx_py is measured against: bare loop, to_thread, ONNX Runtime (CPU, CUDA) and PyTorch.

    What is not installed here is reported as not available, with the reason.

    Args:
        batch, load, module: as in Contender.
        precision, options: of those that run TensorRT: as in Contender, and the same as the engine's to be fair.
        suffix: appended to the names, where several sets of baselines go into one run.
    """
    names: tuple[tuple[str, Kind], ...] = (
        ("bare loop", "bare"), ("sync", "sync"), ("to_thread", "to_thread"), ("ONNX Runtime CPU", "onnxruntime"),
        ("ONNX Runtime CUDA", "onnxruntime_cuda"), ("PyTorch", "torch"),
    )  # fmt: skip
    return tuple(
        Contender(
            name + suffix,
            kind,
            batch,
            precision if kind in WITH_ENGINE else None,
            (options or {}) if kind in WITH_ENGINE else {},
            load=load,
            module=module if kind == "torch" else None,
        )
        for name, kind in names
    )


def default_contenders() -> tuple[Contender, ...]:
    """The engine first: others are compared with it."""
    return (Contender("engine"), *baselines())
