"""The bytes of a model that are not weights: its graph, names, metadata, and the few bytes around each tensor.

The parts between the tensors, put one after another, make the skeleton. Skeleton is compared with skeleton as two small
files (`generic`); what comes out is put back to the places in the real files. For a file without known weights the
skeleton is the file.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

from common.artifact.protobuf import Span
from common.artifact.source import ByteSource, BytesSource
from common.delta.generic import diff
from common.delta.operations import Add, Copy, Literal

SMALL_BYTES = 8 * 1024 * 1024
"""Skeletons up to this size are held in memory."""


class Gathered:
    """Parts of a source, one after another, as a source."""

    def __init__(self, source: ByteSource, spans: Sequence[Span]) -> None:
        self._source = source
        self._spans = [span for span in spans if span.end > span.start]
        self._starts = [0, *accumulate(end - start for start, end in self._spans)]

    @property
    def size(self) -> int:
        return self._starts[-1]

    def read_at(self, offset: int, length: int) -> bytes:
        places = self.places(offset, max(0, min(length, self.size - offset)))
        return b"".join(self._source.read_at(start, end - start) for start, end in places)

    def places(self, offset: int, length: int) -> Iterator[Span]:
        """Where in the source the `length` bytes from `offset` on are."""
        index = bisect_right(self._starts, offset) - 1
        while length:
            span = self._spans[index]
            start = span.start + offset - self._starts[index]
            step = min(length, span.end - start)
            yield Span(start, start + step)
            offset, length, index = offset + step, length - step, index + 1


class Skeleton:
    """The operations for the target's skeleton, part by part."""

    def __init__(
        self, base: ByteSource, base_gaps: Sequence[Span], target: ByteSource, target_gaps: Sequence[Span]
    ) -> None:
        self._base = Gathered(base, base_gaps)
        ours, theirs = _at_hand(self._base), _at_hand(Gathered(target, target_gaps))
        self._operations = diff(ours, (Span(0, ours.size),), theirs, Span(0, theirs.size), shift=0)
        self._rest: Copy | Add | Literal | None = None

    def take(self, length: int) -> Iterator[Copy | Add | Literal]:
        """What writes the next `length` bytes of the skeleton."""
        while length:
            operation = self._rest or next(self._operations)
            head, self._rest = _cut(operation, length)
            length -= head.length
            yield from self._placed(head)

    def _placed(self, operation: Copy | Add | Literal) -> Iterator[Copy | Add | Literal]:
        if isinstance(operation, Literal):
            yield operation
            return
        done = 0
        for start, end in self._base.places(operation.offset, operation.length):
            if isinstance(operation, Copy):
                yield Copy(start, end - start)
            else:
                yield Add(start, operation.differences[done : done + end - start])
            done += end - start


def _at_hand(gathered: Gathered) -> ByteSource:
    """A small skeleton is looked at in many places many times."""
    return BytesSource(gathered.read_at(0, gathered.size)) if gathered.size <= SMALL_BYTES else gathered


def gaps(spans: Sequence[Span], size: int) -> list[Span]:
    """What `spans`, in order, leave of a file of `size` bytes; some may be empty. One more than there are spans."""
    starts = [0, *(span.end for span in spans)]
    ends = [*(span.start for span in spans), size]
    return [Span(start, end) for start, end in zip(starts, ends, strict=True)]


def _cut(operation: Copy | Add | Literal, length: int) -> tuple[Copy | Add | Literal, Copy | Add | Literal | None]:
    """The first `length` bytes of what `operation` writes, and the rest if there is any."""
    if operation.length <= length:
        return operation, None
    match operation:
        case Literal(data):
            return Literal(data[:length]), Literal(data[length:])
        case Copy(offset, whole):
            return Copy(offset, length), Copy(offset + length, whole - length)
        case Add(offset, differences):
            return Add(offset, differences[:length]), Add(offset + length, differences[length:])
