"""Artifacts over MQTT: the device asks for each chunk, so it sets the pace.

Up to `WINDOW_CHUNKS` requests are under way; each is answered by one `Chunk` or not at all, for MQTT at QoS 0 may
lose either. A chunk that does not come is asked for again, a bounded number of times. Chunks may come in any order and
more than once; they are written in order, so that the partial file's length keeps telling where to go on.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

from common.artifact import ArtifactRef
from common.artifact.protobuf import Span
from common.errors import IntegrityFailure, NotFound, Unavailable
from common.ids import DeviceId, Digest
from common.wire import Chunk, ChunkRequest
from edge_agent.fetch.pace import Pace
from edge_agent.fetch.partial import Partial
from edge_agent.fetch.resume import fetch_by
from edge_agent.fetch.transfer import FetchLimits, OnProgress, Ranges, Transfer

WINDOW_CHUNKS = 4
"""At 128 kB and 50 ms round trip that is 10 MB/s, and half a megabyte of memory."""


class ChunkLink(Protocol):
    """What chunks need of the MQTT side."""

    @property
    def device(self) -> DeviceId: ...

    @property
    def connected(self) -> bool: ...

    def listen_chunks(self, listener: Callable[[Chunk], None]) -> None:
        """Call `listener` on the event loop with every chunk that comes."""

    async def request_chunk(self, request: ChunkRequest) -> None:
        """Send a request; `Unavailable` when there is no connection."""


class ChunkFetcher:
    """Fetches through an MQTT link."""

    def __init__(self, link: ChunkLink, limits: FetchLimits, pace: Pace) -> None:
        self._link = link
        self._limits = limits
        self._pace = pace
        self._waiting: dict[tuple[Digest, int], asyncio.Future[Chunk]] = {}
        link.listen_chunks(self._receive)

    @property
    def connected(self) -> bool:
        """Whether there is a link to fetch through."""
        return self._link.connected

    async def fetch(
        self,
        ref: ArtifactRef,
        destination: Path,
        on_progress: OnProgress | None = None,
        ranges: Ranges | None = None,
        moved_max: int | None = None,
    ) -> Transfer:
        """See `Fetching.fetch`."""
        return await fetch_by((self,), ref, destination, on_progress, ranges=ranges, moved_max=moved_max)

    async def move(self, partial: Partial, on_progress: OnProgress) -> None:
        """See `Mover.move`."""
        chunks = iter(tuple(_cut(partial.spans(), self._limits.chunk_bytes)))
        window: list[asyncio.Task[bytes]] = []
        try:
            while True:
                while len(window) < WINDOW_CHUNKS and (span := next(chunks, None)) is not None:
                    window.append(asyncio.create_task(self._chunk(partial.ref, span)))
                if not window:
                    return
                block = await window[0]
                del window[0]
                await asyncio.to_thread(partial.append, block, "mqtt")
                on_progress(partial.moved, partial.total)
        finally:
            for task in window:
                task.cancel()
            await asyncio.gather(*window, return_exceptions=True)

    async def _chunk(self, ref: ArtifactRef, span: Span) -> bytes:
        length = span.end - span.start
        await self._pace.spend(length)
        request = ChunkRequest(device=self._link.device, digest=ref.digest, offset=span.start, length=length)
        chunk = await self._answer(request)
        if chunk.error:
            refusal = NotFound if chunk.error == NotFound.code else Unavailable
            raise refusal(f"the controller refused a chunk of {ref.digest}: {chunk.error}")
        if chunk.total != ref.size or len(chunk.data) != length:
            raise IntegrityFailure(f"the controller sent a chunk that does not belong to {ref.digest}")
        return chunk.data

    async def _answer(self, request: ChunkRequest) -> Chunk:
        key = (request.digest, request.offset)
        answer = self._waiting.setdefault(key, asyncio.get_running_loop().create_future())
        try:
            for _ in range(self._limits.chunk_attempts_max):
                await self._link.request_chunk(request)
                done, _pending = await asyncio.wait({answer}, timeout=self._limits.chunk_timeout_s)
                if done:
                    return answer.result()
        finally:
            self._waiting.pop(key, None)
        raise Unavailable(f"no answer to {self._limits.chunk_attempts_max} requests for a chunk", fix="trying again")

    def _receive(self, chunk: Chunk) -> None:
        answer = self._waiting.get((chunk.digest, chunk.offset))
        if answer is not None and not answer.done():
            answer.set_result(chunk)


def _cut(spans: Iterable[Span], most: int) -> Iterator[Span]:
    """The spans in pieces of at most `most` bytes."""
    return (
        Span(offset, min(offset + most, span.end)) for span in spans for offset in range(span.start, span.end, most)
    )
