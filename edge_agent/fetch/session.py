"""The one HTTP session to the controller: who we are, whom we trust, and no surprises.

Bodies come as they are (no content coding: ranges and digests speak of the stored bytes), redirects are never followed
(a captive portal must not answer for the controller), and the device's token goes to the controller only.
"""

import ssl
from pathlib import Path

import aiohttp

from common.errors import InvalidInput

CONNECT_S = 10.0
CONNECTIONS_MAX = 4


def open_session(token: str, ca_file: Path | None = None) -> aiohttp.ClientSession:
    """A session that speaks for the holder of `token`; `ca_file` names more CAs (PEM). The caller closes it."""
    connector = aiohttp.TCPConnector(limit=CONNECTIONS_MAX, ssl=tls_context(ca_file))
    return aiohttp.ClientSession(
        connector=connector,
        headers={"Authorization": f"Bearer {token}", "Accept-Encoding": "identity", "User-Agent": "ferry-agent"},
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
        auto_decompress=False,
    )


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
