"""Parts: a file as a list of named byte ranges, so that what two files share need not be sent.

An index lists the parts of one file from its first byte to its last. Two indexes say which ranges of a wanted file a
held file has too, wherever they lie in it; the rest is fetched as byte ranges of the wanted file itself, so nothing is
stored twice. Cutting where tensors begin makes a part out of each tensor that did not change. An index is a promise of
a stranger like any other: the digest of the whole file decides in the end, a wrong index only costs bytes.

The binary form is `FPX` and a version byte (1), then for each part, in order, 16 bytes of digest and the size in bytes
as a varint (LEB128). Offsets are sums of sizes and are not written.

    >>> index = index_of(BytesSource(b"head" + b"w" * 5000), cut([Span(4, 5004)], 5004))
    >>> [(part.offset, part.size) for part in index]
    [(0, 4), (4, 5000)]
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from common.artifact.protobuf import Span
from common.artifact.source import ByteSource
from common.errors import IntegrityFailure

MAGIC = b"FPX\x01"
DIGEST_BYTES = 16
"""The first half of a SHA-256: enough against chance, and the digest of the whole file stands behind it."""
SIZE_BYTES_MAX = 9
PARTS_MAX = 8192
"""Parts of one file. An index is fetched before anything is saved by it, so it must stay small."""
PART_BYTES_MIN = 4 * 1024
"""A tensor shorter than this is no part of its own: its place in the index would cost a good part of its bytes."""
PART_BYTES_MAX = 1024 * 1024
"""A longer part is split: a change inside a large tensor costs one piece of it. A device copies a part at a time."""
GAP_BYTES_MAX = 1024
"""A shorter run of held parts between two missing ones is fetched with them: another request would cost as much."""
INDEX_BYTES_MAX = len(MAGIC) + PARTS_MAX * (DIGEST_BYTES + SIZE_BYTES_MAX)


class Part(NamedTuple):
    """The bytes of a file from `offset` on, `size` of them, by the first half of their SHA-256."""

    digest: bytes
    offset: int
    size: int

    @property
    def end(self) -> int:
        """The byte after the last."""
        return self.offset + self.size


class Stretch(NamedTuple):
    """Where the wanted file's bytes from `start` to `end` come from.

    `held` is the place in the list of held indexes of the file that has them, from its byte `offset` on, and `digest`
    the part's, to check what was copied. `held` None: they must be fetched.
    """

    start: int
    end: int
    held: int | None = None
    offset: int = 0
    digest: bytes = b""


def cut(tensors: Iterable[Span], size: int) -> tuple[Span, ...]:
    """Where to cut a file of `size` bytes whose tensors' bytes lie at `tensors`: at most `PARTS_MAX` ranges.

    Each tensor of `PART_BYTES_MIN` or more is a range, and so is what lies between two; ranges longer than
    `PART_BYTES_MAX` are split from their start. Both limits are doubled until the ranges are few enough. Tensors that
    overlap an earlier one or leave the file are taken for no tensors.
    """
    ordered = sorted(tensors)
    shortest, longest = PART_BYTES_MIN, PART_BYTES_MAX
    while (ranges := _at_most(_cut(ordered, size, shortest, longest), PARTS_MAX)) is None:
        shortest, longest = 2 * shortest, 2 * longest
    return ranges


def index_of(source: ByteSource, ranges: Iterable[Span]) -> tuple[Part, ...]:
    """The parts of `source`, cut at `ranges` (which cover it, in order); each is held in memory while it is hashed."""
    return tuple(
        Part(_digest(source.read_at(start, end - start)), start, end - start) for start, end in ranges if end > start
    )


def encode_index(parts: Sequence[Part]) -> bytes:
    """The binary form of an index: equal indexes encode equally."""
    return MAGIC + b"".join(part.digest + _varint(part.size) for part in parts)


def decode_index(data: bytes, size: int) -> tuple[Part, ...]:
    """The parts of a file of `size` bytes, or `IntegrityFailure` when `data` is no index of such a file."""
    if len(data) > INDEX_BYTES_MAX:
        raise IntegrityFailure(f"an index of {len(data)} bytes, the limit is {INDEX_BYTES_MAX}")
    if not data.startswith(MAGIC):
        raise IntegrityFailure("not an index of parts, or of a newer version")
    parts: list[Part] = []
    position, offset = len(MAGIC), 0
    while position < len(data):
        digest = data[position : position + DIGEST_BYTES]
        part_size, position = _read_varint(data, position + DIGEST_BYTES)
        if part_size == 0 or offset + part_size > size or len(parts) == PARTS_MAX:
            raise IntegrityFailure(f"the index does not fit a file of {size} bytes at part {len(parts)}")
        parts.append(Part(digest, offset, part_size))
        offset += part_size
    if offset != size:
        raise IntegrityFailure(f"the index covers {offset} of {size} bytes")
    return tuple(parts)


def assemble(held: Sequence[Sequence[Part]], wanted: Sequence[Part]) -> tuple[Stretch, ...]:
    """Where all bytes of the wanted file come from, in order and without a gap.

    Parts that are held are listed one by one; neighbours that must be fetched are one stretch, held runs of less than
    `GAP_BYTES_MAX` between them included.
    """
    places: dict[tuple[bytes, int], tuple[int, int]] = {}
    for which, parts in enumerate(held):
        for part in parts:
            places.setdefault((part.digest, part.size), (which, part.offset))
    return tuple(_merged(_stretch(part, places.get((part.digest, part.size))) for part in wanted))


def missing(held: Sequence[Sequence[Part]], wanted: Sequence[Part]) -> tuple[Span, ...]:
    """The byte ranges of the wanted file that must be fetched by somebody who holds files with the indexes `held`."""
    return tuple(Span(one.start, one.end) for one in assemble(held, wanted) if one.held is None)


def missing_bytes(held: Sequence[Sequence[Part]], wanted: Sequence[Part]) -> int:
    """How many bytes `missing` sums up to."""
    return sum(span.end - span.start for span in missing(held, wanted))


def _cut(tensors: Sequence[Span], size: int, shortest: int, longest: int) -> Iterator[Span]:
    position = 0
    for tensor in tensors:
        if tensor.end - tensor.start < shortest or tensor.start < position or tensor.end > size:
            continue
        yield from _split(position, tensor.start, longest)
        yield from _split(tensor.start, tensor.end, longest)
        position = tensor.end
    yield from _split(position, size, longest)


def _split(start: int, end: int, longest: int) -> Iterator[Span]:
    return (Span(at, min(at + longest, end)) for at in range(start, end, longest))


def _at_most(ranges: Iterator[Span], limit: int) -> tuple[Span, ...] | None:
    """All ranges, or None when there are more than `limit` (then no more are made)."""
    kept: list[Span] = []
    for one in ranges:
        if len(kept) == limit:
            return None
        kept.append(one)
    return tuple(kept)


def _stretch(part: Part, place: tuple[int, int] | None) -> Stretch:
    return Stretch(part.offset, part.end) if place is None else Stretch(part.offset, part.end, *place, part.digest)


def _merged(stretches: Iterable[Stretch]) -> Iterator[Stretch]:
    """The stretches with fetched neighbours made one; `gap` is the held run since the last fetched stretch."""
    fetched: Stretch | None = None
    gap: list[Stretch] = []
    for one in stretches:
        if one.held is not None:
            gap.append(one)
        elif fetched is not None and one.start - fetched.end < GAP_BYTES_MAX:
            fetched, gap = Stretch(fetched.start, one.end), []
        else:
            yield from [*([fetched] if fetched else []), *gap]
            fetched, gap = one, []
    yield from [*([fetched] if fetched else []), *gap]


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:DIGEST_BYTES]


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(0x80 | value & 0x7F)
        value >>= 7
    return bytes([*out, value])


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for index, byte in enumerate(data[position : position + SIZE_BYTES_MAX]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, position + index + 1
    raise IntegrityFailure("the index ends inside a part")
