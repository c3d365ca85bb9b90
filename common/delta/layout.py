"""The byte layout of a patch: how it is written, and how it is read when a stranger wrote it.

A patch is a header and a run of blocks. A block is a table of operations and the literal bytes they use, each a zstd
frame. An operation is: so many literal bytes, then so many bytes copied from the base. Operations write the target from
its first byte to its last, so the last block is the one that completes it. docs/reference/patch-format.md describes
every byte; a golden file keeps old patches readable.

Reading checks in this order: magic, version, codec, then each length against a named limit and against what is left of
the patch, the base and the target, before anything of that length is allocated. All failures are `IntegrityFailure`.
"""

import struct
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
from backports import zstd
from numpy.typing import NDArray

from common.artifact.digest import hex_of
from common.artifact.manifest import ArtifactRef
from common.artifact.source import ByteSource
from common.errors import IntegrityFailure
from common.ids import Digest

MAGIC = b"\x89FERRYD\n"
"""Not text, and damaged by any transfer that rewrites line ends or clears the eighth bit (the idea is PNG's)."""
FORMAT_VERSION = 1
CODEC = "blocks-zstd.1"

HEADER = struct.Struct("<8sH16s32sQ32sQ")
"""Magic, version, codec (ASCII, padded with zeros), base SHA-256 and size, target SHA-256 and size."""
BLOCK = struct.Struct("<IIII")
"""Operations, bytes of their frame, literal bytes, bytes of their frame."""

LITERAL_BYTES_MAX = 1024 * 1024
"""Literal bytes in one block."""
OPERATIONS_MAX = 32 * 1024
"""Operations in one block."""
OPERATION_BYTES = 20
FRAME_OVERHEAD_MAX = 16 * 1024
"""How much longer than its content a zstd frame may be."""
WINDOW_LOG = 20
"""Log2 of the memory a decompressor may take for its window, in bytes."""
FILE_BYTES_MAX = 1 << 48
ZSTD_LEVEL = 12
"""Higher levels take five times as long for 1 % on weights."""

Counts = NDArray[np.int64]


class OperationTotals(msgspec.Struct, frozen=True):
    """All operations of one kind: `output_bytes` of the target they write, `patch_bytes` they take in the patch."""

    kind: Literal["copy", "literal"]
    count: int
    output_bytes: int
    patch_bytes: int


class PatchSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What a patch is for and what it is made of; sizes in bytes."""

    codec: str
    base: ArtifactRef
    target: ArtifactRef
    patch_bytes: int
    operations: tuple[OperationTotals, ...]


class Header(NamedTuple):
    """From which bytes to which."""

    base: ArtifactRef
    target: ArtifactRef


class Operations(NamedTuple):
    """The operations of one block, one per index: `literal` bytes, then `length` bytes from `offset` in the base."""

    literal: Counts
    length: Counts
    offset: Counts

    @property
    def output_bytes(self) -> int:
        return int(self.literal.sum() + self.length.sum())


class Block(NamedTuple):
    """A block as found in a patch; the literals are fetched with `read_literals`."""

    operations: Operations
    operations_frame_bytes: int
    literal_bytes: int
    literal_frame_offset: int
    literal_frame_bytes: int


def write_header(sink: Callable[[bytes], object], header: Header) -> int:
    """Write the header; returns its length in bytes."""
    base, target = header
    base_digest, target_digest = (bytes.fromhex(hex_of(reference.digest)) for reference in header)
    sink(HEADER.pack(MAGIC, FORMAT_VERSION, CODEC.encode(), base_digest, base.size, target_digest, target.size))
    return HEADER.size


def write_block(
    sink: Callable[[bytes], object], operations: Operations, position: int, literals: bytes
) -> tuple[int, int]:
    """Write a block whose output starts at `position` of the target; returns the bytes of its two parts."""
    table = zstd.compress(_pack(operations, position), ZSTD_LEVEL)
    frame = zstd.compress(literals, ZSTD_LEVEL) if literals else b""
    sink(BLOCK.pack(len(operations.literal), len(table), len(literals), len(frame)))
    sink(table)
    sink(frame)
    return BLOCK.size + len(table), len(frame)


def read_header(patch: ByteSource) -> Header:
    """The header of `patch`."""
    raw = patch.read_at(0, HEADER.size)
    if not raw.startswith(MAGIC[: len(raw)]) or not raw:
        raise IntegrityFailure("not a patch (wrong magic)", fix="check that this is a file made by `ferry delta make`")
    if len(raw) < HEADER.size:
        raise _truncated(patch, "in its header")
    _, version, codec, base_digest, base_size, target_digest, target_size = HEADER.unpack(raw)
    name = codec.rstrip(b"\0").decode("ascii", "replace")
    if version != FORMAT_VERSION or name != CODEC:
        fix = f"this build reads version {FORMAT_VERSION}, codec {CODEC!r}; upgrade the older side"
        raise IntegrityFailure(f"patch format version {version}, codec {name!r} is unknown", fix=fix)
    if max(base_size, target_size) > FILE_BYTES_MAX:
        raise IntegrityFailure(f"the patch speaks of files of more than {FILE_BYTES_MAX} bytes")
    return Header(_reference(base_digest, base_size), _reference(target_digest, target_size))


def read_blocks(patch: ByteSource, header: Header) -> Iterator[Block]:
    """The blocks of `patch`: checked to copy from inside the base only, and together to write exactly the target."""
    place, written = HEADER.size, 0
    while written < header.target.size:
        block, place = _read_block(patch, place, written, header)
        written += block.operations.output_bytes
        yield block
    if place != patch.size:
        raise IntegrityFailure(f"{patch.size - place} bytes follow the last block of the patch")


def read_literals(patch: ByteSource, block: Block) -> bytes:
    """The literal bytes of a block."""
    if not block.literal_bytes:
        return b""
    return _inflate(patch.read_at(block.literal_frame_offset, block.literal_frame_bytes), block.literal_bytes)


def _read_block(patch: ByteSource, place: int, written: int, header: Header) -> tuple[Block, int]:
    raw = patch.read_at(place, BLOCK.size)
    if len(raw) < BLOCK.size:
        raise _truncated(patch, "before the target is complete")
    count, table_bytes, literal_bytes, frame_bytes = BLOCK.unpack(raw)
    table_place = place + BLOCK.size
    frame_place = table_place + table_bytes
    _check_frame(count, table_bytes, count * OPERATION_BYTES, OPERATIONS_MAX * OPERATION_BYTES)
    _check_frame(literal_bytes, frame_bytes, literal_bytes, LITERAL_BYTES_MAX)
    if count == 0:
        raise IntegrityFailure(f"a block without operations at byte {place} of the patch")
    if frame_place + frame_bytes > patch.size:
        raise _truncated(patch, "inside a block")
    table = _inflate(patch.read_at(table_place, table_bytes), count * OPERATION_BYTES)
    operations = _unpack(table, count, written)
    _check_operations(operations, literal_bytes, header, written)
    return Block(
        operations, BLOCK.size + table_bytes, literal_bytes, frame_place, frame_bytes
    ), frame_place + frame_bytes


def _check_frame(count: int, frame_bytes: int, content_bytes: int, content_bytes_max: int) -> None:
    if content_bytes > content_bytes_max or frame_bytes > content_bytes + FRAME_OVERHEAD_MAX:
        raise IntegrityFailure(f"a part of {content_bytes} bytes in {frame_bytes} exceeds the limits of the format")
    if not count and frame_bytes:
        raise IntegrityFailure("an empty part of the patch takes room")


def _check_operations(operations: Operations, literal_bytes: int, header: Header, written: int) -> None:
    literal, length, offset = operations
    # Each length is at most FILE_BYTES_MAX and there are at most 2^15, so no sum below can overflow an int64.
    if int(length.min()) < 0 or int(length.max()) > header.base.size:
        raise IntegrityFailure("the patch copies more than the base has")
    if int(offset.min()) < 0 or bool((offset > header.base.size - length).any()):
        raise IntegrityFailure("the patch copies from outside the base")
    if bool((literal + length == 0).any()) or int(literal.sum()) != literal_bytes:
        raise IntegrityFailure("the operations of the patch do not use exactly its literal bytes")
    if written + operations.output_bytes > header.target.size:
        raise IntegrityFailure("the patch writes more than the target has")


def _pack(operations: Operations, position: int) -> bytes:
    """Columns: literal u32, length u64, and i64 how the shift (base offset minus target offset) changed."""
    literal, length, offset = operations
    shift = np.where(length > 0, offset - _copy_targets(literal, length, position), 0)
    known = np.maximum.accumulate(np.where(length > 0, np.arange(len(length)), -1))
    carried = np.where(known >= 0, shift[known], 0)
    change = np.diff(carried, prepend=0)
    return literal.astype("<u4").tobytes() + length.astype("<u8").tobytes() + change.astype("<i8").tobytes()


def _unpack(table: bytes, count: int, position: int) -> Operations:
    literal = np.frombuffer(table, "<u4", count).astype(np.int64)
    length = np.frombuffer(table, "<i8", count, offset=4 * count).astype(np.int64)
    change = np.frombuffer(table, "<i8", count, offset=12 * count).astype(np.int64)
    if int(length.min()) < 0 or int(length.max()) > FILE_BYTES_MAX:
        raise IntegrityFailure("the patch has an impossible length")
    # Strangers' numbers may wrap around here; the result is checked against the base afterwards, whatever it is.
    offset = _copy_targets(literal, length, position) + np.cumsum(change)
    return Operations(literal, length, np.where(length > 0, offset, 0))


def _copy_targets(literal: Counts, length: Counts, position: int) -> Counts:
    """Where in the target each operation's copy begins."""
    begins: Counts = np.cumsum(literal + length) - length + position
    return begins


def _inflate(frame: bytes, size: int) -> bytes:
    options: dict[Any, int] = {zstd.DecompressionParameter.window_log_max: WINDOW_LOG}
    decompressor = zstd.ZstdDecompressor(options=options)
    try:
        data = decompressor.decompress(frame, max_length=size + 1)
    except zstd.ZstdError as error:
        raise IntegrityFailure("a compressed part of the patch is damaged") from error
    if len(data) != size or not decompressor.eof or decompressor.unused_data:
        raise IntegrityFailure(f"a compressed part of the patch does not hold the {size} bytes it promises")
    return data


def _reference(digest: bytes, size: int) -> ArtifactRef:
    return ArtifactRef(Digest(f"sha256:{digest.hex()}"), size)


def _truncated(patch: ByteSource, where: str) -> IntegrityFailure:
    return IntegrityFailure(f"the patch is cut off: it ends at byte {patch.size}, {where}", fix="fetch it again")
