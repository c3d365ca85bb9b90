"""Requests out of bytes: HTTP/1.1 as llhttp reads it (through httptools), with limits. No sockets here.

Bytes go in with `feed`; whole requests come out of `complete`, in their order. A request that is refused is among them
as soon as that is clear: if the rest of it has not come in by then, nothing more is read, and `broken` is true.

An offer of another protocol (`Upgrade`) is not taken up (RFC 9110, section 7.8); the parser does not read the body of
such a request, so one with a body is refused.
"""

from collections import deque
from typing import Final
from urllib.parse import unquote

import httptools

from common.errors import FerryError, InvalidInput
from edge_agent.inference.bodies import SMALL_BYTES, Body, Overfull
from edge_agent.inference.web import HEAD_BYTES_KNOWN_MAX, Application, Call, HeadTooLarge

HEAD_BYTES_MAX: Final = 32 * 1024
"""Request line and headers; trailers too."""
END_OF_HEAD: Final = b"\r\n\r\n"
PIPELINED_MAX: Final = 16
"""Requests of one connection that wait for the answers to those before them; after so many it is closed."""


class Incoming:
    """One request: `call` when its head was found good, `error` when it is refused.

    `keep` says whether the connection may stay, `old` that its sender speaks HTTP/1.0, `expects` that it waits to be
    told to send its body, `cut` that what follows is not read.
    """

    __slots__ = (
        "body", "call", "cut", "error", "expects", "head_bytes", "head_done", "headers", "keep", "method", "old", "url",
    )  # fmt: skip

    def __init__(self) -> None:
        self.call: Call | None = None
        self.error: Exception | None = None
        self.body: Body | None = None
        self.headers: dict[bytes, bytes] = {}
        self.head_bytes = 0
        self.head_done = False
        self.url = b""
        self.method = ""
        self.keep = self.old = self.expects = self.cut = False

    def release(self) -> None:
        """Its body is needed no more."""
        if self.body:
            self.body.release()


