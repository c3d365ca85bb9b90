"""A small HTTP application: routes, calls, replies, errors. Nothing here knows about sockets or models.

A route is answered in one of two ways. A coroutine answers on the event loop. A `Direct` route answers on the thread
that has read the request, or leaves the answer to another thread; it must not wait. Every error, also one of a handler,
becomes a JSON document.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, NamedTuple, Protocol

import msgspec

from common.errors import DeadlineExceeded, FerryError, Forbidden, InvalidInput, NotFound, TooLarge, Unavailable
from edge_agent.inference.bodies import Bodies, BodyLimits
from edge_agent.inference.turns import Turn

logger = logging.getLogger(__name__)

JSON: Final = b"application/json"
RETRY_AFTER_S: Final = 1
HEADS_MAX: Final = 256
"""Request heads that are remembered; when there are more, all are forgotten."""
HEAD_BYTES_KNOWN_MAX: Final = 2048
"""Longer ones are not remembered."""


class NoSuchPath(NotFound):
    """Nothing is at this path."""


class WrongMethod(FerryError):
    """The path exists for other methods only."""

    code = "method_not_allowed"

    def __init__(self, message: str, allowed: str) -> None:
        super().__init__(message, fix=f"use {allowed}")
        self.allowed = allowed


class HeadTooLarge(TooLarge):
    """The request line and headers take too much."""

    code = "head_too_large"


class SentTooSlowly(FerryError):
    """The request did not come in within its time."""

    code = "sent_too_slowly"


_STATUS: tuple[tuple[type[FerryError], int], ...] = (
    (HeadTooLarge, 431),
    (SentTooSlowly, 408),
    (TooLarge, 413),
    (InvalidInput, 400),
    (NotFound, 404),
    (WrongMethod, 405),
    (Forbidden, 403),
    (DeadlineExceeded, 504),
    (Unavailable, 503),
    (FerryError, 500),
)


class Reply(NamedTuple):
    """A response."""

    body: bytes
    status: int = 200
    headers: tuple[tuple[bytes, bytes], ...] = ((b"content-type", JSON),)


class Call:
    """One request: its method, path and headers (names in lower case), what its path names, and its body, unpacked.

    `memo` is for what a route found out from the head; requests with an equal head may share it.
    """

    __slots__ = ("body", "headers", "memo", "method", "named", "path", "route")

    def __init__(self, method: str, path: str, headers: dict[bytes, bytes]) -> None:
        self.method = method
        self.path = path
        self.headers = headers
        self.named: dict[str, str] = {}
        self.memo: dict[str, Any] = {}
        self.body = b""
        self.route: Handler | Direct

    def again(self, body: bytes) -> "Call":
        """A call with the same head."""
        call = Call(self.method, self.path, self.headers)
        call.named, call.memo, call.route, call.body = self.named, self.memo, self.route, body
        return call

    def header(self, name: bytes) -> str:
        """The value of a header, empty without one."""
        return self.headers.get(name, b"").decode("latin-1")


class Heads:
    """Heads of requests that came before, as bytes, what they mean, and the length of the body that follows.

    The callers of a device send the same head again and again. Safe for threads: at worst, two remember the same.
    """

    def __init__(self) -> None:
        self._known: dict[bytes, tuple[Call, int]] = {}

    def get(self, head: bytes) -> tuple[Call, int] | None:
        """The call that came with this head, and its body's length."""
        return self._known.get(head)

    def keep(self, head: bytes, call: Call, length: int) -> None:
        """A whole request of one connection that stays had this head, and a body as it is, `length` bytes long."""
        if len(head) > HEAD_BYTES_KNOWN_MAX:
            return
        if len(self._known) >= HEADS_MAX:
            self._known.clear()
        self._known[head] = call.again(b""), length


class Answerer(Protocol):
    """Who sends the reply to one call."""

    def send(self, reply: Reply) -> None:
        """Once, from any thread; never raises."""
        ...

    def waits(self, cancel: Callable[[], bool]) -> None:
        """The reply may take a while: `cancel` is called if the caller leaves meanwhile. It returns whether no reply
        will come because of that.
        """
        ...


Handler = Callable[[Call], Awaitable[Reply]]


