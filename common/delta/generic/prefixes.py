"""Which bytes of the base a compressor should have seen before it compresses new bytes.

New names and nodes resemble old ones without being copies of them: with the old ones as a prefix, zstd refers to parts
of a few bytes more cheaply than operations could. A device has to hold the prefix in memory, and each range of it must
be named in the patch, so it is short and made of few ranges: those blocks of the base where most seeds of the new bytes
occur.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from common.artifact.protobuf import Span
from common.artifact.source import ByteSource, BytesSource
from common.delta import frames
from common.delta.generic.seeds import ENTRIES_MAX, SeedIndex, seed_hashes

PREFIX_BYTES_MAX = 1 << 20
RANGES_MAX = 8
RANGE_BYTES = 8
"""About what it takes to name a range."""
BLOCK_BYTES = 4096
LITERAL_BYTES_MIN = 16
SEED_BYTES = 8
TRIAL_LEVEL = 19


def literal_prefix(base: ByteSource, base_spans: Sequence[Span], literals: bytes) -> list[Span]:
    """Ranges of the base within `base_spans`, ascending, at most `RANGES_MAX` and `PREFIX_BYTES_MAX` in all, that make
    `literals` smaller as a prefix; none when they would not by what it takes to name them.
    """
    if len(literals) < LITERAL_BYTES_MIN:
        return []
    total = sum(span.end - span.start for span in base_spans)
    small = len(base_spans) <= RANGES_MAX and total <= PREFIX_BYTES_MAX
    ranges = list(base_spans) if small else _promising(base, base_spans, literals[:ENTRIES_MAX])
    prefix = b"".join(base.read_at(start, end - start) for start, end in ranges)
    plain = min(len(literals), len(frames.compress(literals, level=TRIAL_LEVEL)))
    helped = len(frames.compress(literals, prefix=prefix, level=TRIAL_LEVEL)) + RANGE_BYTES * len(ranges)
    return ranges if helped < plain else []


def _promising(base: ByteSource, base_spans: Sequence[Span], literals: bytes) -> list[Span]:
    blocks = [
        Span(start, min(start + BLOCK_BYTES, span.end))
        for span in base_spans
        for start in range(span.start, span.end, BLOCK_BYTES)
    ]
    hits = _hits(base, blocks, literals)
    room = PREFIX_BYTES_MAX
    chosen = np.zeros(len(blocks), np.bool_)
    for index in np.argsort(-hits, kind="stable").tolist():
        room -= blocks[index].end - blocks[index].start
        if room < 0 or not hits[index]:
            break
        chosen[index] = True
    ranges: list[tuple[int, Span]] = []
    for index in np.flatnonzero(chosen).tolist():
        span = blocks[index]
        if ranges and ranges[-1][1].end == span.start:
            ranges[-1] = (ranges[-1][0] + int(hits[index]), Span(ranges[-1][1].start, span.end))
        else:
            ranges.append((int(hits[index]), span))
    most = sorted(ranges, key=lambda each: (-each[0], each[1]))[:RANGES_MAX]
    return sorted(span for _, span in most)


def _hits(base: ByteSource, blocks: Sequence[Span], literals: bytes) -> NDArray[np.int64]:
    """How many places of each block begin with a seed of the literals."""
    index = SeedIndex(BytesSource(literals), (Span(0, len(literals)),), width=SEED_BYTES, step=1)
    return np.array(
        [len(index.places(seed_hashes(base.read_at(start, end - start), SEED_BYTES))) for start, end in blocks],
        np.int64,
    )
