"""The part of fetching that does not depend on the way the bytes travel.

Go on where the last try stopped, move the missing bytes by the first way that works, verify, name the file. Bytes that
turn out wrong are thrown away and, if some of them were left by an earlier try, fetched once more from the start, in
case the rubbish was ours; wrong again is an `IntegrityFailure`.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from common.artifact import ArtifactRef
from common.errors import IntegrityFailure, NotFound, Unavailable
from edge_agent.fetch.partial import Partial, holding, total
from edge_agent.fetch.transfer import OnProgress, Ranges, Transfer


class Mover(Protocol):
    """One way for bytes to come."""

    async def move(self, partial: Partial, on_progress: OnProgress) -> None:
        """Append all that is missing; what was appended before an error stays valid."""


async def fetch_by(
    movers: Sequence[Mover],
    ref: ArtifactRef,
    destination: Path,
    on_progress: OnProgress | None,
    *,
    ranges: Ranges | None = None,
    moved_max: int | None = None,
) -> Transfer:
    """`Fetching.fetch` by the first of `movers` that works; a later one goes on where an earlier one gave up."""
    if await asyncio.to_thread(holding(ref, ranges), destination):
        return Transfer(bytes=0, resumed_bytes=total(ref, ranges), transport="none")
    with await asyncio.to_thread(Partial, ref, destination, ranges, moved_max) as partial:
        while True:
            try:
                partial.check_limit()
                if partial.missing:
                    await _move(movers, partial, on_progress or _ignore)
                await _to_the_end(partial.finish)
            except IntegrityFailure:
                if not partial.resumed:
                    partial.discard()
                    raise
                partial.restart()
            else:
                return Transfer(bytes=partial.moved, resumed_bytes=partial.resumed, transport=partial.transport)


async def _to_the_end(work: Callable[[], None]) -> None:
    """`work` in a thread, which has ended when this returns or is cancelled: a file must not get its name later."""
    running = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        await asyncio.shield(running)
    finally:
        await asyncio.gather(running, return_exceptions=True)


async def _move(movers: Sequence[Mover], partial: Partial, on_progress: OnProgress) -> None:
    *preferred, last = movers
    for mover in preferred:
        with contextlib.suppress(Unavailable, NotFound):
            return await mover.move(partial, on_progress)
    return await last.move(partial, on_progress)


def _ignore(_moved: int, _total: int) -> None:
    pass
