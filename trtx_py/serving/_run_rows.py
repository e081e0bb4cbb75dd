"""``infer_many``: chunks to devices, and their results together again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .._errors import DeviceLostError
from .._inputs import Arrays
from ._data_parallel import Chunk, Gathering, RowCutter, Spread
from ._member import DeviceState, Member
from ._routing import Router

_EVERYTHING = 1 << 31


async def run_rows(
    router: Router,
    cutter: RowCutter,
    inputs: Mapping[str, Any],
    *,
    chunk_rows: int | None,
    retry: bool,
    how: Mapping[str, Any],
) -> Arrays:
    """Run these rows on all devices in service. Arguments, errors and cancellation as ``MultiDevice.infer_many``."""
    given, rows = cutter.require_rows(inputs)
    router.require_member()
    batcher = router.serving[0].opened.batcher
    limit = batcher.batch_sizes[-1] if batcher is not None else _EVERYTHING
    pending = cutter.chunks(rows, chunk_rows, limit, len(router.serving))
    gathering = Gathering(rows)

    def serving() -> Sequence[Member]:
        router.require_member()
        return router.serving

    async def run(member: Member, chunk: Chunk) -> bool:
        if router.dropping:
            router.require_member()
        if member.state is not DeviceState.SERVING:
            return False
        part = cutter.part(given, chunk)
        nbytes = sum(getattr(array, "nbytes", 0) for array in part.values())
        try:
            outputs = await router.run_on(member, part, chunk.stop - chunk.start, nbytes, how)
        except DeviceLostError:
            chunk.lost += 1
            if not retry or chunk.lost > 1:
                raise
            return False
        if outputs is None:
            return False
        await gathering.take(chunk, outputs)
        return True

    await Spread(pending, serving, run).run()
    return gathering.outputs
