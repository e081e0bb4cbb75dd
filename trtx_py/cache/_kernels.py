"""What TensorRT-RTX compiles when it first runs a plan, kept beside the plan.

It saves time only: TensorRT checks it against its own version, the GPU and the driver, and compiles anew what does not
fit. That it is undamaged, and ours, is checked before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .._aio import run_shielded
from .._errors import CacheError, TrtxError
from .._runtime import Runtime
from ._entry import write_blob
from ._lock import FileLock
from ._said import log, warn_once


@dataclass(frozen=True)
class Kernels:
    """The compiled kernels of one plan on one device.

    Attributes:
        content: those of an earlier process, None if there are none.
        root: of the cache, for messages.
        key: hash of what they depend on.
        path: where they are kept.
        lock: takes the lock of a key, None if somebody else has it.
    """

    content: bytes | None
    root: str
    key: str
    path: str
    lock: Callable[[str], FileLock | None]

    async def save(self, runtime: Runtime) -> None:
        """Keep what the runtime has by now, if it has more than it began with. What fails is logged.

        Cancellation: delivered once the file is written.
        """
        await run_shielded(lambda: self._save(runtime))

    def _save(self, runtime: Runtime) -> None:
        try:
            content = runtime._compiled_kernels()
            if content is None or content == self.content:
                return
            held = self.lock(self.key)
            if held is not None:  # else another process writes the same
                with held:
                    write_blob(self.path, self.key, content)
        except (OSError, CacheError) as error:
            warn_once(self.root, "written", error)
        except TrtxError as error:
            log.warning("the kernels that were compiled are not kept: %s", error)
