"""The cheapest way to write a small target from a small base, byte for byte.

A path through the target is looked for, from its first byte to its last, each step a literal byte or a copy, at the
least cost in bytes as the format writes them: a copy that goes on at the shift of the last one costs less than one from
elsewhere, and a literal byte costs less after another. (Optimal parsing; the rules of the road are those of zstd's and
LZMA's optimal parsers: where a copy may begin, the longest ones are tried, and a very long one is taken at once.)

Time and memory grow with the size of the target: some ten microseconds and 300 bytes for each byte not in a long copy.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from common.artifact.protobuf import Span
from common.artifact.source import ByteSource
from common.delta.generic.alignment import Overlay
from common.delta.generic.seeds import SeedIndex, seed_hashes
from common.delta.operations import Add, Copy, Literal
from common.delta.varint import zigzag

SEED_WIDTHS = (4, 8, 16, 32, 64)
PARSED_BYTES_MAX = 384 * 1024
"""Some seconds of work, and about 100 MB."""
BORDER_BYTES = 128
"""How much of what is equal at either end of a span the search may still give to a neighbour."""
COPY_BYTES_MIN = 2
TAKE_BYTES_MIN = 128
"""A copy of at least this length is taken without looking for others."""


class Costs(NamedTuple):
    """What steps cost, in bytes: a literal byte, which may compress, and what a copy takes besides its numbers."""

    literal: float
    copy: float


class Step(NamedTuple):
    """`length` target bytes, copied at `shift`, or literal when that is None."""

    length: int
    shift: int | None


class Parser:
    """Finds paths from the spans of `base` to spans of `target`."""

    def __init__(self, base: ByteSource, spans: Sequence[Span], target: ByteSource) -> None:
        self._overlay = Overlay(base, target)
        self._spans = spans
        self._indices = [SeedIndex(base, spans, width=width, step=1) for width in SEED_WIDTHS]

    def paths(self, span: Span, shift: int, assumptions: Sequence[Costs]) -> Iterator[list[Step]]:
        """The cheapest path over `span` under each assumption, when the operation before it was at `shift`. Where much
        differs only the first assumptions are tried, or none: at most `PARSED_BYTES_MAX` bytes are gone through.
        """
        head, tail, tail_shift = self._ends(span, shift)
        middle = Span(head, tail)
        affordable = PARSED_BYTES_MAX // max(tail - head, 1)
        candidates = self._candidates(middle, shift) if affordable else {}
        for costs in assumptions[:affordable]:
            steps = [Step(head - span.start, shift)] if head > span.start else []
            steps += _Path(self._overlay, middle, candidates, shift).steps(costs)
            steps += [Step(span.end - tail, tail_shift)] if span.end > tail else []
            yield _joined(steps)

    def _ends(self, span: Span, shift: int) -> tuple[int, int, int]:
        """Where what is equal at the beginning stops and what is equal at the end starts, and the shift there. Both
        leave some bytes to the search for the best border.
        """
        head = self._overlay.ahead(span.start, span.end, shift)
        if head == span.end:
            return span.end, span.end, shift
        head = max(head - BORDER_BYTES, span.start)
        tail_shift = (self._spans[-1].end if self._spans else 0) - span.end
        tail = min(self._overlay.behind(span.end, head, tail_shift) + BORDER_BYTES, span.end)
        return head, tail, tail_shift

    def _candidates(self, span: Span, shift: int) -> dict[int, list[int]]:
        """The shifts worth trying at each byte: where the longest seeds are that begin with it."""
        candidates: dict[int, list[int]] = {}
        data = self._overlay.target.read_at(span.start, span.end - span.start)
        for index in self._indices:
            hashes = seed_hashes(data, index.width)
            places = index.places(hashes)
            starts = places + span.start
            expected = [starts + shift]
            if index.width == max(SEED_WIDTHS):
                # Where something repeats, its first occurrence goes on longest.
                expected.append(np.zeros_like(starts))
            for offsets in expected:
                shifts = index.nearest(hashes[places], offsets) - starts
                for place, other in zip(places.tolist(), shifts.tolist(), strict=True):
                    known = candidates.setdefault(place, [])
                    if other not in known:
                        known.append(other)
        return candidates


class _Path:
    """The cheapest steps to each byte of a span, found from the first to the last."""

    def __init__(self, overlay: Overlay, span: Span, candidates: dict[int, list[int]], shift: int) -> None:
        count = span.end - span.start
        self._overlay, self._span, self._candidates = overlay, span, candidates
        self._costs = [float("inf")] * (count + 1)
        self._costs[0] = 0.0
        self._lengths = [0] * (count + 1)
        self._copied = [True] * (count + 1)
        self._shifts = [shift] * (count + 1)
        """Of the last copy before a byte."""
        self._ends: dict[int, int] = {}

    def steps(self, price: Costs) -> list[Step]:
        place, count = 0, self._span.end - self._span.start
        while place < count:
            place = self._leave(place, price)
        steps = []
        while place > 0:
            length = self._lengths[place]
            steps.append(Step(length, self._shifts[place] if self._copied[place] else None))
            place -= length
        return _joined(steps[::-1])

    def _leave(self, place: int, price: Costs) -> int:
        """Try all steps from `place`; returns from where to go on."""
        shift, cost = self._shifts[place], self._costs[place]
        literal = cost + price.literal + self._copied[place]
        if literal < self._costs[place + 1]:
            self._reach(place + 1, literal, 1, shift, copied=False)
        farthest = 1
        for other in (shift, *self._candidates.get(place, ())):
            length = self._equal(self._span.start + place, other)
            if length < COPY_BYTES_MIN:
                continue
            numbers = 1 if other == shift else _varint_bytes(zigzag(other - shift))
            copied = cost + price.copy + numbers + _varint_bytes(length << 2)
            if copied < self._costs[place + length]:
                self._reach(place + length, copied, length, other, copied=True)
            farthest = max(farthest, length)
        return place + (farthest if farthest >= TAKE_BYTES_MIN else 1)

    def _reach(self, end: int, cost: float, length: int, shift: int, *, copied: bool) -> None:
        self._costs[end], self._lengths[end], self._shifts[end], self._copied[end] = cost, length, shift, copied

    def _equal(self, start: int, shift: int) -> int:
        """How many bytes from `start` of the target on are equal at `shift`."""
        end = self._ends.get(shift, 0)
        if end <= start:
            end = self._ends[shift] = self._overlay.ahead(start, self._span.end, shift)
        return end - start


def operations(
    steps: Sequence[Step], base: ByteSource, target: ByteSource, start: int, *, fused: int
) -> list[Copy | Add | Literal]:
    """The operations for `steps`, whose first writes to `start` of the target. Where literals lie between copies of one
    shift, they and neighbouring copies of less than `fused` bytes become one addition.
    """
    out: list[Copy | Add | Literal] = []
    for step, adds in _fused(steps, start, base.size, fused):
        ours = target.read_at(start, step.length)
        if step.shift is None:
            out.append(Literal(ours))
        elif adds:
            theirs = np.frombuffer(base.read_at(start + step.shift, step.length), np.uint8)
            out.append(Add(start + step.shift, (np.frombuffer(ours, np.uint8) - theirs).tobytes()))
        else:
            out.append(Copy(start + step.shift, step.length))
        start += step.length
    return out


def _fused(steps: Sequence[Step], start: int, base_size: int, copy_bytes_max: int) -> list[tuple[Step, bool]]:
    """The steps, and whether each is an addition."""
    out: list[tuple[Step, bool]] = []
    for index, step in enumerate(steps):
        adds, shift = False, step.shift
        if shift is None and 0 < index < len(steps) - 1 and copy_bytes_max:
            shift = steps[index - 1].shift
            same = shift is not None and shift == steps[index + 1].shift
            adds = same and step.length <= copy_bytes_max
            shift = shift if adds else None
        elif shift is not None and step.length < copy_bytes_max and out and out[-1][1] and out[-1][0].shift == shift:
            adds = True
        if adds and out and out[-1][1] and out[-1][0].shift == shift:
            out[-1] = (Step(out[-1][0].length + step.length, shift), True)
        else:
            out.append((Step(step.length, shift), adds))
    return out


def _joined(steps: Sequence[Step]) -> list[Step]:
    """Neighbouring steps of one kind as one."""
    out: list[Step] = []
    for step in steps:
        if out and out[-1].shift == step.shift:
            out[-1] = Step(out[-1].length + step.length, step.shift)
        else:
            out.append(step)
    return out


def _varint_bytes(number: int) -> int:
    return max((number.bit_length() + 6) // 7, 1)
