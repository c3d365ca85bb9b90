"""Making a patch: tensors are paired with those of the base and written as blocks, what is between them as
differences of bytes.

What a model's files look like inside is only used to find good operations; whether they are right never depends on it.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile, zip_longest
from typing import NamedTuple

from common.artifact.manifest import ArtifactRef
from common.artifact.protobuf import Span
from common.artifact.source import ByteSource, digest_of_source, pieces
from common.artifact.weights import Weight, weights
from common.delta.blocks import Each, Encoder
from common.delta.codecs import CODECS, coder_of
from common.delta.layout import Header, fingerprint, write_header
from common.delta.operations import Literal, Operation
from common.delta.pairing import pair
from common.delta.skeleton import Skeleton, gaps
from common.delta.writing import sections

Sink = Callable[[bytes], object]
Progress = Callable[[int, int], object]


class Made(NamedTuple):
    """What was compared, and how long the patch is, in bytes."""

    base: ArtifactRef
    target: ArtifactRef
    patch_bytes: int


def make(
    base: ByteSource,
    target: ByteSource,
    sink: Sink,
    *,
    codec: str = CODECS[0],
    base_weights: Sequence[Weight] | None = None,
    target_weights: Sequence[Weight] | None = None,
    progress: Progress | None = None,
    each: Each = map,
) -> Made:
    """Write to `sink` a patch that rebuilds `target` from `base`.

    Where the tensors are is found in the files themselves, unless `base_weights` and `target_weights` say so (for a
    data file, see `external_weights`). Deterministic for one version of the compressors. Holds at most the patch of
    32 MiB of the target in memory. `progress` is told (bytes done, bytes in all), counting each pass over a file; an
    exception from it or from `sink` ends the work. `each` applies a function to several values like `map`, and may
    use more than one processor for it.
    """
    coder = coder_of(codec)
    steps = _Steps(base.size + 2 * target.size, progress)
    base_reference = ArtifactRef(digest_of_source(base, steps.advance), base.size)
    target_reference = ArtifactRef(digest_of_source(target, steps.advance), target.size)
    header = write_header(Header(codec, fingerprint(base_reference), fingerprint(target_reference)))
    patch_bytes = len(header)
    sink(header)
    old = weights(base) if base_weights is None else base_weights
    new = weights(target) if target_weights is None else target_weights
    operations = _operations(old, new, Encoder(base, target, coder, each))
    for section in sections(steps.counted(operations), base, target):
        patch_bytes += len(section)
        sink(section)
    return Made(base_reference, target_reference, patch_bytes)


def _operations(old: Sequence[Weight], new: Sequence[Weight], encoder: Encoder) -> Iterator[Operation]:
    """All operations, in the order of the target. A tensor without a partner is compared as bytes with all that is
    left of the base; what is really new in it is then written as elements.
    """
    base, target = encoder.base, encoder.target
    found = pair(base, old, target, new)
    pairs = [one for one in found if one.old is not None]
    alone = [one.new for one in found if one.old is None]
    partners = sorted({one.old.span for one in pairs if one.old is not None})
    target_gaps = gaps([one.new.span for one in pairs], target.size)
    skeleton = Skeleton(base, gaps(partners, base.size), target, target_gaps)
    for gap, next_pair in zip_longest(target_gaps, pairs):
        place = gap.start
        for operation in skeleton.take(gap.end - gap.start):
            end = place + operation.length
            if isinstance(operation, Literal):
                yield from _literal(Span(place, end), alone, encoder)
            else:
                yield operation
            place = end
        if next_pair is not None:
            yield from encoder.tensor(next_pair)


def _literal(span: Span, alone: Sequence[Weight], encoder: Encoder) -> Iterator[Operation]:
    """New bytes: those of tensors as elements, the others as they are."""
    place = span.start
    first = bisect_right(alone, place, key=lambda weight: weight.span.end)
    for weight in takewhile(lambda weight: weight.span.start < span.end, alone[first:]):
        start, end = max(place, weight.span.start), min(span.end, weight.span.end)
        yield from _bytes(encoder.target, Span(place, start))
        yield from encoder.fresh(weight, Span(start, end))
        place = end
    yield from _bytes(encoder.target, Span(place, span.end))


def _bytes(target: ByteSource, span: Span) -> Iterator[Operation]:
    return map(Literal, pieces(target, span.start, span.end))


class _Steps:
    """Counts bytes looked at and tells whoever wants to know."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total = total
        self._progress = progress
        self._done = 0

    def advance(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)

    def counted(self, operations: Iterator[Operation]) -> Iterator[Operation]:
        for operation in operations:
            yield operation
            self.advance(operation.length)
