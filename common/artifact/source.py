"""Bytes that can be read at any place, without saying where they are.

Models are larger than what a device wants to hold in memory, so whatever reads one (the ONNX reader, the patch codec)
asks for pieces. A source does not change while somebody reads it. Files are read through `common.filesource`.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

from common.artifact.digest import Hasher
from common.ids import Digest

PIECE_BYTES = 1024 * 1024
"""How much of a source is held at a time when all of it is read."""


class ByteSource(Protocol):
    """A fixed run of bytes."""

    @property
    def size(self) -> int:
        """Length in bytes."""
        ...

    def read_at(self, offset: int, length: int) -> bytes:
        """The `length` bytes from `offset` on; fewer only where the source ends."""
        ...


class BytesSource:
    """A source in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    @property
    def size(self) -> int:
        return len(self._data)

    def read_at(self, offset: int, length: int) -> bytes:
        return self._data[offset : offset + length]


def pieces(source: ByteSource, start: int = 0, end: int | None = None) -> Iterator[bytes]:
    """The bytes of `source` from `start` to `end` (default: all), in order, at most `PIECE_BYTES` at a time."""
    stop = source.size if end is None else end
    for offset in range(start, stop, PIECE_BYTES):
        yield source.read_at(offset, min(PIECE_BYTES, stop - offset))


def digest_of_source(source: ByteSource, passed: Callable[[int], object] | None = None) -> Digest:
    """The SHA-256 name of everything in `source`; `passed` is told the length of each piece as it goes by."""
    hasher = Hasher()
    for piece in pieces(source):
        hasher.update(piece)
        if passed is not None:
            passed(len(piece))
    return hasher.digest()
