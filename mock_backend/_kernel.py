"""What the mock's execution contexts put on streams: a kernel that computes the model, or one that leaves zeros."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtx_py._types import Array, Shape, TensorInfo

from ._driver import MockDriver, Position
from ._dtypes import from_bytes, to_bytes
from ._native import KernelError, Region, Stamp

if TYPE_CHECKING:
    from ._engine import MockEngine
    from ._layer_times import LayerTimes

__all__ = ["ContextMemory", "Kernel"]

_POISON = 0xCB
_SCRATCH = 0xEE
_TOUCHED = 256
_ENDED = 2**64 - 1


@dataclass(frozen=True)
class ContextMemory:
    """The activation memory of one execution context; ``region`` finds kernels that use it at once."""

    address: int
    nbytes: int
    region: Region | None


@dataclass(frozen=True)
class Kernel:
    """One inference as it was enqueued: everything it needs is settled, whatever is set on the context afterwards.

    Attributes:
        name: of the execution context, for texts.
        inputs: type, shape and address of the tensors on the device.
        values: of the tensors that are read on the host.
        targets: address and size in bytes of each output.
        stamp: of the context; ``settings`` is what an enqueue writes there, and a captured kernel expects.
        times: where the time of each node goes; None where no profiler asks.
    """

    name: str
    driver: MockDriver
    engine: MockEngine
    inputs: Mapping[str, tuple[TensorInfo, Shape, int]]
    values: Mapping[str, Array]
    shapes: Mapping[str, Shape]
    outputs: Mapping[str, TensorInfo]
    targets: Mapping[str, tuple[int, int]]
    memory: ContextMemory
    stamp: Stamp
    settings: int
    captured: bool
    times: LayerTimes | None = None

    def launch(self, stream: int, call: str) -> Position:
        """Enqueue it, or record it where the stream is captured."""
        settings = self.engine.settings
        if settings.compute:
            return self.driver.launch(
                stream, self.run, call, duration_s=settings.duration_s, counted=True, region=self.memory.region
            )
        return self.driver.launch_blank(
            stream, call,
            name=self.name,
            duration_s=settings.duration_s,
            scratch=(self.memory.address, self.memory.nbytes),
            inputs=[(a, info.dtype.nbytes(shape), name) for name, (info, shape, a) in self.inputs.items()],
            outputs=[(address, nbytes, name) for name, (address, nbytes) in self.targets.items()],
            region=self.memory.region,
            stamp=self.stamp,
            settings=self.settings,
            captured=self.captured,
        )  # fmt: skip

    def run(self) -> None:
        """All of it, on the stream's thread."""
        self._touch_memory()
        if not self._settings_hold():
            for name, (address, nbytes) in self.targets.items():
                self.driver.device_view(address, nbytes, f"kernel of {self.name}, output {name!r}")[:] = _POISON
            return
        self.write(self.compute())

    def compute(self) -> dict[str, Array]:
        """The outputs, not written yet. Raises KernelError for values that nothing can be computed from."""
        feeds = dict(self.values)
        for name, (info, shape, address) in self.inputs.items():
            what = f"kernel of {self.name}, input {name!r}"
            feeds[name] = from_bytes(
                self.driver.device_view(address, info.dtype.nbytes(shape), what), info.dtype, shape
            )
        try:
            return (self.times or self.engine.numerics).run(feeds)
        except Exception as error:  # the runners' exceptions share no base
            # a GPU reads and writes what it finds where values make no sense; it does not lose its context over them
            raise KernelError(f"kernel of {self.name} cannot compute these values: {error}") from error

    def compute_first(self) -> dict[str, Array]:
        """As compute, for an inference whose outputs have no place yet because their size is not known."""
        self._touch_memory()
        self._settings_hold()
        return self.compute()

    def write(self, results: Mapping[str, Array]) -> None:
        """The outputs to where they belong."""
        for name, (address, nbytes) in self.targets.items():
            data = to_bytes(results[name], self.outputs[name].dtype)
            if data.size != nbytes:
                raise KernelError(
                    f"kernel of {self.name}: output {name!r} has {data.size} bytes, and {nbytes} were expected from "
                    "its shape"
                )
            if nbytes:
                self.driver.device_view(address, nbytes, f"kernel of {self.name}, output {name!r}")[:] = data

    def _touch_memory(self) -> None:
        if self.memory.nbytes:
            what = f"kernel of {self.name}, activation memory"
            self.driver.device_view(self.memory.address, self.memory.nbytes, what)[:_TOUCHED] = _SCRATCH

    def _settings_hold(self) -> bool:
        """False for a graph whose context was set otherwise after the capture: a graph does not follow."""
        if not self.captured:
            self.stamp.renew(self.settings)
            return True
        found = self.stamp.get()
        if found == self.settings:
            return True
        what = "destroyed" if found == _ENDED else "enqueued with other settings"
        text = f"a graph was replayed whose {self.name} was {what} after the capture: use one context for each graph"
        if text not in self.driver.damage():
            self.driver.mock.blame(text)
        return False
