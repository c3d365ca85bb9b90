"""Where the inference API listens: a TCP address, a Unix socket, or both, served by uvicorn with its C parser.

uvicorn would take over the program's signals and end it when a port is taken; here it does neither.
"""

import asyncio
import contextlib
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import uvicorn

from common import durable
from common.errors import Unavailable
from edge_agent.inference.asgi import Application

IDLE_S: Final = 75
"""How long a connection may be silent between two requests."""
STOP_S: Final = 10
"""How long requests that are under way may take when the server stops."""
BACKLOG_CONNECTIONS: Final = 1024
SOCKET_MODE: Final = 0o660
"""Of a Unix socket: its user and group may connect."""


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the program's business."""
        yield


class Listener:
    """A server that listens; `url` is where, for TCP."""

    def __init__(self, server: uvicorn.Server, serving: "asyncio.Task[None]", url: str, path: Path | None) -> None:
        self.url = url
        self._server = server
        self._serving = serving
        self._path = path

    async def close(self) -> None:
        """Answer what is under way, then stop."""
        self._server.should_exit = True
        await self._serving
        if self._path:
            durable.remove(self._path)


async def listen(application: Application, host: str, port: int, path: Path | None = None) -> Listener:
    """Listen at `host` and `port` (a free one if it is 0), and on a Unix socket at `path` if there is one."""
    tcp = _tcp(host, port)
    try:
        sockets = [tcp, _unix(path)] if path else [tcp]
    except BaseException:
        tcp.close()
        raise
    config = uvicorn.Config(
        application,
        loop="none",
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=IDLE_S,
        timeout_graceful_shutdown=STOP_S,
        backlog=BACKLOG_CONNECTIONS,
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=sockets), name="inference-api")
    await server.listening.wait()
    name = f"[{host}]" if ":" in host else host
    return Listener(server, serving, f"http://{name}:{tcp.getsockname()[1]}", path)


def _tcp(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG_CONNECTIONS)
    except OSError as error:
        raise Unavailable(f"cannot listen on {host}:{port}: {error.strerror}", fix="choose another port") from error


def _unix(path: Path) -> socket.socket:
    """A socket at `path`; one that an agent left behind when it was killed is replaced."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(path.stat().st_mode):
            durable.remove(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        path.chmod(SOCKET_MODE)
    except OSError as error:
        listener.close()
        fix = "choose another path for the socket"
        raise Unavailable(f"cannot listen on {path}: {error.strerror}", fix=fix) from error
    return listener
