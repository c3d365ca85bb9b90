"""One connection: reads requests, has them answered one after another, writes the replies. No models here.

One thread owns a connection at a time. Whoever arms it (tells the kernel what to wait for) or hands its request on lets
go of it: the next event, or the answer, makes another thread the owner, perhaps at once. So nothing touches it after
that, and no lock is needed. Two things only are done to a connection that somebody else owns: `expire` shuts its socket
down, which its owner sees as the end of what comes in, and `ready` cancels a request whose caller has left.

The answer is written by the thread that has it; nobody is woken to write.
"""

import contextlib
import logging
import math
import select
import socket
from collections.abc import Callable
from functools import lru_cache
from http import HTTPStatus
from select import EPOLLIN, EPOLLOUT, EPOLLRDHUP
from typing import Final, Protocol

from edge_agent.inference.reading import Incoming, Reader
from edge_agent.inference.web import Application, Call, Reply, SentTooSlowly, reply_to

logger = logging.getLogger(__name__)

IDLE_S: Final = 75.0
"""How long a connection may be silent between two requests."""
HEAD_S: Final = 20.0
"""How long a request line and its headers may take to come in."""
BODY_S: Final = 300.0
"""How long the rest of a request may take."""
WRITE_S: Final = 60.0
"""How long a caller may take to read any more of an answer."""
LINGER_S: Final = 2.0
"""How long what follows a refused request is read and thrown away: a reset would take the answer from its caller."""
JOIN_BYTES_MAX: Final = 64 * 1024
"""A longer answer is not copied behind its headers."""
STARTS_MAX: Final = 256
"""Beginnings of replies that are remembered."""
CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"

_LINES: Final = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}
_CLOSE: Final = b"connection: close\r\n"
_KEEP: Final = b"connection: keep-alive\r\n"
_NEVER: Final = math.inf


class Host(Protocol):
    """Who keeps connections."""

    application: Application
    stopping: bool

    def arm(self, connection: "Connection", events: int) -> None:
        """Let the next one of `events` find a thread; from now on the connection is not the caller's."""
        ...

    def on_loop(self, call: Call, to: "Connection") -> None:
        """Let the event loop answer; from now on the connection is not the caller's."""
        ...

    def run_soon(self, left: object) -> None:
        """Run what a direct route has left, when all that has come in is read."""
        ...

    def forget(self, connection: "Connection") -> None:
        """Close its socket."""
        ...

    def now(self) -> float:
        """Monotonic seconds."""
        ...

    def date(self) -> bytes:
        """The time for the header `Date`."""
        ...


