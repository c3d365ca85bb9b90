"""Which way bytes come: few of them over the MQTT connection that is open anyway, the rest over HTTP.

HTTP can serve every artifact, so it also takes over when MQTT gives up half-way.
"""

import asyncio
import weakref
from pathlib import Path

from common.artifact import ArtifactRef
from common.clock import Clock
from common.ids import Digest
from edge_agent.fetch.chunks import ChunkFetcher, ChunkLink
from edge_agent.fetch.http import HttpFetcher
from edge_agent.fetch.pace import Pace
from edge_agent.fetch.partial import total
from edge_agent.fetch.resume import Mover, fetch_by
from edge_agent.fetch.session import Session
from edge_agent.fetch.transfer import FetchLimits, OnProgress, Ranges, Transfer


class Fetcher:
    """Fetches by the way that fits; one download of a digest at a time, for they would share the partial file."""

    def __init__(self, http: HttpFetcher, chunks: ChunkFetcher | None, mqtt_bytes_max: int) -> None:
        self._http = http
        self._chunks = chunks
        self._mqtt_bytes_max = mqtt_bytes_max
        self._busy: weakref.WeakValueDictionary[Digest, asyncio.Lock] = weakref.WeakValueDictionary()

    async def fetch(
        self,
        ref: ArtifactRef,
        destination: Path,
        on_progress: OnProgress | None = None,
        ranges: Ranges | None = None,
        moved_max: int | None = None,
    ) -> Transfer:
        """See `Fetching.fetch`; the result says which way was taken."""
        lock = self._busy.setdefault(ref.digest, asyncio.Lock())
        async with lock:
            return await fetch_by(
                self._ways(total(ref, ranges)), ref, destination, on_progress, ranges=ranges, moved_max=moved_max
            )

    def _ways(self, size: int) -> tuple[Mover, ...]:
        if self._chunks is not None and self._chunks.connected and size <= self._mqtt_bytes_max:
            return (self._chunks, self._http)
        return (self._http,)


def make_fetcher(base_url: str, session: Session, link: ChunkLink | None, limits: FetchLimits, clock: Clock) -> Fetcher:
    """A fetcher from the controller at `base_url`, and through `link` if there is one, under one common rate limit."""
    pace = Pace(limits.rate_bytes_per_s, clock)
    chunks = ChunkFetcher(link, limits, pace) if link is not None else None
    return Fetcher(HttpFetcher(base_url, session, limits, pace), chunks, limits.mqtt_bytes_max)