class Direct(Protocol):
    """A route that is answered on any thread."""

    def begin(self, call: Call) -> None:
        """Raise if the call will not be answered. It spares reading a body, so it may be left out when that is here."""
        ...

    def overfull(self, call: Call) -> None:
        """There is no room for the call's body."""
        ...

    def answer(self, call: Call, to: Answerer) -> object | None:
        """Answer now or later, or raise why not. What is returned must still be run, by the application's `run`."""
        ...


Run = Callable[[Sequence[Any], Turn], None]


def run_nothing(_left: Sequence[Any], _turn: Turn) -> None:
    """For applications whose direct routes leave nothing to run."""


class Application:
    """Routes by method and path. A segment of a path in braces names what stands in its place. `run` runs what direct
    routes have left to run, on the calling thread or others; `cores` is how many threads that may hold at one time.
    """

    def __init__(self, limits: BodyLimits | None = None, cores: int = 1, run: "Run" = run_nothing) -> None:
        self.cores = cores
        self.run = run
        self.bodies = Bodies(limits or BodyLimits())
        self.paths: list[str] = []
        self._root: dict[str, Any] = {}
        self.heads = Heads()

    def add(self, method: str, path: str, route: Handler | Direct) -> None:
        """Let `route` answer `method` on `path`. A fixed segment goes before a named one."""
        self.paths.append(path)
        node = self._root
        for segment in path.strip("/").split("/"):
            named = segment.startswith("{")
            if named:
                node[_NAME] = segment.strip("{}")
            node = node.setdefault(_ANY if named else segment, {})
        node.setdefault(_METHODS, {})[method] = route

    def begin(self, method: str, path: str, headers: dict[bytes, bytes]) -> Call:
        """The call with this head; its body is still to come. Raises `NoSuchPath`, `WrongMethod`, or what its route
        has against it.
        """
        call = Call(method, path, headers)
        call.route = self._find(call)
        if not callable(call.route):
            call.route.begin(call)
        return call

    async def answer(self, call: Call) -> Reply:
        """The reply of a route that answers on the event loop."""
        if not callable(call.route):
            raise AssertionError("this route is answered by the thread that has read the call")  # noqa: TRY004
        try:
            return await call.route(call)
        except Exception as error:  # noqa: BLE001 (whatever it is, the caller gets an answer)
            return reply_to(error)

    def _find(self, call: Call) -> "Handler | Direct":
        """Who answers; `NoSuchPath`, `WrongMethod`."""
        node = self._root
        for segment in call.path.strip("/").split("/"):
            below = node.get(segment)
            if below is None and segment and _ANY in node:
                below = node[_ANY]
                call.named[node[_NAME]] = segment
            if below is None:
                raise NoSuchPath(f"nothing is at {call.path[:200]}")
            node = below
        methods: dict[str, Handler | Direct] = node.get(_METHODS, {})
        if not methods:
            raise NoSuchPath(f"nothing is at {call.path[:200]}")
        if call.method not in methods:
            raise WrongMethod(f"{call.method} is not possible at {call.path[:200]}", ", ".join(sorted(methods)))
        return methods[call.method]


# Keys of the tree of paths that no segment equals.
_ANY, _NAME, _METHODS = "/any", "/name", "/methods"


def document(content: Any, status: int = 200) -> Reply:
    """A JSON document."""
    return Reply(msgspec.json.encode(content), status)


def error_document(words: str, status: int) -> Reply:
    """What every error looks like."""
    return document({"error": words}, status)


def reply_to(error: Exception) -> Reply:
    """The reply to a call that failed so; what nobody expected goes to the log."""
    if not isinstance(error, FerryError):
        logger.error("inference request failed", exc_info=error)
        return error_document("internal error; the agent's log has the details", 500)
    status = next(status for kind, status in _STATUS if isinstance(error, kind))
    reply = error_document(str(error), status)
    if isinstance(error, WrongMethod):
        return reply._replace(headers=(*reply.headers, (b"allow", error.allowed.encode())))
    if status == 503:
        return reply._replace(headers=(*reply.headers, (b"retry-after", str(RETRY_AFTER_S).encode())))
    return reply
