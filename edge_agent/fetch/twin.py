"""The device's twin over HTTP, for when MQTT is silent: ask for the order, tell what runs.

Asking again costs almost nothing: the last order's ETag goes along, and an unchanged order is answered 304.
"""

import asyncio
from http import HTTPStatus
from typing import TYPE_CHECKING

import msgspec

from common.errors import FerryError, IntegrityFailure, Unavailable
from common.ids import DeviceId
from common.trust import ENVELOPE_BYTES_MAX
from common.wire import ReportedState, encode
from edge_agent.fetch.problems import PROBLEM_BYTES_MAX, problem_error
from edge_agent.fetch.session import Session

if TYPE_CHECKING:
    import aiohttp

REQUEST_TIMEOUT_S = 30.0


class NotModified(msgspec.Struct, frozen=True):
    """The order is still the one whose ETag was sent."""


class Envelope(msgspec.Struct, frozen=True):
    """A signed order, not verified yet, and its ETag for the next poll."""

    data: bytes
    etag: str


class DesiredPoll:
    """The device's side of `/v1/devices/{id}`; `session` carries the credential (see `open_session`)."""

    def __init__(self, base_url: str, device: DeviceId, session: Session) -> None:
        self._url = f"{base_url.rstrip('/')}/v1/devices/{device}"
        self._session = session

    async def poll(self, etag: str | None) -> NotModified | Envelope:
        """The device's newest order, unless it still has `etag`. Raises `Unavailable`, or what the controller said."""
        headers = {"If-None-Match": etag} if etag else {}
        status, body, tag = await self._ask("GET", "desired", headers, None)
        if status == HTTPStatus.NOT_MODIFIED:
            return NotModified()
        if status != HTTPStatus.OK:
            raise problem_error(status, body, "a poll for orders")
        if len(body) > ENVELOPE_BYTES_MAX:
            raise IntegrityFailure(f"the order is larger than {ENVELOPE_BYTES_MAX} bytes")
        return Envelope(body, tag)

    async def report(self, state: ReportedState) -> None:
        """Tell what runs. Raises `Unavailable`, or what the controller said."""
        headers = {"Content-Type": "application/json"}
        status, body, _ = await self._ask("PUT", "reported", headers, encode(state))
        if status not in {HTTPStatus.NO_CONTENT, HTTPStatus.OK}:
            raise problem_error(status, body, "a report")

    async def _ask(self, method: str, what: str, headers: dict[str, str], body: bytes | None) -> tuple[int, bytes, str]:
        client = await self._session.client()
        import aiohttp  # loaded by now

        request = client.request(method, f"{self._url}/{what}", headers=headers, data=body, allow_redirects=False)
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S), request as response:
                most = ENVELOPE_BYTES_MAX if response.status == HTTPStatus.OK else PROBLEM_BYTES_MAX
                return response.status, await _read_up_to(response, most + 1), response.headers.get("ETag", "")
        except (aiohttp.ClientError, OSError) as error:  # TimeoutError is an OSError
            raise unreachable(error) from error


def unreachable(error: Exception) -> FerryError:
    """The error for a controller that does not answer."""
    fix = "check that it runs and that its address is right; what is installed keeps working"
    return Unavailable(f"the controller cannot be reached: {error or type(error).__name__}", fix=fix)


async def _read_up_to(response: "aiohttp.ClientResponse", most: int) -> bytes:
    body = bytearray()
    while len(body) < most and (piece := await response.content.read(most - len(body))):
        body += piece
    return bytes(body)
