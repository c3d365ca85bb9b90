"""Where the inference API listens, and the threads that serve it: a TCP address, a Unix socket, or both.

The threads take turns (`edge_agent.inference.turns`). The one whose turn it is waits for events (epoll), reads what
has come in, and if a core is free it runs the inference too and writes the answer: nothing is handed from thread to
thread. Before a run that is not short it ends its turn, and the next one reads. There is one thread more than there are
cores, and no more requests run than there are cores, so one is always left to read, to refuse and to tell how things
are. Routes that need the event loop are answered there.

No inference runs on the event loop: a model that hangs holds one core, not the agent.
"""

import asyncio
import contextlib
import logging
import os
import select
import socket
import stat
import threading
import time
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from select import EPOLLIN, EPOLLONESHOT
from typing import Final

from common import durable
from common.errors import Unavailable
from edge_agent.inference.connection import Connection
from edge_agent.inference.turns import Turn, Turns
from edge_agent.inference.web import Application, Call, Reply

logger = logging.getLogger(__name__)

STOP_S: Final = 10.0
"""How long requests that are under way may take when the server stops."""
STOP_LOOK_S: Final = 0.02
JOIN_S: Final = 1.0
"""How long a thread that is in a model is waited for when all else has stopped."""
SWEEP_S: Final = 1.0
"""Between two looks for connections that have taken too long."""
BACKLOG_CONNECTIONS: Final = 1024
CONNECTIONS_MAX: Final = 1024
"""Open at one time; one more is told to come back."""
ACCEPTS_MAX: Final = 64
"""Connections that one thread accepts before others may be served."""
EVENTS_MAX: Final = 16
"""That one thread takes at one time, before it runs what has come in."""
RECEIVE_BYTES: Final = 128 * 1024
SOCKET_MODE: Final = 0o660
"""Of a Unix socket: its user and group may connect."""
FULL: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\ncontent-type: application/json\r\n"
    b'content-length: 33\r\n\r\n{"error": "too many connections"}'
)