class Connection:
    """See the module's text. It is shut down at `deadline` (monotonic seconds)."""

    __slots__ = (
        "_answering", "_cancel", "_closing", "_draining", "_host", "_late", "_reader", "_timed", "_unsent", "deadline",
        "socket",
    )  # fmt: skip

    def __init__(self, host: Host, connected: socket.socket) -> None:
        self.socket = connected
        self.deadline = host.now() + IDLE_S
        self._host = host
        self._reader = Reader(host.application)
        self._timed: tuple[Incoming | None, bool] = (None, False)
        self._answering: Incoming | None = None
        self._cancel: Callable[[], bool] | None = None
        self._unsent: list[memoryview] = []
        self._closing = self._draining = self._late = False

    def ready(self, events: int, buffer: bytearray) -> None:
        """One of the armed events has come, so the calling thread owns the connection; what is read goes through
        `buffer`. While a request waits there is one event only, that its caller leaves, and it gives no ownership.
        """
        if events & EPOLLRDHUP:
            self._left()
        elif self._unsent:
            self._flush()
        elif self._reader.complete:
            self._next()
        else:
            self._receive(buffer)

    def expire(self, now: float, *, stopping: bool = False) -> None:
        """Shut it down if its time has passed, or if it has nothing to do and all is `stopping`. Others may own it."""
        idle = self._answering is None and self._reader.coming is None and not self._unsent
        if now < self.deadline and not (stopping and idle):
            return
        self._late = True
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR if self._unsent else socket.SHUT_RD)

    def abandon(self) -> None:
        """No answer will come."""
        self.close()

    def close(self) -> None:
        """End it."""
        self.deadline = _NEVER
        self._reader.close()
        if self._answering:
            self._answering.release()
        self._host.forget(self)

    # For whoever answers.

    def waits(self, cancel: Callable[[], bool]) -> None:
        """See `Answerer.waits`."""
        self._cancel = cancel
        self._host.arm(self, EPOLLRDHUP)

    def send(self, reply: Reply) -> None:
        """See `Answerer.send`."""
        incoming, self._answering, self._cancel = self._answering, None, None
        if incoming is None:
            raise AssertionError("nobody waits for a reply")
        incoming.release()
        self._closing = not incoming.keep or self._host.stopping
        self._draining = incoming.cut
        try:
            self._unsent = self._encoded(reply, incoming)
        except Exception:  # no memory, for one; who answers may hold a core and has others to serve
            logger.exception("an answer cannot be sent")
            return self.close()
        return self._flush()

    def _encoded(self, reply: Reply, incoming: Incoming) -> list[memoryview]:
        head = self._head(reply, incoming)
        if incoming.method == "HEAD":
            return [memoryview(head)]
        if len(reply.body) <= JOIN_BYTES_MAX:
            return [memoryview(head + reply.body)]
        return [memoryview(head), memoryview(reply.body)]

    def _head(self, reply: Reply, incoming: Incoming) -> bytes:
        stays = b"" if not self._closing and not incoming.old else _CLOSE if self._closing else _KEEP
        date, length = self._host.date(), len(reply.body)
        return b"%b%bdate: %b\r\ncontent-length: %d\r\n\r\n" % (
            _start(reply.status, reply.headers),
            stays,
            date,
            length,
        )

    # For the owner.

    def _flush(self) -> None:
        """Write what there is to write, then go on."""
        try:
            while self._unsent:
                sent = self.socket.send(self._unsent[0])
                if sent < len(self._unsent[0]):
                    self._unsent[0] = self._unsent[0][sent:]
                else:
                    del self._unsent[0]
        except (BlockingIOError, InterruptedError):
            self.deadline = self._host.now() + WRITE_S
            return self._host.arm(self, EPOLLOUT)
        except OSError:  # the caller has left
            return self.close()
        if not self._closing:
            return self._wait()
        return self._linger() if self._draining else self.close()

    def _linger(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
        self.deadline = self._host.now() + LINGER_S
        self._host.arm(self, EPOLLIN)

    def _wait(self) -> None:
        """For the next request, or for a thread to answer it: this one may hold a core for the request before."""
        reader = self._reader
        if reader.complete:
            return self._host.arm(self, EPOLLOUT)
        coming = reader.coming
        if self._host.stopping and coming is None:
            return self.close()
        stage = coming, coming is not None and coming.head_done
        if stage != self._timed or coming is None:
            self._timed = stage
            self.deadline = self._host.now() + (IDLE_S if coming is None else BODY_S if stage[1] else HEAD_S)
        return self._host.arm(self, EPOLLIN)

    def _receive(self, buffer: bytearray) -> None:
        try:
            size = self.socket.recv_into(buffer)
        except (BlockingIOError, InterruptedError):
            return self._host.arm(self, EPOLLIN)
        except OSError:
            return self.close()
        if size == 0:
            return self._ended()
        if self._draining:
            return self._host.arm(self, EPOLLIN)
        self._reader.feed(buffer, size)
        return self._next()

    def _ended(self) -> None:
        """Nothing more comes in: the caller has left, or took too long."""
        if not self._late or self._draining or self._reader.coming is None:
            return self.close()
        self._reader.give_up(SentTooSlowly("the request did not come in within its time", fix="send it faster"))
        return self._next()

    def _next(self) -> None:
        """Answer what has come in, if it is whole."""
        reader = self._reader
        if reader.complete:
            return self._answer(reader.complete.popleft())
        if reader.coming and reader.coming.expects:
            reader.coming.expects = False
            with contextlib.suppress(OSError):  # a full buffer, or nobody there: the next read will tell
                self.socket.send(CONTINUE)
        return self._wait()

    def _answer(self, incoming: Incoming) -> None:
        self._answering = incoming
        self.deadline = _NEVER
        call = incoming.call
        if incoming.error is not None or call is None:
            return self.send(reply_to(incoming.error or AssertionError("a request without a call")))
        if callable(call.route):
            return self._host.on_loop(call, self)
        try:
            left = call.route.answer(call, self)
        except Exception as error:  # noqa: BLE001 (whatever it is, the caller gets an answer)
            return self.send(reply_to(error))
        if left is not None:
            self._host.run_soon(left)
        return None

    def _left(self) -> None:
        """The caller seems to have left. Whoever can still cancel the request owns the connection."""
        cancel = self._cancel
        if cancel is not None and _has_left(self.socket) and cancel():
            self.close()


@lru_cache(STARTS_MAX)
def _start(status: int, headers: tuple[tuple[bytes, bytes], ...]) -> bytes:
    """The status line and the reply's own headers."""
    return _LINES[status] + b"".join(b"%b: %b\r\n" % header for header in headers)


def _has_left(connected: socket.socket) -> bool:
    """Whether the other side has closed; an event may have been meant for the socket that had this number before."""
    try:
        poller = select.poll()
        poller.register(connected, select.POLLRDHUP)
        return bool(poller.poll(0))
    except (OSError, ValueError):
        return False
