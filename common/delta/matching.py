"""Finding what two files share: runs of equal bytes, at any offset in both.

The base is cut into blocks and their hashes are kept; a rolling hash then looks at the target from every byte. Where a
block of the base is recognised, the match is compared byte by byte and grown in both directions, so a hash that
collides costs time and never correctness. Every unchanged run of two blocks is found, shorter ones often are.

Hashes are polynomials over the bytes, modulo 2^64, computed for all positions at once by doubling: the hash of 2w bytes
is the hash of the first w times P^w plus the hash of the next w. (Karp and Rabin, 1987; the blocks of one file against
every offset of the other are rsync's, Tridgell 1999.)

Memory: the index holds at most `BLOCKS_MAX` hashes (about 40 MB), the target is looked at `WINDOW_BYTES` at a time.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.artifact.source import PIECE_BYTES, ByteSource

BLOCK_BYTES_MIN = 64
BLOCKS_MAX = 1 << 20
WINDOW_BYTES = 256 * 1024
FIRST_LOOK_BYTES = 256
"""How much is compared first when a match is grown; it doubles twice each time."""
FILTER_BITS_MIN, FILTER_BITS_MAX = 12, 24
MULTIPLIER = 0x9E37_79B9_7F4A_7C15
"""Odd, without pattern: 2^64 divided by the golden ratio (Knuth, TAOCP 6.4)."""
_MASK = (1 << 64) - 1

Hashes = NDArray[np.uint64]
Offsets = NDArray[np.int64]


class Match(NamedTuple):
    """`length` bytes from `target` in the target equal those from `base` in the base."""

    target: int
    base: int
    length: int


def matches(
    base: ByteSource, target: ByteSource, index: "BlockIndex", passed: Callable[[int], object]
) -> Iterator[Match]:
    """Matches in the order of the target, none overlapping another; `passed` is told how far the search has come."""
    start = covered = shift = 0
    while start + index.block_bytes <= target.size:
        data = np.frombuffer(target.read_at(start, WINDOW_BYTES + index.block_bytes - 1), np.uint8)
        hashes = rolling_hashes(data, index.block_bytes)
        places, candidates = index.lookup(hashes)
        next_place = 0
        while next_place < len(places):
            place = start + int(places[next_place])
            match = _longest(base, target, place, {place + shift, int(candidates[next_place])}, covered)
            if match.length < index.block_bytes:
                next_place += 1
                continue
            yield match
            covered, shift = match.target + match.length, match.base - match.target
            next_place = int(np.searchsorted(places, covered - start))
        start = max(start + len(hashes), covered)
        passed(start)
    passed(target.size)


class BlockIndex:
    """The hashes of the blocks of a base file, and where each hash occurs first."""

    def __init__(self, size: int) -> None:
        self.block_bytes = block_bytes_for(size)
        self._parts: list[Hashes] = []
        self._rest = b""
        self._hashes: Hashes = np.empty(0, np.uint64)
        self._offsets: Offsets = np.empty(0, np.int64)
        self._filter_bits = FILTER_BITS_MIN
        self._filter = np.zeros(1 << FILTER_BITS_MIN, np.bool_)

    def take(self, data: bytes) -> None:
        """Take in the next bytes of the base."""
        for start in range(0, len(data), WINDOW_BYTES):
            part = self._rest + data[start : start + WINDOW_BYTES]
            whole = len(part) - len(part) % self.block_bytes
            self._rest = part[whole:]
            self._parts.append(block_hashes(np.frombuffer(part, np.uint8, whole), self.block_bytes))

    def finish(self) -> None:
        """All of the base was taken in; `lookup` may be used."""
        hashes = np.concatenate([self._hashes, *self._parts])
        self._parts.clear()
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        first = np.ones(len(hashes), np.bool_)
        first[1:] = hashes[1:] != hashes[:-1]
        self._hashes, self._offsets = hashes[first], order[first].astype(np.int64) * self.block_bytes
        self._filter_bits = min(max(len(self._hashes).bit_length() + 4, FILTER_BITS_MIN), FILTER_BITS_MAX)
        self._filter = np.zeros(1 << self._filter_bits, np.bool_)
        self._filter[self._slots(self._hashes)] = True

    def lookup(self, hashes: Hashes) -> tuple[Offsets, Offsets]:
        """Indices into `hashes` that occur in the base, ascending, and the base offset of each."""
        places = np.flatnonzero(self._filter[self._slots(hashes)])
        wanted = hashes[places]
        found = np.searchsorted(self._hashes, wanted)
        found[found == len(self._hashes)] = 0
        real = self._hashes[found] == wanted if len(self._hashes) else np.zeros(0, np.bool_)
        return places[real], self._offsets[found[real]]

    def _slots(self, hashes: Hashes) -> Offsets:
        return ((hashes * np.uint64(MULTIPLIER)) >> np.uint64(64 - self._filter_bits)).astype(np.int64)


def block_bytes_for(size: int) -> int:
    """The block length for a base of `size` bytes: a power of two, so that there are at most `BLOCKS_MAX` blocks."""
    block_bytes = BLOCK_BYTES_MIN
    while size // block_bytes > BLOCKS_MAX:
        block_bytes *= 2
    return block_bytes


def rolling_hashes(data: NDArray[np.uint8], block_bytes: int) -> Hashes:
    """The hash of each run of `block_bytes` in `data`, one per starting byte."""
    hashes = data.astype(np.uint64)
    width, power = 1, MULTIPLIER
    while width < block_bytes:
        hashes = hashes[:-width] * np.uint64(power) + hashes[width:]
        width, power = width * 2, power * power & _MASK
    return hashes


def block_hashes(data: NDArray[np.uint8], block_bytes: int) -> Hashes:
    """The hash of each block of `data`, whose length is a multiple of `block_bytes`."""
    hashes = data.astype(np.uint64)
    width, power = 1, MULTIPLIER
    while width < block_bytes:
        hashes = hashes[0::2] * np.uint64(power) + hashes[1::2]
        width, power = width * 2, power * power & _MASK
    return hashes


def _longest(base: ByteSource, target: ByteSource, place: int, candidates: set[int], covered: int) -> Match:
    """The longest match through `place` of the target among the offsets in `candidates`, grown back to `covered`."""
    lengths = {at: _common_ahead(base, target, at, place) for at in candidates if 0 <= at < base.size}
    at = max(lengths, key=lambda candidate: (lengths[candidate], -candidate))
    behind = _common_behind(base, target, at, place, min(at, place - covered))
    return Match(place - behind, at - behind, lengths[at] + behind)


def _common_ahead(base: ByteSource, target: ByteSource, base_at: int, target_at: int) -> int:
    """How many bytes are equal from the two offsets on."""
    limit = min(base.size - base_at, target.size - target_at)
    common, look = 0, FIRST_LOOK_BYTES
    while common < limit:
        length = min(look, limit - common)
        ours, theirs = base.read_at(base_at + common, length), target.read_at(target_at + common, length)
        if ours != theirs:
            return common + _first_difference(ours, theirs)
        common += length
        look = min(look * 4, PIECE_BYTES)
    return common


def _common_behind(base: ByteSource, target: ByteSource, base_at: int, target_at: int, limit: int) -> int:
    """How many bytes, at most `limit`, are equal right before the two offsets."""
    common, look = 0, FIRST_LOOK_BYTES
    while common < limit:
        length = min(look, limit - common)
        ours = base.read_at(base_at - common - length, length)
        theirs = target.read_at(target_at - common - length, length)
        if ours != theirs:
            return common + _first_difference(ours[::-1], theirs[::-1])
        common += length
        look = min(look * 4, PIECE_BYTES)
    return common


def _first_difference(ours: bytes, theirs: bytes) -> int:
    return int((np.frombuffer(ours, np.uint8) != np.frombuffer(theirs, np.uint8)).argmax())
