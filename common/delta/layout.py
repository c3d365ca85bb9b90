"""The byte layout of a patch: how it is written, and how it is read when a stranger wrote it.

A patch is a header and a run of sections, until together they have written as many bytes as the target has. A section
is a list of operations with the bytes they use, in up to four streams: control (the operations, as varints), literals,
differences and payloads; or it is a frame, one long zstd stream of target bytes. docs/reference/patch-format.md
describes every byte; golden files keep old patches readable.

Reading checks each number against a named limit and against what is left of the patch, the base and the target, before
anything of that length is allocated or read. All failures are `IntegrityFailure`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from common.artifact.digest import hex_of
from common.artifact.manifest import ArtifactRef
from common.artifact.protobuf import Span
from common.artifact.source import ByteSource
from common.delta import frames
from common.delta.codecs import CODEC_NAMES, CODEC_NUMBERS
from common.delta.operations import Add, Copy, Literal, Operation, TensorBlock, old_bytes
from common.delta.tensors import NO_BASE, Block, DType, Method
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

CONTROL_BYTES_MAX = 256 * 1024
LITERAL_BYTES_MAX = 1024 * 1024
"""Of the literals, and of the differences, of one section."""
PREFIX_BYTES_MAX = 1024 * 1024
"""Of the base, before the literals of a section."""
FRAME_PREFIX_BYTES_MAX = 4 * 1024 * 1024
"""Of the base, before a frame."""
PREFIX_SPANS_MAX = 64
PAYLOAD_BYTES_MAX = 2 * 1024 * 1024
"""Of one tensor block."""
FRAME_OVERHEAD_MAX = 1024
"""How much longer than its content a zstd frame may be, besides one byte in a thousand."""

ABSENT, RAW, FRAMED, PREFIXED = range(4)
"""What a stream of a section is: not there, as it is, a frame, a frame with a prefix (only literals may be that)."""
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


class Section(NamedTuple):
    """What a section takes in the patch, in bytes; `control` with all its sizes."""

    control: int
    literals: int = 0
    differences: int = 0
    payloads: int = 0
    frame: int = 0


class Frame(NamedTuple):
    """`length` target bytes in one zstd stream, which is in the patch at `span`, to be read after the base bytes of
    `prefix`.
    """

    length: int
    prefix: tuple[Span, ...]
    span: Span


class Placed(NamedTuple):
    """An operation and where in the target it writes."""

    start: int
    operation: Operation | Frame


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


def write_frame(content: bytes, base: Read, prefix: Sequence[Span] = ()) -> bytes:
    """A section that is one frame holding `content`."""
    frame = frames.compress(content, prefix=gathered(base, prefix))
    return bytes((0,)) + varint(len(content)) + _write_spans(prefix) + varint(len(frame)) + frame


def write_section(
    operations: Sequence[Operation], start: int, target_size: int, base: Read, prefix: Sequence[Span] = ()
) -> bytes:
    """A section of `operations`, whose first writes to `start` of a target of `target_size` bytes. Each stream is
    written the shortest way; `prefix` are base bytes that may be of use for the literals.
    """
    control = b"".join(_write_operations(operations, start, target_size))
    literals = b"".join(operation.data for operation in operations if isinstance(operation, Literal))
    differences = b"".join(operation.differences for operation in operations if isinstance(operation, Add))
    payloads = b"".join(operation.payload for operation in operations if isinstance(operation, TensorBlock))
    written = [_write_stream(control), _write_stream(literals, base, prefix), _write_stream(differences)]
    if payloads:
        written.append((RAW, varint(len(payloads)), payloads))
    flags = sum(kind << 2 * index for index, (kind, _, _) in enumerate(written))
    sizes = b"".join(size for _, size, _ in written)
    return bytes((flags,)) + sizes + b"".join(data for _, _, data in written)


def control_bytes(operation: Operation) -> int:
    """About how many bytes of control `operation` takes."""
    return 24 if isinstance(operation, TensorBlock) else 8


def _write_stream(data: bytes, base: Read | None = None, prefix: Sequence[Span] = ()) -> tuple[int, bytes, bytes]:
    if not data:
        return ABSENT, b"", b""
    ways = [(RAW, varint(len(data)), data)]
    frame = frames.compress(data, level=frames.LEVEL_MAX)
    ways.append((FRAMED, varint(len(data)) + varint(len(frame)), frame))
    if base is not None and prefix:
        frame = frames.compress(data, prefix=gathered(base, prefix), level=frames.LEVEL_MAX)
        ways.append((PREFIXED, varint(len(data)) + varint(len(frame)) + _write_spans(prefix), frame))
    return min(ways, key=lambda way: len(way[1]) + len(way[2]))


def gathered(base: Read, spans: Sequence[Span]) -> bytes:
    """The bytes of the base in `spans`, one after another."""
    return b"".join(base(start, end - start) for start, end in spans)


def _write_spans(spans: Sequence[Span]) -> bytes:
    out, last = varint(len(spans)), 0
    for start, end in spans:
        out += varint(zigzag(start - last)) + varint(end - start)
        last = end
    return out


def _write_operations(operations: Sequence[Operation], start: int, target_size: int) -> Iterator[bytes]:
    shift = 0
    for operation in operations:
        match operation:
            case Literal(data):
                yield varint(len(data) << 2 | LITERAL)
            case Copy(offset, length):
                named = TO_THE_END if start + length == target_size else length
                yield varint(named << 2 | COPY) + varint(zigzag(offset - start - shift))
                shift = offset - start
            case Add(offset, differences):
                yield varint(len(differences) << 2 | ADD) + varint(zigzag(offset - start - shift))
                shift = offset - start
            case TensorBlock(offset, block, method, payload):
                old = NO_BASE if block.old_dtype is None else block.old_dtype
                yield varint(block.count << 2 | BLOCK) + bytes((method, old << 4 | block.dtype))
                yield varint(block.columns) + varint(len(payload))
                if block.old_dtype is not None:
                    yield varint(zigzag(offset - start - shift))
                    shift = offset - start
        start += operation.length


def read(patch: ByteSource, header: Header, place: int, base: Read | None) -> Iterator[Section | Placed]:
    """What follows the header, in order: each section, then its operations. `place` is where the header ends. Without
    `base`, literals that lean on it read as zeros.

    Each operation was checked: it reads inside the base, and all together write exactly the target. Holds one section's
    streams and one payload at a time, about 4 MB.
    """
    written = 0
    while written < header.target.size:
        reader = _SectionReader(patch, header, base, place, written)
        yield from reader.read()
        place, written = reader.place, reader.written
    if place != patch.size:
        raise IntegrityFailure(f"{patch.size - place} bytes follow the last section of the patch")


class _SectionReader:
    """Reads one section. `place` is where in the patch the next byte is, `written` how much of the target is done."""

    def __init__(self, patch: ByteSource, header: Header, base: Read | None, place: int, written: int) -> None:
        self._patch = patch
        self._header = header
        self._base = base
        # The numbers before the streams: flags, four pairs of sizes, and the spans of one prefix.
        head_bytes_max = 1 + 2 * 4 * 9 + 9 + PREFIX_SPANS_MAX * 2 * 9
        self._head = Cursor(patch.read_at(place, head_bytes_max))
        self._begin = place
        self.place = place
        self.written = written
        self._shift = 0

    def read(self) -> Iterator[Section | Placed]:
        flags = self._head.byte()
        yield from self._frame() if flags == 0 else self._streams(flags)

    def _frame(self) -> Iterator[Section | Placed]:
        length = self._head.varint()
        if not 0 < length <= self._header.target.size - self.written:
            raise IntegrityFailure("a frame of the patch writes more than the target has, or nothing")
        prefix = self._spans(FRAME_PREFIX_BYTES_MAX)
        stored = self._frame_size(length)
        start = self._body(stored)
        yield Section(start - self._begin, frame=stored)
        yield Placed(self.written, Frame(length, prefix, Span(start, start + stored)))
        self.written += length
        self.place = start + stored

    def _streams(self, flags: int) -> Iterator[Section | Placed]:
        kinds = [flags >> shift & 3 for shift in (0, 2, 4, 6)]
        if kinds[3] > RAW or PREFIXED in (kinds[0], kinds[2]):
            raise IntegrityFailure(f"a section at byte {self._begin} of the patch has unknown flags {flags}")
        limits = (CONTROL_BYTES_MAX, LITERAL_BYTES_MAX, LITERAL_BYTES_MAX)
        sizes = [self._stream_sizes(kind, limit) for kind, limit in zip(kinds, limits, strict=False)]
        payloads = self._head.varint() if kinds[3] else 0
        self.place = start = self._body(sum(stored for _, stored, _ in sizes) + payloads)
        yield Section(start - self._begin + sizes[0][1], sizes[1][1], sizes[2][1], payloads)
        control, literals, differences = (self._stream(*each) for each in zip(kinds, sizes, strict=False))
        payload_end = self.place + payloads
        yield from self._operations(Cursor(control), Cursor(literals), Cursor(differences), payload_end)

    def _operations(self, control: Cursor, literals: Cursor, differences: Cursor, payload_end: int) -> Iterator[Placed]:
        if control.ended():
            raise IntegrityFailure(f"a section without operations at byte {self._begin} of the patch")
        while not control.ended():
            head = control.varint()
            kind, length = head & 3, head >> 2
            operation: Operation
            if kind == LITERAL:
                operation = Literal(literals.take(length))
            elif kind == COPY:
                length = length or self._header.target.size - self.written
                operation = Copy(self._base_offset(control, length), length)
            elif kind == ADD:
                operation = Add(self._base_offset(control, length), differences.take(length))
            else:
                operation = self._block(control, length, payload_end)
            if not 0 < operation.length <= self._header.target.size - self.written:
                raise IntegrityFailure("an operation of the patch writes more than the target has, or nothing")
            yield Placed(self.written, operation)
            self.written += operation.length
        if not literals.ended() or not differences.ended() or self.place != payload_end:
            raise IntegrityFailure("the operations of the patch leave bytes of their section unused")

    def _block(self, control: Cursor, count: int, payload_end: int) -> TensorBlock:
        method, dtypes = control.byte(), control.byte()
        columns, size = control.varint(), control.varint()
        try:
            old = None if dtypes >> 4 == NO_BASE else DType(dtypes >> 4)
            block = Block(DType(dtypes & 15), old, count, columns)
            known = Method(method)
        except ValueError as error:
            raise IntegrityFailure("the patch has a tensor block of an unknown kind") from error
        block.check()
        if size > min(PAYLOAD_BYTES_MAX, payload_end - self.place):
            raise IntegrityFailure("a tensor block of the patch exceeds the limits of the format")
        offset = 0 if old is None else self._base_offset(control, old_bytes(block))
        payload = self._patch.read_at(self.place, size)
        self.place += size
        return TensorBlock(offset, block, known, payload)

    def _base_offset(self, control: Cursor, length: int) -> int:
        self._shift += unzigzag(control.varint())
        offset = self.written + self._shift
        if not 0 <= offset <= self._header.base.size - length:
            raise IntegrityFailure("the patch reads from outside the base")
        return offset

    def _stream_sizes(self, kind: int, limit: int) -> tuple[int, int, tuple[Span, ...]]:
        """Bytes of content, bytes in the patch, and the prefix."""
        if kind == ABSENT:
            return 0, 0, ()
        size = self._head.varint()
        if not 0 < size <= limit:
            raise IntegrityFailure(f"a stream of {size} bytes in the patch, the limit is {limit}")
        stored = size if kind == RAW else self._frame_size(size)
        return size, stored, self._spans(PREFIX_BYTES_MAX) if kind == PREFIXED else ()

    def _frame_size(self, content: int) -> int:
        size = self._head.varint()
        if size > content + content // 1000 + FRAME_OVERHEAD_MAX:
            raise IntegrityFailure(f"{content} bytes take {size} in the patch, which is more than zstd ever needs")
        return size

    def _spans(self, bytes_max: int) -> tuple[Span, ...]:
        count = self._head.varint()
        if count > PREFIX_SPANS_MAX:
            raise IntegrityFailure(f"a prefix of {count} parts in the patch, the limit is {PREFIX_SPANS_MAX}")
        spans, last, total = [], 0, 0
        for _ in range(count):
            start = last + unzigzag(self._head.varint())
            length = self._head.varint()
            last = start + length
            total += length
            if start < 0 or last > self._header.base.size or total > bytes_max:
                raise IntegrityFailure("a prefix in the patch lies outside the base, or is too long")
            spans.append(Span(start, last))
        return tuple(spans)

    def _body(self, size: int) -> int:
        """Where the section's streams begin, having checked that `size` bytes are there."""
        start = self._begin + self._head.place
        if size > self._patch.size - start:
            raise IntegrityFailure(f"the patch is cut off: it ends at byte {self._patch.size}", fix="fetch it again")
        return start

    def _stream(self, kind: int, sizes: tuple[int, int, tuple[Span, ...]]) -> bytes:
        size, stored, prefix = sizes
        if kind == ABSENT:
            return b""
        raw = self._patch.read_at(self.place, stored)
        self.place += stored
        if kind == RAW:
            return raw
        if prefix and self._base is None:
            return bytes(size)
        return frames.decompress(raw, size, prefix=gathered(self._base, prefix) if self._base else b"")
