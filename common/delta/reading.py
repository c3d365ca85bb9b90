"""Sections, read: bytes that a stranger wrote to operations.

Each number is checked against a named limit and against what is left of the patch, the base and the target, before
anything of that length is allocated or read. All failures are `IntegrityFailure`.
"""

from collections.abc import Iterator
from typing import NamedTuple

from common.artifact.protobuf import Span
from common.artifact.source import ByteSource
from common.delta import frames, sparse
from common.delta.layout import (
    ABSENT,
    BLOCK,
    CONTROL_BYTES_MAX,
    COPY,
    DIFFERENCE_BYTES_MAX,
    FRAME_OVERHEAD_MAX,
    FRAME_PREFIX_BYTES_MAX,
    FRAMED,
    LITERAL,
    LITERAL_BYTES_MAX,
    OPERATIONS_MAX,
    PAYLOAD_BYTES_MAX,
    PREFIX_SPANS_MAX,
    PREFIXED,
    RAW,
    SPARSE,
    Header,
    Read,
    gathered,
    unread,
)
from common.delta.operations import Add, Copy, Literal, Operation, TensorBlock, old_bytes
from common.delta.tensors import NO_BASE, Block, DType, Method
from common.delta.varint import Cursor, unzigzag
from common.errors import IntegrityFailure


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


def read(patch: ByteSource, header: Header, place: int, base: Read | None) -> Iterator[Section | Placed]:
    """What follows the header, in order: each section, then its operations. `place` is where the header ends. Without
    `base`, literals and differences read as zeros.

    Each operation was checked: it reads inside the base, and all together write exactly the target. Holds one section's
    streams and one payload at a time, about 4 MB.
    """
    written = operations = 0
    while written < header.target.size:
        reader = _SectionReader(patch, header, base, place, written)
        for step in reader.read():
            operations += isinstance(step, Placed)
            if operations > OPERATIONS_MAX:
                raise IntegrityFailure(f"the patch has more than {OPERATIONS_MAX} operations")
            yield step
        place, written = reader.place, reader.written
    if place != patch.size:
        raise IntegrityFailure(f"{patch.size - place} bytes follow the last section of the patch")


