"""Artifacts over HTTP: `GET /v1/blobs/{digest}`, resumed with Range (RFC 9110, section 14).

The URL names the content, so a resumed download can never continue with another artifact's bytes; the answer's
`Content-Range` is checked all the same, because a proxy on the way may not know that. A server that ignores Range
(200) makes us start again. No more than the promised size is ever read.
"""

import asyncio
import re
from http import HTTPStatus
from pathlib import Path

import aiohttp

from common.artifact import ArtifactRef
from common.errors import IntegrityFailure, Unavailable
from edge_agent.fetch.pace import Pace
from edge_agent.fetch.partial import Partial
from edge_agent.fetch.problems import PROBLEM_BYTES_MAX, problem_error
from edge_agent.fetch.resume import fetch_by
from edge_agent.fetch.transfer import FetchLimits, OnProgress, Transfer

BLOCK_BYTES = 256 * 1024
"""Bytes are written in blocks of at most this size: all that a killed download has to fetch twice."""

_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")


class HttpFetcher:
    """Fetches from the controller; `session` carries the credential (see `open_session`)."""

    def __init__(self, base_url: str, session: aiohttp.ClientSession, limits: FetchLimits, pace: Pace) -> None:
        self._base_url = base_url.rstrip("/")
        self._session = session
        self._limits = limits
        self._pace = pace

    async def fetch(self, ref: ArtifactRef, destination: Path, on_progress: OnProgress | None = None) -> Transfer:
        """See `Fetching.fetch`."""
        return await fetch_by((self,), ref, destination, on_progress)

    async def move(self, partial: Partial, on_progress: OnProgress) -> None:
        """See `Mover.move`."""
        try:
            async with asyncio.timeout(self._limits.total_s), self._request(partial) as response:
                await self._check(response, partial)
                await self._read(response, partial, on_progress)
        except TimeoutError as error:
            raise Unavailable("the controller stopped sending, or the link is too slow", fix="trying again") from error
        except (aiohttp.ClientError, ConnectionError) as error:
            raise Unavailable(f"the download broke off: {error or type(error).__name__}", fix="trying again") from error

    def _request(self, partial: Partial) -> "aiohttp.client._RequestContextManager":
        headers = {"Range": f"bytes={partial.size}-"} if partial.size else {}
        url = f"{self._base_url}/v1/blobs/{partial.ref.digest}"
        return self._session.get(url, headers=headers, allow_redirects=False)

    async def _check(self, response: aiohttp.ClientResponse, partial: Partial) -> None:
        """Make sure that the body continues the partial file, or begins it."""
        if response.status == HTTPStatus.PARTIAL_CONTENT:
            _check_range(response.headers.get("Content-Range", ""), partial)
        elif response.status == HTTPStatus.OK:
            if response.content_length not in {None, partial.ref.size}:
                raise IntegrityFailure(f"{response.content_length} bytes offered, {partial.ref.size} promised")
            if partial.size:
                partial.restart()
        elif response.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise IntegrityFailure(f"the controller's {partial.ref.digest} is shorter than what is here")
        else:
            raise problem_error(response.status, await response.content.read(PROBLEM_BYTES_MAX), "a download")

    async def _read(self, response: aiohttp.ClientResponse, partial: Partial, on_progress: OnProgress) -> None:
        while partial.missing:
            block = await self._block(response, min(partial.missing, self._pace.portion(BLOCK_BYTES)))
            if not block:
                raise Unavailable("the download broke off", fix="trying again")
            await asyncio.to_thread(partial.append, block, "http")
            on_progress(partial.size, partial.ref.size)
            await self._pace.spend(len(block))

    async def _block(self, response: aiohttp.ClientResponse, size: int) -> bytes:
        """The next `size` bytes, fewer only where the body ends or breaks."""
        block = bytearray()
        while len(block) < size:
            async with asyncio.timeout(self._limits.idle_s):
                piece = await response.content.read(size - len(block))
            if not piece:
                break
            block += piece
        return bytes(block)


def _check_range(content_range: str, partial: Partial) -> None:
    wanted = (partial.size, partial.ref.size - 1, partial.ref.size)
    match = _CONTENT_RANGE.fullmatch(content_range)
    if match is None or tuple(map(int, match.groups())) != wanted:
        raise IntegrityFailure(f"the controller answered {content_range[:80]!r}, not the range that was asked for")
