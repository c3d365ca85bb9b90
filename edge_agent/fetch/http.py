"""Artifacts over HTTP: `GET /v1/blobs/{digest}`, resumed with Range (RFC 9110, section 14); one request for each range
where only some of the bytes are wanted.

The URL names the content, so a resumed download can never continue with another artifact's bytes; the answer's
`Content-Range` is checked all the same, because a proxy on the way may not know that. A server that ignores Range
(200) makes us start again, and is of no use for ranges. No more than what is wanted is ever read.
"""

import asyncio
import re
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

from common.artifact import ArtifactRef
from common.artifact.protobuf import Span
from common.errors import IntegrityFailure, Unavailable
from edge_agent.fetch.pace import Pace
from edge_agent.fetch.partial import BLOCK_BYTES_MAX, Partial
from edge_agent.fetch.problems import PROBLEM_BYTES_MAX, problem_error
from edge_agent.fetch.resume import fetch_by
from edge_agent.fetch.session import Session
from edge_agent.fetch.transfer import FetchLimits, OnProgress, Ranges, Transfer

if TYPE_CHECKING:
    import aiohttp

BLOCK_BYTES = BLOCK_BYTES_MAX
"""Bytes are written in blocks of at most this size: all that a killed download has to fetch twice."""

_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")


class HttpFetcher:
    """Fetches from the controller; `session` carries the credential (see `open_session`)."""

    def __init__(self, base_url: str, session: Session, limits: FetchLimits, pace: Pace) -> None:
        self._base_url = base_url.rstrip("/")
        self._session = session
        self._limits = limits
        self._pace = pace

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
        client = await self._session.client()
        import aiohttp  # loaded by now

        try:
            async with asyncio.timeout(self._limits.total_s):
                while (span := next(partial.spans(), None)) is not None:
                    async with self._request(client, partial.ref, span) as response:
                        length = await self._check(response, partial, span)
                        await self._read(response, partial, length, on_progress)
        except TimeoutError as error:
            raise Unavailable("the controller stopped sending, or the link is too slow", fix="trying again") from error
        except (aiohttp.ClientError, ConnectionError) as error:
            raise Unavailable(f"the download broke off: {error or type(error).__name__}", fix="trying again") from error

    def _request(
        self, client: "aiohttp.ClientSession", ref: ArtifactRef, span: Span
    ) -> "aiohttp.client._RequestContextManager":
        url = f"{self._base_url}/v1/blobs/{ref.digest}"
        return client.get(url, headers=_range(ref, span), allow_redirects=False)

    async def _check(self, response: "aiohttp.ClientResponse", partial: Partial, span: Span) -> int:
        """How many bytes of the body are wanted, after making sure that they continue the partial file, or begin it."""
        if response.status == HTTPStatus.PARTIAL_CONTENT:
            _check_range(response.headers.get("Content-Range", ""), partial.ref, span)
        elif response.status == HTTPStatus.OK:
            if response.content_length not in {None, partial.ref.size}:
                raise IntegrityFailure(f"{response.content_length} bytes offered, {partial.ref.size} promised")
            if not partial.whole and _range(partial.ref, span):
                raise IntegrityFailure("the controller answered with the whole file where a range was asked for")
            if partial.size and partial.whole:
                partial.restart()
                partial.check_limit()
                return partial.missing
        elif response.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise IntegrityFailure(f"the controller's {partial.ref.digest} is shorter than what is here")
        else:
            raise problem_error(response.status, await response.content.read(PROBLEM_BYTES_MAX), "a download")
        return span.end - span.start

    async def _read(
        self, response: "aiohttp.ClientResponse", partial: Partial, length: int, on_progress: OnProgress
    ) -> None:
        broken: Exception | None = None
        while length and broken is None:
            block, broken = await self._block(response, min(length, self._pace.portion(BLOCK_BYTES)))
            if block:
                await asyncio.to_thread(partial.append, block, "http")
                length -= len(block)
                on_progress(partial.moved, partial.total)
                await self._pace.spend(len(block))
        if broken is not None:
            raise broken

    async def _block(self, response: "aiohttp.ClientResponse", size: int) -> tuple[bytes, Exception | None]:
        """The next `size` bytes; fewer only where the body ends or breaks, and then what there is to say about that."""
        import aiohttp

        block = bytearray()
        try:
            while len(block) < size:
                async with asyncio.timeout(self._limits.idle_s):
                    piece = await response.content.read(size - len(block))
                if not piece:
                    return bytes(block), Unavailable("the download broke off", fix="trying again")
                block += piece
        except (aiohttp.ClientError, OSError) as error:  # TimeoutError is an OSError
            return bytes(block), error
        return bytes(block), None


def _range(ref: ArtifactRef, span: Span) -> dict[str, str]:
    """The header that asks for `span`; none for the whole artifact."""
    if span == (0, ref.size):
        return {}
    return {"Range": f"bytes={span.start}-{'' if span.end == ref.size else span.end - 1}"}


def _check_range(content_range: str, ref: ArtifactRef, span: Span) -> None:
    wanted = (span.start, span.end - 1, ref.size)
    match = _CONTENT_RANGE.fullmatch(content_range)
    if match is None or tuple(map(int, match.groups())) != wanted:
        raise IntegrityFailure(f"the controller answered {content_range[:80]!r}, not the range that was asked for")
