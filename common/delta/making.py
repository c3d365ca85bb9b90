"""Making a patch: what the target shares with the base becomes copies, the rest literal bytes."""

from collections.abc import Callable

import numpy as np

from common.artifact.digest import Hasher
from common.artifact.manifest import ArtifactRef
from common.artifact.source import ByteSource, digest_of_source, pieces
from common.delta.layout import (
    CODEC,
    LITERAL_BYTES_MAX,
    OPERATIONS_MAX,
    Header,
    Operations,
    OperationTotals,
    PatchSummary,
    write_block,
    write_header,
)
from common.delta.matching import BlockIndex, matches

Sink = Callable[[bytes], object]
Progress = Callable[[int, int], object]


def make(base: ByteSource, target: ByteSource, sink: Sink, *, progress: Progress | None = None) -> PatchSummary:
    """Write to `sink` a patch that rebuilds `target` from `base`.

    Deterministic for one version of zstd. Needs about 60 MB however large the files are. `progress` is told (bytes
    done, bytes in all), counting each pass over a file; an exception from it or from `sink` ends the work.
    """
    steps = _Steps(base.size + 2 * target.size, progress)
    index, base_reference = _index(base, steps)
    target_reference = ArtifactRef(digest_of_source(target, steps.advance), target.size)
    writer = _BlockWriter(target, sink)
    header_bytes = write_header(sink, Header(base_reference, target_reference))
    searched_from = steps.done
    for match in matches(base, target, index, lambda place: steps.reach(searched_from + place)):
        writer.literal(match.target)
        writer.copy(match.base, match.length)
    writer.literal(target.size)
    writer.flush()
    operations = writer.totals()
    return PatchSummary(
        codec=CODEC,
        base=base_reference,
        target=target_reference,
        patch_bytes=header_bytes + sum(kind.patch_bytes for kind in operations),
        operations=operations,
    )


def _index(base: ByteSource, steps: "_Steps") -> tuple[BlockIndex, ArtifactRef]:
    index, hasher = BlockIndex(base.size), Hasher()
    for piece in pieces(base):
        index.take(piece)
        hasher.update(piece)
        steps.advance(len(piece))
    index.finish()
    return index, ArtifactRef(hasher.digest(), base.size)


class _Steps:
    """Counts bytes looked at and tells whoever wants to know."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total = total
        self._progress = progress
        self.done = 0

    def advance(self, count: int) -> None:
        self.reach(self.done + count)

    def reach(self, done: int) -> None:
        self.done = done
        if self._progress is not None:
            self._progress(done, self._total)


class _BlockWriter:
    """Gathers operations in the order of the target and writes a block whenever one is full."""

    def __init__(self, target: ByteSource, sink: Sink) -> None:
        self._target = target
        self._sink = sink
        self._position = 0
        self._block_position = 0
        self._literals = bytearray()
        self._open_literal = 0
        self._operations: list[tuple[int, int, int]] = []
        self._copies = self._copied = self._copy_patch_bytes = 0
        self._runs = self._literal_bytes = self._literal_patch_bytes = 0

    def literal(self, end: int) -> None:
        """The target's bytes up to `end` are not in the base."""
        self._runs += end > self._position
        while self._position < end:
            room = LITERAL_BYTES_MAX - len(self._literals)
            piece = self._target.read_at(self._position, min(room, end - self._position))
            self._literals += piece
            self._open_literal += len(piece)
            self._position += len(piece)
            if len(self._literals) == LITERAL_BYTES_MAX:
                self.flush()

    def copy(self, offset: int, length: int) -> None:
        """The target's next `length` bytes are the base's from `offset` on."""
        self._operations.append((self._open_literal, length, offset))
        self._open_literal = 0
        self._position += length
        self._copies += 1
        self._copied += length
        if len(self._operations) == OPERATIONS_MAX - 1:
            self.flush()

    def flush(self) -> None:
        """Write what was gathered."""
        if self._open_literal:
            self._operations.append((self._open_literal, 0, 0))
        if not self._operations:
            return
        columns = np.array(self._operations, np.int64)
        operations = Operations(columns[:, 0], columns[:, 1], columns[:, 2])
        table_bytes, literal_bytes = write_block(self._sink, operations, self._block_position, bytes(self._literals))
        self._copy_patch_bytes += table_bytes
        self._literal_patch_bytes += literal_bytes
        self._literal_bytes += len(self._literals)
        self._operations.clear()
        self._literals.clear()
        self._open_literal = 0
        self._block_position = self._position

    def totals(self) -> tuple[OperationTotals, ...]:
        return (
            OperationTotals("copy", self._copies, self._copied, self._copy_patch_bytes),
            OperationTotals("literal", self._runs, self._literal_bytes, self._literal_patch_bytes),
        )
