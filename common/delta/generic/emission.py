"""From an alignment to operations: which bytes are copied, which are changed by differences, which are new.

Within a run that lies over the base, long equal stretches are copies. The stretches between are additions as far as
more bytes agree than differ, counted from either end: differences are then mostly zeros and compress to the places and
values of what changed. What is left in the middle has nothing to do with the base there and is literal.
"""

from collections.abc import Iterator

import numpy as np

from common.artifact.source import ByteSource
from common.delta.generic.alignment import WINDOW_BYTES, Mask, Overlay, Run
from common.delta.operations import Add, Copy, Literal

COPY_BYTES_MIN = 16 * 1024
"""Shorter equal stretches between changes are zeros in the differences: packed (`common.delta.sparse`) they cost less
than the two operations around them. Longer ones are not worth the room in a section."""
LITERAL_BYTES_MIN = 16
"""Fewer bytes that disagree stay in the differences around them."""

ByteOperation = Copy | Add | Literal


def operations(base: ByteSource, target: ByteSource, runs: Iterator[Run]) -> Iterator[ByteOperation]:
    """The operations that write what `runs` cover, at most `WINDOW_BYTES` in each that brings bytes."""
    overlay = Overlay(base, target)
    copy: Copy | None = None
    for operation in _in_windows(overlay, runs):
        if copy is not None:
            if isinstance(operation, Copy) and operation.offset == copy.offset + copy.length:
                copy = Copy(copy.offset, copy.length + operation.length)
                continue
            yield copy
            copy = None
        if isinstance(operation, Copy):
            copy = operation
        else:
            yield operation
    if copy is not None:
        yield copy


def _in_windows(overlay: Overlay, runs: Iterator[Run]) -> Iterator[ByteOperation]:
    for run in runs:
        first = min(max(run.start, -run.shift), run.end)
        last = max(min(run.end, overlay.base.size - run.shift), first)
        yield from _literals(overlay, run.start, first)
        for start in range(first, last, WINDOW_BYTES):
            end = min(start + WINDOW_BYTES, last)
            if overlay.same(start, end, run.shift):
                yield Copy(start + run.shift, end - start)
            else:
                yield from _mixed(overlay, Run(start, end, run.shift))
        yield from _literals(overlay, last, run.end)


def _literals(overlay: Overlay, start: int, end: int) -> Iterator[Literal]:
    for piece in range(start, end, WINDOW_BYTES):
        yield Literal(overlay.target.read_at(piece, min(WINDOW_BYTES, end - piece)))


def _mixed(overlay: Overlay, run: Run) -> Iterator[ByteOperation]:
    """The operations of a window in which some bytes differ."""
    agreement = overlay.agreement(run.start, run.end, run.shift)
    edges = np.flatnonzero(np.diff(agreement, prepend=~agreement[:1], append=~agreement[-1:]))
    lengths = np.diff(edges)
    long = np.flatnonzero(agreement[edges[:-1]] & (lengths >= COPY_BYTES_MIN))
    done = 0
    for start, length in zip(edges[long].tolist(), lengths[long].tolist(), strict=True):
        yield from _changed(overlay, run, agreement[done:start], run.start + done)
        yield Copy(run.start + start + run.shift, length)
        done = start + length
    yield from _changed(overlay, run, agreement[done:], run.start + done)


def _changed(overlay: Overlay, run: Run, agreement: Mask, start: int) -> Iterator[Add | Literal]:
    """The operations of the target's bytes from `start` on, which lie between copies."""
    first, last = _kept(agreement)
    for length, adds in ((first, True), (len(agreement) - first - last, False), (last, True)):
        if not length:
            continue
        ours = overlay.target.read_at(start, length)
        if adds:
            theirs = np.frombuffer(overlay.base.read_at(start + run.shift, length), np.uint8)
            yield Add(start + run.shift, (np.frombuffer(ours, np.uint8) - theirs).tobytes())
        else:
            yield Literal(ours)
        start += length


def _kept(agreement: Mask) -> tuple[int, int]:
    """How many bytes at the beginning and at the end agree more than not."""
    score = np.where(agreement, 1, -1)
    ahead, behind = np.cumsum(score), np.cumsum(score[::-1])
    if not len(score):
        return 0, 0
    first = int(ahead.argmax()) + 1 if ahead.max() > 0 else 0
    last = int(behind.argmax()) + 1 if behind.max() > 0 else 0
    if first + last >= len(score) - LITERAL_BYTES_MIN and agreement.any():
        return len(score), 0
    return first, last
