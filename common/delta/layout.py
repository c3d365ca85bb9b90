"""The byte layout of a patch: its header, its limits and its numbers. Sections are written by `sections`, read by
`reading`.

A patch is a header and a run of sections, until together they have written as many bytes as the target has. A section
is a list of operations with the bytes they use, in up to four streams: control (the operations, as varints), literals,
differences and payloads; or it is a frame, one long zstd stream of target bytes. docs/reference/patch-format.md
describes every byte; golden files keep old patches readable.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from common.artifact.digest import hex_of
from common.artifact.manifest import ArtifactRef
from common.artifact.protobuf import Span
from common.artifact.source import ByteSource
from common.delta.codecs import CODEC_NAMES, CODEC_NUMBERS
from common.delta.varint import Cursor, unzigzag, varint, zigzag
from common.errors import IntegrityFailure

MAGIC = b"\x89FD\n"
"""Not text, and damaged by any transfer that rewrites line ends or clears the eighth bit (the idea is PNG's)."""
FORMAT_VERSION = 1
FINGERPRINT_BYTES = 8
"""How much of a SHA-256 the header holds: enough to notice a mistake. Trust comes from the signed order, which names
base and target in full."""
HEADER_BYTES_MAX = 6 + 2 * (9 + FINGERPRINT_BYTES)
FILE_BYTES_MAX = 1 << 48

OPERATIONS_MAX = 1 << 20
"""Of a patch, frames included. Reading one takes some ten microseconds, and thirty bytes can hold a hundred thousand of
them: without a limit, a short patch could keep a reader busy for hours."""
CONTROL_BYTES_MAX = 256 * 1024
LITERAL_BYTES_MAX = 1024 * 1024
"""Of the literals of one section."""
DIFFERENCE_BYTES_MAX = 4 * 1024 * 1024
"""Of the differences of one section. They are mostly zeros, and long runs of them compress better."""
PREFIX_BYTES_MAX = 1024 * 1024
"""Of the base, before the literals of a section."""
READ_BYTES_MIN = 4096
"""What operations read so much of at a time is weights: not worth a place in the prefix of the literals."""
FRAME_PREFIX_BYTES_MAX = 5 * 1024 * 1024
"""Of the base, before a frame."""
PREFIX_SPANS_MAX = 64
PAYLOAD_BYTES_MAX = 2 * 1024 * 1024
"""Of one tensor block."""
FRAME_OVERHEAD_MAX = 1024
"""How much longer than its content a zstd frame may be, besides one byte in a thousand."""

ABSENT, RAW, FRAMED = range(3)
"""What a stream of a section is: not there, as it is, a frame."""
PREFIXED = SPARSE = 3
"""Literals: a frame with a prefix. Differences: a frame of packed ones (`sparse`)."""
COPY, LITERAL, ADD, BLOCK = range(4)
TO_THE_END = 0
"""A copy of this length goes on to the end of the target."""

Read = Callable[[int, int], bytes]


class Fingerprint(NamedTuple):
    """A file as the header names it: the first bytes of its SHA-256, and its size in bytes."""

    prefix: bytes
    size: int

    def fits(self, reference: ArtifactRef) -> bool:
        """Whether this can be the file that `reference` names."""
        return self == fingerprint(reference)

    def __str__(self) -> str:
        return f"sha256:{self.prefix.hex()}…, {self.size} bytes"


def fingerprint(reference: ArtifactRef) -> Fingerprint:
    """What a header keeps of a name."""
    return Fingerprint(bytes.fromhex(hex_of(reference.digest))[:FINGERPRINT_BYTES], reference.size)


class Header(NamedTuple):
    """From which bytes to which, and what it takes to apply the patch."""

    codec: str
    base: Fingerprint
    target: Fingerprint


def write_header(header: Header) -> bytes:
    """The header's bytes."""
    base, target = header.base, header.target
    sizes = varint(base.size) + varint(zigzag(target.size - base.size))
    return MAGIC + bytes((FORMAT_VERSION, CODEC_NUMBERS[header.codec])) + sizes + base.prefix + target.prefix


def read_header(patch: ByteSource) -> tuple[Header, int]:
    """The header of `patch` and its length in bytes."""
    raw = patch.read_at(0, HEADER_BYTES_MAX)
    if not raw.startswith(MAGIC[: len(raw)]) or not raw:
        raise IntegrityFailure("not a patch (wrong magic)", fix="check that this is a file made by `ferry delta make`")
    cursor = Cursor(raw, len(MAGIC))
    version, number = cursor.byte(), cursor.byte()
    if version != FORMAT_VERSION or number not in CODEC_NAMES:
        fix = f"this build reads version {FORMAT_VERSION}, codecs {', '.join(CODEC_NUMBERS)}; upgrade the older side"
        raise IntegrityFailure(f"patch format version {version}, codec number {number} is unknown", fix=fix)
    base_size = cursor.varint()
    target_size = base_size + unzigzag(cursor.varint())
    if not 0 <= target_size <= FILE_BYTES_MAX or base_size > FILE_BYTES_MAX:
        raise IntegrityFailure(f"the patch speaks of files of more than {FILE_BYTES_MAX} bytes, or less than none")
    base, target = (Fingerprint(cursor.take(FINGERPRINT_BYTES), size) for size in (base_size, target_size))
    return Header(CODEC_NAMES[number], base, target), cursor.place


def unread(read_spans: Iterable[Span], base_size: int) -> list[Span]:
    """The prefix of a section's literals: what no operation that reads `READ_BYTES_MIN` or more of the base reads of
    it, in order, `PREFIX_BYTES_MAX` in all. Names and nodes of a graph resemble what is left there.
    """
    spans, place, room = [], 0, PREFIX_BYTES_MAX
    long_ones = sorted(span for span in read_spans if span.end - span.start >= READ_BYTES_MIN)
    for start, end in [*long_ones, Span(base_size, base_size)]:
        if start > place:
            spans.append(Span(place, min(start, place + room)))
            room -= spans[-1].end - place
        if room == 0:
            break
        place = max(place, end)
    return spans


def gathered(base: Read, spans: Sequence[Span]) -> bytes:
    """The bytes of the base in `spans`, one after another."""
    return b"".join(base(start, end - start) for start, end in spans)
