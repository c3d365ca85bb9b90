"""From operations to bytes: sections, and the simple ways to say the same that may turn out shorter.

Operations come in the order of the target. They are gathered region by region; each region is written as sections, and
where that is not much smaller than the bytes themselves, also as one zstd frame with and without base bytes before it:
the shortest is kept. So a patch is never larger than the best simple choice, however poorly its tensors were
understood.
"""

from collections.abc import Iterable, Iterator, Sequence

from common.artifact.protobuf import Span
from common.artifact.source import ByteSource
from common.delta import frames
from common.delta.layout import (
    CONTROL_BYTES_MAX,
    DIFFERENCE_BYTES_MAX,
    FRAME_PREFIX_BYTES_MAX,
    LITERAL_BYTES_MAX,
    OPERATIONS_MAX,
    gathered,
)
from common.delta.operations import Add, Copy, Literal, Operation, TensorBlock
from common.delta.sections import control_bytes, write_frame, write_section
from common.delta.varint import varint, zigzag

REGION_BYTES = 32 * 1024 * 1024
"""Target bytes for which the ways to write them are compared at a time. The patch of a region is held in memory."""
CONTENT_BYTES_MAX = 2 * REGION_BYTES
"""A region that is longer, because most of it is copied, is not written in other ways either."""
SIMPLE_WORTH_BYTES = 96
"""A region whose sections are shorter than this is not written again in other ways."""
DEAR_COPY_BYTES_MAX = 16
SMALL_BYTES = 8 * 1024 * 1024
SMALL_PATCH_SHARE, LARGE_PATCH_SHARE = 0.02, 0.3
"""A small region, and a larger one, is tried with base bytes before it if its sections take more than this part of it.
Only of a larger one is it estimated first whether that may help."""
SAMPLES, SAMPLE_BYTES = 8, 64 * 1024
"""How much of a region is compressed to see what zstd can do there."""
SAMPLES_ERROR_MAX = 0.9
"""A whole region takes no less than this part of what its samples promise."""
LEVELS_SHARE_MIN = 0.6
"""The highest level takes no less than this part of what the lowest takes."""


def sections(operations: Iterable[Operation], base: ByteSource, target: ByteSource) -> Iterator[bytes]:
    """The bytes that follow the header: `operations` write all of `target`."""
    # Were each region written as frames, there would be so many.
    frames_max = 2 + 2 * target.size // REGION_BYTES
    start, left = 0, OPERATIONS_MAX - frames_max
    for merged in _regions(_merged(operations)):
        region = list(_merged(_without_dear_copies(merged, start, base)))
        span = Span(start, start + sum(operation.length for operation in region))
        if len(region) <= left:
            left -= len(region)
            yield from _shortest(region, base, target, span)
        else:
            yield from _frames(base, target, span)
        start = span.end


def _shortest(region: list[Operation], base: ByteSource, target: ByteSource, span: Span) -> list[bytes]:
    written = list(_sections(region, span.start, target.size, base))
    if _total(written) < SIMPLE_WORTH_BYTES or span.end - span.start > CONTENT_BYTES_MAX:
        return written
    content = target.read_at(span.start, span.end - span.start)
    ways: list[tuple[Span, ...]] = []
    samples = _Samples(content)
    if samples.may_reach(_total(written)):
        ways.append(())
    surroundings = _surroundings(span, base.size)
    if samples.promise(gathered(base.read_at, surroundings), _total(written)):
        ways.append(surroundings)
    return min([written, *([write_frame(content, base.read_at, way)] for way in ways)], key=_total)


def _frames(base: ByteSource, target: ByteSource, span: Span) -> Iterator[bytes]:
    """The bytes of a region that has more operations than a patch may have."""
    for start in range(span.start, span.end, REGION_BYTES):
        end = min(start + REGION_BYTES, span.end)
        content = target.read_at(start, end - start)
        yield write_frame(content, base.read_at, _surroundings(Span(start, end), base.size))


