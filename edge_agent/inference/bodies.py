"""Request bodies: unpacked as they come in, and bounded one by one and all together. Safe for threads.

Nothing here knows about sockets. A body that is refused is given up at once; nobody holds what came of it.
"""

import threading
import zlib
from collections.abc import Callable, Iterator
from typing import Final

import msgspec

from common.errors import InvalidInput, TooLarge, Unavailable

SMALL_BYTES: Final = 16 * 1024
"""A body of one piece that is no larger is not counted among those in memory: each request would pay for it, and a
connection has few of them.
"""
UNPACKED_BYTES: Final = 256 * 1024
"""Of a compressed body, unpacked at a time."""


class BodyLimits(msgspec.Struct, frozen=True):
    """How much callers may send."""

    body_bytes_max: int = 32 * 1024 * 1024
    """One request body, after decompression."""
    bodies_bytes_max: int = 256 * 1024 * 1024
    """All request bodies that are in memory at one time."""


class Overfull(Unavailable):
    """The bodies in memory leave no room for another one."""

    code = "overloaded"


class Bodies:
    """All bodies that are in memory."""

    def __init__(self, limits: BodyLimits) -> None:
        self._limits = limits
        self.small = min(SMALL_BYTES, limits.body_bytes_max)
        self._lock = threading.Lock()
        self._held = 0

    def begin(self, announced: str, coding: str) -> "Body":
        """A body of which the headers announce the length (empty: they do not) and the coding.

        Raises `TooLarge`, and `InvalidInput` for a coding that is not known.
        """
        if announced.isdigit():
            self._check(int(announced))
        return Body(self, _unpacker(coding.strip().lower()))

    def hold(self, size: int, more: int) -> None:
        """`more` bytes of a body that is `size` bytes long with them; `TooLarge`, `Overfull`."""
        self._check(size)
        with self._lock:
            if self._held + more > self._limits.bodies_bytes_max:
                raise Overfull("too many large requests at once", fix="try again a little later")
            self._held += more

    def release(self, size: int) -> None:
        """So many bytes are needed no more."""
        with self._lock:
            self._held -= size

    def _check(self, size: int) -> None:
        limit = self._limits.body_bytes_max
        if size > limit:
            raise TooLarge("the request body is too large", field="body", fix=f"send at most {limit} bytes")


class Body:
    """One request's body while it comes in."""

    __slots__ = ("_bodies", "_data", "_held", "_unpack")

    def __init__(self, bodies: Bodies, unpack: "Callable[[bytes, bool], Iterator[bytes]] | None") -> None:
        self._bodies = bodies
        self._unpack = unpack
        self._data: bytes | bytearray = b""
        self._held = 0

    def add(self, chunk: bytes) -> None:
        """What has come in. Raises `TooLarge`, `Overfull`, and `InvalidInput` if it is not packed as announced."""
        if not self._data and self._unpack is None and len(chunk) <= self._bodies.small:
            self._data = chunk
            return
        for piece in self._unpack(chunk, False) if self._unpack else (chunk,):
            size = len(piece) + len(self._data)
            self._bodies.hold(size, size - self._held)
            self._held = size
            self._append(piece)

    def _append(self, piece: bytes) -> None:
        """To one array: a list of pieces as small as a caller likes would take many times their bytes."""
        if not self._data:
            self._data = piece
            return
        if isinstance(self._data, bytes):
            self._data = bytearray(self._data)
        self._data += piece

    def whole(self) -> bytes:
        """All of it; `InvalidInput` if it is cut off."""
        if self._unpack:
            for _ in self._unpack(b"", True):
                pass
        return bytes(self._data)

    def release(self) -> None:
        """It is needed no more."""
        if self._held:
            self._bodies.release(self._held)
            self._held = 0
        self._data = b""


def _unpacker(coding: str) -> "Callable[[bytes, bool], Iterator[bytes]] | None":
    """Pieces of the body from a chunk and whether the body has ended; None if it is not packed."""
    if coding in {"", "identity"}:
        return None
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
