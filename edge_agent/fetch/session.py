"""The one HTTP session to the controller: who we are, whom we trust, and no surprises.

Bodies come as they are (no content coding: ranges and digests speak of the stored bytes), redirects are never followed
(a captive portal must not answer for the controller), and the device's token goes to the controller only.

aiohttp takes longer to load than the rest of the agent together, and a device answers requests before it asks anybody
for anything: so it is loaded with the first request to the controller, and nothing in this package imports it earlier.
"""

import asyncio
import importlib
import ssl
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from common.errors import InvalidInput

if TYPE_CHECKING:
    import aiohttp

CONNECT_S = 10.0
CONNECTIONS_MAX = 4


class Session:
    """Speaks for the holder of `token` to servers that `tls` trusts. Whoever makes it closes it."""

    def __init__(self, token: str, tls: ssl.SSLContext) -> None:
        self._token = token
        self._tls = tls
        self._client: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        await self.close()

    async def client(self) -> "aiohttp.ClientSession":
        """What requests are made with; loaded and opened when it is wanted first, without stopping the loop."""
        if self._client is None:
            await asyncio.to_thread(importlib.import_module, "aiohttp")
        if self._client is None:  # nobody else has opened it meanwhile
            self._client = self._open()
        return self._client

    async def close(self) -> None:
        """Close all connections."""
        if self._client is not None:
            await self._client.close()

    def _open(self) -> "aiohttp.ClientSession":
        import aiohttp

        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=CONNECTIONS_MAX, ssl=self._tls),
            headers={
                "Authorization": f"Bearer {self._token}",
                "Accept-Encoding": "identity",
                "User-Agent": "ferry-agent",
            },
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
            auto_decompress=False,
        )


def open_session(token: str, ca_file: Path | None = None) -> Session:
    """A session for the holder of `token`; `ca_file` names more CAs (PEM), `InvalidInput` when it cannot be read."""
    return Session(token, tls_context(ca_file))


def tls_context(ca_file: Path | None) -> ssl.SSLContext:
    """The system's CAs, and those in `ca_file`; `InvalidInput` when that cannot be read."""
    context = ssl.create_default_context()
    if ca_file is not None:
        try:
            context.load_verify_locations(cafile=ca_file)
        except (OSError, ssl.SSLError) as error:
            fix = "point it at a PEM file with CA certificates"
            raise InvalidInput(f"cannot read {ca_file}: {error}", field="ca_file", fix=fix) from error
    return context