class _Samples:
    """What zstd would make of `content`, found without compressing all of it at a high level."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        step = max(SAMPLE_BYTES, len(content) // SAMPLES)
        self._samples = [content[place : place + SAMPLE_BYTES] for place in range(0, len(content), step)]
        self._shares: dict[int, float] = {}

    def share(self, level: int) -> float:
        """What is left of the samples, compressed one by one."""
        if level not in self._shares:
            compressed = sum(len(frames.compress(sample, level=level)) for sample in self._samples)
            self._shares[level] = compressed / sum(map(len, self._samples))
        return self._shares[level]

    def may_reach(self, size: int) -> bool:
        """Whether a frame of its own may take less than `size` bytes."""
        wanted = size / (SAMPLES_ERROR_MAX * len(self._content))
        return self.share(1) * LEVELS_SHARE_MIN < wanted and self.share(frames.LEVEL) < wanted

    def promise(self, prefix: bytes, size: int) -> bool:
        """Whether a frame after `prefix` may take less than `size` bytes."""
        whole = len(self._content)
        if not prefix or size < (SMALL_PATCH_SHARE if whole <= SMALL_BYTES else LARGE_PATCH_SHARE) * whole:
            return False
        if whole <= SMALL_BYTES:
            return True
        quickly = len(frames.compress(self._content, prefix=prefix, level=1))
        return quickly * self.share(frames.LEVEL) / self.share(1) * SAMPLES_ERROR_MAX < size


def _surroundings(span: Span, base_size: int) -> tuple[Span, ...]:
    """The part of the base that lies where `span` does in the target, as far as a device can hold it."""
    start = max(0, min(span.start, base_size - FRAME_PREFIX_BYTES_MAX))
    return (Span(start, min(base_size, start + FRAME_PREFIX_BYTES_MAX)),) if base_size else ()


def _sections(operations: Iterable[Operation], start: int, target_size: int, base: ByteSource) -> Iterator[bytes]:
    """Sections, each as full as the limits of the format allow."""
    full: list[Operation] = []
    control = literals = differences = 0
    for operation in operations:
        control += control_bytes(operation)
        literals += operation.length if isinstance(operation, Literal) else 0
        differences += operation.length if isinstance(operation, Add) else 0
        if control > CONTROL_BYTES_MAX or literals > LITERAL_BYTES_MAX or differences > DIFFERENCE_BYTES_MAX:
            yield write_section(full, start, target_size, base)
            start += sum(each.length for each in full)
            full = []
            control = control_bytes(operation)
            literals = operation.length if isinstance(operation, Literal) else 0
            differences = operation.length if isinstance(operation, Add) else 0
        full.append(operation)
    if full:
        yield write_section(full, start, target_size, base)


def _merged(operations: Iterable[Operation]) -> Iterator[Operation]:
    """The same operations, fewer: neighbours that continue each other become one; what is too long for a section is
    cut.
    """
    last: Operation | None = None
    for operation in operations:
        joined = None if last is None else _joined(last, operation)
        if joined is None and last is not None:
            yield last
        last = operation if joined is None else joined
    if last is not None:
        yield last


def _without_dear_copies(operations: Sequence[Operation], start: int, base: ByteSource) -> Iterator[Operation]:
    """Short copies become literals where going there and back takes more bytes than the copy saves."""
    shift = 0
    for index, operation in enumerate(operations):
        if isinstance(operation, Copy) and operation.length <= DEAR_COPY_BYTES_MAX:
            there = operation.offset - start
            back = _next_shift(operations, index + 1, start + operation.length)
            way = _shift_bytes(there - shift) + _shift_bytes(back - there) - _shift_bytes(back - shift)
            beside_literal = index > 0 and isinstance(operations[index - 1], Literal)
            if 1 + way + beside_literal > operation.length + (not beside_literal):
                yield Literal(base.read_at(operation.offset, operation.length))
                start += operation.length
                continue
        yield operation
        if not isinstance(operation, Literal) and not (
            isinstance(operation, TensorBlock) and operation.block.old_dtype is None
        ):
            shift = operation.offset - start
        start += operation.length


def _next_shift(operations: Sequence[Operation], index: int, start: int) -> int:
    """The shift of the next operation that reads the base, if it comes soon."""
    for operation in operations[index : index + 3]:
        if not isinstance(operation, Literal):
            return operation.offset - start
        start += operation.length
    return 0


def _shift_bytes(change: int) -> int:
    return len(varint(zigzag(change)))


def _joined(last: Operation, operation: Operation) -> Operation | None:
    match last, operation:
        case Copy(), Copy() if last.offset + last.length == operation.offset:
            return Copy(last.offset, last.length + operation.length)
        case Literal(), Literal() if last.length + operation.length <= LITERAL_BYTES_MAX:
            return Literal(last.data + operation.data)
        case Add(), Add() if (
            last.offset + last.length == operation.offset and last.length + operation.length <= LITERAL_BYTES_MAX
        ):
            return Add(last.offset, last.differences + operation.differences)
    return None


def _regions(operations: Iterable[Operation]) -> Iterator[list[Operation]]:
    region: list[Operation] = []
    length = 0
    for operation in operations:
        region.append(operation)
        # A copy is as cheap at any length, so it does not fill a region.
        length += 0 if isinstance(operation, Copy) else operation.length
        if length >= REGION_BYTES:
            yield region
            region, length = [], 0
    if region:
        yield region


def _total(written: Sequence[bytes]) -> int:
    return sum(map(len, written))