class Reader:
    """The requests of one connection to `application`."""

    def __init__(self, application: Application) -> None:
        self._application = application
        self._parser = httptools.HttpRequestParser(self)
        self._fed = 0
        self._head, self._size = b"", 0
        self.coming: Incoming | None = None
        """The one of which only a part has come in."""
        self.complete: deque[Incoming] = deque()
        self.broken = False

    def feed(self, buffer: bytearray, size: int) -> None:
        """`size` more bytes, at the beginning of `buffer`; they are needed no longer than this takes."""
        before = self.coming
        if before is None and not self.broken and self._recognised(buffer, size):
            return
        try:
            self._parser.feed_data(memoryview(buffer)[:size])
        except httptools.HttpParserUpgrade:
            self._stay()
        except httptools.HttpParserError as error:
            self._break(InvalidInput(f"not HTTP: {error}", field="request", fix="send HTTP/1.1"))
        coming = self.coming
        if coming is None or self.broken:
            return
        if not coming.head_done and coming is before:
            self._fed += size
            if self._fed > HEAD_BYTES_MAX:
                coming.error = _head_too_large()
        if coming.error:
            self._break(coming.error)

    def _recognised(self, buffer: bytearray, size: int) -> bool:
        """Whether this is one whole request with a head that was parsed before; then it needs no parser.

        The parser is between two requests and stays there. Only a head that it has accepted, with its length, is known.
        """
        self._head = b""
        end = buffer.find(END_OF_HEAD, 0, min(size, HEAD_BYTES_KNOWN_MAX)) + len(END_OF_HEAD)
        if end < len(END_OF_HEAD):
            return False
        data = memoryview(buffer)
        head = bytes(data[:end])
        known = self._application.heads.get(head)
        if known is None:
            self._head, self._size = head, size
            return False
        call, length = known
        if size != end + length:
            return False
        incoming = Incoming()
        incoming.method, incoming.keep, incoming.head_done = call.method, True, True
        incoming.call = call.again(bytes(data[end:size]))
        self.complete.append(incoming)
        return True

    def _remember(self, incoming: Incoming) -> None:
        """A request came in whole. If it was all that was fed, and its body is as it was sent, others with its head may
        be recognised.
        """
        head, self._head = self._head, b""
        if not incoming.call or incoming.error or not incoming.keep or incoming.old or incoming.expects:
            return
        headers, length = incoming.headers, len(incoming.call.body)
        line = b"%s %s HTTP/1.1\r\n" % (incoming.method.encode(), incoming.url)
        whole = head.startswith(line) and self._size == len(head) + length <= len(head) + SMALL_BYTES
        if whole and not headers.keys() & {b"transfer-encoding", b"content-encoding", b"upgrade"}:
            self._application.heads.keep(head, incoming.call, length)

    def give_up(self, error: Exception) -> None:
        """The request that has come in in part is refused."""
        self._break(error)

    def close(self) -> None:
        """Nobody will answer what is left."""
        self.broken = True
        for one in (*self.complete, *([self.coming] if self.coming else [])):
            one.release()
        self.complete.clear()
        self.coming = None

    # What the parser calls.

    def on_message_begin(self) -> None:
        self.coming = None if self.broken else Incoming()
        self._fed = 0

    def on_url(self, url: bytes) -> None:
        if self.coming:
            self.coming.url += url
            self.coming.head_bytes += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if coming := self.coming:
            coming.head_bytes += len(name) + len(value)
            if not coming.head_done:  # trailers are not headers
                coming.headers[name.lower()] = value
            elif coming.head_bytes > HEAD_BYTES_MAX:
                coming.error = coming.error or _head_too_large()

    def on_headers_complete(self) -> None:
        coming = self.coming
        if coming is None:
            return
        coming.head_done = True
        coming.method = self._parser.get_method().decode("ascii")
        coming.old = self._parser.get_http_version() == "1.0"
        try:
            self._begin(coming)
        except Exception as error:  # noqa: BLE001 (it is the answer)
            coming.error = error

    def on_body(self, chunk: bytes) -> None:
        coming = self.coming
        if coming is None or coming.error or coming.body is None or coming.call is None:
            return
        try:
            coming.body.add(chunk)
        except Exception as error:  # noqa: BLE001 (it is the answer)
            coming.error = error
            coming.release()
            if isinstance(error, Overfull) and not callable(coming.call.route):
                coming.call.route.overfull(coming.call)

    def on_message_complete(self) -> None:
        coming, self.coming = self.coming, None
        if coming is None:
            return
        coming.keep = self._parser.should_keep_alive()
        try:
            if coming.error is None and coming.body and coming.call:
                coming.call.body = coming.body.whole()
        except FerryError as error:
            coming.error = error
        self._add(coming)
        if self._head:
            self._remember(coming)

    def _begin(self, coming: Incoming) -> None:
        """The head is complete; raises what is wrong with it."""
        if coming.head_bytes > HEAD_BYTES_MAX:
            raise _head_too_large()
        headers = coming.headers
        coming.call = call = self._application.begin(coming.method, _path(coming.url), headers)
        length, coding = call.header(b"content-length"), call.header(b"content-encoding")
        if length or b"transfer-encoding" in headers:
            coming.body = self._application.bodies.begin(length, coding)
            coming.expects = headers.get(b"expect", b"").lower() == b"100-continue" and not coming.old

    def _add(self, incoming: Incoming) -> None:
        self.complete.append(incoming)
        if len(self.complete) >= PIPELINED_MAX:
            incoming.keep, incoming.cut = False, True
        self.broken = self.broken or not incoming.keep

    def _break(self, error: Exception) -> None:
        coming, self.coming = self.coming or Incoming(), None
        if self.broken:  # what comes after a request that was the last one
            return
        coming.release()
        coming.error, coming.keep, coming.cut = error, False, True
        self._add(coming)

    def _stay(self) -> None:
        """An offer of another protocol was read, and nothing behind it."""
        last = self.complete[-1] if self.complete else None
        if last is None:
            return
        last.keep, self.broken = False, True
        if last.body is not None and last.error is None:
            fix = "leave the header Upgrade out"
            last.error = InvalidInput("another protocol is offered beside a body", field="Upgrade", fix=fix)


def _path(url: bytes) -> str:
    """The path of a request target, decoded; `InvalidInput`."""
    try:
        raw = url.partition(b"?")[0] if url.startswith(b"/") else httptools.parse_url(url).path or b"/"
        path: str = raw.decode("ascii")
    except (httptools.HttpParserInvalidURLError, UnicodeDecodeError) as error:
        raise InvalidInput("not a path", field="request", fix="send the path percent-encoded") from error
    return unquote(path) if "%" in path else path


def _head_too_large() -> HeadTooLarge:
    fix = f"send at most {HEAD_BYTES_MAX} bytes of them"
    return HeadTooLarge("the request line and headers are too large", field="headers", fix=fix)