class Listener:
    """Serves `application` on `sockets` until it is closed; `url` is where, for TCP."""

    def __init__(self, application: Application, sockets: list[socket.socket], url: str, path: Path | None) -> None:
        self.url = url
        self.application = application
        self.stopping = False
        self._path = path
        self._loop = asyncio.get_running_loop()
        self._epoll = select.epoll()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()  # for `_tired`, and so that no socket is closed while somebody shuts it down
        self._connections: dict[int, Connection] = {}
        self._acceptors = {one.fileno(): one for one in sockets}
        self._tired: set[socket.socket] = set()
        self._turns = Turns()
        self._left: list[object] = []  # of the thread whose turn it is
        self._ended = False
        self._date = 0, b""
        self._threads = [
            threading.Thread(target=self._serve, name=f"inference-api-{number}", daemon=True)
            for number in range(application.cores + 1)
        ]

    def start(self) -> None:
        """Begin to serve."""
        self._epoll.register(self._bell, EPOLLIN)
        for fd, acceptor in self._acceptors.items():
            acceptor.setblocking(False)
            self._epoll.register(fd, EPOLLIN | EPOLLONESHOT)
        for thread in self._threads:
            thread.start()
        self._sweeping = self._loop.create_task(self._sweep(), name="inference-api")

    async def close(self) -> None:
        """Answer what is under way, then stop; once."""
        if self.stopping:
            return
        self.stopping = True
        self._sweeping.cancel()
        for fd, acceptor in self._acceptors.items():
            self._epoll.unregister(fd)
            acceptor.close()
        deadline = self.now() + STOP_S
        while self._connections and self.now() < deadline:
            self._expire()
            await asyncio.sleep(STOP_LOOK_S)
        await asyncio.to_thread(self._end)
        if self._path:
            durable.remove(self._path)

    # For connections.

    def arm(self, connection: Connection, events: int) -> None:
        """See `Host.arm`."""
        try:
            self._epoll.modify(connection.socket, events | EPOLLONESHOT)
        except (OSError, ValueError):
            connection.close()

    def on_loop(self, call: Call, to: Connection) -> None:
        """See `Host.on_loop`."""
        answering = _OnLoop(self.application, call, to)
        to.waits(lambda: not self._post(answering.cancel))  # the loop answers or closes, as long as there is one
        if not self._post(answering.start):
            to.abandon()

    def run_soon(self, left: object) -> None:
        """See `Host.run_soon`."""
        self._left.append(left)

    def forget(self, connection: Connection) -> None:
        """See `Host.forget`."""
        with self._lock:
            if self._connections.pop(connection.socket.fileno(), None):
                connection.socket.close()

    def now(self) -> float:
        """See `Host.now`."""
        return time.monotonic()

    def date(self) -> bytes:
        """See `Host.date`."""
        second = int(time.time())
        if second != self._date[0]:
            self._date = second, formatdate(second, usegmt=True).encode()
        return self._date[1]

    def _post(self, what: Callable[[], None]) -> bool:
        """Let the loop do it; whether there still is one."""
        try:
            self._loop.call_soon_threadsafe(what)
        except RuntimeError:
            return False
        return True

    # The threads.

    def _serve(self) -> None:
        buffer = bytearray(RECEIVE_BYTES)
        while not self._ended:
            turn = self._turns.take()
            self._run(turn)  # whoever has lost the turn may have left something
            while not (turn.over or self._ended):
                events = self._epoll.poll(-1, EVENTS_MAX)
                for fd, event in events:
                    self._serve_one(fd, event, buffer)
                turn.reads()
                if self._left:
                    self._run(turn)
            turn.end()

    def _run(self, turn: Turn) -> None:
        left, self._left = self._left, []
        try:
            self.application.run(left, turn)
        except Exception:
            logger.exception("requests failed")

    def _serve_one(self, fd: int, events: int, buffer: bytearray) -> None:
        connection = self._connections.get(fd)
        try:
            if connection is not None:
                connection.ready(events, buffer)
            elif acceptor := self._acceptors.get(fd):
                self._accept(acceptor)
        except Exception:
            logger.exception("a connection failed")
            if connection is not None:
                connection.close()

    def _accept(self, acceptor: socket.socket) -> None:
        try:
            for _ in range(ACCEPTS_MAX):
                self._take(acceptor.accept()[0])
        except BlockingIOError:
            pass
        except OSError as error:
            if not self.stopping:
                logger.warning("no connection can be accepted for a moment: %s", error)
                with self._lock:
                    self._tired.add(acceptor)
            return
        self._listen(acceptor)

    def _listen(self, acceptor: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError):  # it was closed meanwhile
            self._epoll.modify(acceptor, EPOLLIN | EPOLLONESHOT)

    def _take(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        if len(self._connections) >= CONNECTIONS_MAX:
            with contextlib.suppress(OSError):
                connected.send(FULL)
            connected.close()
            return
        if connected.family != socket.AF_UNIX:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = self._connections[connected.fileno()] = Connection(self, connected)
        try:
            self._epoll.register(connected, EPOLLIN | EPOLLONESHOT)
        except OSError:  # the kernel watches as many as it may
            self.forget(connection)
            raise

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self._expire()
            with self._lock:
                tired, self._tired = self._tired, set()
            for acceptor in tired:
                self._listen(acceptor)

    def _expire(self) -> None:
        now = self.now()
        with self._lock:
            for connection in list(self._connections.values()):
                connection.expire(now, stopping=self.stopping)

    def _end(self) -> None:
        """End the threads; one that a model holds is left to it."""
        self._ended = True
        os.eventfd_write(self._bell, 1)
        for thread in self._threads:
            thread.join(JOIN_S)
        for connection in list(self._connections.values()):
            self.forget(connection)
        if not any(thread.is_alive() for thread in self._threads):
            self._epoll.close()
            os.close(self._bell)


class _OnLoop:
    """A call that is answered on the event loop; its methods run there."""

    def __init__(self, application: Application, call: Call, to: Connection) -> None:
        self._application = application
        self._call = call
        self._to = to
        self._left = False
        self._task: asyncio.Task[Reply] | None = None

    def start(self) -> None:
        if self._left:
            return self._to.abandon()
        self._task = asyncio.get_running_loop().create_task(self._application.answer(self._call))
        return self._task.add_done_callback(self._answered)

    def cancel(self) -> None:
        self._left = True
        if self._task:
            self._task.cancel()

    def _answered(self, task: asyncio.Task[Reply]) -> None:
        if task.cancelled():
            self._to.abandon()
        else:
            self._to.send(task.result())


async def listen(application: Application, host: str, port: int, path: Path | None = None) -> Listener:
    """Listen at `host` and `port` (a free one if it is 0), and on a Unix socket at `path` if there is one."""
    tcp = _tcp(host, port)
    try:
        sockets = [tcp, _unix(path)] if path else [tcp]
    except BaseException:
        tcp.close()
        raise
    name = f"[{host}]" if ":" in host else host
    listener = Listener(application, sockets, f"http://{name}:{tcp.getsockname()[1]}", path)
    listener.start()
    return listener


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
        listener.listen(BACKLOG_CONNECTIONS)
    except OSError as error:
        listener.close()
        fix = "choose another path for the socket"
        raise Unavailable(f"cannot listen on {path}: {error.strerror}", fix=fix) from error
    return listener
