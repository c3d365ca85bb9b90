"""Which bytes of the base lie under which bytes of the target, in files of any size.

All of the target is laid over the base, run after run, each run at one shift (base offset minus target offset). A run
goes on until a seed shows that another shift agrees in more bytes; the border then goes where the two together agree
best, however many bytes differ on either side: code that moved keeps its place over the old code although every address
in it changed (the idea is bsdiff's, Percival 2003). What to do with the bytes that differ is for others to decide.

Equal regions are compared in big pieces and nothing else happens to them; the seeds of the base are only collected when
something differs. Memory: the index (`seeds`), and pieces of `WINDOW_BYTES` and `REACH_BACK_BYTES` of both files.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.artifact.protobuf import Span
from common.artifact.source import ByteSource
from common.delta.generic.seeds import ENTRIES_MAX, Offsets, SeedIndex, seed_hashes

SEED_BYTES_MIN, SEED_BYTES_MAX = 16, 64
WINDOW_BYTES = 1 << 18
"""How much of the target is looked at at a time."""
FIRST_WINDOW_BYTES = 1 << 10
"""How much after a change of shift, for the next may be near; it doubles."""
FIRST_LOOK_BYTES = 64
"""How much is compared first when a match is grown; it doubles twice each time."""
GAIN_BYTES_MIN = 8
"""How many more bytes must agree before a change of shift pays (bsdiff's number, and it is about the cost here too)."""
REACH_BACK_BYTES = 1 << 16
"""How far before a seed a run may begin."""

Mask = NDArray[np.bool_]


class Run(NamedTuple):
    """The target's bytes from `start` to `end` lie over the base at `shift`, where it has any."""

    start: int
    end: int
    shift: int


class Overlay:
    """A target, and a base under it."""

    def __init__(self, base: ByteSource, target: ByteSource) -> None:
        self.base, self.target = base, target

    def same(self, start: int, end: int, shift: int) -> bool:
        """Whether all bytes agree."""
        if not 0 <= start + shift <= self.base.size - (end - start):
            return False
        return self.target.read_at(start, end - start) == self.base.read_at(start + shift, end - start)

    def agreement(self, start: int, end: int, shift: int) -> Mask:
        """Which bytes agree; where the base has none, none do."""
        ours = np.frombuffer(self.target.read_at(start, end - start), np.uint8)
        first = min(max(-(start + shift), 0), end - start)
        last = max(min(self.base.size - (start + shift), end - start), first)
        theirs = np.frombuffer(self.base.read_at(start + shift + first, last - first), np.uint8)
        if last - first == len(ours):
            whole: Mask = ours == theirs
            return whole
        mask = np.zeros(len(ours), np.bool_)
        mask[first:last] = ours[first:last] == theirs
        return mask

    def ahead(self, start: int, limit: int, shift: int) -> int:
        """Where, at most at `limit`, the equal bytes from `start` on end."""
        limit = min(limit, self.base.size - shift) if start + shift >= 0 else start
        look = FIRST_LOOK_BYTES
        while start < limit:
            stop = min(start + look, limit)
            difference = self._difference(start, stop, shift)
            if difference:
                return start + ((difference & -difference).bit_length() - 1) // 8
            start, look = stop, min(look * 4, WINDOW_BYTES)
        return start

    def behind(self, start: int, limit: int, shift: int) -> int:
        """Where, at least at `limit`, the equal bytes before `start` begin."""
        limit = max(limit, -shift) if start + shift <= self.base.size else start
        look = FIRST_LOOK_BYTES
        while start > limit:
            stop = max(start - look, limit)
            difference = self._difference(stop, start, shift)
            if difference:
                return stop + (difference.bit_length() - 1) // 8 + 1
            start, look = stop, min(look * 4, WINDOW_BYTES)
        return start

    def _difference(self, start: int, end: int, shift: int) -> int:
        """0 where all bytes agree; else a number whose lowest bytes are zero for the first bytes that do (one exclusive
        or of big integers is the fastest way for short runs, and there are very many of those).
        """
        ours, theirs = self.target.read_at(start, end - start), self.base.read_at(start + shift, end - start)
        return 0 if ours == theirs else int.from_bytes(ours, "little") ^ int.from_bytes(theirs, "little")


class Aligner:
    """Lays target spans over the base; the seeds of the base are collected once, when first needed."""

    def __init__(
        self, base: ByteSource, spans: Sequence[Span], target: ByteSource, passed: Callable[[int], object]
    ) -> None:
        self._overlay = Overlay(base, target)
        self._spans = spans
        self._passed = passed

    @cached_property
    def index(self) -> SeedIndex:
        size = sum(span.end - span.start for span in self._spans)
        step = 1
        while size // step > ENTRIES_MAX:
            step *= 2
        width = min(max(step, SEED_BYTES_MIN), SEED_BYTES_MAX)
        return SeedIndex(self._overlay.base, self._spans, width=width, step=step)

    def runs(self, span: Span, shift: int) -> Iterator[Run]:
        """Runs that together are `span`; the first is looked for at `shift`."""
        start = span.start
        while (anchor := self._next_anchor(start, span.end, shift)) is not None:
            place, other = anchor
            border = self._border(start, place, shift, other)
            if border > start:
                yield Run(start, border, shift)
            start, shift = border, other
        if span.end > start:
            yield Run(start, span.end, shift)

    def _next_anchor(self, start: int, end: int, shift: int) -> tuple[int, int] | None:
        """The next place of the target where another shift agrees better, and that shift."""
        look = FIRST_WINDOW_BYTES
        while start < end:
            stop = min(start + look, end)
            if not self._overlay.same(start, stop, shift):
                anchor = self._anchor_in(start, stop, end, shift)
                if anchor is not None:
                    return anchor
            start, look = stop, min(look * 2, WINDOW_BYTES)
            self._passed(start)
        return None

    def _anchor_in(self, start: int, stop: int, end: int, shift: int) -> tuple[int, int] | None:
        places, shifts = self._strangers(start, min(stop + self.index.width - 1, end), shift)
        at = 0
        while at < len(places):
            place = int(places[at])
            reach = {int(other): self._overlay.ahead(place, end, int(other)) for other in shifts[:, at]}
            other = max(reach, key=lambda other: (reach[other], -abs(other - shift), other))
            first = self._overlay.behind(place, max(start, place - REACH_BACK_BYTES), other)
            last = min(reach[other], first + WINDOW_BYTES)
            kept = int(np.count_nonzero(self._overlay.agreement(first, last, shift)))
            if last - first > kept + GAIN_BYTES_MIN:
                return first, other
            at = int(np.searchsorted(places, max(last - self.index.width, place) + 1))
        return None

    def _strangers(self, start: int, end: int, shift: int) -> tuple[Offsets, Offsets]:
        """Places where a seed of the base begins that does not agree at `shift`, and the two shifts at which it occurs
        nearest and first in the base (the first goes on longest where something repeats).
        """
        width = self.index.width
        hashes = seed_hashes(self._overlay.target.read_at(start, end - start), width)
        differing = np.cumsum(~self._overlay.agreement(start, end, shift), dtype=np.int32)
        differing[width:] -= differing[:-width].copy()
        places = np.flatnonzero(differing[width - 1 :])
        places = places[self.index.places(hashes[places])]
        wanted = hashes[places]
        places += start
        offsets = [self.index.nearest(wanted, places + shift), self.index.nearest(wanted, np.zeros_like(places))]
        return places, np.stack(offsets) - places

    def _border(self, start: int, place: int, left: int, right: int) -> int:
        """Where between `start` and `place` to change from shift `left` to `right` so that most bytes agree."""
        start = max(start, place - REACH_BACK_BYTES)
        if start == place:
            return place
        over_left = self._overlay.agreement(start, place, left)
        over_right = self._overlay.agreement(start, place, right)
        gain = np.cumsum(over_left.astype(np.int32) - over_right)
        best = int(gain.argmax())
        return start + best + 1 if gain[best] > 0 else start