class _SectionReader:
    """Reads one section. `place` is where in the patch the next byte is, `written` how much of the target is done."""

    def __init__(self, patch: ByteSource, header: Header, base: Read | None, place: int, written: int) -> None:
        self._patch = patch
        self._header = header
        self._base = base
        # The numbers before the streams: flags, and up to ten sizes; or those of a frame with the spans of its prefix.
        head_bytes_max = 1 + 10 * 9 + PREFIX_SPANS_MAX * 2 * 9
        self._head = Cursor(patch.read_at(place, head_bytes_max))
        self._begin = place
        self.place = place
        self.written = written

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
        if kinds[0] > FRAMED or kinds[3] > RAW:
            raise IntegrityFailure(f"a section at byte {self._begin} of the patch has unknown flags {flags}")
        limits = (CONTROL_BYTES_MAX, LITERAL_BYTES_MAX, DIFFERENCE_BYTES_MAX)
        sizes = [self._stream_sizes(kind, limit) for kind, limit in zip(kinds, limits, strict=False)]
        payloads = self._head.varint() if kinds[3] else 0
        self.place = start = self._body(sum(size.stored for size in sizes) + payloads)
        yield Section(start - self._begin + sizes[0].stored, sizes[1].stored, sizes[2].stored, payloads)
        control = self._simple(kinds[0], sizes[0])
        if self._base is None:
            literals, differences = (bytes(size.content) for size in sizes[1:])
            self.place += sizes[1].stored + sizes[2].stored
        else:
            literals = self._literals(kinds[1], sizes[1], control, self._base)
            differences = self._differences(kinds[2], sizes[2])
        yield from self._operations(control, Cursor(literals), Cursor(differences), self.place + payloads)

    def _operations(self, control: bytes, literals: Cursor, differences: Cursor, payload_end: int) -> Iterator[Placed]:
        for head in self._heads(control):
            operation: Operation
            match head.kind:
                case 0:
                    operation = Copy(head.offset, head.length)
                case 1:
                    operation = Literal(literals.take(head.length))
                case 2:
                    operation = Add(head.offset, differences.take(head.length))
                case _:
                    operation = self._block(head, payload_end)
            yield Placed(head.start, operation)
            self.written = head.start + head.length
        if not literals.ended() or not differences.ended() or self.place != payload_end:
            raise IntegrityFailure("the operations of the patch leave bytes of their section unused")

    def _block(self, head: "_Head", payload_end: int) -> TensorBlock:
        if head.block is None or head.payload_bytes > min(PAYLOAD_BYTES_MAX, payload_end - self.place):
            raise IntegrityFailure("a tensor block of the patch exceeds the limits of the format")
        payload = self._patch.read_at(self.place, head.payload_bytes)
        self.place += head.payload_bytes
        return TensorBlock(head.offset, head.block, head.method, payload)

    def _heads(self, control: bytes) -> Iterator["_Head"]:
        """What the control stream says of each operation, checked against base and target."""
        cursor, start, shift = Cursor(control), self.written, 0
        if cursor.ended():
            raise IntegrityFailure(f"a section without operations at byte {self._begin} of the patch")
        while not cursor.ended():
            number = cursor.varint()
            kind, length, base_bytes = number & 3, number >> 2, number >> 2
            block, method, payload_bytes = None, Method.FRESH, 0
            if kind == COPY:
                length = base_bytes = length or self._header.target.size - start
            elif kind == BLOCK:
                block, method, payload_bytes = _block_head(cursor, length)
                length, base_bytes = length * block.dtype.bits.itemsize, old_bytes(block)
            if kind == LITERAL or (block is not None and block.old_dtype is None):
                base_bytes = 0
            else:
                shift += unzigzag(cursor.varint())
            offset = start + shift if base_bytes else 0
            if not 0 <= offset <= self._header.base.size - base_bytes:
                raise IntegrityFailure("the patch reads from outside the base")
            if not 0 < length <= self._header.target.size - start:
                raise IntegrityFailure("an operation of the patch writes more than the target has, or nothing")
            yield _Head(kind, start, length, offset, base_bytes, block, method, payload_bytes)
            start += length

    def _stream_sizes(self, kind: int, limit: int) -> "_Sizes":
        if kind == ABSENT:
            return _Sizes(0, 0, 0)
        size = self._head.varint()
        if not 0 < size <= limit:
            raise IntegrityFailure(f"a stream of {size} bytes in the patch, the limit is {limit}")
        if kind == SPARSE and limit == DIFFERENCE_BYTES_MAX:
            packed = self._head.varint()
            if packed > size:
                raise IntegrityFailure(f"{size} differences take {packed} bytes packed, which is more than unpacked")
            return _Sizes(size, packed, self._frame_size(packed))
        return _Sizes(size, size, size if kind == RAW else self._frame_size(size))

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

    def _simple(self, kind: int, sizes: "_Sizes", prefix: bytes = b"") -> bytes:
        if kind == ABSENT:
            return b""
        raw = self._patch.read_at(self.place, sizes.stored)
        self.place += sizes.stored
        return raw if kind == RAW else frames.decompress(raw, sizes.framed, prefix=prefix)

    def _literals(self, kind: int, sizes: "_Sizes", control: bytes, base: Read) -> bytes:
        if kind != PREFIXED:
            return self._simple(kind, sizes)
        used = (Span(head.offset, head.offset + head.base_bytes) for head in self._heads(control))
        return self._simple(kind, sizes, gathered(base, unread(used, self._header.base.size)))

    def _differences(self, kind: int, sizes: "_Sizes") -> bytes:
        data = self._simple(kind, sizes)
        return sparse.unpack(data, sizes.content) if kind == SPARSE else data


class _Sizes(NamedTuple):
    """Bytes of a stream: of its content, of what its frame holds, and in the patch."""

    content: int
    framed: int
    stored: int


class _Head(NamedTuple):
    """An operation without the bytes it uses."""

    kind: int
    start: int
    length: int
    offset: int
    base_bytes: int
    block: Block | None
    method: Method
    payload_bytes: int


def _block_head(control: Cursor, count: int) -> tuple[Block, Method, int]:
    """Block, method and payload bytes of a tensor block of `count` elements."""
    number, types = control.byte(), control.byte()
    columns, payload_bytes = control.varint(), control.varint()
    try:
        old = None if types >> 4 == NO_BASE else DType(types >> 4)
        block, method = Block(DType(types & 15), old, count, columns), Method(number)
    except ValueError as error:
        raise IntegrityFailure("the patch has a tensor block of an unknown kind") from error
    block.check()
    return block, method, payload_bytes
