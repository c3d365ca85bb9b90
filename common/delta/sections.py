"""Sections, written: operations to bytes, each stream of a section the shortest way there is."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from common.artifact.protobuf import Span
from common.artifact.source import ByteSource
from common.delta import frames, sparse
from common.delta.layout import (
    ABSENT,
    ADD,
    BLOCK,
    COPY,
    FRAMED,
    LITERAL,
    PREFIXED,
    RAW,
    SPARSE,
    TO_THE_END,
    Read,
    gathered,
    unread,
)
from common.delta.operations import Add, Copy, Literal, Operation, TensorBlock, old_bytes
from common.delta.tensors import NO_BASE
from common.delta.varint import varint, zigzag


def write_frame(content: bytes, base: Read, prefix: Sequence[Span] = ()) -> bytes:
    """A section that is one frame holding `content`."""
    frame = frames.compress(content, prefix=gathered(base, prefix))
    return bytes((0,)) + varint(len(content)) + _write_spans(prefix) + varint(len(frame)) + frame


def write_section(operations: Sequence[Operation], start: int, target_size: int, base: ByteSource) -> bytes:
    """A section of `operations`, whose first writes to `start` of a target of `target_size` bytes. Each stream is
    written the shortest way.
    """
    control = b"".join(_write_operations(operations, start, target_size))
    literals = b"".join(operation.data for operation in operations if isinstance(operation, Literal))
    differences = b"".join(operation.differences for operation in operations if isinstance(operation, Add))
    payloads = b"".join(operation.payload for operation in operations if isinstance(operation, TensorBlock))
    written = [_write_control(control), _write_literals(literals, operations, base), _write_differences(differences)]
    written.append(_Stream(RAW, len(payloads), None, payloads) if payloads else _NOTHING)
    flags = sum(stream.kind << 2 * index for index, stream in enumerate(written))
    return bytes((flags,)) + b"".join(stream.sizes for stream in written) + b"".join(stream.data for stream in written)


def control_bytes(operation: Operation) -> int:
    """About how many bytes of control `operation` takes."""
    return 24 if isinstance(operation, TensorBlock) else 8


class _Stream(NamedTuple):
    """A stream as written: the bytes of its content, of what its frame holds if that differs, and the stream itself."""

    kind: int
    content: int
    packed: int | None
    data: bytes

    @property
    def sizes(self) -> bytes:
        if self.kind == ABSENT:
            return b""
        numbers = [self.content, *([] if self.packed is None else [self.packed])]
        numbers += [] if self.kind == RAW else [len(self.data)]
        return b"".join(map(varint, numbers))

    @property
    def length(self) -> int:
        return len(self.sizes) + len(self.data)


_NOTHING = _Stream(ABSENT, 0, None, b"")


def _shortest(*streams: _Stream) -> _Stream:
    return min(streams, key=lambda stream: stream.length)


def _simple(data: bytes) -> list[_Stream]:
    if not data:
        return [_NOTHING]
    frame = frames.compress(data, level=frames.LEVEL_MAX)
    return [_Stream(RAW, len(data), None, data), _Stream(FRAMED, len(data), None, frame)]


def _write_control(control: bytes) -> _Stream:
    return _shortest(*_simple(control))


def _write_literals(literals: bytes, operations: Sequence[Operation], base: ByteSource) -> _Stream:
    rest = gathered(base.read_at, unread((_read_by(operation) for operation in operations), base.size))
    ways = _simple(literals)
    if literals and rest:
        frame = frames.compress(literals, prefix=rest, level=frames.LEVEL_MAX)
        ways.append(_Stream(PREFIXED, len(literals), None, frame))
    return _shortest(*ways)


def _write_differences(differences: bytes) -> _Stream:
    ways = _simple(differences)
    packed = sparse.pack(differences)
    if len(packed) < len(differences):
        frame = frames.compress(packed, level=frames.LEVEL_MAX)
        ways.append(_Stream(SPARSE, len(differences), len(packed), frame))
    return _shortest(*ways)


def _read_by(operation: Operation) -> Span:
    """The bytes of the base that `operation` reads."""
    match operation:
        case Literal():
            return Span(0, 0)
        case TensorBlock(offset, block):
            return Span(offset, offset + old_bytes(block))
        case Copy(offset) | Add(offset):
            return Span(offset, offset + operation.length)


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
