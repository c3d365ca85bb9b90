"""A small HTTP application on ASGI: routes, bodies, replies, errors. Nothing here knows about models.

A body is read whole, unpacked if it is compressed, and never held beyond `BodyLimits`. Every error, also one of a
handler, becomes a JSON document. A caller who leaves before the answer takes the request along.

Source: ASGI specification 2.5, "HTTP & WebSocket ASGI Message Format".
"""

import asyncio
import logging
import zlib
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any, Final, NamedTuple

import msgspec

from common.errors import DeadlineExceeded, FerryError, Forbidden, InvalidInput, NotFound, TooLarge, Unavailable

logger = logging.getLogger(__name__)

JSON: Final = b"application/json"
RETRY_AFTER_S: Final = 1
PATIENCE_S: Final = 0.25
"""After so long without an answer it is watched whether the caller is still there."""
UNPACKED_BYTES: Final = 256 * 1024
"""Of a compressed body, unpacked at a time."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class BodyLimits(msgspec.Struct, frozen=True):
    """How much callers may send."""

    body_bytes_max: int = 32 * 1024 * 1024
    """One request body, after decompression."""
    bodies_bytes_max: int = 256 * 1024 * 1024
    """All request bodies that are in memory at one time."""


class Gone(Exception):
    """The caller has left; nobody waits for an answer."""


class NoSuchPath(NotFound):
    """Nothing is at this path."""


class WrongMethod(FerryError):
    """The path exists for other methods only."""

    code = "method_not_allowed"

    def __init__(self, message: str, allowed: str) -> None:
        super().__init__(message, fix=f"use {allowed}")
        self.allowed = allowed


class Overfull(Unavailable):
    """The bodies in memory leave no room for another one."""

    code = "overloaded"


_STATUS: tuple[tuple[type[FerryError], int], ...] = (
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
    """One request: its method, its headers (names in lower case), and what its path names."""

    __slots__ = ("headers", "method", "named", "path", "read", "receive")

    def __init__(self, scope: MutableMapping[str, Any], receive: Receive) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.named: dict[str, str] = {}
        self.read = False
        self.receive = receive

    async def next(self) -> tuple[bytes, bool]:
        """The next piece of the body, and whether there are more; `Gone` if the caller has left."""
        message = await self.receive()
        if message["type"] == "http.disconnect":
            raise Gone
        return message["body"], message.get("more_body", False)

    def header(self, name: bytes) -> str:
        """The value of a header, empty without one."""
        return self.headers.get(name, b"").decode("latin-1")


Handler = Callable[[Call], Awaitable[Reply]]


class Application:
    """Handlers by method and path. A segment of a path in braces names what stands in its place."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self._root: dict[str, Any] = {}

    def add(self, method: str, path: str, handler: Handler) -> None:
        """Let `handler` answer `method` on `path`. A fixed segment goes before a named one."""
        self.paths.append(path)
        node = self._root
        for segment in path.strip("/").split("/"):
            named = segment.startswith("{")
            if named:
                node[_NAME] = segment.strip("{}")
            node = node.setdefault(_ANY if named else segment, {})
        node.setdefault(_METHODS, {})[method] = handler

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """The ASGI entry point."""
        call = Call(scope, receive)
        watch = _Watch(call)
        try:
            reply = await self._find(call)(call)
        except Gone:
            return
        except asyncio.CancelledError:
            if not watch.left:
                raise
            return
        except FerryError as error:
            reply = _error(error)
        except Exception:
            logger.exception("inference request failed")
            reply = _document_of("internal error; the agent's log has the details", 500)
        finally:
            watch.end()
        length = (b"content-length", str(len(reply.body)).encode())
        await send({"type": "http.response.start", "status": reply.status, "headers": [*reply.headers, length]})
        await send({"type": "http.response.body", "body": reply.body})

    def _find(self, call: Call) -> Handler:
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
        methods: dict[str, Handler] = node.get(_METHODS, {})
        if not methods:
            raise NoSuchPath(f"nothing is at {call.path[:200]}")
        if call.method not in methods:
            raise WrongMethod(f"{call.method} is not possible at {call.path[:200]}", ", ".join(sorted(methods)))
        return methods[call.method]


