"""How an engine serves: the options of ``runtime.deserialize`` and ``open_engine``."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ._arguments import checked_int, closest
from ._errors import InvalidArgumentError

#: Slots that a lane has where the caller does not say.
DEFAULT_SLOTS = 16


class Completion(enum.Enum):
    """How eagerly a finished inference is noticed; the values are those of the native lanes' wake modes."""

    LATENCY = 0
    BALANCED = 1
    EFFICIENT = 2


@dataclass(frozen=True)
class EngineOptions:
    """How an engine serves.

    Attributes:
        lanes: how many inferences may run at once, each lane with a stream, contexts and buffers of its own. A plan
            that does not share optimization profiles uses one whatever is asked.
        noncontiguous: what to do with inputs that are not C-contiguous: "copy" (the result is right either way) or
            "refuse" (for callers who want to know about the cost).
        completion: how a finished inference is noticed, and what that costs. "latency": the event loop keeps turning
            while a short inference is in flight, and a native thread spins for long ones. "balanced": the loop sleeps
            and a native thread wakes it, spinning only when a result is due. "efficient": that thread naps between
            looks.
        cuda_graphs: capture shapes that recur, so that one launch replaces TensorRT's enqueue and the copies.
        max_graphs: how many shapes each lane keeps captured; beyond it the least used one goes.
        slots: pinned slots of each lane, which is how many requests can be on their way to the GPU at once. None:
            as many as fit into 1 MiB for the shape at hand, 2 at least and 16 at most.
        batch_axis: the axis of every input and output that counts independent rows. Only 0 can be split. Declaring it
            lets large requests be cut into parts whose copies and kernels overlap; never declare it for a model that
            mixes rows. None: never.
        max_split: into how many parts at most a large request may be cut; which number is fastest is measured when
            the shape is captured.
        auxiliary_streams: how many streams of our own an execution context gets for TensorRT's parallel branches, at
            most what the plan uses (BuilderConfig.max_aux_streams). None leaves them to TensorRT.
        weight_streaming_bytes: device memory for weights that may stay on the host, of a plan built with
            ``weight_streaming``; what does not fit is copied in at every inference. None keeps all on the device.
    """

    lanes: int = 1
    noncontiguous: str = "copy"
    completion: str = "balanced"
    cuda_graphs: bool = True
    max_graphs: int = 16
    slots: int | None = None
    batch_axis: int | None = None
    max_split: int = 4
    auxiliary_streams: int | None = None
    weight_streaming_bytes: int | None = None

    def __post_init__(self) -> None:
        checked_int(self.lanes, "lanes", minimum=1, maximum=64)
        if self.noncontiguous not in ("copy", "refuse"):
            raise InvalidArgumentError(f'noncontiguous is {self.noncontiguous!r}; expected "copy" or "refuse"')
        if self.completion not in ("latency", "balanced", "efficient"):
            raise InvalidArgumentError(
                f'completion is {self.completion!r}; expected "latency", "balanced" or "efficient"'
            )
        if not isinstance(self.cuda_graphs, bool):
            raise InvalidArgumentError(f"cuda_graphs is {self.cuda_graphs!r}; expected True or False")
        checked_int(self.max_graphs, "max_graphs", minimum=1, maximum=1024)
        if self.slots is not None:
            checked_int(self.slots, "slots", minimum=1, maximum=1024)
        if self.batch_axis is not None:
            checked_int(self.batch_axis, "batch_axis", minimum=0, maximum=0)
        checked_int(self.max_split, "max_split", minimum=1, maximum=16)
        if self.auxiliary_streams is not None:
            checked_int(self.auxiliary_streams, "auxiliary_streams", minimum=0, maximum=7)
        if self.weight_streaming_bytes is not None:
            checked_int(self.weight_streaming_bytes, "weight_streaming_bytes", minimum=0)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> EngineOptions:
        """Options by name. Raises InvalidArgumentError for a name that there is none of, or a value that is none."""
        known = serving_options()
        for name in given.keys() - known:
            close = closest(name, known)
            hint = f"did you mean {close!r}?" if close else f"there are {', '.join(sorted(known))}"
            raise InvalidArgumentError(f"an engine has no option {name!r}; {hint}")
        return cls(**given)

    @property
    def wake_mode(self) -> int:
        """``completion`` as the native lanes number it."""
        return Completion[self.completion.upper()].value


def serving_options() -> frozenset[str]:
    """Names of all options."""
    return frozenset(field.name for field in fields(EngineOptions))