# Keys of the tree of paths that no segment equals.
_ANY, _NAME, _METHODS = "/any", "/name", "/methods"


class _Watch:
    """Cancels the task of a call whose caller leaves while the answer takes its time."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._task = asyncio.current_task()
        self._loop = asyncio.get_running_loop()
        self._watching: asyncio.Task[None] | None = None
        self.left = False
        self._timer = self._loop.call_later(PATIENCE_S, self._look)

    def end(self) -> None:
        self._timer.cancel()
        if self._watching:
            self._watching.cancel()

    def _look(self) -> None:
        if self._call.read:  # before that the handler itself is told
            self._watching = self._loop.create_task(self._watch())
        else:
            self._timer = self._loop.call_later(PATIENCE_S, self._look)

    async def _watch(self) -> None:
        while (await self._call.receive())["type"] != "http.disconnect":
            pass
        self.left = True
        if self._task:
            self._task.cancel()


class Bodies:
    """Reads request bodies, and knows how much of them is in memory."""

    def __init__(self, limits: BodyLimits) -> None:
        self._limits = limits
        self._held = 0

    async def read(self, call: Call) -> bytes:
        """The whole body, unpacked; its length is given back with `release`.

        Raises `TooLarge`, `Overfull`, `Gone`, and `InvalidInput` for a body that is not packed as its header says.
        """
        announced = call.header(b"content-length")
        self._check(int(announced) if announced.isdigit() else 0)
        unpack = _unpacker(call.header(b"content-encoding").strip().lower())
        pieces: list[bytes] = []
        size, more = 0, True
        try:
            while more:
                chunk, more = await call.next()
                for piece in unpack(chunk, not more):
                    pieces.append(piece)
                    size += len(piece)
                    self._held += len(piece)
                    self._check(size)
        except BaseException:
            self._held -= size
            raise
        call.read = True
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def release(self, size: int) -> None:
        """A body of `size` bytes is needed no more."""
        self._held -= size

    def _check(self, size: int) -> None:
        limit = self._limits.body_bytes_max
        if size > limit:
            raise TooLarge("the request body is too large", field="body", fix=f"send at most {limit} bytes")
        if self._held > self._limits.bodies_bytes_max:
            raise Overfull("too many large requests at once", fix="try again a little later")


def _unpacker(coding: str) -> Callable[[bytes, bool], Iterator[bytes]]:
    """Pieces of the body from a chunk and whether it is the last one."""
    if coding in {"", "identity"}:
        return lambda chunk, _: iter((chunk,))
    if coding not in {"gzip", "deflate"}:
        fix = "use gzip, deflate or none"
        raise InvalidInput(f"the coding {coding[:40]!r} is unknown", field="Content-Encoding", fix=fix)
    inflater = zlib.decompressobj(wbits=zlib.MAX_WBITS + (16 if coding == "gzip" else 0))

    def unpack(chunk: bytes, last: bool) -> Iterator[bytes]:
        try:
            while chunk:
                yield inflater.decompress(chunk, UNPACKED_BYTES)
                chunk = inflater.unconsumed_tail
            if last and not inflater.eof:
                raise InvalidInput("the compressed body is cut off", field="body", fix="send all of it")
        except zlib.error as error:
            raise InvalidInput(f"the body cannot be read: {error}", field="body", fix="check its encoding") from error

    return unpack


def packed(body: bytes, coding: str) -> bytes:
    """`body` in the coding `gzip` or `deflate`."""
    deflater = zlib.compressobj(wbits=zlib.MAX_WBITS + (16 if coding == "gzip" else 0))
    return deflater.compress(body) + deflater.flush()


def document(content: Any, status: int = 200) -> Reply:
    """A JSON document."""
    return Reply(msgspec.json.encode(content), status)


def _document_of(words: str, status: int) -> Reply:
    return document({"error": words}, status)


def _error(error: FerryError) -> Reply:
    status = next(status for kind, status in _STATUS if isinstance(error, kind))
    reply = _document_of(str(error), status)
    if isinstance(error, WrongMethod):
        return reply._replace(headers=(*reply.headers, (b"allow", error.allowed.encode())))
    if status == 503:
        return reply._replace(headers=(*reply.headers, (b"retry-after", str(RETRY_AFTER_S).encode())))
    return reply
